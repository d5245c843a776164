"""An archive for tests of storage commitment and query: it commits as it is told to, or not at all."""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydicom.dataset import Dataset
from pynetdicom import AE, AllStoragePresentationContexts, build_context, build_role, evt
from pynetdicom.sop_class import Verification

from osteo_daemon.dicom.commitment import STORAGE_COMMITMENT_CLASS_UID, STORAGE_COMMITMENT_INSTANCE_UID
from tests.fakes import LOOPBACK, STUDY_ROOT_FIND

Failures = Mapping[str, int]


@dataclass
class Archive:
    """A PACS on loopback.

    Attributes:
        commits: offers storage commitment.
        queries: offers C-FIND.
        where: ``same`` reports on the asking association, ``new`` on one of its own to `report_port`, ``never``.
        failures: called with the transaction's number and its SOP Instance UIDs; gives those that are not kept, each
            with its Failure Reason.
        silent_on: called with a SOP Instance UID; True leaves it out of reports.
        lists: called with a SOP Instance UID and how often it was asked for; whether a query finds it.
        action_status: answer to N-ACTION.
        before_store: called with the SOP Instance UID before a C-STORE is answered.
        before_action: called with the transaction's number before an N-ACTION is answered.
        digests: SOP Instance UID to the SHA-256 of every data set that came under it.
        transactions: requests in order: Transaction UID and SOP Instance UIDs.
        answers: statuses of our answers to its reports.
    """

    commits: bool = True
    queries: bool = True
    where: str = "same"
    report_port: int = 0
    report_ae_title: str = "PACS"
    failures: Callable[[int, tuple[str, ...]], Failures] = lambda _number, _uids: {}
    silent_on: Callable[[str], bool] = lambda _uid: False
    lists: Callable[[str, int], bool] = lambda _uid, _count: True
    action_status: int = 0x0000
    before_store: Callable[[str], None] = lambda _uid: None
    before_action: Callable[[int], None] = lambda _number: None
    digests: dict[str, set[str]] = field(default_factory=dict)
    port: int = 0
    received: list[str] = field(default_factory=list)
    classes: dict[str, str] = field(default_factory=dict)
    transactions: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    questions: Counter[str] = field(default_factory=Counter)
    answers: list[int] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _server: Any = None

    def __enter__(self) -> Archive:
        entity = AE(ae_title="PACS")
        contexts = [build_context(entry.abstract_syntax) for entry in AllStoragePresentationContexts]
        contexts.append(build_context(Verification))
        if self.commits:
            contexts.append(build_context(STORAGE_COMMITMENT_CLASS_UID))
        if self.queries:
            contexts.append(build_context(STUDY_ROOT_FIND))
        entity.supported_contexts = contexts
        self._server = entity.start_server(
            (LOOPBACK, self.port),
            block=False,
            evt_handlers=[
                (evt.EVT_C_STORE, self._store),
                (evt.EVT_C_FIND, self._find),
                (evt.EVT_N_ACTION, self._action),
            ],
        )
        self.port = self._server.server_address[1]
        return self

    def __exit__(self, *_reason: object) -> None:
        for thread in self._threads:
            thread.join(60)
        self._server.shutdown()

    def report(self, number: int, association: Any = None) -> int:
        """Report on a transaction; gives the status that we answered."""
        transaction, uids = self.transactions[number]
        failures = self.failures(number, uids)
        information = Dataset()
        information.TransactionUID = transaction
        kept = [uid for uid in uids if uid not in failures and not self.silent_on(uid)]
        information.ReferencedSOPSequence = [self._reference(uid) for uid in kept]
        if failures:
            information.FailedSOPSequence = [self._reference(uid, reason) for uid, reason in failures.items()]
        status = self.send_report(information, 2 if failures else 1, association)
        self.answers.append(status)
        return status

    def send_report(self, information: Dataset, event_type: int, association: Any = None) -> int:
        """An N-EVENT-REPORT on this association, or on one of its own; gives the status that we answered."""
        link = association
        if link is None:
            entity = AE(ae_title=self.report_ae_title)
            entity.requested_contexts = [build_context(STORAGE_COMMITMENT_CLASS_UID)]
            role = build_role(STORAGE_COMMITMENT_CLASS_UID, scp_role=True)
            link = entity.associate(LOOPBACK, self.report_port, ae_title="OSTEO", ext_neg=[role])
            assert link.is_established
        answer, _reply = link.send_n_event_report(
            information, event_type, STORAGE_COMMITMENT_CLASS_UID, STORAGE_COMMITMENT_INSTANCE_UID
        )
        if association is None:
            link.release()
        return int(answer.Status)

    def _store(self, event: Any) -> int:
        uid = str(event.request.AffectedSOPInstanceUID)
        self.classes[uid] = str(event.request.AffectedSOPClassUID)
        digest = hashlib.sha256(event.encoded_dataset(include_meta=False)).hexdigest()
        self.digests.setdefault(uid, set()).add(digest)
        self.received.append(uid)
        self.before_store(uid)
        return 0x0000

    def _find(self, event: Any) -> Iterator[tuple[int, Dataset | None]]:
        uid = str(event.identifier.SOPInstanceUID)
        assert event.identifier.QueryRetrieveLevel == "IMAGE"
        assert event.identifier.StudyInstanceUID
        assert event.identifier.SeriesInstanceUID
        self.questions[uid] += 1
        if uid in self.received and self.lists(uid, self.questions[uid]):
            answer = Dataset()
            answer.QueryRetrieveLevel = "IMAGE"
            answer.SOPInstanceUID = uid
            yield 0xFF00, answer

    def _action(self, event: Any) -> tuple[int, None]:
        information = event.action_information
        uids = tuple(str(item.ReferencedSOPInstanceUID) for item in information.ReferencedSOPSequence)
        self.transactions.append((str(information.TransactionUID), uids))
        number = len(self.transactions) - 1
        self.before_action(number)
        if self.action_status == 0x0000 and self.where != "never":
            association = event.assoc if self.where == "same" else None
            thread = threading.Thread(target=self._report_later, args=(number, association))
            self._threads.append(thread)
            thread.start()
        return self.action_status, None

    def _report_later(self, number: int, association: Any) -> None:
        time.sleep(0.1)  # the answer to the request goes first
        if association is None or association.is_established:  # else who asked has gone
            self.report(number, association)

    def _reference(self, uid: str, reason: int | None = None) -> Dataset:
        item = Dataset()
        item.ReferencedSOPClassUID = self.classes.get(uid, "1.2.840.10008.5.1.4.1.1.7")
        item.ReferencedSOPInstanceUID = uid
        if reason is not None:
            item.FailureReason = reason
        return item
