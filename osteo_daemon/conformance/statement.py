"""The DICOM conformance statement (PS3.2) of this software under given settings, in Markdown.

The text is `statement.md` beside this module; every table and value in it is read from code and settings.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from string import Template
from typing import Any

from pydantic import BaseModel
from pydicom.charset import python_encoding

from osteo_daemon.audit.codes import EventId
from osteo_daemon.conformance import networking
from osteo_daemon.conformance.markdown import code, table
from osteo_daemon.conformance.objects import created_objects
from osteo_daemon.dicom.codes import SCHEME, SCHEME_NAME
from osteo_daemon.dicom.contexts import class_name
from osteo_daemon.dicom.peer import MAXIMUM_PDU_BYTES
from osteo_daemon.dicom.report_forms import SENDING_ORDER
from osteo_daemon.dicom.uids import ASSOCIATION_VERSION_NAME, IMPLEMENTATION_CLASS_UID, implementation_version_name
from osteo_daemon.imaging.codecs import DECODERS
from osteo_daemon.imaging.decoder import IMAGE_SECONDS, MEMORY_BYTES
from osteo_daemon.settings import ArchiveSettings, DestinationSettings, Settings, SourceSettings
from osteo_daemon.tls import TLS_1_2_SUITES

_SECTIONS = (
    *("receiver", "accompanying", "tls", "quotas", "completeness", "commitment_scp", "deliverer", "pull", "dicomweb"),
    "audit",
)
_LISTS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("sources", SourceSettings),
    ("destinations", DestinationSettings),
    ("archives", ArchiveSettings),
)
_APPLICATION_CONTEXT = "1.2.840.10008.3.1.1.1"  # PS3.7 A.2.1
_SECONDS_PER_DAY = 86400


def conformance_statement(settings: Settings) -> str:
    """The whole document; the same for the same settings and software."""
    text = (Path(__file__).parent / "statement.md").read_text(encoding="utf-8")
    deliverer, web = settings.deliverer, settings.dicomweb
    values = {
        "overview": networking.overview(settings),
        "implementation": _implementation(),
        "ae_title": code(settings.receiver.ae_title),
        "policies": _policies(settings),
        "rejections": networking.rejections(),
        "accepted_contexts": networking.accepted_contexts(settings),
        "storage_syntaxes": networking.storage_syntaxes(),
        "decoder_memory": MEMORY_BYTES >> 20,
        "decoder_seconds": f"{IMAGE_SECONDS:g}",
        "decoders": table(
            ("transfer syntax", "decoder, as pydicom names it"),
            ((class_name(str(uid)), name) for uid, name in DECODERS.items()),
        ),
        "store_statuses": networking.store_statuses(),
        "normalized_statuses": networking.normalized_statuses(),
        "proposed_contexts": networking.proposed_contexts(),
        "sending_order": ", ".join(map(code, SENDING_ORDER)),
        "answers_to_us": networking.answers_to_us(),
        "retry_base": f"{deliverer.retry_base_seconds:g}",
        "retry_maximum": f"{deliverer.retry_maximum_seconds:g}",
        "give_up_days": f"{deliverer.give_up_after_seconds / _SECONDS_PER_DAY:g}",
        "dicomweb": _dicomweb(),
        "maximum_part_bytes": web.maximum_part_bytes,
        "maximum_request_bytes": web.maximum_request_bytes,
        "maximum_requests": web.maximum_requests,
        "settings": _settings(settings),
        "peer_settings": _peer_settings(),
        "suites": code(TLS_1_2_SUITES),
        "audit_events": _audit_events(),
        "character_sets": ", ".join(code(term) for term in python_encoding if term.startswith(("ISO", "GB"))),
        "created_objects": created_objects(),
        "scheme": f"{code(SCHEME)} ({SCHEME_NAME})",
    }
    return Template(text).substitute(values)


def _implementation() -> str:
    software = version("osteo-daemon")
    return table(
        ("what", "value"),
        [
            ["product and version", f"osteo_daemon {software}"],
            ["Implementation Class UID, of associations and files", code(IMPLEMENTATION_CLASS_UID)],
            ["Implementation Version Name of associations", code(ASSOCIATION_VERSION_NAME)],
            ["Implementation Version Name of files made", code(implementation_version_name(software))],
            ["application context", code(_APPLICATION_CONTEXT)],
        ],
    )


def _policies(settings: Settings) -> str:
    receiver, deliverer, quotas = settings.receiver, settings.deliverer, settings.quotas
    answer = f"{deliverer.dimse_timeout_seconds:g}"
    return table(
        ("policy", "as acceptor", "as requestor"),
        [
            ["largest PDU received, bytes", receiver.maximum_pdu_bytes, MAXIMUM_PDU_BYTES],
            ["associations at a time", receiver.maximum_associations, "one for each destination, one for each pull"],
            ["of one AE title", quotas.associations_per_ae_title or "any", ""],
            ["of one address", quotas.associations_per_address or "any", ""],
            ["bytes in an hour of one AE title", quotas.bytes_per_hour_per_ae_title or "any", ""],
            ["bytes in an hour of one address", quotas.bytes_per_hour_per_address or "any", ""],
            ["largest data set, bytes", receiver.maximum_object_bytes, ""],
            ["asynchronous operations", "not negotiated", "not negotiated"],
            ["role selection", "storage commitment", "storage with C-GET, storage commitment"],
            ["user identity, extended negotiation", "not supported", "not supported"],
            [
                "time for negotiation, s",
                f"{receiver.acse_timeout_seconds:g}",
                f"{deliverer.connect_timeout_seconds:g}",
            ],
            ["time for an answer or a PDU, s", f"{receiver.dimse_timeout_seconds:g}", answer],
            ["silence on an open association, s", f"{receiver.network_timeout_seconds:g}", answer],
        ],
    )


def _dicomweb() -> str:
    return table(
        ("service", "role", "resources"),
        [
            [
                "STOW-RS",
                "origin server (off while `dicomweb.port` is 0)",
                "`POST /studies`, `POST /studies/{study}`: `application/dicom` in `multipart/related`",
            ],
            ["STOW-RS", "user agent", 'destinations of `kind = "dicomweb"`'],
            ["QIDO-RS, WADO-RS", "user agent", 'archives of `retrieve = "dicomweb"`: instances as `application/dicom`'],
        ],
    )


def _settings(settings: Settings) -> str:
    rows = []
    for section in _SECTIONS:
        values: Any = getattr(settings, section)
        for name in type(values).model_fields:
            # paths are of one machine; what they are for stands with the setting
            shown = "" if name.endswith("_file") else _shown(getattr(values, name))
            rows.append([code(f"{section}.{name}"), shown])
    return table(("setting", "value"), rows)


def _peer_settings() -> str:
    rows = [
        [code(f"[[{name}]] {field}"), "required" if info.is_required() else _shown(info.default)]
        for name, kind in _LISTS
        for field, info in kind.model_fields.items()
    ]
    return table(("setting of each peer", "default"), rows)


def _shown(value: object) -> str:
    if value is None or value in ("", ()):
        return ""
    if isinstance(value, bool):
        return code(str(value).lower())
    if isinstance(value, tuple):
        return ", ".join(code(entry) for entry in value)
    return code(f"{value:.15g}" if isinstance(value, float) else value)


def _audit_events() -> str:
    events = [value for name, value in vars(EventId).items() if name.isupper()]
    return table(("code", "event"), [[f"({event.value}, {event.system})", event.meaning] for event in events])
