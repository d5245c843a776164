"""A week of clinical load at speed: ``python -m benchmarks.load [--days 7] [--minutes 20] [--quick]``.

400 abdominal CT a day with the shape of a hospital's day, bursts, late slices and duplicates go over C-STORE into the
real receiver; the real scheduler completes the studies, the real store hands them out under leases and the real
deliverer sends a structured report of each to a counting archive. Time is compressed. What is NOT real is the
computing: a stand-in claims and commits through the store as the screener does and waits the stated service time
instead. The computing process is measured by itself: the real screener screens small virtual studies one after another.

Once a simulated day one process is ended by SIGKILL and started again. Memory is the resident set of each process.
``--quick`` is a quarter of a day; its figures show that the benchmark runs.
"""

from __future__ import annotations

import argparse
import math
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pydicom
from pynetdicom import AE, _config
from pynetdicom.sop_class import CTImageStorage  # type: ignore[attr-defined]

from benchmarks.clinical_week import DAY_SECONDS, SLICES, Arrival, Sender, arrivals
from benchmarks.node_processes import Roles, stand_in
from benchmarks.results import RESULTS, write_result
from tests.ct_series import column, write_slices
from tests.e2e.chaos.judge import read_ledger
from tests.e2e.chaos.storm import Archive
from tests.e2e.chaos.studies import REPORTED, Corpus
from tests.fakes import CALLED, CALLING, LOOPBACK, a_free_port, until

SERVICE_SECONDS = 60.0
"""Simulated computing time of one study: a CPU slot's."""

QUIET_SECONDS = 60.0
_STUCK_SECONDS = 120.0
_BEHIND_SHARE = 0.02
"""A sender that falls behind by more of the whole time makes the simulated hours untrue."""
_SETTINGS = f"""\
state_dir = "{{state}}"
[receiver]
ae_title = "{CALLED}"
port = {{port}}
minimum_free_bytes = 0
[[sources]]
ae_title = "{CALLING}"
addresses = ["{LOOPBACK}"]
[completeness]
quiet_seconds = {{quiet}}
quiet_minimum_seconds = {{quiet}}  # equal: nothing is learnt, for a learnt time would not be compressed
quiet_maximum_seconds = {{quiet}}
early_quiet_seconds = {{quiet}}
missing_wait_seconds = {{quiet}}
sweep_seconds = 0.2
[screener]
lease_seconds = 5
poll_seconds = 0.05
threads = 1
[deliverer]
lease_seconds = 10
poll_seconds = 0.05
retry_base_seconds = 0.2
[[destinations]]
name = "pacs"
ae_title = "PACS"
host = "{LOOPBACK}"
port = {{pacs_port}}
commitment = "none"
accept_unproven = true
"""


@dataclass(frozen=True)
class Sample:
    """What was seen at one moment, in simulated hours; ages in simulated minutes."""

    hour: float
    waiting: int
    oldest_min: float
    memory_mb: Mapping[str, float]


