"""Who may associate, and for what: called and calling AE title, address and certificate must agree with the settings.

Default closed: who stands nowhere is refused; over TLS also who has no certificate listed.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from osteo_daemon.certificates import Certificate
from osteo_daemon.log import get_logger
from osteo_daemon.settings import DestinationSettings, SourceSettings

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

Rejection = tuple[int, int, int]
"""Result, source and reason of an A-ASSOCIATE-RJ (PS3.8 table 9-21)."""

CALLED_UNKNOWN: Final[Rejection] = (0x01, 0x01, 0x07)
CALLING_UNKNOWN: Final[Rejection] = (0x01, 0x01, 0x03)
CONGESTION: Final[Rejection] = (0x02, 0x03, 0x01)
LIMIT_EXCEEDED: Final[Rejection] = (0x02, 0x03, 0x02)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks for an association.

    Attributes:
        certificate: proven in the TLS handshake; None on the plain port.
    """

    called_ae_title: str
    calling_ae_title: str
    address: str
    certificate: Certificate | None


@dataclass(frozen=True, slots=True)
class Decision:
    """What a caller may do.

    Attributes:
        reason: for the log, why it is refused; empty when it is not.
        rejection: for the caller; it tells no stranger which part was wrong.
        may_store: False for destinations that may only report on commitments.
    """

    reason: str = ""
    rejection: Rejection = CALLING_UNKNOWN
    may_store: bool = False


@dataclass(frozen=True, slots=True)
class _Known:
    networks: tuple[Network, ...]
    certificates: frozenset[str]
    plain: bool

    def objection(self, caller: Caller) -> str:
        if not allowed(caller.address, self.networks):
            return "calling AE title comes from an address that is not its own"
        if caller.certificate is None:
            return "" if self.plain else "calling AE title must come over TLS"
        if not self.certificates:
            return "no certificate is listed for the calling AE title"
        # a session that is taken up again was verified when it was made
        if error := caller.certificate.validity_error(datetime.now(UTC)):
            return f"certificate {error}"
        return (
            ""
            if caller.certificate.is_one_of(self.certificates)
            else "certificate of another than the calling AE title"
        )


class Admission:
    """The settings' list of peers.

    Args:
        called_ae_title: ours.
        sources: who may store.
        destinations: who may report on storage commitments, from the address that their host has now.
        secured: there is a TLS port; a destination that is spoken to over TLS then reports there or not at all.
    """

    def __init__(
        self,
        called_ae_title: str,
        sources: Iterable[SourceSettings],
        destinations: Iterable[DestinationSettings],
        *,
        secured: bool,
    ) -> None:
        self._called = called_ae_title
        self._sources = {
            source.ae_title: _Known(
                tuple(ipaddress.ip_network(entry, strict=False) for entry in source.addresses),
                frozenset(source.certificates),
                plain=not source.tls_required,
            )
            for source in sources
        }
        self._reporters: dict[str, list[_Known]] = {}
        for entry in destinations:
            if entry.kind == "dicom" and entry.commitment == "storage-commitment":
                plain = not (entry.tls and secured)
                known = _Known(networks_of(entry.host), frozenset(entry.certificates), plain)
                self._reporters.setdefault(entry.ae_title, []).append(known)

    @property
    def networks(self) -> tuple[Network, ...]:
        """Where peers may come from at all."""
        known = [*self._sources.values(), *(entry for entries in self._reporters.values() for entry in entries)]
        return tuple(network for entry in known for network in entry.networks)

    def judge(self, caller: Caller) -> Decision:
        """Decide on one caller."""
        if caller.called_ae_title != self._called:
            return Decision("called AE title is not ours", CALLED_UNKNOWN)
        source = self._sources.get(caller.calling_ae_title)
        reporters = self._reporters.get(caller.calling_ae_title, [])
        known = [*([] if source is None else [source]), *reporters]
        if not known:
            return Decision("calling AE title is not among the sources")
        if source is not None and not source.objection(caller):
            return Decision(may_store=True)
        objections = [entry.objection(caller) for entry in known]
        return Decision() if "" in objections else Decision(objections[0])


def allowed(host: str, networks: tuple[Network, ...]) -> bool:
    """True when ``host`` lies in one of ``networks``; an IPv4 address mapped into IPv6 counts as itself."""
    address = ipaddress.ip_address(host.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return any(address in network for network in networks)


def networks_of(host: str) -> tuple[Network, ...]:
    """The addresses that a host name has now; none, and a log line, when it has none."""
    try:
        found = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(host, None)}
    except OSError:
        get_logger().warning("host_unknown", host=host)
        return ()
    return tuple(ipaddress.ip_network(address) for address in sorted(found))
