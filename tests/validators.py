"""Independent validators of DICOM objects: each returns what it complains about, an empty list means accepted."""

from __future__ import annotations

import functools
import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import missing, require_command

_PIXELMED = Path("/usr/share/java/pixelmed.jar")
_BATCH = Path(__file__).with_name("PixelmedBatch.java")
# newer Java limits XPath expressions below what the validator's style sheets need
_XPATH_LIMITS = ("xpathExprOpLimit", "xpathExprGrpLimit", "xpathTotalOpLimit")
_PRIVATE_CODES = re.compile(r"Unrecognized defined term = <99")
_HARMLESS_DSRDUMP = ("VR checker does not support", "template constraints not yet supported")


def dciodvfy(path: Path) -> list[str]:
    """dicom3tools: modules, attributes, values. Private coding schemes are the only warning let through."""
    done = _run([require_command("dciodvfy"), "-new", str(path)])
    lines = (done.stdout + done.stderr).splitlines()
    found = [line for line in lines if line.startswith("Error")]
    found += [line for line in lines if line.startswith("Warning") and not _PRIVATE_CODES.search(line)]
    return found if done.returncode == 0 else [*found, f"dciodvfy ended with {done.returncode}"]


def dsrdump(path: Path) -> list[str]:
    """DCMTK: the content tree and its relationships."""
    done = _run([require_command("dsrdump"), str(path)])
    lines = (done.stdout + done.stderr).splitlines()
    found = [
        line
        for line in lines
        if line.startswith(("W:", "E:", "F:")) and not any(text in line for text in _HARMLESS_DSRDUMP)
    ]
    return found if done.returncode == 0 else [*found, f"dsrdump ended with {done.returncode}"]


def pixelmed(paths: Sequence[Path]) -> dict[Path, list[str]]:
    """PixelMed: the rows of the templates, for many reports at once.

    Its style sheets take seconds of a processor to compile, so one program validates all files.
    """
    require_command("javac")
    command = [
        require_command("java"),
        "-Djava.awt.headless=true",
        # it lives for seconds: the optimising compiler would take longer than it saves
        "-XX:TieredStopAtLevel=1",
        "-XX:+UseSerialGC",
        *(f"-Djdk.xml.{limit}=0" for limit in _XPATH_LIMITS),
        "-cp",
        _class_path(),
        str(_BATCH),
        *(str(path) for path in paths),
    ]
    done = _run(command)
    outputs = dict(part.split("\n", 1) for part in done.stdout.split("@@ ")[1:])
    found = {}
    for path in paths:
        output = outputs.get(str(path), "")
        found[path] = [line for line in output.splitlines() if line.startswith("Error")]
        # neither its exit status nor its silence says that it has finished
        if "Root Template Validation Complete" not in output:
            found[path].append(f"PixelMed did not finish: {done.stderr[-500:]}")
    return found


def measured_groups(path: Path, folder: Path) -> list[dict[str, object]]:
    """dcmqi: the measurement groups that its TID 1500 reader finds (it ends with 0 on anything)."""
    out = folder / "dcmqi.json"
    out.unlink(missing_ok=True)
    done = _run([require_command("tid1500reader"), "--inputDICOM", str(path), "--outputMetadata", str(out)])
    assert done.returncode == 0, done.stderr
    groups: list[dict[str, object]] = json.loads(out.read_text())["Measurements"]
    return groups


def pdf_pages(path: Path, folder: Path) -> int:
    """DCMTK takes the document out, poppler reads it: the number of its pages."""
    out = folder / "document.pdf"
    done = _run([require_command("dcm2pdf"), str(path), str(out)])
    assert done.returncode == 0, done.stderr
    done = _run([require_command("pdfinfo"), str(out)])
    assert done.returncode == 0, done.stderr
    return int(next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("Pages:")))


@functools.cache
def _class_path() -> str:
    if not _PIXELMED.exists():
        missing("libpixelmed-java is not installed (make system-packages)")
    # other XSLT processors on the path change what the validator's style sheets do
    rivals = ("xalan", "xerces", "saxon")
    jars = sorted(_PIXELMED.parent.glob("*.jar"))
    return ":".join(
        [str(_PIXELMED), *(str(jar) for jar in jars if not any(name in jar.name.lower() for name in rivals))]
    )


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=800, check=False)
