"""Tell by digests whether a report and an export are of the same weights."""

from __future__ import annotations

from pathlib import Path

from model.parameters import combine_digests
from model.pretrained import describe_export, trained_files
from trainer.runtime.files import checksum


def weights_digest(export: Path) -> dict[str, str]:
    """Return digests of the trained and of the frozen weights of an export.

    Raises:
        ValueError: The folder is no export, or its weights cannot be read.
    """
    frozen = combine_digests(describe_export(export).frozen)
    files = trained_files(export)
    try:
        digests = {path.name: checksum(path) for path in files}
    except OSError as error:
        raise ValueError(f"the weights of {export} cannot be read: {error}") from error
    return {"trained": digests[files[0].name] if len(files) == 1 else combine_digests(digests), "frozen": frozen}
