"""Hand-written peers and processes for tests: real sockets, files and signals, no mocks."""

from __future__ import annotations

import hashlib
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from pynetdicom import AE, AllStoragePresentationContexts, VerificationPresentationContexts, _config, build_context, evt

from osteo_daemon.receiver import Receiver
from osteo_daemon.settings import load_settings
from tests.conftest import missing
from tests.ct_series import column, write_slices
from tests.ports import LOOPBACK, a_free_port

STUDY_ROOT_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
CALLING = "MODALITY"
CALLED = "OSTEO"


def until(condition: Callable[[], Any], seconds: float = 60.0, every: float = 0.02) -> Any:
    """Wait until ``condition`` gives something true and return it; fails when it never does.

    Its patience is for busy machines: what is judged by its speed is given ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(every)
    return value


def dcmtk(name: str) -> str:
    """DCMTK's program; pynetdicom puts programs of the same names into a virtual environment."""
    folders = [folder for folder in os.get_exec_path() if not folder.startswith(sys.prefix)]
    found = shutil.which(name, path=os.pathsep.join([*folders, "/usr/bin"]))
    if found is None:
        missing(f"DCMTK's {name} is not installed (make system-packages)")
    assert found is not None
    return found


def _contexts() -> list[Any]:
    return [build_context(context.abstract_syntax) for context in AllStoragePresentationContexts]


def write_ct(folder: Path, count: int = 3, size: int = 16, seed: int = 0, **attributes: Any) -> list[Path]:
    """Write one small CT series of ``count`` slices, all different."""
    voxels = np.random.default_rng(seed).integers(-1000, 1000, (count, size, size))
    return write_slices(folder, voxels, column(count, 3.0), **attributes)


def settings_text(state_dir: Path, port: int, *, extra: str = "", quiet_seconds: float = 60.0) -> str:
    """An osteo.toml for one node on loopback; ``extra`` is appended."""
    return f"""
state_dir = "{state_dir}"

[receiver]
ae_title = "{CALLED}"
address = "{LOOPBACK}"
port = {port}
minimum_free_bytes = 0

[[sources]]
ae_title = "{CALLING}"
addresses = ["{LOOPBACK}"]

[completeness]
quiet_seconds = {quiet_seconds}
sweep_seconds = 0.2

{extra}
"""


@dataclass
class RoleProcess:
    """One role (or `osteo serve`) as a process of its own; its log goes to a file."""

    arguments: Sequence[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    module: str = "osteo_daemon.cli"

    def start(self, prefix: Sequence[str] = ()) -> RoleProcess:
        """Start it, under ``prefix`` (for instance strace) when given."""
        with self.log.open("ab") as sink:
            self.process = subprocess.Popen(
                [*prefix, sys.executable, "-m", self.module, *self.arguments],
                stdout=sink,
                stderr=sink,
                stdin=subprocess.DEVNULL,
                cwd=Path(__file__).resolve().parents[1],
            )
        return self

    def wait_for(self, text: str, seconds: float = 60.0) -> None:
        """Wait until the log holds ``text``."""
        assert self.process is not None

        def seen() -> bool:
            if text in self.log.read_text(errors="replace"):
                return True
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text(errors="replace")
            return False

        until(seen, seconds)

    def stop(self, number: int = 15, seconds: float = 60.0) -> int:
        """Send a signal and return the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(seconds)


@contextmanager
def receiver_process(folder: Path, *, extra: str = "") -> Iterator[tuple[RoleProcess, int]]:
    """`osteo run receiver` on a free port, with its state under ``folder``; ended with the block."""
    port = a_free_port()
    config = folder / "osteo.toml"
    config.write_text(settings_text(folder / "state", port, extra=extra))
    role = RoleProcess(["run", "receiver", "--config", str(config)], folder / "receiver.log").start()
    try:
        role.wait_for("receiver_listening")
        yield role, port
    finally:
        if role.process is not None and role.process.poll() is None:
            role.process.kill()
            role.process.wait()


@contextmanager
def local_receiver(folder: Path, text: str | None = None) -> Iterator[int]:
    """A receiver in this process, for tests that need no signal; gives its port."""
    config = folder / "osteo.toml"
    config.write_text(text or settings_text(folder / "state", 0))
    receiver = Receiver(load_settings(config))
    receiver.start()
    try:
        yield receiver.port
    finally:
        receiver.stop(grace_seconds=0.0)


def storescu(
    port: int, files: Sequence[Path], *options: str, calling: str = CALLING
) -> subprocess.CompletedProcess[str]:
    """Send files with DCMTK's storescu."""
    command = [dcmtk("storescu"), "-aet", calling, "-aec", CALLED, *options, LOOPBACK, str(port), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@dataclass
class CountingScp:
    """A storage peer that counts: which SOP Instance UID came how often and with which bytes. It answers C-FIND.

    Attributes:
        answer: called with (SOP Instance UID, how often it came); gives the status.
        received: every C-STORE in order: SOP Class UID, SOP Instance UID, SHA-256 of the data set's bytes.
        data_sets: last accepted data set by SOP Instance UID.
        security: a context, for TLS alone.
    """

    ae_title: str = "PACS"
    port: int = 0
    answer: Callable[[str, int], int] = lambda _uid, _count: 0x0000
    received: list[tuple[str, str, str]] = field(default_factory=list)
    data_sets: dict[str, Dataset] = field(default_factory=dict)
    security: ssl.SSLContext | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _server: Any = None

    def __enter__(self) -> CountingScp:
        _config.LOG_HANDLER_LEVEL = "none"
        entity = AE(ae_title=self.ae_title)
        entity.require_called_aet = True
        entity.supported_contexts = [*_contexts(), *VerificationPresentationContexts, build_context(STUDY_ROOT_FIND)]
        self._server = entity.start_server(
            (LOOPBACK, self.port),
            block=False,
            evt_handlers=[(evt.EVT_C_STORE, self._store), (evt.EVT_C_FIND, self._find)],
            ssl_context=self.security,
        )
        self.port = self._server.server_address[1]
        return self

    def __exit__(self, *_reason: object) -> None:
        self._server.shutdown()

    @property
    def digests(self) -> dict[str, set[str]]:
        """SOP Instance UID to every digest that was seen under it."""
        found: dict[str, set[str]] = {}
        for _sop_class, uid, digest in self.received:
            found.setdefault(uid, set()).add(digest)
        return found

    def _find(self, event: Any) -> Iterator[tuple[int, Dataset | None]]:
        # by SOP Instance UID alone: enough to prove that an object is kept
        match = self.data_sets.get(str(event.identifier.SOPInstanceUID))
        if match is not None:
            answer = Dataset()
            answer.QueryRetrieveLevel = "IMAGE"
            answer.SOPInstanceUID = match.SOPInstanceUID
            yield 0xFF00, answer

    def _store(self, event: Any) -> int:
        uid = str(event.request.AffectedSOPInstanceUID)
        digest = hashlib.sha256(event.encoded_dataset(include_meta=False)).hexdigest()
        with self._lock:
            self.received.append((str(event.request.AffectedSOPClassUID), uid, digest))
            status = self.answer(uid, Counter(entry[1] for entry in self.received)[uid])
            if status == 0x0000:
                data_set = event.dataset
                data_set.file_meta = event.file_meta
                self.data_sets[uid] = data_set
        return status
