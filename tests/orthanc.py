"""A real Orthanc as destination PACS, started by a test on loopback."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import require_command

AE_TITLE = "ORTHANC"


@dataclass(frozen=True)
class Orthanc:
    """A running server: its DICOM port and its REST interface."""

    dicom_port: int
    url: str

    def get(self, path: str) -> Any:
        """JSON of a REST resource."""
        return json.loads(self.read(path))

    def read(self, path: str) -> bytes:
        """Bytes of a REST resource."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as answer:  # noqa: S310 - loopback http
            return bytes(answer.read())

    def find(self, level: str, **query: str) -> list[str]:
        """Orthanc identifiers of the resources that match a C-FIND-like query."""
        body = json.dumps({"Level": level, "Query": query}).encode()
        request = urllib.request.Request(f"{self.url}/tools/find", data=body, method="POST")  # noqa: S310
        with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
            found: list[str] = json.loads(answer.read())
        return found


@contextmanager
def running_orthanc(
    folder: Path,
    dicom_port: int,
    http_port: int,
    modalities: dict[str, Any] | None = None,
    plugins: Sequence[str] = (),
    more: dict[str, Any] | None = None,
) -> Iterator[Orthanc]:
    """Start Orthanc with an empty store below ``folder``; end it afterwards.

    Args:
        modalities: its ``DicomModalities``: whom it may report to.
        more: further entries of its configuration.
    """
    program = require_command("Orthanc")
    folder.mkdir(parents=True, exist_ok=True)
    configuration = folder / "orthanc.json"
    configuration.write_text(
        json.dumps(
            {
                "Name": "test",
                "StorageDirectory": str(folder / "storage"),
                "IndexDirectory": str(folder / "index"),
                "DicomAet": AE_TITLE,
                "DicomPort": dicom_port,
                "DicomCheckCalledAet": True,
                "DicomAlwaysAllowStore": True,
                "DicomAlwaysAllowEcho": True,
                "DicomModalities": modalities or {},
                "DicomAlwaysAllowFind": True,
                "HttpPort": http_port,
                "HttpServerEnabled": True,
                "RemoteAccessAllowed": False,
                "AuthenticationEnabled": False,
                "StableAge": 1,
                "Plugins": list(plugins),
                **(more or {}),
            }
        )
    )
    with (folder / "orthanc.log").open("wb") as log:
        process = subprocess.Popen([program, str(configuration)], stdout=log, stderr=subprocess.STDOUT)
        try:
            server = Orthanc(dicom_port, f"http://127.0.0.1:{http_port}")
            _wait_until_up(server, process, folder / "orthanc.log")
            yield server
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_up(server: Orthanc, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"Orthanc ended with {process.returncode}: {log.read_text()[-2000:]}")
        try:
            server.get("/system")
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
        else:
            return
    raise AssertionError("Orthanc did not answer within 60 s")
