"""Report what this machine can do: ``python -m trainer.doctor [CONFIG.yaml [--section.key VALUE ...]]``.

Each line is a finding: a verdict, the thing, and what it is needed for. With a configuration, the report also says
whether it is valid here and which numbers of processes fit.

Exit codes: 0 training is possible here; 1 something required is missing; 2 the configuration is wrong.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.config.batch_sizes import possible_world_sizes
from trainer.config.checks.missing_libraries import nvme_obstacle, optimizer_obstacle
from trainer.config.loader import load_config, schema_of
from trainer.config.run_config import RunConfig
from trainer.config.yaml_file import read_yaml
from trainer.errors import ConfigError

# Absent where the project is installed without its clone.
PROJECT, DISTRIBUTION = Path(__file__).resolve().parents[1] / "pyproject.toml", "flamingo-trainer"
GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """Describe one line of the report.

    Attributes:
        verdict: "ok"; "absent" if only a feature is unavailable; "missing" if training is impossible without it.
        name: Thing that was looked for.
        detail: What was found, or what it is needed for.
    """

    verdict: Literal["ok", "absent", "missing"]
    name: str
    detail: str


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        print(__doc__.replace("``", ""))
        return 0
    findings: list[Finding] = []
    for title, check in CHECKS:
        print(f"\n{title}")
        for finding in _guarded(check):
            findings.append(finding)
            print(f"  {finding.verdict:<8} {finding.name:<28} {finding.detail}", flush=True)
    missing = [finding.name for finding in findings if finding.verdict == "missing"]
    config_is_valid = _check_config(arguments) if arguments else True
    print(f"\n{'Training is NOT possible here: ' + ', '.join(missing) if missing else 'Training is possible here.'}")
    if missing:
        return 1
    return 0 if config_is_valid else ConfigError.exit_code


def _guarded(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """Run a check, and turn an exception in it into a finding."""
    try:
        yield from check()
    except Exception as error:  # noqa: BLE001
        yield Finding("missing", check.__name__.removeprefix("_check_"), f"{type(error).__name__}: {error}")


def _check_python() -> Iterator[Finding]:
    version = platform.python_version()
    verdict: Literal["ok", "missing"] = "ok" if sys.version_info >= (3, 11) else "missing"
    yield Finding(verdict, "python", f"{version} on {platform.system()} {platform.machine()}; 3.11 or newer is needed")
    include = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not include.is_file():
        yield Finding(
            "absent", "python headers", "needed to compile ops; on Debian and Ubuntu: apt install python3-dev"
        )


def _requirements() -> list[str]:
    """Return what the project needs: from the clone's pyproject.toml, or from the installed package."""
    if PROJECT.is_file():
        return list(tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"])
    texts = importlib.metadata.requires(DISTRIBUTION) or []
    return [text for text in texts if "extra ==" not in text.partition(";")[2]]


def _check_packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in _requirements()]
    fine = []
    for requirement in requirements:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding("missing", requirement.name, f"not installed, {requirement.specifier} is needed")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            fine.append(f"{requirement.name} {version}")
        else:
            yield Finding("missing", requirement.name, f"{version} is installed, {requirement.specifier} is needed")
    shown = [text for text in fine if text.split()[0] in ("torch", "deepspeed", "transformers", "open_clip_torch")]
    yield Finding("ok", f"{len(fine)} of {len(requirements)} packages", ", ".join(shown))
    import torchvision

    yield Finding("ok", "torchvision", f"{torchvision.__version__} loads with this torch")


def _check_devices() -> Iterator[Finding]:
    import psutil
    import torch

    from trainer.runtime.cpu_matmul import why_onednn_is_not_faster

    memory = psutil.virtual_memory()
    memory_text = f"{memory.total / GIB:.0f} GiB, {memory.available / GIB:.0f} GiB free"
    yield Finding("ok", "CPU", f"{len(os.sched_getaffinity(0))} cores usable, {memory_text}")
    reason = why_onednn_is_not_faster()
    library = "oneDNN" if reason is None else f"torch's own choice: {reason}"
    yield Finding("ok", "CPU matrix products", f"{library} (training.cpu_matmul auto)")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        bf16 = "bfloat16" if gpu.major >= 8 else "no bfloat16: set training.dtype to float32"
        detail = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, sm_{gpu.major}{gpu.minor}, {bf16}"
        yield Finding("ok", f"GPU {index}", detail)
    if not torch.cuda.is_available():
        built = torch.version.cuda
        obstacle = (
            f"torch is built for CUDA {built}; no device or driver found" if built else "torch is built without CUDA"
        )
        yield Finding("absent", "GPU", f"{obstacle}; small models train on the CPU (DS_ACCELERATOR=cpu)")
    disk = shutil.disk_usage(".")
    yield Finding("ok", "disk here", f"{disk.free / GIB:.0f} GiB free of {disk.total / GIB:.0f} GiB")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        low = free < GIB
        detail = f"{free / GIB:.1f} GiB" + ("; loader workers (data.num_workers > 0) may run out of it" if low else "")
        yield Finding("absent" if low else "ok", "shared memory", detail)


