"""Reading the next study while the present one is computed: headers, and voxels where they fit."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from osteo_daemon.imaging.study_files import StudyFiles
from osteo_daemon.link import Link
from osteo_daemon.log import get_logger, where


class Ahead:
    """The study that is read while another one is computed; never more than one."""

    def __init__(self, maximum_bytes: int, link: Link) -> None:
        self._maximum_bytes = maximum_bytes
        self._link = link
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._key: tuple[Any, ...] | None = None
        self._files: Future[StudyFiles] | None = None

    def start(self, message: Mapping[str, Any]) -> None:
        """Begin to read a study; what was read before and not used is dropped."""
        if self._files is not None:
            self._files.cancel()
        self._key = _key(message)
        self._files = self._pool.submit(self._read, message, [Path(path) for path in message["paths"]])

    def take(self, message: Mapping[str, Any]) -> Future[StudyFiles] | None:
        """The files, perhaps still being read, of just this study, revision and set of instances.

        None when others were read: those are dropped.
        """
        files, key = self._files, self._key
        self._files = self._key = None
        return files if key == _key(message) else None

    def _read(self, message: Mapping[str, Any], paths: list[Path]) -> StudyFiles:
        start = time.perf_counter()
        files = StudyFiles.read(paths).decode_ahead(self._maximum_bytes)
        duration = round(time.perf_counter() - start, 2)
        get_logger().info(
            "study_prefetched",
            study_instance_uid=message["study"],
            instances=len(files.headers),
            outcome="headers" if files.decoded is None else "decoded",
            duration_s=duration,
        )
        self._link.send({"type": "prefetched", "job": message["job"]})
        return files


def read_ahead(files: Future[StudyFiles] | None) -> StudyFiles | None:
    if files is None:
        return None
    try:
        return files.result()
    except Exception as error:  # noqa: BLE001 - reading ahead is a help: the study is read again at its own turn
        get_logger().warning("prefetch_failed", error=type(error).__name__, detail=where(error.__traceback__))
        return None


def _key(message: Mapping[str, Any]) -> tuple[Any, ...]:
    return (message["study"], message["revision"], *message["paths"])
