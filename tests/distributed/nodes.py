"""Make the nodes of a cluster on one machine, from namespaces.

Each node has its own network, PID, UTS, IPC and mount namespace. So it has its own address on a common network, sshd,
hostname, /dev/shm and /run. Root can log in from every node to every other without a password. The nodes reach only
each other, never the machine's own network.

- The file system is the machine's, so all nodes share it, as in a cluster. Only ~/.bashrc is replaced by an empty file:
  it may wait for a lock that a lost node held (pyenv's waits for a minute).
- Names resolve as Debian sets them up: a node resolves its own name to 127.0.1.1, which no other node can reach.
- Several clusters can run at once with the same names and addresses, because each has its own network namespaces.
- All processes die with pytest, even after kill -9, and the namespaces vanish with them.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
INTERFACE = "fabric0"  # not eth0, which some tools assume
_PROGRAMS = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux", "sshd": "openssh-server"}
_SSHD = "/usr/sbin/sshd"
# Only these variables are inherited, so that tests do not depend on who runs pytest.
_KEPT = ("HOME", "LANG", "HF_HUB_OFFLINE", "WANDB_MODE")

_NAMESPACES = (
    "setpriv --pdeathsig KILL unshare --net --uts --ipc --mount --pid --fork --kill-child --mount-proc".split()
)
_START = """
set -e
mount -t tmpfs -o size=2g,mode=1777 tmpfs /dev/shm
mount -t tmpfs tmpfs /run && mkdir -m 755 /run/sshd
hostname {name}
mount --bind {folder}/hosts.{name} /etc/hosts
mount --bind {folder}/ssh_config /etc/ssh/ssh_config
if [ -e ~/.bashrc ]; then mount --bind /dev/null ~/.bashrc; fi
ip link set lo up
read -r connected
exec {sshd} -D -e -f {folder}/sshd_config.{name}
"""
_SSH_CONFIG = """Host *
  IdentityFile {folder}/key
  IdentitiesOnly yes
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
_SSHD_CONFIG = """HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PasswordAuthentication no
UsePAM no
PermitRootLogin prohibit-password
PidFile none
MaxStartups 100
"""


