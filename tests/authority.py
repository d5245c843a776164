"""A certificate authority for tests: what a hospital's would issue, and what it would not."""

from __future__ import annotations

import ipaddress
import itertools
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

NOW = datetime.now(UTC).replace(microsecond=0)
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Issued:
    """A certificate with its private key, in two PEM files."""

    certificate: Path
    key: Path
    serial: int
    sha256: str

    @property
    def options(self) -> list[str]:
        """For DCMTK's tools."""
        return ["+tls", str(self.key), str(self.certificate)]


class Authority:
    """A root that signs; ``file`` is its certificate."""

    def __init__(self, folder: Path, name: str = "Hospital CA") -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usage = x509.KeyUsage(
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            key_cert_sign=True,
            crl_sign=True,
            encipher_only=False,
            decipher_only=False,
        )
        root = (
            self._builder(self._name, NOW - timedelta(days=1), NOW + timedelta(days=3650))
            .public_key(self._key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.file = folder / f"{name.replace(' ', '-')}.pem"
        self.file.write_bytes(root.public_bytes(Encoding.PEM))

    def issue(
        self,
        name: str,
        *,
        days: tuple[float, float] = (-1, 365),
        names: Sequence[str] = ("127.0.0.1",),
        rsa_bits: int = 0,
        stem: str = "",
    ) -> Issued:
        """Sign a certificate.

        Args:
            name: its Common Name.
            days: its validity, from now.
            names: its alternative names: addresses or host names.
            rsa_bits: length of an RSA key; 0: a P-256 key.
            stem: of the file names; the Common Name when empty.
        """
        key = rsa.generate_private_key(65537, rsa_bits) if rsa_bits else ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Hospital"), x509.NameAttribute(NameOID.COMMON_NAME, name)]
        )
        builder = self._builder(subject, NOW + timedelta(days=days[0]), NOW + timedelta(days=days[1]))
        alternative = x509.SubjectAlternativeName([_general(entry) for entry in names])
        made = builder.public_key(key.public_key()).add_extension(alternative, critical=False)
        signed = made.sign(self._key, hashes.SHA256())
        issued = Issued(
            self._folder / f"{stem or name}.pem",
            self._folder / f"{stem or name}.key",
            signed.serial_number,
            signed.fingerprint(hashes.SHA256()).hex(),
        )
        issued.certificate.write_bytes(signed.public_bytes(Encoding.PEM))
        issued.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        issued.key.chmod(0o600)
        return issued

    def revoke(self, *revoked: Issued, file: Path, days: float = 30) -> Path:
        """Write a revocation list of these that holds for ``days``."""
        builder = x509.CertificateRevocationListBuilder().issuer_name(self._name)
        builder = builder.last_update(NOW - timedelta(days=1)).next_update(NOW + timedelta(days=days))
        for entry in revoked:
            line = x509.RevokedCertificateBuilder().serial_number(entry.serial).revocation_date(NOW).build()
            builder = builder.add_revoked_certificate(line)
        file.write_bytes(builder.sign(self._key, hashes.SHA256()).public_bytes(Encoding.PEM))
        return file

    def client(self, shown: Issued | None = None) -> ssl.SSLContext:
        """A context that believes this CA and shows a certificate."""
        context = ssl.create_default_context(cafile=str(self.file))
        if shown is not None:
            context.load_cert_chain(shown.certificate, shown.key)
        return context

    def server(self, shown: Issued) -> ssl.SSLContext:
        """A context that wants certificates of this CA."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(self.file))
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(shown.certificate, shown.key)
        return context

    def _builder(self, subject: x509.Name, begin: datetime, end: datetime) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(self._name)
        return builder.serial_number(next(_numbers)).not_valid_before(begin).not_valid_after(end)


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
