"""OHIF, as npm ships it built, and a web server that puts it beside an archive's DICOMweb under one origin."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import subprocess
import tarfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.unpack import extract
from tests.conftest import ROOT, missing, require_command

_LOCK = Path(__file__).with_name("package-lock.json")
_CACHE = ROOT / "build" / "viewers"
_NAME = "@ohif/app"

# one data source, the archive behind this server; no request leaves the machine
_CONFIG = """window.config = {
  customizationService: [%s],
  routerBasename: null,
  extensions: [],
  modes: [],
  showStudyList: true,
  maxNumberOfWebWorkers: 2,
  showWarningMessageForCrossOrigin: false,
  showCPUFallbackMessage: false,
  strictZSpacingForVolumeViewport: true,
  investigationalUseDialog: { option: 'never' },
  defaultDataSourceName: 'orthanc',
  dataSources: [{
    namespace: '@ohif/extension-default.dataSourcesModule.dicomweb',
    sourceName: 'orthanc',
    configuration: {
      friendlyName: 'orthanc', name: 'orthanc',
      wadoUriRoot: '/dicom-web', qidoRoot: '/dicom-web', wadoRoot: '/dicom-web',
      qidoSupportsIncludeField: false, supportsReject: false, supportsStow: false,
      imageRendering: 'wadors', thumbnailRendering: 'wadors',
      enableStudyLazyLoad: true, supportsFuzzyMatching: false, supportsWildcard: true,
      omitQuotationForMultipartRequest: true,
      bulkDataURI: { enabled: true, relativeResolution: 'studies' },
    },
  }],
};
"""


# docs/report.md: the viewer stops at a measurement group that has a segment and no outline
SKIP_GROUPS_WITHOUT_OUTLINE = """{ onBeforeSRAddMeasurement: { $set: ({ measurement }) =>
  measurement.coords.length ? measurement : { ...measurement, coords: [{}] } } }"""


def ohif() -> Path:
    """Folder of the built viewer at the locked version; fetched once with npm and checked against the lock."""
    entry = json.loads(_LOCK.read_text(encoding="utf-8"))["packages"][f"node_modules/{_NAME}"]
    folder = _CACHE / f"ohif-{entry['version']}"
    if not (folder / "index.html").exists():
        _CACHE.mkdir(parents=True, exist_ok=True)
        # only the package itself: its built files need none of its dependencies
        packed = subprocess.run(
            [require_command("npm"), "pack", "--silent", f"{_NAME}@{entry['version']}"],
            cwd=_CACHE,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        if packed.returncode != 0:
            missing(f"npm could not fetch {_NAME}")
        archive = _CACHE / packed.stdout.split()[-1]
        digest = hashlib.sha512(archive.read_bytes()).digest()
        assert f"sha512-{base64.b64encode(digest).decode()}" == entry["integrity"]
        _unpack(archive, folder)
        archive.unlink()
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    part = folder.with_suffix(".part")
    prefix = "package/dist/"
    with tarfile.open(archive) as package:
        wanted = [m for m in package if m.name.startswith(prefix) and not m.name.endswith(".map")]
        for member in wanted:
            member.name = member.name.removeprefix(prefix)
        extract(package, part, wanted)
    part.rename(folder)


@dataclass
class Viewer:
    """A served viewer: its address, and its customization, read with every page."""

    url: str
    customization: str = ""


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files of the viewer, its configuration, every other path its start page, and /dicom-web from the archive."""

    def __init__(self, *arguments: object, archive: str, folder: Path, viewer: Viewer) -> None:
        self._archive = archive
        self._viewer = viewer
        super().__init__(*arguments, directory=str(folder))  # type: ignore[arg-type]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/dicom-web"):
            self._forward()
        elif path == "/app-config.js":
            self._answer(200, "application/javascript", (_CONFIG % self._viewer.customization).encode())
        else:
            if not Path(self.translate_path(path)).is_file():
                self.path = "/index.html"
            super().do_GET()

    def _forward(self) -> None:
        accept = self.headers.get("Accept", "*/*")
        request = urllib.request.Request(f"{self._archive}{self.path}", headers={"Accept": accept})  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310 - loopback
                self._answer(answer.status, answer.headers.get("Content-Type", ""), answer.read())
        except urllib.error.HTTPError as error:
            self._answer(error.code, "text/plain", error.read())

    def _answer(self, status: int, content_type: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        # the viewer shares memory between its workers, which browsers allow under these two alone
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *_arguments: object) -> None:
        """Nothing: the browser's own errors are what matters."""


@contextmanager
def serving(folder: Path, archive: str) -> Iterator[Viewer]:
    """Serve the viewer on a free port of loopback, with the archive's DICOMweb beside it."""
    viewer = Viewer("")
    handler = partial(_Handler, archive=archive, folder=folder, viewer=viewer)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    viewer.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield viewer
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
