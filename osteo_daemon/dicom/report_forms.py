"""Which objects and forms of the report a destination may get, and what a finished object is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from osteo_daemon.dicom.report import SR_CLASSES
from osteo_daemon.settings import DestinationSettings

SENDING_ORDER = ("seg", "sr", "kos", "sc", "pdf")
"""The SR points to the segmentation, which must be there first."""

DEFAULT_KINDS = frozenset({"seg", "sr", "sc"})
"""What is always made; key objects and the PDF only where a destination asks for them."""

SEGMENT_REFERENCE = "+seg"
"""End of the names of forms that point to the segmentation."""


@dataclass(frozen=True, slots=True)
class BuiltObject:
    """A finished DICOM object.

    Attributes:
        kind: one of `SENDING_ORDER`, or ``hl7`` and ``fhir`` for messages.
        variant: which form of the object, "" when there is only one; see `sr_variant`.
        data: the Part 10 file or the message, byte for byte as it is spooled and sent.
    """

    kind: str
    variant: str
    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str
    data: bytes


@dataclass(frozen=True, slots=True)
class BuiltReport:
    """All objects of one screening, and the picture as PNG (None when there is none)."""

    objects: tuple[BuiltObject, ...]
    picture_png: bytes | None

    def for_destination(self, destination: DestinationSettings) -> tuple[BuiltObject, ...]:
        """The objects that one destination may get, in the order of sending.

        Of the structured reports the deliverer sends one: the first whose class the peer takes, and with a reference
        to the segmentation only if the peer has that.
        """
        if not destination.takes_objects:
            return tuple(
                built for built in self.objects if built.kind == destination.kind and built.variant == destination.name
            )
        has_segmentation = any(built.kind == "seg" for built in self.objects)
        variants = sr_candidates(destination.sr_class, has_segmentation and "seg" in destination.objects)
        rank = {variant: number for number, variant in enumerate(variants)}
        wanted = [
            built
            for built in self.objects
            if built.kind in SENDING_ORDER
            and built.kind in destination.objects
            and (built.kind != "sr" or built.variant in rank)
        ]
        return tuple(sorted(wanted, key=lambda built: (SENDING_ORDER.index(built.kind), rank.get(built.variant, 0))))


def sr_variant(sr_class: str, refers_to_segmentation: bool) -> str:
    """Name of a form of the structured report: its class, and whether it points to the segmentation."""
    return f"{sr_class}{SEGMENT_REFERENCE}" if refers_to_segmentation else sr_class


def sr_candidates(sr_class: str, with_segmentation: bool) -> tuple[str, ...]:
    """SR variants to try at a destination, best first: the class set for it, then each that older systems know.

    With a segmentation each class comes twice: with the reference to it, and without, for a peer that refuses it.
    """
    classes = list(SR_CLASSES)
    fallbacks = classes[classes.index(sr_class) :]
    references = (True, False) if with_segmentation else (False,)
    return tuple(sr_variant(name, refers) for name in fallbacks for refers in references)


def needed_variants(destinations: Iterable[DestinationSettings]) -> tuple[str, ...]:
    """SR variants that these destinations may need; the default one alone when there is no destination."""
    wanted = [
        variant
        for entry in destinations
        if entry.takes_objects and "sr" in entry.objects
        for variant in sr_candidates(entry.sr_class, "seg" in entry.objects)
    ]
    return tuple(dict.fromkeys(wanted)) or (sr_variant("comprehensive-3d", refers_to_segmentation=True),)


def needed_kinds(destinations: Iterable[DestinationSettings]) -> frozenset[str]:
    """Kinds of objects that these destinations may need."""
    return DEFAULT_KINDS | {kind for entry in destinations if entry.takes_objects for kind in entry.objects}
