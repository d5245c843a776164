"""The patient table: a curved or flat thin shell of carbon fibre over a support."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from osteo_daemon.phantom.canvas import Canvas
from osteo_daemon.phantom.labels import Tissue
from osteo_daemon.phantom.outline import Outline
from osteo_daemon.phantom.scanner import Scanner
from osteo_daemon.phantom.spine import Spine

_SHELL_HU: Final = 180.0
_HALF_WIDTH_MM: Final = 205.0


@dataclass(frozen=True, slots=True)
class Table:
    """Painter of the table.

    Attributes:
        kind: "curved", "flat" or "none".
        y: height (mm, posterior) of its top in the middle.
    """

    kind: Literal["curved", "flat", "none"]
    y: float

    def paint(self, canvas: Canvas) -> None:
        """A shell of 1.4 mm, foam, and a second shell."""
        if self.kind == "none":
            return
        region = canvas.region([-_HALF_WIDTH_MM - 5, self.y - 60, -1e5], [_HALF_WIDTH_MM + 5, self.y + 75, 1e5])
        if region is None:
            return
        x2 = region.x * region.x
        sag = np.float32(34.0 / _HALF_WIDTH_MM**2) * x2 if self.kind == "curved" else np.float32(0) * x2
        # seen from the top shell: positive below it
        depth = region.y - np.float32(self.y) + sag
        side = np.abs(region.x) - np.float32(_HALF_WIDTH_MM)
        thick = np.float32(34.0) - np.float32(14.0 / _HALF_WIDTH_MM**2) * x2
        flat = np.zeros_like(region.z)
        slab = np.maximum(np.maximum(-depth, depth - thick), side) + flat
        region.paint(slab, _SHELL_HU, Tissue.TABLE)
        region.paint(slab + np.float32(1.3), -960.0, Tissue.TABLE)


def build_table(scanner: Scanner, spine: Spine, outline: Outline) -> Table:
    """The table under this patient: it touches the back where that is lowest, within the lumbar and pelvic part."""
    z = spine["L3"].centre[2]
    near = np.abs(outline.heights - z) < 200
    return Table(scanner.table, float(outline.skin.back[near].max()) + 4.0)
