"""What certificates and revocation lists say: names, fingerprint, dates. The handshake that proves them is `tls`'s."""

from __future__ import annotations

import hashlib
import re
import socket
import ssl
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from osteo_daemon.errors import ConfigurationError

_REVOCATION_LIST: Final = re.compile(rb"-----BEGIN X509 CRL-----.*?-----END X509 CRL-----", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Certificate:
    """One X.509 certificate.

    Attributes:
        sha256: digest of its DER form, 64 lower-case hexadecimal digits.
        identities: all that a setting may call it: ``sha256:``, ``dns:``, ``ip:``, ``uri:``, ``cn:``, ``subject:``.
        not_before: start of its validity, UTC.
        not_after: end of its validity, UTC.
    """

    sha256: str
    identities: frozenset[str]
    not_before: datetime
    not_after: datetime

    @property
    def fingerprint(self) -> str:
        """Its digest as settings write it."""
        return f"sha256:{self.sha256}"

    def is_one_of(self, identities: Collection[str]) -> bool:
        """True when one of ``identities``, in the form of `osteo_daemon.settings.CertificateIdentity`, names it."""
        return not self.identities.isdisjoint(identities)

    def validity_error(self, now: datetime) -> str:
        """Why it doesn't hold at ``now``; empty when it does."""
        if now < self.not_before:
            return f"is valid only from {self.not_before:%Y-%m-%d %H:%M} UTC on"
        return f"expired on {self.not_after:%Y-%m-%d %H:%M} UTC" if now > self.not_after else ""


def certificate_from_der(encoded: bytes) -> Certificate:
    """Read one certificate.

    Raises:
        ValueError: this is none.
    """
    read = x509.load_der_x509_certificate(encoded)
    digest = read.fingerprint(hashes.SHA256()).hex()
    return Certificate(
        sha256=digest,
        identities=frozenset({f"sha256:{digest}", *_names(read)}),
        not_before=read.not_valid_before_utc,
        not_after=read.not_valid_after_utc,
    )


def certificate_of(connection: socket.socket) -> Certificate | None:
    """What the peer of a connection has proven to be; None only where there is no TLS at all."""
    if not isinstance(connection, ssl.SSLSocket):
        return None
    shown = connection.getpeercert(binary_form=True) or b""
    try:
        return certificate_from_der(shown)
    except ValueError:
        # OpenSSL takes more than this reader: nobody's certificate, never a plain connection
        end = datetime.max.replace(tzinfo=UTC)
        return Certificate(hashlib.sha256(shown).hexdigest(), frozenset(), end, end)


def read_certificates(path: Path) -> tuple[Certificate, ...]:
    """Read all certificates of a PEM file, in its order.

    Raises:
        ConfigurationError: the file cannot be read or holds none.
    """
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
        return tuple(certificate_from_der(entry.public_bytes(Encoding.DER)) for entry in found)
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} holds no PEM certificate that can be read") from error


def earliest_next_update(path: Path) -> datetime | None:
    """When the first of a PEM file's revocation lists is out of date; None when none says so. UTC.

    Raises:
        ConfigurationError: the file cannot be read or holds none.
    """
    try:
        blocks = _REVOCATION_LIST.findall(path.read_bytes())
        ends = [x509.load_pem_x509_crl(block).next_update_utc for block in blocks]
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} holds a revocation list that cannot be read") from error
    if not blocks:
        raise ConfigurationError(f"{path} holds no PEM revocation list")
    return min((end for end in ends if end is not None), default=None)


def whole_days_left(end: datetime) -> int:
    """Days from now to ``end``, rounded down; negative when it has passed."""
    return (end - datetime.now(UTC)).days


def _names(certificate: x509.Certificate) -> set[str]:
    names: set[str] = set()
    try:
        names.add(f"subject:{certificate.subject.rfc4514_string()}")
        names.update(f"cn:{entry.value!s}" for entry in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME))
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        names.update(f"dns:{name.lower()}" for name in alternative.get_values_for_type(x509.DNSName))
        names.update(f"ip:{name}" for name in alternative.get_values_for_type(x509.IPAddress))
        names.update(f"uri:{name}" for name in alternative.get_values_for_type(x509.UniformResourceIdentifier))
    except x509.ExtensionNotFound:
        pass
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        # names that cannot be read name nobody; the fingerprint still does
        return set()
    return names
