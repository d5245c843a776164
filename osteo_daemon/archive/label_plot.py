"""Labels as a picture: BMD against the CT's attenuation for each maker, and their distribution."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from osteo_daemon.archive.store import VoiArchive
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.jobs.archive_rows import Label

_BINS = 24


def plot_labels(archive: VoiArchive, labels: Sequence[Label], path: Path) -> None:
    """Write a PNG; no identity is in it.

    Raises:
        ConfigurationError: it cannot be written.
        Damaged: an archived file is missing or has changed.
    """
    named = {label.entry for label in labels}
    hu = {
        (entry.entry, vertebra.level): vertebra.features.get("median_hu")
        for entry in archive.entries()
        if entry.entry in named
        for vertebra in archive.read(entry).vertebrae
    }
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    pairs, distribution = figure.subplots(1, 2)
    for maker in sorted({label.maker for label in labels}):
        own = [label for label in labels if label.maker == maker]
        points = [(hu.get((label.entry, label.level)), label.bmd_g_cm2) for label in own]
        known = [(x, y) for x, y in points if x is not None]
        pairs.plot([x for x, _ in known], [y for _, y in known], ".", alpha=0.6, label=f"{maker} ({len(own)})")
        distribution.hist([y for _, y in points], bins=_BINS, alpha=0.5, label=maker)
    pairs.set(xlabel="trabecular median of the CT [HU]", ylabel="BMD, maker's scale [g/cm2]")
    distribution.set(xlabel="BMD, maker's scale [g/cm2]", ylabel="vertebrae")
    if labels:
        pairs.legend()
        distribution.legend()
    try:
        figure.savefig(path, dpi=110, format="png")
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be written ({error.strerror})") from error
