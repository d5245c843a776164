from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from osteo_daemon.errors import ConfigurationError, SpoolFull, Transient
from osteo_daemon.jobs import spool as module
from osteo_daemon.jobs.spool import AREAS, Spool


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def test_bytes_and_digest(spool: Spool) -> None:
    parts = (b"header", bytearray(b"-"), memoryview(b"body"))
    stored = spool.store_instance("1.2", "1.2.3", "1.2.3.4", parts)
    assert stored.path.read_bytes() == b"header-body"
    assert stored.size_bytes == 11
    assert stored.sha256 == hashlib.sha256(b"header-body").hexdigest()
    assert stored.path.stat().st_mode & 0o007 == 0


def test_same_bytes_same_file_other_bytes_another(spool: Spool) -> None:
    first = spool.store_instance("1.2", "1.2.3", "1.2.3.4", [b"a"])
    assert spool.store_instance("1.2", "1.2.3", "1.2.3.4", [b"a"]) == first
    other = spool.store_instance("1.2", "1.2.3", "1.2.3.4", [b"b"])
    assert other.path != first.path
    assert first.path.read_bytes() == b"a"


@pytest.mark.parametrize(
    "uid", ["../../../etc/passwd", "/etc/passwd", "", ".", "..", "a\x00b", "x" * 5000, "ä/日\udcff"]
)
def test_no_uid_leaves_the_spool(spool: Spool, uid: str) -> None:
    for stored in (spool.store_instance(uid, uid, uid, [b"x"]), spool.store_report(uid, uid, [b"x"])):
        assert stored.path.resolve().is_relative_to(spool.root)
        assert stored.path.name.isascii()
        assert stored.path.read_bytes() == b"x"


def test_reports_lie_apart(spool: Spool) -> None:
    stored = spool.store_report("1.2", "9.9", [b"report"])
    assert stored.path.is_relative_to(spool.root / "reports")


def test_quarantine_moves(spool: Spool) -> None:
    stored = spool.store_instance("1.2", "1.2.3", "1.2.3.4", [b"a"])
    kept = spool.quarantine("1.2", "1.2.3.4", stored)
    assert not stored.path.exists()
    assert kept.path.is_relative_to(spool.root / "quarantine")
    assert kept.path.read_bytes() == b"a"


