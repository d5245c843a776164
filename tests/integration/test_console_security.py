"""The console against those who should not be there, over a real port: nothing is open that is not meant to be."""

from __future__ import annotations

import http.client
import itertools
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import structlog
from starlette.applications import Starlette
from starlette.routing import Route

from osteo_daemon.audit import trail
from osteo_daemon.console.pages import build
from osteo_daemon.console.table import TABLE
from osteo_daemon.console.users import Role
from osteo_daemon.domain.job import JobState
from osteo_daemon.jobs.store import JobStore
from osteo_daemon.settings import Settings
from tests.authority import Authority
from tests.consoles import (
    EXCLUDED,
    FAILED,
    HELD,
    PASSWORD,
    PATIENT_ID,
    PATIENT_NAME,
    PEOPLE,
    RECEIVED,
    Person,
    add_people,
    console_settings,
    fill,
    quick_users,
    running,
)
from tests.fakes import LOOPBACK

V, O, A = Role  # noqa: E741
MATRIX = {
    ("GET", "/login"): None,
    ("POST", "/login"): None,
    ("GET", "/static/{name}"): None,
    ("POST", "/logout"): V,
    ("GET", "/"): V,
    ("GET", "/overview/part"): V,
    ("GET", "/studies"): V,
    ("POST", "/studies/find"): V,
    ("GET", "/studies/{uid}"): V,
    ("GET", "/studies/{uid}/picture.png"): V,
    ("POST", "/studies/{uid}/{act}"): O,
    ("POST", "/deliveries/{number}/{act}"): O,
    ("GET", "/peers"): V,
    ("POST", "/peers/{kind}/{name}/ask"): O,
    ("GET", "/models"): V,
    ("GET", "/models/{name}/{version}"): V,
    ("GET", "/models/{name}/{version}/verdict.png"): V,
    ("POST", "/models/{name}/{version}/{act}"): A,
    ("POST", "/models/{name}/{act}"): A,
    ("GET", "/labels"): O,
    ("GET", "/labels/refits"): O,
    ("POST", "/labels/preview"): A,
    ("POST", "/labels/import"): A,
    ("POST", "/labels/forget"): A,
    ("POST", "/refits"): A,
    ("GET", "/drift"): V,
    ("GET", "/settings"): O,
    ("GET", "/audit"): A,
}
"""Written down a second time on purpose: a page that is new or changes its role is thought about twice."""

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
FILE = {"Content-Type": "multipart/form-data; boundary=b"}
FILE_HEAD = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
CLOSED = [(method, path) for (method, path), role in MATRIX.items() if role is not None]
_INLINE = re.compile(r"<script(?![^>]* src=)|<style|\sstyle=|\son[a-z]+=|javascript:", re.IGNORECASE)


def address(path: str) -> str:
    """A path of the table with names that exist nowhere in it."""
    return re.sub(r"\{[a-z]+\}", "9.9", path)


class Shared:
    """One console for the tests that leave it as they found it."""

    def __init__(self, url: str, settings: Settings, store: JobStore) -> None:
        self.url, self.settings, self.store = url, settings, store
        self.people = {name: Person(url, name) for name in PEOPLE}

    @property
    def host(self) -> str:
        """Name and port."""
        return urlsplit(self.url).netloc


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    settings = console_settings(tmp_path_factory.mktemp("console"), console={"maximum_upload_bytes": 200_000})
    add_people(settings)
    store = fill(settings)
    with running(settings) as url:
        yield Shared(url, settings, store)
    store.close()


def raw(shared: Shared, request: bytes, seconds: float = 30.0) -> bytes:
    """What is answered to these bytes, until the other end closes."""
    host, port = shared.host.split(":")
    with socket.create_connection((host, int(port)), timeout=seconds) as connection:
        connection.sendall(request)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
        return answer


def test_every_route_has_its_role_written_down_twice() -> None:
    assert {(page.method, page.path): page.role for page in TABLE} == MATRIX
    assert len(TABLE) == len(MATRIX)
    routes: list[tuple[str, str]] = []

    def gate(pages: Starlette) -> Any:
        assert all(isinstance(route, Route) for route in pages.routes)
        routes.extend(((route.methods or set()) - {"HEAD"}).copy().pop() + " " + route.path for route in pages.routes)  # type: ignore[attr-defined, misc, arg-type]

    build(TABLE, None, gate)  # type: ignore[arg-type]
    assert sorted(routes) == sorted(f"{method} {path}" for method, path in MATRIX)  # type: ignore[comparison-overlap]


