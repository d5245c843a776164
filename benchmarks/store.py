"""The job store with a million finished studies: ``python -m benchmarks.store``.

Studies, instances, jobs, events, results, report objects and deliveries are made by the database itself, then the
store's own methods are timed, one after another as a role calls them: SQLite and PostgreSQL on the same disk, every
commit durable. ``--quick`` fills 20 000 studies.
"""

from __future__ import annotations

import argparse
import secrets
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine

from benchmarks.results import write_result
from osteo_daemon.domain.job import JobState
from osteo_daemon.domain.study import SopInstance
from osteo_daemon.jobs.records import DeliveryState, NewDelivery, ReportKind, ReportObject
from osteo_daemon.jobs.store import JobStore
from tests.postgres import cluster, programs

FULL = 1_000_000
GOAL_MS = 10.0
WAITING = 500
"""READY studies beside the finished ones: a backlog."""

SOURCES = 5
STUDIES_A_DAY = 400

# {n} is the number of a study from 1; a factor coprime to 2^32 scatters UIDs as real ones are, not in order of arrival
_UID = "'1.2.826.0.1.3680043.8.498.' || (({n} * 2654435761) % 4294967296)"
_AT = {
    "sqlite": "strftime('%Y-%m-%d %H:%M:%f000', 1700000000 + {n} * 216, 'unixepoch')",
    "postgresql": "to_timestamp(1700000000 + {n} * 216)",
}
_NUMBERS = {
    "sqlite": "(WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {count})"
    " SELECT n FROM numbers)",
    "postgresql": "(SELECT generate_series(1, {count}) AS n)",
}
_TIMES = "(SELECT n AS k FROM {numbers} AS times)"
_STATE = (
    "CASE WHEN n > {count} - {waiting} THEN 'READY' WHEN n % 1000 = 7 THEN 'FAILED' WHEN n % 1000 = 8 THEN 'HELD'"
    " WHEN n % 1000 = 9 THEN 'REPORTED' WHEN n % 20 = 3 THEN 'EXCLUDED' ELSE 'DELIVERED' END"
)
_CODE = (
    "CASE WHEN n > {count} - {waiting} THEN NULL WHEN n % 1000 = 7 THEN 'attempts_spent'"
    " WHEN n % 1000 = 8 THEN 'PixelDataUnreadable' WHEN n % 1000 = 9 THEN NULL"
    " WHEN n % 20 = 3 THEN 'no_ct_series' END"
)
_SENT = "{state} IN ('DELIVERED', 'REPORTED')"
_STATEMENTS = (
    "INSERT INTO sources (source_ae, turn) SELECT 'CT' || n, 0 FROM {sources} AS s",
    "INSERT INTO studies (study_instance_uid, source_ae, first_received_at, last_received_at, instances)"
    " SELECT {uid}, 'CT' || (n % {modulus} + 1), {at}, {at}, 3 FROM {numbers} AS s",
    "INSERT INTO instances SELECT {uid} || '.' || k, {uid}, {uid} || '.1', '1.2.840.10008.5.1.4.1.1.2',"
    " '1.2.840.10008.1.2.1', '/var/lib/osteo-daemon/spool/received/ab/' || {uid} || '/' || k, 526000,"
    " '{digest}', 'CT' || (n % {modulus} + 1), {at} FROM {numbers} AS s, {three} AS t",
    "INSERT INTO jobs (job_id, kind, study_instance_uid, source_ae, state, priority, revision, attempts, fencing_token,"
    " code, detail, created_at, changed_at) SELECT n, 'screen', {uid}, 'CT' || (n % {modulus} + 1), {state}, 100, 1, 1,"
    " 1, {code}, {code}, {at}, {at} FROM {numbers} AS s",
    "INSERT INTO events (study_instance_uid, job_id, at, who, event, from_state, to_state, revision, reason)"
    " SELECT {uid}, n, {at}, 'screener-node-1', 'job_claimed', 'READY', 'SCREENING', 1, 'attempt 1'"
    " FROM {numbers} AS s, {five} AS t",
    "INSERT INTO results (job_id, revision, document, created_at) SELECT n, 1, '{document}', {at} FROM {numbers} AS s",
    "INSERT INTO report_objects (sop_instance_uid, job_id, revision, kind, variant, sop_class_uid, path, size_bytes,"
    " sha256) SELECT {uid} || '.9.' || k, n, 1, CASE k WHEN 1 THEN 'seg' WHEN 2 THEN 'sr' ELSE 'sc' END, '', '1.2.840',"
    " '/var/lib/osteo-daemon/spool/reports/ab/' || {uid} || '/' || k, 100000, '{digest}'"
    " FROM {numbers} AS s, {three} AS t WHERE {sent}",
    "INSERT INTO deliveries (delivery_id, job_id, revision, destination, state, attempts, fencing_token, outcome,"
    " created_at, changed_at) SELECT n, n, 1, 'pacs', CASE WHEN n % 1000 = 9 THEN 'REFUSED' ELSE 'DELIVERED' END, 1, 1,"
    " 'stored', {at}, {at} FROM {numbers} AS s WHERE {sent}",
    "INSERT INTO delivery_objects (delivery_id, sop_instance_uid, position, status, sent_at)"
    " SELECT n, {uid} || '.9.' || k, k, '0x0000', {at} FROM {numbers} AS s, {three} AS t WHERE {sent}",
)


