"""Series Description of every kind of result."""

from __future__ import annotations


def series_description(what: str) -> str:
    """Series Description (VR LO, 64 characters) with a short warning.

    English whatever the report's language: work lists and hanging protocols match it, and an archive may keep this
    attribute in a character set of its own.
    """
    return f"Bone screening {what} - unverified, cannot rule out"[:64]
