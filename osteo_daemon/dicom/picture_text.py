"""Text of pictures: fonts of the language, lines measured in the font that draws them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from osteo_daemon.domain.decision import decide
from osteo_daemon.domain.findings import ScreeningResult
from osteo_daemon.domain.wording import Wording

SIZE_PIXELS: Final = 1024
BACKGROUND: Final = "#101418"
TEXT: Final = "#F2F2F2"
MUTED: Final = "#A9B4BF"
BODY: Final = "#56B4E9"  # Okabe and Ito: told apart with every common colour vision deficiency
REGION: Final = "#E69F00"

# A line may end after any ideograph or kana, but not before a closing mark (JIS X 4051, GB/T 15834).
_CLOSING: Final = "、。，．：；）】」』！？・ー～々"
_PIECES: Final = re.compile(
    rf" +|[（【「『]?[\u2e80-\u9fff\uf900-\ufaff][{_CLOSING}]*|[^ \u2e80-\u9fff\uf900-\ufaff（【「『]+|."
)


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """A square figure with the fonts and words of one language. Coordinates are fractions of it, from below."""

    figure: Figure
    families: tuple[str, ...]
    wording: Wording

    def text(self, x: float, y: float, text: str, color: str = TEXT, size: float = 14, **style: Any) -> Any:
        """Write on the page."""
        return self.figure.text(x, y, text, color=color, fontsize=size, fontfamily=list(self.families), **style)

    def on(self, axes: Any, x: float, y: float, text: str, color: str = TEXT, size: float = 14, **style: Any) -> Any:
        """Write at data coordinates of axes."""
        return axes.text(x, y, text, color=color, fontsize=size, fontfamily=list(self.families), **style)

    def width(self, text: str, size: float, weight: str = "normal") -> float:
        """Width of a line as a fraction of the page."""
        font = FontProperties(family=list(self.families), size=size, weight=weight)
        return float(self._renderer.get_text_width_height_descent(text, font, ismath=False)[0]) / SIZE_PIXELS

    def left_edge(self, artist: Any) -> float:
        """Left edge of a text on the page, its box included."""
        box = artist.get_window_extent(self._renderer)
        return float(box.x0) / SIZE_PIXELS - 0.01

    def fitting(self, text: str, width: float, size: float, weight: str = "normal") -> float:
        """The largest font size up to ``size`` at which a line is no wider than ``width``."""
        while self.width(text, size, weight) > width and size > 8:
            size -= 0.5
        return size

    def wrap(self, text: str, width: float, size: float, weight: str = "normal") -> list[str]:
        """Lines of at most ``width``; languages without spaces break between characters."""
        lines = [""]
        for piece in _PIECES.findall(text):
            longer = lines[-1] + piece
            if not lines[-1].strip() or self.width(longer.rstrip(), size, weight) <= width:
                lines[-1] = longer
            else:
                lines.append(piece)
        return [line.strip() for line in lines if line.strip()]

    @staticmethod
    def index_hu(result: ScreeningResult) -> float | None:
        """The attenuation in HU that decided the category."""
        return decide(result.vertebrae, result.quality_flags).index_hu

    @property
    def _renderer(self) -> Any:
        return self.figure.canvas.get_renderer()  # type: ignore[attr-defined]
