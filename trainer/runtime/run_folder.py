"""Name every file of a run folder, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """Give the paths of a run; nothing is created or read here.

    Attributes:
        path: ``run_dir`` of the configuration.
    """

    path: Path

    @property
    def config(self) -> Path:
        """All settings of the run, as resolved."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object a step."""
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """One JSON object for each event beside the steps: resumes, rewinds, failures."""
        return self.path / "events.jsonl"

    @property
    def skipped_windows(self) -> Path:
        """Steps whose data are skipped since a rewind."""
        return self.path / "skipped_windows.json"

    @property
    def ledger(self) -> Path:
        """Folder with one file a rank: the samples that applied steps consumed."""
        return self.path / "ledger"

    @property
    def checkpoints(self) -> Path:
        """Folder with one folder a checkpoint."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """Folder with the weights to use elsewhere, written when the run is complete."""
        return self.path / "export"

    @property
    def complete(self) -> Path:
        """Marker of a complete run: a digest of its configuration."""
        return self.path / "complete"

    @property
    def lock(self) -> Path:
        """File that the job holds locked."""
        return self.path / "lock"

    @property
    def stacks(self) -> Path:
        """Folder with the stacks of all processes, written when one hangs."""
        return self.path / "stacks"

    @property
    def traces(self) -> Path:
        """Folder with the traces of torch's profiler."""
        return self.path / "traces"

    @property
    def tensorboard(self) -> Path:
        """Folder with TensorBoard's event files."""
        return self.path / "tensorboard"

    @property
    def tokenizer(self) -> Path:
        """Folder with the tokenizer that ``trainer.pretrain_lm`` trained."""
        return self.path / "tokenizer"

    @property
    def architecture(self) -> Path:
        """Folder with the open_clip architecture that ``trainer.pretrain_vision`` trains."""
        return self.path / "architecture"

    @property
    def zero_shot(self) -> Path:
        """Scores of the zero-shot tests that ``trainer.zero_shot`` made."""
        return self.path / "zero_shot.json"

    @property
    def forgetting(self) -> Path:
        """How well the language model predicted held-out text before the first step."""
        return self.path / "forgetting.json"

    @property
    def wandb_id(self) -> Path:
        """Id of the run in Weights & Biases, and the folder that it was made for."""
        return self.path / "wandb_id"

    def ledger_of(self, rank: int) -> Path:
        """Return the ledger of a rank."""
        return self.ledger / f"rank-{rank}.jsonl"
