"""Login and logout. The session begins with the login: what a browser brought before is never taken over."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

from starlette.responses import RedirectResponse, Response

from osteo_daemon.audit import events, trail
from osteo_daemon.audit.codes import Outcome
from osteo_daemon.console import formats
from osteo_daemon.console.gate import LOGIN
from osteo_daemon.console.pages import Node, Visit
from osteo_daemon.console.users import LONGEST_PASSWORD
from osteo_daemon.log import get_logger

_FORM_COOKIE = "osteo-login"
_FORM_SECONDS = 3600
_VALUE_BYTES = 16
_VALUE = re.compile(r"[A-Za-z0-9_-]{22}")


def show_login(visit: Visit) -> Response:
    """The form; whoever is logged in already is led on."""
    if visit.user is not None:
        return RedirectResponse("/", 303)
    return _form(visit, visit.query.get("next", "/"))


def log_in(visit: Visit) -> Response:
    """Name and password, checked within the limits of attempts."""
    name = visit.form.get("user", "").strip().lower()[:64]
    password = visit.form.get("password", "")
    wanted = visit.form.get("next", "/")
    if not _is_own_form(visit):
        return _form(visit, wanted, 403, "The form was too old. Please try again.")
    # a password typed into the wrong field must reach neither log nor trail
    known = name if name in visit.node.users.users() else "unknown"
    wait = visit.node.limits.admit(visit.address, name)
    if wait:
        get_logger().warning("login_refused", address=visit.address, reason="too many attempts", wait_s=round(wait))
        return _form(visit, wanted, 429, f"Too many attempts. Try again in {formats.duration(wait)}.", wait=wait)
    user = None if len(password) > LONGEST_PASSWORD else visit.node.users.verify(name, password)
    if user is None:
        get_logger().warning("login_refused", address=visit.address, reason="name or password")
        trail.record(events.user_authenticated(known, visit.address, outcome=Outcome.MINOR_FAILURE))
        return _form(visit, wanted, 401, "Name or password are not right.")
    visit.node.limits.succeeded(visit.address, name)
    if visit.token:
        visit.node.sessions.end(visit.token)
    token = visit.node.sessions.begin(user)
    get_logger().info("logged_in", address=visit.address)
    trail.record(events.user_authenticated(user.name, visit.address))
    answer = RedirectResponse(wanted if formats.is_local(wanted) else "/", 303)
    _set_cookie(visit.node, answer, visit.node.gate_cookie, token)
    answer.delete_cookie(_FORM_COOKIE, path=LOGIN, secure=visit.node.secure, httponly=True, samesite="strict")
    return answer


def log_out(visit: Visit) -> Response:
    """End the session, here and in the browser."""
    visit.node.sessions.end(visit.token)
    trail.record(events.user_authenticated(visit.person.name, visit.address, login=False))
    answer = RedirectResponse(LOGIN, 303)
    answer.headers["clear-site-data"] = '"cache", "storage"'
    answer.delete_cookie(visit.node.gate_cookie, secure=visit.node.secure, httponly=True, samesite="strict")
    return answer


def _form(visit: Visit, wanted: str, status: int = 200, failure: str = "", wait: float = 0.0) -> Response:
    # its token belongs to a cookie and is signed: nobody can log somebody else's browser in, and nothing is kept here
    value = visit.cookies.get(_FORM_COOKIE, "")
    if not _VALUE.fullmatch(value):
        # one that is there stays: the forms of other tabs go on being good
        value = secrets.token_urlsafe(_VALUE_BYTES)
    answer = visit.show(
        "login.html",
        status,
        token=_sign(visit.node, value),
        next=wanted if formats.is_local(wanted) else "/",
        failure=failure,
        nobody=not visit.node.users.users(),
    )
    if wait:
        answer.headers["retry-after"] = str(int(wait) + 1)
    answer.set_cookie(
        _FORM_COOKIE,
        value,
        max_age=_FORM_SECONDS,
        path=LOGIN,
        secure=visit.node.secure,
        httponly=True,
        samesite="strict",
    )
    return answer


def _is_own_form(visit: Visit) -> bool:
    expected = _sign(visit.node, visit.cookies.get(_FORM_COOKIE, ""))
    return hmac.compare_digest(visit.form.get("csrf", "").encode(), expected.encode())


def _sign(node: Node, value: str) -> str:
    return hmac.new(node.login_key, value.encode(), hashlib.sha256).hexdigest()


def _set_cookie(node: Node, answer: Response, name: str, value: str) -> None:
    # no max_age: it goes with the browser, and ends here in any case
    answer.set_cookie(name, value, path="/", secure=node.secure, httponly=True, samesite="strict")
