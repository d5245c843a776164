"""From a screening to report objects: what the screener and ``osteo screen`` share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import pydicom

from osteo_daemon.dicom.picture import drawable
from osteo_daemon.dicom.report_forms import DEFAULT_KINDS, BuiltReport, needed_kinds, needed_variants
from osteo_daemon.dicom.report_objects import ReportRequest, build_report_objects
from osteo_daemon.dicom.report_source import ReportSource
from osteo_daemon.domain.trend import EarlierValue
from osteo_daemon.domain.wording import load_wording
from osteo_daemon.inference.screening import Screening
from osteo_daemon.messages import build_messages
from osteo_daemon.settings import Settings


@dataclass(frozen=True, slots=True)
class PreviousReport:
    """A structured report of an earlier revision."""

    sop_class_uid: str
    sop_instance_uid: str
    series_instance_uid: str

    @classmethod
    def read(cls, path: Path) -> PreviousReport:
        """Read the reference from one of our own spooled reports."""
        header = pydicom.dcmread(path, specific_tags=["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID"])
        return cls(str(header.SOPClassUID), str(header.SOPInstanceUID), str(header.SeriesInstanceUID))


def picture_language(settings: Settings) -> str:
    """The language that pictures will have: English where no installed font holds the site's language.

    Raises:
        ConfigurationError: a text of the site is missing or unusable.
    """
    return drawable(load_wording(settings.site.language, settings.site.templates_dir))[0].language


def build_report(
    screening: Screening,
    settings: Settings,
    created: datetime,
    *,
    revision: int = 1,
    predecessors: Mapping[str, PreviousReport] | None = None,
    variants: Iterable[str] | None = None,
    earlier: Sequence[EarlierValue] = (),
) -> BuiltReport:
    """Build every object that the settings' destinations need.

    Args:
        created: when the result was made, with a time zone.
        revision: of the study's job; a higher one gives new UIDs.
        predecessors: reports of the revision before, by SR variant.
        variants: forms of the structured report; by default those of the settings' destinations.
        earlier: the patient's earlier studies, oldest first.

    Raises:
        ConfigurationError: a text of the site is missing or unusable.
        Damaged: the source headers lack what a report must refer to.
    """
    screener = settings.screener
    request = ReportRequest(
        result=screening.result,
        source=ReportSource(screening.headers),
        volume=screening.volume,
        regions=screening.measurements,
        site=settings.site,
        software_version=version("osteo-daemon"),
        created=created,
        revision=revision,
        network_bundle=screener.network_bundle if screener.network_enabled else None,
        # whatever changes a byte of the objects must change their UIDs
        effective_settings=json.dumps(settings.site.model_dump(mode="json"), sort_keys=True),
        predecessors=predecessors or {},
        wording=load_wording(settings.site.language, settings.site.templates_dir),
        earlier=earlier,
    )
    if variants is not None:
        return build_report_objects(request, variants, DEFAULT_KINDS)
    built = build_report_objects(request, needed_variants(settings.destinations), needed_kinds(settings.destinations))
    return replace(built, objects=(*built.objects, *build_messages(request, settings.destinations)))
