"""``python -m trainer.checkpoint verify|list|convert|prune PATH``: look after a run's checkpoints.

PATH is a run folder, its ``checkpoints``, or (for verify and convert) one ``step-...`` in there.

verify: reads every file and names each that is damaged. list: what is there. convert: makes the form that other numbers
of processes read, which a resume would make otherwise. prune: removes what is not to be kept; half-written ones too,
but for those that a run may be writing.

Exits with 0; with 1 if something is damaged or nothing was found; with 2 if the arguments are wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.checkpoint.catalog import is_complete, latest_step, problems_of, read_state, steps_in
from trainer.checkpoint.retention import expired, remove
from trainer.checkpoint.training_state import MANIFEST, UNIVERSAL, CheckpointError, step_of, tag_of
from trainer.config.run_config import CheckpointConfig

BEING_WRITTEN_SECONDS = 3600.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(argv)
    checkpoints = _checkpoints(options.path)
    if not checkpoints:
        print(f"no checkpoints in {options.path}: name a run_dir, its checkpoints/, or one of them", file=sys.stderr)
        return 1
    try:
        code: int = options.run(checkpoints, options)
    except (CheckpointError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return code


def _checkpoints(path: Path) -> list[Path]:
    if step_of(path.name) is not None:
        return [path] if path.is_dir() else []
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    return [folder / tag_of(step) for step in steps_in(folder)]


def _verify(checkpoints: list[Path], options: argparse.Namespace) -> int:
    damaged = False
    for checkpoint in checkpoints:
        problems = list(problems_of(checkpoint))
        if (checkpoint / UNIVERSAL).is_dir():
            problems += [f"{UNIVERSAL}: {problem}" for problem in problems_of(checkpoint / UNIVERSAL)]
        print(f"{checkpoint}: {'good' if not problems else 'DAMAGED'}")
        for problem in problems:
            print(f"  {problem}")
        damaged |= bool(problems)
    return 1 if damaged else 0


def _list(checkpoints: list[Path], options: argparse.Namespace) -> int:
    print(f"{'step':>10} {'size':>10} {'age':>8} {'processes':>9} {'universal':>9}  state")
    for checkpoint in checkpoints:
        step, complete = step_of(checkpoint.name), is_complete(checkpoint)
        processes = str(read_state(checkpoint).world_size) if complete else "?"
        universal = "yes" if is_complete(checkpoint / UNIVERSAL) else "no"
        state = "complete" if complete else "half-written"
        if step == latest_step(checkpoint.parent):
            state += ", latest"
        size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        age = _age((time.time() - _newest_change(checkpoint)) / 60)
        print(f"{step:>10} {_bytes(size):>10} {age:>8} {processes:>9} {universal:>9}  {state}")
    return 0


def _convert(checkpoints: list[Path], options: argparse.Namespace) -> int:
    from trainer.checkpoint.universal import convert

    complete = [checkpoint for checkpoint in checkpoints if is_complete(checkpoint)]
    if not complete:
        raise CheckpointError(f"no complete checkpoint in {options.path}")
    made = convert(complete[-1])
    print(f"{complete[-1] / UNIVERSAL} {'is made' if made else 'was there already'}")
    return 0


def _prune(checkpoints: list[Path], options: argparse.Namespace) -> int:
    if step_of(options.path.name) is not None:
        raise CheckpointError(f"{options.path} is one checkpoint; name its run_dir")
    config = CheckpointConfig(
        keep_last=options.keep_last, keep_every=options.keep_every, keep_best=options.keep_best or 0
    )
    for checkpoint in expired(checkpoints[0].parent, config):
        if not is_complete(checkpoint) and time.time() - _newest_change(checkpoint) < BEING_WRITTEN_SECONDS:
            print(f"{checkpoint} is half-written and less than an hour old: kept, a run may be writing it")
            continue
        if not options.dry_run:
            remove(checkpoint)
        print(f"{checkpoint} {'would be' if options.dry_run else 'is'} removed")
    return 0


def _newest_change(checkpoint: Path) -> float:
    manifest = checkpoint / MANIFEST
    if manifest.exists():
        return manifest.stat().st_mtime
    return max(path.stat().st_mtime for path in (checkpoint, *checkpoint.rglob("*")))


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


def _age(minutes: float) -> str:
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 48 * 60 else f"{minutes / 1440:.0f} days"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m trainer.checkpoint",
        description=__doc__.partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, run, meaning in (
        ("verify", _verify, "name every damaged file"),
        ("list", _list, "step, size, age, number of processes, state"),
        ("convert", _convert, "make the newest complete one readable for other numbers of processes"),
        ("prune", _prune, "remove what is not to be kept"),
    ):
        command = commands.add_parser(name, help=meaning, description=meaning)
        command.add_argument("path", type=Path, metavar="PATH")
        command.set_defaults(run=run)
    command.add_argument("--keep-last", type=_positive, required=True, metavar="K", help="keep the newest K")
    command.add_argument("--keep-every", type=_positive, metavar="N", help="keep those of every N-th step")
    command.add_argument("--keep-best", type=_positive, metavar="B", help="keep the B of lowest smoothed training loss")
    command.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
