"""Keep a run going without anybody at night: start it, and start it again when it fails or loses a node.

``python -m trainer.supervise [--processes N | --hostfile FILE] [--restarts N --within MINUTES] -- CONFIG [overrides]``

After a failure the job starts again from its newest good checkpoint. With a hostfile it runs on the nodes that answer,
in the largest number of processes that the batch sizes allow; a node that comes back is used at the next start, and
one that fails alone twice is left out. The same error twice at the same update is a bug, and ends it.
SIGTERM, SIGUSR1 or Ctrl-C asks the job to save and end.
Exit codes: 0 the run is complete; 75 it was asked to end: start it again; 2 the configuration or the hostfile is wrong;
1 it gave up, and said why.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from trainer.config.cross_checks import allowed_world_sizes
from trainer.config.loader import load_config, schema_of
from trainer.config.run_config import RunConfig
from trainer.config.yaml_file import read_yaml
from trainer.entry import EXIT_CONFIGURATION, EXIT_FAILED, EXIT_OK, is_complete
from trainer.errors import TrainerError
from trainer.resilience.events import EventLog
from trainer.resilience.hosts import Host, read_hostfile, unreachable, write_hostfile
from trainer.resilience.restarts import RestartPolicy, choose_hosts, read_events, read_failure, steps_done

EXIT_ASKED_TO_END = 75
_WAIT_FOR_NODES_SECONDS = 30.0
_ROOT = Path(__file__).parents[1]
_IMPATIENT_SSH = "-o ConnectTimeout=3 -o ServerAliveInterval=3 -o ServerAliveCountMax=2".split()
_POLL_SECONDS, _PROBE_SECONDS, _PROBE_TIMEOUT_SECONDS = 0.5, 5.0, 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    nodes = parser.add_mutually_exclusive_group()
    nodes.add_argument("--processes", type=int, default=1, help="processes on this machine (default: 1)")
    nodes.add_argument("--hostfile", type=Path, help="nodes to run on, through launch_scripts/multinode.sh")
    parser.add_argument("--restarts", type=int, default=10, help="restarts after failures (default: 10) ...")
    parser.add_argument("--within", type=float, default=60, help="... in that many minutes (default: 60)")
    parser.add_argument("--module", default="trainer.train", help="the trainer (default: trainer.train)")
    parser.add_argument("run", nargs="+", metavar="CONFIG [overrides]", help="after --, as for the trainer")
    options = parser.parse_args(argv)
    path, *overrides = options.run
    try:
        config: RunConfig = load_config(Path(path), overrides, schema_of(read_yaml(Path(path)).values))
        hosts = () if options.hostfile is None else read_hostfile(options.hostfile)
    except TrainerError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    config.run_dir.mkdir(parents=True, exist_ok=True)
    policy = RestartPolicy(options.restarts, 60 * options.within)
    with tempfile.TemporaryDirectory() as scratch:
        supervisor = Supervisor(config, policy, hosts, options.processes, options.module, options.run, Path(scratch))
        return supervisor.run()


class Supervisor:
    """One run and the jobs that it takes.

    hosts: of the hostfile, empty on one machine with ``processes``. arguments: CONFIG and overrides. scratch: a folder
    for hostfiles of what is left of the nodes.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: RestartPolicy,
        hosts: Sequence[Host],
        processes: int,
        module: str,
        arguments: Sequence[str],
        scratch: Path,
    ) -> None:
        self._config, self._policy, self._hosts, self._processes = config, policy, hosts, processes
        self._module, self._arguments, self._scratch = module, arguments, scratch
        self._ssh_arguments = shlex.split(os.environ.get("SSH_ARGS", ""))
        self._events = EventLog(config.run_dir)
        self._asked = 0
        self._lost: frozenset[str] = frozenset()  # nodes that the job now running, or the last one, lost
        self._trained: set[str] = set()  # nodes on which the last job trained
        self._job: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Until the run is complete, or there is a reason to stop; returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)
        while not is_complete(self._config):
            before = len(read_events(self._config.run_dir))
            code = self._attempt()
            if is_complete(self._config):
                break
            preempted = any(event["event"] == "preempted" for event in read_events(self._config.run_dir)[before:])
            if self._asked:
                return EXIT_ASKED_TO_END
            if code == EXIT_CONFIGURATION:
                return EXIT_CONFIGURATION
            if preempted:
                self._say("asked to end and saved; starting again at once")
                continue
            failure = read_failure(self._config.run_dir, before)
            why = self._policy.why_stop(failure, time.monotonic())
            if why is not None:
                self._events.write("gave_up", failure.step, why=why)
                self._say(f"gave up: {why}")
                return EXIT_FAILED
            self._events.write("restart", failure.step, exit_code=code, errors=sorted(failure.errors))
            self._say(f"the job ended with code {code} after update {failure.step}; starting again")
        self._say(f"{self._config.run_dir} is complete")
        return EXIT_OK

    def _attempt(self) -> int:
        """One job from start to end; its launcher's exit code."""
        try:
            command, hosts = self._command()
        except TrainerError as error:
            self._say(str(error))
            time.sleep(_WAIT_FOR_NODES_SECONDS)
            return error.exit_code
        environment = {**os.environ, "TRAINER": self._module, "MASTER_PORT": str(_free_port())}
        # Of options given twice ssh takes the first: multinode.sh would wait longer for a node that is gone.
        environment["SSH_ARGS"] = shlex.join([*self._ssh_arguments, *_IMPATIENT_SSH])
        names = {host.name for host in hosts}
        if hosts and names <= self._trained:
            environment["PREFLIGHT"] = "0"  # these nodes trained together a moment ago
        # A session of its own: a terminal's Ctrl-C comes to the supervisor only, which asks the ranks in order.
        self._job = subprocess.Popen(command, cwd=None if not hosts else _ROOT, env=environment, start_new_session=True)
        before = steps_done(self._config.run_dir)
        self._watch(hosts)
        self._trained = names if steps_done(self._config.run_dir) > before else set()
        return self._job.returncode

    def _watch(self, hosts: Sequence[Host]) -> None:
        """Until the job has ended, and end it when one of its nodes is gone."""
        assert self._job is not None
        begun, silent_before = time.monotonic(), frozenset[str]()
        while self._job.poll() is None:
            time.sleep(_POLL_SECONDS)
            if not hosts or self._lost or time.monotonic() - begun < _PROBE_SECONDS:
                continue
            # Counted from its beginning: a probe that had to wait for an answer is repeated at once.
            begun = time.monotonic()
            silent = frozenset(unreachable(hosts, self._ssh_arguments, _PROBE_TIMEOUT_SECONDS))
            self._lost = silent & silent_before  # twice, so that one lost packet ends no job
            silent_before = silent
            if self._lost:
                self._events.write("node_lost", hosts=sorted(self._lost))
                self._say(f"lost {', '.join(sorted(self._lost))}: ending the job on the other nodes")
                self._end_job()

    def _command(self) -> tuple[list[str], tuple[Host, ...]]:
        """What to start, and on which hosts. Raises: TrainerError when no world size is left."""
        if not self._hosts:
            launcher = str(Path(sys.executable).with_name("deepspeed"))
            where = ["--num_accelerators", str(self._processes), "--master_port", str(_free_port())]
            return [launcher, *where, "--module", self._module, *self._arguments], ()
        # Who was lost a moment ago is not asked again, which would take the longest; at the next start it is.
        silent = dict.fromkeys(self._lost, "just lost")
        others = [host for host in self._hosts if host.name not in silent]
        silent |= unreachable(others, self._ssh_arguments, _PROBE_TIMEOUT_SECONDS)
        self._lost = frozenset()
        sizes = allowed_world_sizes(self._config)
        hosts = choose_hosts(self._hosts, silent.keys(), self._policy.suspects, sizes)
        if not hosts:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in silent.items()) or "none is missing"
            raise TrainerError(f"no world size of {sizes} can be made of the nodes that answer ({reasons})")
        names = [host.name for host in hosts]
        left_out = sorted({host.name for host in self._hosts} - set(names))
        self._events.write("start", hosts=names, processes=sum(host.slots for host in hosts), left_out=left_out)
        hostfile = self._scratch / "hostfile"
        write_hostfile(hostfile, hosts)
        return [str(_ROOT / "launch_scripts" / "multinode.sh"), str(hostfile), *self._arguments], hosts

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked += 1
        if self._job is None or self._job.poll() is not None:
            return
        if self._asked > 1:
            self._end_job()
        elif self._hosts:
            self._job.send_signal(signal.SIGUSR1)
        elif ranks := self._ranks():
            for rank in ranks:
                _send(rank, signal.SIGUSR1)
        else:
            self._end_job()  # nothing was started yet that could be saved

    def _ranks(self) -> list[psutil.Process]:
        assert self._job is not None
        children = psutil.Process(self._job.pid).children(recursive=True)
        return [child for child in children if any(word.startswith("--local_rank=") for word in _command_line(child))]

    def _end_job(self) -> None:
        """Now, without saving."""
        assert self._job is not None
        if self._hosts:
            self._job.send_signal(signal.SIGUSR2)
            return
        for process in [*psutil.Process(self._job.pid).children(recursive=True), psutil.Process(self._job.pid)]:
            _send(process, signal.SIGKILL)

    def _say(self, text: str) -> None:
        print(f"supervisor: {text}", file=sys.stderr, flush=True)


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
