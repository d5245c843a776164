"""What the node knows of received objects without decoding pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RemoteAE:
    """A DICOM application entity beside us."""

    ae_title: str
    host: str
    port: int


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
