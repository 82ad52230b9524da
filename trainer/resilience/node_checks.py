"""Check a node before a job starts on it: versions, code, devices, disk and clock.

A node reports without torch, so that a node with a broken installation can report too.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
MAX_SKEW_SECONDS = 5.0  # far above the delay of ssh; with a larger skew, the times of logs and files mislead
MIN_FREE_GIB = 10.0
_SOURCES = (".py", ".cpp", ".cu", ".cuh", ".h", ".inl")
_VERSIONS = ("torch", "deepspeed", "transformers", "flamingo-trainer")


@dataclass(frozen=True)
class NodeReport:
    """Describe a node.

    Attributes:
        name: Host name.
        versions: Version of Python and of each package that must agree.
        code: Digest of all source files, which is compared.
        commit: Commit of git, for people to read.
        devices: Number of GPUs; None if the job runs on CPUs.
        free_gib: Free space for the run folder, in GiB; None if not known.
        folder_problem: Why the run folder cannot be written; empty if it can.
        clock: Time of the node, in seconds since 1970.
        clock_skew: Difference from the clock of the asking machine, in seconds.
    """

    name: str
    versions: dict[str, str]
    code: str
    commit: str
    devices: int | None
    free_gib: float | None
    folder_problem: str
    clock: float
    clock_skew: float = 0.0


@dataclass(frozen=True)
class NetworkReport:
    """Describe the network between the nodes.

    Attributes:
        backend: Backend of the collectives.
        gigabytes_per_second: Rate of the all-reduce per node.
        mebibytes: Size of the tensor in the all-reduce.
        sees: For each node, the nodes whose files it sees in the run folder; empty without a run folder.
    """

    backend: str
    gigabytes_per_second: float
    mebibytes: int
    sees: dict[str, list[str]]


def node_report(run_dir: Path | None) -> NodeReport:
    """Return the report of this node."""
    free, problem = _probe_folder(run_dir) if run_dir else (None, "")
    return NodeReport(
        name=socket.gethostname(),
        versions={"python": platform.python_version(), **{name: _version(name) for name in _VERSIONS}},
        code=code_digest(ROOT),
        commit=_commit(),
        devices=_devices(),
        free_gib=free,
        folder_problem=problem,
        clock=time.time(),
    )


def code_digest(root: Path) -> str:
    """Return a digest of the names and contents of all source files, committed or not."""
    digest = sha256()
    for folder in ("model", "trainer", "csrc"):
        for path in sorted(path for path in (root / folder).rglob("*") if path.suffix in _SOURCES):
            digest.update(f"{path.relative_to(root)}\0".encode())
            digest.update(sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def node_problems(report: NodeReport, reference: NodeReport, slots: int | None, min_free_gib: float) -> Iterator[str]:
    """Yield the problems that keep a node from training with the reference node, each with its remedy.

    Args:
        report: Report of the node.
        reference: Report of the first node.
        slots: Processes to start on the node; None does not compare them with its GPUs.
        min_free_gib: Free space that the run folder needs, in GiB.
    """
    for name, version in report.versions.items():
        if version != reference.versions[name]:
            expected = reference.versions[name]
            yield f"{name} is {version}, {expected} on {reference.name}: run launch_scripts/setup.sh on both"
    if report.code != reference.code:
        yield (
            f"its code differs from that of {reference.name} ({report.commit} and {reference.commit}): "
            "check out the same commit on both, without local changes"
        )
    if (report.devices is None) != (reference.devices is None):
        kinds = ["CPUs" if one.devices is None else "GPUs" for one in (report, reference)]
        yield f"it trains on {kinds[0]}, {reference.name} on {kinds[1]}: check nvidia-smi and DS_ACCELERATOR on both"
    elif slots is not None and report.devices is not None and slots > report.devices:
        yield f"slots={slots}, but it has {report.devices} GPUs: lower the slots of all hosts, or repair its driver"
    if report.folder_problem:
        yield f"the run folder cannot be written: {report.folder_problem}"
    if report.free_gib is not None and report.free_gib < min_free_gib:
        yield f"{report.free_gib:.1f} GiB are free for the run folder, {min_free_gib:g} are wanted (--min-free-gib)"
    if abs(report.clock_skew) > MAX_SKEW_SECONDS:
        ahead = "ahead" if report.clock_skew > 0 else "behind"
        yield f"its clock is {abs(report.clock_skew):.0f} s {ahead}: start chrony or ntpd on it"


def folder_problems(network: NetworkReport, names: Sequence[str]) -> dict[str, list[str]]:
    """Return, by node, the problem of nodes that do not see the run folder of the first node."""
    found: dict[str, list[str]] = {}
    for name in names[1:] if network.sees else ():
        if names[0] not in network.sees[name]:
            found[name] = [f"its run folder differs from that of {names[0]}: mount the same shared folder on both"]
    return found


def verdict_table(
    names: Sequence[str],
    reports: Mapping[str, NodeReport],
    problems: Mapping[str, Sequence[str]],
    network: NetworkReport | None,
) -> str:
    """Format one line for each node with its verdict, followed by its problems."""
    width = max(len(name) for name in [*names, "node"])
    lines = [f"{'node':<{width}}  verdict  {'torch':<14} {'code':<13} {'devices':<8} {'free':>9}  {'clock':>7}"]
    for name in names:
        verdict = "FAILED" if problems.get(name) else "ok"
        line = f"{name:<{width}}  {verdict:<7}"
        if name in reports:
            one = reports[name]
            devices = "CPU" if one.devices is None else f"{one.devices} GPU"
            free = "" if one.free_gib is None else f"{one.free_gib:.0f} GiB"
            skew = f"{one.clock_skew:+.1f} s"
            line += f"  {one.versions['torch']:<14} {one.code[:12]:<13} {devices:<8} {free:>9}  {skew:>7}"
        lines += [line.rstrip(), *(f"    {problem}" for problem in problems.get(name, ()))]
    if network is not None:
        rate = f"{network.gigabytes_per_second:.2f} GB/s"
        lines.append(
            f"all-reduce of {network.mebibytes} MiB over {len(names)} nodes: {rate} a node ({network.backend})"
        )
    bad = [name for name in names if problems.get(name)]
    lines.append(
        f"preflight: {len(bad)} of {len(names)} nodes cannot train: {', '.join(bad)}"
        if bad
        else f"preflight: {len(names)} of {len(names)} nodes are ready"
    )
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "no git"
    return done.stdout.strip() or "no commit"


def _devices() -> int | None:
    if os.environ.get("DS_ACCELERATOR") == "cpu" or shutil.which("nvidia-smi") is None:
        return None
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return len(listed.stdout.splitlines()) if listed.returncode == 0 else None


def _probe_folder(run_dir: Path) -> tuple[float | None, str]:
    """Return the free GiB of a folder and why it cannot be written."""
    probe = run_dir / f".preflight-{uuid.uuid4().hex}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"x" * 4096)
        probe.unlink()
        return shutil.disk_usage(run_dir).free / GIB, ""
    except OSError as error:
        return None, str(error)
