"""Turn whatever a library raises while it loads a model into an error that names the settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def explain_loading(settings: str) -> Iterator[None]:
    """Raise a ValueError instead of any error in this context, except that memory ran out.

    Args:
        settings: Names and values of the settings that decide what is loaded.

    Raises:
        ValueError: Loading failed; the message names the settings and gives the library's reason.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # libraries raise anything, KeyError and AttributeError included
        reason = str(error).strip() or "no reason given"
        raise ValueError(f"{settings} cannot be loaded: {type(error).__name__}: {reason}") from error