def test_full_file_system_leaves_nothing(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int, _data: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(SpoolFull, match="No space"):
        spool.store_instance("1.2", "1.2.3", "1.2.3.4", [b"a"])
    monkeypatch.undo()
    assert not [path for path in spool.root.rglob("*") if path.is_file()]


def test_really_full_file_system(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        pytest.skip("mounting needs root")
    try:
        spool = Spool(mount / "spool")
        spool.store_instance("1.2", "1.2.3", "1.2.3.4", [b"a" * 300_000])
        with pytest.raises(SpoolFull):
            spool.store_instance("1.2", "1.2.3", "1.2.3.5", [b"a" * 900_000])
        assert len([path for path in spool.root.rglob("*") if path.is_file()]) == 1
        spool.store_instance("1.2", "1.2.3", "1.2.3.6", [b"a" * 300_000])
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_reserve_is_kept(tmp_path: Path) -> None:
    spool = Spool(tmp_path, minimum_free_bytes=1 << 62)
    assert spool.free_bytes() == 0
    with pytest.raises(SpoolFull):
        spool.store_instance("1.2", "1.2.3", "1.2.3.4", [b"a"])


def test_leftovers_of_dead_writers_go_those_of_living_ones_stay(spool: Spool) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    (spool.root / "tmp" / f"{dead.pid}-00").write_bytes(b"half")
    (spool.root / "tmp" / "no-name-of-ours").write_bytes(b"half")
    living = spool.root / "tmp" / f"{os.getpid()}-00"
    living.write_bytes(b"half")
    assert spool.remove_leftovers() == 2
    assert list((spool.root / "tmp").iterdir()) == [living]


def test_a_folder_removed_meanwhile_is_made_again(spool: Spool) -> None:
    stored = spool.store_instance("1.2", "1.2.3", "1.2.3.4", [b"a"])
    stored.path.unlink()
    stored.path.parent.rmdir()
    assert spool.store_instance("1.2", "1.2.3", "1.2.3.5", [b"b"]).path.read_bytes() == b"b"


def test_a_folder_that_cannot_be_used_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="spool"):
        Spool(tmp_path / "file" / "spool")


def test_a_taken_name_is_replaced_by_durable_bytes_only(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    honest = os.fsync, Path.rename

    def fsync(handle: int) -> None:
        order.append("fsync of the folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "fsync of the file")
        honest[0](handle)

    def rename(path: Path, target: Path) -> Path:
        order.append("rename")
        return honest[1](path, target)

    first = spool.store_instance("1.2", "1.2.3", "1.2.3.4", [b"a"])
    first.path.write_bytes(b"")  # what a power cut left
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    assert spool.store_instance("1.2", "1.2.3", "1.2.3.4", [b"a"]) == first
    assert order == ["fsync of the file", "rename", "fsync of the folder"]
    assert first.path.read_bytes() == b"a"


@pytest.mark.parametrize("taken", [False, True])
def test_a_file_that_is_removed_before_its_name_is_on_the_disk_may_be_sent_again(
    spool: Spool, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    """Retention in the very moment between a file's naming and the sync of its folder."""
    first = spool.store_instance("1.2", "1.2.3", "1.2.3.4", [b"a"]) if taken else None
    honest = module.sync_folder

    def sync_after_a_purge(folder: Path) -> None:
        if folder.name not in AREAS and spool.received_files("1.2"):
            spool.remove(spool.received_files("1.2"))
            spool.prune("1.2")
        honest(folder)

    monkeypatch.setattr(module, "sync_folder", sync_after_a_purge)
    with pytest.raises(Transient, match="removed at that moment"):
        spool.store_instance("1.2", "1.2.3", "1.2.3.4", [b"a"])
    monkeypatch.undo()
    assert not [path for path in spool.root.rglob("*") if path.is_file()]
    stored = spool.store_instance("1.2", "1.2.3", "1.2.3.4", [b"a"])
    assert stored.path.read_bytes() == b"a"
    assert first is None or stored == first


def test_a_failed_sync_gives_up_its_own_file_and_no_other(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = os.fsync

    def broken(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    known = spool.store_instance("1.2", "1.2.3", "1.2.3.9", [b"a"])  # its folder is known
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="Input/output"):
        spool.store_instance("1.2", "1.2.3", "1.2.3.4", [b"a"])
    with pytest.raises(OSError, match="Input/output"):
        spool.store_instance("1.2", "1.2.3", "1.2.3.9", [b"a"])  # the same again: the durable one stays
    assert [path for path in spool.root.rglob("*") if path.is_file()] == [known.path]

    def overtaken(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            return
        monkeypatch.setattr(os, "fsync", honest)
        spool.store_instance("1.2", "1.2.3", "1.2.3.5", [b"a"])  # another sender of the same object, meanwhile
        broken(handle)

    monkeypatch.setattr(os, "fsync", overtaken)
    with pytest.raises(OSError, match="Input/output"):
        spool.store_instance("1.2", "1.2.3", "1.2.3.5", [b"a"])
    assert sorted(path.read_bytes() for path in spool.root.rglob("*") if path.is_file()) == [b"a", b"a"]


def test_a_name_in_a_folder_of_another_maker_counts_only_when_the_folders_own_name_does(
    spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool.store_instance("1.2", "1.2.3", "1.2.3.4", [b"a"])
    synced: list[Path] = []
    monkeypatch.setattr("osteo_daemon.jobs.spool.sync_folder", synced.append)
    other = Spool(spool.root)  # knows nothing of those that are there
    synced.clear()
    path = other.store_instance("1.2", "1.2.3", "1.2.3.5", [b"b"]).path
    # every name from the area down to the file's
    assert set(synced) == {path.parent, *list(path.parent.parents)[:3]}


def test_what_fails_beside_is_heard(spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    spool.store_instance("1.2", "1.2.3", "1.2.3.4", [b"a"])
    honest = os.fsync

    def broken(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EIO, "Input/output error")
        honest(handle)

    for _ in range(3):  # and the thread that met it works on
        monkeypatch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="Input/output"):
            spool.store_instance("1.2", "1.2.3", "1.2.3.5", [b"a"])
        monkeypatch.setattr(os, "fsync", honest)
        assert len([path for path in spool.root.rglob("*") if path.is_file()]) == 1
    spool.store_instance("1.2", "1.2.3", "1.2.3.5", [b"a"])


def test_many_threads_keep_files_at_once(spool: Spool) -> None:
    def send(sender: int) -> list[Path]:
        return [spool.store_instance("1.2", f"1.2.{sender % 3}", f"9.{n}", [b"a"]).path for n in range(20)]

    with ThreadPoolExecutor(24) as threads:
        found = list(threads.map(send, range(24)))
    assert len({path for paths in found for path in paths}) == 60
    assert all(path.read_bytes() == b"a" for paths in found for path in paths)
    assert not list((spool.root / "tmp").iterdir())
