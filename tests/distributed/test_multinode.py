"""launch_scripts/multinode.sh trains, stops and resumes on two nodes, and its preflight finds defects of a node.

The nodes are made of namespaces (``nodes``).
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from importlib.metadata import files, version
from pathlib import Path

import pytest

from tests.distributed import nodes
from tests.distributed.launched import finish, wait_for_step
from tests.distributed.processes import run_distributed
from tests.distributed.small_run import losses, read_events, read_ledger, run_settings, write_settings
from tests.distributed.train_in_process import train_run

pytestmark = pytest.mark.distributed
SCRIPT = nodes.ROOT / "launch_scripts" / "multinode.sh"
ENVIRONMENT = {"VENV": sys.prefix}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[nodes.Cluster]:
    nodes.require("pdsh")
    with nodes.cluster(tmp_path_factory.mktemp("nodes"), count=2) as made:
        yield made


def test_a_run_stopped_and_started_again_equals_one_on_one_machine(
    assets: Path, cluster: nodes.Cluster, tmp_path: Path
) -> None:
    run_distributed(train_run, 2, run_settings(assets, tmp_path / "one", steps=30))

    run_dir = tmp_path / "two nodes"
    config = write_settings(tmp_path / "two.yaml", run_settings(assets, tmp_path / "elsewhere", steps=30))
    # The argument holds a space, and passes two shells on its way to the ranks.
    command = (SCRIPT, cluster.hostfile, config, "--run_dir", run_dir)
    launched = cluster.start_on(cluster.head, *command, environment=ENVIRONMENT)
    wait_for_step(launched, run_dir, 2)
    cluster.send(launched, signal.SIGTERM)
    code, output = finish(launched, timeout_seconds=120)
    assert code == 75, output
    assert "2 of 2 nodes" in output and "GB/s" in output and "gloo" in output
    assert read_events(run_dir, "preempted")
    assert len(losses(run_dir)) < 30

    code, output = cluster.run_on(cluster.head, *command, environment={**ENVIRONMENT, "PREFLIGHT": "0"})
    assert code == 0, output
    assert read_events(run_dir, "resumed")
    assert losses(run_dir) == losses(tmp_path / "one"), "bit for bit"
    assert read_ledger(run_dir) == read_ledger(tmp_path / "one")
    assert (run_dir / "complete").exists()


def metadata_of(package: str) -> Path:
    """Return the file that holds the version of an installed package."""
    [path] = [path for path in files(package) or () if path.name == "METADATA" and path.parent.suffix == ".dist-info"]
    return Path(str(path.locate()))


def preflight(cluster: nodes.Cluster, *arguments: str | Path, hostfile: Path | None = None) -> tuple[int, str]:
    """Run ``trainer.preflight`` on the head; return its exit code and output."""
    command = (sys.executable, "-m", "trainer.preflight", "--hostfile", hostfile or cluster.hostfile)
    return cluster.run_on(cluster.head, *command, *arguments)


def verdicts(output: str) -> dict[str, str]:
    """Return the verdict of each node in the preflight's table."""
    rows = [line.split() for line in output.splitlines() if line.startswith("node")]
    return {row[0]: row[1] for row in rows if row[0] != "node"}


def test_preflight_names_the_nodes_that_cannot_train(cluster: nodes.Cluster, tmp_path: Path) -> None:
    """One host does not exist; another has other code, another DeepSpeed and a run folder that it cannot write."""
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
    for target, source in mounted.items():
        cluster.run_on(second, "mount", "--bind", source, target)
    cluster.run_on(second, "mount", "-o", "remount,ro,bind", tmp_path / "run")
    hostfile = tmp_path / "hostfile"
    hostfile.write_text(f"{first.name} slots=1\n{second.name} slots=1\nnode9 slots=1\n")
    try:
        code, output = preflight(cluster, "--run-dir", str(tmp_path / "run"), hostfile=hostfile)
    finally:
        for path in mounted:
            cluster.run_on(second, "umount", path)
    assert code == 1
    assert verdicts(output) == {"node0": "ok", "node1": "FAILED", "node9": "FAILED"}
    for expected in (
        "code",
        f"deepspeed is 0.1, {version('deepspeed')} on node0",
        "[Errno 30] Read-only",
        "ssh",
        "2 of 3 nodes",
        "node1, node9",
    ):
        assert expected in output


def test_preflight_finds_a_run_folder_that_is_not_shared(cluster: nodes.Cluster, tmp_path: Path) -> None:
    cluster.run_on(cluster.nodes[1], "mount", "-t", "tmpfs", "-o", "size=50g", "tmpfs", tmp_path)
    try:
        code, output = preflight(cluster, "--run-dir", str(tmp_path / "run"), "--min-free-gib", "1")
    finally:
        cluster.run_on(cluster.nodes[1], "umount", tmp_path)
    assert code == 1
    assert verdicts(output) == {"node0": "ok", "node1": "FAILED"}
    assert "run folder" in output


def test_preflight_finds_a_wrong_clock(cluster: nodes.Cluster) -> None:
    libraries = list(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    if not libraries:
        pytest.skip("libfaketime (Debian package faketime) is not installed")
    second = cluster.nodes[1]
    cluster.set_environment(second, LD_PRELOAD=str(libraries[0]), FAKETIME="-300s")
    try:
        code, output = preflight(cluster)
    finally:
        cluster.set_environment(second)
    assert code == 1
    assert "300 s behind" in output, output
    assert verdicts(output) == {"node0": "ok", "node1": "FAILED"}


def test_a_wrong_hostfile_is_refused_before_anything_starts(cluster: nodes.Cluster, tmp_path: Path) -> None:
    wrong = tmp_path / "hostfile"
    wrong.write_text("node0 slots=1\nnode0 slots=1\nnode1 slots=2\n")
    code, output = cluster.run_on(cluster.head, SCRIPT, wrong, "run.yaml", environment=ENVIRONMENT)
    assert code == 2
    assert f"{wrong}" in output and "line 2" in output and "node0" in output and "slots" in output


def test_a_value_that_a_shell_would_expand_is_refused(cluster: nodes.Cluster) -> None:
    environment = {**ENVIRONMENT, "NCCL_DEBUG_FILE": "$(touch here)"}
    code, output = cluster.run_on(cluster.head, SCRIPT, cluster.hostfile, "run.yaml", environment=environment)
    assert code == 2
    assert "NCCL_DEBUG_FILE" in output
