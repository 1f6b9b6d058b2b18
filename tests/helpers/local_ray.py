"""A Ray cluster on this machine; nodes with fake GPUs can be added and killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

NODES = """\
import sys
from ray.cluster_utils import Cluster
sizes = dict(num_cpus=2, num_gpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
cluster = Cluster(initialize_head=True, head_node_args=sizes)
added = []
print(cluster.address, flush=True)
for line in sys.stdin:
    if line == "add\\n":
        added.append(cluster.add_node(**sizes, resources={"added": 1}))
    else:
        cluster.remove_node(added.pop(0), allow_graceful=False)  # as in a power failure
    print("done", flush=True)
cluster.shutdown()
"""


@dataclass(frozen=True)
class LocalRay:
    """A cluster in its own process.

    Attributes:
        address: Its address.
        process: The process, which reads commands.
    """

    address: str
    process: subprocess.Popen[str]

    def add_node(self) -> None:
        """Add a node with a fake GPU, and one of the resource `added`, which the first node lacks."""
        self._do("add")

    def lose_node(self) -> None:
        """Kill the oldest added node."""
        self._do("lose")

    def _do(self, what: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(what, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline() == "done\n"


@contextmanager
def local_ray(environment: dict[str, str]) -> Iterator[LocalRay]:
    """Start a cluster of one node with a fake GPU.

    Args:
        environment: The environment of the nodes and their tasks.
    """
    cluster = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", NODES],
        env={**environment, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert cluster.stdin is not None
    assert cluster.stdout is not None
    try:
        address = cluster.stdout.readline().strip()
        assert address, "Ray does not start"
        yield LocalRay(address, cluster)
    finally:
        cluster.stdin.close()
        try:
            cluster.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(cluster.pid, 9)
            cluster.wait()
        cluster.stdout.close()
