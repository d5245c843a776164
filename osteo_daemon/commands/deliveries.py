"""``osteo deliveries``: what goes to which destination, what it refused, and what a person may do about it."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from osteo_daemon.commands.options import (
    config_option,
    echo_fields,
    json_option,
    open_store,
    print_json,
    reason_option,
    tell,
)
from osteo_daemon.domain.breaker import Breaker, BreakerState
from osteo_daemon.errors import Damaged
from osteo_daemon.jobs.records import Delivery, DeliveryState

if TYPE_CHECKING:
    from osteo_daemon.jobs.store import JobStore

OPERATOR = "operator"

_MOST_ROWS = 1000
_delivery_argument = click.argument("delivery_id", type=int)
_dead_option = click.option("--dead", is_flag=True, help="Dead letters: refused for good, or patience ended.")
_unproven_option = click.option("--unproven", is_flag=True, help="Accepted, but there is no proof that it is kept.")
_destination_option = click.option("--destination", help="Only of this destination.")


@click.group()
def deliveries() -> None:
    """What goes to which destination and what became of it."""


@deliveries.command("list")
@config_option
@_dead_option
@_unproven_option
@click.option(
    "--state",
    type=click.Choice([state.value for state in DeliveryState], case_sensitive=False),
    help="Only deliveries in this state.",
)
@_destination_option
@click.option("--study", "study_instance_uid", help="Only of this Study Instance UID.")
@click.option("--limit", type=click.IntRange(1, _MOST_ROWS), default=50, show_default=True, help="Rows of a page.")
@click.option("--before", "before_delivery_id", type=int, help="Next page: the number that the last one ended with.")
@json_option
def list_deliveries(
    config: Path | None,
    dead: bool,
    unproven: bool,
    state: str | None,
    destination: str | None,
    study_instance_uid: str | None,
    limit: int,
    before_delivery_id: int | None,
    as_json: bool,
) -> None:
    """List deliveries, the newest first, a page at a time."""
    _settings, store = open_store(config)
    page = store.deliveries(
        states=_states(dead, unproven, state),
        destination=destination,
        study_instance_uid=study_instance_uid,
        before_delivery_id=before_delivery_id,
        limit=limit,
    )
    if as_json:
        print_json([_row(delivery) for delivery in page])
        return
    if not page:
        click.echo("no deliveries")
    for delivery in page:
        why = delivery.outcome or ""
        if delivery.detail and delivery.state is not DeliveryState.DELIVERED:
            why = delivery.detail
        click.echo(
            f"{delivery.delivery_id:>7} {delivery.state.value:<9} {delivery.destination:<12} r{delivery.revision} "
            f"{delivery.attempts:>3} attempts  {delivery.study_instance_uid}  {why}"
        )
    if len(page) == limit:
        click.echo(f"more: --before {page[-1].delivery_id}", err=True)


@deliveries.command("show")
@_delivery_argument
@json_option
@config_option
def show_delivery(delivery_id: int, as_json: bool, config: Path | None) -> None:
    """Show one delivery: each object with answer and proof, and the storage commitments asked for."""
    _settings, store = open_store(config)
    delivery = _delivery(store, delivery_id)
    row = _row(delivery)
    objects = [
        {
            "kind": entry.report.kind.value,
            "variant": entry.report.variant,
            "sop_instance_uid": entry.report.sop_instance_uid,
            "sha256": entry.report.sha256,
            "status": entry.status,
            "proof": entry.proof,
        }
        for entry in delivery.objects
    ]
    commitments = [
        {
            "transaction_uid": entry.transaction_uid,
            "state": entry.state.value,
            "requested_at": _text(entry.requested_at),
            "answered_at": _text(entry.answered_at),
            "detail": entry.detail,
        }
        for entry in store.commitments(delivery_id)
    ]
    if as_json:
        print_json({**row, "objects": objects, "commitments": commitments})
        return
    echo_fields(row)
    for entry in objects:
        answer = f"answer {entry['status'] or 'none'}  proof {entry['proof'] or 'none'}"
        click.echo(f"object          {entry['kind']:<14} {answer}  {entry['sop_instance_uid']}")
    for asked in commitments:
        detail = f"  {asked['detail']}" if asked["detail"] else ""
        click.echo(f"commitment      {asked['requested_at']}  {asked['state']}  {asked['transaction_uid']}{detail}")


@deliveries.command("resend")
@click.argument("delivery_ids", type=int, nargs=-1)
@_dead_option
@_unproven_option
@_destination_option
@json_option
@config_option
def resend_deliveries(
    delivery_ids: tuple[int, ...],
    dead: bool,
    unproven: bool,
    destination: str | None,
    as_json: bool,
    config: Path | None,
) -> None:
    """Send dead letters or unproven deliveries again: those named, or all of --dead or --unproven."""
    if bool(delivery_ids) == (dead or unproven):
        raise click.UsageError("name deliveries, or give --dead or --unproven for all of them")
    if delivery_ids and destination is not None:
        raise click.UsageError("--destination goes with --dead or --unproven, not with numbers")
    _settings, store = open_store(config)
    chosen: Iterable[int] = delivery_ids or _all(store, _states(dead, unproven, None), destination)
    sent: list[Delivery] = []
    try:
        for delivery_id in chosen:
            try:
                sent.append(store.resend(delivery_id, OPERATOR))
            except KeyError:
                raise _not_ended(store, delivery_id) from None
            if not as_json:
                click.echo(_done("resend", sent[-1]))
    finally:
        if as_json:  # those before the one that could not be sent, too
            print_json([_row(delivery) for delivery in sent])
    if not sent and not as_json:
        click.echo("nothing to resend")


@deliveries.command("accept")
@_delivery_argument
@reason_option
@json_option
@config_option
def accept_delivery(delivery_id: int, reason: str, as_json: bool, config: Path | None) -> None:
    """Settle a dead letter or an unproven delivery by hand: it counts as delivered, and its outcome says by whom."""
    _settings, store = open_store(config)
    try:
        delivery = store.accept_delivery(delivery_id, OPERATOR, reason)
    except KeyError:
        raise _not_ended(store, delivery_id) from None
    tell(as_json, _row(delivery), _done("accept", delivery))


@deliveries.command("destinations")
@config_option
@json_option
def list_destinations(config: Path | None, as_json: bool) -> None:
    """List destinations: whether each answers, when it is asked again, and how many deliveries stand in which state."""
    settings, store = open_store(config)
    breakers, counts = store.breakers(), store.delivery_counts()
    configured = [entry.name for entry in settings.destinations]
    names = list(dict.fromkeys([*configured, *breakers, *(name for name, _state in counts)]))
    rows = [
        _destination_row(
            name,
            name in configured,
            breakers.get(name),
            {state.value: count for (destination, state), count in counts.items() if destination == name},
        )
        for name in names
    ]
    if as_json:
        print_json(rows)
        return
    for row in rows:
        line = f"{row['destination']:<16} {row['breaker']:<9}"
        line += " ".join(f" {state} {count}" for state, count in sorted(row["deliveries"].items()))
        if not row["configured"]:
            line += "  not in the settings: nobody sends these"
        if row["breaker"] != BreakerState.CLOSED.value:
            line += f"  since {row['since']}, {row['failures']} failures, next probe {row['next_probe_at']}"
        if row["error"]:
            line += f"  {row['error']}"
        click.echo(line)
    if not rows:
        click.echo("no destinations")


def _states(dead: bool, unproven: bool, state: str | None) -> tuple[DeliveryState, ...]:
    named = [DeliveryState(state.upper())] if state is not None else []
    chosen = [*([DeliveryState.REFUSED] if dead else []), *([DeliveryState.UNPROVEN] if unproven else []), *named]
    return tuple(dict.fromkeys(chosen))


def _all(store: JobStore, states: tuple[DeliveryState, ...], destination: str | None) -> list[int]:
    found: list[int] = []
    while True:
        before = found[-1] if found else None
        page = store.deliveries(states=states, destination=destination, before_delivery_id=before, limit=_MOST_ROWS)
        if not page:
            return sorted(found)
        found += [delivery.delivery_id for delivery in page]


def _delivery(store: JobStore, delivery_id: int) -> Delivery:
    try:
        return store.delivery(delivery_id)
    except KeyError:
        raise Damaged(f"no delivery {delivery_id}; see osteo deliveries list") from None


def _not_ended(store: JobStore, delivery_id: int) -> Damaged:
    delivery = _delivery(store, delivery_id)
    return Damaged(
        f"delivery {delivery_id} is {delivery.state.value}; only REFUSED and UNPROVEN ones wait for a person"
    )


def _done(what: str, delivery: Delivery) -> str:
    return f"{what}: {delivery.delivery_id} to {delivery.destination}, {delivery.study_instance_uid}"


def _row(delivery: Delivery) -> dict[str, Any]:
    return {
        "delivery_id": delivery.delivery_id,
        "study_instance_uid": delivery.study_instance_uid,
        "revision": delivery.revision,
        "destination": delivery.destination,
        "state": delivery.state.value,
        "attempts": delivery.attempts,
        "created_at": _text(delivery.created_at),
        "not_before": _text(delivery.not_before),
        "outcome": delivery.outcome,
        "detail": delivery.detail,
    }


def _destination_row(name: str, configured: bool, breaker: Breaker | None, counts: dict[str, int]) -> dict[str, Any]:
    return {
        "destination": name,
        "configured": configured,
        "breaker": (BreakerState.CLOSED if breaker is None else breaker.state).value,
        "since": None if breaker is None else _text(breaker.since),
        "failures": 0 if breaker is None else breaker.failures,
        "next_probe_at": None if breaker is None else _text(breaker.next_probe_at),
        "error": None if breaker is None else breaker.error,
        "deliveries": counts,
    }


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="seconds")
