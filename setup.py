"""Build csrc/ into model/ops: ``_C.abi3.so`` (schemas and CPU kernels) and ``_C_cuda.abi3.so``.

Both are optional. Without torch, compiler or CUDA toolkit at build time the install succeeds without them, and
``model/ops/_build_report.json`` keeps the reason, which ``python -m trainer.doctor`` shows. All other metadata are in
pyproject.toml.

Environment variables: MAX_JOBS (compilations at a time), TORCH_CUDA_ARCH_LIST (default "8.0+PTX 9.0a"), CUDA_HOME, CXX,
FLAMINGO_BUILD=0 (build nothing), FLAMINGO_BUILD=cpu (build no CUDA).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
DEFAULT_CUDA_ARCHITECTURES = "8.0+PTX 9.0a"  # PTX lets later cards compile the kernels when they are loaded


class Unavailable(Exception):
    """Report that a library cannot be built here; the doctor shows the message."""


def torch_folders() -> tuple[list[str], str]:
    """Return include folders and library folder of the torch in the building environment.

    Raises:
        Unavailable: torch is missing or broken.
    """
    try:
        import torch.utils.cpp_extension as cpp_extension
    except Exception as error:  # a broken torch raises anything
        raise Unavailable(
            f"no usable torch when flamingo-trainer was built ({error}); "
            "install torch, then `pip install -e . --no-build-isolation`"
        ) from error
    includes = cpp_extension.include_paths()
    return includes, str(Path(cpp_extension.__file__).parent.parent / "lib")


def find_compiler() -> str:
    """Return the path of the C++ compiler.

    Raises:
        Unavailable: There is none.
    """
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if compiler is None:
        raise Unavailable("no C++ compiler: set CXX or install g++")
    return compiler


def find_nvcc() -> str:
    """Return the path of the CUDA compiler, preferably that of CUDA_HOME.

    Raises:
        Unavailable: There is none.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    candidates = [str(Path(home) / "bin" / "nvcc"), shutil.which("nvcc") or ""]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise Unavailable("no nvcc: set CUDA_HOME to a CUDA toolkit to build the CUDA kernels")


def cuda_architectures() -> list[str]:
    """Return the architectures of TORCH_CUDA_ARCH_LIST, such as "9.0a" or "8.0+PTX"; Ampere and later only.

    Raises:
        Unavailable: The list has no such architecture.
    """
    names = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHITECTURES
    found = []
    for name in names.replace(";", " ").split():
        number = name.removesuffix("+PTX").replace(".", "").rstrip("af")
        if not number.isdigit():
            raise Unavailable(f"TORCH_CUDA_ARCH_LIST holds {name!r}; expected numbers like 8.0 or 9.0a")
        if int(number) >= 80:
            found.append(name)
    if not found:
        raise Unavailable(f"TORCH_CUDA_ARCH_LIST={names!r} names no architecture of compute capability 8.0 or later")
    return found


def cuda_code_flags() -> list[str]:
    """Return the ``-gencode`` options for ``cuda_architectures``, which lists the errors."""
    flags = []
    for name in cuda_architectures():
        number = name.removesuffix("+PTX").replace(".", "")
        code = f"sm_{number}" if not name.endswith("+PTX") else f"[sm_{number},compute_{number}]"
        flags += ["-gencode", f"arch=compute_{number},code={code}"]
    return flags


def cpu_rules() -> tuple[list[Path], str, list[str]]:
    """Return sources, compiler and flags of the CPU library.

    Raises:
        Unavailable: There is no compiler.
    """
    flags = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", *STABLE_ABI]
    if platform.machine().lower() in ("x86_64", "amd64") and "clang" not in compiler_name():
        flags.append("-DFLAMINGO_X86_KERNELS")
    return sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), find_compiler(), flags


def compiler_name() -> str:
    """Return the C++ compiler's description of itself, in lower case.

    Raises:
        Unavailable: There is no compiler.
    """
    return subprocess.run([find_compiler(), "--version"], capture_output=True, text=True, check=False).stdout.lower()


def cuda_rules() -> tuple[list[Path], str, list[str]]:
    """Return sources, compiler and flags of the CUDA library.

    Raises:
        Unavailable: CUDA was not requested, or nvcc or CUDA's torch is missing.
    """
    if os.environ.get("FLAMINGO_BUILD") == "cpu":
        raise Unavailable("built with FLAMINGO_BUILD=cpu")
    nvcc = find_nvcc()
    import torch

    if torch.version.cuda is None:
        raise Unavailable("the torch of the building environment has no CUDA")
    flags = ["-std=c++17", "-O3", "-lineinfo", "--threads", "1", "-DUSE_CUDA"]
    flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    return sorted((ROOT / "csrc" / "cuda").glob("*.cu")), nvcc, [*flags, *cuda_code_flags(), *STABLE_ABI]


