"""Hosts made of namespaces on one machine: a head and some nodes, each with its own network, processes and sshd.

The disk is the machine's own, seen by all hosts alike, as a shared folder is; what a host alone has is ``/run``,
``/dev/shm``, :attr:`Lab.local`, and whatever :meth:`Lab.view` gives it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster import sshd
from tests.cluster.commands import Command, children
from tests.cluster.network import Network, call

ROOT = Path(__file__).resolve().parents[2]
HEAD = "head"
PROGRAMS = ("ip", "nft", "tc", "nsenter", "unshare", "ssh", "ssh-keygen", "sshd", "pdsh")
SBIN = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
OWN = {"cat", "sshd", "slurmd", "slurmctld", "munged"}
"""Programs that may outlive a test on its hosts."""
START_SECONDS = 20.0


def missing() -> str | None:
    """Why there can be no lab here; None where there can."""
    if os.geteuid() != 0:
        return "hosts made of namespaces need root"
    path = f"{os.environ.get('PATH', '')}:{SBIN}"
    if absent := [program for program in PROGRAMS if shutil.which(program, path=path) is None]:
        return f"no {', '.join(absent)} here: run tests/cluster/install.sh"
    probe = (
        "ip link add probe0 type bridge && ip link add probe1 type veth peer name probe2 && nft add table netdev probe "
        "&& nft add chain netdev probe out '{ type filter hook ingress device probe1 priority 0; }'"
    )
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "bash", "-c", probe],
        capture_output=True,
        text=True,
    )
    return f"no namespaces with a bridge and nftables here: {tried.stderr.strip()}" if tried.returncode else None


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """What ``condition`` gave when it first was true. Raises AssertionError when it was not in that time."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(0.05)
    return result


@dataclass
class Host:
    number: int
    process: subprocess.Popen[bytes] | None = None
    """The outer process; its child is the first process of the host."""
    pid: int = 0
    """Of the first process. 0 when the host is down."""
    views: list[Path] = field(default_factory=list)
    is_spoilt: bool = False
    """By a fault of the network that has not been healed."""


