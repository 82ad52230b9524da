"""Write an export that transformers loads alone, with its card, and push it to the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, get_token
from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from model.imports.hub import local_parts, write_hub_export
from model.pretrained import describe_export
from trainer.hub.model_card import CardFacts, find_reports, frozen_parts, read_report, write_card
from trainer.hub.weights_digest import weights_digest
from trainer.runtime.run_folder import RunFolder


def write_with_card(
    export: Path,
    folder: Path,
    title: str,
    *,
    run: RunFolder | None = None,
    include_frozen: bool = False,
    reports: Sequence[Path] = (),
) -> None:
    """Write an export for transformers, and its model card.

    Args:
        export: Export of this project.
        folder: Folder to write, which exists.
        title: Title of the card.
        run: Run that trained the model; None where only the export is known.
        include_frozen: Whether the frozen parts are copied too.
        reports: Evaluations to put into the card; with none, those of these weights in the run folder and beside it.

    Raises:
        ValueError: ``export`` is none, a report is none, or a frozen part cannot be read.
    """
    described = describe_export(export)
    found = list(reports)
    settings, records = dict[str, Any](), list[dict[str, Any]]()
    if run is not None:
        settings, records = yaml.safe_load(run.config.read_text(encoding="utf-8")), _read_lines(run.metrics)
        found = found or find_reports(run, weights_digest(export))
    facts = CardFacts(
        described.config,
        described.dtype,
        frozen_parts(described.config, are_inside=include_frozen),
        settings,
        records,
        [read_report(path) for path in found],
    )
    write_hub_export(export, folder, include_frozen=include_frozen)
    write_card(folder, title, facts)


def check_push(repository: str) -> None:
    """Check, before anything is written, that a push can start.

    Raises:
        ValueError: The name is none, the hub is offline, or there is no token.
    """
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repository) is None:
        raise ValueError(f"--push {repository}: name it as OWNER/NAME")
    if HF_HUB_OFFLINE:
        raise ValueError(f"--push {repository}: the hub is offline (HF_HUB_OFFLINE); unset it, or leave out --push")
    if get_token() is None:
        raise ValueError(f"--push {repository}: there is no token; run `hf auth login`, or set HF_TOKEN")


def push(folder: Path, repository: str) -> str:
    """Upload an export to the hub, and return its address. A new repository is private.

    Raises:
        ValueError: The export names folders of this machine, or the hub refuses it or cannot be reached.
    """
    if parts := local_parts(describe_export(folder).config, folder):
        raise ValueError(
            f"--push {repository}: nobody else has {', '.join(parts)}; add --include-frozen. {folder} is written"
        )
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise ValueError(f"--push {repository}: {error}; {folder} is written, push it again with hf upload") from error
    return f"{api.endpoint}/{repository}"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics; one that was cut off is left out."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found
