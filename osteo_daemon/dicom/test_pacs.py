"""A small PACS for demonstrations: takes results over C-STORE on loopback, writes each to a file, answers C-FIND on it.

It keeps nothing durable and screens no one; it is no part of the node.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Final

from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian
from pynetdicom import AE, evt
from pynetdicom.events import Event
from pynetdicom.sop_class import (
    BasicTextSRStorage,
    Comprehensive3DSRStorage,
    ComprehensiveSRStorage,
    EncapsulatedPDFStorage,
    EnhancedSRStorage,
    KeyObjectSelectionDocumentStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    StudyRootQueryRetrieveInformationModelFind,
    Verification,
)

SUCCESS: Final = 0x0000
OUT_OF_RESOURCES: Final = 0xA700
_PENDING: Final = 0xFF00

_FILE_NAMES: Final = {
    Comprehensive3DSRStorage: "report",
    ComprehensiveSRStorage: "report",
    EnhancedSRStorage: "report",
    BasicTextSRStorage: "report",
    KeyObjectSelectionDocumentStorage: "key-objects",
    EncapsulatedPDFStorage: "document",
    SecondaryCaptureImageStorage: "picture",
    SegmentationStorage: "segmentation",
}


def serve_test_pacs(ae_title: str, port: int, folder: Path) -> None:
    """Serve until SIGTERM or SIGINT; files are named by kind and the digest of their SOP Instance UID."""
    folder.mkdir(parents=True, exist_ok=True)

    def store(event: Event) -> int:
        request = event.request
        path = folder / f"{_FILE_NAMES[request.AffectedSOPClassUID]}-{_name(request.AffectedSOPInstanceUID)}.dcm"
        part = path.with_suffix(".part")
        try:
            part.write_bytes(event.encoded_dataset())
            part.replace(path)
        except OSError:
            return OUT_OF_RESOURCES
        return SUCCESS

    def find(event: Event) -> Iterator[tuple[int, Dataset | None]]:
        uid = str(event.identifier.get("SOPInstanceUID", ""))
        if any(folder.glob(f"*-{_name(uid)}.dcm")):
            match = Dataset()
            match.QueryRetrieveLevel = "IMAGE"
            match.SOPInstanceUID = uid
            yield _PENDING, match

    entity = AE(ae_title=ae_title)
    for sop_class in _FILE_NAMES:
        entity.add_supported_context(sop_class, [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
    entity.add_supported_context(Verification)
    entity.add_supported_context(StudyRootQueryRetrieveInformationModelFind)
    server = entity.start_server(
        ("127.0.0.1", port),
        block=False,
        evt_handlers=[
            (evt.EVT_C_STORE, store),
            (evt.EVT_C_FIND, find),
            (evt.EVT_C_ECHO, lambda _event: SUCCESS),
        ],
    )
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    stop.wait()
    if server is not None:
        server.shutdown()


def _name(sop_instance_uid: str) -> str:
    return sha256(str(sop_instance_uid).encode()).hexdigest()[:16]
