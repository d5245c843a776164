"""Systems that we connect to, and those that may connect to us."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from osteo_daemon.sections.values import AETitle, CertificateIdentity, Network, Port, Section, is_overheard


class PeerTlsSettings(Section):
    """How a peer that we connect to is spoken to; files that are not given are those of ``[tls]``."""

    tls: bool = False
    ca_file: Path | None = None
    certificate_file: Path | None = None
    key_file: Path | None = None
    server_name: str = ""
    certificates: tuple[CertificateIdentity, ...] = ()


class PeerSettings(PeerTlsSettings):
    """Where an application entity listens, and how it is spoken to."""

    ae_title: AETitle
    host: Annotated[str, Field(min_length=1)]
    port: Annotated[int, Field(ge=1, le=65535)]


class SourceSettings(Section):
    """A peer that may open associations: its AE title and the addresses or networks it may come from."""

    ae_title: AETitle
    addresses: Annotated[tuple[Network, ...], Field(min_length=1)]
    certificates: tuple[CertificateIdentity, ...] = ()
    tls_required: bool = False
    maximum_associations: int = Field(default=0, ge=0)
    bytes_per_hour: int = Field(default=0, ge=0)
    priority: Literal["stat", "routine", "backfill"] = "routine"
    query: PeerSettings | None = None
    commitment: PeerSettings | None = None


class DestinationSettings(PeerTlsSettings):
    """A system that gets the results: a PACS, an HL7 interface or a FHIR server."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]
    kind: Literal["dicom", "dicomweb", "hl7", "fhir"] = "dicom"
    ae_title: AETitle | Literal[""] = ""
    host: str = ""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    objects: tuple[Literal["sr", "seg", "sc", "kos", "pdf"], ...] = ("seg", "sr", "sc")
    sr_class: Literal["comprehensive-3d", "comprehensive", "enhanced", "basic-text"] = "comprehensive-3d"
    commitment: Literal["storage-commitment", "c-find", "none"] = "storage-commitment"
    accept_unproven: bool = False
    report_exclusions: bool = False
    receiving_application: Annotated[str, Field(max_length=180)] = ""
    receiving_facility: Annotated[str, Field(max_length=180)] = ""
    url: Annotated[str, Field(pattern=r"^(https?://[^\s?#]+)?$")] = ""
    token_file: Path | None = None

    @model_validator(mode="after")
    def _what_its_kind_needs(self) -> DestinationSettings:
        needed = {
            "dicom": ("ae_title", "host", "port"),
            "dicomweb": ("url",),
            "hl7": ("host", "port"),
            "fhir": ("url",),
        }[self.kind]
        if self.kind == "dicomweb" and self.token_file is not None and is_overheard(self.url):
            raise ValueError(f"destination {self.name}: a token goes over https only")
        missing = [key for key in needed if not getattr(self, key)]
        if missing:
            raise ValueError(f"destination {self.name} of kind {self.kind} needs {', '.join(missing)}")
        if self.report_exclusions and not (self.takes_objects and "sr" in self.objects):
            raise ValueError(f"destination {self.name} takes no structured report; set report_exclusions = false")
        return self

    @property
    def takes_objects(self) -> bool:
        """It gets DICOM objects, whichever way; otherwise a message."""
        return self.kind in ("dicom", "dicomweb")


class ArchiveSettings(PeerTlsSettings):
    """A system that studies are fetched from by `osteo pull`."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]
    retrieve: Literal["c-move", "c-get", "dicomweb"] = "c-move"
    ae_title: AETitle | Literal[""] = ""
    host: str = ""
    port: Port = 0
    url: Annotated[str, Field(pattern=r"^(https?://[^\s?#]+)?$")] = ""
    token_file: Path | None = None
    maximum_matches: int = Field(default=500, ge=2)

    @model_validator(mode="after")
    def _what_its_way_needs(self) -> ArchiveSettings:
        needed = ("url",) if self.retrieve == "dicomweb" else ("ae_title", "host", "port")
        missing = [key for key in needed if not getattr(self, key)]
        if missing:
            raise ValueError(f"archive {self.name} with retrieve = {self.retrieve} needs {', '.join(missing)}")
        if self.token_file is not None and is_overheard(self.url):
            raise ValueError(f"archive {self.name}: a token goes over https only")
        return self
