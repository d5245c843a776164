"""``osteo audit``: whether audit messages reach the repository. It shows none of them: they hold patients' names."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import click

from osteo_daemon.commands.options import config_option, json_option, print_json, tell
from osteo_daemon.settings import load_settings


@click.group()
def audit() -> None:
    """Audit messages of this machine (PS3.15 A.5)."""


@audit.command("status")
@json_option
@config_option
def audit_status(as_json: bool, config: Path | None) -> None:
    """How many messages wait here for the audit repository, since when, and how much room is left."""
    from osteo_daemon.audit.spool import AuditSpool
    from osteo_daemon.audit.trail import audit_dir

    settings = load_settings(config)
    wanted = settings.audit
    if not wanted.enabled:
        tell(as_json, {"enabled": False}, "audit messages are off: [audit] enabled")
        return
    spool = AuditSpool(audit_dir(settings), wanted.spool_maximum_bytes)
    oldest = next(iter(spool.waiting(1)), None)
    since = None if oldest is None else datetime.fromtimestamp(oldest.stat().st_mtime, UTC)
    document = {
        "enabled": True,
        "repository": f"{wanted.host}:{wanted.port} ({wanted.transport})" if wanted.host else None,
        "waiting": spool.count(),
        "waiting_since": None if since is None else since.isoformat(timespec="seconds"),
        "size_bytes": spool.size_bytes(),
        "maximum_bytes": wanted.spool_maximum_bytes,
    }
    if as_json:
        print_json(document)
        return
    click.echo(f"repository: {document['repository'] or 'none: messages stay here'}")
    click.echo(f"waiting: {document['waiting']}" + (f", the oldest since {document['waiting_since']}" if since else ""))
    click.echo(f"room: {document['size_bytes']} of {document['maximum_bytes']} bytes taken")
