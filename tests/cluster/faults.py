"""What goes wrong with hosts. All but :func:`crash` and :func:`power` are undone by :func:`heal`.

Packets to a host are dropped as they come in, packets from it at the outer end of its cable: dropped on their way out
of the host they would be errors of its own programs (EPERM), and TCP would not take them for losses.
"""

from __future__ import annotations

from tests.cluster.hosts import Lab
from tests.cluster.network import attempt, call


def crash(lab: Lab, host: str) -> None:
    """Every process dies at once; the kernel lives and answers with resets. :meth:`Lab.restart` brings it back."""
    lab.stop(host)


def power(lab: Lab, host: str) -> None:
    """The cable goes silent, then every process dies. :meth:`Lab.restart` brings it back."""
    call("ip", "link", "set", _cable(lab, host), "down")
    lab.stop(host)


def partition(lab: Lab, host: str) -> None:
    """Its processes live; no packet to or from the host arrives."""
    _drop_incoming(lab, host)
    _drop_outgoing(lab, host)


def half_open(lab: Lab, host: str) -> None:
    """Packets from the host arrive, packets to it do not."""
    _drop_incoming(lab, host)


def pair(lab: Lab, one: str, other: str) -> None:
    """The two cannot talk with each other; both talk with the rest."""
    _drop_outgoing(lab, one, "ip", "daddr", lab.address(other))
    _drop_outgoing(lab, other, "ip", "daddr", lab.address(one))


def loss(lab: Lab, host: str, percent: float) -> None:
    """A random part of the packets is lost, each way."""
    chance = ("numgen", "random", "mod", "1000", "<", str(round(percent * 10)))
    _drop_incoming(lab, host, *chance)
    _drop_outgoing(lab, host, *chance)


def rate(lab: Lab, host: str, bits: str) -> None:
    """No more than ``bits`` a second each way, as tc writes it: 20mbit."""
    limit = ("root", "tbf", "rate", bits, "burst", "64kb", "latency", "400ms")
    lab.hosts[host].is_spoilt = True
    call("tc", "qdisc", "replace", "dev", _cable(lab, host), *limit)
    call(*_within(lab, host), "tc", "qdisc", "replace", "dev", "eth0", *limit)


def heal(lab: Lab, host: str) -> None:
    """The host's network as it was. After :func:`pair`, heal both."""
    attempt(*_within(lab, host), "nft", "delete", "table", "inet", "fault")
    attempt("nft", "delete", "table", "netdev", _table(lab, host))
    attempt("tc", "qdisc", "delete", "dev", _cable(lab, host), "root")
    attempt(*_within(lab, host), "tc", "qdisc", "delete", "dev", "eth0", "root")
    call("ip", "link", "set", _cable(lab, host), "up")
    lab.hosts[host].is_spoilt = False


def _cable(lab: Lab, host: str) -> str:
    return lab.network.cable(lab.hosts[host].number)


def _table(lab: Lab, host: str) -> str:
    return lab.network.table(lab.hosts[host].number)


def _within(lab: Lab, host: str) -> tuple[str, ...]:
    return ("nsenter", f"--net=/run/netns/{lab.network.namespace(lab.hosts[host].number)}")


def _drop_incoming(lab: Lab, host: str, *which: str) -> None:
    lab.hosts[host].is_spoilt = True
    nft = (*_within(lab, host), "nft", "add")
    call(*nft, "table", "inet", "fault")
    call(*nft, "chain", "inet", "fault", "incoming", "{ type filter hook input priority 0; }")
    call(*nft, "rule", "inet", "fault", "incoming", "iifname", "eth0", *which, "drop")


def _drop_outgoing(lab: Lab, host: str, *which: str) -> None:
    lab.hosts[host].is_spoilt = True
    table, hook = _table(lab, host), f'{{ type filter hook ingress device "{_cable(lab, host)}" priority 0; }}'
    call("nft", "add", "table", "netdev", table)
    call("nft", "add", "chain", "netdev", table, "outgoing", hook)
    call("nft", "add", "rule", "netdev", table, "outgoing", *which, "drop")
