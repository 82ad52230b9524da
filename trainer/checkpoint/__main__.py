"""Verify, list, convert and prune a run's checkpoints: ``python -m trainer.checkpoint COMMAND PATH``.

PATH is a run folder or its ``checkpoints`` folder; ``verify`` and ``convert`` also take one ``step-...`` folder.

verify reads every file and names each damaged one. list shows all checkpoints. convert writes the form that any number
of processes can read; a resume with another number of processes would do so otherwise. prune removes the checkpoints
that its options do not keep, incomplete ones included, unless a run may still be writing them.

Exit codes: 0 success; 1 a file is damaged or no checkpoint was found; 2 the arguments are wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from trainer.checkpoint.catalog import is_complete, latest_step, problems_of, read_state, steps_in
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.layout import MANIFEST, UNIVERSAL, step_of, tag_of
from trainer.checkpoint.retention import expired, remove
from trainer.config.run_config import CheckpointConfig
from trainer.runtime.run_folder import RunFolder

BEING_WRITTEN_SECONDS = 3600.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(argv)
    checkpoints = _checkpoints(options.path)
    if not checkpoints:
        print(
            f"no checkpoints in {options.path}: name a run_dir, its checkpoints/ folder, or one checkpoint",
            file=sys.stderr,
        )
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
    inside = RunFolder(path).checkpoints
    folder = inside if inside.is_dir() else path
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
        state = "complete" if complete else "incomplete"
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
    print(f"{complete[-1] / UNIVERSAL} {'was written' if made else 'exists already'}")
    return 0


def _prune(checkpoints: list[Path], options: argparse.Namespace) -> int:
    if step_of(options.path.name) is not None:
        raise CheckpointError(f"{options.path} is a single checkpoint; name its run_dir")
    config = CheckpointConfig(
        keep_last=options.keep_last, keep_every=options.keep_every, keep_best=options.keep_best or 0
    )
    for checkpoint in expired(checkpoints[0].parent, config):
        if not is_complete(checkpoint) and time.time() - _newest_change(checkpoint) < BEING_WRITTEN_SECONDS:
            print(f"{checkpoint} is incomplete and less than an hour old: kept, because a run may be writing it")
            continue
        if not options.dry_run:
            remove(checkpoint)
        print(f"{checkpoint} {'would be' if options.dry_run else 'was'} removed")
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
    for name, run, summary in (
        ("verify", _verify, "name every damaged file"),
        ("list", _list, "show step, size, age, number of processes and state of each checkpoint"),
        ("convert", _convert, "make the newest complete checkpoint readable for any number of processes"),
        ("prune", _prune, "remove the checkpoints that the options do not keep"),
    ):
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("path", type=Path, metavar="PATH", help="run folder, checkpoints folder or checkpoint")
        command.set_defaults(run=run)
    command.add_argument(
        "--keep-last", type=_positive, required=True, metavar="K", help="keep the newest K checkpoints"
    )
    command.add_argument(
        "--keep-every", type=_positive, metavar="N", help="keep the checkpoint of every N-th step (default: none)"
    )
    command.add_argument(
        "--keep-best",
        type=_positive,
        metavar="B",
        help="keep the B checkpoints with the lowest smoothed training loss (default: none)",
    )
    command.add_argument("--dry-run", action="store_true", help="only print which checkpoints would be removed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