def fill(url: str, count: int) -> None:
    """Write ``count`` studies, all but `WAITING` finished, as they are after years of use."""
    engine = create_engine(url)
    kind = engine.dialect.name

    def numbers(most: int) -> str:
        return _NUMBERS[kind].format(count=most)

    state = _STATE.format(count=count, waiting=WAITING)
    words = {
        "uid": _UID.format(n="n"),
        "at": _AT[kind].format(n="n"),
        "numbers": numbers(count),
        "sources": numbers(SOURCES),
        "three": _TIMES.format(numbers=numbers(3)),
        "five": _TIMES.format(numbers=numbers(5)),
        "modulus": SOURCES,
        "state": state,
        "code": _CODE.format(count=count, waiting=WAITING),
        "sent": _SENT.format(state=state),
        "digest": "0" * 64,
        "document": '{"schema": "osteo-result/1", "filler": "' + "x" * 1000 + '"}',
    }
    with engine.connect() as connection:
        if kind == "sqlite":
            # no log while it is filled; opening the store sets everything back
            for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-2000000", "temp_store=MEMORY"):
                connection.exec_driver_sql(f"PRAGMA {pragma}")
            connection.commit()
        for statement in _STATEMENTS:
            connection.exec_driver_sql(statement.format(**words))
        if kind == "postgresql":
            for table, column in (("jobs", "job_id"), ("deliveries", "delivery_id")):
                connection.exec_driver_sql(f"SELECT setval(pg_get_serial_sequence('{table}', '{column}'), {count})")
        connection.commit()
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if kind == "postgresql":
            connection.exec_driver_sql("VACUUM ANALYZE")  # as the server's own daemon does in time
    engine.dispose()
    store = JobStore(url)
    store.recount()
    store.close()


