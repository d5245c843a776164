"""A version of a bundle: what it is, what it came from, and how it was judged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from osteo_daemon.errors import BundleError
from osteo_daemon.inference.bundle import ModelBundle, is_shipped

VERDICT_NAME: Final = "docs/verdict.json"
VERDICT_SCHEMA: Final = "osteo-verdict/1"
VERDICTS: Final = ("better", "equal", "worse", "not_enough_data")
PROMOTABLE: Final = ("better", "equal")


@dataclass(frozen=True, slots=True)
class Version:
    """One version.

    Attributes:
        name, version, status: as its metadata says.
        sha256: digest of its manifest: it names the exact bytes.
        path: its folder.
        shipped: it came with the package.
        verdict: of `VERDICTS`; None when it was not judged.
        recommended: what the verdict recommends: ``refit``, ``affine`` or ``parent``.
        compared_with: digest of the bundle that it was judged against, and came from.
        data_sha256, code_version: of its lineage; None when it has none.
    """

    name: str
    version: str
    status: str
    sha256: str
    path: Path
    shipped: bool
    verdict: str | None = None
    recommended: str | None = None
    compared_with: str | None = None
    data_sha256: str | None = None
    code_version: str | None = None

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"path": str(self.path)}


def version_of(bundle: ModelBundle) -> Version:
    """What a verified bundle says of itself.

    Raises:
        BundleError: its verdict or lineage is not of this schema.
    """
    verdict = verdict_of(bundle)
    lineage = (verdict or {}).get("lineage") or bundle.metadata.get("lineage") or {}
    parent = lineage.get("parent") if isinstance(lineage, dict) else None
    return Version(
        name=bundle.name,
        version=bundle.version,
        status=bundle.status,
        sha256=bundle.sha256,
        path=bundle.path,
        shipped=is_shipped(bundle.path),
        verdict=None if verdict is None else str(verdict["verdict"]),
        recommended=None if verdict is None else _text(verdict, "recommended"),
        compared_with=_text(parent, "sha256") if isinstance(parent, dict) else None,
        data_sha256=_text(lineage, "data_sha256") if isinstance(lineage, dict) else None,
        code_version=_text(lineage, "code_version") if isinstance(lineage, dict) else None,
    )


def objection(candidate: Version, deployed: Version) -> str | None:
    """Why a version may not take the deployed one's place; None when it may."""
    title = f"{candidate.name} {candidate.version}"
    if candidate.sha256 == deployed.sha256:
        return f"{title} is deployed already"
    if candidate.shipped:
        return f"{title} came with the package; the way back to it is osteo models rollback"
    if candidate.verdict is None:
        return f"{title} has no verdict: nothing is promoted without one"
    if candidate.verdict not in PROMOTABLE:
        return f"the verdict on {title} is {candidate.verdict}: it is not promoted"
    if candidate.compared_with != deployed.sha256:
        return (
            f"the verdict on {title} compares it with the bundle {(candidate.compared_with or 'unknown')[:12]}, while "
            f"{deployed.version} ({deployed.sha256[:12]}) is deployed: refit against that, or roll back first"
        )
    return None


def verdict_of(bundle: ModelBundle) -> dict[str, Any] | None:
    """The bundle's docs/verdict.json, None when it has none.

    Raises:
        BundleError: it is of another schema.
    """
    if VERDICT_NAME not in bundle.files:
        return None
    path = bundle.path / VERDICT_NAME
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON") from error
    if not isinstance(document, dict) or document.get("schema") != VERDICT_SCHEMA:
        raise BundleError(f"{path} is not of the schema {VERDICT_SCHEMA}")
    if document.get("verdict") not in VERDICTS:
        raise BundleError(f"{path}: the verdict is none of {', '.join(VERDICTS)}")
    return document


def _text(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    return value if isinstance(value, str) else None
