"""Measured speed: ``python -m trainer.benchmark NAME [--device cpu|cuda] [--json FILE] [--check]``.

``[deepspeed ... --module] trainer.benchmark step CONFIG`` measures the updates of a run; it has options of its own.

Prints one line a measurement and, with --json, writes them as a list after a header with hardware, versions and
commit. Exits with 0; with 1 under --check if a target is missed; with 2 if the arguments are wrong.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.config.loader import without_local_rank

BENCHMARKS = {
    "checkpoint": "how long training waits for a save, its bytes, and how long a resume takes",
    "data": "decoding, iteration, hand-over and the order of 2 billion samples against what others take",
    "kernels": "the two fused attentions against the other ways to compute them",
    "openflamingo": "a whole update against the same model in the manner of OpenFlamingo: time and memory",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark and return the exit code."""
    arguments = without_local_rank(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["step"]:
        from trainer.benchmark import step

        return step.main(arguments[1:])
    if arguments[:1] == ["rates"]:
        from trainer.benchmark import rates

        return rates.main(arguments[1:])
    if arguments[:1] == ["report"]:
        from trainer.benchmark import report

        return report.main(arguments[1:])
    options = _parse(arguments)
    import torch

    from trainer.benchmark.measurements import header

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch finds no CUDA device here; use --device cpu", file=sys.stderr)
        return 2
    rows = importlib.import_module(f"trainer.benchmark.{options.name}").run(device)
    for row in rows:
        verdict = "" if row.met is None else f"   target {row.target:g}: {'met' if row.met else 'MISSED'}"
        against = f"   {row.baseline} {row.baseline_value:.4g}, ratio {row.ratio:.2f}" if row.ratio is not None else ""
        print(f"{row.case:44s} {row.measure:24s} {row.value:10.4g} {row.unit:5s}{against}{verdict}")
    if options.json is not None:
        document = [header(device) | {"benchmark": options.name}, *(row.as_json() for row in rows)]
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    missed = [row for row in rows if row.met is False]
    return 1 if options.check and missed else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    described = BENCHMARKS | {
        "step": "an update of a run: step CONFIG [--steps N ...]; see step --help",
        "rates": "the speeds from which trainer.plan --rates predicts; see rates --help",
        "report": "measurements as a page with plots: report RESULTS... --html FILE",
    }
    names = "\n".join(f"  {name:12s} {meaning}" for name, meaning in described.items())
    parser = argparse.ArgumentParser(
        prog="python -m trainer.benchmark", epilog=names, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=sorted(BENCHMARKS), metavar="NAME", help="what to measure, see below")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
