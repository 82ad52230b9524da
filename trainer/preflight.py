"""Check that the nodes of a job can train together: ``python -m trainer.preflight --hostfile H [CONFIG.yaml ...]``.

It asks each node over ssh for its versions, code, GPUs and clock, and whether it can write the run folder. Then all
nodes join for a short all-reduce. Under Slurm, where ssh may be closed, the same checks run as a job step:
``srun --ntasks-per-node=1 python -m trainer.preflight [CONFIG.yaml ...]``. It prints a verdict for each node.

Exit codes: 0 all nodes are ready; 1 some are not, and the output says what to do; 2 the hostfile or the configuration
is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from trainer.config.loader import load_config, schema_of
from trainer.config.run_config import RunConfig
from trainer.config.yaml_file import read_yaml
from trainer.entry import exit_now
from trainer.errors import TrainerError
from trainer.resilience.hostfile import Host, read_hostfile
from trainer.resilience.node_checks import (
    MIN_FREE_GIB,
    ROOT,
    NetworkReport,
    NodeReport,
    folder_problems,
    node_problems,
    node_report,
    verdict_table,
)
from trainer.resilience.ssh import master_address, ssh_command, unreachable_hosts
from trainer.runtime.launch_environment import job_step

_REACH_SECONDS, _REPORT_SECONDS, _NETWORK_SECONDS = 20.0, 120.0, 180.0
_MARK = "preflight-answer "  # precedes the answer: a login shell may print other lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and return the exit code."""
    arguments, rest = _parser().parse_known_args(argv)
    try:
        run_dir = arguments.run_dir or _run_dir(rest)
        if arguments.answer:
            return _answer(arguments, run_dir)
        if arguments.hostfile is None:
            return _as_job_step(arguments, run_dir)
        return _over_ssh(arguments, run_dir)
    except TrainerError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _run_dir(rest: Sequence[str]) -> Path | None:
    """Return the run folder of the configuration and its overrides, if one was given."""
    if not rest:
        return None
    path = Path(rest[0])
    config: RunConfig = load_config(path, rest[1:], schema_of(read_yaml(path).values), check_files=False)
    return Path(config.run_dir).absolute()


