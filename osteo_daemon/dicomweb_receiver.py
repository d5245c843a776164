"""The role `dicomweb`: STOW-RS in front of the same durable intake as the listener's, with the same refusals."""

from __future__ import annotations

import hmac
import ssl
from pathlib import Path

from osteo_daemon.dicom.quota import Quota
from osteo_daemon.dicom.received import received_file
from osteo_daemon.dicom.refusals import Refusals, RefusedObject
from osteo_daemon.dicom.status import StoreStatus, status_of
from osteo_daemon.dicom.tls import ListenerTls
from osteo_daemon.dicomweb.server import HttpServer
from osteo_daemon.dicomweb.service import ServiceLimits, StoreRequest, StoreService
from osteo_daemon.dicomweb.store_response import StoredPart
from osteo_daemon.discards import Discards
from osteo_daemon.domain.job import Priority
from osteo_daemon.errors import ConfigurationError, DataSetMismatch, OsteoError, SpoolFull
from osteo_daemon.intake import DurableIntake
from osteo_daemon.jobs.room import Room
from osteo_daemon.jobs.spool import Spool
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.log import configure_logging, get_logger, where
from osteo_daemon.settings import Settings
from osteo_daemon.stopping import at_the_end
from osteo_daemon.tls import TlsFiles
from osteo_daemon.vitals import Vitals

_SHORTEST_TOKEN = 16


