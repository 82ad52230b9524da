"""Write the model card of an export (``README.md``): parts and their licenses, training, evaluation, use."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load, try_to_load_from_cache

from model.config import FlamingoConfig, VisionEncoderConfig
from model.imports.hub import pinned_revision
from trainer.runtime.run_folder import RunFolder

_LAST_STEPS = 100  # over which the card gives the mean of the losses
_NO_LICENSE = "not stated; ask whoever made it"
_INTRODUCTION = (
    "A Flamingo: a frozen language model that sees images and videos through a perceiver resampler and gated "
    "cross-attention (arXiv:2204.14198). Texts, images and videos may stand in any order."
)
_REPORT = "report.json"
_SCORES = "| task | metric | examples in the prompt | score | 95 % interval | queries |\n|---|---|---|---|---|---|"
_NO_SCORES = (
    "No evaluation results are known for these weights. `python -m trainer.evaluate` writes a `report.json`; "
    "`trainer.export --report FILE` takes it into this card."
)


@dataclass(frozen=True)
class FrozenPart:
    """Describe a part that was not trained here.

    Attributes:
        role: What it does in the model.
        name: Repository, folder or name in a library.
        revision: Commit or tag; empty where there is none.
        license: What its own card says.
        is_inside: Whether its weights are in the export.
    """

    role: str
    name: str
    revision: str
    license: str
    is_inside: bool


@dataclass(frozen=True)
class CardFacts:
    """Hold what a card says about a model.

    Attributes:
        config: Settings of the model as the run had them.
        dtype: Type that the model was trained in.
        parts: Parts that were not trained here.
        run: Settings of the training run, as plain values; empty where there is none.
        records: Lines of the run's ``metrics.jsonl``.
        reports: Contents of ``report.json`` of evaluations of these weights.
    """

    config: FlamingoConfig
    dtype: str
    parts: Sequence[FrozenPart]
    run: Mapping[str, Any] = field(default_factory=dict)
    records: Sequence[Mapping[str, Any]] = ()
    reports: Sequence[Mapping[str, Any]] = ()


def write_card(folder: Path, title: str, facts: CardFacts) -> None:
    """Write ``README.md`` of an export."""
    sections = (
        _metadata(facts),
        f"# {title}",
        _INTRODUCTION,
        "## Parts",
        *_parts(facts),
        "## Use",
        _use(facts),
        "## Training",
        *_training(facts),
        "## Evaluation",
        *(_scores(facts.reports) if facts.reports else [_NO_SCORES]),
    )
    (folder / "README.md").write_text("\n\n".join(sections) + "\n")


def frozen_parts(config: FlamingoConfig, *, are_inside: bool) -> list[FrozenPart]:
    """Return the language model and the image tower with what their own cards say of their license."""
    language_model, vision = config.language_model, config.vision
    drawn = f"random {(language_model.architecture or {}).get('model_type')}, from a seed"
    revision = pinned_revision(language_model) or language_model.revision
    tower = _shown(vision.name) if vision.pretrained is None else f"{_shown(vision.name)} ({_shown(vision.pretrained)})"
    return [
        FrozenPart(
            "language model",
            drawn if language_model.name is None else _shown(language_model.name),
            revision or "",
            _license(language_model.name, language_model.revision),
            are_inside and language_model.name is not None,
        ),
        FrozenPart("image tower", tower, "", _license(_place(vision), None), are_inside and _has_weights(vision)),
    ]


def find_reports(run: RunFolder, model: Mapping[str, Any]) -> list[Path]:
    """Return evaluations of a model in its run folder and beside it.

    Args:
        run: Run folder.
        model: ``weights_digest`` of the export, which each report repeats.
    """
    candidates = [*run.path.glob(f"**/{_REPORT}"), run.path.parent / _REPORT]
    return sorted(path for path in candidates if path.is_file() and _of_model(path, model))


def read_report(path: Path) -> dict[str, Any]:
    """Read an evaluation's ``report.json``.

    Raises:
        ValueError: The file is missing, or no report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report["tasks"], dict):
            raise KeyError("tasks")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--report {path} is no report.json of trainer.evaluate: {error}") from error
    return dict(report)


def _of_model(path: Path, model: Mapping[str, Any]) -> bool:
    try:
        report = read_report(path)
    except ValueError:
        return False
    found = report.get("model")
    return isinstance(found, dict) and all(found.get(key) == model[key] for key in ("trained", "frozen"))


def _shown(name: str) -> str:
    """Return the end of the path of a local folder, and other names as they are."""
    prefix, colon, place = name.rpartition(":")
    last = "/".join(Path(place).resolve().parts[-2:])
    return f"{prefix}{colon}{last} (a local folder)" if Path(place).exists() else name


