"""Find the id of a run in Weights & Biases, and whether this machine can log in there."""

from __future__ import annotations

import netrc
import secrets
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from trainer.runtime.files import write_atomically
from trainer.runtime.run_folder import RunFolder


def own_wandb_id(run_folder: RunFolder) -> str:
    """Return the id of a run folder, and write it into the folder where it has none.

    A copy of a run folder gets an id of its own; a folder that was moved keeps its id. One process calls this.
    """
    file, here = run_folder.wandb_id, str(run_folder.path.resolve())
    known = file.read_text(encoding="utf-8") if file.is_file() else ""
    name, _, folder = known.rstrip("\n").partition(" ")
    is_copy = folder != here and (Path(folder) / file.name).is_file()
    if not name or is_copy:
        name = secrets.token_hex(4)
    if known != f"{name} {here}\n":
        write_atomically(file, f"{name} {here}\n")
    return name


def wandb_obstacle(environment: Mapping[str, str]) -> str | None:
    """Return why wandb cannot log in without asking on the terminal; None if it can, or need not."""
    if environment.get("WANDB_MODE", "online") not in ("online", "run", "shared"):
        return None
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return None
    own_host = urlsplit(environment.get("WANDB_BASE_URL", "")).hostname
    try:
        hosts = netrc.netrc(environment.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        hosts = {}
    if any("wandb" in host or host == own_host for host in hosts):
        return None
    return "it has no key: run wandb login, or set WANDB_API_KEY"
