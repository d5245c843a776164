"""POST of a transaction to a FHIR server (FHIR R4 3.1.0.11)."""

from __future__ import annotations

import http.client
import ssl
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, urlsplit

from osteo_daemon.errors import PeerBusy, PeerUnavailable, Refused
from osteo_daemon.messaging.fhir import MEDIA_TYPE

_LONGEST_ANSWER_BYTES: Final = 1 << 20
_FOR_NOW: Final = frozenset({408, 409, 412, 423, 425, 429})
_CREDENTIALS: Final = frozenset({401, 403})


def post_transaction(url: str, bundle: bytes, token_file: Path | None, *, timeout_seconds: float) -> str:
    """Send one transaction.

    Args:
        url: the server's base, http or https.
        token_file: a file with a bearer token, read at every call; None sends no credentials.

    Returns:
        The HTTP status, ``200`` or ``201``.

    Raises:
        PeerUnavailable: no connection, no answer in time, or the credentials are not taken.
        PeerBusy: the server asks to try later, or failed itself.
        Refused: it rejects the content.
    """
    headers = {"Content-Type": MEDIA_TYPE, "Accept": MEDIA_TYPE, "Prefer": "return=minimal"}
    if token_file is not None:
        try:
            headers["Authorization"] = f"Bearer {token_file.read_text(encoding='ascii').strip()}"
        except (OSError, UnicodeDecodeError) as error:
            raise PeerUnavailable(f"the token file cannot be read: {type(error).__name__}") from error
    status = _request(urlsplit(url), "POST", bundle, headers, timeout_seconds)
    where = urlsplit(url).netloc.rpartition("@")[2]
    if status in (200, 201):
        return str(status)
    if status in _CREDENTIALS:
        # an operator can mend this without a new report
        raise PeerUnavailable(f"{where}: HTTP {status}, check the token file")
    if status in _FOR_NOW or status >= 500:
        raise PeerBusy(f"{where}: HTTP {status}")
    # the answer may quote the patient: only the status goes into a log
    raise Refused(f"{where}: HTTP {status}")


def probe(url: str, *, timeout_seconds: float) -> None:
    """Ask for the server's capabilities; any answer will do.

    Raises:
        PeerUnavailable: it does not answer.
    """
    _request(urlsplit(f"{url.rstrip('/')}/metadata"), "GET", None, {"Accept": MEDIA_TYPE}, timeout_seconds)


def _request(parts: SplitResult, method: str, body: bytes | None, headers: dict[str, str], seconds: float) -> int:
    host, port = parts.hostname or "", parts.port
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(host, port, timeout=seconds, context=ssl.create_default_context())
    else:
        connection = http.client.HTTPConnection(host, port, timeout=seconds)
    try:
        connection.request(method, parts.path or "/", body=body, headers=headers)
        answer = connection.getresponse()
        answer.read(_LONGEST_ANSWER_BYTES)
        return answer.status
    except (OSError, http.client.HTTPException) as error:
        raise PeerUnavailable(f"{host}: {type(error).__name__}") from error
    finally:
        connection.close()
