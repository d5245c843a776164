"""Slices of one series as stacks: parallel, evenly spaced, told apart by how they were made."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from osteo_daemon.imaging.decoding import pixel_digest
from osteo_daemon.imaging.slices import Slice, Stack

SPACING_TOLERANCE_MM = 0.1
"""A slice may lie this far from the even grid: scanners write positions rounded to 0.01 to 0.1 mm."""

ORIENTATION_TOLERANCE = 1e-3
"""Largest difference between direction cosines within one stack."""

MINIMUM_RUN = 3
"""Fewest slices that show an even step."""


def split_stacks(slices: Sequence[Slice]) -> list[Stack]:
    """Slices of one series as even stacks, the longest first.

    Slices are grouped by orientation, matrix, pixel spacing, kernel, tube voltage and acquisition, frames by their
    stack and moment, too; then ordered along the normal and cut wherever the step changes, so that no stack bridges a
    gap. Copies of an image under another UID count once. Where several sweeps lie under one series they are told apart
    by the order of their instance numbers; images that share a position for no visible reason give no stack.
    """
    groups: dict[tuple[object, ...], list[Slice]] = {}
    for item in slices:
        groups.setdefault(_grid_key(item.header), []).append(item)
    if len(groups) > 1 and sum(len(group) == 1 for group in groups.values()) > len(groups) // 2:
        # makers that number every slice as an acquisition of its own
        groups = {}
        for item in slices:
            groups.setdefault(_grid_key(item.header)[:-1], []).append(item)
    stacks = [stack for group in groups.values() for stack in _even_runs(group)]
    return sorted(stacks, key=lambda stack: (-stack.coverage_mm, -len(stack.slices)))


def _grid_key(header: Dataset) -> tuple[object, ...]:
    orientation = tuple(round(float(value) / ORIENTATION_TOLERANCE) for value in header.ImageOrientationPatient)
    spacing = tuple(round(float(value), 4) for value in header.PixelSpacing)
    keywords = ("ConvolutionKernel", "KVP", "StackID", "TemporalPositionIndex", "AcquisitionNumber")
    made = tuple(str(header.get(keyword, "")) for keyword in keywords)
    return (orientation, spacing, header.get("Rows"), header.get("Columns"), *made)


def _even_runs(group: Sequence[Slice]) -> list[Stack]:
    if len(group) < MINIMUM_RUN:
        return []
    cosines = np.asarray(group[0].header.ImageOrientationPatient, dtype=np.float64)
    normal = np.cross(cosines[:3], cosines[3:])
    ordered = sorted(group, key=lambda item: float(item.position_mm @ normal))
    if _shared_positions(ordered, normal):
        ordered = _without_copies(ordered, normal)
        if _shared_positions(ordered, normal):
            sweeps = _sweeps(group, normal)
            return [stack for sweep in sweeps for stack in _even_runs(sweep)] if len(sweeps) > 1 else []
    positions = np.stack([item.position_mm for item in ordered])
    steps = np.diff(positions, axis=0)
    runs: list[Stack] = []
    start = 0
    for end in range(1, len(ordered)):
        # the mean step so far: positions rounded to 0.1 mm make single steps differ by as much
        if (
            end == len(ordered) - 1
            or np.abs(steps[end] - steps[start:end].mean(axis=0)).max() > SPACING_TOLERANCE_MM + 1e-6
        ):
            if end - start >= MINIMUM_RUN - 1:
                run = slice(start, end + 1)
                runs.append(_stack(ordered[run], positions[run], cosines, len(ordered)))
            start = end
    return runs


def _shared_positions(ordered: Sequence[Slice], normal: npt.NDArray[np.float64]) -> bool:
    along = np.array([item.position_mm @ normal for item in ordered])
    return bool(np.any(np.diff(along) <= SPACING_TOLERANCE_MM))


def _without_copies(ordered: Sequence[Slice], normal: npt.NDArray[np.float64]) -> list[Slice]:
    """Of neighbours at one position with the same stored pixels only the first."""
    kept: list[Slice] = []
    for item in ordered:
        near = [other for other in kept[-4:] if abs((item.position_mm - other.position_mm) @ normal) <= 1e-3]
        if near and any(pixel_digest(item) == pixel_digest(other) for other in near):
            continue
        kept.append(item)
    return kept


def _sweeps(group: Sequence[Slice], normal: npt.NDArray[np.float64]) -> list[list[Slice]]:
    """Slices in the order of their instance numbers, cut wherever they turn back; one list when nothing tells."""
    numbers = [(item.header.get("InstanceNumber"), item.frame_number or 0) for item in group]
    if not all(isinstance(number, int) for number, _ in numbers) or len(set(numbers)) < len(numbers):
        return [list(group)]
    ordered = sorted(group, key=lambda item: (int(item.header.InstanceNumber), item.frame_number or 0))
    sweeps: list[list[Slice]] = [ordered[:1]]
    direction = 0.0
    for before, item in itertools.pairwise(ordered):
        step = float((item.position_mm - before.position_mm) @ normal)
        turned = abs(step) <= SPACING_TOLERANCE_MM or step * direction < 0
        if turned:
            sweeps.append([])
        direction = 0.0 if turned else step
        sweeps[-1].append(item)
    return sweeps


def _stack(
    slices: Sequence[Slice], positions: npt.NDArray[np.float64], cosines: npt.NDArray[np.float64], of: int
) -> Stack:
    row_spacing, column_spacing = (float(value) for value in slices[0].header.PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0] = (positions[-1] - positions[0]) / (len(positions) - 1)
    affine[:3, 1] = cosines[3:] * row_spacing  # from one row to the next: along the column direction
    affine[:3, 2] = cosines[:3] * column_spacing
    affine[:3, 3] = positions[0]
    return Stack(tuple(slices), affine, of - len(slices))