@pytest.mark.parametrize(("method", "path"), CLOSED)
def test_nothing_without_a_login(shared: Shared, method: str, path: str) -> None:
    stranger = Person(shared.url)
    stranger.session.cookies.set("osteo-session", "a" * 43)
    answer = stranger.get(address(path)) if method == "GET" else stranger.post(address(path), reason="x", csrf="a")
    if method == "GET":
        assert (answer.status_code, answer.headers["location"].partition("?")[0], answer.text) == (303, "/login", "")
        part = stranger.get(address(path), HX_Request="true")
        assert (part.status_code, part.headers["hx-redirect"], part.text) == (401, "/login", "")
        assert stranger.get(address(path), Sec_Fetch_Dest="image").status_code == 401
    else:
        assert (answer.status_code, answer.text) == (401, "log in first")


@pytest.mark.parametrize(
    "path", ["/nothing", "/admin", "/studies/", "/static", "/login/", "/openapi.json", "/favicon.ico"]
)
def test_what_does_not_exist_looks_like_what_does(shared: Shared, path: str) -> None:
    assert Person(shared.url).get(path).status_code == 303


@pytest.mark.parametrize(("method", "path"), [entry for entry in CLOSED if entry != ("POST", "/logout")])
def test_each_role_gets_where_it_may_and_no_further(shared: Shared, method: str, path: str) -> None:
    needed = MATRIX[method, path]
    assert needed is not None
    for name, role in PEOPLE.items():
        person = shared.people[name]
        place = address(path)
        answer = person.get(place) if method == "GET" else person.post(place)
        refused = answer.status_code == 403 and f"asks for the role {needed}" in answer.text
        assert refused != role.may(needed), (name, answer.status_code)
        assert refused or answer.status_code in (200, 303, 404, 409), (name, answer.status_code)


def test_other_methods_do_nothing(shared: Shared) -> None:
    person = shared.people["ada"]
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "PROPFIND"):
        assert person.session.request(method, shared.url + "/studies", allow_redirects=False).status_code == 405
    assert person.get(f"/studies/{HELD}/release").status_code == 405  # a link is no act
    assert state(shared, HELD) is JobState.HELD


def state(shared: Shared, uid: str) -> JobState:
    job = shared.store.job(uid)
    assert job is not None
    return job.state


@pytest.mark.parametrize("token", ["", "wrong", "session of another person", "é"])
def test_a_form_without_the_token_of_its_session_does_nothing(shared: Shared, token: str) -> None:
    person = shared.people["otto"]
    shown = shared.people["ada"].csrf if token.startswith("session") else token
    answer = person.post(f"/studies/{HELD}/release", csrf=shown, reason="x")
    assert answer.status_code == 403
    assert state(shared, HELD) is JobState.HELD


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_form_of_another_site_does_nothing_even_with_the_token(shared: Shared, headers: dict[str, str]) -> None:
    person = shared.people["otto"]
    for path in (f"/studies/{HELD}/release", "/login"):
        answer = person.session.post(
            shared.url + path, data={"csrf": person.csrf, "reason": "x"}, headers=headers, allow_redirects=False
        )
        assert (answer.status_code, answer.text) == (403, "this form is not one of this console")
    assert state(shared, HELD) is JobState.HELD


def test_a_login_form_belongs_to_its_browser(shared: Shared) -> None:
    theirs = Person(shared.url)
    token = theirs.token("/login")
    victim = Person(shared.url)
    victim.token("/login")
    answer = victim.post("/login", csrf=token, user="vera", password=PASSWORD)
    assert answer.status_code == 403
    assert "osteo-session" not in victim.session.cookies