def missing() -> str | None:
    """Return why this machine cannot make nodes, or None if it can."""
    if os.geteuid() != 0:
        return "namespace nodes need root"
    lacking = sorted({package for program, package in _PROGRAMS.items() if shutil.which(program, path=_path()) is None})
    if lacking:
        return f"namespace nodes need {', '.join(lacking)}"
    trial = subprocess.run(
        ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--uts", "--ipc", "ip", "link", "add", "type", "veth"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"this machine does not allow namespaces: {trial.stderr.strip()}" if trial.returncode else None


def require(*programs: str) -> None:
    """Skip the test if this machine cannot make nodes or lacks a program that the test runs on them."""
    reason = missing()
    absent = [program for program in programs if shutil.which(program, path=_path()) is None]
    if reason or absent:
        pytest.skip(reason or f"not installed: {', '.join(absent)}")


@dataclass
class Node:
    """One node.

    Attributes:
        name: Hostname.
        address: On the common network.
        process: ``unshare``, which ends when the node does; None while the node is down.
        pid: Process 1 of the node, as the machine numbers it.
        link: The node's port on the head's bridge.
    """

    name: str
    address: str
    process: subprocess.Popen[bytes] | None = None
    pid: int = 0
    link: str = ""


class Cluster:
    """Nodes ``node0``, ``node1``, ... for training, and ``head``, where launchers start.

    Attributes:
        folder: Holds the keys, the configuration files and the hostfile.
        head: Trains nothing.
        nodes: Train; all of them are in the hostfile.
        hostfile: In DeepSpeed's format.
    """

    def __init__(self, folder: Path, count: int, slots: int) -> None:
        self.folder = folder
        self.head = Node("head", "10.77.0.1")
        self.nodes = [Node(f"node{number}", f"10.77.0.{number + 2}") for number in range(count)]
        self.hostfile = folder / "hostfile"
        self.hostfile.write_text("".join(f"{node.name} slots={slots}\n" for node in self.nodes))
        self._links = 0
        self._running: list[subprocess.Popen[str]] = []
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key"], check=True)
        (folder / "ssh_config").write_text(_SSH_CONFIG.format(folder=folder))
        everyone = [self.head, *self.nodes]
        for node in everyone:
            self._sshd_config(node).write_text(_SSHD_CONFIG.format(folder=folder))
            lines = ["127.0.0.1 localhost", f"127.0.1.1 {node.name}"]
            lines += [f"{other.address} {other.name}" for other in everyone if other is not node]
            (folder / f"hosts.{node.name}").write_text("\n".join(lines) + "\n")

    def start(self) -> None:
        """Start all nodes and the network between them, a bridge on the head."""
        self._boot(self.head)
        self._on_network(self.head, f"link add {INTERFACE} type bridge")
        self._join(self.head)
        for node in self.nodes:
            self.restore(node)

    def stop(self) -> None:
        """End every process of every node; the networks vanish with the last process."""
        for node in [*self.nodes, self.head]:
            self._kill(node)
        for running in self._running:
            running.wait()
            for stream in (running.stdout, running.stderr):
                if stream is not None:
                    stream.close()

    def lose(self, node: Node) -> None:
        """Lose a node as in a power failure: it sends no more packets, not even one that closes a connection."""
        self._on_network(self.head, f"link set {node.link} down")
        self._kill(node)

    def restore(self, node: Node) -> None:
        """Start a node, for the first time or after it was lost, with the same name and address."""
        self._boot(node)
        self._links += 1
        node.link = f"port{self._links}"
        self._on_network(self.head, f"link add {node.link} type veth peer name {INTERFACE} netns {node.pid}")
        self._on_network(self.head, f"link set {node.link} master {INTERFACE} up")
        self._join(node)
        ssh = ("ssh", "-o", "ConnectTimeout=1", node.address, "true")
        _until(lambda: self.run_on(self.head, *ssh)[0] == 0, f"ssh to {node.name}")

    def set_environment(self, node: Node, **variables: str) -> None:
        """Set variables for every new login on a node; without arguments, remove those that were set."""
        lines = ["SetEnv " + " ".join(f"{name}={value}" for name, value in variables.items())] if variables else []
        self._sshd_config(node).write_text("\n".join([_SSHD_CONFIG.format(folder=self.folder), *lines]))
        os.kill(node.pid, signal.SIGHUP)  # sshd restarts itself
        expected = {f"{name}={value}" for name, value in variables.items()}

        def is_set() -> bool:
            code, output = self.run_on(self.head, "ssh", "-o", "ConnectTimeout=1", node.address, "env")
            return code == 0 and expected <= set(output.splitlines())

        _until(is_set, f"sshd on {node.name}")

    def start_on(
        self, node: Node, *command: str | Path, environment: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> subprocess.Popen[str]:
        """Start a command on a node as a login there would, with the tests' Python first on PATH.

        Its errors go to its output. The returned process only waits for the command; ``send`` signals the command.
        """
        kept = {name: os.environ[name] for name in _KEPT if name in os.environ}
        given = {**kept, "PATH": _path(), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **(environment or {})}
        enter = ["nsenter", "--target", str(node.pid), "--all", f"--wdns={cwd}"]
        process = subprocess.Popen(
            [*enter, *map(str, command)],
            env=given,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._running.append(process)
        return process

    def run_on(
        self, node: Node, *command: str | Path, environment: Mapping[str, str] | None = None, timeout: float = 240
    ) -> tuple[int, str]:
        """Run a command on a node; return its exit code and output."""
        process = self.start_on(node, *command, environment=environment)
        output, _ = process.communicate(timeout=timeout)
        return process.returncode, output

    def send(self, process: subprocess.Popen[str], number: signal.Signals) -> None:
        """Send a signal to a command that ``start_on`` started."""
        (command,) = psutil.Process(process.pid).children()
        command.send_signal(number)

    def _sshd_config(self, node: Node) -> Path:
        return self.folder / f"sshd_config.{node.name}"

    def _boot(self, node: Node) -> None:
        """Make a node's namespaces and its process 1, which becomes sshd once the network is there."""
        script = _START.format(name=node.name, folder=self.folder, sshd=_SSHD)
        with (self.folder / f"{node.name}.log").open("ab") as log:
            node.process = subprocess.Popen(
                [*_NAMESPACES, "bash", "-c", script],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        outer = psutil.Process(node.process.pid)
        _until(lambda: bool(outer.children()), f"{node.name} to start")
        node.pid = outer.children()[0].pid

    def _join(self, node: Node) -> None:
        # The hardware address stays the same over a restart, because the other nodes remember it.
        hardware = f"02:00:00:00:00:{int(node.address.rpartition('.')[2]):02x}"
        self._on_network(node, f"link set {INTERFACE} address {hardware}")
        self._on_network(node, f"address add {node.address}/24 dev {INTERFACE}")
        self._on_network(node, f"link set {INTERFACE} up")
        assert node.process is not None and node.process.stdin is not None
        node.process.stdin.write(b"connected\n")
        node.process.stdin.close()

    def _kill(self, node: Node) -> None:
        if node.process is None:
            return
        if node.process.poll() is None and node.pid:
            os.kill(node.pid, signal.SIGKILL)  # the kernel ends every process of its namespace
        node.process.wait()
        node.process = None

    def _on_network(self, node: Node, arguments: str) -> None:
        subprocess.run(["nsenter", "--target", str(node.pid), "--net", "ip", *arguments.split()], check=True)


@contextmanager
def cluster(folder: Path, count: int, slots: int = 1) -> Iterator[Cluster]:
    """Yield a running cluster of ``count`` nodes with ``slots`` processes each, and end it in every case."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    made = Cluster(folder, count, slots)
    with ExitStack() as stack:
        stack.callback(made.stop)
        made.start()
        yield made


def _path() -> str:
    return f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def _until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)
