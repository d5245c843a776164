"""Where versions of bundles lie, and which of them is deployed.

::

    <models>/<name>                        link to the deployed version; without it the shipped bundle is
    <models>/.registry/<name>/<version>/   a version, never changed
    <models>/.registry/<name>/<version>.sig
    <models>/.registry/<name>.shadow       link to the version that runs in the shadow

A link is changed by a rename over it, so that whoever reads finds the old version or the new one, and nothing between.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from osteo_daemon.errors import ConfigurationError
from osteo_daemon.inference.bundle import MANIFEST_NAME

_FOLDER: Final = ".registry"
_PART: Final = ".part-"
_VERSION: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+_-]{0,99}")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")  # as bundles are named


class Layout:
    """Paths below the folder of a node's bundles.

    Args:
        models_dir: that folder; it need not exist.
    """

    def __init__(self, models_dir: Path) -> None:
        self.root = models_dir.resolve()
        self._versions = self.root / _FOLDER

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else registers, promotes or rolls back meanwhile; the kernel ends the lock of a killed process.

        Raises:
            ConfigurationError: the folder cannot be written.
        """
        try:
            self._versions.mkdir(mode=0o750, parents=True, exist_ok=True)
            handle = os.open(self._versions / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            raise ConfigurationError(f"{self._versions} cannot be written ({error.strerror})") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            self._sweep()
            yield
        finally:
            os.close(handle)

    def names(self) -> list[str]:
        """Bundles of which a version is registered."""
        return sorted(path.name for path in self._versions.glob("*") if path.is_dir())

    def versions(self, name: str) -> list[Path]:
        """Folders of a bundle's versions, in the order of their names."""
        return sorted(
            path for path in self._folder(name).glob("[!.]*") if path.is_dir() and (path / MANIFEST_NAME).is_file()
        )

    def place(self, name: str, version: str) -> Path:
        """The folder that a version has or would have.

        Raises:
            ConfigurationError: it can't be the name of a version.
        """
        if not _VERSION.fullmatch(version) or version.endswith(".sig"):
            raise ConfigurationError(f"{version!r} cannot be a version: {_VERSION.pattern}")
        return self._folder(name) / version

    def deployed(self, name: str) -> Path | None:
        """The folder that the link names; None without a link. A folder put there by hand is its own."""
        path = self.root / name
        return path.resolve() if path.is_symlink() or path.is_dir() else None

    def is_by_hand(self, name: str) -> bool:
        """Somebody put a folder where the link would be."""
        path = self.root / name
        return path.is_dir() and not path.is_symlink()

    def deploy(self, name: str, version: str) -> None:
        """Make the link name a version; durable when it returns. Only under `alone`."""
        self._point(self.root / name, Path(_FOLDER) / name / version)

    def shadow(self, name: str) -> Path | None:
        """The version that runs in the shadow, None when there is none."""
        path = self._versions / f"{name}.shadow"
        return path.resolve() if path.is_symlink() and path.is_dir() else None

    def cast_shadow(self, name: str, version: str | None) -> None:
        """Make a version run in the shadow, None: no more. Only under `alone`."""
        path = self._versions / f"{name}.shadow"
        if version is None:
            path.unlink(missing_ok=True)
            _sync(path.parent)
        else:
            self._point(path, Path(name) / version)

    def keep(self, source: Path, name: str, version: str) -> Path:
        """Copy a bundle to its place, whole or not at all; durable when it returns. Only under `alone`."""
        target = self.place(name, version)
        part = target.with_name(f"{_PART}{version}")
        target.parent.mkdir(mode=0o750, exist_ok=True)
        shutil.copytree(source, part, copy_function=shutil.copyfile)
        for folder, _, files in os.walk(part):
            for file in files:
                path = Path(folder) / file
                path.chmod(0o440)
                _sync(path)
            _sync(Path(folder))
        part.rename(target)
        _sync(target.parent)
        _sync(self._versions)
        return target

    def write(self, path: Path, content: bytes) -> None:
        """A small file, whole or not at all; durable when it returns. Only under `alone`."""
        part = path.with_name(f"{_PART}{path.name}")
        part.write_bytes(content)
        _sync(part)
        part.replace(path)
        _sync(path.parent)

    def _folder(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ConfigurationError(f"{name!r} cannot be the name of a bundle: {_NAME.pattern}")
        return self._versions / name

    def _point(self, link: Path, target: Path) -> None:
        part = link.with_name(f"{_PART}{link.name}")
        part.symlink_to(target)
        part.replace(link)
        _sync(link.parent)

    def _sweep(self) -> None:
        """What a killed process left unfinished."""
        for folder in (self.root, self._versions, *self._versions.glob("*/")):
            for part in folder.glob(f"{_PART}*"):
                if part.is_dir() and not part.is_symlink():
                    shutil.rmtree(part)
                else:
                    part.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
