"""Backup of store and spool while the node runs, and the way back.

Order of a backup: files, then the store, then files again. So every file that the store's copy names is in it: what
retention removes meanwhile was taken by the first pass, what arrives meanwhile by the second. Files of the spool are
written once and never changed, so a hard link is as good as a copy on the same disk (and no copy at all if that disk
dies).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from osteo_daemon.errors import ConfigurationError, Damaged, StoreUnavailable
from osteo_daemon.jobs.spool import AREAS, sync_file, sync_folder
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.jobs.transitions import utc_now

SCHEMA = "osteo-backup/1"
MANIFEST = "manifest.json"
IN_PROGRESS = "restore-in-progress"
_SQLITE_COPY = "jobs.sqlite"
_POSTGRESQL_COPY = "jobs.pgdump"
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Backup:
    """A finished backup. ``files`` and ``size_bytes`` are those of the spool's part."""

    folder: Path
    files: int
    size_bytes: int
    store_bytes: int


def make_backup(
    database_url: str, spool_root: Path, folder: Path, *, spool: bool, now: datetime | None = None
) -> Backup:
    """Back up the store, and the spool when asked; the folder appears when all of it is durable.

    Args:
        database_url: of the job store.
        spool_root: of the spool.
        folder: to make; its parent is made when missing.
        spool: with received objects, reports and quarantine; hard links where the file system allows.
        now: the present, for tests.

    Raises:
        ConfigurationError: the folder exists, or can't be made, or PostgreSQL's programs are missing.
        StoreUnavailable: the store can't be read.
    """
    if folder.exists():
        raise ConfigurationError(f"{folder} exists; a backup makes its own folder")
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, mode=0o700)
        if spool:
            _mirror(spool_root, partial / "spool", link=True)
        copy = _copy_store(database_url, partial)
        if spool:
            _mirror(spool_root, partial / "spool", link=True)
        files, size_bytes = _size(partial / "spool")
        manifest: dict[str, Any] = {
            "schema": SCHEMA,
            "version": version("osteo-daemon"),
            "made_at": (now or utc_now()).isoformat(timespec="seconds"),
            "store": {"file": copy.name, "size_bytes": copy.stat().st_size, "sha256": _sha256(copy)},
            "spool_root": str(spool_root.resolve()),
            "spool": {"files": files, "size_bytes": size_bytes} if spool else None,
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for path in (copy, partial / MANIFEST):
            sync_file(path)
        sync_folder(partial)
        partial.rename(folder)
        sync_folder(folder.parent)
    except OSError as error:
        raise ConfigurationError(f"the backup {folder} could not be written ({error.strerror})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Backup(folder, files, size_bytes, int(manifest["store"]["size_bytes"]))


def restore_backup(folder: Path, database_url: str, database_file: Path | None, spool_root: Path) -> JobStore:
    """Put a backup where no store is; the returned store is open.

    Received files newer than the backup that still lie in the spool are taken up by `osteo fsck --repair`.

    Args:
        folder: of the backup.
        database_url: where the store shall be.
        database_file: its file; None in PostgreSQL, where the database must be empty.
        spool_root: where the spool shall be; must hold no files when the backup has a spool.

    Raises:
        ConfigurationError: something is there already, or PostgreSQL's programs are missing.
        Damaged: this is no backup, or its store has changed since it was made.
    """
    manifest = _manifest(folder)
    copy = folder / str(manifest["store"]["file"])
    if not copy.is_file() or _sha256(copy) != manifest["store"]["sha256"]:
        raise Damaged(f"{copy} is missing or has changed since the backup was made")
    if (database_file is None) != (copy.name == _POSTGRESQL_COPY):
        raise ConfigurationError(f"{copy.name} is of another kind of database than [store] url names")
    if database_file is not None and database_file.exists():
        raise ConfigurationError(f"{database_file} exists; a backup is restored only where no job store is")
    with_spool = manifest["spool"] is not None
    marker = spool_root.parent / IN_PROGRESS
    if with_spool and not marker.exists() and any(_files(spool_root)):
        raise ConfigurationError(f"{spool_root} holds files; a backup with a spool is restored into an empty one")
    spool_root.mkdir(parents=True, exist_ok=True, mode=0o750)
    marker.touch()
    if with_spool:
        if _size(folder / "spool") != (manifest["spool"]["files"], manifest["spool"]["size_bytes"]):
            raise Damaged(f"the spool in {folder} has changed since the backup was made")
        _mirror(folder / "spool", spool_root, link=False)
    store = _restore_store(copy, database_url, database_file, Path(manifest["spool_root"]), spool_root.resolve())
    marker.unlink()
    return store


def remove_old_backups(parent: Path, keep: int) -> int:
    """Remove all but the newest backups of a folder; returns how many went. What isn't a backup stays."""
    backups = sorted(path.parent for path in parent.glob(f"*/{MANIFEST}"))
    for folder in backups[:-keep]:
        # the manifest first: what is half removed no longer passes for a backup
        (folder / MANIFEST).unlink()
        shutil.rmtree(folder)
    return len(backups[:-keep])


def _copy_store(database_url: str, folder: Path) -> Path:
    parts = urlsplit(database_url)
    if parts.scheme.startswith("postgresql"):
        copy = folder / _POSTGRESQL_COPY
        _postgresql("pg_dump", database_url, "--format=custom", f"--file={copy}")
        return copy
    copy = folder / _SQLITE_COPY
    source = Path(database_url.removeprefix("sqlite:///"))
    try:
        with (
            closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True, timeout=30)) as live,
            closing(sqlite3.connect(copy)) as target,
        ):
            # in one step: the copy is one state of the store, and in WAL mode writers don't wait for it
            live.backup(target, pages=-1)
            target.execute("PRAGMA journal_mode=DELETE")
            found = target.execute("PRAGMA quick_check").fetchone()[0]
    except sqlite3.Error as error:
        raise StoreUnavailable(f"the job store could not be copied ({error})") from error
    if found != "ok":
        raise Damaged(f"the job store is damaged ({found})")
    return copy


