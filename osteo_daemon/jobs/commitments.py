"""Proof that a destination keeps what it accepted: storage commitment transactions and answers to queries."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime

from sqlalchemy import Connection, insert, select, update

from osteo_daemon.jobs.database import Database
from osteo_daemon.jobs.delivery_rows import claimed, end_delivered, loaded, move, note, send_again, set_values
from osteo_daemon.jobs.records import Commitment, CommitmentState, Delivery, DeliveryState
from osteo_daemon.jobs.schema import CommitmentRow, DeliveryObjectRow, DeliveryRow
from osteo_daemon.jobs.transitions import utc_now

PROOF_ROUNDS_MAXIMUM = 3
"""So often objects that a destination does not keep are sent again; then the delivery is a dead letter."""

COMMITTED = "committed"
"""Proof and outcome: the destination reported that it keeps the objects."""

STORED_UNPROVEN = "stored, unproven"
"""Outcome where the site accepts that a destination gives no proof."""

_CLASS_NOT_COMMITTED = 0x0122
"""Failure Reason (0008,1197) of a destination that keeps the object and does not promise for its class."""


class Commitments(Database):
    """Proofs, as the deliverer asks for them and the receiver hears of them."""

    def commitment_asked(self, delivery: Delivery, transaction_uid: str, *, now: datetime | None = None) -> None:
        """A transaction is about to leave: an event report may come before its answer.

        Raises:
            LeaseLost: another worker has the delivery.
        """
        with self._writing() as connection:
            row = claimed(connection, delivery)
            connection.execute(
                insert(CommitmentRow).values(
                    transaction_uid=transaction_uid,
                    delivery_id=delivery.delivery_id,
                    round=row.proof_rounds,
                    state=CommitmentState.ASKED,
                    requested_at=now or utc_now(),
                )
            )

    def commitment_answered(self, transaction_uid: str, state: CommitmentState, detail: str | None = None) -> None:
        """The destination took the request (ACCEPTED) or not (REFUSED); a report that came first stays."""
        with self._writing() as connection:
            connection.execute(
                update(CommitmentRow)
                .where(CommitmentRow.transaction_uid == transaction_uid, CommitmentRow.state == CommitmentState.ASKED)
                .values(state=state, detail=detail)
            )

    def commitments(self, delivery_id: int) -> list[Commitment]:
        """The transactions of a delivery, newest first."""
        query = (
            select(CommitmentRow.__table__)
            .where(CommitmentRow.delivery_id == delivery_id)
            .order_by(CommitmentRow.requested_at.desc())
        )
        with self._reading() as connection:
            return [Commitment(**row._asdict()) for row in connection.execute(query)]

    def commitment_reported(
        self,
        transaction_uid: str,
        destinations: Collection[str],
        committed: Collection[str],
        failed: Mapping[str, int],
        *,
        now: datetime | None = None,
    ) -> Delivery:
        """A destination reports on a transaction (N-EVENT-REPORT); the same report twice changes nothing more.

        What it does not keep is sent again, `PROOF_ROUNDS_MAXIMUM` times; what it says nothing of is left to a query.

        Args:
            destinations: names under which the reporting peer is known here.
            committed: SOP Instance UIDs that it keeps.
            failed: SOP Instance UIDs that it does not keep, each with its Failure Reason.

        Returns:
            The delivery as it stands now.

        Raises:
            KeyError: no such transaction with this peer.
        """
        now = now or utc_now()
        with self._writing() as connection:
            row = connection.execute(
                select(CommitmentRow.__table__, DeliveryRow.destination, DeliveryRow.created_at)
                .join(DeliveryRow, DeliveryRow.delivery_id == CommitmentRow.delivery_id)
                .where(CommitmentRow.transaction_uid == transaction_uid)
                .with_for_update()
            ).one_or_none()
            if row is None or row.destination not in destinations:
                raise KeyError(transaction_uid)
            reasons = ", ".join(sorted({f"0x{reason:04X}" for reason in failed.values()}))
            connection.execute(
                update(CommitmentRow)
                .where(CommitmentRow.transaction_uid == transaction_uid)
                .values(
                    state=CommitmentState.PARTIAL if failed else CommitmentState.COMMITTED,
                    detail=f"{len(failed)} not committed: {reasons}" if failed else None,
                    answered_at=now,
                )
            )
            _prove(connection, row.delivery_id, committed, COMMITTED, now)
            before = loaded(connection, row.delivery_id)
            lost = frozenset(
                report.sop_instance_uid
                for report in before.unproven
                if failed.get(report.sop_instance_uid, _CLASS_NOT_COMMITTED) != _CLASS_NOT_COMMITTED
            )
            # a report on an earlier round, or from before a resend by hand, speaks of what has been sent again since
            if lost and row.round == before.proof_rounds and row.requested_at >= row.created_at:
                held = before.state is DeliveryState.SENDING
                _lost(connection, before, lost, f"reported as not kept: {reasons}", now, held=held)
            elif not lost:
                _concluded(connection, before, now)
                if loaded(connection, row.delivery_id).state is DeliveryState.AWAITING:
                    # reported, but not on every object: a query now, not at the end of the waiting time
                    set_values(connection, row.delivery_id, not_before=None, changed_at=now)
            return loaded(connection, row.delivery_id)

    def objects_proved(
        self, delivery: Delivery, sop_instance_uids: Collection[str], proof: str, *, now: datetime | None = None
    ) -> Delivery:
        """A query found these objects at the destination.

        Raises:
            LeaseLost: another worker has the delivery.
        """
        with self._writing() as connection:
            claimed(connection, delivery)
            _prove(connection, delivery.delivery_id, sop_instance_uids, proof, now or utc_now())
            return loaded(connection, delivery.delivery_id)

    def delivery_await(
        self, delivery: Delivery, until: datetime, detail: str, *, asked: bool = False, now: datetime | None = None
    ) -> DeliveryState:
        """Wait for the proof until ``until``, then be claimed again; a report that came meanwhile counts at once.

        Args:
            asked: a query was answered, and not with all objects.

        Returns:
            AWAITING, or what an event report has made of the delivery: DELIVERED, PENDING, REFUSED.

        Raises:
            LeaseLost: another worker has the delivery.
        """
        now = now or utc_now()
        with self._writing() as connection:
            row = claimed(connection, delivery)
            questions = row.proof_questions + asked
            move(
                connection,
                delivery.delivery_id,
                DeliveryState.AWAITING,
                now,
                not_before=until,
                detail=detail,
                proof_questions=questions,
            )
            present = loaded(connection, delivery.delivery_id)
            _concluded(connection, present, now, who=row.worker)
            return loaded(connection, delivery.delivery_id).state

    def delivery_lost(
        self, delivery: Delivery, sop_instance_uids: frozenset[str], detail: str, *, now: datetime | None = None
    ) -> DeliveryState:
        """The destination does not have objects that it accepted: send them again, or give up.

        Raises:
            LeaseLost: another worker has the delivery.
        """
        with self._writing() as connection:
            claimed(connection, delivery)
            present = loaded(connection, delivery.delivery_id)
            _lost(connection, present, sop_instance_uids, detail, now or utc_now(), held=False)
            return loaded(connection, delivery.delivery_id).state

    def delivery_unproven(self, delivery: Delivery, detail: str, *, now: datetime | None = None) -> None:
        """Everything was accepted and there is no proof to be had: visible, and the job stays REPORTED.

        Raises:
            LeaseLost: another worker has the delivery.
        """
        now = now or utc_now()
        with self._writing() as connection:
            row = claimed(connection, delivery)
            move(connection, delivery.delivery_id, DeliveryState.UNPROVEN, now, outcome="unproven", detail=detail)
            note(connection, delivery, row.worker, "delivery_unproven", detail, now)


def _prove(connection: Connection, delivery_id: int, uids: Collection[str], proof: str, now: datetime) -> None:
    connection.execute(
        update(DeliveryObjectRow)
        .where(
            DeliveryObjectRow.delivery_id == delivery_id,
            DeliveryObjectRow.sop_instance_uid.in_(tuple(uids)),
            DeliveryObjectRow.status.is_not(None),
            DeliveryObjectRow.proof.is_(None),
        )
        .values(proof=proof, proved_at=now)
    )


def _lost(
    connection: Connection, delivery: Delivery, uids: frozenset[str], detail: str, now: datetime, *, held: bool
) -> None:
    # held: by a deliverer, which sees the unsent objects at its next step and keeps its lease until then
    if delivery.state in (DeliveryState.DELIVERED, DeliveryState.REFUSED):
        # too late to change what others were told; the study's history says it
        note(connection, delivery, "store", "commitment_failed", detail, now)
        return
    if delivery.proof_rounds >= PROOF_ROUNDS_MAXIMUM:
        text = f"{detail}; sent {delivery.proof_rounds + 1} times"
        move(connection, delivery.delivery_id, DeliveryState.REFUSED, now, outcome="refused", detail=text)
        note(connection, delivery, "store", "delivery_refused", text, now)
        return
    send_again(connection, delivery.delivery_id, uids)
    rounds = delivery.proof_rounds + 1
    if held:
        set_values(connection, delivery.delivery_id, proof_rounds=rounds, proof_questions=0, detail=detail)
    else:
        move(
            connection,
            delivery.delivery_id,
            DeliveryState.PENDING,
            now,
            proof_rounds=rounds,
            proof_questions=0,
            outcome=None,
            detail=detail,
        )
    note(connection, delivery, "store", "delivery_again", f"{len(uids)} objects: {detail}", now)


def _concluded(connection: Connection, delivery: Delivery, now: datetime, who: str = "store") -> None:
    """What follows from the proofs of a delivery that no deliverer holds."""
    if delivery.state in (DeliveryState.SENDING, DeliveryState.DELIVERED, DeliveryState.REFUSED):
        return
    if delivery.unsent:
        if delivery.state is not DeliveryState.PENDING:
            move(connection, delivery.delivery_id, DeliveryState.PENDING, now)
    elif not delivery.unproven:
        end_delivered(connection, delivery, who, proven_outcome(delivery), now)


def proven_outcome(delivery: Delivery) -> str:
    """Outcome of a delivery of which every stored object is proven, for instance ``committed``."""
    proofs = {entry.proof for entry in delivery.objects if entry.stored and entry.proof is not None}
    return with_omissions(delivery, " and ".join(sorted(proofs)))


def with_omissions(delivery: Delivery, outcome: str) -> str:
    """``outcome``, with what the destination would not take."""
    missing = {entry.report.kind for entry in delivery.objects} - {
        entry.report.kind for entry in delivery.objects if entry.stored
    }
    names = {"seg": "segmentation", "sr": "report", "sc": "picture"}
    return f"{outcome} without {', '.join(names.get(kind, kind) for kind in sorted(missing))}" if missing else outcome