def _check_compilers() -> Iterator[Finding]:
    compiler = os.environ.get("CXX", "g++").split()[0]
    yield _program(compiler, ["--version"], "compiles the CPU ops and DeepSpeed's; otherwise plain torch and adamw")
    yield _program("nvcc", ["--version"], "compiles the CUDA ops; otherwise plain torch on the GPU", line=-1)
    has_ninja = shutil.which("ninja") is not None or importlib.util.find_spec("ninja") is not None
    yield Finding("ok" if has_ninja else "absent", "ninja", "builds DeepSpeed's ops")


def _check_launchers() -> Iterator[Finding]:
    beside = Path(sys.executable).with_name("deepspeed")
    found = shutil.which("deepspeed") or (str(beside) if beside.is_file() else None)
    verdict: Literal["ok", "absent"] = "ok" if found else "absent"
    yield Finding(
        verdict, "deepspeed launcher", "starts several processes here, and on other nodes with pdsh, mpirun or srun"
    )
    for name, purpose in (
        ("ssh", "reaches other nodes"),
        ("pdsh", "deepspeed's default launcher for several nodes"),
        ("mpirun", "deepspeed --launcher openmpi; trainer.index across nodes"),
        ("srun", "deepspeed --launcher slurm"),
    ):
        yield Finding("ok" if shutil.which(name) else "absent", name, purpose)
    yield _check_mpi4py()


def _check_mpi4py() -> Finding:
    purpose = "trainer.index under mpirun, deepspeed --launcher openmpi"
    # A broken MPI library may end the process that loads it.
    program = "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; print(MPI.Get_library_version())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 0:
        return Finding("ok", "mpi4py", f"{done.stdout.strip().splitlines()[0][:60]}: {purpose}")
    reason = "not installed" if importlib.util.find_spec("mpi4py") is None else "finds no MPI library"
    return Finding("absent", "mpi4py", f"{reason}: {purpose}")


def _check_ops() -> Iterator[Finding]:
    from model import ops

    for row in ops.status():
        yield Finding("ok" if row.available else "absent", row.op, f"{row.backend}: {row.reason}")


def _check_optimizers() -> Iterator[Finding]:
    yield Finding("ok", "adamw", "torch's fused AdamW (default)")
    for name, purpose in (("cpu_adam", "faster with offloaded optimizer state"), ("apex_fused_adam", "GPU only")):
        reason = optimizer_obstacle(name)
        yield Finding("absent" if reason else "ok", name, reason or purpose)


def _check_storage() -> Iterator[Finding]:
    obstacle = nvme_obstacle()
    yield Finding("absent" if obstacle else "ok", "offload to nvme", obstacle or "libaio and a compiler are here")
    for name, purpose in (("tensorboard", "logging.tensorboard"), ("wandb", "logging.wandb_project")):
        found = importlib.util.find_spec(name) is not None
        yield Finding("ok" if found else "absent", name, purpose if found else f"{purpose}: pip install {name}")


CHECKS: tuple[tuple[str, Callable[[], Iterator[Finding]]], ...] = (
    ("Python", _check_python),
    ("Packages", _check_packages),
    ("Devices", _check_devices),
    ("Compilers", _check_compilers),
    ("Launchers", _check_launchers),
    ("Fused ops", _check_ops),
    ("Optimizers", _check_optimizers),
    ("Storage and logging", _check_storage),
)


def _program(name: str, arguments: list[str], purpose: str, line: int = 0) -> Finding:
    path = shutil.which(name)
    if path is None:
        return Finding("absent", name, purpose)
    done = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=60, check=False)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return Finding("ok", name, lines[line] if lines else path)


def _check_config(arguments: list[str]) -> bool:
    path = Path(arguments[0])
    print(f"\nConfiguration {path}")
    try:
        schema: type[Any] = schema_of(read_yaml(path).values)
        config = load_config(path, arguments[1:], schema)
    except ConfigError as error:
        print("\n".join(f"  wrong    {problem}" for problem in error.problems))
        return False
    print(f"  ok       {schema.__name__}")
    if isinstance(config, RunConfig):
        print(f"  ok       numbers of processes that fit: {', '.join(map(str, possible_world_sizes(config)))}")
    return True


if __name__ == "__main__":
    sys.exit(main())
