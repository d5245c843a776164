"""What a power cut leaves of a folder, worked out from a system-call trace.

The model is the strictest one that POSIX allows: bytes of a file count from the fsync of that file on, names in a
folder from the fsync of that folder on, and everything else is gone. It covers write, pwrite, truncate, rename, unlink,
mkdir and fsync of the traced processes. It does not cover what a disk loses although it said that it was written, torn
sectors, or writes through a memory map (SQLite maps only its index of the log, which it builds anew after a crash).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TRACED = (
    "open,openat,creat,write,pwrite64,ftruncate,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,"
    "sendto"
)
STRACE = ("-f", "-y", "-xx", "-s", "4000000", "-e", f"trace={TRACED}")

_QUOTED = re.compile(r'"((?:\\x[0-9a-f]{2})*)"(\.\.\.)?')
_DESCRIPTOR = re.compile(r"^(\d+)<([^>]*)>")
_NUMBER = re.compile(r", (-?\d+)(?=[,)]|$)")


@dataclass(frozen=True)
class Call:
    """A call that succeeded: the trace's line on which it ended, its name, arguments and result."""

    line: int
    name: str
    arguments: str
    result: int


def read_calls(trace: str) -> list[Call]:
    """Calls that succeeded, in the order of their ends: from then on they count."""
    calls: list[Call] = []
    begun: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(trace.splitlines()):
        if not (match := re.match(r"(\d+)\s+(.*)", line)):
            continue
        pid, rest = match.groups()
        if unfinished := re.match(r"(\w+)\((.*) <unfinished \.\.\.>", rest):
            begun[pid] = (unfinished[1], unfinished[2])
        elif (resumed := re.match(r"<\.\.\. (\w+) resumed>(.*)\) += (-?\d+)", rest)) and pid in begun:
            name, arguments = begun.pop(pid)
            if int(resumed[3]) >= 0:
                calls.append(Call(number, name, arguments + resumed[2], int(resumed[3])))
        elif (whole := re.match(r"(\w+)\((.*)\) += (-?\d+)", rest)) and int(whole[3]) >= 0:
            calls.append(Call(number, whole[1], whole[2], int(whole[3])))
    return calls


def acknowledged(call: Call) -> str | None:
    """SOP Instance UID of a C-STORE response with status 0x0000, when the call sends one."""
    if call.name != "sendto":
        return None
    (sent, *_) = _strings(call.arguments) or [b""]
    # PS3.8 9.3.5, a P-DATA-TF of commands in implicit VR little endian (PS3.7 6.3.1): Command Field (0000,0100) 8001H,
    # Status (0000,0900), Affected SOP Instance UID (0000,1000)
    if sent[:1] != b"\x04" or b"\x00\x00\x00\x01\x02\x00\x00\x00\x01\x80" not in sent:
        return None
    if b"\x00\x00\x00\x09\x02\x00\x00\x00\x00\x00" not in sent:
        return None
    start = sent.index(b"\x00\x00\x00\x10") + 8
    length = int.from_bytes(sent[start - 4 : start], "little")
    return sent[start : start + length].rstrip(b"\0 ").decode()


@dataclass
class _File:
    now: bytearray = field(default_factory=bytearray)
    on_disk: bytes = b""


class Disk:
    """A folder on a disk with a volatile cache; ``root`` as it is now counts as on disk."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._now: dict[Path, _File | None] = {}  # None: a folder
        for path in sorted(root.rglob("*")):
            self._now[path] = None if path.is_dir() else _File(bytearray(path.read_bytes()), path.read_bytes())
        self._on_disk = dict(self._now)

    def apply(self, call: Call) -> None:
        """Let a traced call happen."""
        names = [Path(text.decode(errors="surrogateescape")) for text in _strings(call.arguments)]
        descriptor = _DESCRIPTOR.match(call.arguments)
        target = Path(_decoded(descriptor[2])) if descriptor else None
        if call.name in ("open", "openat", "creat"):
            self._open(names[0], call.arguments)
        elif call.name == "write" and target in self._now and isinstance(file := self._now[target], _File):
            file.now += _strings(call.arguments)[0]  # the product writes new files from front to back
        elif call.name == "pwrite64" and target in self._now and isinstance(file := self._now[target], _File):
            data, offset = _strings(call.arguments)[0], int(_NUMBER.findall(call.arguments)[-1])
            file.now.extend(b"\0" * (offset - len(file.now)))
            file.now[offset : offset + len(data)] = data
        elif call.name == "ftruncate" and target in self._now and isinstance(file := self._now[target], _File):
            size = int(_NUMBER.findall(call.arguments)[-1])
            del file.now[size:]
            file.now.extend(b"\0" * (size - len(file.now)))
        elif call.name in ("fsync", "fdatasync") and target is not None:
            self._sync(target)
        elif call.name.startswith("rename") and names[0] in self._now:
            self._now[names[1]] = self._now.pop(names[0])
        elif call.name.startswith("unlink"):
            self._now.pop(names[0], None)
        elif call.name.startswith("mkdir") and self._root in names[0].parents:
            self._now.setdefault(names[0], None)

    def _open(self, path: Path, arguments: str) -> None:
        if self._root not in path.parents:
            return
        if path not in self._now and "O_CREAT" in arguments:
            self._now[path] = _File()
        elif "O_TRUNC" in arguments and isinstance(file := self._now.get(path), _File):
            file.now.clear()

    def _sync(self, target: Path) -> None:
        if isinstance(file := self._now.get(target), _File):
            file.on_disk = bytes(file.now)
        if target == self._root or (target in self._now and self._now[target] is None):
            for path in [path for path in self._on_disk if path.parent == target]:
                del self._on_disk[path]
            self._on_disk |= {path: entry for path, entry in self._now.items() if path.parent == target}

    def after_power_cut(self, folder: Path) -> None:
        """Write into ``folder`` what is on disk; a name counts only below names that count."""
        for path, entry in sorted(self._on_disk.items()):
            copy = folder / path.relative_to(self._root)
            if not copy.parent.exists():
                continue
            if entry is None:
                copy.mkdir(exist_ok=True)
            else:
                copy.write_bytes(entry.on_disk)


def cuts(calls: Sequence[Call]) -> Iterator[int]:
    """Places to cut: behind every acknowledgement, where everything before it was promised to be durable."""
    return (number + 1 for number, call in enumerate(calls) if acknowledged(call))


def _strings(arguments: str) -> list[bytes]:
    found = []
    for match in _QUOTED.finditer(arguments):
        assert not match[2], "strace cut a string short"
        found.append(bytes.fromhex(match[1].replace("\\x", "")))
    return found


def _decoded(name: str) -> str:
    """strace prints the paths of descriptors in hexadecimal too."""
    return bytes.fromhex(name.replace("\\x", "")).decode() if name.startswith("\\x") else name
