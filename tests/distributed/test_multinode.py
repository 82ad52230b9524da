"""launch_scripts/multinode.sh on nodes made of namespaces: it trains as one machine does, stops when asked, goes on,
and the preflight before it finds what is wrong with a node."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from importlib.metadata import files, version
from pathlib import Path

import pytest

from tests.distributed import nodes
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses, read_ledger, run_settings, train_here, write_settings

pytestmark = pytest.mark.distributed
SCRIPT = nodes.ROOT / "launch_scripts" / "multinode.sh"
ENVIRONMENT = {"VENV": sys.prefix}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nodes.Cluster]:
    nodes.require("pdsh")
    with nodes.cluster(tmp_path_factory.mktemp("nodes"), count=2) as made:
        yield made


def test_stopped_and_started_again_it_trains_as_one_machine_does(
    assets: Path, cluster: nodes.Cluster, tmp_path: Path
) -> None:
    run_distributed(
        train_here, 2, write_settings(tmp_path / "one.yaml", run_settings(assets, tmp_path / "one", steps=30))
    )

    run_dir = tmp_path / "two nodes"
    config = write_settings(tmp_path / "two.yaml", run_settings(assets, tmp_path / "elsewhere", steps=30))
    # A space in an argument, as it comes to the ranks through two shells.
    command = (SCRIPT, cluster.hostfile, config, "--run_dir", run_dir)
    launched = cluster.start_on(cluster.head, *command, environment=ENVIRONMENT)
    deadline = time.monotonic() + 180
    ledgers, metrics = run_dir / "ledger", run_dir / "metrics.jsonl"
    # Whichever rank is first: the one writes its ledger, the other the metrics.
    while not ((ledgers / "rank-1.jsonl").exists() and metrics.exists() and metrics.read_text().count("\n") >= 2):
        assert launched.poll() is None and time.monotonic() < deadline, launched.communicate()[0]
        time.sleep(0.05)
    cluster.send(launched, signal.SIGTERM)
    output, _ = launched.communicate(timeout=120)
    assert launched.returncode == 75, output
    assert "preflight: 2 of 2 nodes are ready" in output and "GB/s a node (gloo)" in output
    assert "asked to stop: saved update" in output
    assert len(losses(run_dir)) < 30

    code, output = cluster.run_on(cluster.head, *command, environment={**ENVIRONMENT, "PREFLIGHT": "0"})
    assert code == 0, output
    assert "resumed" in output
    assert losses(run_dir) == losses(tmp_path / "one"), "bit for bit"
    assert read_ledger(run_dir) == read_ledger(tmp_path / "one")
    assert (run_dir / "complete").exists()


def metadata_of(package: str) -> Path:
    """The file that says which version of a package is installed."""
    [path] = [path for path in files(package) or () if path.name == "METADATA" and path.parent.suffix == ".dist-info"]
    return Path(str(path.locate()))


def preflight(cluster: nodes.Cluster, *arguments: str | Path, hostfile: Path | None = None) -> tuple[int, str]:
    command = (sys.executable, "-m", "trainer.preflight", "--hostfile", hostfile or cluster.hostfile)
    return cluster.run_on(cluster.head, *command, *arguments)


def test_preflight_names_the_nodes_that_cannot_train(cluster: nodes.Cluster, tmp_path: Path) -> None:
    """In one go: a host that is not there; other code, another version and a run folder that it cannot write on one."""
    first, second = cluster.nodes
    (tmp_path / "run").mkdir()
    (tmp_path / "errors.py").write_text("# older\n" + (nodes.ROOT / "trainer/errors.py").read_text())
    metadata = metadata_of("deepspeed")
    (tmp_path / "METADATA").write_text(
        metadata.read_text().replace(f"\nVersion: {version('deepspeed')}", "\nVersion: 0.1")
    )
    mounted = {
        nodes.ROOT / "trainer/errors.py": tmp_path / "errors.py",
        metadata: tmp_path / "METADATA",
        tmp_path / "run": tmp_path / "run",
    }
    for there, here in mounted.items():
        cluster.run_on(second, "mount", "--bind", here, there)
    cluster.run_on(second, "mount", "-o", "remount,ro,bind", tmp_path / "run")
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(f"{first.name} slots=1\n{second.name} slots=1\nnode9 slots=1\n")
    try:
        code, output = preflight(cluster, "--run-dir", str(tmp_path / "run"), hostfile=hostfile)
    finally:
        for path in mounted:
            cluster.run_on(second, "umount", path)
    assert code == 1
    verdicts = {line.split()[0]: line.split()[1] for line in output.splitlines() if line.startswith("node")}
    assert verdicts == {"node": "verdict", "node0": "ok", "node1": "FAILED", "node9": "FAILED"}
    for expected in (
        "its code differs from that of node0",
        f"deepspeed is 0.1, {version('deepspeed')} on node0: run launch_scripts/setup.sh",
        "the run folder cannot be written: [Errno 30] Read-only",
        "ssh does not reach it",
        "2 of 3 nodes cannot train: node1, node9",
    ):
        assert expected in output


def test_preflight_finds_a_run_folder_that_is_not_shared(cluster: nodes.Cluster, tmp_path: Path) -> None:
    cluster.run_on(cluster.nodes[1], "mount", "-t", "tmpfs", "-o", "size=50g", "tmpfs", tmp_path)
    try:
        code, output = preflight(cluster, "--run-dir", str(tmp_path / "run"), "--min-free-gib", "1")
    finally:
        cluster.run_on(cluster.nodes[1], "umount", tmp_path)
    assert code == 1
    assert "its run folder is not that of node0" in output and "1 of 2 nodes cannot train: node1" in output


def test_preflight_finds_a_clock_that_is_wrong(cluster: nodes.Cluster) -> None:
    libraries = list(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not libraries:
        pytest.skip("not installed: libfaketime (Debian's faketime), which gives a node another clock")
    second = cluster.nodes[1]
    cluster.set_environment(second, LD_PRELOAD=str(libraries[0]), FAKETIME="-300s")
    try:
        code, output = preflight(cluster)
    finally:
        cluster.set_environment(second)
    assert code == 1
    assert "its clock is 300 s behind: start chrony or ntpd on it" in output, output
    assert "1 of 2 nodes cannot train: node1" in output


def test_a_wrong_hostfile_is_told_before_anything_starts(cluster: nodes.Cluster, tmp_path: Path) -> None:
    wrong = tmp_path / "hostfile"
    wrong.write_text("node0 slots=1\nnode0 slots=1\nnode1 slots=2\n")
    code, output = cluster.run_on(cluster.head, SCRIPT, wrong, "run.yaml", environment=ENVIRONMENT)
    assert code == 2
    assert "line 2: node0 is listed twice" in output and "unequal slots" in output


def test_what_a_shell_would_change_is_not_set_on_the_nodes(cluster: nodes.Cluster) -> None:
    environment = {**ENVIRONMENT, "NCCL_DEBUG_FILE": "$(touch here)"}
    code, output = cluster.run_on(cluster.head, SCRIPT, cluster.hostfile, "run.yaml", environment=environment)
    assert code == 2
    assert "NCCL_DEBUG_FILE cannot be set on the nodes" in output
