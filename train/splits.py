"""Patient-level splits that never move: a patient's part follows from a hash of its name alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, Literal

Part = Literal["train", "val", "test", "external"]

SHARES: Final[dict[Part, float]] = {"train": 0.7, "val": 0.12, "test": 0.18}


def part_of(patient: str, external: bool, salt: str = "osteo-split/1") -> Part:
    """The part of one patient; every vertebra and every scan of a patient lies in one part."""
    if external:
        return "external"
    number = int.from_bytes(hashlib.sha256(f"{salt}:{patient}".encode()).digest()[:8], "big") / 2**64
    edge = 0.0
    for part, share in SHARES.items():
        edge += share
        if number < edge:
            return part
    return "test"


def check_disjoint(patients: Sequence[str], parts: Sequence[Part]) -> None:
    """Raises:
    ValueError: a patient lies in two parts.
    """
    seen: dict[str, Part] = {}
    for patient, part in zip(patients, parts, strict=True):
        if seen.setdefault(patient, part) != part:
            raise ValueError(f"patient {patient} lies in {seen[patient]} and in {part}")