def _restore_store(
    copy: Path, database_url: str, database_file: Path | None, old_spool: Path, new_spool: Path
) -> JobStore:
    if database_file is None:
        _postgresql("pg_restore", database_url, "--no-owner", "--exit-on-error", "--single-transaction", str(copy))
        store = JobStore(database_url)
        store.after_restore(old_spool, new_spool)
        return store
    partial = database_file.with_name(f".{database_file.name}.partial")
    for left in (partial, *(partial.with_name(partial.name + end) for end in ("-wal", "-shm"))):
        left.unlink(missing_ok=True)
    shutil.copyfile(copy, partial)
    partial.chmod(0o600)
    store = JobStore(f"sqlite:///{partial}")
    store.after_restore(old_spool, new_spool)
    store.close()  # the last connection takes the write-ahead log into the file
    sync_file(partial)
    partial.rename(database_file)
    sync_folder(database_file.parent)
    return JobStore(database_url)


def _postgresql(program: str, database_url: str, *arguments: str) -> None:
    found = shutil.which(program)
    if found is None:
        raise ConfigurationError(
            f"{program} is not installed (Debian: postgresql-client); PostgreSQL's own backups do as well"
        )
    parts = urlsplit(database_url)
    plain = f"postgresql://{parts.username or ''}@{parts.hostname or ''}:{parts.port or 5432}{parts.path}"
    environment = {**os.environ, "PGPASSWORD": unquote(parts.password or ""), "PGCONNECT_TIMEOUT": "10"}
    done = subprocess.run(
        [found, f"--dbname={plain}", *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise StoreUnavailable(f"{program} ended with status {done.returncode}: {last[0]}")


def _mirror(source: Path, target: Path, *, link: bool) -> None:
    """Bring every file below ``source`` that isn't there yet to ``target``."""
    touched: set[Path] = set()
    for path in _files(source):
        there = target / path.relative_to(source)
        if there.exists():
            continue
        there.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
        try:
            _bring(path, there, link=link)
        except FileNotFoundError:
            continue  # retention was quicker: either the first pass has it, or the store's copy doesn't name it
        touched.add(there.parent)
    for folder in touched:
        sync_folder(folder)


def _bring(path: Path, there: Path, *, link: bool) -> None:
    if link:
        try:
            there.hardlink_to(path)
        except FileNotFoundError:
            raise
        except OSError:
            pass  # another file system, or one without links
        else:
            return
    partial = there.with_name(f".{there.name}.partial")
    shutil.copyfile(path, partial)
    partial.chmod(0o640)
    sync_file(partial)
    partial.rename(there)


def _files(root: Path) -> list[Path]:
    return [path for area in AREAS for path in (root / area).rglob("*.dcm") if path.is_file()]


def _size(root: Path) -> tuple[int, int]:
    sizes = [path.stat().st_size for path in _files(root)]
    return len(sizes), sum(sizes)


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Damaged(f"{folder} is no backup of this node") from error
    if manifest.get("schema") != SCHEMA:
        raise Damaged(f"{folder} is a backup of another kind ({manifest.get('schema')})")
    return manifest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
