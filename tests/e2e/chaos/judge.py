"""What became of every acknowledged object, judged from outside.

The sender's ledger says what was acknowledged, the archive's ledger says what arrived. Of the node only its files are
read: the SQLite file with the standard library, spooled objects with pydicom. Nothing of the product is imported.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydicom

STRUCTURED_REPORTS = {
    "1.2.840.10008.5.1.4.1.1.88.11",  # Basic Text SR
    "1.2.840.10008.5.1.4.1.1.88.22",  # Enhanced SR
    "1.2.840.10008.5.1.4.1.1.88.33",  # Comprehensive SR
    "1.2.840.10008.5.1.4.1.1.88.34",  # Comprehensive 3D SR
}
ENDED = {"DELIVERED", "EXCLUDED"}


@dataclass
class Expected:
    """What each study must end as.

    Attributes:
        exclusions: study to the code that it must be excluded with.
        sources: any other study to the images that its segmentation must name: those of the whole study, screened at
            rest. A report made from a part of the slices names others.
    """

    exclusions: dict[str, str] = field(default_factory=dict)
    sources: dict[str, set[str]] = field(default_factory=dict)


@dataclass
class Verdict:
    """Faults by study, and the counts behind them."""

    acknowledged: int = 0
    reported: int = 0
    excluded: int = 0
    revisions: int = 0
    resent: int = 0
    faults: list[str] = field(default_factory=list)


def read_ledger(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a ledger."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def connect(database: Path) -> sqlite3.Connection:
    """The node's store, read only."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=60)
    connection.row_factory = sqlite3.Row
    return connection


def judge(
    sender: Sequence[Mapping[str, Any]],
    archive: Sequence[Mapping[str, Any]],
    database: Path,
    expected: Expected,
) -> Verdict:
    """Every acknowledged object is kept; every study has one report that covers all of it, or one explained exclusion.

    Args:
        sender: its ledger.
        archive: its ledger.
        database: the node's SQLite file.
        expected: what each study must end as.
    """
    verdict = Verdict(acknowledged=len({entry["uid"] for entry in sender}))
    with connect(database) as store:
        verdict.faults += lost_objects(sender, store)
        for study in dict.fromkeys(entry["study"] for entry in sender):
            verdict.faults += [
                f"study {study[-8:]}: {fault}" for fault in _study(study, archive, store, expected, verdict)
            ]
    counts = Counter(entry["uid"] for entry in archive)
    verdict.resent = sum(counts.values()) - len(counts)
    for uid, digests in _digests(archive).items():
        if len(digests) > 1:
            verdict.faults.append(f"object {uid[-8:]} came with {len(digests)} different contents")
    return verdict


def _digests(archive: Sequence[Mapping[str, Any]]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for entry in archive:
        found.setdefault(entry["uid"], set()).add(entry["digest"])
    return found


def lost_objects(sender: Sequence[Mapping[str, Any]], store: sqlite3.Connection) -> list[str]:
    """Acknowledged objects that have no row, no file, or a file with other pixels."""
    paths = dict(store.execute("SELECT sop_instance_uid, path FROM instances").fetchall())
    faults = []
    for entry in sender:
        path = paths.get(entry["uid"])
        if path is None:
            faults.append(f"object {entry['uid'][-8:]} was acknowledged and has no row")
        elif not Path(path).exists():
            faults.append(f"object {entry['uid'][-8:]} was acknowledged and has no file")
        elif hashlib.sha256(pydicom.dcmread(path).PixelData).hexdigest() != entry["pixels"]:
            faults.append(f"object {entry['uid'][-8:]} was acknowledged and its file holds other pixels")
    return faults


def _study(
    study: str,
    archive: Sequence[Mapping[str, Any]],
    store: sqlite3.Connection,
    expected: Expected,
    verdict: Verdict,
) -> list[str]:
    jobs = store.execute("SELECT * FROM jobs WHERE study_instance_uid = ?", (study,)).fetchall()
    if len(jobs) != 1:
        return [f"{len(jobs)} jobs"]
    job = jobs[0]
    verdict.revisions += job["revision"]
    faults = history_faults(job["job_id"], store)
    accepted = [entry for entry in archive if entry["study"] == study and entry["status"] == 0]
    reports = {entry["uid"]: entry for entry in accepted if entry["class"] in STRUCTURED_REPORTS}
    if study in expected.exclusions:
        code = expected.exclusions[study]
        if (job["state"], job["code"]) != ("EXCLUDED", code) or not job["detail"]:
            faults.append(f"is {job['state']} {job['code']}, expected EXCLUDED {code} with a reason")
        if reports:
            faults.append(f"is excluded and {len(reports)} reports arrived")
        verdict.excluded += not faults
        return faults
    if job["state"] != "DELIVERED":
        return [*faults, f"is {job['state']} {job['code'] or ''} {job['detail'] or ''}"]
    replaced = {uid for entry in reports.values() for uid in entry["predecessors"]}
    final = [uid for uid in reports if uid not in replaced]
    if len(final) != 1:
        faults.append(f"has {len(final)} reports that none replaces")
    if len(reports) > job["revision"]:
        faults.append(f"has {len(reports)} reports of {job['revision']} revisions")
    if final:
        # the report refers to its segmentation, and that to the images whose vertebrae it holds
        evidence = set(reports[final[0]]["evidence"])
        sources = {uid for entry in accepted if entry["uid"] in evidence for uid in entry["sources"]}
        if sources != expected.sources[study]:
            faults.append(f"the report is not that of the whole study ({len(sources)} source images)")
    classes = Counter(
        store.execute(
            "SELECT kind FROM report_objects WHERE job_id = ? AND revision = ? AND kind != 'sr'",
            (job["job_id"], job["revision"]),
        ).fetchall()
    )
    if any(count != 1 for count in classes.values()):
        faults.append("a segmentation or picture was committed twice for one revision")
    verdict.reported += not faults
    return faults


def history_faults(job_id: int, store: sqlite3.Connection) -> list[str]:
    """A report or an exclusion may only be written by the holder of the last claim, while it holds it."""
    holder: str | None = None
    faults = []
    for event in store.execute("SELECT * FROM events WHERE job_id = ? ORDER BY event_id", (job_id,)):
        if event["event"] == "job_claimed":
            holder = event["who"]
            continue
        if event["event"] in ("report_committed", "study_excluded") and holder != event["who"]:
            faults.append(f"{event['event']} by {event['who']}, the claim was held by {holder or 'nobody'}")
        if event["to_state"] is not None:
            holder = None
    return faults
