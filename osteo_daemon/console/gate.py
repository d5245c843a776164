"""What every request passes before a page sees it: host, method, origin, size, session; what every answer carries.

Everything is closed by default: without a session there is the login page, its style sheet and its script, no other.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Collection
from typing import Final
from urllib.parse import quote, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from osteo_daemon.console.sessions import Session, Sessions
from osteo_daemon.console.users import User, UserFile
from osteo_daemon.settings import ConsoleSettings

CONTENT_SECURITY_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS: Final = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # not no-referrer: browsers then hide a form's origin from us as well
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
_STRICT_TRANSPORT: Final = "max-age=31536000"
_METHODS: Final = frozenset({"GET", "HEAD", "POST"})
_FORM_BYTES: Final = 64 * 1024
_TARGET_CHARACTERS: Final = 2048
LOGIN: Final = "/login"
STATIC: Final = "/static/"
SESSION: Final = "osteo.session"
USER: Final = "osteo.user"
TOKEN: Final = "osteo.token"  # noqa: S105 - the name of a key


def cookie_name(settings: ConsoleSettings) -> str:
    """The session cookie's name: with TLS one that browsers take from this host over TLS alone."""
    return "osteo-session" if settings.certificate_file is None else "__Host-osteo-session"


class BodyRefused(Exception):
    """A body that is longer than is taken, or does not come; ``status`` is that of the answer."""

    def __init__(self, status: int, detail: str) -> None:
        self.status = status
        super().__init__(detail)

    def answer(self) -> Response:
        """For the sender, who need not send the rest."""
        return PlainTextResponse(str(self), self.status, {"connection": "close"})


class Gate:
    """ASGI middleware around the pages.

    Args:
        pages: the application behind it.
        settings: of the console.
        users, sessions: who is logged in.
        passive: paths that pages fetch by themselves: no sign of a person.
        uploads: paths whose bodies may be as large as `ConsoleSettings.maximum_upload_bytes`.
    """

    def __init__(
        self,
        pages: ASGIApp,
        settings: ConsoleSettings,
        users: UserFile,
        sessions: Sessions,
        *,
        passive: Collection[str] = (),
        uploads: Collection[str] = (),
    ) -> None:
        self._pages = pages
        self._settings = settings
        self._users = users
        self._sessions = sessions
        self._passive = frozenset(passive)
        self._uploads = frozenset(uploads)
        self._secure = settings.certificate_file is not None
        self._cookie = cookie_name(settings)
        self._hosts = frozenset(name.lower() for name in settings.hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                if self._secure:
                    headers["strict-transport-security"] = _STRICT_TRANSPORT
            await send(message)

        answer = self._judge(scope)
        if answer is not None:
            await answer(scope, receive, send_with_headers)
            return
        await self._pages(scope, self._bounded(scope, receive), send_with_headers)

    def _judge(self, scope: Scope) -> Response | None:
        """Why a request goes no further; None: it may."""
        headers, method = Headers(scope=scope), scope["method"]
        host = headers.get("host", "")
        if not self._is_ours(host):
            return PlainTextResponse("this console is not called that; see console.hosts in its settings", 421)
        if method not in _METHODS:
            return PlainTextResponse("not done here", 405, {"allow": ", ".join(sorted(_METHODS))})
        if len(scope["raw_path"]) + len(scope["query_string"]) > _TARGET_CHARACTERS:
            return PlainTextResponse("the address is too long", 414)
        if method == "POST" and not _same_origin(headers, host):
            return PlainTextResponse("this form is not one of this console", 403)
        refused = self._admit(scope, headers)
        length = headers.get("content-length", "")
        if refused is None and length.isdecimal() and int(length) > self._limit(scope):
            return _too_large().answer()
        return refused

    def _admit(self, scope: Scope, headers: Headers) -> Response | None:
        token = cookie_parser(headers.get("cookie", "")).get(self._cookie, "")
        path = scope["path"]
        session = self._sessions.find(token, by_person=path not in self._passive) if token else None
        user = None if session is None else self._user(session)
        if session is not None and user is None:
            self._sessions.end(token)
        scope[SESSION], scope[USER], scope[TOKEN] = (session, user, token) if user is not None else (None, None, "")
        if user is not None or path == LOGIN or path.startswith(STATIC):
            return None
        return _log_in_first(scope, headers)

    def _user(self, session: Session) -> User | None:
        """The session's person as the file has them now: removed, demoted and renewed ones are out at once."""
        user = self._users.users().get(session.user)
        return user if user is not None and user.changed_at == session.changed_at else None

    def _is_ours(self, host: str) -> bool:
        """Whether a request means this console: a name of somebody else's that leads here is a trick on browsers."""
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in self._hosts:
            return True
        if name == "localhost" or name == self._settings.address:
            return True
        try:
            # whoever types a number has been tricked by no name
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _limit(self, scope: Scope) -> int:
        return self._settings.maximum_upload_bytes if scope["path"] in self._uploads else _FORM_BYTES

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Bodies come in time and are no longer than is taken, whatever they say of themselves."""
        taken, most = 0, self._limit(scope)

        async def bounded() -> Message:
            nonlocal taken
            try:
                async with asyncio.timeout(self._settings.idle_timeout_seconds):
                    message = await receive()
            except TimeoutError:
                raise BodyRefused(408, "nothing came for too long") from None
            taken += len(message.get("body", b""))
            if taken > most:
                raise _too_large()
            return message

        return bounded


def _same_origin(headers: Headers, host: str) -> bool:
    if headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = headers.get("origin")
    return origin is None or urlsplit(origin).netloc.lower() == host.lower()


def _log_in_first(scope: Scope, headers: Headers) -> Response:
    if headers.get("hx-request"):
        return Response(status_code=401, headers={"hx-redirect": LOGIN})
    # pictures, scripts and forms are led nowhere: only a person can log in
    if scope["method"] == "POST" or headers.get("sec-fetch-dest", "document") != "document":
        return PlainTextResponse("log in first", 401)
    path = scope["path"]
    wanted = f"?next={quote(path, safe='/')}" if path != "/" and not scope["query_string"] else ""
    return RedirectResponse(LOGIN + wanted, 303)


def _too_large() -> BodyRefused:
    return BodyRefused(413, "larger than this console takes")
