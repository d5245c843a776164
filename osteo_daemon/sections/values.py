"""Values that several sections of the settings take, and what a section is."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

_AE_TITLE = re.compile(r"[\x21-\x5b\x5d-\x7e](?:[\x20-\x5b\x5d-\x7e]{0,14}[\x21-\x5b\x5d-\x7e])?")


def _ae_title(value: str) -> str:
    # VR AE: at most 16 characters of the default repertoire, no backslash or control character (PS3.5 6.2)
    if not _AE_TITLE.fullmatch(value):
        raise ValueError("an AE title has 1 to 16 printable ASCII characters, no backslash, no space at either end")
    return value


def _network(value: str) -> str:
    ipaddress.ip_network(value, strict=False)
    return value


def _crontab(value: str) -> str:
    if len(value.split()) != len(("minute", "hour", "day", "month", "weekday")):
        raise ValueError("minute hour day month weekday, in UTC; weekdays as mon to sun")
    return value


def _certificate_identity(value: str) -> str:
    kind, _, name = value.strip().partition(":")
    if kind == "sha256":
        digest = name.replace(":", "").replace(" ", "").lower()
        if re.fullmatch("[0-9a-f]{64}", digest):
            return f"sha256:{digest}"
    elif kind == "ip":
        return f"ip:{ipaddress.ip_address(name)}"
    elif kind in ("dns", "uri", "cn", "subject") and name:
        return f"dns:{name.lower()}" if kind == "dns" else f"{kind}:{name}"
    raise ValueError("sha256:DIGEST, dns:NAME, ip:ADDRESS, uri:URI, cn:NAME or subject:NAME (RFC 4514)")


def is_overheard(url: str) -> bool:
    """Whether what is sent to ``url`` crosses a network in the clear."""
    parts = urlsplit(url)
    return parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1")


AETitle = Annotated[str, AfterValidator(_ae_title)]
CertificateIdentity = Annotated[str, AfterValidator(_certificate_identity)]
Network = Annotated[str, AfterValidator(_network)]
Crontab = Annotated[str, AfterValidator(_crontab)]
Hours = Annotated[str, Field(pattern=r"^((?:[01]\d|2[0-3]):[0-5]\d-(?:[01]\d|2[0-3]):[0-5]\d)?$")]
Port = Annotated[int, Field(ge=0, le=65535)]
Seconds = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """One section: no key that it does not know, no change once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
