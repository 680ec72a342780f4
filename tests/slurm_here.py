"""A real Slurm of one node on this machine, from Debian's packages: slurmctld, slurmd, slurm-client, munge."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "sinfo")
START_LIMIT_S = 60
CONFIGURATION = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
SchedulerParameters=bf_interval=1,sched_min_interval=1000000
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} RealMemory={memory} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    return [program for program in PROGRAMS if shutil.which(program) is None]


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """While the block runs; gives what commands need in their environment."""
    folder = folder.resolve()
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    configuration, host = folder / "slurm.conf", socket.gethostname().split(".")[0]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20 - 512
    values = {"host": host, "folder": folder, "cores": os.cpu_count(), "memory": memory, "ports": _ports(2)}
    configuration.write_text(CONFIGURATION.format(**values))
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {"SLURM_CONF": str(configuration)}
    everything = {**os.environ, **environment}
    munge = ["munged", "-F", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"]
    munge += [f"--{kind}-file={folder}/munged.{kind}" for kind in ("log", "pid", "seed")]
    processes = [subprocess.Popen(munge, env=everything, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)]
    try:
        for command in (["slurmctld", "-D", "-f", str(configuration)], ["slurmd", "-D", "-f", str(configuration)]):
            time.sleep(1)
            with (folder / f"{command[0]}.out").open("w") as out:
                processes.append(subprocess.Popen(command, env=everything, stdout=out, stderr=out))
        _wait_until_idle(everything, folder)
        yield environment
    finally:
        subprocess.run(["scancel", "--full", "--user=root"], env=everything, timeout=30, check=False)
        for process in reversed(processes):
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait_until_idle(environment: dict[str, str], folder: Path) -> None:
    end = time.monotonic() + START_LIMIT_S
    while time.monotonic() < end:
        found = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True, timeout=30, check=False
        )
        if found.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    logs = "\n".join(path.read_text()[-1500:] for path in sorted(folder.glob("slurm*.log")))
    raise TimeoutError(f"Slurm did not start in {START_LIMIT_S} s\n{logs}")


def _ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
