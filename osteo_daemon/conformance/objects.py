"""What the objects that the node makes hold: read from finished ones."""

from __future__ import annotations

from pydicom.datadict import dictionary_description
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from osteo_daemon.conformance.markdown import code, table
from osteo_daemon.conformance.sample import SOURCE_ATTRIBUTES, SOURCE_UIDS, sample_objects
from osteo_daemon.dicom.contexts import class_name
from osteo_daemon.dicom.report import SR_CLASSES
from osteo_daemon.dicom.report_forms import SENDING_ORDER

_CHARACTER_SET = "SpecificCharacterSet"


def created_objects() -> str:
    """The objects with their classes, and a table of their attributes: copied, or made here."""
    made = sample_objects()
    classes = [
        [code(kind), class_name(str(made[kind].SOPClassUID)), code(made[kind].SOPClassUID), _template(made[kind])]
        for kind in SENDING_ORDER
    ]
    forms = ", ".join(f"{code(name)} ({class_name(uid)})" for name, uid in SR_CLASSES.items())
    tags = sorted({element.tag for dataset in made.values() for element in dataset})
    rows = [
        [str(Tag(tag)), dictionary_description(tag), *(_source(made[kind], tag) for kind in SENDING_ORDER)]
        for tag in tags
    ]
    return "\n\n".join(
        (
            table(("object", "SOP class", "UID", "template"), classes),
            f"Forms of the structured report, newest first; each destination gets the first that it takes: {forms}.",
            "Attributes of the first level: `C` copied from the source images (in ISO_IR 192), `M` made by the node. "
            "What the source lacks is empty where the standard asks for it, and absent otherwise.",
            table(("tag", "attribute", *map(code, SENDING_ORDER)), rows),
        )
    )


def _template(dataset: Dataset) -> str:
    items = dataset.get("ContentTemplateSequence")
    return f"TID {items[0].TemplateIdentifier}" if items else ""


def _source(dataset: Dataset, tag: int) -> str:
    if tag not in dataset:
        return ""
    element = dataset[tag]
    keyword = element.keyword
    copied = {**SOURCE_ATTRIBUTES, **SOURCE_UIDS}.get(keyword)
    return "C" if copied is not None and str(element.value) == copied and keyword != _CHARACTER_SET else "M"
