"""What is negotiated, by whom, and what each status means: read from the tables that the node itself works with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from osteo_daemon.conformance.markdown import code, table
from osteo_daemon.dicom import normalized
from osteo_daemon.dicom.admission import CALLED_UNKNOWN, CALLING_UNKNOWN, CONGESTION, LIMIT_EXCEEDED
from osteo_daemon.dicom.commitment import STORAGE_COMMITMENT_CLASS_UID, commitment_context
from osteo_daemon.dicom.contexts import (
    ACCOMPANYING,
    SCREENED_CLASSES,
    TRANSFER_SYNTAXES,
    class_name,
    verification_context,
)
from osteo_daemon.dicom.instance_availability import INSTANCE_AVAILABILITY_CLASS_UID
from osteo_daemon.dicom.key_objects import KEY_OBJECTS_CLASS_UID
from osteo_daemon.dicom.normalized import NormalizedServices, Service
from osteo_daemon.dicom.performed_procedure import PERFORMED_PROCEDURE_STEP_CLASS_UID
from osteo_daemon.dicom.query import STUDY_ROOT_FIND, find_context
from osteo_daemon.dicom.report import SR_CLASSES
from osteo_daemon.dicom.report_pdf import ENCAPSULATED_PDF_CLASS_UID
from osteo_daemon.dicom.retrieve import STUDY_ROOT_GET, STUDY_ROOT_MOVE, storage_contexts
from osteo_daemon.dicom.secondary_capture import SECONDARY_CAPTURE_CLASS_UID
from osteo_daemon.dicom.segmentation import SEGMENTATION_CLASS_UID
from osteo_daemon.dicom.status import StoreStatus, status_of
from osteo_daemon.dicom.storage_scu import judge, result_contexts
from osteo_daemon.dicom.verification import echo_context
from osteo_daemon.errors import (
    ConflictingInstance,
    DataSetMismatch,
    NotDicom,
    OsteoError,
    PeerUnavailable,
    QuotaExceeded,
    SpoolFull,
    StoreUnavailable,
    UnsupportedSopClass,
)
from osteo_daemon.settings import Settings

RESULT_CLASSES = (
    SEGMENTATION_CLASS_UID,
    *SR_CLASSES.values(),
    KEY_OBJECTS_CLASS_UID,
    SECONDARY_CAPTURE_CLASS_UID,
    ENCAPSULATED_PDF_CLASS_UID,
)
"""Classes of what is sent."""

_REJECTIONS = {
    CALLED_UNKNOWN: "the called AE title is not ours",
    CALLING_UNKNOWN: "calling AE title, address and (over TLS) certificate do not agree with one entry of the settings",
    CONGESTION: "little disk is left: sources of backfill wait",
    LIMIT_EXCEEDED: "too many associations of all peers, of this AE title or of this address",
}
_NORMALIZED_STATUSES = tuple(
    sorted(
        (value, name)
        for name, value in vars(normalized).items()
        if name.isupper() and isinstance(value, int) and name != "MAXIMUM_ITEMS" and not name.startswith("_")
    )
)
_REFUSALS: tuple[OsteoError, ...] = (
    SpoolFull(),
    StoreUnavailable(),
    QuotaExceeded(),
    UnsupportedSopClass(),
    DataSetMismatch(),
    NotDicom(),
    ConflictingInstance(),
    OsteoError(),
)
_ANSWERS = (0x0000, 0xB000, 0xB006, 0xB007, 0x0110, 0x0122, 0x0124, 0x0213, 0xA700, 0xA900, 0xC000)


def services(settings: Settings) -> NormalizedServices:
    """The normalised services that the listener offers under these settings, without what they do."""
    offered = []
    if settings.completeness.mpps:
        offered.append(Service(PERFORMED_PROCEDURE_STEP_CLASS_UID))
    if settings.completeness.ian:
        offered.append(Service(INSTANCE_AVAILABILITY_CLASS_UID))
    return NormalizedServices(tuple(offered))


def overview(settings: Settings) -> str:
    """Every service with the roles of this node."""
    storage = [*SCREENED_CLASSES, *(uid for group in ACCOMPANYING.values() for uid in group)]
    commitment = "yes" if settings.commitment_scp.enabled else "off"
    rows = [
        [class_name("1.2.840.10008.1.1"), "yes", "yes"],
        *([class_name(uid), "yes" if uid in RESULT_CLASSES else "", "yes"] for uid in storage),
        *([class_name(uid), "yes", ""] for uid in RESULT_CLASSES if uid not in storage),
        [class_name(STORAGE_COMMITMENT_CLASS_UID), "yes", commitment],
        [class_name(PERFORMED_PROCEDURE_STEP_CLASS_UID), "", "yes" if settings.completeness.mpps else "off"],
        [class_name(INSTANCE_AVAILABILITY_CLASS_UID), "", "yes" if settings.completeness.ian else "off"],
        *([class_name(uid), "yes", ""] for uid in (STUDY_ROOT_FIND, STUDY_ROOT_MOVE, STUDY_ROOT_GET)),
    ]
    return table(("SOP class", "user (SCU)", "provider (SCP)"), rows)


def accepted_contexts(settings: Settings) -> str:
    """What the listener accepts; the storage classes share one list of transfer syntaxes, given apart."""
    rows = [[class_name(uid), code(uid), "screened", "storage"] for uid in SCREENED_CLASSES]
    for group, uids in ACCOMPANYING.items():
        policy = getattr(settings.accompanying, group.value)
        rows += [[class_name(uid), code(uid), f"{group.value}: {policy}", "storage"] for uid in uids]
    offered = [(context, "") for context in (verification_context(), *services(settings).contexts())]
    offered.append((commitment_context(), "where a destination reports by it, or a source may ask for it"))
    rows += [
        [class_name(str(context.abstract_syntax)), code(context.abstract_syntax), when, _syntaxes(context)]
        for context, when in offered
    ]
    return table(("abstract syntax", "UID", "what becomes of it", "transfer syntaxes"), rows)


def storage_syntaxes() -> str:
    """The transfer syntaxes of storage, in the order of preference."""
    return table(("transfer syntax", "UID"), ((class_name(uid), code(uid)) for uid in TRANSFER_SYNTAXES))


def proposed_contexts() -> str:
    """What the node proposes when it opens associations, by what for."""
    retrieval, roles = storage_contexts()
    rows: list[Sequence[object]] = [["is it there?", *_row(echo_context())]]
    rows += [["results", *_row(context)] for context in result_contexts(RESULT_CLASSES)]
    rows.append(["proof that results are kept, requests and reports", *_row(commitment_context())])
    rows.append(["questions: proof, counts, pull", *_row(find_context())])
    names = ", ".join(class_name(uid) for uid in (STUDY_ROOT_MOVE, STUDY_ROOT_GET))
    counted = f"{len(retrieval)} contexts of storage, {len(roles)} with the SCP role"
    rows.append(["pull", names, f"as the questions; with C-GET {counted}"])
    return table(("for", "abstract syntax", "transfer syntaxes"), rows)


def rejections() -> str:
    """Why an association is rejected."""
    rows = ((*reason, meaning) for reason, meaning in _REJECTIONS.items())
    return table(("result", "source", "reason", "when"), rows)


def store_statuses() -> str:
    """What a sender hears, and of which errors of the node; by the classes themselves."""
    because: dict[StoreStatus, list[str]] = {status: [] for status in StoreStatus}
    for error in _REFUSALS:
        because[status_of(error)].append(str(error).lower())
    rows = [
        [code(f"0x{status:04X}"), status.name.replace("_", " ").lower(), "; ".join(because[status])]
        for status in StoreStatus
    ]
    return table(("status", "meaning", "because"), rows)


def answers_to_us() -> str:
    """What the node makes of a peer's C-STORE status."""
    rows = []
    for status in _ANSWERS:
        error = judge(status, "")
        kept = "the object is stored" if error is None else "the delivery ends for this object and waits for a person"
        rows.append(
            [code(f"0x{status:04X}"), "tried again, with back-off" if isinstance(error, PeerUnavailable) else kept]
        )
    return table(("status", "what follows"), rows)


def normalized_statuses() -> str:
    """Statuses of N-CREATE, N-SET and N-ACTION."""
    return table(
        ("status", "meaning"),
        ((code(f"0x{value:04X}"), name.replace("_", " ").lower()) for value, name in _NORMALIZED_STATUSES),
    )


def _row(context: Any) -> tuple[str, str]:
    return class_name(str(context.abstract_syntax)), _syntaxes(context)


def _syntaxes(context: Any) -> str:
    return ", ".join(class_name(str(uid)) for uid in context.transfer_syntax)