def _has_weights(vision: VisionEncoderConfig) -> bool:
    return vision.pretrained is not None or (vision.architecture is None and ":" in vision.name)


def _place(vision: VisionEncoderConfig) -> str | None:
    prefix, found, place = vision.name.partition(":")
    return place if found and prefix in ("local-dir", "hf-hub", "transformers") else None


def _license(name: str | None, revision: str | None) -> str:
    """Return the license in the card of a folder or of a cached repository."""
    if not name:
        return _NO_LICENSE
    card: Any = Path(name) / "README.md"
    if not Path(name).is_dir():
        card = try_to_load_from_cache(name, "README.md", revision=revision)
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return _NO_LICENSE
    try:
        stated = (metadata_load(card) or {}).get("license")
    except (ValueError, yaml.YAMLError):
        stated = None
    return str(stated) if stated else _NO_LICENSE


def _metadata(facts: CardFacts) -> str:
    base = [part.name for part in facts.parts if part.role == "language model" and part.name.count("/") == 1]
    values = {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["flamingo", "custom_code"],
        "license": "other",
        "license_name": "see-the-parts",
    }
    if base and not Path(base[0]).exists():
        values["base_model"] = base[0]
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---"


def _parts(facts: CardFacts) -> Iterator[str]:
    rows = ["| part | from | revision | license | weights in this repository |", "|---|---|---|---|---|"]
    for part in facts.parts:
        inside = "yes" if part.is_inside else "no, loaded by name"
        rows.append(f"| {part.role} | {part.name} | {part.revision} | {part.license} | {inside} |")
    rows.append("| resampler, cross-attention, added tokens | trained here | | that of whoever trained them | yes |")
    yield "\n".join(rows)
    yield (
        "`frozen.json` has a digest of every tensor that was not trained. Loading compares them and names what differs."
    )


def _use(facts: CardFacts) -> str:
    trainable = facts.config.trainable
    needs = ["torch", "transformers", "open_clip_torch", "timm", "pillow"]
    needs += ["peft"] if "lora" in (trainable.vision, trainable.language_model) else []
    return f"""It needs {", ".join(needs)}, and `av` for videos from files. `trust_remote_code` runs the code of this
repository on your machine: read it first.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(NAME, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(NAME, trust_remote_code=True)
inputs = processor(text="{facts.config.tokens.image}", images=["picture.png"])
tokens = model.generate(**inputs, num_beams=3)
print(processor.batch_decode(tokens, skip_special_tokens=True))
```

`{facts.config.tokens.image}` stands for the next image, `<video>` for the next video;
`{facts.config.tokens.end_of_chunk}` ends the text of each example of a few-shot prompt. Weights are {facts.dtype}
unless `dtype` says otherwise."""


def _training(facts: CardFacts) -> Iterator[str]:
    if not facts.run:
        yield "Nothing is known about the training: this was exported without its run folder."
        return
    rows = ["| source | type | rows in a step | weight | manifest |", "|---|---|---|---|---|"]
    for source in facts.run["data"]["sources"]:
        values = (source["name"], source["type"], source["batch_size"], source["weight"], source["manifest"])
        rows.append(f"| {' | '.join(map(str, values))} |")
    yield "\n".join(rows)
    records = facts.records
    if not records:
        yield "The run folder has no metrics."
        return
    last = records[-_LAST_STEPS:]
    tokens = sum(int(record.get("tokens", 0)) for record in records)
    yield f"{records[-1]['step']} steps on {tokens:,} tokens of text, in {facts.dtype}."
    losses = ["| loss | at the end |", "|---|---|"]
    names = dict.fromkeys(name for record in last for name in record if name == "loss" or name.startswith("loss/"))
    for name in names:
        found = [record[name] for record in last if isinstance(record.get(name), int | float)]
        if found:
            losses.append(f"| {name} | {sum(found) / len(found):.4g} |")
    yield f"Means over the last {len(last)} steps:\n\n" + "\n".join(losses)


def _scores(reports: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows = [_SCORES]
    for report in reports:
        for task, found in report["tasks"].items():
            for shots, cell in found["shots"].items():
                score, low, high = (cell.get(name) for name in ("score", "low", "high"))
                interval = "" if low is None or high is None else f"{low:.4g} to {high:.4g}"
                shown = "not known" if score is None else f"{score:.4g}"
                rows.append(f"| {task} | {found['metric']} | {shots} | {shown} | {interval} | {cell['queries']} |")
    yield "\n".join(rows)
