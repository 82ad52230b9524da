"""Compare variants of a configuration over seeds: ``python -m trainer.study STUDY.yaml [--key VALUE ...]``.

Each variant and seed is a normal run. A second call goes on where an earlier one stopped. The report is written after
every run, to ``report.json`` and ``report.html`` in the study's folder.

As a Slurm array, ``--only $SLURM_ARRAY_TASK_ID`` runs one of the runs, counted from 0; ``--list`` prints them, and
``--report`` only writes the report.

Exit codes: 0 everything asked for is complete; 2 a configuration is wrong; 1 a run failed (the others still ran); 75
a run was asked to stop.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict

from trainer.config.command_line import parse_arguments
from trainer.config.study_config import StudyConfig
from trainer.errors import TrainerError
from trainer.runtime.files import write_json
from trainer.runtime.stop_signals import EXIT_STOPPED
from trainer.studies.cells import Cell, study_cells
from trainer.studies.comparison import compare
from trainer.studies.page import interval_text, write_page
from trainer.studies.results import read_results, run_cell


def main(argv: Sequence[str] | None = None) -> int:
    """Run a study and return the exit code."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if {"--help", "-h"} & set(rest):
        parser.print_help()  # and then, as for every command, the settings of the file
    config = parse_arguments(StudyConfig, rest)
    try:
        cells = study_cells(config)
    except TrainerError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if options.list:
        for number, cell in enumerate(cells):
            print(f"{number:4d}  {cell.variant}  seed {cell.seed}  {cell.folder.path}")
        return 0
    if options.only is not None and not 0 <= options.only < len(cells):
        print(f"--only {options.only}: the runs are 0 to {len(cells) - 1}; --list prints them", file=sys.stderr)
        return 2
    chosen = [] if options.report else cells if options.only is None else [cells[options.only]]
    return _run(config, cells, chosen, writes=options.only is None)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.study",
        usage="%(prog)s STUDY.yaml [options] [--key VALUE ...]",
        description=__doc__.replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("--only", type=int, metavar="N", help="run the run with this number alone, without a report")
    parser.add_argument("--list", action="store_true", help="print the runs")
    parser.add_argument("--report", action="store_true", help="write the report of the complete runs, and run nothing")
    return parser


def _run(config: StudyConfig, cells: Sequence[Cell], chosen: Sequence[Cell], writes: bool) -> int:
    failed = False
    for number, cell in enumerate(chosen, 1):
        print(f"== run {number} of {len(chosen)}: {cell.variant}, seed {cell.seed}", flush=True)
        try:
            code = run_cell(cell, config)
        except (OSError, ValueError) as error:
            print(f"{cell.variant}, seed {cell.seed}: {error}", file=sys.stderr)
            code = 1
        if code == EXIT_STOPPED:
            return EXIT_STOPPED
        failed |= code != 0
        if writes:
            _write_report(config, cells)
    if not chosen:
        _write_report(config, cells)
    return 1 if failed else 0


def _write_report(config: StudyConfig, cells: Sequence[Cell]) -> None:
    results = read_results(cells)
    comparisons = compare(results, config.baseline)
    config.output.mkdir(parents=True, exist_ok=True)
    write_json(
        config.output / "report.json", {"complete": len(results), "comparisons": [asdict(c) for c in comparisons]}
    )
    write_page(config.output / "report.html", config, comparisons, results, len(cells))
    for one in comparisons:
        difference = "" if one.difference is None else f"  difference {interval_text(one.difference)}"
        print(f"{one.score:30s} {one.variant:20s} {interval_text(one.value)}{difference}")


if __name__ == "__main__":
    sys.exit(main())
