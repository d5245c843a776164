"""Every page of the console and the role that it asks for. What is not here does not exist."""

from __future__ import annotations

from typing import Final

from osteo_daemon.console.audit_page import show_audit
from osteo_daemon.console.drift_page import show_drift
from osteo_daemon.console.labels_pages import (
    forget_import,
    import_upload,
    preview_labels,
    refits_part,
    request_refit,
    show_labels,
)
from osteo_daemon.console.login import log_in, log_out, show_login
from osteo_daemon.console.models_pages import change_deployed, change_model, show_model, show_models, show_plot
from osteo_daemon.console.overview import overview_part, show_overview
from osteo_daemon.console.pages import Page
from osteo_daemon.console.peers import ask_peer, show_peers
from osteo_daemon.console.settings_page import show_settings
from osteo_daemon.console.static_files import show_static
from osteo_daemon.console.studies import find_study, list_studies
from osteo_daemon.console.study import act_on_delivery, act_on_study, show_picture, show_study
from osteo_daemon.console.users import Role

TABLE: Final = (
    Page("/login", None, show_login),
    Page("/login", None, log_in, "POST", own_csrf=True),
    Page("/static/{name}", None, show_static),
    Page("/logout", Role.VIEWER, log_out, "POST"),
    Page("/", Role.VIEWER, show_overview),
    Page("/overview/part", Role.VIEWER, overview_part, passive=True),
    Page("/studies", Role.VIEWER, list_studies),
    Page("/studies/find", Role.VIEWER, find_study, "POST"),
    Page("/studies/{uid}", Role.VIEWER, show_study),
    Page("/studies/{uid}/picture.png", Role.VIEWER, show_picture),
    Page("/studies/{uid}/{act}", Role.OPERATOR, act_on_study, "POST"),
    Page("/deliveries/{number}/{act}", Role.OPERATOR, act_on_delivery, "POST"),
    Page("/peers", Role.VIEWER, show_peers),
    Page("/peers/{kind}/{name}/ask", Role.OPERATOR, ask_peer, "POST"),
    Page("/models", Role.VIEWER, show_models),
    Page("/models/{name}/{version}", Role.VIEWER, show_model),
    Page("/models/{name}/{version}/verdict.png", Role.VIEWER, show_plot),
    Page("/models/{name}/{version}/{act}", Role.ADMINISTRATOR, change_model, "POST"),
    Page("/models/{name}/{act}", Role.ADMINISTRATOR, change_deployed, "POST"),
    Page("/labels", Role.OPERATOR, show_labels),
    Page("/labels/refits", Role.OPERATOR, refits_part, passive=True),
    Page("/labels/preview", Role.ADMINISTRATOR, preview_labels, "POST", upload=True),
    Page("/labels/import", Role.ADMINISTRATOR, import_upload, "POST"),
    Page("/labels/forget", Role.ADMINISTRATOR, forget_import, "POST"),
    Page("/refits", Role.ADMINISTRATOR, request_refit, "POST"),
    Page("/drift", Role.VIEWER, show_drift),
    Page("/settings", Role.OPERATOR, show_settings),
    Page("/audit", Role.ADMINISTRATOR, show_audit),
)
