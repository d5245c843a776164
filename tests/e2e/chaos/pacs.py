"""An archive that counts, as a process: python -m tests.e2e.chaos.pacs PORT LEDGER MOOD

LEDGER gets one JSON line for each C-STORE before it is answered. MOOD is a file: ``ok``, ``refuse`` (0xA700 to all) or
``hang`` (no answer for a long time). A PACS that is down is this process killed.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import AE, AllStoragePresentationContexts, _config, evt
from pynetdicom.presentation import build_context
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]

from tests.fakes import LOOPBACK

TITLE = "PACS"
_HANG_SECONDS = 30.0
_OUT_OF_RESOURCES = 0xA700


def main(port: int, ledger: Path, mood: Path) -> None:
    _config.LOG_HANDLER_LEVEL = "none"
    lock = threading.Lock()

    def store(event: Any) -> int:
        dataset: Dataset = event.dataset
        wish = mood.read_text().strip()
        status = _OUT_OF_RESOURCES if wish == "refuse" else 0x0000
        entry = {
            "uid": str(event.request.AffectedSOPInstanceUID),
            "class": str(event.request.AffectedSOPClassUID),
            "study": str(dataset.StudyInstanceUID),
            "digest": hashlib.sha256(event.encoded_dataset(include_meta=False)).hexdigest(),
            "status": status,
            "sources": [
                str(instance.ReferencedSOPInstanceUID)
                for series in dataset.get("ReferencedSeriesSequence", ())
                for instance in series.ReferencedInstanceSequence
            ],
            "evidence": _referenced(dataset.get("CurrentRequestedProcedureEvidenceSequence")),
            "predecessors": _referenced(dataset.get("PredecessorDocumentsSequence")),
            "at": time.time(),
        }
        with lock, ledger.open("a") as received:
            received.write(json.dumps(entry) + "\n")
        if wish == "hang":
            time.sleep(_HANG_SECONDS)
        return status

    entity = AE(ae_title=TITLE)
    entity.supported_contexts = [
        *(build_context(context.abstract_syntax) for context in AllStoragePresentationContexts),
        build_context(Verification),
    ]
    entity.start_server((LOOPBACK, port), block=True, evt_handlers=[(evt.EVT_C_STORE, store)])


def _referenced(studies: Any) -> list[str]:
    """SOP Instance UIDs that a sequence of studies, series and instances refers to (PS3.3 C.17.2)."""
    return [
        str(instance.ReferencedSOPInstanceUID)
        for study in studies or ()
        for series in study.ReferencedSeriesSequence
        for instance in series.ReferencedSOPSequence
    ]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
