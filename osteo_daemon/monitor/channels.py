"""How a message goes out: as a letter over SMTP, as a JSON document to a webhook."""

from __future__ import annotations

import hashlib
import hmac
import json
import smtplib
import ssl
from collections.abc import Mapping
from email.message import EmailMessage
from email.utils import format_datetime
from pathlib import Path
from typing import Protocol

import requests

from osteo_daemon.errors import ConfigurationError, PeerUnavailable
from osteo_daemon.monitor.messages import Message
from osteo_daemon.settings import NotificationSettings


class Channel(Protocol):
    """One way out."""

    @property
    def name(self) -> str:
        """For the log."""

    def send(self, message: Message) -> None:
        """Send it.

        Raises:
            PeerUnavailable: it was not taken; once more, later.
        """


class Mail:
    """Letters to all addressees at once.

    Args:
        settings: of the notifications.

    Raises:
        ConfigurationError: the password or the CA file cannot be used.
    """

    name = "email"

    def __init__(self, settings: NotificationSettings) -> None:
        self._settings = settings
        read_secret(settings.smtp_password_file, "smtp_password_file")
        self._context = _context(settings.smtp_ca_file, "smtp_ca_file")

    def send(self, message: Message) -> None:
        """Send it; a server that takes it for one addressee only is asked no second time."""
        settings = self._settings
        letter = EmailMessage()
        letter["From"] = settings.email_from
        letter["To"] = ", ".join(settings.email_to)
        letter["Subject"] = message.subject
        letter["Date"] = format_datetime(message.at)
        # the same for a repetition: a mailbox shows a letter whose answer got lost only once
        letter["Message-ID"] = f"<{message.identifier}@{settings.email_from.rpartition('@')[2]}>"
        letter["Auto-Submitted"] = "auto-generated"  # RFC 3834: no out-of-office answers
        letter.set_content(message.text)
        try:
            with self._connected() as server:
                server.send_message(letter)
        except (OSError, smtplib.SMTPException, ValueError) as error:
            # ValueError: an address that cannot stand in a letter; the texts of servers may quote addresses
            raise PeerUnavailable(f"{settings.smtp_host}: {type(error).__name__}") from error

    def _connected(self) -> smtplib.SMTP:
        settings = self._settings
        place = (settings.smtp_host, settings.smtp_port)
        if settings.smtp_tls == "tls":
            server: smtplib.SMTP = smtplib.SMTP_SSL(*place, timeout=settings.timeout_seconds, context=self._context)
        else:
            server = smtplib.SMTP(*place, timeout=settings.timeout_seconds)
        try:
            if settings.smtp_tls == "starttls":
                server.starttls(context=self._context)
            if settings.smtp_user:
                # read anew: a password is replaced without a restart
                server.login(settings.smtp_user, read_secret(settings.smtp_password_file, "smtp_password_file"))
        except BaseException:
            server.close()
            raise
        return server


class Webhook:
    """A JSON document for each message; with a token, its HMAC-SHA256 beside it.

    Args:
        settings: of the notifications.

    Raises:
        ConfigurationError: the token or the CA file cannot be used.
    """

    name = "webhook"

    def __init__(self, settings: NotificationSettings) -> None:
        self._settings = settings
        read_secret(settings.webhook_token_file, "webhook_token_file")
        _context(settings.webhook_ca_file, "webhook_ca_file")

    def send(self, message: Message) -> None:
        """Post it."""
        settings = self._settings
        body = json.dumps(message.to_json()).encode()
        headers = {"Content-Type": "application/json", "Idempotency-Key": message.identifier}
        headers |= self._proof(body)
        ca_file = settings.webhook_ca_file
        try:
            # no proxy and no .netrc of the environment: it goes where the settings say
            with requests.Session() as session:
                session.trust_env = False
                answer = session.post(
                    settings.webhook_url,
                    data=body,
                    headers=headers,
                    timeout=settings.timeout_seconds,
                    allow_redirects=False,
                    verify=True if ca_file is None else str(ca_file),
                    stream=True,  # nothing of the answer's body is read
                )
                answer.close()
        except (OSError, requests.RequestException) as error:
            raise PeerUnavailable(f"the webhook: {type(error).__name__}") from error
        if not answer.ok or answer.is_redirect:
            raise PeerUnavailable(f"the webhook answered {answer.status_code}")

    def _proof(self, body: bytes) -> Mapping[str, str]:
        token = read_secret(self._settings.webhook_token_file, "webhook_token_file")
        if not token:
            return {}
        signature = hmac.new(token.encode(), body, hashlib.sha256).hexdigest()
        return {"Authorization": f"Bearer {token}", "X-Osteo-Signature": f"sha256={signature}"}


def channels_of(settings: NotificationSettings) -> list[Channel]:
    """The ways out that the settings want.

    Raises:
        ConfigurationError: a secret or a CA file cannot be used.
    """
    found: list[Channel] = []
    if settings.email_to:
        found.append(Mail(settings))
    if settings.webhook_url:
        found.append(Webhook(settings))
    return found


def read_secret(path: Path | None, key: str) -> str:
    """The one line of a file; empty without a file.

    Raises:
        ConfigurationError: it cannot be read, or is no single line of ASCII.
    """
    if path is None:
        return ""
    try:
        secret = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"notifications.{key} cannot be read: {type(error).__name__}") from None
    if not secret or not secret.isprintable():
        raise ConfigurationError(f"notifications.{key} holds no single line of text")
    return secret


def _context(ca_file: Path | None, key: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"notifications.{key} cannot be used: {type(error).__name__}") from error
