"""What kind of CT image a header describes: original or derived, true or virtual, with or without contrast agent.

Makers write it in the Image Type, in the Rescale Type or only in the description; each is asked.
"""

from __future__ import annotations

import re

from pydicom.dataset import Dataset

_DERIVED_WORDS = frozenset(
    {
        # localizers, reformations, projections
        *("LOCALIZER", "SCOUT", "TOPOGRAM", "TOPO", "MPR", "CSAMPR", "CSA", "CURVED", "REFORMATTED", "PROJECTION"),
        *("MIP", "MINIP", "AVERAGE", "VRT", "3D", "RENDERED", "BATCH3D"),
        # spectral results: makers' words, and value 4 of PS3.3 C.8.15.2.1.1.5
        *("VNC", "VNCA", "VNU", "MONO", "MONOE", "MONOENERGETIC", "MONOCHROMATIC", "VMI", "IODINE", "GSI", "SBI"),
        *("MATERIAL", "MAT", "ZEFF", "EFF", "ELECTRON", "DENSITY", "WATER", "CALCIUM", "RHO", "PERFUSION"),
        # pictures of the screen, not of the patient
        *("SCREEN", "SAVE", "REPORT", "DOSE"),
    }
)
_WORD = re.compile(r"[A-Z0-9]+")
_MONO_ENERGY = re.compile(r"\d{2,3}\s*KEV|\bKEV\b")
_DESCRIBED = re.compile(
    r"\bVNC\b|\bVNCA\b|\bVNU\b|\bVUE\b|VIRTUAL(?:LY)?\s*(?:NON|UN|NATIVE|MONO)|\bMONO(?:E|PLUS|\+)?\b"
    r"|\bMONO(?:ENERGETIC|CHROMATIC)|\bVMI\b|\bIODINE\b|\bZ\s?-?EFF|EFFECTIVE\s?Z|ELECTRON DENS|\bCALCIUM SUPP"
    r"|\bMI(?:NI)?P\b|\bVRT\b"
)
_HU_TYPES = frozenset({"", "HU", "US"})
"""Rescale Type (0028,1054): HU or unspecified. Others are concentrations, densities, atomic numbers or modified HU."""

_NATIVE = re.compile(
    r"\bNATIV|\bNON[- ]?CON|\bNO[- ]CON|\bUNENH|\bWITHOUT\b|\bW/?O\b|\bOHNE\b|\bSANS\b|\bSIN CONT|\bSENZA\b|\bC-(?!\w)"
    r"|\bNECT\b|\bPRE[- ]?CON|\bPLAIN\b|\bI-(?!\w)"
)
_ENHANCED = re.compile(
    r"\bCONTRAST\b|\bC\+|\bI\+|\bCE\b|\bCECT\b|\bVENOUS\b|\bVENOS|\bVENÖS|\bVEN\b|\bPORTAL|\bPV\b|\bPVP\b|\bART\b|\bARTERI"
    r"|\bDELAY|\bLATE\b|\bNEPHRO|\bEXCRET|\bUROGRAM|\bANGIO|\bCTA\b|\bKM\b|\bPOST[- ]?CON|\bENHANCED\b|\bMIT KM\b"
)
_LONGEST_QUOTE = 80
_NO_AGENT = frozenset({"", "NONE", "NO", "N", "0", "NO CONTRAST", "WITHOUT", "W/O", "NOT APPLIED", "UNKNOWN"})


def texts(header: Dataset, keyword: str) -> list[str]:
    """The values of a text attribute, none when it is absent or empty."""
    value = header.get(keyword)
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str) else [str(item) for item in value]


def quoted(text: str) -> str:
    """What a header says, fit for a reason that people read: no control characters, no novel."""
    return "".join(character if character.isprintable() else "?" for character in text[:_LONGEST_QUOTE])


def why_derived(header: Dataset) -> str | None:
    """Why an image isn't an original CT image in HU, or None when nothing says so."""
    image_type = [value.upper().strip() for value in texts(header, "ImageType")]
    words = {word for value in image_type for word in _WORD.findall(value.replace("_", " "))}
    named = quoted("\\".join(image_type)) or "none"
    if image_type[:1] == ["DERIVED"] or words & _DERIVED_WORDS or any(map(_MONO_ENERGY.search, image_type)):
        return f"only derived or localizer images (image type {named})"
    scale = str(header.get("RescaleType") or "").strip().upper()
    if scale not in _HU_TYPES:
        return f"the values are not Hounsfield units (rescale type {quoted(scale)})"
    # frames of multi-frame CT say it in attributes of their own (PS3.3 C.8.16.2.1.2 and .3)
    volumetric, technique = (
        str(header.get(keyword) or "") for keyword in ("VolumetricProperties", "VolumeBasedCalculationTechnique")
    )
    if volumetric in ("SAMPLED", "DISTORTED") or technique not in ("", "NONE"):
        return f"frames calculated from a volume ({quoted(' '.join(filter(None, (volumetric, technique))))})"
    description = _description(header)
    if _MONO_ENERGY.search(description) or _DESCRIBED.search(description):
        return "described as virtual, spectral or projected images"
    return None


def named_enhanced(header: Dataset) -> bool:
    """Whether description or contrast agent name a contrast phase; the image itself is asked later."""
    description = _description(header)
    if _NATIVE.search(description):
        return False
    if _ENHANCED.search(description):
        return True
    return str(header.get("ContrastBolusAgent") or "").strip().upper() not in _NO_AGENT


def _description(header: Dataset) -> str:
    return str(header.get("SeriesDescription") or "").upper()
