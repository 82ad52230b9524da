"""Keep the budgets of the CUDA kernels' machine code: ``python -m tests.ops.sass_budgets`` compiles and writes them.

A budget holds registers, blocks of a multiprocessor, and the instructions that a warp issues (issue slots) for the
first tile that a block visits and for each further one. The command writes sass_budgets.json and the table in
csrc/README.md.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.benchmark import kernels_model, sass, sass_paths
from trainer.benchmark.multiprocessor_model import resident_blocks

FILE = Path(__file__).with_name("sass_budgets.json")
README = Path(__file__).parents[2] / "csrc" / "README.md"
ARCHITECTURES = ("sm_80", "sm_90a")
INSTANTIATIONS = sorted(path.stem for path in sass.CUDA_SOURCES.glob("*_*_*_[bf]*16.cu"))
FIELDS = ("registers", "blocks", "first tile", "further tile")
Budgets = Mapping[str, Mapping[str, Sequence[int]]]  # instantiation and architecture -> kernel -> FIELDS
_BEGIN, _END = "<!-- budgets: python -m tests.ops.sass_budgets -->\n", "<!-- end of the budgets -->\n"


def short_name(kernel: sass.Kernel) -> str:
    """Return the name of a kernel. " alone" marks the whole backward in one kernel, " split" a kernel with splits."""
    found = re.search("attention_forward|backward_rows|backward_keys", kernel.name)
    assert found is not None, kernel.name
    flags = [flag == "1" for flag in re.findall("Lb([01])E", kernel.name)]
    alone, split = flags if len(flags) == 2 else (False, *flags) if flags else (False, False)
    return found[0] + " alone" * alone + " split" * split


def measured_budgets(instantiation: str, architecture: str, kernels: Sequence[sass.Kernel]) -> dict[str, list[int]]:
    """Return the budgets that compiled kernels need, by short name."""
    head_dim = int(instantiation.split("_")[-2])
    budgets = {}
    for kernel in kernels:
        if not sass_paths.main_loops(kernel):  # clear_blind_rows
            continue
        name = short_name(kernel)
        shared = kernels_model.block_bytes(name, head_dim)
        slots = [len(sass_paths.issued(kernel, head_dim, tiles)) for tiles in (1, 2)]
        blocks = resident_blocks(kernel, shared, architecture)
        budgets[name] = [kernel.registers, blocks, slots[0], slots[1] - slots[0]]
    return budgets


def table(budgets: Budgets) -> str:
    """Return the lines of csrc/README.md: bfloat16, the values of sm_80 and sm_90a beside each other."""
    lines = ["| op | head_dim | kernel | registers | blocks | slots, first tile | slots, further tile |\n"]
    lines.append("|---|---|---|---|---|---|---|\n")
    for instantiation in (name for name in INSTANTIATIONS if name.endswith("bf16")):
        op, head_dim, _ = instantiation.rsplit("_", 2)
        old, new = (budgets[f"{instantiation} {architecture}"] for architecture in ARCHITECTURES)
        for kernel in sorted(new):
            cells = [f"{a} / {b}" for a, b in zip(old[kernel], new[kernel], strict=True)]
            lines.append(f"| {op.split('_')[0]} | {head_dim} | `{kernel}` | {' | '.join(cells)} |\n")
    return "".join(lines)


def table_in_readme() -> str:
    """Return the table that csrc/README.md has now."""
    return README.read_text(encoding="utf-8").partition(_BEGIN)[2].partition(_END)[0].strip("\n") + "\n"


def read() -> tuple[str, Budgets]:
    """Return the release of nvcc that the budgets are for, and the budgets."""
    document = json.loads(FILE.read_text(encoding="utf-8"))
    return document["nvcc"], document["budgets"]


def assert_within_budget(instantiation: str, architecture: str, kernels: Sequence[sass.Kernel]) -> None:
    """Compare compiled kernels with their budgets: the same with the same nvcc, up to a tenth more with another."""
    release, budgets = read()
    expected = budgets[f"{instantiation} {architecture}"]
    found = measured_budgets(instantiation, architecture, kernels)
    if sass.nvcc_release() == release:
        assert found == expected, "run python -m tests.ops.sass_budgets if the kernels are better or meant to differ"
    for name, (_, blocks, *slots) in expected.items():
        assert found[name][1] >= blocks, f"{name}: blocks of a multiprocessor"
        assert all(now <= 1.1 * then for now, then in zip(found[name][2:], slots, strict=True)), f"{name}: slots"


def write(release: str, budgets: Budgets) -> None:
    """Write the file and the table in csrc/README.md."""
    text = json.dumps({"nvcc": release, "fields": FIELDS, "budgets": budgets}, indent=1)
    text = re.sub(r"\[\s+([^\]]+?)\s+\]", lambda x: f"[{' '.join(x[1].split())}]", text)
    before, _, rest = README.read_text(encoding="utf-8").partition(_BEGIN)
    after = rest.partition(_END)[2]
    README.write_text(f"{before}{_BEGIN}\n{table(budgets)}\n{_END}{after}", encoding="utf-8")
    FILE.write_text(text + "\n", encoding="utf-8")


def main() -> int:
    """Compile all instantiations and write file and table."""
    budgets = {
        f"{name} {architecture}": measured_budgets(name, architecture, sass.compiled(name, architecture))
        for name in INSTANTIATIONS
        for architecture in ARCHITECTURES
    }
    write(sass.nvcc_release(), budgets)
    return 0


if __name__ == "__main__":
    sys.exit(main())