def test_a_session_begins_with_the_login(shared: Shared) -> None:
    person = Person(shared.url)
    person.session.cookies.set("osteo-session", "planted-by-somebody-else-0123456789")
    answer = person.log_in("vera")
    given = re.findall(r"osteo-session=([^;]+); ([^,]*)", answer.headers["set-cookie"])
    (token, attributes) = given[0]
    assert token != "planted-by-somebody-else-0123456789"  # noqa: S105
    assert len(token) >= 43
    assert {part.strip().lower() for part in attributes.split(";")} == {"httponly", "path=/", "samesite=strict"}
    planted = Person(shared.url)
    planted.session.cookies.set("osteo-session", "planted-by-somebody-else-0123456789")
    assert planted.get("/").status_code == 303

    # another login in the same browser: another session, and the one before is over
    second = Person(shared.url)
    form = second.token("/login")
    second.session.cookies.set("osteo-session", token, path="/")
    assert second.get("/").status_code == 200
    assert second.post("/login", csrf=form, user="vera", password=PASSWORD).status_code == 303
    old = Person(shared.url)
    old.session.cookies.set("osteo-session", token)
    assert old.get("/").status_code == 303


def test_logging_out_ends_the_session_here_too(shared: Shared) -> None:
    person = Person(shared.url, "vera")
    token = person.session.cookies["osteo-session"]
    assert person.post("/logout").status_code == 303
    thief = Person(shared.url)
    thief.session.cookies.set("osteo-session", token)
    assert thief.get("/").status_code == 303


@pytest.mark.parametrize("change", ["removed", "demoted", "password"])
def test_a_changed_person_is_out_at_once(shared: Shared, change: str) -> None:
    users = quick_users(shared.settings)
    users.add(change, Role.ADMINISTRATOR, PASSWORD)
    person = Person(shared.url, change)
    assert person.get("/audit").status_code == 200
    if change == "removed":
        users.remove(change)
    elif change == "demoted":
        users.set_role(change, Role.VIEWER)
    else:
        users.set_password(change, "another horse battery")
    assert person.get("/audit").status_code == 303
    assert person.get("/").status_code == 303