def run(command: list[str], folder: Path) -> None:
    """Run a build command.

    Raises:
        Unavailable: The command failed; the message has the first errors that it printed.
    """
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    sys.stdout.write(result.stdout)
    if result.returncode != 0:
        errors = [line for line in (result.stdout + result.stderr).splitlines() if "error" in line.lower()]
        sys.stderr.write(result.stderr)
        raise Unavailable(f"{Path(command[0]).name} failed: {' | '.join(errors[:3]) or result.stderr[-300:]}")


def ninja_text(sources: list[Path], compiler: str, flags: list[str], link: list[str], output: Path) -> str:
    """Return a ninja file: one object a source, then the library; the compiler lists the headers that matter."""

    def quote(argument: str | Path) -> str:
        return str(argument).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

    lines = [
        f"rule compile\n  command = {compiler} {' '.join(flags)} -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        f"rule link\n  command = {compiler} -shared -o $out $in {' '.join(link)}",
    ]
    objects = [f"{source.stem}.o" for source in sources]
    lines += [f"build {name}: compile {quote(source)}" for name, source in zip(objects, sources, strict=True)]
    lines += [f"build {quote(output)}: link {' '.join(objects)}", f"default {quote(output)}"]
    return "\n".join(lines) + "\n"


def build_library(rules: tuple[list[Path], str, list[str]], libraries: list[str], output: Path, folder: Path) -> None:
    """Compile and link a library.

    Args:
        rules: Sources, compiler and flags.
        libraries: Flags of the linker.
        output: File of the library.
        folder: Folder for the objects.

    Raises:
        Unavailable: A source, a tool or torch is missing, or a command failed.
    """
    sources, compiler, flags = rules
    ninja = shutil.which("ninja") or shutil.which(str(Path(sys.executable).parent / "ninja"))
    if ninja is None:
        raise Unavailable("no ninja: `pip install ninja`")
    if not sources:
        raise Unavailable("csrc/ is not part of this source tree")
    includes, library_folder = torch_folders()
    flags = [*flags, *(f"-isystem {path}" for path in includes)]
    link = [f"-L{library_folder}", *libraries]
    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text(ninja_text(sources, compiler, flags, link, output.resolve()))
    run([ninja, "-C", str(folder), "-j", os.environ.get("MAX_JOBS", "2")], ROOT)


class OptionalLibraries(build_ext):
    """Build the possible libraries into the package, and record why the others are missing."""

    def run(self) -> None:
        package = ROOT / "model" / "ops" if self.inplace else Path(self.build_lib) / "model" / "ops"
        folder = Path(self.build_temp) if self.build_temp else Path(tempfile.mkdtemp())
        report: dict[str, str] = {}
        targets = {
            "cpu": (cpu_rules, "_C.abi3.so", ["-ltorch_cpu", "-lc10"]),
            "cuda": (cuda_rules, "_C_cuda.abi3.so", ["-ltorch_cuda", "-ltorch_cpu", "-lc10", "-cudart", "shared"]),
        }
        for device, (rules, name, libraries) in targets.items():
            (package / name).unlink(missing_ok=True)
            try:
                if os.environ.get("FLAMINGO_BUILD") == "0":
                    raise Unavailable("built with FLAMINGO_BUILD=0")
                torch_folders()
                build_library(rules(), libraries, package / name, folder / device)
                if device == "cuda":
                    report["cuda architectures"] = " ".join(cuda_architectures())
            except Unavailable as reason:
                report[device] = str(reason)
                print(f"flamingo-trainer: no {device} kernels: {reason}", file=sys.stderr)
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_report.json").write_text(json.dumps(report, indent=1) + "\n")

    def get_outputs(self) -> list[str]:
        return []

    def get_ext_fullpath(self, ext_name: str) -> str:
        return str(ROOT / "model" / "ops" / "_C.abi3.so")


options: dict[str, Any] = {"bdist_wheel": {"py_limited_api": "cp311"}}
setup(
    ext_modules=[Extension("model.ops._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": OptionalLibraries},
    options=options,
)
