"""Heights of a body and what counts as compressed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from osteo_daemon.domain.findings import Category, Level, Outcome, ScreeningResult, Severity, VertebraFinding
from osteo_daemon.imaging.region import Region
from osteo_daemon.inference.canonical import grid_affine
from osteo_daemon.inference.morphometry import Heights, compression_flags, compression_grades, heights

AXES = np.array([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]])


def wedge(front_mm: float, back_mm: float) -> Region:
    """A body of 30 mm depth whose upper endplate falls evenly from back to front; 1.5 mm voxels (z, y, x)."""
    z, y, x = np.meshgrid(*[np.arange(n) * 1.5 for n in (28, 24, 32)], indexing="ij")
    height = front_mm + (back_mm - front_mm) * np.clip((y - 3) / 30, 0, 1)
    mask = (z > 3) & (z < 3 + height) & (y >= 3) & (y <= 33) & (x >= 3) & (x <= 45)
    return Region(mask, grid_affine(np.array([10.0, -20.0, 300.0]), 1.5))


@pytest.mark.parametrize(("front", "back"), [(28, 28), (20, 28), (32, 26)])
def test_heights_of_a_wedge(front: float, back: float) -> None:
    found = heights(wedge(front, back), AXES)
    assert found is not None
    assert found.anterior_mm == pytest.approx(front + 0.15 * (back - front), abs=1.2)
    assert found.middle_mm == pytest.approx((front + back) / 2, abs=1.2)
    assert found.posterior_mm == pytest.approx(front + 0.85 * (back - front), abs=1.2)


def test_an_empty_mask_has_no_heights() -> None:
    assert heights(Region(np.zeros((4, 4, 4), bool), np.eye(4)), AXES) is None


@pytest.mark.parametrize(
    ("own", "severity", "grade"),
    [
        (Heights(28, 27, 28), None, 0),
        (Heights(31, 27, 24), None, 0),  # the shape of a healthy L5
        (Heights(23.5, 26, 28), None, 0),
        (Heights(22, 25, 28), Severity.CAUTION, 1),
        (Heights(20, 24, 28), Severity.BLOCKING, 2),  # wedge
        (Heights(27, 20, 28), Severity.BLOCKING, 2),  # biconcave
        (Heights(19, 19, 19), Severity.BLOCKING, 2),  # crush: low against its neighbours only
        (Heights(16, 22, 28), Severity.BLOCKING, 3),
    ],
)
def test_compression_is_said_by_its_degree(own: Heights, severity: Severity | None, grade: int) -> None:
    healthy = Heights(27.5, 27, 28)
    below, flags, above = compression_flags([healthy, own, healthy])
    assert below == above == ()
    assert [f.severity for f in flags] == ([] if severity is None else [severity])
    assert compression_grades([healthy, own, healthy]) == [0, grade, 0]


def test_a_level_without_heights_is_passed_over() -> None:
    low = Heights(19, 19, 19)
    assert compression_flags([None, low, Heights(27, 27, 27)]) == [(), (), ()]
    assert compression_grades([None, low, Heights(27, 27, 27)]) == [None, 0, 0]


def test_heights_and_grade_survive_the_result_file_and_may_be_missing_from_it() -> None:
    finding = VertebraFinding(Level.L2, (1.0, 2.0, 3.0), 0.9, None, heights_mm=(20.1, 24.0, 28.2), compression_grade=2)
    result = ScreeningResult("1.2", "1.3", Outcome.REPORTED, None, Category.INDETERMINATE, (finding,))
    document = json.loads(json.dumps(result.to_json()))
    assert ScreeningResult.from_json(document) == result
    for key in ("heights_mm", "compression_grade"):
        del document["vertebrae"][0][key]
    (older,) = ScreeningResult.from_json(document).vertebrae
    assert (older.heights_mm, older.compression_grade) == (None, None)
