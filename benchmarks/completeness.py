"""How soon a study starts after its last image, and how often too early: evidence beside a fixed quiet time of 60 s.

python -m benchmarks.completeness [--quick]

A seeded model of senders, fitted to no site; the rules are the node's own (`domain.completeness`),
the clock and the network are not there. Nothing is timed: the figures are the same everywhere.
Each kind of sender is one source with a rhythm of its own, which the evidence learns from study to study.
"""

from __future__ import annotations

import argparse
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from benchmarks.results import write_result
from osteo_daemon.domain.completeness import (
    Count,
    Evidence,
    Lists,
    Outcome,
    QuietLimits,
    Rhythm,
    Verdict,
    judge,
    largest_gap,
    rhythm_of,
    with_gap,
)
from osteo_daemon.domain.slice_order import ImageFacts, slices_of_study

SEED = 20261122
STUDIES = 200
SWEEP_SECONDS = 5.0
FIXED = QuietLimits(60, 60, 60, 60, 60)
LIMITS = QuietLimits(60, 20, 300, 10, 900)
_AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
_ANSWER_SECONDS = 1.0


@dataclass(frozen=True)
class Study:
    """One sending.

    Attributes:
        moments: when each image arrives, in seconds, ascending.
        images: their headers, in that order.
        made: how many images there are; more than arrive where one is lost for good.
        open_after: arrivals after which the association stays open for the next image.
        closed_at: when the last association ends.
        step_ended_at: when the modality says that its procedure step has ended; None: it says nothing.
        counted: the source answers how many images it has.
    """

    moments: tuple[float, ...]
    images: tuple[ImageFacts, ...]
    made: int
    open_after: frozenset[float]
    closed_at: float
    step_ended_at: float | None = None
    counted: bool = False


def _pause(dice: random.Random, usual: float) -> float:
    return dice.lognormvariate(0.0, 0.6) * usual


def _stack(numbers: Sequence[int], declared: int | None, series: str) -> list[ImageFacts]:
    return [ImageFacts(series, number, 1, declared, (0.0, 0.0, -1.5 * number), _AXIAL) for number in numbers]


@dataclass(frozen=True)
class Sender:
    """How one kind of sender behaves: usual pause in seconds, chance and bounds of a long one, and what else it does.

    Attributes:
        association: one for each "image", "series" or "study", or one that stays open all "day".
        broken: so many studies pause for one to three minutes, over which the association breaks.
        lost: so many lack one image for good.
    """

    usual: float
    long_chance: float = 0.0
    long_seconds: tuple[float, float] = (0.0, 0.0)
    series: tuple[int, int] = (1, 2)
    between_series: tuple[float, float] = (1.0, 8.0)
    any_order: bool = False
    declares: bool = False
    association: str = "study"
    step: bool = False
    counted: bool = False
    broken: float = 0.02
    lost: float = 0.01

    def study(self, dice: random.Random) -> Study:
        """One study with series of 150 to 400 images, 1.5 mm apart."""
        images: list[ImageFacts] = []
        made = 0
        for series in range(dice.randint(*self.series)):
            numbers = list(range(1, dice.randint(150, 400) + 1))
            made += len(numbers)
            if self.any_order:
                dice.shuffle(numbers)
            images += _stack(numbers, len(numbers) if self.declares else None, f"{series}")
        if dice.random() < self.lost:
            del images[dice.randrange(1, len(images) - 1)]
        break_at = dice.randrange(1, len(images)) if dice.random() < self.broken else -1
        moments, now = [], 0.0
        for number, image in enumerate(images):
            now += _pause(dice, self.usual)
            if number and image.series_instance_uid != images[number - 1].series_instance_uid:
                now += dice.uniform(*self.between_series)
            if dice.random() < self.long_chance:
                now += dice.uniform(*self.long_seconds)
            if number == break_at:
                now += dice.uniform(60, 180)
            moments.append(now)
        closed = now + (dice.uniform(300, 1800) if self.association == "day" else 0.1)
        # the step may end before the last image has been sent
        ended = max(now + dice.uniform(-20, 40), 0.0) if self.step else None
        stays_open = frozenset(
            moment
            for number, moment in enumerate(moments[:-1])
            if self.association != "image"
            and number + 1 != break_at
            and (
                self.association != "series"
                or images[number].series_instance_uid == images[number + 1].series_instance_uid
            )
        )
        return Study(tuple(moments), tuple(images), made, stays_open, closed, ended, self.counted)


def is_open(study: Study, count: int, now: float) -> bool:
    """An association that stored into the study last is open."""
    return study.moments[count - 1] in study.open_after if count < len(study.moments) else now < study.closed_at


