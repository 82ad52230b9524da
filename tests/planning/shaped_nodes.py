"""Compare the plan with steps that nodes with slow links take: ``python -m tests.planning.shaped_nodes CONFIG``.

The nodes are made of namespaces (``tests.distributed.nodes``), and ``tc`` limits what each may send. For each
configuration it measures the rates and a step, and prints predicted values beside measured ones. Each process has one
thread. It needs root. Nothing else should run on the machine, which has as many cores as there are processes, or more.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.distributed import nodes
from trainer import plan

_BURST = "256kb"  # what may pass at once; the kernel needs a few hundred microseconds of the rate
_SECONDS = 1800


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the comparison of each configuration, and return the exit code."""
    options = _parse(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    rates = options.output / "rates.json"
    with nodes.cluster((options.output / "nodes").absolute(), options.nodes, options.processes) as cluster:
        limit_links(cluster, options.rate)
        run_on_nodes(cluster, options.processes, "rates", "--threads", "1", "--json", rates.absolute())
        for config in options.configs:
            result = options.output / f"step-{config.stem}.json"
            run_on_nodes(
                cluster, options.processes, "step", config.absolute(), "--steps", "4", "--json", result.absolute()
            )
    processes = ["--nodes", str(options.nodes), "--devices-per-node", str(options.processes)]
    for config in options.configs:
        result = options.output / f"step-{config.stem}.json"
        code = plan.main([str(config), *processes, "--rates", str(rates), "--measured", str(result)])
        if code == 2:
            return code
    return 0


def limit_links(cluster: nodes.Cluster, rate: str) -> None:
    """Limit what each node may send.

    Args:
        cluster: The nodes.
        rate: Limit in the words of ``tc``, such as "400mbit".
    """
    shape = f"qdisc add dev {nodes.INTERFACE} root tbf rate {rate} burst {_BURST} latency 1s"
    for node in cluster.nodes:
        enter = ["nsenter", "--target", str(node.pid), "--net"]
        subprocess.run([*enter, "tc", *shape.split()], check=True)


def run_on_nodes(cluster: nodes.Cluster, processes: int, *benchmark: str | Path) -> str:
    """Run ``trainer.benchmark`` with so many processes on each node; return what the first process printed.

    Raises:
        RuntimeError: A process failed; the message is its output.
    """
    size = len(cluster.nodes) * processes
    common = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": cluster.nodes[0].address,
        "MASTER_PORT": "29500",  # always free in a new network
        "GLOO_SOCKET_IFNAME": nodes.INTERFACE,
    }
    started = [
        cluster.start_on(
            node,
            *(sys.executable, "-m", "trainer.benchmark", *benchmark),
            environment={**common, "RANK": str(number * processes + local), "LOCAL_RANK": str(local)},
        )
        for number, node in enumerate(cluster.nodes)
        for local in range(processes)
    ]
    outputs = [process.communicate(timeout=_SECONDS)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(output)
    return outputs[0]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.planning.shaped_nodes", description=__doc__)
    parser.add_argument("configs", type=Path, nargs="+", metavar="CONFIG", help="configuration of a run")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    parser.add_argument("--nodes", type=int, default=2, help="number of nodes (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=1, help="processes of each node (default: %(default)s)")
    parser.add_argument("--rate", default="400mbit", help="what each node may send, for tc (default: %(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
