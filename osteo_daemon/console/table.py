"""Every page of the console and the role that it asks for. What is not here does not exist."""

from __future__ import annotations

from typing import Final

from osteo_daemon.console.login import log_in, log_out, show_login
from osteo_daemon.console.overview import overview_part, show_overview
from osteo_daemon.console.pages import Page
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
)