class DicomwebReceiver:
    """The HTTP port with its spool and store.

    Args:
        settings: of the node, with a ``dicomweb.port``.

    Raises:
        ConfigurationError: port, token, certificates or folder cannot be used.
        StoreUnavailable: the job store does not answer.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings.dicomweb
        limits = settings.receiver
        self._spool = Spool(settings.spool_dir, minimum_free_bytes=limits.minimum_free_bytes)
        self._jobs = JobStore(settings.database_url)
        self._intake = DurableIntake(
            self._spool,
            self._jobs,
            {self._settings.source: Priority[self._settings.priority.upper()]},
            Discards(settings.accompanying),
            Room(settings.spool_dir, limits.minimum_free_bytes, limits.low_watermark_bytes),
        )
        self._refusals = Refusals()
        self._quota = Quota(settings.quotas, settings.sources, self._settings.maximum_requests)
        if self._settings.token_file is not None:
            read_token(self._settings.token_file)  # a node without a usable token refuses to start
        service = StoreService(
            self.store,
            self._intake.association_closed,
            self._authorised,
            lambda address, reason: self._refuse("web_request_refused", address, reason),
            ServiceLimits(
                maximum_part_bytes=self._settings.maximum_part_bytes,
                maximum_request_bytes=self._settings.maximum_request_bytes,
                maximum_requests=self._settings.maximum_requests,
                idle_seconds=self._settings.idle_timeout_seconds,
            ),
        )
        self._server = HttpServer(
            service.application(),
            self._settings.address,
            self._settings.port,
            idle_seconds=self._settings.idle_timeout_seconds,
            maximum_requests=self._settings.maximum_requests,
            context=_context(settings),
            certificates=frozenset(self._settings.certificates),
            refused=lambda address, reason: self._refuse("connection_refused", address, reason),
        )

    @property
    def port(self) -> int:
        """The port listened on."""
        return self._server.port

    def run(self, vitals: Vitals | None = None) -> None:
        """Serve until `stop`, and say so."""
        try:
            if vitals is None:
                self._server.run()
            else:
                self._server.run(vitals.ready, vitals.alive)
        finally:
            self._refusals.close()
            self._jobs.close()

    def stop(self) -> None:
        """Finish what is under way and end; from any thread."""
        self._server.stop()

    def store(self, body: bytearray, request: StoreRequest) -> StoredPart:
        """Make one Part 10 file durable, or say why not."""
        sop_class = sop_instance = study = ""
        no_room = False
        try:
            received = received_file(
                body, source_ae=self._settings.source, address=request.address, association_id=request.identifier
            )
            sop_class, sop_instance = received.identifiers.sop_class_uid, received.identifiers.sop_instance_uid
            study = received.identifiers.study_instance_uid
            if request.study_instance_uid not in ("", study):
                raise DataSetMismatch("the object is of another study than the URL")
            self._quota.charge(self._settings.source, request.address, len(body))
            try:
                self._intake.accept(received)
            except BaseException:
                self._quota.refund(self._settings.source, request.address, len(body))
                raise
            return StoredPart(sop_class, sop_instance)
        except OsteoError as error:
            status, reason, no_room = status_of(error), str(error), isinstance(error, SpoolFull)
        except OSError as error:
            status, reason = StoreStatus.OUT_OF_RESOURCES, f"the spool failed: {error.strerror}"
        except Exception as error:  # noqa: BLE001
            # the edge of this role's loop: the sender must hear a failure, and the next object is another chance
            get_logger().error("store_failed", error=type(error).__name__, detail=where(error.__traceback__))
            status, reason = StoreStatus.PROCESSING_FAILURE, "an error of this node"
        self._refusals.tell_object(
            RefusedObject(status, sop_class, sop_instance, study),
            address=request.address,
            ae_title=self._settings.source,
            reason=reason,
        )
        self._refusals.settle()
        return StoredPart(sop_class, sop_instance, int(status), no_room)

    def _refuse(self, event: str, address: str, reason: str) -> None:
        self._refusals.tell(event, address=address, reason=reason)
        self._refusals.settle()

    def _authorised(self, field: str) -> bool:
        """Whether a request shows the token; without a token file the certificate has shown enough."""
        if self._settings.token_file is None:
            return True
        scheme, _, shown = field.partition(" ")
        try:
            # read anew: a token is replaced without a restart
            expected = read_token(self._settings.token_file)
        except ConfigurationError as error:
            get_logger().error("token_unusable", reason=error.detail)
            return False
        return scheme.lower() == "bearer" and hmac.compare_digest(shown.strip().encode(), expected.encode())


def read_token(path: Path) -> str:
    """The bearer token of a file.

    Raises:
        ConfigurationError: it can't be read, or is too short to be a secret.
    """
    try:
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"dicomweb.token_file cannot be read: {type(error).__name__}") from None
    if len(token) < _SHORTEST_TOKEN:
        raise ConfigurationError(f"dicomweb.token_file holds no token of {_SHORTEST_TOKEN} characters or more")
    return token


def _context(settings: Settings) -> ssl.SSLContext | None:
    own = settings.tls
    if settings.dicomweb.tls == "none" or own.certificate_file is None or own.key_file is None or own.ca_file is None:
        return None
    files = TlsFiles(own.certificate_file, own.key_file, own.ca_file, own.crl_file)
    certificates = ListenerTls(files, own.expiry_warning_days)
    context = certificates.context
    if settings.dicomweb.tls == "server":
        context.verify_mode = ssl.CERT_NONE

    def present(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        # a renewed certificate is shown from the next handshake on; who is believed changes with a restart
        certificates.refresh()
        if certificates.context is not context:
            connection.context = certificates.context

    context.sni_callback = present
    return context


def run(settings: Settings) -> int:
    """Receive over HTTP until SIGTERM or SIGINT; returns the exit status.

    Raises:
        ConfigurationError: it is off, or port, token, certificates or folder cannot be used.
    """
    configure_logging(settings.log, "dicomweb")
    if not settings.dicomweb.port:
        raise ConfigurationError("dicomweb.port is 0: nothing to listen on")
    vitals = Vitals(settings.state_dir, "dicomweb")
    receiver = DicomwebReceiver(settings)
    at_the_end(receiver.stop)
    get_logger().info("dicomweb_listening", address=settings.dicomweb.address, port=receiver.port)
    with vitals:
        receiver.run(vitals)
    get_logger().info("stopped")
    return 0
