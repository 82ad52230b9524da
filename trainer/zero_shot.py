"""Test the towers of a run of ``trainer.pretrain_vision`` on data that they were not trained on.

``[deepspeed ... --module] trainer.zero_shot CONFIG.yaml [--section.key VALUE ...]``

It loads ``run_dir/export``, runs the tests of the section ``zero_shot``, prints their scores and writes them to
``run_dir/zero_shot.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from trainer.config.command_line import parse_arguments
from trainer.config.run_config import ContrastiveRunConfig
from trainer.entry import exit_now, quiet_libraries
from trainer.errors import TrainerError
from trainer.runtime.files import write_atomically
from trainer.runtime.run_folder import RunFolder

if TYPE_CHECKING:
    from trainer.runtime.distributed import World


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests and return the exit code."""
    config = parse_arguments(ContrastiveRunConfig, argv)
    from trainer.runtime import distributed

    quiet_libraries()
    try:
        world = distributed.initialize(config.deepspeed.timeout_seconds, config.training.threads)
        scores = _scores(config, world)
        if world.is_main:
            text = json.dumps(scores, indent=1)
            write_atomically(RunFolder(config.run_dir).zero_shot, text + "\n")
            print(text)
    except (OSError, ValueError, TrainerError) as error:
        print(f"trainer.zero_shot: {error}", file=sys.stderr)
        return 1
    finally:
        distributed.shut_down()
    return 0


def _scores(config: ContrastiveRunConfig, world: World) -> dict[str, float]:
    import open_clip

    from model.loading_errors import explain_loading
    from trainer.tasks.contrastive.zero_shot_observer import score_towers

    if not (config.zero_shot.classification or config.zero_shot.retrieval):
        raise ValueError("zero_shot: names no test; set zero_shot.classification or zero_shot.retrieval")
    export = RunFolder(config.run_dir).export
    if not export.is_dir():
        raise ValueError(f"run_dir: {config.run_dir} has no export; run trainer.pretrain_vision to its end first")
    with explain_loading(f"the export {export}"):
        clip = open_clip.create_model(f"local-dir:{export}", pretrained_text=False, weights_only=True)
    return score_towers(config, clip, world)


if __name__ == "__main__":
    exit_now(main())
