"""The receiver's memory over 100,000 instances: ``python -m benchmarks.receive_memory``.

Eight senders at once, each with one association after another of 500 small CT slices, of five studies each; resident
memory is read every 5,000 instances. The slope is that of a straight line through the second half: what is kept for
each instance would show there. ``--quick`` sends 3,000.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom.dsutils import encode

from benchmarks.receive import LOOPBACK, TITLE, dcmtk, running
from benchmarks.results import write_result

SENDERS = 8
PER_ASSOCIATION = 500
PER_STUDY = 100
SIDE = 32

# lengths of UIDs are even and stay the same, so that one data set serves for all
_INSTANCE, _STUDY, _SERIES = "2.25.7000000000.0", "2.25.8000000000.0", "2.25.9000000000.0"


def _item(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(body)) + body


def _association_request() -> bytes:
    """An A-ASSOCIATE-RQ for CT (PS3.8 9.3.2)."""
    syntaxes = _item(0x30, CTImageStorage.encode()) + _item(0x40, ExplicitVRLittleEndian.encode())
    user = _item(0x50, _item(0x51, struct.pack(">I", 131072)) + _item(0x52, b"1.2.3"))
    body = b"".join(
        (
            struct.pack(">HH", 1, 0),
            TITLE.encode().ljust(16) + b"STORESCU".ljust(16) + bytes(32),
            _item(0x10, b"1.2.840.10008.3.1.1.1"),
            _item(0x20, b"\x01\x00\x00\x00" + syntaxes),
            user,
        )
    )
    return struct.pack(">BBI", 1, 0, len(body)) + body


def _numbered(template: str, number: int) -> bytes:
    return template[: len("2.25.7")].encode() + f"{number:09d}".encode() + template[len("2.25.7") + 9 :].encode()


def _data_set() -> bytes:
    header = Dataset()
    header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, _INSTANCE
    header.Modality, header.PatientID = "CT", "BENCH"
    header.StudyInstanceUID, header.SeriesInstanceUID, header.InstanceNumber = _STUDY, _SERIES, 1
    header.Rows = header.Columns = SIDE
    header.PixelData = bytes(2 * SIDE * SIDE)
    header["PixelData"].VR = "OW"
    encoded = encode(header, False, True)
    assert encoded is not None
    return bytes(encoded)


def _command(instance: bytes) -> bytes:
    """A C-STORE-RQ (PS3.7 9.3.1.1)."""
    sop_class = CTImageStorage.encode() + b"\x00" * (len(CTImageStorage) % 2)
    instance += b"\x00" * (len(instance) % 2)
    elements = b"".join(
        struct.pack("<HHI", 0, element, len(value)) + value
        for element, value in (
            (0x0002, sop_class),
            (0x0100, struct.pack("<H", 0x0001)),
            (0x0110, struct.pack("<H", 1)),
            (0x0700, struct.pack("<H", 0)),
            (0x0800, struct.pack("<H", 0)),
            (0x1000, instance),
        )
    )
    return struct.pack("<HHII", 0, 0, 4, len(elements)) + elements


def _pdu(control: int, value: bytes) -> bytes:
    return struct.pack(">BxIIBB", 4, len(value) + 6, len(value) + 2, 1, control) + value


def _answer(connection: socket.socket) -> bytes:
    header = _exactly(connection, 6)
    return header + _exactly(connection, struct.unpack(">I", header[2:])[0])


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        step = connection.recv(size - len(data))
        if not step:
            raise RuntimeError("the receiver went away")
        data += step
    return data


def send(port: int, begin: int, end: int, sent: list[int], place: int) -> None:
    """Send the instances of these numbers; ``sent[place]`` counts them.

    Raises:
        RuntimeError: one was not stored.
    """
    template = _data_set()
    for first in range(begin, end, PER_ASSOCIATION):
        with socket.create_connection((LOOPBACK, port), timeout=60) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(_association_request())
            if _answer(connection)[0] != 2:
                raise RuntimeError("no association")
            for number in range(first, min(first + PER_ASSOCIATION, end)):
                study = number // PER_STUDY
                data_set = template
                for known, value in ((_INSTANCE, number), (_STUDY, study), (_SERIES, study)):
                    data_set = data_set.replace(known.encode(), _numbered(known, value))
                connection.sendall(_pdu(3, _command(_numbered(_INSTANCE, number))) + _pdu(2, data_set))
                answer = _answer(connection)
                # Status (0000,0900) of the C-STORE-RSP
                if answer[answer.index(struct.pack("<HHI", 0, 0x0900, 2)) + 8 :][:2] != b"\x00\x00":
                    raise RuntimeError("refused")
                sent[place] += 1
            connection.sendall(struct.pack(">BxII", 5, 4, 0))  # A-RELEASE-RQ
            _answer(connection)


def main() -> None:
    """Measure and write ``docs/results/receive-memory.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="3,000 instances")
    quick = parser.parse_args().quick
    if dcmtk("echoscu") is None:
        sys.exit("not installed: echoscu")
    count, every = (3_000, 300) if quick else (100_000, 5_000)
    begun = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as folder,
        running("osteo_daemon", Path(folder), dict(os.environ)) as (port, process),
    ):
        sent = [0] * SENDERS
        edges = [count * place // SENDERS // PER_STUDY * PER_STUDY for place in range(SENDERS)] + [count]
        threads = [
            threading.Thread(target=send, args=(port, edges[place], edges[place + 1], sent, place))
            for place in range(SENDERS)
        ]
        for thread in threads:
            thread.start()
        marks: list[tuple[int, float]] = []
        while any(thread.is_alive() for thread in threads):
            if (done := sum(sent)) >= (len(marks) + 1) * every:
                marks.append((done, process.memory_info().rss / 1e6))
            time.sleep(0.02)
        for thread in threads:
            thread.join()
        if sum(sent) != count:
            sys.exit(f"only {sum(sent)} were stored")
        seconds = time.monotonic() - begun
    half = marks[len(marks) // 2 :]
    slope = float(np.polyfit([done for done, _ in half], [rss for _, rss in half], 1)[0])
    figures = {
        "instances": count,
        "senders": SENDERS,
        "associations": sum(-(-(edges[place + 1] - edges[place]) // PER_ASSOCIATION) for place in range(SENDERS)),
        "seconds": round(seconds, 1),
        "rss_mb_first": round(marks[0][1], 1),
        "rss_mb_half": round(half[0][1], 1),
        "rss_mb_last": round(marks[-1][1], 1),
        "rss_mb_highest": round(max(rss for _, rss in marks), 1),
        "bytes_per_instance_second_half": round(slope * 1e6, 1),
        "rss_mb": [round(rss, 1) for _, rss in marks],
    }
    print(figures)
    print(f"wrote {write_result('receive-memory', figures, quick=quick)}")


if __name__ == "__main__":
    main()