def simulate(folder: Path, days: float, minutes: float, report: Path) -> tuple[dict[str, Any], list[Sample], Roles]:
    """Run the compressed days; returns figures, samples and the roles' restarts."""
    compression = days * 24 * 60 / minutes
    stream = arrivals(days, seed=1)
    archive, port = Archive(folder), a_free_port()
    config = folder / "osteo.toml"
    quiet = max(QUIET_SECONDS / compression, 0.3)
    config.write_text(_SETTINGS.format(state=folder / "state", port=port, pacs_port=archive.port, quiet=quiet))
    load = [sys.executable, "-m", "benchmarks.load", "--stand-in", str(config), str(report)]
    roles = Roles(
        {
            **{
                role: [sys.executable, "-m", "osteo_daemon.cli", "run", role, "--config", str(config)]
                for role in ("receiver", "scheduler", "deliverer")
            },
            "stand-in": [*load, str(SERVICE_SECONDS / compression)],
        },
        folder / "roles.log",
    )
    roles.tend()
    database = folder / "state" / "jobs.sqlite"
    until(lambda: "receiver_listening" in roles.log.read_text(errors="replace"), 180)
    sender = Sender(stream, port, compression, write_slices(folder / "ct", _voxels(), column(SLICES, 3.0)))
    roles.start = start = time.monotonic()
    sender.start()
    samples: list[Sample] = []
    rng, next_kill = random.Random(2), 0.5
    studies = len({arrival.study for arrival in stream})
    delivered, moved = 0, start
    try:
        while True:
            elapsed_days = (time.monotonic() - start) * compression / DAY_SECONDS
            if elapsed_days > next_kill and sender.is_alive():
                next_kill += 1
                roles.running[rng.choice(list(roles.running))].kill()
            roles.tend()
            counts, oldest_s = _queue(database)
            samples.append(Sample(elapsed_days * 24, counts["READY"], oldest_s * compression / 60, roles.memory_mb()))
            if not sender.is_alive() and counts["DELIVERED"] == studies:
                break
            if counts["DELIVERED"] != delivered or sender.is_alive():
                delivered, moved = counts["DELIVERED"], time.monotonic()
            if time.monotonic() - moved > _STUCK_SECONDS:
                break  # the figures then show what is missing
            time.sleep(0.5)
    finally:
        roles.stop()
        archive.kill()
    received = [entry for entry in read_ledger(archive.ledger) if entry["status"] == 0]
    ages = sorted(sample.oldest_min for sample in samples)
    revisions = _revisions(database)
    figures = {
        "simulated_days": days,
        "compression": round(compression),
        "service_seconds_simulated": SERVICE_SECONDS,
        "studies": studies,
        "late_slices": sum(arrival.what == "late" for arrival in stream),
        "duplicates": sum(arrival.what == "duplicate" for arrival in stream),
        "objects_acknowledged": sender.acknowledged,
        "studies_delivered": counts["DELIVERED"],
        "studies_with_another_revision": revisions,
        "reports_at_the_archive": len({entry["uid"] for entry in received}),
        "contents_under_one_uid_at_most": max(
            Counter(uid for uid, _ in {(entry["uid"], entry["digest"]) for entry in received}).values(), default=0
        ),
        "kills": len(roles.restarts),
        "queue_age_simulated_min_median": round(statistics.median(ages), 1),
        "queue_age_simulated_min_95": round(ages[int(0.95 * (len(ages) - 1))], 1),
        "queue_age_simulated_min_most": round(ages[-1], 1),
        "waiting_most": max(sample.waiting for sample in samples),
        "sender_behind_s_most": round(sender.behind_s, 2),
        "machine_was_fast_enough": sender.behind_s <= _BEHIND_SHARE * minutes * 60,
        "memory": [
            {"role": role, **_memory([sample.memory_mb[role] for sample in samples if role in sample.memory_mb])}
            for role in roles.commands
        ],
    }
    return figures, samples, roles


