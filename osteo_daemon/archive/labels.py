"""Labels: readings of densitometers matched to archived CTs. A row that could belong to two CTs belongs to none."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from typing import Final

from osteo_daemon.archive.key import Identity
from osteo_daemon.archive.label_checks import CheckedReading, Rejected, check_readings, flags_on_batch
from osteo_daemon.archive.label_files import Reading, read_file
from osteo_daemon.archive.label_mapping import LabelMapping
from osteo_daemon.archive.record import VertebraRecord
from osteo_daemon.archive.store import VoiArchive
from osteo_daemon.domain.densitometry import to_sbmd
from osteo_daemon.errors import Damaged
from osteo_daemon.jobs.archive_rows import ArchivedEntry, ArchiveRows, Label, LabelImport

WINDOW_DAYS: Final = 180
_SAME_G_CM2: Final = 1e-6
_YOUNG_G_CM2: Final = (1.1407, 0.1118)
"""Mean and SD of NHANES 2005-14 women of 21-30 years (1.064 and 0.106 on Hologic) as sBMD: for the check of classes."""


@dataclass(frozen=True, slots=True)
class Matching:
    """What an import would do, or did.

    Attributes:
        labels: new ones.
        known: readings that are labels already.
        ambiguous, rejected: readings that were not taken, with reasons.
        flags: what is odd about the file as a whole.
        sha256: of the file; of several, over their sorted digests.
        imported: the number of the import; None when nothing was written.
        repeated: this very file was imported before.
    """

    labels: tuple[Label, ...]
    known: int
    ambiguous: tuple[Rejected, ...]
    rejected: tuple[Rejected, ...]
    flags: tuple[str, ...]
    sha256: str
    imported: int | None = None
    repeated: bool = False


@dataclass(frozen=True, slots=True)
class _Ct:
    entry: ArchivedEntry
    identity: Identity
    taken_on: date


@dataclass(slots=True)
class _Sorted:
    """Readings by what became of them."""

    pairs: list[tuple[_Ct, CheckedReading]] = field(default_factory=list)
    ambiguous: list[Rejected] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


def match_file(
    data: bytes, mapping: LabelMapping, archive: VoiArchive, rows: ArchiveRows, *, window_days: int, today: date
) -> Matching:
    """As `match_files`, of one file."""
    return match_files([data], mapping, archive, rows, window_days=window_days, today=today)


def match_files(
    files: Sequence[bytes],
    mapping: LabelMapping,
    archive: VoiArchive,
    rows: ArchiveRows,
    *,
    window_days: int,
    today: date,
) -> Matching:
    """Read, check and match files as one batch; writes nothing.

    Structured reports and HL7 messages come one for each patient: only together do they tell units, scales and mix-ups.
    Of several files one that cannot be read is rejected with its reason, as a row is.

    Args:
        files: the bytes of each; their order counts for the numbers in reasons alone.
        mapping: of their columns.
        archive: whose CTs are matched; needs the key.
        rows: the job store.
        window_days: largest distance between CT and densitometry.
        today: nothing was measured later.

    Raises:
        Damaged: the batch as a whole is refused.
        ConfigurationError: the key cannot be used.
    """
    digests = sorted(hashlib.sha256(data).hexdigest() for data in files)
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    if any(done.sha256 == digest for _, done in rows.label_imports()):
        return Matching((), 0, (), (), (), digest, repeated=True)
    read, unread = _read(files, mapping)
    readings, rejected, flags = check_readings(read, today)
    rejected = unread + rejected
    cts = [
        _Ct(entry, identity, taken_on)
        for entry, identity in archive.identities()
        if (taken_on := _date(identity.study_date)) is not None
    ]
    found = _Sorted(rejected=rejected)
    _match(readings, cts, window_days, found)
    vertebrae = {
        entry.entry: {vertebra.level: vertebra for vertebra in archive.read(entry).vertebrae}
        for entry in {ct.entry.entry: ct.entry for ct, _ in found.pairs}.values()
    }
    labels, known = _labels(found, vertebrae, rows.archive_labels())
    patients = {ct.entry.entry: ct.entry.patient for ct, _ in found.pairs}
    batch = [(label, to_sbmd(label.bmd_g_cm2, label.maker)) for label in labels]
    if labels:
        flags += flags_on_batch(
            (
                (patients[label.entry], sbmd, vertebrae[label.entry][label.level].features.get("median_hu"))
                for label, sbmd in batch
            ),
            (_class(label, sbmd) for label, sbmd in batch),
        )
    return Matching(tuple(labels), known, tuple(found.ambiguous), tuple(found.rejected), tuple(flags), digest)


def _read(files: Sequence[bytes], mapping: LabelMapping) -> tuple[list[Reading], list[Rejected]]:
    if len(files) == 1:
        return read_file(files[0], mapping), []
    readings: list[Reading] = []
    unread = []
    for number, data in enumerate(files, start=1):
        try:
            own = read_file(data, mapping)
        except Damaged as error:
            unread.append(Rejected(f"file {number}", error.detail))
        else:
            readings += [replace(reading, where=f"file {number} {reading.where}") for reading in own]
    if not readings:
        raise Damaged(f"there is no reading of a single vertebra (L1 to L4) in these {len(files)} files")
    return readings, unread


def import_labels(matching: Matching, rows: ArchiveRows, who: str, *, accept_flags: bool) -> Matching:
    """Write what was matched, all or nothing, with who and when.

    Raises:
        Damaged: something is flagged and nobody said that it is all right, or the archive changed meanwhile.
    """
    if matching.repeated or not matching.labels:
        return matching
    if matching.flags and not accept_flags:
        raise Damaged(f"nothing was imported: {'; '.join(matching.flags)} (--accept-flags imports nevertheless)")
    done = LabelImport(
        sha256=matching.sha256,
        imported_at=datetime.now(UTC),
        who=who[:64],
        matched=len(matching.labels),
        known=matching.known,
        ambiguous=len(matching.ambiguous),
        rejected=len(matching.rejected),
    )
    number = rows.add_labels(done, matching.labels)
    return Matching(
        matching.labels if number is not None else (),
        matching.known,
        matching.ambiguous,
        matching.rejected,
        matching.flags,
        matching.sha256,
        number,
        repeated=number is None,
    )


def _match(readings: Iterable[CheckedReading], cts: Sequence[_Ct], window_days: int, found: _Sorted) -> None:
    by_accession: dict[str, list[_Ct]] = defaultdict(list)
    by_patient: dict[str, list[_Ct]] = defaultdict(list)
    for ct in cts:
        by_accession[ct.identity.accession].append(ct)
        by_patient[ct.identity.patient_id].append(ct)
    for entry in readings:
        reading = entry.reading
        candidates = by_accession[reading.accession] if reading.accession else by_patient[reading.patient_id]
        where = reading.where
        if not candidates:
            what = "accession number" if reading.accession else "patient"
            found.rejected.append(Rejected(where, f"no archived CT of this {what}"))
            continue
        if strange := _contradiction(reading.patient_id, reading.issuer, reading.birth_date, candidates):
            found.rejected.append(Rejected(where, strange))
            continue
        own = [ct for ct in candidates if reading.issuer in ("", ct.identity.issuer)]
        own = [ct for ct in own if reading.birth_date in ("", ct.identity.birth_date)]
        if len({ct.entry.patient for ct in own}) > 1:
            found.ambiguous.append(Rejected(where, "several patients have this ID: give its issuer or the birth date"))
            continue
        near = [ct for ct in own if abs((entry.measured_on - ct.taken_on).days) <= window_days]
        if not near:
            closest = min(abs((entry.measured_on - ct.taken_on).days) for ct in own)
            found.rejected.append(Rejected(where, f"the nearest CT is {closest} days away, more than {window_days}"))
            continue
        least = min(abs((entry.measured_on - ct.taken_on).days) for ct in near)
        nearest = [ct for ct in near if abs((entry.measured_on - ct.taken_on).days) == least]
        if len(nearest) > 1:
            found.ambiguous.append(
                Rejected(where, f"{len(nearest)} CTs are {least} days away: give the accession number")
            )
            continue
        found.pairs.append((nearest[0], entry))


def _contradiction(patient_id: str, issuer: str, birth_date: str, candidates: Sequence[_Ct]) -> str | None:
    """Why none of these CTs can be the patient's."""
    if patient_id and all(ct.identity.patient_id != patient_id for ct in candidates):
        return "accession number and patient ID belong to different patients"
    if issuer and all(ct.identity.issuer != issuer for ct in candidates):
        return "the patient ID is of another issuer"
    if birth_date and all(ct.identity.birth_date != birth_date for ct in candidates):
        return "the birth date is another one"
    if not any(issuer in ("", ct.identity.issuer) and birth_date in ("", ct.identity.birth_date) for ct in candidates):
        return "no CT has both this issuer and this birth date"
    return None


