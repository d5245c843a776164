"""``osteo archive``: the pseudonymous VOIs that are kept for refits."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from osteo_daemon.commands.options import config_option, json_option, open_store, print_json, tell
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.settings import load_settings

if TYPE_CHECKING:
    from osteo_daemon.archive.store import VoiArchive

_MB = 1e6


def open_archive(config: Path | None) -> VoiArchive:
    """The archive of the node with these settings."""
    from osteo_daemon.archive.store import VoiArchive

    settings, store = open_store(config)
    return VoiArchive(settings, store)


@click.group()
def archive() -> None:
    """Vertebrae kept under pseudonyms for refits: voxels and numbers, no identity."""


@archive.command("init")
@json_option
@config_option
def init_archive(as_json: bool, config: Path | None) -> None:
    """Make the key that archive.key_file names. Keep a copy of it apart from the node's backups."""
    from osteo_daemon.archive.key import make_key

    path = load_settings(config).archive.key_file
    if path is None:
        raise ConfigurationError("archive.key_file is not set; it must not lie in the archive")
    make_key(path)
    warning = "keep a copy apart from the node's backups: with it lost, nobody can tell who was who"
    tell(as_json, {"key_file": str(path)}, f"{path} made; {warning}")


@archive.command("status")
@json_option
@config_option
def show_status(as_json: bool, config: Path | None) -> None:
    """How much is kept, since when, and what could not be kept."""
    status = open_archive(config).status()
    settings = load_settings(config).archive
    if as_json:
        values = {"enabled": settings.enabled, "consent": settings.consent, **asdict(status)}
        print_json({**values, **{name: values[name] and str(values[name]) for name in ("oldest", "newest")}})
        return
    click.echo(f"on, by {settings.consent}" if settings.enabled else "off: nothing new is kept")
    click.echo(
        f"{status.studies} studies of {status.patients} patients, {status.vertebrae} vertebrae, "
        f"{status.size_bytes / _MB:.1f} MB, {status.oldest or 'never'} to {status.newest or 'never'}"
    )
    click.echo(f"{status.labels} labels on {status.labelled_studies} studies")
    for reason, count in sorted(status.not_archived.items()):
        click.echo(f"not archived: {count} ({reason})")


@archive.command("list")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="The newest so many.")
@json_option
@config_option
def list_entries(limit: int, as_json: bool, config: Path | None) -> None:
    """Archived studies under their pseudonyms, newest first."""
    entries = open_archive(config).entries()[::-1][:limit]
    rows = [
        {
            "entry": entry.entry,
            "patient": entry.patient,
            "archived_on": str(entry.archived_on),
            "revision": entry.revision,
            "vertebrae": entry.vertebrae,
            "labels": entry.labels,
            "size_bytes": entry.size_bytes,
        }
        for entry in entries
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        click.echo(
            f"{row['archived_on']}  {row['entry']}  patient {row['patient']}  {row['vertebrae']} vertebrae  "
            f"{row['labels']} labels"
        )


@archive.command("forget")
@click.option("--patient", help="Patient ID as in the images.")
@click.option("--issuer", help="Issuer of that ID; without it whoever issued it.")
@click.option("--accession", help="Accession number of one study.")
@click.option("--objects", is_flag=True, help="The patient objects: later studies are not archived either.")
@json_option
@config_option
def forget(
    patient: str | None, issuer: str | None, accession: str | None, objects: bool, as_json: bool, config: Path | None
) -> None:
    """Remove VOIs, labels and links of a patient or of a study. Needs the key."""
    if (patient is None) == (accession is None):
        raise click.UsageError("give --patient or --accession")
    kept = open_archive(config)
    if patient is not None:
        gone = kept.forget_patient(patient, issuer, objects=objects)
    else:
        gone = kept.forget_study(str(accession))
    tell(as_json, {"studies_forgotten": gone}, f"{gone} studies forgotten")


@archive.command("verify")
@click.option("--repair", is_flag=True, help="Forget rows without their file, remove files without a row.")
@click.option("--quick", is_flag=True, help="Compare sizes only, not digests.")
@json_option
@config_option
def verify(repair: bool, quick: bool, as_json: bool, config: Path | None) -> None:
    """Compare files, rows and digests, and try every link. Exit status 1: something is wrong."""
    findings = open_archive(config).verify(repair=repair, digests=not quick)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            click.echo(f"{'repaired' if finding.repaired else 'ERROR'}  {finding.problem}: {finding.detail}")
        click.echo("clean" if all(finding.repaired for finding in findings) else "not clean")
    sys.exit(0 if all(finding.repaired for finding in findings) else 1)


@archive.command("rotate-key")
@json_option
@config_option
def rotate_key(as_json: bool, config: Path | None) -> None:
    """Make a new key and seal every link with it; the node must not run. Interrupted, the next use ends it."""
    from osteo_daemon.archive.key import make_key, new_key_path, read_key, take_over_new_key

    kept = open_archive(config)
    kept.key  # noqa: B018 - ends an exchange that was interrupted, and proves that the old key is at hand
    path = load_settings(config).archive.key_file
    assert path is not None  # noqa: S101 - there is a key
    following = new_key_path(path)
    key = read_key(following) if following.exists() else make_key(following)
    count = kept.rotate(key)
    take_over_new_key(path)
    gone = "the old key is gone, copies of it open old backups of the store only"
    tell(as_json, {"links_sealed": count}, f"{count} links sealed anew; {gone}")
