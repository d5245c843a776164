"""The virtual scanner: how a body becomes a series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Phase = Literal["native", "arterial", "portal", "delayed"]
Kernel = Literal["soft", "standard", "bone", "lung"]


@dataclass(frozen=True, slots=True)
class KernelShape:
    """Point spread and noise character of a reconstruction kernel.

    Attributes:
        blur_mm: standard deviation of the Gaussian point spread in plane.
        sharpen: strength of the unsharp mask (edge enhancement).
        noise_blur_mm: standard deviation of the noise correlation in plane.
        noise_gain: factor on the nominal noise.
        name: what the ConvolutionKernel attribute says.
    """

    blur_mm: float
    sharpen: float
    noise_blur_mm: float
    noise_gain: float
    name: str


# Widths were set against the edge and noise correlation of a GE SOFT series (lag-1 correlation 0.6 at 0.98 mm).
KERNELS: dict[Kernel, KernelShape] = {
    "soft": KernelShape(0.75, 0.0, 0.70, 1.0, "SOFT"),
    "standard": KernelShape(0.60, 0.15, 0.55, 1.15, "STANDARD"),
    "bone": KernelShape(0.35, 1.0, 0.32, 2.4, "BONE"),
    "lung": KernelShape(0.35, 1.6, 0.30, 3.2, "LUNG"),
}


@dataclass(frozen=True, slots=True)
class Scanner:
    """Acquisition and reconstruction of one series.

    Attributes:
        kvp: tube voltage, 70-150 kV.
        kernel: reconstruction kernel.
        noise_hu: noise SD in the middle of the torso, for the soft kernel.
        noise_grain: factor on the correlation length of the noise in plane.
        motion_mm: standard deviation of further blur in plane, from breathing or a softer filter.
        slice_thickness_mm: full width of the slice sensitivity profile.
        slice_spacing_mm: distance of slices; None is the thickness.
        pixel_spacing_mm: in plane.
        matrix: rows and columns.
        phase: contrast phase.
        hu_offset, hu_scale: miscalibration, applied as ``(hu + 1000) * hu_scale - 1000 + hu_offset`` (water scale).
        table: "curved", "flat" or "none".
        padding_hu: value outside the reconstruction circle; None reconstructs the corners.
        truncate_mm: shift of the field of view to the left, to cut one flank.
        seed: noise of this scan, apart from the body's.
        manufacturer_like: printed in ManufacturerModelName.
    """

    kvp: float = 120.0
    kernel: Kernel = "soft"
    noise_hu: float = 14.0
    noise_grain: float = 1.0
    motion_mm: float = 0.0
    slice_thickness_mm: float = 2.5
    slice_spacing_mm: float | None = None
    pixel_spacing_mm: float = 0.8
    matrix: int = 512
    phase: Phase = "native"
    hu_offset: float = 0.0
    hu_scale: float = 1.0
    table: Literal["curved", "flat", "none"] = "curved"
    padding_hu: float | None = -1024.0
    truncate_mm: float = 0.0
    seed: int = 0
    manufacturer_like: str = "virtual"

    def __post_init__(self) -> None:
        if not 70.0 <= self.kvp <= 150.0:
            raise ValueError(f"kvp must lie in 70-150, got {self.kvp}")
        if self.slice_thickness_mm <= 0 or self.pixel_spacing_mm <= 0 or self.matrix < 8:
            raise ValueError("slice thickness and pixel spacing must be positive, the matrix at least 8")

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel spacing along (D, H, W) in millimetres."""
        between = self.slice_thickness_mm if self.slice_spacing_mm is None else self.slice_spacing_mm
        return between, self.pixel_spacing_mm, self.pixel_spacing_mm

    @property
    def shape(self) -> KernelShape:
        """Point spread and noise of the kernel."""
        return KERNELS[self.kernel]


def coarse_scanner(spacing_mm: float = 3.0, **changes: object) -> Scanner:
    """An isotropic low-resolution scan (what the localiser reads): about 128 x 128 pixels of ``spacing_mm``."""
    matrix = round(384.0 / spacing_mm)
    settings: dict[str, object] = {
        "slice_thickness_mm": spacing_mm,
        "pixel_spacing_mm": spacing_mm,
        "matrix": matrix,
        "noise_hu": 10.0,
        **changes,
    }
    return Scanner(**settings)  # type: ignore[arg-type]
