"""Estimate how long one multiprocessor of an H100 needs for blocks of a kernel, from its machine code.

Each of the four schedulers issues one instruction a cycle, from a warp whose stall has passed and whose scoreboards
are free. The units for products, special functions and shared memory take instructions at their rates; memory delivers
at its bandwidth. A product of a warpgroup starts when all four warps of a block have issued it. Nothing was calibrated
on a card: the times are those of a model, and may be wrong by a quarter.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer.benchmark.sass import Instruction, Kernel

CLOCK = 1.755e9  # Hz
MULTIPROCESSORS = 132
REGISTERS, MOST_BLOCKS = 65536, 32  # of a multiprocessor
SHARED_BYTES = {"sm_80": 164 * 1024, "sm_90a": 228 * 1024}  # of a multiprocessor; each block takes 1 KB for itself
BYTES_PER_CYCLE = 3.0e12 / MULTIPROCESSORS / CLOCK  # of the memory, copying
L2_BYTES_PER_CYCLE = 5.5e12 / MULTIPROCESSORS / CLOCK
_WARPS, _ACCESS_BYTES = 4, 512  # warps of a block; 16 bytes a lane
_START, _MEMORY_LATENCY, _L2_LATENCY, _BARRIER, _QUEUE = 250, 650, 280, 20, 24  # cycles
_UNITS = {
    "HMMA": "product",
    "HGMMA": "group product",
    **dict.fromkeys(("FFMA", "FMUL", "FADD", "HFMA2"), "float"),
    **dict.fromkeys(("MUFU", "I2F", "F2I", "F2F"), "special"),
    **dict.fromkeys(("LDC", "ULDC", "S2R", "S2UR", "CS2R", "REDUX", "VOTE", "R2UR"), "slow"),
    **dict.fromkeys(("BRA", "BSSY", "BSYNC", "EXIT", "WARPSYNC", "NOP", "CALL", "RET"), "control"),
    **dict.fromkeys(("BAR", "DEPBAR", "LDGDEPBAR", "WARPGROUP"), "synchronize"),
    **dict.fromkeys(("MEMBAR", "FENCE"), "fence"),
}
_INTERVAL = {"product": 6, "float": 1, "special": 8, "slow": 2, "control": 2, "synchronize": 1}
_INTERVAL |= {"integer": 2, "integer product": 2, "group product": 1, "fence": 2}
_LATENCY = {"fence": 20, "product": 33, "float": 4, "special": 18, "slow": 24, "integer": 6, "integer product": 6}
# Cycles that the shared path to memory is busy, and cycles until the result exists.
_MEMORY = {"LDSM": (4, 29), "LDGSTS": (4, 0), "LDG": (2, 0), "STG": (4, 20), "STS": (1, 10), "LDS": (1, 23)}
_MEMORY |= {"SHFL": (1, 23)}
# Products of warpgroups: multiply-adds and bytes of shared memory in a cycle; cycles until the end of one is seen.
_GROUP_MULTIPLY_ADDS, _SHARED_BYTES, _GROUP_LATENCY, _LOOK_AGAIN = 2048, 128, 32, 8
_GROUP_ROWS, _GROUP_DEPTH = 64, 16


@dataclass
class _Warp:
    path: Sequence[int]
    block: _Block
    at: int = 0
    scoreboards: list[float] = field(default_factory=lambda: [0.0] * 6)
    copies_arrive: float = 0.0
    groups_arrive: list[float] = field(default_factory=list)  # of committed copies
    group_products: int = 0  # that it has issued


@dataclass
class _Block:
    running: int = _WARPS
    waiting: list[int] = field(default_factory=list)  # warps at the barrier
    group_products: list[int] = field(default_factory=list)  # for each product, the warps that have issued it
    group_end: float = 0.0  # when the products that all warps have issued are done


def resident_blocks(kernel: Kernel, shared_bytes: int, architecture: str) -> int:
    """Return how many blocks a multiprocessor holds at a time; registers are given out in eights."""
    by_registers = REGISTERS // (-(-kernel.registers // 8) * 8 * 32 * _WARPS)
    return min(by_registers, SHARED_BYTES[architecture] // (shared_bytes + 1024), MOST_BLOCKS)


def seconds(kernel: Kernel, blocks: Sequence[Sequence[int]], resident: int, memory_share: float) -> float:
    """Return the modeled seconds of one multiprocessor.

    Args:
        kernel: The kernel.
        blocks: For each block, in the order of starting, the instructions that its warps issue.
        resident: Blocks at a time.
        memory_share: Part of the copied bytes that the L2 cache does not have.
    """
    return _Multiprocessor(kernel, blocks, memory_share).run(resident) / CLOCK


class _Multiprocessor:
    """Play the blocks. ``_ready`` holds (cycle, number of warp) of all warps that may issue."""

    def __init__(self, kernel: Kernel, blocks: Sequence[Sequence[int]], memory_share: float) -> None:
        self._code, self._share = kernel.code, memory_share
        self._units = [_unit(instruction) for instruction in kernel.code]
        self._blocks = list(reversed(blocks))
        self._warps: list[_Warp] = []
        self._ready: list[tuple[float, int]] = []
        self._unit_free: list[dict[str, float]] = [{} for _ in range(_WARPS)]
        self._last_issue = [-1.0] * _WARPS
        self._path_free = self._memory_free = self._l2_free = 0.0

    def run(self, resident: int) -> float:
        """Return the cycle in which everything is done."""
        end = 0.0
        for _ in range(resident):
            self._start_block(0.0)
        while self._ready:
            wanted, number = heapq.heappop(self._ready)
            warp, scheduler = self._warps[number], number % _WARPS
            i = warp.path[warp.at]
            now = self._earliest(wanted, warp, scheduler, i)
            if now > wanted:
                heapq.heappush(self._ready, (now, number))
                continue
            self._issue(now, warp, scheduler, i)
            warp.at += 1
            end = max(end, now)
            self._continue(now, number)
        return max(end, self._memory_free)

    def _start_block(self, cycle: float) -> None:
        if self._blocks:
            path, block = self._blocks.pop(), _Block()
            for _ in range(_WARPS):
                heapq.heappush(self._ready, (cycle + _START, len(self._warps)))
                self._warps.append(_Warp(path, block))

    def _earliest(self, wanted: float, warp: _Warp, scheduler: int, i: int) -> float:
        instruction, unit = self._code[i], self._units[i]
        cycle = max(wanted, self._last_issue[scheduler] + 1, self._unit_free[scheduler].get(unit, 0.0))
        if instruction.waits_for:
            cycle = max(cycle, *(warp.scoreboards[k] for k in range(6) if instruction.waits_for >> k & 1))
        if instruction.name == "DEPBAR":
            cycle = max(cycle, *warp.groups_arrive[: len(warp.groups_arrive) - _pending_groups(instruction)][-1:], 0.0)
        if instruction.name == "WARPGROUP" and instruction.modifiers.startswith(".DEPBAR"):
            issued = warp.block.group_products[warp.group_products - 1] if warp.group_products else _WARPS
            cycle = max(cycle, warp.block.group_end) if issued == _WARPS else max(cycle, wanted + _LOOK_AGAIN)
        return max(cycle, self._path_free - _QUEUE) if unit == "memory" else cycle

    def _issue(self, now: float, warp: _Warp, scheduler: int, i: int) -> None:
        instruction, unit = self._code[i], self._units[i]
        self._last_issue[scheduler] = now
        done, operands_read = now + _LATENCY.get(unit, 0), now + 12
        if instruction.name == "HGMMA":
            self._multiply_in_group(now, warp, instruction)
        if unit != "memory":
            self._unit_free[scheduler][unit] = now + _INTERVAL[unit]
        else:
            busy, latency = _MEMORY[instruction.name]
            self._path_free = max(now, self._path_free) + busy
            done, operands_read = self._path_free + latency, self._path_free + 8
        if instruction.name == "LDGSTS":
            done = self._copied(now)
            warp.copies_arrive = max(warp.copies_arrive, done)
        elif instruction.name == "LDG":
            done = now + _L2_LATENCY
        elif instruction.name == "STG":
            self._memory_free = max(self._memory_free, now) + _stored_bytes(instruction) / BYTES_PER_CYCLE
        elif instruction.name == "LDGDEPBAR":
            warp.groups_arrive.append(max(now, warp.copies_arrive))
            return
        if instruction.write_barrier < 6:
            warp.scoreboards[instruction.write_barrier] = max(warp.scoreboards[instruction.write_barrier], done)
        if instruction.read_barrier < 6:
            warp.scoreboards[instruction.read_barrier] = max(warp.scoreboards[instruction.read_barrier], operands_read)

    def _multiply_in_group(self, now: float, warp: _Warp, instruction: Instruction) -> None:
        """Note that a warp issues a product of its group, HGMMA.64x128x16 with the left operand in registers or not."""
        block, columns = warp.block, int(instruction.modifiers.split("x")[1])
        warp.group_products += 1
        if warp.group_products > len(block.group_products):
            block.group_products.append(0)
        block.group_products[warp.group_products - 1] += 1
        if block.group_products[warp.group_products - 1] < _WARPS:
            return
        start = max(now, *(free.get("product", 0.0) for free in self._unit_free))
        read = columns if instruction.text.split(", ")[1].startswith("R") else columns + _GROUP_ROWS
        self._path_free = max(start, self._path_free) + read * _GROUP_DEPTH * 2 / _SHARED_BYTES
        end = max(start + _GROUP_ROWS * columns * _GROUP_DEPTH / _GROUP_MULTIPLY_ADDS, self._path_free)
        for free in self._unit_free:
            free["product"] = end
        block.group_end = max(block.group_end, end + _GROUP_LATENCY)

    def _copied(self, now: float) -> float:
        """Return when the bytes of a copy are in shared memory."""
        share = self._share
        self._l2_free = max(self._l2_free, now) + _ACCESS_BYTES / L2_BYTES_PER_CYCLE
        arrived = max(now + (_MEMORY_LATENCY if share >= 0.5 else _L2_LATENCY), self._l2_free + _L2_LATENCY)
        if share > 0:
            self._memory_free = max(self._memory_free, now) + _ACCESS_BYTES * share / BYTES_PER_CYCLE
            arrived = max(arrived, self._memory_free + _MEMORY_LATENCY - 200)
        return arrived

    def _continue(self, now: float, number: int) -> None:
        """Say when a warp may issue again. The last warp at a barrier releases the others."""
        warp = self._warps[number]
        issued = self._code[warp.path[warp.at - 1]]
        if warp.at == len(warp.path):
            warp.block.running -= 1
            if warp.block.running == 0:
                self._start_block(now)
        elif issued.name != "BAR":
            heapq.heappush(self._ready, (now + max(1, issued.stall), number))
        else:
            warp.block.waiting.append(number)
            if len(warp.block.waiting) == _WARPS:
                for waiting in warp.block.waiting:
                    heapq.heappush(self._ready, (now + _BARRIER, waiting))
                warp.block.waiting = []


def _pending_groups(instruction: Instruction) -> int:
    """Return how many groups of copies may still be on their way after a wait: DEPBAR.LE SB0, 0x1."""
    return int(instruction.text.rpartition(",")[2], 16)


def _stored_bytes(instruction: Instruction) -> int:
    """Return the bytes that a warp's store sends to memory; nvcc splits some stores of 16 bytes a lane into four."""
    words = 4 if ".128" in instruction.modifiers else 2 if ".64" in instruction.modifiers else 1
    return _ACCESS_BYTES * words // 4


def _unit(instruction: Instruction) -> str:
    if instruction.text.startswith("@!PT"):  # never happens
        return "control"
    if instruction.name in _MEMORY:
        return "memory"
    if instruction.name.startswith("IMAD"):
        return "integer product"
    return _UNITS.get(instruction.name, "integer")
