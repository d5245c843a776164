"""Send result objects to a peer: the bytes of the file, over one association, with a verdict for each."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pydicom
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import _config, build_context
from pynetdicom.association import Association
from pynetdicom.presentation import PresentationContext

from osteo_daemon.dicom.peer import association
from osteo_daemon.domain.study import RemoteAE
from osteo_daemon.errors import PeerBusy, PeerUnavailable, Refused

# a file given by its path is sent as it is, never decoded (pynetdicom's documented switch)
_config.STORE_SEND_CHUNKED_DATASET = True

STORED_WITH_WARNING = frozenset({0xB000, 0xB006, 0xB007})
"""Coercion of data elements, elements discarded, data set does not match the class: stored (PS3.4 B.2.3)."""

_SUCCESS = 0x0000
_OUT_OF_RESOURCES = range(0xA700, 0xA800)
_TRANSIENT = frozenset({0x0110, 0x0213})
"""Processing failure and resource limitation (PS3.7 annex C): the peer's own trouble, not the object's."""


class SpooledObject(Protocol):
    """A report object in the spool."""

    @property
    def sop_class_uid(self) -> str:
        """SOP Class UID."""

    @property
    def sop_instance_uid(self) -> str:
        """SOP Instance UID."""

    @property
    def path(self) -> Path:
        """Part 10 file in Explicit VR Little Endian."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a peer answered for one object.

    Attributes:
        status: the C-STORE status as ``0x0000``, or ``no-context`` when it accepts no context for the class.
        error: None when the object is stored.
    """

    sop_instance_uid: str
    status: str
    error: PeerUnavailable | Refused | None


def judge(status: int, what: str) -> PeerUnavailable | Refused | None:
    """The error of a C-STORE status, None for success and for warnings, which mean stored.

    Classes of PS3.4 B.2.3 and PS3.7 annex C: A7xx (the peer has no room for anything) and its own processing failures
    (it may be this object alone) may succeed later; all other failures (0122, 0124, A9xx, Cxxx, ...) are for good.
    """
    if status == _SUCCESS or status in STORED_WITH_WARNING:
        return None
    text = f"{what}: status 0x{status:04X}"
    if status in _OUT_OF_RESOURCES:
        return PeerUnavailable(text)
    if status in _TRANSIENT:
        return PeerBusy(text)
    return Refused(text)


def send_objects(
    peer: RemoteAE,
    calling_ae_title: str,
    objects: Sequence[SpooledObject],
    *,
    connect_timeout_seconds: float,
    dimse_timeout_seconds: float,
    choose: Callable[[SpooledObject, Sequence[Verdict]], bool] | None = None,
    answered: Callable[[Verdict], None] | None = None,
) -> tuple[Verdict, ...]:
    """Send objects in order over one association; the first transient failure ends it.

    The peer gets the file's own data set bytes. Only a peer that takes nothing but Implicit VR Little Endian, DICOM's
    default, gets a conversion, which is the same each time.

    Args:
        choose: asked before each object with the verdicts so far; False leaves it out.
        answered: called with each verdict at once.

    Returns:
        A verdict for each object that was tried.

    Raises:
        PeerUnavailable: no association for now.
        Refused: the peer rejects the association for good.
    """
    verdicts: list[Verdict] = []
    with association(
        peer,
        calling_ae_title,
        result_contexts(entry.sop_class_uid for entry in objects),
        connect_timeout_seconds=connect_timeout_seconds,
        dimse_timeout_seconds=dimse_timeout_seconds,
    ) as link:
        for number, entry in enumerate(objects, start=1):
            if choose is not None and not choose(entry, verdicts):
                continue
            verdict = _send(link, entry, number, peer.ae_title)
            verdicts.append(verdict)
            if answered is not None:
                answered(verdict)
            if isinstance(verdict.error, PeerUnavailable):
                break
    return tuple(verdicts)


def result_contexts(sop_classes: Iterable[str]) -> list[PresentationContext]:
    """The presentation contexts proposed for objects of these classes."""
    # one context for each syntax: only so the acceptor can take both and we choose (PS3.8 9.3.2.2)
    return [
        build_context(uid, syntax)
        for uid in dict.fromkeys(sop_classes)
        for syntax in (ExplicitVRLittleEndian, ImplicitVRLittleEndian)
    ]


def _send(link: Association, entry: SpooledObject, message_id: int, peer: str) -> Verdict:
    uid = entry.sop_instance_uid
    if not link.is_established:
        return Verdict(uid, "no-answer", PeerUnavailable(f"{peer} ended the association"))
    syntaxes = {
        context.transfer_syntax[0]
        for context in link.accepted_contexts
        if context.abstract_syntax == entry.sop_class_uid
    }
    if not syntaxes:
        return Verdict(uid, "no-context", Refused(f"{peer} accepts no presentation context for {entry.sop_class_uid}"))
    source: Path | pydicom.Dataset = entry.path
    if ExplicitVRLittleEndian not in syntaxes:
        source = _implicit(entry.path)
    answer = link.send_c_store(source, msg_id=message_id)
    status = answer.get("Status")
    if status is None:
        return Verdict(uid, "no-answer", PeerUnavailable(f"{peer} gave no answer in time or ended the association"))
    return Verdict(uid, f"0x{status:04X}", judge(int(status), peer))


def _implicit(path: Path) -> pydicom.Dataset:
    buffer = io.BytesIO()
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    pydicom.dcmwrite(buffer, dataset, implicit_vr=True, little_endian=True, enforce_file_format=True)
    buffer.seek(0)
    return pydicom.dcmread(buffer)
