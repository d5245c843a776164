"""Pages: each with its path, method and the role that it asks for, in one table; what lies between a request and them.

A page is a plain function of a `Visit`; it runs in a thread, since the job store blocks. The table is all there is:
`build` makes routes of it and of nothing else, so that a page without a role cannot exist.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartParser
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from osteo_daemon.console import formats
from osteo_daemon.console.explanations import Explanations
from osteo_daemon.console.gate import SESSION, TOKEN, USER, BodyRefused, Gate
from osteo_daemon.console.login_limits import LoginLimits
from osteo_daemon.console.sessions import Session, Sessions
from osteo_daemon.console.users import Role, User, UserFile
from osteo_daemon.domain.wording import Wording
from osteo_daemon.errors import (
    BundleError,
    ConfigurationError,
    Damaged,
    IllegalTransition,
    OsteoError,
    RefitRefused,
    Transient,
)
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.log import get_logger, where
from osteo_daemon.registry.registry import Registry
from osteo_daemon.settings import Settings

_FOLDER = Path(__file__).parent
_NO_TEXT_PART_BYTES = 64 * 1024
# files of labels hold patients' names: they stay in memory, which `ConsoleSettings.maximum_upload_bytes` bounds
MultiPartParser.spool_max_size = 2**40


class NotDone(OsteoError):
    """That cannot be done"""


class NotHere(OsteoError):
    """There is no such page, or nothing of that name"""


_SAID_TO_PEOPLE = (BundleError, ConfigurationError, Damaged, IllegalTransition, NotDone, RefitRefused)


@dataclass(frozen=True, slots=True)
class Node:
    """What pages work with.

    Attributes:
        settings: of the node.
        store, registry: its job store and its bundles.
        users, sessions, limits: who may log in, who is, and how often it may be tried.
        explanations: what codes mean; ``wording``: what reports say.
        gate_cookie: name of the session cookie; ``secure``: for TLS alone.
        login_key: signs login forms, which belong to no session yet.
    """

    settings: Settings
    store: JobStore
    registry: Registry
    users: UserFile
    sessions: Sessions
    limits: LoginLimits
    explanations: Explanations
    wording: Wording
    gate_cookie: str
    secure: bool
    login_key: bytes
    templates: Environment = field(default_factory=lambda: _templates())


@dataclass(frozen=True, slots=True)
class Visit:
    """One request as a page sees it.

    Attributes:
        node: what it works with.
        path: of the request.
        names: parts of the path that the table leaves open.
        query: of the address; ``form``: what was posted, texts only.
        files: what was uploaded: name of the field to file name and content.
        session, user: of the person; None on public pages.
        token: of the session.
        address: of the browser.
        cookies: that it sent.
    """

    node: Node
    path: str
    names: Mapping[str, str]
    query: Mapping[str, str]
    form: Mapping[str, str]
    files: Mapping[str, tuple[str, bytes]]
    session: Session | None
    user: User | None
    token: str
    address: str
    cookies: Mapping[str, str]

    @property
    def person(self) -> User:
        """Who is logged in; pages with a role have somebody."""
        if self.user is None:
            raise HTTPException(401)
        return self.user

    def may(self, role: str) -> bool:
        """Whether the person has at least this role."""
        return self.user is not None and self.user.role.may(Role(role))

    def show(self, template: str, status: int = 200, **values: Any) -> Response:
        """A page of a template, with what was said to the person since the last one."""
        notices: list[tuple[str, str]] = []
        if self.session is not None:
            notices, self.session.notices = self.session.notices, []
        text = self.node.templates.get_template(template).render(
            visit=self,
            csrf="" if self.session is None else self.session.csrf,
            notices=notices,
            node_title=self.node.settings.receiver.ae_title,
            **values,
        )
        return HTMLResponse(text, status)

    def part(self, template: str, **values: Any) -> Response:
        """A part of a page, for a page that fetches it by itself; what is to be said waits for the next page."""
        return HTMLResponse(self.node.templates.get_template(template).render(visit=self, **values))

    def say(self, text: str, kind: Literal["done", "failed"] = "done") -> None:
        """A line for the person's next page."""
        if self.session is not None:
            self.session.notices.append((kind, text))

    def reason(self) -> str:
        """Why the person acts.

        Raises:
            NotDone: they don't say.
        """
        reason = self.form.get("reason", "").strip()
        if not reason:
            raise NotDone("say why: a reason is kept with every change")
        return reason[:500]


