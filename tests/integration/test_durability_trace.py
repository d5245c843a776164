"""A system-call trace of one C-STORE: write, rename, fsync of file and folder, commit, and only then the response.

The judge reads strace's output and knows nothing of the product's code; planted mutants show that it can fail.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import missing, require_command
from tests.fakes import a_free_port, settings_text, storescu, until, write_ct

RUN = """
import sys
from pathlib import Path
from osteo_daemon import receiver
from osteo_daemon.jobs import spool
from osteo_daemon.settings import load_settings
{mutation}
sys.exit(receiver.run(load_settings(Path(sys.argv[1]))))
"""

MUTANTS = {
    "written after the answer": """
import os, threading
from osteo_daemon.jobs.incoming import IncomingFile
def late(self, data):
    self._digest.update(data)
    self.size_bytes += len(data)
    threading.Timer(2.0, os.write, (os.dup(self._handle), bytes(data))).start()
IncomingFile.write = late
""",
    "acknowledged before it is stored": """
import dataclasses, threading
honest = receiver.DurableIntake.accept
class Early(receiver.DurableIntake):
    def accept(self, received):
        copy = dataclasses.replace(received, parts=tuple(bytes(part) for part in received.parts))
        threading.Timer(0.3, honest, (self, copy)).start()
receiver.DurableIntake = Early
""",
    "acknowledged before the commit": """
import threading
from osteo_daemon.jobs.records import RecordOutcome
honest = receiver.DurableIntake._record
class Early(receiver.DurableIntake):
    def _record(self, received, instance):
        threading.Timer(0.3, honest, (self, received, instance)).start()
        return RecordOutcome.STORED
receiver.DurableIntake = Early
""",
    "file not synced": """
import os, stat
honest = os.fsync
os.fsync = lambda handle: None if stat.S_ISREG(os.fstat(handle).st_mode) else honest(handle)
""",
    "renamed over what is there": """
import os
from osteo_daemon.jobs.incoming import IncomingFile
def careless(self, path):
    self.path.rename(path)
    self.path = path
    return True
IncomingFile.take_name = careless
""",
    "folder not synced": """
spool.sync_folder = lambda folder: None
""",
    "commit not synced": """
from sqlalchemy import event
from sqlalchemy.pool import Pool
@event.listens_for(Pool, "checkout")
def careless(connection, record, proxy):
    connection.execute("PRAGMA synchronous=OFF")
