"""STOW-RS as an HTTP application: the parts of a request go one by one into a store that answers when they are durable.

One part is in memory at a time. Whoever is silent, slow or long is cut off; whoever is unknown is told so before a byte
of the body is read.
"""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from osteo_daemon.dicomweb.multipart import MultipartReader, boundary_of, media_type_of
from osteo_daemon.dicomweb.store_response import DICOM_JSON, DICOM_XML, StoredPart, http_status, store_response
from osteo_daemon.errors import MalformedMessage
from osteo_daemon.log import get_logger

_DICOM: Final = "application/dicom"
_CANNOT_UNDERSTAND: Final = 0xC000
_LEAST_BYTES_PER_SECOND: Final = 16384
_RETRY_AFTER_SECONDS: Final = "30"
_UID: Final = re.compile(r"[0-9.]{1,64}")


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """One request, as long as it lasts.

    Attributes:
        identifier: what its objects have in common.
        address: of the sender.
        study_instance_uid: that the URL names; empty when it names none.
    """

    identifier: str
    address: str
    study_instance_uid: str


Store = Callable[[bytearray, StoreRequest], StoredPart]
"""Makes the bytes of a Part 10 file durable."""


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """Bounds of one request, and how many run at a time."""

    maximum_part_bytes: int
    maximum_request_bytes: int
    maximum_requests: int
    idle_seconds: float


class _Ended(Exception):
    """The request ends here with this status."""

    def __init__(self, status: int, reason: str) -> None:
        self.status = status
        self.reason = reason
        super().__init__(reason)


class StoreService:
    """The application.

    Args:
        store: called in a thread for each part.
        ended: called in a thread with a request's id when nothing more comes of it.
        authorised: given the value of the Authorization field (empty when there is none).
        stranger: told the address and the reason when somebody unknown is refused.
        limits: of each request.
    """

    def __init__(
        self,
        store: Store,
        ended: Callable[[str], None],
        authorised: Callable[[str], bool],
        stranger: Callable[[str, str], None],
        limits: ServiceLimits,
    ) -> None:
        self._store = store
        self._ended = ended
        self._authorised = authorised
        self._stranger = stranger
        self._limits = limits
        self._running = 0

    def application(self) -> Starlette:
        """POST to /studies and /studies/{study}; all else is refused."""
        return Starlette(
            routes=[
                Route("/studies", self._post, methods=["POST"]),
                Route("/studies/{study}", self._post, methods=["POST"]),
            ]
        )

    async def _post(self, request: Request) -> Response:
        started = time.monotonic()
        parts: list[StoredPart] = []
        try:
            media_type = self._admit(request)
            self._running += 1
            try:
                await self._receive(request, parts)
            finally:
                self._running -= 1
        except _Ended as end:
            return self._refuse(request, end, sum(part.failure is None for part in parts))
        status = http_status(parts)
        get_logger().info(
            "web_request_ended",
            address=_address(request),
            status=str(status),
            instances=sum(part.failure is None for part in parts),
            affected=sum(part.failure is not None for part in parts),
            duration_s=round(time.monotonic() - started, 3),
        )
        headers = {"Retry-After": _RETRY_AFTER_SECONDS} if status >= 500 else {}
        return Response(store_response(parts, media_type), status_code=status, headers=headers, media_type=media_type)

    def _refuse(self, request: Request, end: _Ended, stored: int) -> Response:
        headers = {"Connection": "close"}
        if end.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
            self._stranger(_address(request), end.reason)
        else:
            get_logger().warning(
                "web_request_refused",
                address=_address(request),
                status=str(end.status),
                reason=end.reason,
                instances=stored,
            )
        if end.status == 503:
            headers["Retry-After"] = _RETRY_AFTER_SECONDS
        return Response(f"{end.reason}\n", status_code=end.status, headers=headers, media_type="text/plain")

    def _admit(self, request: Request) -> str:
        """Refuse before a byte of the body is read, or give the media type of the answer."""
        if not self._authorised(request.headers.get("authorization", "")):
            raise _Ended(401, "a bearer token is needed")
        if self._running >= self._limits.maximum_requests:
            raise _Ended(503, "too many requests at once")
        if not _UID.fullmatch(request.path_params.get("study", "1")):
            raise _Ended(400, "the URL names no study")
        kind, parameters = media_type_of(request.headers.get("content-type", ""))
        if kind != "multipart/related" or parameters.get("type", _DICOM).lower() != _DICOM:
            raise _Ended(415, f"only multipart/related of {_DICOM} is taken")
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._limits.maximum_request_bytes:
            raise _Ended(413, "the request is too long")
        accepted = request.headers.get("accept", "*/*").lower()
        if DICOM_JSON in accepted or "*/*" in accepted or "application/*" in accepted or "application/json" in accepted:
            return DICOM_JSON
        if DICOM_XML in accepted:
            return DICOM_XML
        raise _Ended(406, f"the answer is {DICOM_JSON} or {DICOM_XML}")

    async def _receive(self, request: Request, parts: list[StoredPart]) -> None:
        whole = StoreRequest(uuid.uuid4().hex, _address(request), request.path_params.get("study", ""))
        try:
            reader = MultipartReader(boundary_of(request.headers["content-type"]), self._limits.maximum_part_bytes)
            pace = _Pace(self._limits)
            while (data := await pace.next(request)) is not None:
                for part in reader.feed(data):
                    if part.media_type not in ("", _DICOM):
                        parts.append(StoredPart("", "", _CANNOT_UNDERSTAND))
                        continue
                    began = time.monotonic()
                    parts.append(await asyncio.to_thread(self._store, part.body, whole))
                    pace.ours(time.monotonic() - began)
            reader.close()
        except MalformedMessage as error:
            # what came before is stored; the same request again finds it here
            raise _Ended(400, error.detail) from error
        finally:
            if parts:
                await asyncio.to_thread(self._ended, whole.identifier)
        if not parts:
            raise _Ended(400, "the request holds no part")


class _Pace:
    """Reads a body, within its bounds of length, silence and slowness."""

    def __init__(self, limits: ServiceLimits) -> None:
        self._limits = limits
        self._started = time.monotonic()
        self._bytes = 0
        self._whole = False

    def ours(self, seconds: float) -> None:
        """So long the sender waited for us."""
        self._started += seconds

    async def next(self, request: Request) -> bytes | None:
        """The next bytes; None after the last."""
        idle = self._limits.idle_seconds
        if self._whole:
            return None
        while True:
            allowed = idle + self._bytes / _LEAST_BYTES_PER_SECOND
            remaining = min(self._started + allowed - time.monotonic(), idle)
            if remaining <= 0:
                raise _Ended(408, "the body comes too slowly")
            try:
                message = await asyncio.wait_for(request.receive(), remaining)
            except TimeoutError:
                raise _Ended(408, "the body comes too slowly") from None
            if message["type"] != "http.request":
                raise _Ended(400, "the sender hung up")
            body: bytes = message.get("body", b"")
            self._bytes += len(body)
            if self._bytes > self._limits.maximum_request_bytes:
                raise _Ended(413, "the request is too long")
            self._whole = not message.get("more_body", False)
            if body or self._whole:
                return body


def _address(request: Request) -> str:
    return request.client.host if request.client is not None else ""
