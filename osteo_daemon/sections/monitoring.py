"""Metrics, health, and who is told when something is amiss."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from osteo_daemon.sections.values import Hours, Port, Seconds, Section, is_overheard


class MonitorSettings(Section):
    """Metrics and health over HTTP: no port while it is 0. What is told there names no patient."""

    port: Port = 0
    address: str = "127.0.0.1"
    look_seconds: Seconds = 10
    maximum_requests: int = Field(default=8, ge=1)
    waiting_seconds: Seconds = 3600


class NotificationSettings(Section):
    """Messages by e-mail and webhook: nobody is told while neither is named."""

    email_to: tuple[str, ...] = ()
    email_from: str = ""
    smtp_host: str = "localhost"
    smtp_port: Port = 25
    smtp_tls: Literal["none", "starttls", "tls"] = "none"
    smtp_ca_file: Path | None = None
    smtp_user: str = ""
    smtp_password_file: Path | None = None
    webhook_url: str = ""
    webhook_token_file: Path | None = None
    webhook_ca_file: Path | None = None
    templates_dir: Path | None = None
    quiet_hours: Hours = ""
    after_seconds: float = Field(default=300, ge=0)
    repeat_hours: float = Field(default=24, ge=0)
    timeout_seconds: Seconds = 20
    retry_base_seconds: Seconds = 30
    retry_maximum_seconds: Seconds = 3600

    @model_validator(mode="after")
    def _can_be_sent(self) -> NotificationSettings:
        if self.email_to and not self.email_from:
            raise ValueError("email_to needs email_from: servers refuse letters without a sender")
        if any(
            set(address) & set("\r\n") or "@" not in address for address in (*self.email_to, self.email_from or "@")
        ):
            raise ValueError("email_to and email_from are addresses, such as osteo@hospital.example")
        if self.smtp_user and self.smtp_password_file is None:
            raise ValueError("smtp_user needs smtp_password_file")
        if self.smtp_user and self.smtp_tls == "none":
            raise ValueError('a password is not sent in the clear: smtp_tls = "starttls" or "tls"')
        if self.webhook_url and not self.webhook_url.startswith(("http://", "https://")):
            raise ValueError("webhook_url begins with https:// (or http:// on this machine)")
        if is_overheard(self.webhook_url):
            raise ValueError("webhook_url: beyond this machine over https only")
        return self

    @property
    def wanted(self) -> bool:
        """Somebody is to be told."""
        return bool(self.email_to or self.webhook_url)