""",
}


@dataclass(frozen=True)
class Call:
    """A traced call: when it began and ended (line numbers), its name and its arguments as strace prints them."""

    begun: int
    ended: int
    name: str
    arguments: str


def read_trace(text: str) -> list[Call]:
    """Calls that succeeded, in the order of their beginning."""
    calls, open_calls = [], {}
    for number, line in enumerate(text.splitlines()):
        if not (match := re.match(r"(?:\[pid\s+)?(\d+)\]?\s+(.*)", line)):
            continue
        pid, rest = match.groups()
        if unfinished := re.match(r"(\w+)\((.*) <unfinished \.\.\.>", rest):
            open_calls[pid] = (number, *unfinished.groups())
        elif resumed := re.match(r"<\.\.\. (\w+) resumed>(.*)\) += (-?\d+)", rest):
            if pid in open_calls:
                begun, name, arguments = open_calls.pop(pid)
                if int(resumed[3]) >= 0:
                    calls.append(Call(begun, number, name, arguments + resumed[2]))
        elif (whole := re.match(r"(\w+)\((.*)\) += (-?\d+)", rest)) and int(whole[3]) >= 0:
            calls.append(Call(number, number, whole[1], whole[2]))
    return sorted(calls, key=lambda call: call.begun)


def verdict(calls: list[Call]) -> str:
    """ "in order", or the first thing that is missing before the response."""
    # PS3.8 9.3.5: PDU type 04H is P-DATA-TF; the one that the acceptor sends here is the C-STORE response
    responses = [call for call in calls if call.name == "sendto" and re.search(r', "\\4\\0', call.arguments)]
    assert len(responses) == 1, "the trace holds not exactly one response"
    before = [call for call in calls if call.ended < responses[0].begun]

    def last(names: tuple[str, ...], pattern: str, after: int = -1) -> Call | None:
        found = [c for c in before if c.name in names and re.search(pattern, c.arguments) and c.begun > after]
        return found[-1] if found else None

    written = last(("write",), r"/spool/tmp/")
    if written is None:
        return "no write"
    renamed = last(("rename", "renameat", "renameat2"), r"/spool/tmp/.*/spool/received/", written.ended)
    if renamed is None:
        return "no rename"
    temporary, name = (re.escape(found) for found in re.findall(r'"([^"]*)"', renamed.arguments))
    # the file's own, under the name that it had at the time
    synced = last(("fsync", "fdatasync"), rf"<({temporary}|{name})>", written.ended)
    if synced is None:
        return "no fsync of the file"
    if synced.begun > renamed.begun and "RENAME_NOREPLACE" not in renamed.arguments:
        return "bytes that are not durable took a name that may have been another's"
    folder = re.escape(str(Path(re.findall(r'"([^"]*/spool/received/[^"]*)"', renamed.arguments)[0]).parent))
    folder_synced = last(("fsync", "fdatasync"), rf"<{folder}>", renamed.ended)
    if folder_synced is None:
        return "no fsync of the folder"
    row = last(("pwrite64", "write"), r"jobs\.sqlite-wal>", max(synced.ended, folder_synced.ended))
    if row is None:
        return "no row"
    if last(("fsync", "fdatasync"), r"jobs\.sqlite-wal>", row.ended) is None:
        return "no fsync of the commit"
    return "in order"


def trace_one_store(folder: Path, mutation: str) -> str:
    """Trace a receiver, with ``mutation`` planted, through one C-STORE."""
    port = a_free_port()
    config = folder / "osteo.toml"
    config.write_text(settings_text(folder / "state", port))
    log, trace = folder / "receiver.log", folder / "trace.txt"
    # the first study warms it up: the traced one then shows the calls of every C-STORE, not of the first
    warm, files = write_ct(folder / "warm", count=1), write_ct(folder / "ct", count=1, size=64)
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, "-c", RUN.format(mutation=mutation), str(config)], stdout=sink, stderr=sink
        )
    try:
        until(lambda: b"receiver_listening" in log.read_bytes())
        assert storescu(port, warm).returncode == 0
        tracer = subprocess.Popen(
            [
                *(require_command("strace"), "-f", "-y", "-s", "256", "-o", str(trace), "-p", str(process.pid)),
                *("-e", "trace=write,pwrite64,fsync,fdatasync,rename,renameat,renameat2,sendto"),
            ],
            stderr=subprocess.PIPE,
        )
        assert tracer.stderr is not None
        os.set_blocking(tracer.stderr.fileno(), False)
        heard = b""

        def attached() -> bool:
            nonlocal heard
            heard += (tracer.stderr.read() if tracer.stderr else b"") or b""
            if b"not permitted" in heard:
                missing("strace may not attach to processes here")
            return b"attached" in heard

        until(attached)
        assert storescu(port, files).returncode == 0
        until(lambda: "\\4\\0" in trace.read_text(errors="replace"))
        tracer.send_signal(signal.SIGINT)
        tracer.wait(60)
    finally:
        process.terminate()
        process.wait(60)
    return trace.read_text(errors="replace")


def test_success_is_said_only_after_everything_is_on_disk(tmp_path: Path) -> None:
    assert verdict(read_trace(trace_one_store(tmp_path, ""))) == "in order"


@pytest.mark.parametrize(
    ("mutant", "caught"),
    [
        ("written after the answer", "no write"),
        ("acknowledged before it is stored", "no rename"),
        ("acknowledged before the commit", "no row"),
        ("file not synced", "no fsync of the file"),
        ("renamed over what is there", "bytes that are not durable took a name that may have been another's"),
        ("folder not synced", "no fsync of the folder"),
        ("commit not synced", "no fsync of the commit"),
    ],
)
def test_the_judge_catches_planted_mutants(tmp_path: Path, mutant: str, caught: str) -> None:
    assert verdict(read_trace(trace_one_store(tmp_path, MUTANTS[mutant]))) == caught
