"""Record the golden files again: ``python -m tests.golden.renew [--check] [RECIPE ...]``.

Renew them when a change is meant to move losses or the order of data; the commit says why. ``--check`` writes nothing
and prints what differs.

Exit codes: 0 all files are written, or equal; 1 some differ; 2 a recipe is unknown.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.golden.recipes import Trained

# As in tests/conftest.py; before torch is loaded.
for _name, _value in {"DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}.items():
    os.environ.setdefault(_name, _value)


def main(argv: Sequence[str] | None = None) -> int:
    """Train the recipes and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.golden.renew", description=__doc__.partition("\n")[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="path below configs/ (default: all recipes)")
    parser.add_argument("--check", action="store_true", help="write nothing; print what differs")
    options = parser.parse_args(argv)
    # Imported here, so that --help answers at once.
    from tests.golden.recipes import RECIPES, WORLD_SIZES, train_recipes
    from tests.golden.records import path_of, write

    unknown = [name for name in options.recipes if name not in RECIPES]
    if unknown:
        print(f"{', '.join(unknown)}: no such recipe. Recipes: {', '.join(RECIPES)}", file=sys.stderr)
        return 2
    names = options.recipes or list(RECIPES)
    runs: dict[str, list[Trained]] = {name: [] for name in names}
    for world_size in WORLD_SIZES:
        trained = train_recipes(names, world_size)
        for name in names:
            runs[name].append(trained[name])
    if options.check:
        return _check(runs)
    for name in names:
        write(name, runs[name])
        print(f"wrote {path_of(name)}")
    return 0


def _check(runs: dict[str, list[Trained]]) -> int:
    from tests.golden.records import differences, read, this_machine

    code = 0
    for name, both in runs.items():
        header, recorded = read(name)
        exact = header["machine"] == this_machine()
        problems = differences(recorded, [line for run in both for line in run.lines], exact=exact)
        how = "bit for bit" if exact else "within tolerances: another machine recorded it"
        print(f"{name}: {len(problems)} differences, {how}", *problems[:10], sep="\n  ")
        code = code or bool(problems)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
