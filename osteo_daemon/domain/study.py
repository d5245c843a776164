"""What the node knows of received objects without decoding pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PeerTls:
    """How a peer that we connect to is known, and how we show ourselves to it. All files are PEM.

    Attributes:
        ca_file: who may have signed its certificate.
        certificate_file: our own certificate and those between it and the root; None: we show none.
        key_file: its private key; None: in the same file.
        server_name: what its certificate must be called; empty: the host that we connect to.
        certificates: as `osteo_daemon.settings.CertificateIdentity`; when there are any, they count instead of a name.
    """

    ca_file: Path
    certificate_file: Path | None = None
    key_file: Path | None = None
    server_name: str = ""
    certificates: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class RemoteAE:
    """A DICOM application entity beside us; ``tls`` is None where it is spoken to in plain."""

    ae_title: str
    host: str
    port: int
    tls: PeerTls | None = None


@dataclass(frozen=True, slots=True)
class SopInstance:
    """One received object: its UIDs, where its bytes lie and what they hash to. Carries no patient identity."""

    study_instance_uid: str
    series_instance_uid: str
    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    path: Path
    size_bytes: int
    sha256: str
