"""The console's style sheet and script, read once: no path of a request reaches the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from starlette.responses import Response

from osteo_daemon.console.pages import NotHere, Visit

_FOLDER = Path(__file__).parent / "static"
_TYPES: Final = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml"}
_FILES: Final = {path.name: path.read_bytes() for path in sorted(_FOLDER.iterdir()) if path.suffix in _TYPES}


def show_static(visit: Visit) -> Response:
    """One of the files."""
    name = visit.names["name"]
    if name not in _FILES:
        raise NotHere
    return Response(_FILES[name], media_type=_TYPES[Path(name).suffix])
