"""A real cluster of Slurm on this machine, for as long as its tests take.

`python -m tests.multiprocess.slurm FOLDER` is munged, slurmctld, and a slurmd for each of the nodes
n1 and n2, in a network of their own where the kernel allows it. It reads commands from standard
input, one a line as JSON, runs each within that network, and answers each with what became of it.
At the end of its input all is killed. Debian: apt-get install slurm-wlm munge.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from syncbn.launch import isolation
from tests.multiprocess.cluster import ROOT, Ended, free_ports

NEEDED = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scancel")
NODES = ("n1", "n2")
CPUS = 2  # of each node, whatever the machine has
_SYSTEM = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
_SIOCSIFADDR = 0x8916


def missing() -> list[str]:
    """The programs that are not there."""
    return [name for name in NEEDED if shutil.which(name, path=_SYSTEM) is None]


class Slurm:
    """The cluster, from here: another process, which is in another network."""

    def __init__(self) -> None:
        # A short name: sockets have no more than 108 letters.
        self._folder = tempfile.TemporaryDirectory(prefix="slurm-")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.multiprocess.slurm", self._folder.name],
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._answer() == "ready"

    def run(self, *command: str, folder: Path, seconds: float = 60, **environment: str) -> Ended:
        """A command of Slurm to its end; standard output and error together."""
        given = [list(command), str(folder), seconds, {**os.environ, **environment}]
        self._process.stdin.write(f"{json.dumps(given)}\n")
        self._process.stdin.flush()
        return Ended(*self._answer())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()
        self._folder.cleanup()

    def _answer(self):
        line = self._process.stdout.readline()
        assert line, "the cluster has ended"
        return json.loads(line)


def main(folder: Path) -> None:
    if isolation.why_not() is None:
        isolation.enter()
        _second_address()
    os.environ["PATH"] = _SYSTEM
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        _start(folder, daemons)
        print(json.dumps("ready"), flush=True)
        for line in sys.stdin:
            command, working, seconds, environment = json.loads(line)
            environment |= {name: os.environ[name] for name in ("PATH", "SLURM_CONF")}
            environment["PATH"] += f":{Path(sys.executable).parent}"
            print(json.dumps(_ended(command, working, seconds, environment)), flush=True)
    finally:
        _kill_steps(folder)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGKILL)
            daemon.wait()


def _ended(command, working, seconds, environment):
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            cwd=working,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            # srun ends its tasks when it is asked a second time within a second.
            for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
                process.send_signal(number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5 if number == signal.SIGINT else 5)
            status = -signal.SIGALRM
        output.seek(0)
        return [status, output.read()]


def _start(folder: Path, daemons: list[subprocess.Popen[bytes]]) -> None:
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    (folder / "state").mkdir()
    for node in NODES:
        (folder / "spool" / node).mkdir(parents=True)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # none is used
    (folder / "slurm.conf").write_text(_configuration(folder))
    files = {
        "--key-file": "munge.key",
        "--socket": "munge.sock",
        "--pid-file": "munged.pid",
        "--log-file": "munged.log",
        "--seed-file": "munge.seed",
    }
    options = [f"{option}={folder / name}" for option, name in files.items()]
    _daemon(folder, daemons, "munged", "--foreground", "--force", *options)
    _wait(folder, (folder / "munge.sock").exists)
    _daemon(folder, daemons, "slurmctld", "-D")
    for node in NODES:
        _daemon(folder, daemons, "slurmd", "-D", "-N", node)
    _wait(folder, _are_idle)


def _daemon(folder: Path, daemons: list[subprocess.Popen[bytes]], *command: str) -> None:
    with (folder / f"{command[0]}-{len(daemons)}.out").open("wb") as output:
        daemons.append(
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
        )


def _are_idle() -> bool:
    asked = subprocess.run(
        ["sinfo", "--noheader", "--format=%T %D"], capture_output=True, text=True, check=False
    )
    return asked.stdout.split() == ["idle", str(len(NODES))]


def _wait(folder: Path, condition) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        if time.monotonic() > deadline:
            outputs = sorted(folder.glob("*.out"))
            said = "\n".join(f"{file.name}:\n{file.read_text()[-2000:]}" for file in outputs)
            raise SystemExit(f"Slurm did not come up within 30 s:\n{said}")
        time.sleep(0.1)


def _configuration(folder: Path) -> str:
    name, user = socket.gethostname().split(".")[0], pwd.getpwuid(os.geteuid()).pw_name
    control, *own = free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS}"
        for node, port in zip(NODES, own, strict=True)
    )
    return f"""
ClusterName=test
SlurmctldHost={name}(127.0.0.1)
SlurmctldPort={control}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
KillWait=5
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def _second_address() -> None:
    """Slurm asks for addresses of a machine that has one beside 127.0.0.1; the loopback gets it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        address = socket.inet_aton("127.0.0.2")
        request = struct.pack("16sHH4s8x", b"lo:1", socket.AF_INET, 0, address)
        fcntl.ioctl(control, _SIOCSIFADDR, request)


def _kill_steps(folder: Path) -> None:
    """What is above the tasks that still run, and has their node's configuration."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_step = (entry / "comm").read_text().startswith("slurmstepd")
            variables = (entry / "environ").read_bytes()
            if is_step and f"{folder}/slurm.conf".encode() in variables:
                os.kill(int(entry.name), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
