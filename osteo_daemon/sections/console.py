"""The web console."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import Field, model_validator

from osteo_daemon.sections.values import Port, Seconds, Section


class ConsoleSettings(Section):
    """The web console: off while the port is 0."""

    port: Port = 0
    address: str = "127.0.0.1"
    hosts: tuple[str, ...] = ()
    certificate_file: Path | None = None
    key_file: Path | None = None
    session_idle_seconds: Seconds = 1800
    session_maximum_seconds: Seconds = 10 * 3600
    maximum_upload_bytes: int = Field(default=20 * 1024**2, ge=1024)
    maximum_requests: int = Field(default=16, ge=1)
    idle_timeout_seconds: Seconds = 30

    @model_validator(mode="after")
    def _nobody_listens_in(self) -> ConsoleSettings:
        if (self.certificate_file is None) != (self.key_file is None):
            raise ValueError("console.certificate_file and console.key_file go together")
        if not self.port or self.certificate_file is not None:
            return self
        if not ipaddress.ip_address(self.address).is_loopback:
            raise ValueError("the console listens beyond loopback over TLS only: certificate_file and key_file")
        return self
