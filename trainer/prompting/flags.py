"""Define the flags that the commands with an export share, and types for flags that check their values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def number(kind: Callable[[str], float], low: float, high: float = float("inf"), *, open_low: bool = False) -> Any:
    """Return a type of argparse: a number from ``low`` (or above it) to ``high``."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' if kind is int else ''}number") from None
        if not (low < value if open_low else low <= value) or not value <= high or value == float("inf"):
            bounds = f"{'above' if open_low else 'at least'} {low:g}"
            bounds += f" and at most {high:g}" if high != float("inf") else ""
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value

    return parse


def device(text: str) -> str:
    """Check that torch can compute on a device; for argparse.

    Raises:
        argparse.ArgumentTypeError: It cannot.
    """
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        message = f"torch cannot compute on {text!r} here ({reason}); cpu always works"
        raise argparse.ArgumentTypeError(message) from None
    return text


def file(kind: str) -> Callable[[str], tuple[str, Path]]:
    """Return a type of argparse: an existing file, with its kind."""

    def parse(text: str) -> tuple[str, Path]:
        if not Path(text).is_file():
            raise argparse.ArgumentTypeError(f"{text}: {'a folder' if Path(text).is_dir() else 'no such file'}")
        return kind, Path(text)

    return parse


def add_pixel_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that replace settings of the export's processor."""
    add = parser.add_argument
    fits = ("pad", "crop", "stretch")
    add("--image-fit", choices=fits, help="data.image_fit, instead of that of the training run")
    budget = "image_tokens of the source, instead of that of the training run; 0 makes squares"
    add("--image-tokens", type=number(int, 0), metavar="N", help=budget)
    frames = "frames of a video, instead of num_frames of the training run"
    add("--num-frames", type=number(int, 1), metavar="N", help=frames)
    rate = "frames taken per second of video, instead of those of the training run"
    add("--frames-per-second", type=number(float, 0, open_low=True), metavar="N", help=rate)


def add_device_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--device`` and ``--dtype``."""
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=device, default=best, help="device of torch (default: %(default)s)")
    dtypes = ("float32", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, help="type of the weights (default: as trained)")