def _memory(values: Sequence[float]) -> dict[str, float]:
    """Median of the first and of the last tenth, past the start-up, in MB."""
    settled = values[len(values) // 20 :]
    tenth = max(len(settled) // 10, 1)
    return {
        "early_mb": round(statistics.median(settled[:tenth])),
        "late_mb": round(statistics.median(settled[-tenth:])),
        "most_mb": round(max(values)),
    }


def _voxels() -> Any:
    import numpy as np

    return np.random.default_rng(1).integers(-1000, 1000, (SLICES, 16, 16))


def _queue(database: Path) -> tuple[Counter[str], float]:
    """Jobs by state, and how many seconds the oldest READY one has waited."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30) as store:
        counts: Counter[str] = Counter(
            dict(store.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())
        )
        (oldest,) = store.execute("SELECT min(changed_at) FROM jobs WHERE state = 'READY'").fetchone()
    if oldest is None:
        return counts, 0.0
    since = datetime.fromisoformat(oldest).replace(tzinfo=UTC)
    return counts, max((datetime.now(UTC) - since).total_seconds(), 0.0)


def _revisions(database: Path) -> int:
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30) as store:
        return int(store.execute("SELECT count(*) FROM jobs WHERE revision > 1").fetchone()[0])


def compute(folder: Path, corpus: Corpus, studies: int) -> tuple[dict[str, Any], list[float]]:
    """Small studies through the real screener, one after another: its memory behind each, in MB."""
    port, archive = a_free_port(), Archive(folder)
    config = folder / "osteo.toml"
    config.write_text(_SETTINGS.format(state=folder / "state", port=port, pacs_port=archive.port, quiet=0.5))
    osteo = [sys.executable, "-m", "osteo_daemon.cli", "run"]
    roles = Roles(
        {role: [*osteo, role, "--config", str(config)] for role in ("receiver", "scheduler", "screener", "deliverer")},
        folder / "roles.log",
    )
    roles.tend()
    until(lambda: "screener_ready" in roles.log.read_text(errors="replace"), 120)
    entity = AE(ae_title=CALLING)
    entity.add_requested_context(CTImageStorage)
    memory: list[float] = []
    try:
        for number in range(studies):
            association = entity.associate(LOOPBACK, port, ae_title=CALLED)
            for path in corpus.study(number, REPORTED).files:
                assert association.send_c_store(pydicom.dcmread(path)).Status == 0x0000
            association.release()
            until(
                lambda number=number: _queue(folder / "state" / "jobs.sqlite")[0]["DELIVERED"] == number + 1, 300, 0.1
            )
            memory.append(roles.memory_mb()["screener"])
    finally:
        roles.stop()
        archive.kill()
    settled = memory[len(memory) // 5 :]
    slope = statistics.linear_regression(range(len(settled)), settled).slope if len(settled) > 2 else 0.0
    figures = {
        "studies": studies,
        "restarts": len(roles.restarts),
        "memory_after_first_mb": round(memory[0]),
        "memory_after_last_mb": round(memory[-1]),
        "growth_mb_per_study": round(slope, 2),
    }
    return figures, memory


def plot(
    path: Path,
    stream: Sequence[Arrival],
    samples: Sequence[Sample],
    roles: Roles,
    compression: float,
    memory: Sequence[float],
) -> None:
    """Arrivals and queue, queue age, memory by role, memory of the real screener; dotted lines are restarts."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(4, 1, figsize=(10, 11), layout="constrained")
    hours = [sample.hour for sample in samples]
    axes[0].hist([arrival.at / 3600 for arrival in stream], bins=range(math.ceil(hours[-1]) + 1), color="#b8c4d6")
    axes[0].set_ylabel("arrivals per hour")
    waiting = axes[0].twinx()
    waiting.plot(hours, [sample.waiting for sample in samples], color="#c0392b", linewidth=0.8)
    waiting.set_ylabel("studies that wait", color="#c0392b")
    waiting.set_ylim(bottom=0)
    axes[1].plot(hours, [sample.oldest_min for sample in samples], color="#2c3e50", linewidth=0.8)
    axes[1].set_ylabel("age of the oldest\nwaiting study, min")
    for time_s, _ in roles.restarts:
        for axis in axes[:3]:
            axis.axvline(time_s * compression / 3600, color="#7f8c8d", linewidth=0.6, linestyle=":")
    for role in roles.commands:
        points = [(sample.hour, sample.memory_mb[role]) for sample in samples if role in sample.memory_mb]
        axes[2].plot(*zip(*points, strict=True), label=role, linewidth=1)
    axes[2].set_ylabel("memory, MB")
    axes[2].set_ylim(bottom=0)
    axes[2].legend(loc="lower right", ncols=4)
    axes[3].plot(range(1, len(memory) + 1), memory, marker=".", color="#16a085")
    axes[3].set_ylabel("memory of the real\nscreener, MB")
    axes[3].set_xlabel("real screenings, one after another")
    axes[3].set_ylim(0, 1.1 * max(memory))
    for axis in axes[:3]:
        axis.set_xlim(0, hours[-1])
        axis.set_xlabel("simulated hours")
        if hours[-1] > 48:
            axis.set_xticks(range(0, math.ceil(hours[-1]) + 1, 24))
    figure.suptitle("dotted: a process was killed and started again")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=float, default=7.0)
    parser.add_argument("--minutes", type=float, default=20.0, help="how long the simulated days take")
    parser.add_argument("--screenings", type=int, default=100, help="studies through the real screener")
    parser.add_argument("--quick", action="store_true", help="a quarter of a day in half a minute")
    parser.add_argument("--picture", type=Path, help="another place for the plot")
    parser.add_argument("--stand-in", nargs=3, help=argparse.SUPPRESS, metavar=("CONFIG", "REPORT", "SECONDS"))
    arguments = parser.parse_args()
    _config.LOG_HANDLER_LEVEL = "none"
    if arguments.stand_in:
        config, report, seconds = arguments.stand_in
        stand_in(Path(config), Path(report), float(seconds))
        return
    days, minutes, screenings = arguments.days, arguments.minutes, arguments.screenings
    if arguments.quick:
        days, minutes, screenings = 0.25, 0.75, 2
    with tempfile.TemporaryDirectory(prefix="osteo-load-") as name:
        folder = Path(name)
        corpus = Corpus(folder / "corpus", 1)
        for part in ("week", "computing"):
            (folder / part).mkdir()
        week, samples, roles = simulate(folder / "week", days, minutes, folder / "corpus" / "at-rest" / "report.dcm")
        computing, memory = compute(folder / "computing", corpus, screenings)
    restarts = [{"role": role, "restarts": sum(name == role for _, name in roles.restarts)} for role in roles.commands]
    print(write_result("load", {**week, "restarts": restarts, "real_screenings": computing}, quick=arguments.quick))
    picture = arguments.picture or RESULTS / "load.png"
    if arguments.picture or not arguments.quick:
        plot(picture, arrivals(days, seed=1), samples, roles, week["compression"], memory)
        print(picture)


if __name__ == "__main__":
    main()
