"""Does the destination keep what it accepted: storage commitment, else a query, else the delivery is unproven.

Accepted (C-STORE) is not kept: an archive may take an object into memory and lose it. The site says for each
destination what counts: ``storage-commitment`` (the default; falls back to a query when the archive refuses or never
reports), ``c-find``, or ``none``.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from osteo_daemon.delivery.back_off import back_off_seconds
from osteo_daemon.delivery.transport import remote_ae
from osteo_daemon.delivery.web_transport import find_on_the_web
from osteo_daemon.dicom.commitment import CommitmentReport, new_transaction_uid, request_commitment
from osteo_daemon.dicom.query import find_instances
from osteo_daemon.errors import Refused
from osteo_daemon.jobs.commitments import STORED_UNPROVEN, proven_outcome, with_omissions
from osteo_daemon.jobs.records import Commitment, CommitmentState, Delivery, DeliveryState, ReportObject
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.settings import DestinationSettings, Settings

FOUND = "found"
"""Proof and outcome: the destination lists the objects."""

QUESTIONS_BEFORE_SENDING_AGAIN = 4
"""An archive may list what it took a while later; objects that are not there after so many questions are sent again."""

_OPEN = frozenset({CommitmentState.ASKED, CommitmentState.ACCEPTED})


class Proof:
    """The proof of one claimed delivery of which every object was answered."""

    def __init__(
        self, settings: Settings, destination: DestinationSettings, store: JobStore, delivery: Delivery
    ) -> None:
        self._destination = destination
        self._store = store
        self._delivery = delivery
        self._deliverer = settings.deliverer
        self._calling = settings.receiver.ae_title
        self._settings = settings

    def obtain(self) -> str:
        """Take the next step; returns the outcome that was written.

        Raises:
            PeerUnavailable: try again later.
            LeaseLost: another worker has the delivery.
        """
        if not self._destination.takes_objects or self._destination.commitment == "none":
            outcome = with_omissions(self._delivery, "stored")
            self._store.delivery_done(self._delivery, outcome)
            return outcome
        if not self._delivery.unproven:
            return self._await(datetime.now(UTC), "")
        if self._destination.kind == "dicom" and self._destination.commitment == "storage-commitment":
            until = self._commitment()
            state = self._store.delivery(self._delivery.delivery_id).state
            if state is not DeliveryState.SENDING:
                return _outcome(state)  # a report on the same association has made it a dead letter
            if until is not None:
                return self._await(until, "waits for the report of a storage commitment")
        return self._query()

    def _commitment(self) -> datetime | None:
        """When the wait for a report ends; None when there is none to wait for."""
        asked = [
            entry
            for entry in self._store.commitments(self._delivery.delivery_id)
            # what was asked before a person had everything sent again says nothing of what was sent since
            if entry.round == self._delivery.proof_rounds and entry.requested_at >= self._delivery.created_at
        ]
        if not asked or (asked[0].state is CommitmentState.ASKED and len(asked) == 1):
            # never asked, or the process ended before the answer: a report on either transaction counts
            return self._ask()
        return self._patience(asked[0])

    def _patience(self, commitment: Commitment) -> datetime | None:
        until = commitment.requested_at + timedelta(seconds=self._deliverer.commitment_timeout_seconds)
        return until if commitment.state in _OPEN and datetime.now(UTC) < until else None

    def _ask(self) -> datetime | None:
        transaction_uid = new_transaction_uid()
        self._store.commitment_asked(self._delivery, transaction_uid)
        try:
            request_commitment(
                remote_ae(self._settings, self._destination),
                self._calling,
                transaction_uid,
                self._delivery.unproven,
                connect_timeout_seconds=self._deliverer.connect_timeout_seconds,
                dimse_timeout_seconds=self._deliverer.dimse_timeout_seconds,
                linger_seconds=self._deliverer.commitment_linger_seconds,
                accepted=lambda: self._store.commitment_answered(transaction_uid, CommitmentState.ACCEPTED),
                reported=self._reported,
            )
        except Refused as error:
            self._store.commitment_answered(transaction_uid, CommitmentState.REFUSED, error.detail)
        present = self._store.delivery(self._delivery.delivery_id)
        if present.unsent or not present.unproven:
            return datetime.now(UTC)  # the report came on the same association and says all there is to say
        return self._patience(self._store.commitments(self._delivery.delivery_id)[0])

    def _reported(self, report: CommitmentReport) -> None:
        names = (self._destination.name,)
        self._store.commitment_reported(report.transaction_uid, names, report.committed, report.failed)

    def _query(self) -> str:
        unproven = self._store.delivery(self._delivery.delivery_id).unproven
        try:
            found = self._find(unproven)
        except Refused as error:
            return self.give_up(f"no proof to be had: {error.detail}")
        present = self._store.objects_proved(self._delivery, found, FOUND)
        if present.unsent:
            return self._await(datetime.now(UTC), "reported as not kept meanwhile")
        if not present.unproven:
            outcome = proven_outcome(present)
            self._store.delivery_done(self._delivery, outcome)
            return outcome
        missing = frozenset(report.sop_instance_uid for report in present.unproven)
        detail = f"{len(missing)} of {len(present.objects)} objects not found by a query"
        questions = present.proof_questions + 1
        if questions < QUESTIONS_BEFORE_SENDING_AGAIN:
            pause = back_off_seconds(self._deliverer.retry_base_seconds, questions)
            return self._await(datetime.now(UTC) + timedelta(seconds=pause), detail, asked=True)
        return _outcome(self._store.delivery_lost(self._delivery, missing, detail))

    def _find(self, objects: Sequence[ReportObject]) -> frozenset[str]:
        if self._destination.kind == "dicomweb":
            return find_on_the_web(self._settings, self._destination, objects)
        return find_instances(
            remote_ae(self._settings, self._destination),
            self._calling,
            objects,
            connect_timeout_seconds=self._deliverer.connect_timeout_seconds,
            dimse_timeout_seconds=self._deliverer.dimse_timeout_seconds,
        )

    def give_up(self, detail: str) -> str:
        """Everything was accepted and no proof is to be had: what that means is the site's choice.

        Raises:
            LeaseLost: another worker has the delivery.
        """
        if not self._destination.accept_unproven:
            self._store.delivery_unproven(self._delivery, detail)
            return "unproven"
        outcome = with_omissions(self._delivery, STORED_UNPROVEN)
        self._store.delivery_done(self._delivery, outcome)
        return outcome

    def _await(self, until: datetime, detail: str, *, asked: bool = False) -> str:
        return _outcome(self._store.delivery_await(self._delivery, until, detail, asked=asked))


def _outcome(state: DeliveryState) -> str:
    return state.value.lower()