SENDERS = {
    "quick, one association": Sender(0.05),
    "quick, any order": Sender(0.05, any_order=True),
    "slow, pauses of 20 to 45 s": Sender(0.8, 0.01, (20, 45)),
    "one image per association": Sender(0.4, 0.002, (5, 15), association="image"),
    "one image per association, pauses of 60 to 110 s": Sender(1.0, 0.01, (60, 110), association="image"),
    "one association all day": Sender(0.05, association="day"),
    "all day, images in acquisition": Sender(0.05, declares=True, series=(1, 1), association="day"),
    "an association per series, minutes apart": Sender(
        0.05, series=(2, 3), between_series=(90, 140), association="series"
    ),
    "procedure steps, slow": Sender(0.8, 0.01, (20, 45), step=True),
    "counts asked, any order": Sender(0.2, 0.01, (5, 30), any_order=True, counted=True),
}


@dataclass
class Tally:
    """What became of one sender's studies under one policy."""

    waits: list[float]
    premature: int = 0
    started_early: int = 0
    noted: int = 0
    silent: int = 0

    def row(self) -> dict[str, float | int]:
        return {
            "median_s": round(median(self.waits), 1),
            "p90_s": round(quantiles(self.waits, n=10)[-1], 1),
            "premature_starts": self.premature,
            "studies_with_one": self.started_early,
            "incomplete_noted": self.noted,
            "incomplete_unnoticed": self.silent,
        }


Policy = Callable[[Study, int, float, Rhythm], Verdict]
"""A study, how many of its images are here, the moment in seconds, the rhythm of its source."""


def by_quiet_time(study: Study, count: int, now: float, rhythm: Rhythm) -> Verdict:
    """The fixed quiet time; an open association counts, as in the evidence."""
    return judge(Evidence(now - study.moments[count - 1], is_open(study, count, now), "the source"), rhythm, FIXED)


def by_evidence(study: Study, count: int, now: float, rhythm: Rhythm) -> Verdict:
    """What the node knows at this moment."""
    quiet = now - study.moments[count - 1]
    open_association = is_open(study, count, now)
    lists = Lists()
    if study.step_ended_at is not None:
        ended = now >= study.step_ended_at
        missing = study.made - count if ended else 0
        lists = Lists("MPPS", not ended, ended, study.made if ended else 0, count if ended else 0, missing)
    plain = Evidence(quiet, open_association, "the source", lists)
    if quiet < rhythm.early_seconds or lists.complete:
        return judge(plain, rhythm, LIMITS)
    slices = slices_of_study(study.images[:count])
    asking = study.counted and quiet < rhythm.early_seconds + _ANSWER_SECONDS
    known = None if asking or not study.counted else Count(study.made - count, "counted")
    return judge(Evidence(quiet, open_association, "the source", lists, slices, known, asking), rhythm, LIMITS)


def run(studies: Sequence[Study], policy: Policy, limits: QuietLimits, *, learns: bool) -> Tally:
    """Send one study after another and sweep every five seconds, as the scheduler does."""
    tally = Tally([])
    gaps: list[float] = []
    for study in studies:
        last, count, now, starts = study.moments[-1], 0, 0.0, 0
        ready = False
        while not (ready and count == len(study.moments)):
            now += SWEEP_SECONDS
            arrived = bisect_right(study.moments, now)
            ready = ready and arrived == count
            count = arrived
            if not count or ready:
                continue
            verdict = policy(study, count, now, rhythm_of(gaps if learns else (), limits))
            if verdict.outcome is Outcome.WAIT:
                continue
            ready = True
            gap = largest_gap(study.moments[:count], limits, study.open_after)
            if gap is not None:
                gaps = with_gap(gaps, gap)
            if now < last:
                tally.premature += 1
                starts += 1
            else:
                tally.waits.append(now - last)
                if count < study.made:
                    tally.noted += verdict.outcome is Outcome.INCOMPLETE
                    tally.silent += verdict.outcome is Outcome.COMPLETE
        tally.started_early += bool(starts)
    return tally


def main() -> None:
    """Simulate and write ``docs/results/completeness.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="20 studies of each sender")
    arguments = parser.parse_args()
    count = 20 if arguments.quick else STUDIES
    rows: dict[str, dict[str, float | int]] = {}
    for name, sender in SENDERS.items():
        dice = random.Random(f"{SEED} {name}")
        studies = [sender.study(dice) for _ in range(count)]
        fixed = run(studies, by_quiet_time, FIXED, learns=False).row()
        evidence = run(studies, by_evidence, LIMITS, learns=True).row()
        rows[name] = {
            f"{key}_{policy}": value
            for key in fixed
            for policy, value in (("fixed", fixed[key]), ("evidence", evidence[key]))
        }
        print(name, rows[name], flush=True)
    figures = {"studies_of_each_sender": count, "fixed_quiet_s": 60, "seed": SEED, "senders": rows}
    print(f"wrote {write_result('completeness', figures, quick=arguments.quick)}")


if __name__ == "__main__":
    main()