def measure(store: JobStore, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each method: least, median and 95th percentile of ``rounds`` calls.

    ``cpu_ms`` is the median of this process's processor time: with SQLite all of the work but the waiting for the disk.
    """
    serial = iter(range(10**9))
    tag = secrets.token_hex(4)
    claimed = []
    middle = datetime.fromtimestamp(1700000000 + count // 2 * 216, UTC)

    def instance(study: str) -> SopInstance:
        uid = f"{study}.{next(serial)}.{int(tag, 16)}"
        return SopInstance(study, f"{study}.1", "1.2", uid, "1.2", Path("/x"), 526000, secrets.token_hex(32))

    def claim() -> None:
        job = store.claim("benchmark", 600)
        if job is None:
            raise RuntimeError("nothing waits")
        claimed.append(job)

    def commit() -> None:
        job = claimed.pop()
        uid = f"{job.study_instance_uid}.8.{next(serial)}"
        objects = [ReportObject(ReportKind.SR, "1.2", uid, Path("/r"), 1, "0" * 64)]
        store.commit_report(job, {"schema": "osteo-result/1"}, objects, [NewDelivery("pacs", (uid,))])

    def deliver() -> None:
        delivery = store.claim_delivery("benchmark", 600, destination="pacs")
        if delivery is None:
            raise RuntimeError("no delivery waits")

    counts = store.counts_by_state()
    if sum(counts.values()) != count:
        raise RuntimeError(f"{sum(counts.values())} jobs instead of {count}")
    steps: dict[str, Callable[[], Any]] = {
        "insert: first instance of a study": lambda: store.record_instance(instance(f"9.{next(serial)}"), "CT1"),
        "insert: further instance": lambda: store.record_instance(instance("9.1.1"), "CT1"),
        "claim": claim,
        "commit_report": commit,
        "claim_delivery": deliver,
        "list: first page": lambda: store.recent(limit=50),
        "list: page in the middle": lambda: store.recent(limit=50, before_job_id=count // 2),
        "list: one state": lambda: store.recent(limit=50, state=JobState.FAILED),
        "list: one state, page in the middle": lambda: store.recent(
            limit=50, state=JobState.DELIVERED, before_job_id=count // 2
        ),
        "list: one source": lambda: store.recent(limit=50, source_ae="CT3", before_job_id=count // 2),
        "list: one code": lambda: store.recent(limit=50, code="no_ct_series", before_job_id=count // 2),
        "list: a day": lambda: store.recent(limit=50, since=middle, until=middle + timedelta(days=1)),
        "list: held of one source": lambda: store.recent(limit=50, state=JobState.HELD, source_ae="CT4"),
        "counts_by_state": store.counts_by_state,
        "delivery_counts": store.delivery_counts,
        "deliveries: first page": lambda: store.deliveries(limit=50),
        "deliveries: page in the middle": lambda: store.deliveries(limit=50, before_delivery_id=count // 2),
        "deliveries: one destination": lambda: store.deliveries(
            limit=50, destination="pacs", before_delivery_id=count // 2
        ),
        "deliveries: delivered to one destination": lambda: store.deliveries(
            limit=50, state=DeliveryState.DELIVERED, destination="pacs", before_delivery_id=count // 2
        ),
        "deliveries: dead letters of a destination": lambda: store.deliveries(
            limit=50, state=DeliveryState.REFUSED, destination="pacs"
        ),
        "deliveries: dead letters": lambda: store.deliveries(limit=50, state=DeliveryState.REFUSED),
        "retention: what may go": lambda: store.purgeable_images(middle),
        "one study": lambda: store.events(f"1.2.826.0.1.3680043.8.498.{2654435761 * (count // 2) % 4294967296}"),
    }
    return {name: _time(step, rounds) for name, step in steps.items()}


def _time(step: Callable[[], Any], rounds: int) -> dict[str, float]:
    taken, computed = [], []
    for _ in range(rounds):
        begun, begun_computing = time.perf_counter(), time.process_time()
        step()
        taken.append((time.perf_counter() - begun) * 1000)
        computed.append((time.process_time() - begun_computing) * 1000)
    return {
        "cpu_ms": round(statistics.median(computed), 2),
        "least_ms": round(min(taken), 2),
        "median_ms": round(statistics.median(taken), 2),
        "p95_ms": round(statistics.quantiles(taken, n=20)[-1], 2),
    }


def main() -> None:
    """Measure and write ``docs/results/store.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 000 studies, few rounds")
    parser.add_argument("--studies", type=int, default=FULL)
    parser.add_argument("--folder", type=Path, help="where both databases lie; a temporary folder without it")
    arguments = parser.parse_args()
    count, rounds = (20_000, 20) if arguments.quick else (arguments.studies, 200)
    figures: dict[str, Any] = {"studies": count, "waiting": WAITING, "rounds": rounds, "goal_median_ms": GOAL_MS}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o755)
        urls = {"SQLite": f"sqlite:///{folder / 'jobs.sqlite'}"}
        if programs() is None:
            print("PostgreSQL is not installed: SQLite alone")
        else:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            urls["PostgreSQL"] = stack.enter_context(cluster(port, folder)).new()
        for database, url in urls.items():
            JobStore(url).close()
            begun = time.monotonic()
            fill(url, count)
            print(f"{database}: filled in {time.monotonic() - begun:.0f} s", flush=True)
            store = JobStore(url)
            found = measure(store, count, rounds)
            store.close()
            figures[database] = found
            for step, row in found.items():
                print(f"{database:10} {step:40} {row}", flush=True)
            figures[f"{database}_over_goal"] = [step for step, row in found.items() if row["median_ms"] >= GOAL_MS]
    # fewer studies than the claim speaks of are no claim
    print(f"wrote {write_result('store', figures, quick=count < FULL)}")


if __name__ == "__main__":
    main()
