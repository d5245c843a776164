"""Readers that are not ours open the segmentation: highdicom's and dcmqi's, voxel for voxel."""

from __future__ import annotations

import subprocess
from pathlib import Path

import highdicom as hd
import numpy as np
import SimpleITK

from osteo_daemon.dicom.report_objects import build_report_objects
from tests.conftest import require_command
from tests.report_cases import LEVELS, synthetic_case


def test_two_readers_find_the_regions(tmp_path: Path) -> None:
    request = synthetic_case()
    path = tmp_path / "seg.dcm"
    path.write_bytes(next(built.data for built in build_report_objects(request, []).objects if built.kind == "seg"))
    regions = [request.regions[level].body for level in LEVELS]
    regions += [region for level in LEVELS if (region := request.regions[level].trabecular) is not None]
    sizes = [int(np.count_nonzero(region.mask)) for region in regions]

    segmentation = hd.seg.segread(path)
    assert segmentation.segmentation_type is hd.seg.SegmentationTypeValues.BINARY
    numbers = list(segmentation.segment_numbers)
    assert numbers == list(range(1, 2 * len(LEVELS) + 1))
    volume = segmentation.get_volume(rescale_fractional=False)
    assert [int(np.count_nonzero(volume.array[..., number - 1])) for number in numbers] == sizes
    # recommended colours: one a level, told apart
    colours = [tuple(item.RecommendedDisplayCIELabValue) for item in segmentation.SegmentSequence]
    assert len(set(colours[: len(LEVELS)])) == len(LEVELS)
    assert colours[: len(LEVELS)] == colours[len(LEVELS) :]
    codes = {item.SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator for item in segmentation.SegmentSequence}
    assert codes == {"SCT", "99OSTEO"}

    done = subprocess.run(
        [require_command("segimage2itkimage"), "--inputDICOM", str(path), "--outputDirectory", str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for number, size in zip(numbers, sizes, strict=True):
        image = SimpleITK.ReadImage(tmp_path / f"{number}.nrrd")
        assert np.count_nonzero(SimpleITK.GetArrayFromImage(image)) == size
        # the centre of the vertebra lies in its segment, in patient coordinates
        finding = request.result.vertebrae[(number - 1) % len(LEVELS)]
        index = image.TransformPhysicalPointToIndex(finding.centre_lps_mm)
        assert image[index] != 0
