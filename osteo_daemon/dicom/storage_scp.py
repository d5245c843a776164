"""Storage and Verification SCP: hands each received object, raw, to a callback and answers with what became of it.

The callback returns only when the object is durable: success means durable. Nothing is decoded here. Destinations may
report here on their storage commitments: PACSs report to the port of the AE that asked.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pynetdicom import AE, _config, evt

from osteo_daemon.certificates import certificate_of
from osteo_daemon.dicom.admission import CONGESTION, LIMIT_EXCEEDED, Admission, Caller, Rejection
from osteo_daemon.dicom.arrivals import Arrivals
from osteo_daemon.dicom.bounded_socket import ListenerLimits
from osteo_daemon.dicom.buffers import BufferBudget
from osteo_daemon.dicom.commitment import CommitmentReport, answer_report, commitment_context
from osteo_daemon.dicom.contexts import supported_contexts, verification_context
from osteo_daemon.dicom.listener import HardenedServer
from osteo_daemon.dicom.negotiation import Negotiation
from osteo_daemon.dicom.normalized import NormalizedServices
from osteo_daemon.dicom.quota import Quota
from osteo_daemon.dicom.received import Incoming, ReceivedObject, printable
from osteo_daemon.dicom.refusals import Refusals, RefusedObject
from osteo_daemon.dicom.status import StoreStatus
from osteo_daemon.dicom.streaming import is_busy
from osteo_daemon.dicom.tls import ListenerTls, tls_files
from osteo_daemon.dicom.uids import ASSOCIATION_VERSION_NAME, IMPLEMENTATION_CLASS_UID
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.log import get_logger, where
from osteo_daemon.settings import DestinationSettings, QuotaSettings, ReceiverSettings, SourceSettings, TlsSettings

_IDLE_SECONDS = 2.0
_POLL_SECONDS = 0.05


@dataclass(slots=True)
class _Sender:
    """What came over one association since its first C-STORE; times of the monotonic clock, in seconds."""

    first: float
    last: float
    stored: int = 0
    stored_bytes: int = 0


class StorageScp:
    """A listener for one AE title.

    Args:
        settings: address, port, limits; port 0 takes a free one (see `port`).
        sources: who may associate; nobody when empty.
        store: makes an object durable; its OsteoError decides the answer.
        closed: called with the association id when an association has ended.
        destinations: who may report on storage commitments, from the address that their host has at the start.
        reported: makes a report durable, given the peer's AE title; its KeyError says that it is on nothing of ours.
        tls: a second port, or the only one.
        quotas: what one sender may take.
        begin_file: a place for an object's bytes while they arrive.
        services: what sources may ask of us beside storing.
        crowded: whether room is so scarce that sources of backfill wait.

    Raises:
        ConfigurationError: the address cannot be listened on, or the certificates cannot be used.
    """

    def __init__(
        self,
        settings: ReceiverSettings,
        sources: tuple[SourceSettings, ...],
        store: Callable[[ReceivedObject], object],
        closed: Callable[[str], None] = lambda _association_id: None,
        destinations: tuple[DestinationSettings, ...] = (),
        reported: Callable[[str, CommitmentReport], None] | None = None,
        tls: TlsSettings = TlsSettings(),  # noqa: B008 - frozen
        quotas: QuotaSettings = QuotaSettings(),  # noqa: B008 - frozen
        *,
        begin_file: Callable[[], Incoming],
        services: NormalizedServices = NormalizedServices(),  # noqa: B008 - frozen
        crowded: Callable[[], bool] = lambda: False,
    ) -> None:
        _config.LOG_HANDLER_LEVEL = "none"  # its own event log prints titles and addresses of every PDU
        # two of its errors for every connection that ends early: what is worth a line gets one here
        logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)
        self._settings = settings
        self._closed = closed
        self._reported = reported
        self._services = services
        self._crowded = crowded
        self._backfill = frozenset(source.ae_title for source in sources if source.priority == "backfill")
        self._commitments = services.has_actions or any(
            entry.kind == "dicom" and entry.commitment == "storage-commitment" for entry in destinations
        )
        files = tls_files(tls)
        self._tls = None if files is None else ListenerTls(files, tls.expiry_warning_days)
        reporters = destinations if reported is not None else ()
        self._admission = Admission(settings.ae_title, sources, reporters, secured=files is not None)
        self._quota = Quota(quotas, sources, settings.maximum_associations)
        self._refusals = Refusals()
        self._negotiation = Negotiation(self._refusals)
        self._budget = BufferBudget(settings.maximum_buffered_bytes)
        self._arrivals = Arrivals(begin_file, store, self._quota, self._note, _association_id, self._refusals)
        self._senders: dict[str, _Sender] = {}
        self._lock = threading.Lock()
        self._plain = None if tls.only else self._listen(settings.port, None)
        try:
            self._secured = None if self._tls is None else self._listen(tls.port, self._tls)
        except ConfigurationError:
            if self._plain is not None:
                self._plain.shutdown_unstarted()
            raise
        self._servers = [server for server in (self._plain, self._secured) if server is not None]
        self._threads = [
            threading.Thread(target=server.serve_forever, args=(_POLL_SECONDS,), name="listener")
            for server in self._servers
        ]

    def _listen(self, port: int, tls: ListenerTls | None) -> HardenedServer:
        settings = self._settings
        entity = AE(ae_title=settings.ae_title)
        contexts = [*supported_contexts(), *self._services.contexts()]
        if self._commitments:
            contexts.append(commitment_context())
        entity.implementation_class_uid = IMPLEMENTATION_CLASS_UID
        entity.implementation_version_name = ASSOCIATION_VERSION_NAME
        entity.maximum_pdu_size = settings.maximum_pdu_bytes
        entity.acse_timeout = settings.acse_timeout_seconds
        entity.dimse_timeout = settings.dimse_timeout_seconds
        entity.network_timeout = settings.network_timeout_seconds
        # counted here instead: the library's count includes connections that never said a word
        entity.maximum_associations = 1 << 30
        limits = ListenerLimits(
            networks=self._admission.networks,
            associate_seconds=settings.acse_timeout_seconds,
            pdu_seconds=settings.dimse_timeout_seconds,
            maximum_pdu_bytes=settings.maximum_pdu_bytes,
            maximum_object_bytes=settings.maximum_object_bytes,
        )
        handlers = [
            (evt.EVT_REQUESTED, self._on_requested),
            (evt.EVT_ACCEPTED, self._negotiation.accepted),
            (evt.EVT_C_STORE, self._on_unread_store),
            (evt.EVT_C_ECHO, self._on_echo),
            (evt.EVT_N_EVENT_REPORT, self._on_report),
            *self._services.handlers(self._refusals, self._quota),
            (evt.EVT_CONN_CLOSE, self._on_closed),
            (evt.EVT_ABORTED, self._on_aborted),
        ]
        try:
            server: HardenedServer = entity.make_server(
                (settings.address, port),
                ae_title=settings.ae_title,
                contexts=contexts,
                evt_handlers=handlers,
                server_class=HardenedServer,
                limits=limits,
                refusals=self._refusals,
                budget=self._budget,
                judge=self._turned_away,
                tls=tls,
                begin=self._arrivals.begin,
            )
        except OSError as error:
            where = f"{settings.address} port {port}"
            key = "receiver.port" if tls is None else "tls.port"
            raise ConfigurationError(
                f"receiver: cannot listen on {where}: {error.strerror}; another node? {key} sets it"
            ) from error
        entity._servers.append(server)  # as AE.start_server does; shutdown() takes it out again
        return server

    @property
    def port(self) -> int:
        """The plain port listened on; the TLS port where there is no plain one."""
        return int(self._servers[0].server_address[1])

    @property
    def tls_port(self) -> int:
        """The TLS port listened on; 0: none."""
        return 0 if self._secured is None else int(self._secured.server_address[1])

    def start(self) -> None:
        """Accept associations in threads of their own."""
        for thread in self._threads:
            thread.start()

    @property
    def silent_seconds(self) -> float:
        """How long ago the thread that takes connections came round, of the port where that is longest."""
        return time.monotonic() - min(server.came_round_at for server in self._servers)

    def reload_certificates(self) -> None:
        """Load certificates, CA and revocation lists now; broken ones change nothing."""
        if self._tls is not None:
            self._tls.refresh(at_once=True)

    def stop(self, grace_seconds: float) -> None:
        """Stop accepting; let associations finish; end those that are idle, and all when the grace is over."""
        for server, thread in zip(self._servers, self._threads, strict=True):
            server.shutdown()
            thread.join()
        deadline = time.monotonic() + grace_seconds
        while associations := [
            entry for server in self._servers for entry in server.active_associations if entry.is_established
        ]:
            now = time.monotonic()
            for association in associations:
                if now > deadline or self._idle(association, now):
                    association.abort(block=False)
            if now > deadline + _IDLE_SECONDS:
                break
            time.sleep(_POLL_SECONDS)
        for server in self._servers:
            server.hang_up_all()
        self._refusals.close()

    def _idle(self, association: Any, now: float) -> bool:
        if is_busy(association):
            return False
        with self._lock:
            sender = self._senders.get(_association_id(association))
        return sender is None or now - sender.last > _IDLE_SECONDS

    def _on_requested(self, event: Any) -> None:
        """AE titles, address and certificate must agree with the settings (PS3.8 9.3.4), and the quotas have room."""
        association = event.assoc
        try:
            request = association.requestor.primitive
            caller = Caller(
                request.called_ae_title.strip(),
                request.calling_ae_title.strip(),
                association.requestor.address,
                certificate_of(association.dul.socket.socket),
            )
            decision = self._admission.judge(caller)
            if decision.reason:  # it was asked before; the library may read a title otherwise
                self._reject(association, caller, decision.reason, decision.rejection)
                return
            if caller.calling_ae_title in self._backfill and self._crowded():
                self._reject(association, caller, "little room is left: backfill waits", CONGESTION)
                return
            over = self._quota.admit(
                _association_id(association), caller.calling_ae_title, caller.address, association.is_alive
            )
            if over:
                self._reject(association, caller, over, LIMIT_EXCEEDED)
            elif not decision.may_store:
                association.acceptor.supported_contexts = [verification_context(), commitment_context()]
        except Exception as error:  # noqa: BLE001
            # the library goes on with an association when its handler raises: here it must not
            get_logger().error("association_failed", error=type(error).__name__, detail=where(error.__traceback__))
            association.abort(block=False)

    def _turned_away(self, caller: Caller) -> Rejection | None:
        """Whom the settings do not know is rejected before the rest of its request is looked at."""
        decision = self._admission.judge(caller)
        if not decision.reason:
            return None
        self._tell(caller, decision.reason)
        return decision.rejection

    def _reject(self, association: Any, caller: Caller, reason: str, rejection: Rejection) -> None:
        self._tell(caller, reason)
        association.acse.send_reject(*rejection)
        association.kill()

    def _tell(self, caller: Caller, reason: str) -> None:
        shown = {} if caller.certificate is None else {"certificate": caller.certificate.fingerprint}
        self._refusals.tell(
            "association_refused",
            address=caller.address,
            reason=reason,
            ae_title=printable(caller.calling_ae_title),
            called_ae_title=printable(caller.called_ae_title),
            **shown,
        )

    def _on_echo(self, event: Any) -> int:
        return StoreStatus.SUCCESS

    def _on_report(self, event: Any) -> tuple[int, None]:
        """The end of a storage commitment that the deliverer asked for (PS3.4 J.3.3)."""
        reported, peer = self._reported, event.assoc.requestor.ae_title.strip()

        def take(report: CommitmentReport) -> None:
            if reported is None:
                raise KeyError(report.transaction_uid)
            reported(peer, report)

        return answer_report(event, take), None

    def _on_unread_store(self, event: Any) -> int:
        """A C-STORE-RQ that lacks what every one must have: all others never come to the library."""
        requestor = event.assoc.requestor
        self._refusals.tell_object(
            RefusedObject(StoreStatus.CANNOT_UNDERSTAND),
            address=requestor.address,
            ae_title=printable(requestor.ae_title.strip()),
            reason="a request without what every C-STORE must have",
        )
        return StoreStatus.CANNOT_UNDERSTAND

    def _on_aborted(self, event: Any) -> None:
        get_logger().info("association_aborted", ae_title=printable(event.assoc.requestor.ae_title))

    def _on_closed(self, event: Any) -> None:
        identifier = _association_id(event.assoc)
        self._quota.release(identifier)
        with self._lock:
            sender = self._senders.pop(identifier, None)
        if sender is None:
            return  # it stored nothing, or its end was told already
        get_logger().info(
            "association_ended",
            ae_title=printable(event.assoc.requestor.ae_title.strip()),
            instances=sender.stored,
            bytes=sender.stored_bytes,
            duration_s=round(time.monotonic() - sender.first, 3),
        )
        self._closed(identifier)

    def _note(self, association: Any, stored_bytes: int) -> None:
        now = time.monotonic()
        identifier = _association_id(association)
        with self._lock:
            sender = self._senders.setdefault(identifier, _Sender(first=now, last=now))
            sender.last = now
            if stored_bytes:
                sender.stored += 1
                sender.stored_bytes += stored_bytes


def _association_id(association: Any) -> str:
    identifier: str | None = getattr(association, "osteo_id", None)
    if identifier is None:
        identifier = association.osteo_id = uuid.uuid4().hex
    return identifier
