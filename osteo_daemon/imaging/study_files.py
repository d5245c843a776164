"""The files of one study, read once: headers, and ahead of time the voxels of the series that is screened first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from osteo_daemon.errors import Damaged
from osteo_daemon.imaging.decoding import read_volume
from osteo_daemon.imaging.selection import select_series
from osteo_daemon.imaging.slices import Stack, Unreadable, ct_slices, read_headers
from osteo_daemon.imaging.volume import CtVolume


@dataclass(frozen=True, slots=True, eq=False)
class StudyFiles:
    """What the objects of one study hold.

    Attributes:
        headers: path and header without pixels of every readable object.
        unreadable: the other files.
        decoded: files and frames of a stack, in its order, and its volume; None when nothing was decoded ahead.
    """

    headers: tuple[tuple[Path, Dataset], ...]
    unreadable: tuple[Unreadable, ...]
    decoded: tuple[tuple[tuple[Path, int | None], ...], CtVolume] | None = None

    @classmethod
    def read(cls, paths: Iterable[Path]) -> StudyFiles:
        """Read the headers of files in any order."""
        headers, unreadable = read_headers(paths)
        return cls(tuple(headers), tuple(unreadable))

    def decode_ahead(self, maximum_bytes: int) -> StudyFiles:
        """With the volume of the stack that is tried first.

        Nothing is decoded when no series can be screened, when the volume would take more than ``maximum_bytes`` or
        when it is damaged: the screening itself meets that again and says so under the study's own name.
        """
        candidates, _ = select_series(ct_slices(self.headers))
        if not candidates:
            return self
        stack = candidates[0].stack
        voxels = len(stack.slices) * int(stack.header.Rows) * int(stack.header.Columns)
        if voxels * np.dtype(np.float32).itemsize > maximum_bytes:
            return self
        try:
            return replace(self, decoded=(_places(stack), read_volume(stack)))
        except Damaged:
            return self

    def volume(self, stack: Stack) -> CtVolume:
        """The volume of a stack of this study, decoded now unless it was decoded ahead.

        Raises:
            PixelDataUnreadable: a slice cannot be decoded.
        """
        if self.decoded is not None and self.decoded[0] == _places(stack):
            return self.decoded[1]
        return read_volume(stack)


def _places(stack: Stack) -> tuple[tuple[Path, int | None], ...]:
    return tuple(item.place for item in stack.slices)
