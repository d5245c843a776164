"""Labels and refits: a file of densitometry is looked at before it is imported; refits are asked for and followed."""

from __future__ import annotations

import secrets
import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

from starlette.responses import RedirectResponse, Response

from osteo_daemon.archive.label_mapping import LabelMapping, parse_mapping, read_mapping
from osteo_daemon.archive.labels import WINDOW_DAYS, Matching, import_labels, match_file
from osteo_daemon.archive.store import VoiArchive
from osteo_daemon.console.pages import NotDone, Visit
from osteo_daemon.domain.refit import SITE_NAME
from osteo_daemon.errors import ConfigurationError

_LONGEST_WINDOW_DAYS: Final = 3650
_WAITING: Final = 4
_SHOWN: Final = 20


@dataclass(frozen=True, slots=True)
class _Upload:
    """A file that was looked at and not imported. It holds identity: memory only, and only few."""

    user: str
    data: bytes
    mapping: LabelMapping
    window_days: int


_uploads: OrderedDict[str, _Upload] = OrderedDict()
_lock = threading.Lock()


def show_labels(visit: Visit) -> Response:
    """What is labelled, what was imported, and refits."""
    store, settings = visit.node.store, visit.node.settings
    labels = store.archive_labels()
    return visit.show(
        "labels.html",
        labels=labels,
        studies=len({label.entry for label in labels}),
        by_device=sorted(Counter(f"{label.maker} {label.model}".strip() for label in labels).items()),
        by_level=sorted(Counter(label.level for label in labels).items()),
        imports=list(reversed(store.label_imports())),
        refits=store.refits(_SHOWN),
        archive=settings.archive,
        refit=settings.refit,
        window_days=WINDOW_DAYS,
    )


def refits_part(visit: Visit) -> Response:
    """How far refits are, fetched by the page by itself."""
    return visit.part("refits_part.html", refits=visit.node.store.refits(_SHOWN))


def preview_labels(visit: Visit) -> Response:
    """Match an uploaded file and say what an import would do; nothing is written."""
    _name, data = visit.files.get("file", ("", b""))
    if not data:
        raise NotDone("choose a file")
    text = visit.form.get("mapping", "").strip()
    mapping = parse_mapping(text, "the mapping") if text else read_mapping(None)
    upload = _Upload(visit.person.name, data, mapping, _window(visit.form.get("window_days", "")))
    found = _match(visit, upload)
    key = secrets.token_urlsafe(16)
    with _lock:
        _uploads[key] = upload
        while len(_uploads) > _WAITING:
            _uploads.popitem(last=False)
    return visit.show("labels_preview.html", found=found, mapping=mapping, key=key, window_days=upload.window_days)


def import_upload(visit: Visit) -> Response:
    """Import what the person looked at before."""
    with _lock:
        upload = _uploads.get(visit.form.get("key", ""))
        if upload is None or upload.user != visit.person.name:
            raise NotDone("this file is no longer here; choose it again")
        del _uploads[visit.form["key"]]
    accept = visit.form.get("accept_flags") == "yes"
    done = import_labels(_match(visit, upload), visit.node.store, visit.person.name, accept_flags=accept)
    if done.repeated:
        visit.say("This file was imported before; nothing was added.")
    elif done.imported is None:
        visit.say("Nothing matched; nothing was written.", "failed")
    else:
        visit.say(f"Import {done.imported}: {len(done.labels)} labels.")
    return RedirectResponse("/labels", 303)


def forget_import(visit: Visit) -> Response:
    """Remove an import and its labels."""
    number = visit.form.get("number", "")
    if not number.isdecimal():
        raise NotDone("an import has a number")
    visit.say(f"{visit.node.store.drop_import(int(number))} labels removed.")
    return RedirectResponse("/labels", 303)


def request_refit(visit: Visit) -> Response:
    """Ask for a refit with the archive's labels."""
    site = visit.form.get("site", "").strip()
    if not SITE_NAME.fullmatch(site):
        raise NotDone(f"a site is named by {SITE_NAME.pattern}")
    if not visit.node.settings.refit.enabled:
        raise ConfigurationError("no refitter runs: set enabled = true under [refit] and start it")
    asked = visit.node.store.request_refit(site, who=visit.person.name, reason=visit.reason())
    visit.say(f"Refit {asked.refit_id} waits.")
    return RedirectResponse("/labels", 303)


def _match(visit: Visit, upload: _Upload) -> Matching:
    archive = VoiArchive(visit.node.settings, visit.node.store)
    today = datetime.now(UTC).date()
    return match_file(
        upload.data, upload.mapping, archive, visit.node.store, window_days=upload.window_days, today=today
    )


def _window(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) <= _LONGEST_WINDOW_DAYS:
        raise NotDone(f"the window has 0 to {_LONGEST_WINDOW_DAYS} days")
    return int(text)
