"""Write the verification cards again: ``python -m tests.verification.renew [CONFIG ...]``.

A CONFIG is a path below configs/; without one, all cards are written and those without a configuration removed. Run it
after a change of a configuration, of a golden run, or of the planner.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

# As in tests/conftest.py; before torch is loaded.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the cards; return 0, or 2 if there is no such configuration."""
    parser = argparse.ArgumentParser(prog="python -m tests.verification.renew", description=__doc__.partition("\n")[0])
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help="path below configs/ (default: all)")
    chosen = parser.parse_args(argv).configs
    # Imported here, so that --help answers at once.
    from tests.verification.cards import FOLDER, ROOT, full_card, names, path_of, write

    unknown = sorted(set(chosen) - set(names()))
    if unknown:
        print(f"{', '.join(unknown)}: no such configuration below configs/", file=sys.stderr)
        return 2
    os.chdir(ROOT)  # configurations name their own files relative to the clone
    for name in chosen or names():
        write(name, full_card(name))
        print(f"wrote {path_of(name).relative_to(ROOT)}", flush=True)
    if not chosen:
        for path in set(FOLDER.glob("*.yaml")) - {path_of(name) for name in names()}:
            path.unlink()
            print(f"removed {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
