"""A modality that does not give up, as a process: python -m tests.e2e.chaos.modality PORT LEDGER QUEUE

QUEUE is a folder; each file in it names, one a line, the objects of a study to send. LEDGER gets one JSON line for each
acknowledged object: its UID, its study and the digest of the pixels that were sent. What is not acknowledged is sent
again, whatever happens to the node. A file named ``end`` in the queue ends the process when all is acknowledged.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import pydicom
from pynetdicom import AE, _config
from pynetdicom.sop_class import CTImageStorage  # type: ignore[attr-defined]

from tests.fakes import CALLED, CALLING, LOOPBACK


def main(port: int, ledger: Path, queue: Path) -> int:
    _config.LOG_HANDLER_LEVEL = "none"
    entity = AE(ae_title=CALLING)
    entity.add_requested_context(CTImageStorage)
    entity.acse_timeout = entity.network_timeout = entity.connection_timeout = 10
    entity.dimse_timeout = 40  # longer than the store may be locked
    while True:
        for task in sorted(queue.glob("*.txt")):
            waiting = [pydicom.dcmread(line) for line in task.read_text().split()]
            while waiting:
                _send(entity, port, ledger, waiting)
            task.rename(task.with_suffix(".sent"))
        if (queue / "end").exists() and not list(queue.glob("*.txt")):
            return 0
        time.sleep(0.05)


def _send(entity: Any, port: int, ledger: Path, waiting: list[Any]) -> None:
    """One association: what is acknowledged leaves ``waiting``."""
    association = entity.associate(LOOPBACK, port, ae_title=CALLED)
    if not association.is_established:
        time.sleep(0.2)
        return
    with ledger.open("a") as acknowledged:
        for dataset in list(waiting):
            if not association.is_established:
                return
            try:
                answer = association.send_c_store(dataset)
            except RuntimeError:  # the peer went away between two objects
                return
            if "Status" not in answer:
                return
            if answer.Status != 0x0000:
                time.sleep(0.1)
                break
            entry = {
                "uid": str(dataset.SOPInstanceUID),
                "study": str(dataset.StudyInstanceUID),
                "pixels": hashlib.sha256(dataset.PixelData).hexdigest(),
                "at": time.time(),
            }
            acknowledged.write(json.dumps(entry) + "\n")
            acknowledged.flush()
            waiting.remove(dataset)
    if association.is_established:
        association.release()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])))
