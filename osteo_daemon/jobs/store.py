"""`JobStore`: the one door to the database."""

from __future__ import annotations

from osteo_daemon.jobs.announcements import Announcements
from osteo_daemon.jobs.archive_rows import ArchiveRows
from osteo_daemon.jobs.by_hand import ByHand
from osteo_daemon.jobs.claims import Claims
from osteo_daemon.jobs.completeness import Completeness
from osteo_daemon.jobs.counts import Counts
from osteo_daemon.jobs.deliveries import Deliveries
from osteo_daemon.jobs.intake import Intake
from osteo_daemon.jobs.inventory import Inventory
from osteo_daemon.jobs.lists import Lists
from osteo_daemon.jobs.models import Models
from osteo_daemon.jobs.observations import Observations
from osteo_daemon.jobs.outcomes import Outcomes
from osteo_daemon.jobs.pledges import Pledges
from osteo_daemon.jobs.pulls import Pulls
from osteo_daemon.jobs.quarantine import Quarantine
from osteo_daemon.jobs.refits import Refits
from osteo_daemon.jobs.retention import Retention
from osteo_daemon.jobs.trend import Trend
from osteo_daemon.jobs.upkeep import Upkeep


class JobStore(
    Intake,
    Quarantine,
    Announcements,
    Completeness,
    Claims,
    Outcomes,
    Deliveries,
    Counts,
    Lists,
    ByHand,
    Pledges,
    Retention,
    Inventory,
    Trend,
    Pulls,
    Observations,
    ArchiveRows,
    Refits,
    Models,
    Upkeep,
):
    """Studies, jobs, reports and deliveries of one node; every process and thread may use it at once."""
