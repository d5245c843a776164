"""What a person may do to studies: ``osteo studies hold|release|retry|reprocess|prioritise|purge``."""

from __future__ import annotations

from getpass import getuser
from pathlib import Path

import click

from osteo_daemon.commands.options import config_option, open_store, reason_option
from osteo_daemon.commands.study_choice import Choice, Named, study_choice
from osteo_daemon.domain.job import Priority

OPERATOR = "operator"
"""Who acts in events that a command leaves."""


@click.command()
@study_choice
@reason_option
@config_option
def hold(choice: Choice, reason: str, config: Path | None) -> None:
    """Stop studies; nothing is deleted, and they wait for `release` or `retry`."""
    _settings, store = open_store(config)
    choice.act("hold", store, lambda uid: store.hold_study(uid, OPERATOR, reason))


@click.command()
@study_choice
@reason_option
@config_option
def release(choice: Choice, reason: str, config: Path | None) -> None:
    """Let held studies go on: each is screened when it has been quiet for long enough."""
    _settings, store = open_store(config)
    choice.act("release", store, lambda uid: store.release_study(uid, OPERATOR, reason))


@click.command()
@study_choice
@reason_option
@config_option
def retry(choice: Choice, reason: str, config: Path | None) -> None:
    """Let held, failed or excluded studies run again at once, with new attempts."""
    _settings, store = open_store(config)
    choice.act("retry", store, lambda uid: store.retry_study(uid, OPERATOR, reason))


@click.command()
@study_choice
@reason_option
@click.option("--localizer", "localizer_bundle", help="Bundle for this revision, instead of screener.localizer_bundle.")
@click.option("--network", "network_bundle", help="Bundle for this revision, instead of screener.network_bundle.")
@config_option
def reprocess(
    choice: Choice,
    reason: str,
    localizer_bundle: str | None,
    network_bundle: str | None,
    config: Path | None,
) -> None:
    """Screen finished studies again under a new revision, whose report names the one before.

    Named studies keep their turn; those that are told by what they have in common wait behind all new ones (backfill).
    """
    settings, store = open_store(config)
    if localizer_bundle or network_bundle:
        from osteo_daemon.inference.bundle import find_bundle

        for name in filter(None, (localizer_bundle, network_bundle)):
            find_bundle(name, settings.bundles_dir)  # a wrong name is said now, not when the study is screened
    choice.act(
        "reprocess",
        store,
        lambda uid: store.reprocess_study(
            uid,
            OPERATOR,
            reason,
            localizer_bundle=localizer_bundle,
            network_bundle=network_bundle,
            priority=None if choice.named else Priority.BACKFILL,
        ),
    )


@click.command()
@study_choice
@click.option(
    "--priority",
    required=True,
    type=Named([priority.name.lower() for priority in Priority]),
    help="Theirs from now on.",
)
@reason_option
@config_option
def prioritise(choice: Choice, priority: str, reason: str, config: Path | None) -> None:
    """Change the class in which studies wait for their screening."""
    _settings, store = open_store(config)
    wanted = Priority[priority.upper()]
    choice.act("prioritise", store, lambda uid: store.prioritise_study(uid, wanted, OPERATOR, reason))


@click.command()
@study_choice
@reason_option
@click.option("--force", is_flag=True, help="Also what was not screened or not delivered: it never will be.")
@click.option("--also-committed", is_flag=True, help="Even if a sender was promised that this node keeps it.")
@config_option
def purge(choice: Choice, reason: str, force: bool, also_committed: bool, config: Path | None) -> None:
    """Remove studies' images and report objects here; job, history and result stay."""
    from osteo_daemon.audit import trail
    from osteo_daemon.audit.events import person
    from osteo_daemon.handling import deletion_of, tell
    from osteo_daemon.jobs.spool import Spool

    settings, store = open_store(config)
    if choice.named and not choice.sure:
        jobs = [job for uid in choice.named for job in store.recent(study_instance_uid=uid, limit=1)]
        for job in jobs:
            what = f"{job.instances} images of a study in state {job.state.value} and its report objects"
            click.confirm(f"Remove {what} from this node?", abort=True, err=choice.as_json)
    spool = Spool(settings.spool_dir)
    trail.open_trail(settings, "command")

    def act(uid: str) -> None:
        deletion = deletion_of(store, uid, person(getuser()))
        store.purge_study(uid, spool, OPERATOR, reason, force=force, also_committed=also_committed)
        tell(deletion)

    choice.act("purge", store, act)


ACTS = (hold, release, retry, reprocess, prioritise, purge)
