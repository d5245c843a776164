"""DICOM segmentations as other makers write them: whole vertebrae or bodies, on any grid, coded or with labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import numpy.typing as npt
import pydicom
from highdicom import seg
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from osteo_daemon.dicom import codes
from osteo_daemon.domain.findings import Level

STRUCTURE = Code("123037004", "SCT", "Anatomical Structure")
BONE = Code("272673000", "SCT", "Bone")
TISSUE = Code("85756007", "SCT", "Tissue")


def write_segmentation(
    path: Path,
    masks: Mapping[str, npt.NDArray[np.bool_]],
    affine: npt.NDArray[np.float64],
    source: Sequence[Dataset],
    *,
    types: Mapping[str, Code] | None = None,
    fractional: bool = False,
    compressed: bool = False,
    **attributes: Any,
) -> Path:
    """Write (D, H, W) masks, label to mask, on the grid of ``affine`` (4, 4) as one segmentation of ``source``.

    Args:
        types: property type of each label; vertebrae are coded by the level in their label when it is not given.
        attributes: of the data set, set (or, when None, deleted) after all.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    labels = list(masks)
    pixels = np.stack([masks[label] for label in labels], axis=-1).astype(np.float32 if fractional else np.uint8)
    count = len(pixels)
    row, column = affine[:3, 1], affine[:3, 2]
    spacing = [float(np.linalg.norm(row)), float(np.linalg.norm(column))]
    orientation = [*(column / spacing[1]), *(row / spacing[0])]
    dataset = seg.Segmentation(
        source_images=list(source),
        pixel_array=pixels,
        segmentation_type="FRACTIONAL" if fractional else "BINARY",
        fractional_type="PROBABILITY",
        segment_descriptions=[
            seg.SegmentDescription(
                segment_number=number,
                segment_label=label,
                segmented_property_category=STRUCTURE,
                segmented_property_type=types[label] if types else codes.VERTEBRAE[Level(label.split("_")[-1])],
                algorithm_type="MANUAL",
            )
            for number, label in enumerate(labels, start=1)
        ],
        series_instance_uid=hd.UID(),
        series_number=77,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="Another maker",
        manufacturer_model_name="Editor",
        software_versions="1",
        device_serial_number="1",
        transfer_syntax_uid=RLELossless if compressed else ExplicitVRLittleEndian,
        pixel_measures=hd.PixelMeasuresSequence(spacing, float(np.linalg.norm(affine[:3, 0])), None),
        plane_orientation=hd.PlaneOrientationSequence("PATIENT", orientation),
        plane_positions=[
            hd.PlanePositionSequence("PATIENT", [float(v) for v in affine[:3, 3] + d * affine[:3, 0]])
            for d in range(count)
        ],
        omit_empty_frames=True,
    )
    for keyword, value in attributes.items():
        if value is None:
            del dataset[keyword]
        else:
            setattr(dataset, keyword, value)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path
