"""What acquired a series, as its headers name it."""

from __future__ import annotations

from pydicom.dataset import Dataset

from osteo_daemon.domain.observation import Scanner
from osteo_daemon.imaging.image_kind import texts
from osteo_daemon.imaging.kernel import classify_kernel
from osteo_daemon.imaging.slices import PARSE_ERRORS


def scanner_of(header: Dataset) -> Scanner:
    """Maker, model and kernel class; unknown where the header cannot be read: that is no reason to lose a report."""
    try:
        kernel = classify_kernel(texts(header, "ConvolutionKernel"))
        return Scanner.named(header.get("Manufacturer"), header.get("ManufacturerModelName"), kernel.value)
    except PARSE_ERRORS:
        return Scanner()
