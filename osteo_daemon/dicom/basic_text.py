"""The report as a Basic Text SR, for archives and viewers that know nothing newer.

Basic Text (PS3.3 A.35.1) has no numbers and no coordinates. The tree keeps its containers, codes and concept names, so
that `osteo_daemon.dicom.report_reader` reads it like the others: a number becomes a text of number and unit, an outline
becomes a reference to the slice it lies on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Final

from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.sr.coding import Code

from osteo_daemon.dicom import codes

_UNITS: Final = {codes.HOUNSFIELD.value: "HU", codes.UNITY.value: ""}
"""Units that people write in another way than UCUM."""


def as_basic_text(document: Dataset) -> Dataset:
    """A copy of a TID 1500 document whose tree is legal in Basic Text SR; the caller sets class and instance.

    The conclusion comes first, since such a viewer shows the tree from top to bottom.
    """
    basic = _plain(document)
    basic.file_meta = copy.deepcopy(document.file_meta)
    basic.ConceptNameCodeSequence = Sequence([_coded(codes.DIAGNOSTIC_IMAGING_REPORT)])
    del basic.ContentTemplateSequence  # it follows TID 1500 no longer
    items = [found for item in basic.ContentSequence for found in _convert(item)]
    context = [item for item in items if item.RelationshipType != "CONTAINS"]
    contained = [item for item in items if item.RelationshipType == "CONTAINS"]
    contained.sort(key=lambda item: item.ConceptNameCodeSequence[0].CodeValue != codes.QUALITATIVE_EVALUATIONS.value)
    basic.ContentSequence = Sequence([*context, *contained])
    return basic


def text_number(text: str) -> float:
    """The number that begins a text made from a NUM item.

    Raises:
        ValueError: it does not begin with a number.
    """
    return float(text.partition(" ")[0])


def _convert(item: Dataset) -> Iterator[Dataset]:
    if item.ValueType == "SCOORD":
        for image in item.ContentSequence:
            yield _reference(image)
        return
    if item.ValueType == "NUM":
        measured = item.MeasuredValueSequence[0]
        unit = measured.MeasurementUnitsCodeSequence[0].CodeValue
        item.ValueType = "TEXT"
        item.TextValue = f"{measured.NumericValue} {_UNITS.get(unit, unit)}".strip()
        del item.MeasuredValueSequence
    item.pop("ContentTemplateSequence", None)
    if "ContentSequence" in item:
        item.ContentSequence = Sequence([found for child in item.ContentSequence for found in _convert(child)])
    yield item


def _plain(dataset: Dataset) -> Dataset:
    # highdicom's items refuse to become items of another value type
    plain = Dataset()
    for element in dataset:
        value = Sequence([_plain(item) for item in element.value]) if element.VR == "SQ" else copy.copy(element.value)
        plain.add_new(element.tag, element.VR, value)
    return plain


def _reference(image: Dataset) -> Dataset:
    reference = Dataset()
    reference.RelationshipType = "CONTAINS"
    reference.ValueType = "IMAGE"
    reference.ConceptNameCodeSequence = Sequence([_coded(codes.SOURCE_OF_MEASUREMENT)])
    reference.ReferencedSOPSequence = image.ReferencedSOPSequence
    return reference


def _coded(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code.value, code.scheme_designator, code.meaning
    return item
