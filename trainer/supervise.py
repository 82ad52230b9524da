"""Run a job until it is complete, and restart it when it fails or loses a node.

``python -m trainer.supervise [--processes N | --hostfile FILE] [--restarts N --within MINUTES] -- CONFIG [overrides]``

After a failure, the job restarts from its newest good checkpoint. With a hostfile, it runs on the nodes that answer, in
the largest number of processes that the batch sizes allow. A node that returns is used at the next start. A node that
alone fails twice is left out. The same error twice at the same step is a bug and ends the job. SIGTERM, SIGUSR1,
SIGHUP or Ctrl-C asks the job to save and end; a second Ctrl-C ends it at once.

Exit codes: 0 the run is complete; 75 it was asked to end and can be started again; 2 the configuration or the hostfile
is wrong; 1 it gave up and printed the reason.
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

from trainer.config.batch_sizes import possible_world_sizes
from trainer.config.loader import load_config, schema_of
from trainer.config.run_config import RunConfig
from trainer.config.yaml_file import read_yaml
from trainer.entry import EXIT_CONFIGURATION, EXIT_FAILED, EXIT_OK, is_complete
from trainer.errors import TrainerError
from trainer.resilience.events import EventLog
from trainer.resilience.hostfile import Host, read_hostfile, write_hostfile
from trainer.resilience.restarts import RestartPolicy, choose_hosts, read_events, read_failure, steps_done
from trainer.resilience.ssh import unreachable_hosts
from trainer.runtime.console import lasting_console
from trainer.runtime.run_folder import RunFolder
from trainer.runtime.stop_signals import EXIT_STOPPED, CtrlC, handling

_WAIT_FOR_NODES_SECONDS = 30.0
_ROOT = Path(__file__).parents[1]
_IMPATIENT_SSH = "-o ConnectTimeout=3 -o ServerAliveInterval=3 -o ServerAliveCountMax=2".split()
_POLL_SECONDS, _PROBE_SECONDS, _PROBE_TIMEOUT_SECONDS = 0.5, 5.0, 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Supervise the run that a command line names, and return the exit code."""
    options = _parser().parse_args(argv)
    path, *overrides = options.run
    try:
        config: RunConfig = load_config(Path(path), overrides, schema_of(read_yaml(Path(path)).values))
        hosts = () if options.hostfile is None else read_hostfile(options.hostfile)
    except TrainerError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    config.run_dir.mkdir(parents=True, exist_ok=True)
    policy = RestartPolicy(options.restarts, 60 * options.within)
    with lasting_console(), tempfile.TemporaryDirectory() as scratch:
        supervisor = Supervisor(config, policy, hosts, options.processes, options.module, options.run, Path(scratch))
        with handling(supervisor.on_signal):
            return supervisor.run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.supervise",
        usage="%(prog)s [options] -- CONFIG.yaml [--section.key VALUE ...]",
        description=__doc__.replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    nodes = parser.add_mutually_exclusive_group()
    nodes.add_argument(
        "--processes", type=int, default=1, metavar="N", help="processes on this machine (default: %(default)s)"
    )
    nodes.add_argument(
        "--hostfile", type=Path, metavar="FILE", help="nodes to run on, through launch_scripts/multinode.sh"
    )
    parser.add_argument(
        "--restarts", type=int, default=10, metavar="N", help="most restarts within --within (default: %(default)s)"
    )
    parser.add_argument(
        "--within",
        type=float,
        default=60,
        metavar="MINUTES",
        help="minutes in which --restarts failures end the job (default: %(default)s)",
    )
    parser.add_argument(
        "--module", default="trainer.train", metavar="NAME", help="trainer to start (default: %(default)s)"
    )
    parser.add_argument("run", nargs="+", metavar="CONFIG.yaml", help="arguments of the trainer, after --")
    return parser


