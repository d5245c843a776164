"""A modality that does not give up: it keeps a ledger of what was acknowledged and sends the rest again.

python -m tests.e2e.send PORT LEDGER FILE...
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pydicom
from pynetdicom import AE, _config
from pynetdicom.sop_class import CTImageStorage  # type: ignore[attr-defined]

from tests.fakes import CALLED, CALLING, LOOPBACK


def main(port: int, ledger: Path, files: list[Path]) -> int:
    _config.LOG_HANDLER_LEVEL = "none"
    entity = AE(ae_title=CALLING)
    entity.add_requested_context(CTImageStorage)
    entity.network_timeout = 10
    waiting = {str(dataset.SOPInstanceUID): dataset for dataset in map(pydicom.dcmread, files)}
    deadline = time.monotonic() + 90
    while waiting and time.monotonic() < deadline:
        association = entity.associate(LOOPBACK, port, ae_title=CALLED)
        if not association.is_established:
            time.sleep(0.3)
            continue
        with ledger.open("a") as acknowledged:
            for uid, dataset in list(waiting.items()):
                if not association.is_established:
                    break
                try:
                    answer = association.send_c_store(dataset)
                except RuntimeError:  # the peer went away between two objects
                    break
                if "Status" in answer and answer.Status == 0x0000:
                    acknowledged.write(f"{uid}\n")
                    acknowledged.flush()
                    del waiting[uid]
        if association.is_established:
            association.release()
    return 0 if not waiting else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), [Path(name) for name in sys.argv[3:]]))