class Lab:
    """``with Lab(3) as lab``: hosts head, node1, node2 and node3 with ssh between them all, gone at the end.

    ``alive_seconds`` is ssh's ServerAliveInterval on all hosts; 0, ssh's default, never gives up a silent peer.
    """

    def __init__(self, num_nodes: int, alive_seconds: int = 0) -> None:
        self.nodes = [f"node{number}" for number in range(1, num_nodes + 1)]
        self.hosts = {name: Host(number) for number, name in enumerate([HEAD, *self.nodes])}
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:{SBIN}",
            "PYTHONPATH": str(ROOT),
            "HOME": os.path.expanduser("~"),
            "USER": "root",
            "LANG": "C.UTF-8",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
        }
        self._alive_seconds = alive_seconds
        self._commands: list[Command] = []
        self._log_numbers = itertools.count()

    def __enter__(self) -> Lab:
        self.network = Network()
        self.folder = self.network.folder
        self.local = self.folder / "local"
        """A path that exists on every host, with another content on each."""
        try:
            self._write_files()
            self.network.open()
            for name in self.hosts:
                self._boot(name)
            for name in self.hosts:
                self._wait_for_ssh(name)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(Exception):
            for name in self.hosts:
                self.stop(name)
        self.network.close()
        for command in self._commands:
            command.kill()

    def _write_files(self) -> None:
        for folder in ("etc/ssh", "local", "logs"):
            (self.folder / folder).mkdir(parents=True)
        etc = self.folder / "etc"
        addresses = {"outside": self.network.outside} | {name: self.address(name) for name in self.hosts}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (etc / "hosts").write_text("\n".join(lines) + "\n")
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
        (etc / "resolv.conf").write_text("")
        sshd.write_files(etc / "ssh", {name: self.address(name) for name in self.hosts}, self.environment)
        self.configure_ssh(self._alive_seconds)

    def configure_ssh(self, alive_seconds: int) -> None:
        """For connections made from now on, on all hosts."""
        sshd.write_client(self.folder / "etc" / "ssh", alive_seconds)

    def address(self, host: str) -> str:
        return self.network.address(self.hosts[host].number)

    def hostfile(self, slots: int = 1, hosts: Sequence[str] | None = None) -> Path:
        """For ``deepspeed --hostfile``: the given nodes, all when not given."""
        text = "".join(f"{host} slots={slots}\n" for host in hosts or self.nodes)
        path = self.folder / f"hostfile{next(self._log_numbers)}"
        path.write_text(text)
        return path

    def _boot(self, name: str) -> None:
        host = self.hosts[name]
        self.network.wire(host.number)
        unshare = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child"]
        log = self.folder / "logs" / f"{name}.log"
        with log.open("ab") as output:
            host.process = subprocess.Popen(
                [
                    "nsenter", f"--net=/run/netns/{self.network.namespace(host.number)}", *unshare,
                    str(Path(__file__).with_name("host_init.sh")), name, str(self.folder),
                ],
                stdin=subprocess.PIPE, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env=self.environment,
            )  # fmt: skip
        outer = host.process

        def ready() -> int:
            if outer.poll() is not None:
                raise RuntimeError(f"{name} did not start:\n{log.read_text()}")
            first = next(iter(children(outer.pid)), 0)
            return first if first and Path(f"/proc/{first}/root/run/ready").exists() else 0

        host.pid = wait_until(ready, START_SECONDS, f"the start of {name}; see {log}")
        host.is_spoilt = False

    def _wait_for_ssh(self, name: str) -> None:
        def answers() -> bool:
            with contextlib.suppress(OSError), socket.create_connection((self.address(name), 22), timeout=1) as peer:
                return peer.recv(4) == b"SSH-"
            return False

        wait_until(answers, START_SECONDS, f"the sshd of {name}")

    def is_up(self, host: str) -> bool:
        return self.hosts[host].pid != 0

    def stop(self, name: str) -> None:
        """All processes of the host die at once."""
        host = self.hosts[name]
        if host.process is not None:
            if host.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(host.pid, signal.SIGKILL)
            else:
                host.process.kill()  # takes its child along
            assert host.process.stdin is not None
            host.process.stdin.close()
            host.process.wait()
        host.process, host.pid = None, 0
        host.views.clear()

    def restart(self, name: str) -> None:
        """As a reboot: a clean network, its old address, none of its processes, none of its views."""
        self.stop(name)
        self._boot(name)
        self._wait_for_ssh(name)

    def view(self, name: str, path: Path, source: Path | None = None, read_only: bool = False) -> None:
        """Let one host see ``source`` (a folder or a file) at ``path``; an empty folder of its own without a source."""
        assert path.exists(), path
        if source is None:
            self._within(name, "mount", "-t", "tmpfs", "tmpfs", str(path))
        else:
            self._within(name, "mount", "--bind", str(source), str(path))
        self.hosts[name].views.append(path)
        if read_only:
            self._within(name, "mount", "-o", "remount,bind,ro", str(path))

    def unview(self, name: str, path: Path) -> None:
        self.hosts[name].views.remove(path)
        self._within(name, "umount", "--lazy", str(path))

    def _within(self, name: str, *words: str) -> None:
        call("nsenter", f"--target={self.hosts[name].pid}", "--mount", "--pid", *words)

    def inside(self, name: str, path: Path) -> Path:
        """Where the tests find what a host sees at ``path``."""
        return Path(f"/proc/{self.hosts[name].pid}/root{path}")

    def start(
        self,
        host: str,
        command: str | Sequence[str],
        *,
        env: dict[str, str] | None = None,
        folder: Path = ROOT,
        log: Path | None = None,
    ) -> Command:
        """Start a shell line, or a program with its arguments, on a host. Its output is appended to ``log``."""
        if not self.is_up(host):
            raise RuntimeError(f"{host} is down")
        log = log or self.folder / "logs" / f"{host}-{next(self._log_numbers)}.log"
        started = Command(self.hosts[host].pid, command, self.environment | (env or {}), folder, log)
        self._commands.append(started)
        return started

    def run(
        self,
        host: str,
        command: str | Sequence[str],
        *,
        env: dict[str, str] | None = None,
        folder: Path = ROOT,
        timeout: float = 60.0,
        check: bool = True,
    ) -> str:
        """The output. Raises AssertionError when the program fails, unless ``check`` is off, or does not end."""
        started = self.start(host, command, env=env, folder=folder)
        code = started.wait(timeout)
        self._commands.remove(started)
        assert code == 0 or not check, f"{host}: {started.text}: exit code {code}\n{started.output()}"
        return started.output()

    def processes(self, host: str, *words: str) -> list[int]:
        """Processes of a host whose command line holds all ``words``, by their numbers outside."""
        lines = {pid: " ".join(line) for pid, line in self._command_lines(host)}
        return [pid for pid, line in lines.items() if all(word in line for word in words)]

    def _command_lines(self, name: str) -> Iterator[tuple[int, list[str]]]:
        """Of all processes of the host but its first. Zombies have none."""
        first = self.hosts[name].pid
        namespace = os.readlink(f"/proc/{first}/ns/pid") if first else ""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(folder / "ns" / "pid") == namespace and int(folder.name) != first:
                    line = (folder / "cmdline").read_bytes().decode(errors="replace").rstrip("\0")
                    if line:
                        yield int(folder.name), line.split("\0")

    def reset(self) -> None:
        """As after the start: what tests began is killed, and hosts they changed or littered are restarted."""
        for command in self._commands:
            if Path(command.text.split()[0]).name not in OWN:
                command.kill()
        self.configure_ssh(self._alive_seconds)
        for name, host in self.hosts.items():
            if not host.pid or host.is_spoilt or host.views or self._litter(name):
                self.restart(name)
        self._commands = [command for command in self._commands if command.poll() is None]

    def _litter(self, name: str) -> bool:
        programs = {Path(line[0].split(":")[0]).name for _, line in self._command_lines(name)}
        return not programs <= OWN
