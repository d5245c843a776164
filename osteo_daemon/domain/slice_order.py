"""What headers of CT slices prove about a series that may still grow.

Only these are held to prove anything: the scanner's own count (Images in Acquisition), numbers from 1 without a hole on
an even grid that is long enough for a lumbar spine, and a hole in both numbers and places. A series cut off at its end
looks like a whole one: an even grid shortens the wait and never replaces it.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from osteo_daemon.domain.completeness import SliceOrder, Slices

LUMBAR_EXTENT_MM = 200.0
"""Shorter stacks don't hold L1 to L5, which measure about 180 mm with their discs; they are not called whole early."""

SPACING_TOLERANCE_MM = 0.15
"""Single steps may differ by so much: scanners write positions rounded to 0.01 to 0.1 mm."""

DIRECTION_TOLERANCE = 1e-3
"""Largest difference between direction cosines within one stack."""

LEAST_SLICES = 5
"""Fewer show no even step."""

Vector = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What one object's header says of its place in a series; None where it says nothing.

    Attributes:
        position_mm: Image Position (Patient), LPS.
        directions: Image Orientation (Patient): direction cosines of rows and columns.
        localizer: a scout image.
        multi_frame: an object that holds its frames itself.
        concatenation_uid: with ``parts``, of one object split into several (PS3.3 C.7.6.16.2.2.4).
    """

    series_instance_uid: str
    instance_number: int | None = None
    acquisition_number: int | None = None
    images_in_acquisition: int | None = None
    position_mm: Vector | None = None
    directions: tuple[float, float, float, float, float, float] | None = None
    localizer: bool = False
    multi_frame: bool = False
    concatenation_uid: str | None = None
    parts: int | None = None


def slices_of_study(images: Iterable[ImageFacts]) -> Slices:
    """What the headers of all objects of screened classes say together; scouts count for nothing.

    Each series must be whole for the study to be called so, and one hole is a hole.
    """
    by_series: dict[str, list[ImageFacts]] = {}
    for image in images:
        if not image.localizer:
            by_series.setdefault(image.series_instance_uid, []).append(image)
    found = [_slices_of_series(series) for series in by_series.values()]
    for order in (SliceOrder.HOLE, SliceOrder.UNKNOWN):
        for slices in found:
            if slices.order is order:
                return slices
    if not found:
        return Slices()
    order = SliceOrder.EVEN if any(slices.order is SliceOrder.EVEN for slices in found) else SliceOrder.COUNTED
    if len(found) == 1:
        return found[0]
    words = "evenly spaced and numbered from 1 without a hole" if order is SliceOrder.EVEN else "as many as were made"
    return Slices(order, f"the images of {len(found)} series are {words}")


def _slices_of_series(images: Sequence[ImageFacts]) -> Slices:
    if any(image.multi_frame for image in images):
        return _multi_frame(images)
    if len(images) < LEAST_SLICES:
        return Slices()
    by_acquisition: dict[int | None, list[ImageFacts]] = {}
    for image in images:
        by_acquisition.setdefault(image.acquisition_number, []).append(image)
    counted = all(_as_many_as_made(group) for group in by_acquisition.values())
    if counted:
        return Slices(SliceOrder.COUNTED, f"all {len(images)} images of the acquisition are here")
    return _even(images)


def _multi_frame(images: Sequence[ImageFacts]) -> Slices:
    if not all(image.multi_frame for image in images):
        return Slices()
    parts = Counter(image.concatenation_uid for image in images if image.concatenation_uid is not None)
    needed: Mapping[str | None, int] = {
        image.concatenation_uid: image.parts or 0 for image in images if image.concatenation_uid is not None
    }
    for uid, count in parts.items():
        if count < needed[uid]:
            return Slices(
                SliceOrder.HOLE, f"{needed[uid] - count} of {needed[uid]} parts of a concatenation are missing"
            )
        if count > needed[uid]:  # also when the number of parts is not told
            return Slices()
    return Slices(SliceOrder.COUNTED, "each multi-frame object holds its frames")


def _as_many_as_made(group: Sequence[ImageFacts]) -> bool:
    """The scanner's count of the acquisition is what is here, each at a place of its own."""
    counts = {image.images_in_acquisition for image in group}
    places = {image.position_mm for image in group}
    return counts == {len(group)} and None not in places and len(places) == len(group)


def _even(images: Sequence[ImageFacts]) -> Slices:
    placed = _along_normal(images)
    numbers = [image.instance_number for image in images]
    if placed is None or None in numbers or len(set(numbers)) < len(numbers):
        return Slices()
    ordered = sorted(placed, key=lambda pair: pair[0])
    steps = [after[0] - before[0] for before, after in itertools.pairwise(ordered)]
    step = fmean(width for width in steps if round(width / max(min(steps), SPACING_TOLERANCE_MM)) <= 1)
    if step <= SPACING_TOLERANCE_MM:
        return Slices()  # several images at one place: phases, sweeps, bolus tracking
    missing, numbered = 0, True
    for width, (before, after) in zip(steps, itertools.pairwise(ordered), strict=True):
        times = round(width / step)
        if times < 1 or abs(width - times * step) > SPACING_TOLERANCE_MM * times:
            return Slices()
        numbered = numbered and abs(after[1] - before[1]) == times
        missing += times - 1
    if missing and not numbered:
        return Slices()  # the numbers know of nothing between: two stacks
    if missing:
        return Slices(SliceOrder.HOLE, f"a hole in a series: {missing} instance numbers and their places are missing")
    extent = ordered[-1][0] - ordered[0][0]
    if {number for _, number in ordered} != set(range(1, len(ordered) + 1)) or extent < LUMBAR_EXTENT_MM:
        return Slices()
    return Slices(
        SliceOrder.EVEN, f"{len(ordered)} images numbered from 1 without a hole, evenly spaced over {extent:.0f} mm"
    )


def _along_normal(images: Sequence[ImageFacts]) -> list[tuple[float, int]] | None:
    """Place along the common normal in mm, and instance number; None when the slices are not parallel."""
    first = images[0].directions
    if first is None:
        return None
    row, column = first[:3], first[3:]
    normal = (
        row[1] * column[2] - row[2] * column[1],
        row[2] * column[0] - row[0] * column[2],
        row[0] * column[1] - row[1] * column[0],
    )
    placed = []
    for image in images:
        if image.directions is None or image.position_mm is None or image.instance_number is None:
            return None
        if any(abs(one - other) > DIRECTION_TOLERANCE for one, other in zip(image.directions, first, strict=True)):
            return None
        place = math.fsum(a * b for a, b in zip(image.position_mm, normal, strict=True))
        placed.append((place, image.instance_number))
    return placed