class Supervisor:
    """Start the jobs of one run, one after another.

    Args:
        config: Settings of the run.
        policy: When to stop restarting.
        hosts: Hosts of the hostfile; none runs ``processes`` on this machine.
        processes: Processes on this machine.
        module: Trainer to start.
        arguments: CONFIG and overrides for the trainer.
        scratch: Folder for the hostfile of the nodes in use.
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
        self._folder = RunFolder(config.run_dir)
        self._events = EventLog(self._folder)
        self._requests: list[int] = []  # signals that asked to stop
        self._ctrl_c = CtrlC()
        self._ends = False  # whether the job is to end without saving
        self._lost: frozenset[str] = frozenset()  # nodes that the current job, or the last one, lost
        self._trained: set[str] = set()  # nodes on which the last job trained
        self._job: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Start jobs until the run is complete or there is a reason to stop; return the exit code."""
        while not is_complete(self._config):
            if self._requests:
                return EXIT_STOPPED
            before = len(read_events(self._folder))
            code = self._attempt()
            if is_complete(self._config):
                break
            preempted = any(event["event"] == "preempted" for event in read_events(self._folder)[before:])
            if self._requests:
                return EXIT_STOPPED
            if code == EXIT_CONFIGURATION:
                return EXIT_CONFIGURATION
            if preempted:
                self._say("asked to end and saved; starting again at once")
                continue
            failure = read_failure(self._folder, before)
            reason = self._policy.reason_to_stop(failure, time.monotonic())
            if reason is not None:
                self._events.write("gave_up", failure.step, reason=reason)
                self._say(f"gave up: {reason}")
                return EXIT_FAILED
            self._events.write("restart", failure.step, exit_code=code, errors=sorted(failure.errors))
            self._say(f"the job ended with code {code} after step {failure.step}; starting again")
        self._say(f"{self._config.run_dir} is complete")
        return EXIT_OK

    def _attempt(self) -> int:
        """Run one job from start to end and return its launcher's exit code."""
        try:
            command, hosts = self._command()
        except TrainerError as error:
            self._say(str(error))
            deadline = time.monotonic() + _WAIT_FOR_NODES_SECONDS
            while time.monotonic() < deadline and not self._requests:
                time.sleep(_POLL_SECONDS)
            return error.exit_code
        environment = {**os.environ, "TRAINER": self._module, "MASTER_PORT": str(_free_port())}
        # ssh takes the first of repeated options; multinode.sh sets longer waits for a lost node.
        environment["SSH_ARGS"] = shlex.join([*self._ssh_arguments, *_IMPATIENT_SSH])
        names = {host.name for host in hosts}
        if hosts and names <= self._trained:
            environment["PREFLIGHT"] = "0"  # these nodes trained together a moment ago
        # In a new session, the job gets no Ctrl-C of the terminal; the supervisor asks the ranks to save instead.
        self._job = subprocess.Popen(command, cwd=None if not hosts else _ROOT, env=environment, start_new_session=True)
        before = steps_done(self._folder)
        self._watch(hosts)
        self._trained = names if steps_done(self._folder) > before else set()
        return self._job.returncode

    def _watch(self, hosts: Sequence[Host]) -> None:
        """Wait for the end of the job, and end it if one of its nodes is lost."""
        assert self._job is not None
        begun, silent_before = time.monotonic(), frozenset[str]()
        passed_on = 0
        while self._job.poll() is None:
            if self._ends:
                self._end_job()
            elif passed_on < len(self._requests):
                passed_on = len(self._requests)
                self._ask_to_end()
            time.sleep(_POLL_SECONDS)
            if not hosts or self._lost or time.monotonic() - begun < _PROBE_SECONDS:
                continue
            # The interval counts from the start of a probe, so a probe that waited for an answer is repeated at once.
            begun = time.monotonic()
            silent = frozenset(unreachable_hosts(hosts, self._ssh_arguments, _PROBE_TIMEOUT_SECONDS))
            self._lost = silent & silent_before  # two probes in a row: one lost packet must not end the job
            silent_before = silent
            if self._lost:
                self._events.write("node_lost", hosts=sorted(self._lost))
                self._say(f"lost {', '.join(sorted(self._lost))}: ending the job on the other nodes")
                self._end_job()

    def _command(self) -> tuple[list[str], tuple[Host, ...]]:
        """Return the command to start and its hosts.

        Raises:
            TrainerError: The nodes that answer allow no number of processes.
        """
        if not self._hosts:
            launcher = str(Path(sys.executable).with_name("deepspeed"))
            options = ["--num_accelerators", str(self._processes), "--master_port", str(_free_port())]
            return [launcher, *options, "--module", self._module, *self._arguments], ()
        # Do not probe nodes lost a moment ago: they would take longest to answer. The next start probes them.
        silent = dict.fromkeys(self._lost, "just lost")
        others = [host for host in self._hosts if host.name not in silent]
        silent |= unreachable_hosts(others, self._ssh_arguments, _PROBE_TIMEOUT_SECONDS)
        self._lost = frozenset()
        sizes = possible_world_sizes(self._config)
        hosts = choose_hosts(self._hosts, silent.keys(), self._policy.suspects, sizes)
        if not hosts:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in silent.items()) or "none"
            raise TrainerError(
                f"the nodes that answer fit none of the possible numbers of processes {sizes} (missing: {reasons})"
            )
        names = [host.name for host in hosts]
        left_out = sorted({host.name for host in self._hosts} - set(names))
        self._events.write("start", hosts=names, processes=sum(host.slots for host in hosts), left_out=left_out)
        hostfile = self._scratch / "hostfile"
        write_hostfile(hostfile, hosts)
        return [str(_ROOT / "launch_scripts" / "multinode.sh"), str(hostfile), *self._arguments], hosts

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Note a signal that asks to stop; ``run`` passes it on to the job."""
        self._requests.append(number)
        self._ends |= self._ctrl_c.is_second(number)

    def _ask_to_end(self) -> None:
        assert self._job is not None
        if self._hosts:
            self._job.send_signal(signal.SIGUSR1)
        elif ranks := self._ranks():
            for rank in ranks:
                _send(rank, signal.SIGUSR1)
        else:
            self._end_job()  # no rank has started, so there is nothing to save

    def _ranks(self) -> list[psutil.Process]:
        assert self._job is not None
        children = psutil.Process(self._job.pid).children(recursive=True)
        return [child for child in children if any(word.startswith("--local_rank=") for word in _command_line(child))]

    def _end_job(self) -> None:
        """End the job at once, without saving."""
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
