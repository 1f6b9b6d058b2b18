"""A Ray cluster on this machine, to which nodes with fake GPUs are added one by one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

NODE = """\
import sys
from ray.cluster_utils import Cluster
sizes = dict(num_cpus=2, num_gpus=1, object_store_memory=80 * 2**20, include_dashboard=False)
cluster = Cluster(initialize_head=True, head_node_args=sizes)
print(cluster.address, flush=True)
for _ in sys.stdin:  # a line: one node more
    cluster.add_node(**sizes)
    print("added", flush=True)
cluster.shutdown()
"""


@contextmanager
def local_ray(environment: dict[str, str]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Start a cluster of one node with a fake GPU.

    Args:
        environment: Of the nodes, and so of what runs on them.

    Yields:
        Its address, and a function that adds such a node.
    """
    cluster = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", NODE],
        env={**environment, "RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    assert cluster.stdin is not None
    assert cluster.stdout is not None

    def add_node() -> None:
        print("one more", file=cluster.stdin, flush=True)
        assert cluster.stdout is not None
        assert cluster.stdout.readline() == "added\n"

    try:
        address = cluster.stdout.readline().strip()
        assert address, "Ray does not start"
        yield address, add_node
    finally:
        cluster.stdin.close()
        try:
            cluster.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(cluster.pid, 9)
            cluster.wait()
        cluster.stdout.close()
