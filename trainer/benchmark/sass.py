"""Compile CUDA kernels of csrc/ and read their machine code (SASS): instructions, loops, registers, spills."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

CUDA_SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
_SECTION = re.compile(r"\s*\.section\s+\.text\.(\S+?),")
_LABEL = re.compile(r"(\.L_\w+):")
_FIRST_WORD = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/")
_SECOND_WORD = re.compile(r"\s+/\* 0x([0-9a-f]{16}) \*/")
_INSTRUCTION = re.compile(r"(@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)(\S*)")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_REPORT = re.compile(
    r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers",
    re.DOTALL,
)


class ToolMissingError(RuntimeError):
    """Report that a tool of the CUDA toolkit, or the sources of the kernels, are not on this machine."""


@dataclass(frozen=True)
class Instruction:
    """Hold one instruction, with the fields of its control word that delay it or others.

    Attributes:
        name: Name without modifiers, such as "LDSM".
        modifiers: Rest of the name, such as ".16.MT88.4".
        text: Whole instruction, with its predicate.
        conditional: Whether a predicate decides about it, or about its jump.
        target: Number of the instruction that a branch, or a call with a condition, jumps to; None for others.
        stall: Cycles until the warp may issue its next instruction.
        write_barrier: Scoreboard that is released when the result exists; 7 for none.
        read_barrier: Scoreboard that is released when the operands have been read; 7 for none.
        waits_for: Scoreboards that must be free, one bit each.
    """

    name: str
    modifiers: str
    text: str
    conditional: bool
    target: int | None
    stall: int
    write_barrier: int
    read_barrier: int
    waits_for: int


@dataclass(frozen=True, eq=False)
class Kernel:
    """Hold one compiled kernel.

    Attributes:
        name: Mangled name.
        registers: Registers of a thread.
        spilled_bytes: Bytes of stack, spill stores and spill loads.
        code: Instructions in the order of their addresses.
    """

    name: str
    registers: int
    spilled_bytes: int
    code: tuple[Instruction, ...]


def find_nvcc() -> str:
    """Return the path of the CUDA compiler.

    Raises:
        ToolMissingError: There is none.
    """
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    nvcc = shutil.which("nvcc") or str(home / "bin" / "nvcc")
    if not os.access(nvcc, os.X_OK):
        raise ToolMissingError("no nvcc: set CUDA_HOME to a CUDA toolkit to compile the kernels")
    return nvcc


def find_disassembler() -> str:
    """Return the path of nvdisasm, of the toolkit or inside triton.

    Raises:
        ToolMissingError: There is none.
    """
    found = shutil.which("nvdisasm")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        candidate = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
        found = str(candidate) if candidate.exists() else None
    if found is None:
        raise ToolMissingError("no nvdisasm: neither the CUDA toolkit nor triton has one")
    return found


def nvcc_release() -> str:
    """Return the release of nvcc, such as "13.0"."""
    text = subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\S+),", text)
    return found[1] if found else "unknown"


def compile_source(source: Path, architecture: str, code: Path) -> str:
    """Compile a source file to machine code and return the report of ptxas.

    Args:
        source: CUDA file.
        architecture: Architecture such as "sm_90a".
        code: File to write.

    Raises:
        ToolMissingError: There is no nvcc.
        RuntimeError: nvcc reports an error.
    """
    command = [find_nvcc(), "-std=c++17", "-O3", f"-arch={architecture}", "-cubin", "-Xptxas=-v"]
    done = subprocess.run([*command, "-o", str(code), str(source)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"nvcc cannot compile {source}: {done.stderr[-2000:]}")
    return done.stderr


def read_kernels(report: str, code: Path) -> list[Kernel]:
    """Return the kernels of machine code.

    Args:
        report: What ``compile_source`` returned.
        code: The file that it wrote.

    Raises:
        ToolMissingError: There is no disassembler.
    """
    used = {name: [int(number) for number in numbers] for name, *numbers in _REPORT.findall(report)}
    text = subprocess.run(
        [find_disassembler(), "-c", "-hex", str(code)], capture_output=True, text=True, check=True
    ).stdout
    return [
        Kernel(name, used[name][-1], sum(used[name][:-1]), instructions)
        for name, instructions in _parse(text.splitlines()).items()
        if name in used
    ]


def compiled(instantiation: str, architecture: str) -> list[Kernel]:
    """Compile an instantiation of csrc/cuda, such as "masked_cross_attention_64_bf16".

    Raises:
        ToolMissingError: The sources, nvcc or the disassembler are missing.
    """
    source = CUDA_SOURCES / f"{instantiation}.cu"
    if not source.exists():
        raise ToolMissingError(f"no {source}: the machine code is made of the sources, so run this in a clone")
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "kernels.cubin"
        return read_kernels(compile_source(source, architecture, code), code)


def _parse(lines: Sequence[str]) -> dict[str, tuple[Instruction, ...]]:
    """Return the instructions of each section of a disassembly. An instruction has two words, on a line each."""
    texts: dict[str, list[tuple[str, int]]] = {}
    labels: dict[str, dict[str, int]] = {}
    name, first = "", ""
    for line in lines:
        if (match := _SECTION.match(line)) is not None:
            name = match[1]
            texts[name], labels[name] = [], {}
        elif not name:
            continue
        elif (match := _LABEL.match(line)) is not None:
            labels[name][match[1]] = len(texts[name])
        elif (match := _FIRST_WORD.match(line)) is not None:
            first = match[1]
        elif first and (match := _SECOND_WORD.match(line)) is not None:
            texts[name].append((first, int(match[1], 16)))
            first = ""
    return {name: tuple(_instruction(*pair, labels[name]) for pair in pairs) for name, pairs in texts.items()}


def _instruction(text: str, control: int, labels: dict[str, int]) -> Instruction:
    match = _INSTRUCTION.match(text)
    assert match is not None, f"unknown machine code: {text}"
    predicate, name, modifiers = match.groups()
    # ptxas for sm_80 leaves some loops by a call that has a condition and never returns.
    jumps = name == "BRA" or (name == "CALL" and predicate is not None)
    target = _TARGET.search(text) if jumps else None
    operands = text[match.end() :].partition("`")[0]
    return Instruction(
        name=name,
        modifiers=modifiers,
        text=text,
        conditional=predicate is not None or (name == "BRA" and re.search(r"\bU?P\d", operands) is not None),
        target=None if target is None else labels[target[1]],
        stall=control >> 41 & 15,
        write_barrier=control >> 46 & 7,
        read_barrier=control >> 49 & 7,
        waits_for=control >> 52 & 63,
    )
