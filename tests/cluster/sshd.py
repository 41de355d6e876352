"""Keys and settings of the lab's ssh: test keys of its own, never those of the machine."""

from __future__ import annotations

from pathlib import Path

from tests.cluster.network import call

SERVER = """\
Port 22
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/user_key.pub
StrictModes no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
UseDNS no
PidFile /run/sshd.pid
MaxStartups 100
"""
CLIENT = """\
User root
IdentityFile /etc/ssh/user_key
IdentitiesOnly yes
UserKnownHostsFile /etc/ssh/known_hosts
GlobalKnownHostsFile /dev/null
StrictHostKeyChecking yes
BatchMode yes
ConnectTimeout 5
LogLevel ERROR
"""


def write_files(folder: Path, addresses: dict[str, str], environment: dict[str, str]) -> None:
    """What every host sees as /etc/ssh. Shells that ssh opens get ``environment``."""
    for key in ("user_key", "host_key"):
        call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(folder / key))
    kind, public, *_ = (folder / "host_key.pub").read_text().split()
    known = [f"{host},{address} {kind} {public}\n" for host, address in addresses.items()]
    (folder / "known_hosts").write_text("".join(known))
    given = " ".join(f'"{name}={value}"' for name, value in environment.items() if name not in ("HOME", "USER"))
    (folder / "sshd_config").write_text(f"{SERVER}SetEnv {given}\n")


def write_client(folder: Path, alive_seconds: int) -> None:
    alive = f"ServerAliveInterval {alive_seconds}\nServerAliveCountMax 3\n" if alive_seconds else ""
    (folder / "ssh_config").write_text(CLIENT + alive)