@dataclass(frozen=True, slots=True)
class Page:
    """A line of the table.

    Attributes:
        path: with ``{name}`` for what it leaves open.
        role: that it asks for; None: for everybody, which is the login and what it looks like.
        show: makes the answer.
        method: GET looks, POST acts.
        passive: pages fetch it by themselves: no sign of a person.
        upload: takes a file.
        own_csrf: the login, which has no session yet, checks its form itself.
    """

    path: str
    role: Role | None
    show: Callable[[Visit], Response]
    method: Literal["GET", "POST"] = "GET"
    passive: bool = False
    upload: bool = False
    own_csrf: bool = False


def build(table: Iterable[Page], node: Node, gate: Callable[[Starlette], Gate]) -> Gate:
    """The application of a table of pages."""
    routes = [Route(page.path, _endpoint(page, node), methods=[page.method]) for page in table]

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)  # noqa: S101 - registered for no other
        words = {404: "There is no such page.", 405: "This page is not used that way."}
        text = words.get(error.status_code, "The request cannot be read.")
        return _visit(node, request, {}, {}).show("error.html", error.status_code, text=text)

    handlers: dict[Any, Any] = {HTTPException: refused}
    return gate(Starlette(routes=routes, exception_handlers=handlers))


def _endpoint(page: Page, node: Node) -> Callable[[Request], Any]:
    async def answer(request: Request) -> Response:
        user: User | None = request.scope[USER]
        # before the body is read
        if page.role is not None and (user is None or not user.role.may(page.role)):
            visit = _visit(node, request, {}, {})
            get_logger().warning("page_refused", address=visit.address, reason=f"asks for the role {page.role}")
            return visit.show("error.html", 403, text=f"This asks for the role {page.role}.")
        texts: dict[str, str] = {}
        files: dict[str, tuple[str, bytes]] = {}
        if page.method == "POST":
            try:
                async with request.form(max_files=1, max_fields=50, max_part_size=_NO_TEXT_PART_BYTES) as form:
                    for name, value in form.multi_items():
                        if isinstance(value, UploadFile):
                            files[name] = (value.filename or "", await value.read())
                        else:
                            texts[name] = value
            except BodyRefused as error:
                return error.answer()
        visit = _visit(node, request, texts, files)
        if page.method == "POST" and not page.own_csrf:
            session = visit.session
            shown = texts.get("csrf", "")
            if session is None or not hmac.compare_digest(shown.encode(), session.csrf.encode()):
                get_logger().warning("form_refused", address=visit.address, reason="no token of this session")
                return visit.show("error.html", 403, text="This form is too old, or not one of this console.")
        return await run_in_threadpool(_shown, page, visit)

    return answer


def _shown(page: Page, visit: Visit) -> Response:
    """The page, or its refusal as a page; what was posted is answered with the page that it came from."""
    try:
        return page.show(visit)
    except NotHere as error:
        return visit.show("error.html", 404, text=f"{error}.")
    except _SAID_TO_PEOPLE as error:
        if page.method == "POST" and (back := visit.form.get("back", "")) and formats.is_local(back):
            visit.say(str(error), "failed")
            return RedirectResponse(back, 303)
        return visit.show("error.html", 409, text=f"{error}.")
    except Transient as error:
        return visit.show("error.html", 503, text=f"{error}. Try again in a moment.")
    except HTTPException:
        raise
    except Exception as error:  # noqa: BLE001
        # the edge of this role's loop: one page fails, the next one is another chance
        get_logger().error("page_failed", error=type(error).__name__, detail=where(error.__traceback__))
        return visit.show("error.html", 500, text="This page failed; the log says where.")


def _visit(node: Node, request: Request, form: Mapping[str, str], files: Mapping[str, tuple[str, bytes]]) -> Visit:
    return Visit(
        node=node,
        path=request.url.path,
        names=request.path_params,
        query=request.query_params,
        form=form,
        files=files,
        session=request.scope[SESSION],
        user=request.scope[USER],
        token=request.scope[TOKEN],
        address="" if request.client is None else request.client.host,
        cookies=request.cookies,
    )


def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= formats.FILTERS
    return environment