@dataclass(frozen=True)
class _Ssh:
    """Run commands on nodes, in this clone and with the same Python.

    Attributes:
        arguments: Options of every ssh call.
        environment: NAME=VALUE pairs to set on the node.
    """

    arguments: list[str]
    environment: list[str]

    def ask(self, host: Host, options: Sequence[str], timeout_seconds: float) -> tuple[str, str]:
        """Return a node's answer to ``trainer.preflight --answer`` and "", or "" and the reason for its silence."""
        python = [sys.executable, "-m", "trainer.preflight", "--answer", *options]
        command = f"cd {shlex.quote(str(ROOT))} && env {shlex.join([*self.environment, *python])}"
        call = ssh_command(host, self.arguments, _REACH_SECONDS, command)
        try:
            done = subprocess.run(
                call, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return "", f"no answer within {timeout_seconds:g} s"
        for line in done.stdout.splitlines():
            if line.startswith(_MARK):
                return line.removeprefix(_MARK), ""
        return "", done.stderr.strip().rpartition("\n")[2] or f"ended with code {done.returncode}"


def _over_ssh(arguments: argparse.Namespace, run_dir: Path | None) -> int:
    hosts = read_hostfile(arguments.hostfile)
    environment = arguments.environment.read_text().splitlines() if arguments.environment else []
    if "DS_ACCELERATOR" in os.environ:
        environment.append(f"DS_ACCELERATOR={os.environ['DS_ACCELERATOR']}")
    ssh = _Ssh(shlex.split(arguments.ssh_args), environment)
    silent = unreachable_hosts(hosts, ssh.arguments, _REACH_SECONDS)
    problems = {name: [f"ssh does not reach it: {why}; check `ssh {name} true`"] for name, why in silent.items()}
    reports: dict[str, NodeReport] = {}
    reached = [host for host in hosts if host.name not in silent]
    with ThreadPoolExecutor(max(1, len(reached))) as pool:
        for host, (report, why) in zip(reached, pool.map(partial(_report_of, ssh, run_dir), reached), strict=True):
            if report is None:
                problems[host.name] = [
                    f"this clone or its Python does not work there: {why}; run launch_scripts/setup.sh"
                ]
            else:
                reports[host.name] = report
    for host in hosts:
        if host.name in reports:
            reference = next(iter(reports.values()))
            problems[host.name] = list(node_problems(reports[host.name], reference, host.slots, arguments.min_free_gib))
    network = None
    if not any(problems.values()):
        master = arguments.master_address or master_address(hosts, ssh.arguments)
        network, failed = _network(ssh, hosts, run_dir, master, arguments.master_port)
        problems |= failed
    return _verdict([host.name for host in hosts], reports, problems, network)


def _report_of(ssh: _Ssh, run_dir: Path | None, host: Host) -> tuple[NodeReport | None, str]:
    """Return a node's report, with its name in the hostfile and its clock skew against this machine."""
    text, why = ssh.ask(host, ["--run-dir", str(run_dir)] if run_dir else [], _REPORT_SECONDS)
    if not text:
        return None, why
    report = NodeReport(**json.loads(text))
    return replace(report, name=host.name, clock_skew=report.clock - time.time()), ""


def _network(
    ssh: _Ssh, hosts: Sequence[Host], run_dir: Path | None, master: str, port: int
) -> tuple[NetworkReport | None, dict[str, list[str]]]:
    """Run the joint check with one process per node; return its report, or the problems of each node."""
    token = uuid.uuid4().hex
    common = ["--token", token, "--size", str(len(hosts)), "--master-address", master, "--master-port", str(port)]
    common += ["--run-dir", str(run_dir)] if run_dir else []

    def ask(rank: int) -> tuple[str, str]:
        options = [*common, "--rank", str(rank), "--name", hosts[rank].name]
        return ssh.ask(hosts[rank], options, _NETWORK_SECONDS)

    with ThreadPoolExecutor(len(hosts)) as pool:
        answers = list(pool.map(ask, range(len(hosts))))
    advice = f"check firewalls and INTERFACE (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), and that port {port} is free"
    failed = {
        host.name: [f"no all-reduce with {master}: {why}; {advice}"]
        for host, (text, why) in zip(hosts, answers, strict=True)
        if not text
    }
    if failed:
        return None, failed
    network = NetworkReport(**json.loads(answers[0][0]))
    return network, folder_problems(network, [host.name for host in hosts])


def _answer(arguments: argparse.Namespace, run_dir: Path | None) -> int:
    """Print this node's report for the machine that asks over ssh."""
    answer: NodeReport | NetworkReport
    if arguments.rank is None:
        answer = node_report(run_dir)
    else:
        from trainer.resilience.network_checks import join, network_report

        join(arguments.rank, arguments.size, arguments.master_address, arguments.master_port)
        answer = network_report(arguments.name, run_dir, arguments.token)
    print(f"{_MARK}{json.dumps(asdict(answer))}", flush=True)
    return 0


def _as_job_step(arguments: argparse.Namespace, run_dir: Path | None) -> int:
    """Run under srun with one process per node: all report to rank 0, which prints the verdict."""
    step = job_step(os.environ)
    if step is None:
        print("preflight: give --hostfile, or start it with srun --ntasks-per-node=1", file=sys.stderr)
        return 2
    from trainer.resilience.network_checks import gather_reports, join, network_report

    rank, size = step
    master = os.environ.get("MASTER_ADDR") or os.environ.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1")
    try:
        join(rank, size, master, arguments.master_port)
    except RuntimeError as error:
        port, reason = arguments.master_port, str(error).partition("\n")[0]
        raise TrainerError(
            f"preflight: no connection with {master}:{port}: {reason}; check firewalls, and that the port is free"
        ) from None
    report = replace(node_report(run_dir), name=os.environ["SLURMD_NODENAME"])
    reports = {one.name: one for one in gather_reports(report)}
    names = list(reports)
    slots = int(os.environ.get("SLURM_GPUS_ON_NODE", "0")) or None
    problems = {
        name: list(node_problems(one, reports[names[0]], slots, arguments.min_free_gib))
        for name, one in reports.items()
    }
    network = None
    if not any(problems.values()):
        network = network_report(report.name, run_dir, os.environ["SLURM_JOB_ID"])
        problems |= folder_problems(network, names)
    if rank == 0:
        return _verdict(names, reports, problems, network)
    return int(any(problems.values()))


def _verdict(
    names: Sequence[str],
    reports: dict[str, NodeReport],
    problems: dict[str, list[str]],
    network: NetworkReport | None,
) -> int:
    print(verdict_table(names, reports, problems, network), flush=True)
    return int(any(problems.values()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.preflight",
        usage="%(prog)s [options] [CONFIG.yaml [--section.key VALUE ...]]",
        description=__doc__.replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="nodes, as for launch_scripts/multinode.sh (default: under srun)"
    )
    parser.add_argument(
        "--ssh-args", default="", metavar="WORDS", help='options of every ssh call, such as "-p 2222" (default: none)'
    )
    parser.add_argument(
        "--environment", type=Path, metavar="FILE", help="NAME=VALUE lines to set on the nodes (default: none)"
    )
    parser.add_argument(
        "--master-address", default="", metavar="IP", help="address of the first node (default: its own answer)"
    )
    parser.add_argument(
        "--master-port",
        type=int,
        default=29500,
        metavar="PORT",
        help="port of the first node for the all-reduce (default: %(default)s)",
    )
    parser.add_argument(
        "--min-free-gib",
        type=float,
        default=MIN_FREE_GIB,
        metavar="GIB",
        help="free space required in the run folder, in GiB (default: %(default)s)",
    )
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)  # this and the rest: between nodes
    for name, kind in (("--run-dir", Path), ("--token", str), ("--size", int), ("--rank", int), ("--name", str)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    exit_now(main())  # torch's threads can abort an interpreter that exits normally
