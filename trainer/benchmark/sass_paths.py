"""Find the instructions that a warp issues in a kernel, from its machine code.

A kernel of csrc/ visits tiles in a main loop: it holds matrix products (HMMA, or HGMMA of a warpgroup) and a barrier
(BAR). ``issued`` follows the longest way through the code, with each inner loop as often as its work needs. It assumes
that branches which diverge, calls (failed assertions, divisions with a tiny divisor), early exits and the reads of the
mode "all media so far" are not taken. The last visit of the main loop copies no further tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.benchmark.sass import Instruction, Kernel

TILE, THREADS = 64, 128  # kTile and kThreads of csrc/cuda/params.h
_PRODUCTS = {"HMMA", "HGMMA"}
_NEVER = -(10**9)


@dataclass(frozen=True)
class Loop:
    """Locate a loop by the numbers of its first and last instruction; the last one jumps to the first."""

    first: int
    last: int


def main_loops(kernel: Kernel) -> list[Loop]:
    """Return the loops over tiles, in the order of their addresses."""
    loops = [loop for loop in _loops(kernel) if "BAR" in _names(kernel, loop) and _PRODUCTS & _names(kernel, loop)]
    innermost = [x for x in loops if not any(x != y and x.first <= y.first and y.last <= x.last for y in loops)]
    return sorted(innermost, key=lambda loop: loop.first)


def issued(kernel: Kernel, head_dim: int, tiles: int) -> list[int]:
    """Return the numbers of the instructions that a warp issues in a block that visits ``tiles`` tiles.

    Args:
        kernel: A kernel of csrc/cuda.
        head_dim: Its head_dim, which decides how often its inner loops run.
        tiles: Visits of each main loop, at least 1.
    """
    code, mains = kernel.code, main_loops(kernel)
    trips = {loop.last: _trips(kernel, loop, head_dim) for loop in _loops(kernel)} | {x.last: tiles for x in mains}
    optional = _optional_reads(kernel)
    last_copies = {i for x in mains for i in range(x.first, x.last + 1) if code[i].name == "LDGSTS"}
    usual, final = _longest(code, optional), _longest(code, optional | last_copies)
    visits: dict[int, int] = {}
    path, i = [], 0
    while i >= 0:
        path.append(i)
        instruction = code[i]
        back = code[i + 1] if i + 1 in trips else instruction
        if instruction.target is not None and back is not instruction and not back.conditional:
            # The loop is left here, and the next instruction jumps back to its start.
            visits[i + 1] = visits.get(i + 1, 0) + 1
            repeats = visits[i + 1] < trips[i + 1]
            visits[i + 1] *= repeats
            path += [i + 1] if repeats else []
            i = back.target if repeats and back.target is not None else instruction.target
            continue
        if (target := instruction.target) is not None and target <= i and i in trips:
            visits[i] = visits.get(i, 0) + 1
            if visits[i] < trips[i]:
                i = target
                continue
            visits[i] = 0
        main = next((loop for loop in mains if loop.first <= i <= loop.last), None)
        lengths = final if main is not None and visits.get(main.last, 0) + 1 >= tiles else usual
        i = max(_successors(code, i), key=lambda j: lengths[j], default=-1)
    return path


def products_a_tile(kernel: Kernel, head_dim: int) -> float:
    """Return how many products of a tile a visit of all main loops computes; 2 in a forward."""
    mains = main_loops(kernel)
    count = sum(_eights(kernel.code[i]) for i in issued(kernel, head_dim, 2)) / 2
    return count / (head_dim // 2) if mains else 0.0


def _eights(instruction: Instruction) -> int:
    """Return how many products of [16, 16] and [16, 8] an instruction computes for its warp."""
    if instruction.name == "HGMMA":  # such as .64x128x16.F32.BF16
        return int(instruction.modifiers.split("x")[1]) // 8
    return int(instruction.name == "HMMA")


def _optional_reads(kernel: Kernel) -> set[int]:
    """Return the reads that a short jump leaves out: first_media, which only the mode "all media so far" has."""
    found: set[int] = set()
    if "CrossAttention" not in kernel.name:
        return found
    code = kernel.code
    for i, branch in enumerate(code):
        if branch.target is not None and branch.conditional and i < branch.target <= i + 40:
            between = range(i + 1, branch.target)
            reads = {j for j in between if code[j].name == "LDG" and ".128" not in code[j].modifiers}
            found |= reads if all(code[j].name not in ("LDGSTS", "HMMA", "HGMMA") for j in between) else set()
    return found


def _longest(code: Sequence[Instruction], avoided: set[int]) -> list[int]:
    """Return the length of the longest way from each instruction to the end that jumps only forward.

    Args:
        code: Instructions.
        avoided: Instructions that the way leaves out where it can.
    """
    lengths = [_NEVER] * len(code)
    for i in reversed(range(len(code))):
        if code[i].name == "EXIT" and not code[i].conditional:
            lengths[i] = 1
        elif not _fails(code[i]):
            following = max((lengths[j] for j in _successors(code, i)), default=_NEVER)
            lengths[i] = following + (_NEVER // 1000 if i in avoided else 1)
    return lengths


def _fails(instruction: Instruction) -> bool:
    """Return whether an instruction calls what never happens: a failed assertion, or a division's slow path."""
    return instruction.name == "CALL" and instruction.target is None


def _successors(code: Sequence[Instruction], i: int) -> list[int]:
    """Return what may follow without jumping back. A branch that diverges falls through."""
    here = code[i]
    if here.name in ("EXIT", "RET") and not here.conditional:
        return []
    following = [i + 1] if i + 1 < len(code) else []
    if here.target is None or ".DIV" in here.modifiers:
        return following
    if not here.conditional:
        return [here.target] if here.target > i else []
    return following + ([here.target] if here.target > i else [])


def _loops(kernel: Kernel) -> list[Loop]:
    code = kernel.code
    reached, waiting = {0}, [0]
    while waiting:
        i = waiting.pop()
        new = [j for j in _successors(code, i) if j not in reached and not _fails(code[i])]
        reached.update(new)
        waiting += new
    return [Loop(x.target, i) for i, x in enumerate(code) if x.target is not None and x.target <= i and i in reached]


def _names(kernel: Kernel, loop: Loop) -> set[str]:
    return {instruction.name for instruction in kernel.code[loop.first : loop.last + 1]}


def _trips(kernel: Kernel, loop: Loop, head_dim: int) -> int:
    """Return how often an inner loop runs: what a thread, or a warp, has to do over what one round does."""
    body = kernel.code[loop.first : loop.last + 1]
    counts = {name: sum(x.name == name for x in body) for name in ("HMMA", "LDGSTS", "LDG")}
    if counts["HMMA"]:  # accumulate_keys
        return max(1, head_dim // 2 // counts["HMMA"])
    if counts["LDGSTS"]:  # copy_tile
        return max(1, TILE * head_dim // 8 // THREADS // counts["LDGSTS"])
    if any(x.name == "LDG" and ".128" in x.modifiers for x in body):  # delta_of_row: pairs of chunks, four lanes a row
        return max(1, head_dim // 8 // 4 // (counts["LDG"] // 2))
    return 1
