"""A Slurm cluster on this machine, from Debian's packages (`apt-get install slurm-wlm munge`), with fake GPUs.

    python tests/helpers/single_node_slurm.py bash      # a shell for sbatch, squeue, ...

Needs root, as munged and slurmd cannot run jobs otherwise.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "sinfo")
CONF = """\
ClusterName=single
SlurmctldHost={host}
SlurmctldPort={ctld}
SlurmdPort={slurmd}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 Gres=gpu:{gpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    """What is missing to start a cluster; None if nothing is."""
    if os.name != "posix" or os.geteuid() != 0:
        return "only root can start a Slurm cluster"
    missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)" if missing else None


def _path() -> str:
    return f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"


@contextmanager
def single_node_slurm(cpus: int = 4, gpus: int = 2) -> Iterator[dict[str, str]]:
    """Start a cluster of one node.

    Args:
        cpus: Number of cores that Slurm assumes.
        gpus: Number of fake GPUs; jobs get their indices in CUDA_VISIBLE_DEVICES.

    Yields:
        The environment for Slurm's commands.
    """
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # a socket's path must be short
    for name in ("state", "spool"):
        (folder / name).mkdir()
    devices = [folder / f"gpu{number}" for number in range(gpus)]
    for device in devices:
        os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))  # Slurm needs a device: another /dev/null
    host = socket.gethostname().split(".")[0]
    ctld, slurmd = _free_ports(2)
    (folder / "slurm.conf").write_text(
        CONF.format(host=host, ctld=ctld, slurmd=slurmd, folder=folder, cpus=cpus, gpus=gpus)
    )
    (folder / "gres.conf").write_text("".join(f"Name=gpu File={device}\n" for device in devices))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    folder.chmod(0o755)
    environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(folder / "slurm.conf")}
    munged = [
        *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"),
        *(f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munged.seed"),
    ]
    nothing = subprocess.DEVNULL
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        for command in (munged, ["slurmctld", "-D", "-c"], ["slurmd", "-D", "-c", "-N", host]):
            daemons.append(subprocess.Popen(command, env=environment, stdin=nothing, stdout=nothing, stderr=nothing))
            if command is munged:
                _until((folder / "munge.socket").exists, folder)
        _until(lambda: _says(environment, "sinfo", "--noheader", "--format=%T").startswith("idle"), folder)
        yield environment
    finally:
        _says(environment, "scancel", "--user=root", "--signal=KILL", "--full")
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _says(environment: dict[str, str], *command: str) -> str:
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout.strip()


def _until(condition: object, folder: Path, seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > deadline:
            logs = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in folder.glob("*.log"))
            raise TimeoutError(f"Slurm does not start\n{logs}")
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(reason)
    with single_node_slurm() as inside:
        sys.exit(subprocess.run(sys.argv[1:] or ["bash"], env=inside, check=False).returncode)
