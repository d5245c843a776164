"""``osteo models``: versions of model bundles, which of them is deployed, and how a candidate does beside it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from getpass import getuser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from osteo_daemon.commands.options import config_option, json_option, not_blank, print_json, tell
from osteo_daemon.settings import Settings, load_settings

if TYPE_CHECKING:
    from osteo_daemon.jobs.store import JobStore
    from osteo_daemon.registry.registry import Registry
    from osteo_daemon.registry.version import Version

_why = click.option("--reason", required=True, callback=not_blank, help="Why; kept in the history.")
_name = click.option("--name", help="Of the bundle; by default that of the network channel.")
_version = click.argument("version")


@contextmanager
def _open(config: Path | None) -> Iterator[tuple[Settings, JobStore, Registry]]:
    from osteo_daemon.audit import trail
    from osteo_daemon.jobs.store import JobStore
    from osteo_daemon.log import configure_logging
    from osteo_daemon.registry.registry import Registry

    settings = load_settings(config)
    configure_logging(settings.log, "command")
    trail.open_trail(settings, "command")
    store = JobStore(settings.database_url)
    try:
        yield settings, store, Registry(settings, store)
    finally:
        store.close()


def _of(name: str | None, settings: Settings) -> str:
    return name or settings.screener.network_bundle


@click.group()
def models() -> None:
    """Versions of model bundles: register, shadow, compare, promote, roll back."""


@models.command("list")
@json_option
@config_option
def list_models(as_json: bool, config: Path | None) -> None:
    """Every version, what it came from, its verdict, and which is deployed or in the shadow."""
    with _open(config) as (_settings, _store, registry):
        rows = [_row(registry, version) for version in registry.versions()]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        marks = [mark for mark in ("deployed", "shadow", "shipped") if row[mark]]
        marks += [] if row["signed"] is None else ["signed" if row["signed"] else "NOT SIGNED"]
        parent = "" if row["compared_with"] is None else f"  from {row['compared_with'][:12]}"
        verdict = row["verdict"] or "no verdict"
        click.echo(
            f"{row['name']:<18} {row['version']:<36} {row['sha256'][:12]}  {verdict}{parent}  {', '.join(marks)}"
        )


@models.command("show")
@_version
@_name
@json_option
@config_option
def show_model(version: str, name: str | None, as_json: bool, config: Path | None) -> None:
    """One version: lineage, digest, signature, verdict with its reasons, and its history."""
    from osteo_daemon.inference.bundle import read_bundle
    from osteo_daemon.registry.version import verdict_of

    with _open(config) as (settings, _store, registry):
        found = registry.version(_of(name, settings), version)
        row = _row(registry, found)
        verdict = verdict_of(read_bundle(found.path))
        history = [change.to_json() for change in registry.history(found.name) if found.version in _versions(change)]
    if as_json:
        print_json({**row, "verdict_document": verdict, "history": history})
        return
    for key, value in row.items():
        click.echo(f"{key:<14} {'-' if value is None else value}")
    for reason in (verdict or {}).get("reasons", ()):
        click.echo(f"  {reason}")
    _echo_history(history)


@models.command("history")
@_name
@json_option
@config_option
def model_history(name: str | None, as_json: bool, config: Path | None) -> None:
    """Who registered, promoted, rolled back or shadowed what, when and why."""
    with _open(config) as (_settings, _store, registry):
        history = [change.to_json() for change in registry.history(name)]
    if as_json:
        print_json(history)
    else:
        _echo_history(history)


@models.command("register")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--signature", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Its signature's file.")
@_why
@json_option
@config_option
def register_model(folder: Path, signature: Path | None, reason: str, as_json: bool, config: Path | None) -> None:
    """Copy the bundle in FOLDER into the registry. It is not deployed by that."""
    with _open(config) as (_settings, _store, registry):
        kept = registry.register(folder, who=getuser(), reason=reason, signature=signature)
    tell(as_json, kept.to_json(), f"{kept.name} {kept.version} {kept.sha256}")


@models.command("sign")
@_version
@click.option(
    "--key", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Private, PEM."
)
@_name
@json_option
@config_option
def sign_model(version: str, key: Path, name: str | None, as_json: bool, config: Path | None) -> None:
    """Sign a registered version with an Ed25519 key."""
    with _open(config) as (settings, _store, registry):
        registry.sign(_of(name, settings), version, key)
    of = _of(name, settings)
    tell(as_json, {"name": of, "version": version, "signed": True}, f"{of} {version} is signed")


@models.command("promote")
@_version
@_name
@_why
@json_option
@config_option
def promote_model(version: str, name: str | None, reason: str, as_json: bool, config: Path | None) -> None:
    """Deploy a version whose verdict is better or equal. Screeners take it up before their next study."""
    with _open(config) as (settings, _store, registry):
        before = registry.promote(_of(name, settings), version, who=getuser(), reason=reason)
    tell(
        as_json,
        {"name": before.name, "deployed": version, "before": before.version},
        f"{before.name}: {version} is deployed, {before.version} before; undo: osteo models rollback",
    )


@models.command("rollback")
@_name
@_why
@json_option
@config_option
def roll_back_model(name: str | None, reason: str, as_json: bool, config: Path | None) -> None:
    """Deploy the version again that was deployed before the present one."""
    with _open(config) as (settings, _store, registry):
        now = registry.rollback(_of(name, settings), who=getuser(), reason=reason)
    tell(as_json, {"name": now.name, "deployed": now.version}, f"{now.name}: {now.version} is deployed again")


@models.command("shadow")
@click.argument("version", required=False)
@click.option("--stop", is_flag=True, help="No candidate runs any more.")
@_why
@json_option
@config_option
def shadow_model(version: str | None, stop: bool, reason: str, as_json: bool, config: Path | None) -> None:
    """Let a version look at every study beside the deployed one; nothing of it is reported."""
    if stop == (version is not None):
        raise click.UsageError("a version, or --stop")
    with _open(config) as (settings, _store, registry):
        registry.cast_shadow(_of(None, settings), version, who=getuser(), reason=reason)
    line = "no candidate runs" if stop else f"{version} runs in the shadow; see osteo models compare {version}"
    tell(as_json, {"name": _of(None, settings), "shadow": version}, line)


@models.command("compare")
@_version
@json_option
@config_option
def compare_model(version: str, as_json: bool, config: Path | None) -> None:
    """The candidate beside the deployed bundle on the studies of its shadow, and its verdict."""
    from osteo_daemon.registry.paired import MINIMUM_STUDIES, compare_shadow

    with _open(config) as (settings, store, registry):
        candidate = registry.version(_of(None, settings), version)
        deployed = registry.deployed(candidate.name)
        # what it was compared with then may not be what is deployed now
        rows = [row for row in store.shadows(candidate.sha256) if row.deployed_sha256 == deployed.sha256]
    found = compare_shadow(rows)
    if as_json:
        print_json({"candidate": candidate.to_json(), "deployed": deployed.to_json(), "shadow": found.to_json()})
        return
    click.echo(f"{candidate.version} beside {deployed.version}: verdict {candidate.verdict or 'none'}")
    click.echo(f"{found.studies} studies in the shadow, {found.seconds[0]} s each (longest {found.seconds[1]} s)")
    for error, count in found.failed.items():
        click.echo(f"  {count} with {error}")
    if found.bmd is None:
        click.echo(f"BMD: fewer than {MINIMUM_STUDIES} studies with both, nothing is said")
    else:
        bmd = found.bmd
        low, high = bmd.bias_interval_95_g_cm2
        click.echo(f"BMD of {bmd.vertebrae} vertebrae: candidate less deployed {bmd.bias_g_cm2:+.4f} g/cm2, ")
        click.echo(
            f"  95 % interval {low:+.4f} to {high:+.4f} over {bmd.studies} studies, correlation {bmd.correlation}"
        )
        click.echo(
            f"  limits of agreement {bmd.limits_of_agreement_g_cm2[0]:+.4f} to {bmd.limits_of_agreement_g_cm2[1]:+.4f}"
        )
    if found.class_agreement is not None:
        click.echo(
            f"class: {found.class_agreement:.1%} of {found.class_vertebrae} vertebrae alike, kappa {found.class_kappa}"
        )


@models.command("verify")
@json_option
@config_option
def verify_models(as_json: bool, config: Path | None) -> None:
    """Check digests and signatures of every version. Exit status 0: all is sound; 1: something is wrong."""
    with _open(config) as (_settings, _store, registry):
        found = registry.verify()
    if as_json:
        print_json([{"bundle": title, "fault": fault} for title, fault in found])
    else:
        for title, fault in found:
            click.echo(f"{'ok' if fault is None else 'FAIL':<5} {title}{'' if fault is None else ': ' + fault}")
    sys.exit(0 if all(fault is None for _, fault in found) else 1)


def _row(registry: Registry, version: Version) -> dict[str, Any]:
    shadow = registry.shadow(version.name)
    return version.to_json() | {
        "deployed": registry.deployed(version.name).path == version.path,
        "shadow": shadow is not None and shadow.path == version.path,
        "signed": registry.is_signed(version),
    }


def _versions(change: Any) -> tuple[str | None, str | None]:
    return change.from_version, change.to_version


def _echo_history(history: list[dict[str, Any]]) -> None:
    for change in history:
        click.echo(
            f"{change['at'][:19]}  {change['who']}  {change['name']} {change['kind'].replace('_', ' ')}: "
            f"{change['from_version'] or '-'} -> {change['to_version'] or '-'}  {change['reason']}"
        )
