"""``osteo labels``: what densitometers measured of archived vertebrae."""

from __future__ import annotations

import getpass
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import click

from osteo_daemon.commands.options import config_option, json_option, open_store, print_json, tell
from osteo_daemon.errors import Damaged

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_MAXIMUM_BYTES = 200 * 1000**2


@click.group()
def labels() -> None:
    """Densitometry of archived vertebrae, for refits."""


@labels.command("import")
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@click.option("--map", "mapping_file", type=_FILE, help="TOML that names the file's columns (docs/labels.md).")
@click.option("--window-days", type=click.IntRange(min=0), default=180, show_default=True, help="From CT to DXA.")
@click.option("--dry-run", is_flag=True, help="Say what would be imported; write nothing.")
@click.option("--accept-flags", is_flag=True, help="Import although something about the file is odd.")
@json_option
@config_option
def import_file(
    file: Path,
    mapping_file: Path | None,
    window_days: int,
    dry_run: bool,
    accept_flags: bool,
    as_json: bool,
    config: Path | None,
) -> None:
    """Match FILE (CSV, Excel, HL7 ORU or DXA structured report) to archived CTs and keep what matches.

    FILE may be a folder: all files in it are one batch, numbered in the order of their names. Needs the archive's key.
    All or nothing is written; the same file twice adds nothing. Exit status 3: refused.
    """
    from osteo_daemon.archive.label_mapping import read_mapping
    from osteo_daemon.archive.labels import import_labels, match_files
    from osteo_daemon.archive.store import VoiArchive

    settings, store = open_store(config)
    paths = sorted(path for path in file.rglob("*") if path.is_file()) if file.is_dir() else [file]
    if not paths:
        raise Damaged("the folder holds no file")
    if sum(path.stat().st_size for path in paths) > _MAXIMUM_BYTES:
        raise Damaged(f"it is larger than {_MAXIMUM_BYTES // 1000**2} MB")
    mapping = read_mapping(mapping_file)
    done = match_files(
        [path.read_bytes() for path in paths],
        mapping,
        VoiArchive(settings, store),
        store,
        window_days=window_days,
        today=datetime.now(UTC).date(),
    )
    if not as_json:
        for kind, rows in (("ambiguous", done.ambiguous), ("rejected", done.rejected)):
            for row in rows:
                click.echo(f"{kind:<10} {row.where}: {row.reason}")
        for flag in done.flags:
            click.echo(f"FLAG       {flag}")
    if not dry_run:
        done = import_labels(done, store, getpass.getuser(), accept_flags=accept_flags)
    if as_json:
        print_json(
            {
                "matched": len(done.labels),
                "known": done.known,
                "ambiguous": [asdict(row) for row in done.ambiguous],
                "rejected": [asdict(row) for row in done.rejected],
                "flags": done.flags,
                "sha256": done.sha256,
                "imported": done.imported,
                "repeated": done.repeated,
            }
        )
        return
    if done.repeated:
        click.echo("this file was imported before; nothing was added")
        return
    click.echo(
        f"{len(done.labels)} matched, {done.known} known, {len(done.ambiguous)} ambiguous, "
        f"{len(done.rejected)} rejected"
    )
    click.echo(f"import {done.imported}" if done.imported is not None else "nothing was written")


@labels.command("status")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Write a picture (PNG) of BMD and HU.")
@json_option
@config_option
def show_status(plot: Path | None, as_json: bool, config: Path | None) -> None:
    """Labels by device and level, and the imports that brought them."""
    settings, store = open_store(config)
    known = store.archive_labels()
    by_device = Counter(f"{label.maker} {label.model}".strip() for label in known)
    by_level = Counter(label.level for label in known)
    imports = store.label_imports()
    if plot is not None:
        from osteo_daemon.archive.label_plot import plot_labels
        from osteo_daemon.archive.store import VoiArchive

        plot_labels(VoiArchive(settings, store), known, plot)
    if as_json:
        print_json(
            {
                "labels": len(known),
                "studies": len({label.entry for label in known}),
                "by_device": dict(sorted(by_device.items())),
                "by_level": dict(sorted(by_level.items())),
                "imports": [
                    {"import": number, **asdict(done), "imported_at": done.imported_at.isoformat()}
                    for number, done in imports
                ],
            }
        )
        return
    click.echo(f"{len(known)} labels on {len({label.entry for label in known})} studies")
    for name, count in sorted(by_device.items()):
        click.echo(f"  {name}: {count}")
    click.echo("  " + ", ".join(f"{level} {count}" for level, count in sorted(by_level.items())) * bool(by_level))
    for number, done in imports:
        click.echo(
            f"import {number}  {done.imported_at:%Y-%m-%d %H:%M}  {done.who}  {done.matched} matched, "
            f"{done.known} known, {done.ambiguous} ambiguous, {done.rejected} rejected  sha256 {done.sha256[:12]}"
        )


@labels.command("forget")
@click.argument("number", type=int)
@json_option
@config_option
def forget(number: int, as_json: bool, config: Path | None) -> None:
    """Remove import NUMBER and its labels; the file may then be imported again."""
    _settings, store = open_store(config)
    removed = store.drop_import(number)
    tell(as_json, {"import": number, "labels_removed": removed}, f"{removed} labels removed")