def test_guessing_is_slow_and_leaves_a_trace(tmp_path: Path) -> None:
    settings = console_settings(tmp_path)
    add_people(settings)
    fill(settings).close()
    trail.open_trail(settings, "console")
    try:
        with structlog.testing.capture_logs() as lines, running(settings) as url:
            stranger = Person(url)
            token = stranger.token("/login")
            answers: list[Any] = []

            def guess(number: int) -> None:
                fields = {"csrf": token, "user": "ada", "password": f"secret guess {number}"}
                cookies = stranger.session.cookies.get_dict()
                answers.append(Person(url).session.post(url + "/login", data=fields, cookies=cookies))

            threads = [threading.Thread(target=guess, args=(number,)) for number in range(12)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert sorted(answer.status_code for answer in answers) == [401] * 5 + [429] * 7
            assert all(int(a.headers["retry-after"]) > 800 for a in answers if a.status_code == 429)
            right = stranger.post("/login", csrf=token, user="ada", password=PASSWORD)
            assert right.status_code == 429
            # a password in the wrong field
            stranger.post("/login", csrf=token, user="hunter2 hunter2", password="x")  # noqa: S106
            assert Person(url, "otto").get("/").status_code == 200  # others still can
        told = b"".join(path.read_bytes() for path in sorted(trail.audit_dir(settings).iterdir()))
        assert told.count(b'UserID="ada"') == 5
        assert told.count(b'UserID="unknown"') == 1
        assert b"hunter2" not in told
        assert b"guess" not in told
        assert sum(line["event"] == "login_refused" for line in lines) == 12 + 1 + 1
        assert "hunter2" not in str(lines)
        assert "guess" not in str(lines)
    finally:
        trail.open_trail(Settings(state_dir=tmp_path), "test")


def test_every_answer_carries_the_headers(shared: Shared) -> None:
    person, stranger = shared.people["ada"], Person(shared.url)
    answers = [person.get(address(path)) for method, path in MATRIX if method == "GET"]
    answers += [
        person.get(f"/studies/{EXCLUDED}"),
        person.get("/nothing"),
        person.get("/static/console.css"),
        person.get("/static/nothing"),
        person.get("/studies?before=x"),
        person.post("/studies/9.9/hold"),
        person.post("/studies/9.9/hold", csrf=""),
        stranger.get("/"),
        stranger.get("/login"),
        stranger.post("/"),
        stranger.session.put(shared.url + "/"),
    ]
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers
        if answer.headers.get("content-type", "").startswith("text/html"):
            assert not _INLINE.search(answer.text), answer.url
            assert not re.search(r'(?:href|src|action)="(?!/[a-z]|/"|#)', answer.text), answer.url


def test_what_peers_and_people_wrote_is_text(shared: Shared) -> None:
    for path in (f"/studies/{HELD}", "/audit"):
        text = shared.people["ada"].get(path).text
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
        assert "<script>alert" not in text


@pytest.mark.parametrize(
    "path",
    [
        "/static/../console/users.json",
        "/static/..%2f..%2fusers.json",
        "/static/%2e%2e/pages.py",
        "/static/....//pages.py",
        "/static/htmx.LICENSE",
        "/static//etc/passwd",
        "/models/../..",
        "/models/osteo-moe/..%2f..",
        "/models/%2e%2e/%2e%2e",
        "/models/osteo-moe/../../x/verdict.png",
        "/studies/..%2f..%2fjobs.sqlite",
        "/studies/%00",
        "/studies/1.2%0d%0aSet-Cookie:%20a=b",
        "/drift?report=../../jobs",
        "/drift?report=%2fetc%2fpasswd",
    ],
)
def test_no_path_of_a_request_reaches_the_disk(shared: Shared, path: str) -> None:
    # by hand: clients tidy such paths up
    token = shared.people["ada"].session.cookies["osteo-session"]
    connection = http.client.HTTPConnection(shared.host, timeout=60)
    connection.putrequest("GET", path, skip_host=True)
    connection.putheader("Host", shared.host)
    connection.putheader("Cookie", f"osteo-session={token}")
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    assert answer.status in (404, 405), body
    assert b"root:" not in body
    assert b"argon2" not in body
    assert answer.headers["set-cookie"] is None


@pytest.mark.parametrize(
    "target", ["//evil.example", "https://evil.example", "/\\evil.example", "/x\r\nSet-Cookie: a=b", "/x\nLocation: /y"]
)
def test_a_redirect_stays_here_and_in_its_line(shared: Shared, target: str) -> None:
    answer = Person(shared.url).log_in("vera", next=target)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert "a=b" not in answer.headers["set-cookie"]
    answer = shared.people["otto"].post("/studies/9.9/hold", back=target, reason="x")
    assert answer.status_code == 404
    answer = shared.people["otto"].post(f"/studies/{EXCLUDED}/release", back=target, reason="x")
    assert (answer.status_code, "location" in answer.headers) == (409, False)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::1", "a b"])
def test_a_name_of_somebody_else_gets_nothing(shared: Shared, host: str) -> None:
    answer = raw(shared, f"GET /login HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert answer.split(b" ")[1] in (b"421", b"400")
    assert b"<form" not in answer
    assert b" 200 " in raw(shared, b"GET /login HTTP/1.1\r\nHost: localhost:9\r\nConnection: close\r\n\r\n")


def test_bodies_are_bounded_whatever_they_say(shared: Shared) -> None:
    person = shared.people["ada"]
    big = b"x" * 300_000
    for path, size in (("/studies/find", 70_000), ("/login", 70_000), ("/labels/preview", 300_000)):
        answer = person.session.post(shared.url + path, data=big[:size], allow_redirects=False)
        assert answer.status_code == 413, path
        kind, head = (FORM, b"a=") if path != "/labels/preview" else (FILE, FILE_HEAD)
        pieces = itertools.chain([head], itertools.repeat(big[:10_000], size // 10_000))
        try:
            answer = person.session.post(shared.url + path, data=pieces, allow_redirects=False, headers=kind)
            assert answer.status_code == 413, path
        except OSError:
            pass  # it hung up before the rest was sent
    allowed = person.session.post(
        shared.url + "/labels/preview",
        data={"csrf": person.csrf, "window_days": "180", "back": "/labels"},
        files={"file": ("labels.csv", big[:150_000])},
        allow_redirects=False,
    )
    assert (allowed.status_code, allowed.headers["location"]) == (303, "/labels")
    many = person.session.post(
        shared.url + "/labels/preview",
        data={"csrf": person.csrf},
        files=[("file", ("a", b"a")), ("file", ("b", b"b"))],
        allow_redirects=False,
    )
    assert many.status_code == 400
    assert person.get("/" + "a" * 3000).status_code == 414
    assert person.get("/").status_code == 200


def test_a_body_that_does_not_come_is_not_awaited_for_ever(tmp_path: Path) -> None:
    settings = console_settings(tmp_path, console={"idle_timeout_seconds": 1.0})
    fill(settings).close()
    with running(settings) as url:
        head = f"POST /login HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nContent-Length: 100\r\n"
        head += "Content-Type: application/x-www-form-urlencoded\r\n\r\nuser=a"
        begun = time.monotonic()
        with socket.create_connection((LOOPBACK, urlsplit(url).port or 0), timeout=60) as connection:
            connection.sendall(head.encode())
            assert connection.recv(65536).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - begun >= 1.0


def test_identity_stands_on_the_page_of_its_study_alone_and_looking_is_told(shared: Shared) -> None:
    trail.open_trail(shared.settings, "console")
    try:
        with structlog.testing.capture_logs() as lines:
            before = set(trail.audit_dir(shared.settings).iterdir())
            person = shared.people["vera"]
            answer = person.get(f"/studies/{RECEIVED}")
            assert PATIENT_NAME in answer.text
            assert PATIENT_ID in answer.text
            title = re.search(r"<title>(.*?)</title>", answer.text)
            assert title is not None
            assert "Umbrella" not in title[1]
            (message,) = set(trail.audit_dir(shared.settings).iterdir()) - before
            told = message.read_text()
            assert "DICOM Instances Accessed" in told
            assert 'EventActionCode="R"' in told
            assert 'UserID="vera"' in told
            assert PATIENT_ID in told
            assert RECEIVED in told
            for path in ("/", "/overview/part", "/studies", "/peers", "/models", "/drift"):
                assert "Umbrella" not in person.get(path).text, path
            # names are typed into searches: they go into no address and no line of the log
            found = person.post("/studies/find", uid=PATIENT_NAME)
            assert found.headers["location"] == "/studies"
        assert "Umbrella" not in str(lines)
        assert PATIENT_ID not in str(lines)
    finally:
        trail.open_trail(Settings(state_dir=shared.settings.state_dir), "test")


def test_over_tls_cookies_never_leave_it(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    issued = authority.issue("console")
    settings = console_settings(
        tmp_path, console={"certificate_file": str(issued.certificate), "key_file": str(issued.key)}
    )
    add_people(settings)
    fill(settings).close()
    with running(settings) as url:
        person = Person(url, verify=str(authority.file))
        answer = person.log_in("vera")
        assert answer.status_code == 303
        cookie = re.search(r"__Host-osteo-session=[^;]+; ([^,]*)", answer.headers["set-cookie"])
        assert cookie is not None
        assert {"secure", "httponly", "samesite=strict", "path=/"} <= {p.strip().lower() for p in cookie[1].split(";")}
        assert answer.headers["strict-transport-security"] == "max-age=31536000"
        assert person.get("/studies").status_code == 200
        port = urlsplit(url).port or 0
        renewed = authority.issue("console", stem="renewed")
        issued.certificate.write_bytes(renewed.certificate.read_bytes())
        issued.key.write_bytes(renewed.key.read_bytes())
        assert ssl.get_server_certificate((LOOPBACK, port)).strip() == renewed.certificate.read_text().strip()


def test_failures_are_pages_that_say_nothing_of_the_inside(shared: Shared) -> None:
    person = shared.people["otto"]
    answer = person.post(f"/studies/{FAILED}/release", reason="x", back=f"/studies/{FAILED}")
    assert answer.status_code == 303
    assert "the study is FAILED" in person.get(f"/studies/{FAILED}").text
    answer = person.post(f"/studies/{HELD}/release", back=f"/studies/{HELD}", reason="   ")
    assert answer.status_code == 303
    assert "say why" in person.get(f"/studies/{HELD}").text
    assert state(shared, HELD) is JobState.HELD