def _labels(
    found: _Sorted, vertebrae: Mapping[str, Mapping[str, VertebraRecord]], present: Iterable[Label]
) -> tuple[list[Label], int]:
    """One label for each vertebra: of the densitometry that is nearest to the CT."""
    there = {(label.entry, label.level): label for label in present}
    groups: dict[tuple[str, str], list[tuple[Label, str]]] = defaultdict(list)
    for ct, entry in found.pairs:
        level = entry.reading.level.upper()
        label = Label(
            entry=ct.entry.entry,
            level=level,
            bmd_g_cm2=entry.bmd_g_cm2,
            t_score=entry.t_score,
            maker=entry.maker,
            model=entry.reading.model[:64],
            days_apart=(entry.measured_on - ct.taken_on).days,
        )
        if level not in vertebrae[ct.entry.entry]:
            found.rejected.append(Rejected(entry.reading.where, f"{level} is not in the archived CT"))
        else:
            groups[label.entry, level].append((label, entry.reading.where))
    labels, known = [], 0
    for key, group in groups.items():
        least = min(abs(label.days_apart) for label, _ in group)
        nearest = [(label, where) for label, where in group if abs(label.days_apart) == least]
        found.rejected += [
            Rejected(where, "another densitometry is nearer to the CT")
            for label, where in group
            if abs(label.days_apart) > least
        ]
        if len(nearest) > 1:
            found.ambiguous += [Rejected(where, "two densitometries are as near to one CT") for _, where in nearest]
            continue
        label, where = nearest[0]
        old = there.get(key)
        if old is None:
            labels.append(label)
        elif abs(old.bmd_g_cm2 - label.bmd_g_cm2) < _SAME_G_CM2 and old.maker == label.maker:
            known += 1
        else:
            found.rejected.append(Rejected(where, "this vertebra has another label: osteo labels forget its import"))
    return labels, known


def _class(label: Label, sbmd_g_cm2: float) -> int:
    mean, sd = _YOUNG_G_CM2
    t_score = (sbmd_g_cm2 - mean) / sd if label.t_score is None else label.t_score
    return 2 if t_score <= -2.5 else 1 if t_score <= -1.0 else 0


def _date(text: str) -> date | None:
    try:
        return datetime.strptime(text, "%Y%m%d").replace(tzinfo=UTC).date()
    except ValueError:
        return None
