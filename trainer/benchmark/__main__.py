"""Measure speed and memory: ``python -m trainer.benchmark NAME [--device cpu|cuda] [--json FILE] [--check]``.

``rates``, ``report``, ``soak`` and ``step`` have options of their own. ``rates`` and ``step`` also run under the
launcher: ``[deepspeed ... --module] trainer.benchmark step CONFIG``.

The command prints one line per measurement. ``--json`` writes them as a list after a header with hardware, versions
and commit. ``kernels --device model`` estimates the kernels' times on an H100 instead of measuring any. The exit code
is 0, 1 where ``--check`` finds a missed target, or 2 where an argument is wrong or a tool is missing.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.benchmark.sass import ToolMissingError
from trainer.config.command_line import without_local_rank

if TYPE_CHECKING:
    from trainer.benchmark.result_file import Measurement

SUBCOMMANDS = {
    "checkpoint": "time that training waits for a save, bytes of a checkpoint, time of a resume",
    "contrastive": "a contrastive step against open_clip's with --accum-freq, and the loader's augmentation",
    "data": "decoding, reading and the order of 2 billion samples, against open_clip and webdataset",
    "generate": "few-shot answers against a plain loop over the same model, without caches",
    "kernels": "the two fused attentions against other implementations",
    "openflamingo": "time and memory of a whole step against the same model written as OpenFlamingo is",
    "rates": "speeds from which trainer.plan --rates predicts; see rates --help",
    "report": "a page with plots of results: report RESULTS... --html FILE",
    "soak": "memory, threads and file descriptors over 5,000 steps; see soak --help",
    "step": "a step of a run, with the time of its parts: step CONFIG [--steps N ...]; see step --help",
    "stream": "memory and time of a model whose weights lie on a drive",
}
WITH_OWN_OPTIONS = ("rates", "report", "soak", "step")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code."""
    arguments = without_local_rank(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in WITH_OWN_OPTIONS:
        code: int = importlib.import_module(f"trainer.benchmark.{arguments[0]}").main(arguments[1:])
        return code
    options = _parse(arguments)
    import torch

    from trainer.benchmark.result_file import write_result

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no CUDA device here; use --device cpu", file=sys.stderr)
        return 2
    if device == "model" and options.name != "kernels":
        print(f"--device model: {options.name} has no model of a GPU, only kernels has one", file=sys.stderr)
        return 2
    rows: list[Measurement] = []
    try:
        for row in importlib.import_module(f"trainer.benchmark.{options.name}").run(device):
            rows.append(row)
            _print_row(row)
    except ToolMissingError as error:
        print(f"--device {device}: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        modeled = {"modeled": "an H100, from machine code; nothing was measured"} if device == "model" else {}
        write_result(options.json, device, {"benchmark": options.name} | modeled, rows)
    missed = [row for row in rows if row.met is False]
    return 1 if options.check and missed else 0


def _print_row(row: Measurement) -> None:
    verdict = "" if row.met is None else f"   target {row.target:g}: {'met' if row.met else 'MISSED'}"
    baseline = f"   {row.baseline} {row.baseline_value:.4g}, ratio {row.ratio:.2f}" if row.ratio is not None else ""
    print(f"{row.case:44s} {row.measure:24s} {row.value:10.4g} {row.unit:5s}{baseline}{verdict}", flush=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    names = "\n".join(f"  {name:12s} {description}" for name, description in SUBCOMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m trainer.benchmark", epilog=names, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(SUBCOMMANDS), metavar="NAME", help="what to measure, see below")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda", "model"),
        help="where to measure (default: cuda if there is a device); model, of kernels alone: estimate for an H100",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file to write the measurements to")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args(argv)
    if options.name in WITH_OWN_OPTIONS:
        parser.error(f"write {options.name} first: its options are {options.name}'s own")
    return options


if __name__ == "__main__":
    sys.exit(main())
