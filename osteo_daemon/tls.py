"""TLS contexts for both ends, by one profile: BCP 195 (RFC 8996, RFC 9325) as PS3.15 B.12 asks for.

TLS 1.3, or 1.2 with ephemeral elliptic curves and authenticated encryption; never anything older. Finite-field DHE is
left out: RFC 9325 4.1 advises against it, and PS3.15 B.13 forbids it where the key length can't be set. No compression
(RFC 9325 3.3), no renegotiation (3.5). No session tickets: a session of TLS 1.2 can be taken up only from the memory of
the context that made it, which goes with new files; whoever asks for a certificate looks at its dates himself.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osteo_daemon.certificates import certificate_of
from osteo_daemon.domain.study import PeerTls, RemoteAE
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.settings import PeerSettings, PeerTlsSettings, TlsSettings

# level 2 of OpenSSL: at least 112 bits of security, RSA keys of 2048 bits (RFC 9325 4.2)
TLS_1_2_SUITES: Final = "@SECLEVEL=2:ECDHE+AESGCM:ECDHE+CHACHA20"
_OTHER_CERTIFICATE: Final = "not one of the certificates in the settings"


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The PEM files of one end.

    Attributes:
        certificate_file: our certificate, then those between it and the root.
        key_file: its private key, without a password.
        ca_file: who may have signed the peer's certificate.
        crl_file: revocation lists of those; None: none is looked at.
    """

    certificate_file: Path
    key_file: Path
    ca_file: Path
    crl_file: Path | None = None

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files that there are."""
        return tuple(
            path for path in (self.certificate_file, self.key_file, self.ca_file, self.crl_file) if path is not None
        )


def peer_tls(own: TlsSettings, peer: PeerTlsSettings) -> PeerTls | None:
    """How to speak to a peer of the settings; None: in plain.

    Raises:
        ConfigurationError: nobody says who may have signed its certificate.
    """
    if not peer.tls:
        return None
    authority = peer.ca_file or own.ca_file
    if authority is None:
        raise ConfigurationError("tls = true needs a ca_file")
    shown = peer if peer.certificate_file is not None else own
    return PeerTls(
        ca_file=authority,
        certificate_file=shown.certificate_file,
        key_file=shown.key_file,
        server_name=peer.server_name,
        certificates=frozenset(peer.certificates),
    )


def source_peer(own: TlsSettings, peer: PeerSettings) -> RemoteAE:
    """A peer of a ``[[sources]]`` entry, as it is called.

    Raises:
        ConfigurationError: as `peer_tls`.
    """
    return RemoteAE(peer.ae_title, peer.host, peer.port, peer_tls(own, peer))


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """A context that takes only clients with a certificate of the CA.

    Raises:
        ConfigurationError: a file is missing or unreadable, or key and certificate do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _restrict(context)
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    context.num_tickets = 0
    context.verify_mode = ssl.CERT_REQUIRED
    _load(context, files.certificate_file, files.key_file)
    _trust(context, files.ca_file)
    if files.crl_file is not None:
        _trust(context, files.crl_file)
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    return context


def browser_context(certificate_file: Path, key_file: Path) -> ssl.SSLContext:
    """A context for a server of browsers, which show no certificate.

    Raises:
        ConfigurationError: a file is missing or unreadable, or key and certificate do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    _restrict(context)
    context.options |= ssl.OP_CIPHER_SERVER_PREFERENCE
    context.num_tickets = 0
    _load(context, certificate_file, key_file)
    return context


def client_context(peer: PeerTls, failed: Callable[[OSError], None] = lambda _error: None) -> ssl.SSLContext:
    """A context for connections to one peer; files are read anew, so that new ones count from the next call on.

    The peer must show a certificate of its CA; it must carry the name that is asked for or, where ``certificates`` are
    given, be one of these.

    Args:
        failed: told why a handshake failed, where the caller of the socket's methods would not say.

    Raises:
        ConfigurationError: a file is missing or unreadable, or key and certificate do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _restrict(context)
    _trust(context, peer.ca_file)
    if peer.certificate_file is not None:
        _load(context, peer.certificate_file, peer.key_file)
    context.check_hostname = not peer.certificates
    context.sslsocket_class = _judging(peer.certificates, failed)
    return context


ENDED_WITHOUT_A_WORD = "the peer ended TLS without a word: perhaps it does not accept our certificate, or speaks no TLS"
_LOST = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError)


def reason_of(error: OSError, *, over_tls: bool = False) -> str:
    """Why a handshake or a connection failed, in OpenSSL's words; nothing that the peer wrote.

    Args:
        over_tls: whether a lost connection was one of TLS. A peer that refuses our certificate says so in an alert; one
            that closes at once loses it.
    """
    if isinstance(error, ssl.SSLEOFError) or (over_tls and isinstance(error, _LOST)):
        return ENDED_WITHOUT_A_WORD
    if isinstance(error, ssl.SSLCertVerificationError) and _OTHER_CERTIFICATE in error.args:
        return _OTHER_CERTIFICATE
    if isinstance(error, ssl.SSLCertVerificationError) and error.verify_message:
        return f"certificate not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason:
        return str(error.reason).lower().replace("_", " ")
    return type(error).__name__


def _restrict(context: ssl.SSLContext) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    context.set_ciphers(TLS_1_2_SUITES)


def _load(context: ssl.SSLContext, certificate_file: Path, key_file: Path | None) -> None:
    def no_password() -> bytes:
        # without it OpenSSL asks at the terminal
        raise ConfigurationError(f"{key_file or certificate_file} is encrypted; give a key without a password")

    try:
        context.load_cert_chain(certificate_file, key_file, no_password)
    except ssl.SSLError as error:
        what = f"{certificate_file} and {key_file or 'its key'}"
        raise ConfigurationError(f"{what} cannot be used: {reason_of(error)}") from error
    except OSError as error:
        raise ConfigurationError(f"{certificate_file} or {key_file} cannot be read: {error.strerror}") from error


def _trust(context: ssl.SSLContext, file: Path) -> None:
    try:
        context.load_verify_locations(file)
    except ssl.SSLError as error:
        raise ConfigurationError(f"{file} cannot be used: {reason_of(error)}") from error
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read: {error.strerror}") from error


def _judging(certificates: frozenset[str], failed: Callable[[OSError], None]) -> type[ssl.SSLSocket]:
    """A socket whose handshake fails when the peer shows another certificate than one of these, if there are any."""

    class JudgingSocket(ssl.SSLSocket):
        def do_handshake(self, block: bool = False) -> None:
            try:
                super().do_handshake(block)
                shown = certificate_of(self)
                if certificates and (shown is None or not shown.is_one_of(certificates)):
                    raise ssl.SSLCertVerificationError(_OTHER_CERTIFICATE)
            except OSError as error:
                failed(error)
                raise

    return JudgingSocket
