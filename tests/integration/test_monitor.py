"""The monitor as a process among others: asked over HTTP, scraped by Prometheus, heard by real mail and web servers."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult
from prometheus_client.parser import text_string_to_metric_families

from osteo_daemon.errors import ConfigurationError, PeerUnavailable
from osteo_daemon.monitor.channels import Mail, Webhook
from osteo_daemon.monitor.messages import Message, Writer
from osteo_daemon.monitor.problems import Problem, Severity
from osteo_daemon.monitor.role import run
from osteo_daemon.settings import NotificationSettings, Settings
from tests.authority import Authority
from tests.conftest import ROOT
from tests.fakes import CALLED, LOOPBACK, RoleProcess, a_free_port, dcmtk, settings_text, until
from tests.unit.test_monitor import exported_names, full_page

RULES = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "osteo.json"
STRANGER = "EVILSCANNER"

needs_prometheus = pytest.mark.skipif(
    shutil.which("promtool") is None or shutil.which("prometheus") is None,
    reason="Debian's prometheus is not installed",
)


class _Mailbox:
    """Keeps letters; refuses so many first."""

    def __init__(self, refuse: int = 0) -> None:
        self.refuse = refuse
        self.letters: list[tuple[list[str], str]] = []

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802 - the library's name
        if self.refuse:
            self.refuse -= 1
            return "451 later"
        self.letters.append((envelope.rcpt_tos, envelope.content.decode()))
        return "250 kept"


@contextmanager
def mail_server(mailbox: _Mailbox, **options: Any) -> Iterator[int]:
    server = Controller(mailbox, hostname=LOOPBACK, port=a_free_port(), **options)
    server.start()
    try:
        yield server.port
    finally:
        server.stop()


class _Hook(ThreadingHTTPServer):
    """Keeps what is posted."""

    def __init__(self, status: int = 204) -> None:
        super().__init__((LOOPBACK, 0), _HookHandler)
        self.status = status
        self.posted: list[tuple[dict[str, str], bytes]] = []


class _HookHandler(BaseHTTPRequestHandler):
    server: _Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posted.append((dict(self.headers), body))
        self.send_response(self.server.status)
        if self.server.status == 302:
            self.send_header("Location", f"http://{LOOPBACK}:{self.server.server_port}/elsewhere")
        self.end_headers()

    def log_message(self, *_arguments: Any) -> None:
        """Silent."""


@contextmanager
def web_server(status: int = 204) -> Iterator[_Hook]:
    server = _Hook(status)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _message() -> Message:
    problem = Problem("disk_full", Severity.CRITICAL, "Die Platte ist voll: 0 Bytes übrig.")
    return Writer(None, "node").write("abc123", [problem], [])


def _wanted(**values: Any) -> NotificationSettings:
    return NotificationSettings.model_validate(values)


def test_the_node_seen_from_outside(tmp_path: Path) -> None:
    """A receiver with a monitor beside it: metrics, health, letters when the receiver is gone and when it is back."""
    port, web = a_free_port(), a_free_port()
    mailbox = _Mailbox()
    with mail_server(mailbox) as smtp_port:
        extra = f"""
[monitor]
port = {web}
look_seconds = 0.2
[notifications]
email_to = ["it@hospital.example", "pacs@hospital.example"]
email_from = "osteo@hospital.example"
smtp_host = "{LOOPBACK}"
smtp_port = {smtp_port}
after_seconds = 0
retry_base_seconds = 0.2
"""
        config = tmp_path / "osteo.toml"
        config.write_text(settings_text(tmp_path / "state", port, extra=extra))
        roles = {
            name: RoleProcess(["run", name, "--config", str(config)], tmp_path / f"{name}.log")
            for name in ("receiver", "monitor")
        }
        try:
            roles["receiver"].start().wait_for("receiver_listening", 120)
            roles["monitor"].start().wait_for("monitor_started", 120)
            url = f"http://{LOOPBACK}:{web}"
            # the others were not started: the node is neither well nor ready, and says so of those roles alone
            told = until(lambda: _told(url, {"role:scheduler", "role:screener", "role:deliverer"}), 60)
            assert told["status"] == "not ok"
            assert requests.get(f"{url}/readyz", timeout=10).status_code == 503
            assert requests.get(f"{url}/anything", timeout=10).status_code == 404
            assert requests.post(f"{url}/metrics", timeout=10).status_code == 405
            _call_as_a_stranger(port)
            text = until(lambda: _metrics_with(url, 'reason="calling AE title is not among the sources"'), 60)
            assert STRANGER not in text
            assert str(tmp_path) not in text
            samples = {
                (sample.name, tuple(sample.labels.values())): sample.value
                for family in text_string_to_metric_families(text)
                for sample in family.samples
            }
            assert samples["osteo_role_processes", ("receiver",)] == 1
            assert samples["osteo_role_processes_ready", ("receiver",)] == 1
            assert samples["osteo_role_processes", ("screener",)] == 0
            assert samples["osteo_store_up", ()] == 1
            assert samples["osteo_disk_free_bytes", ()] > 0
            until(lambda: any("screener does not run" in letter for _to, letter in mailbox.letters), 60)
            # a receiver that ends in order is missed at once; the sums of before go on when it is back
            assert roles["receiver"].stop() == 0
            until(lambda: any("receiver does not run" in letter for _to, letter in mailbox.letters), 60)
            roles["receiver"].start()
            until(lambda: any("Over:" in letter for _to, letter in mailbox.letters), 60)
            assert (
                'reason="calling AE title is not among the sources"' in requests.get(url + "/metrics", timeout=10).text
            )
            assert all(to == ["it@hospital.example", "pacs@hospital.example"] for to, _letter in mailbox.letters)
            for name in ("monitor", "receiver"):
                assert roles[name].stop() == 0
        finally:
            for role in roles.values():
                if role.process is not None and role.process.poll() is None:
                    role.process.kill()
                    role.process.wait()


def _told(url: str, keys: set[str]) -> dict[str, Any] | None:
    try:
        answer = requests.get(f"{url}/healthz", timeout=10)
    except requests.RequestException:
        return None
    document: dict[str, Any] = answer.json()
    found = {problem["problem"] for problem in document["problems"]}
    return document if found == keys and answer.status_code == 503 else None


def _metrics_with(url: str, text: str) -> str | None:
    found = requests.get(f"{url}/metrics", timeout=10).text
    return found if text in found else None


def _call_as_a_stranger(port: int) -> None:
    command = [dcmtk("echoscu"), "-aet", STRANGER, "-aec", CALLED, LOOPBACK, str(port)]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode != 0


def test_a_letter_over_tls_with_a_login(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    mailbox = _Mailbox(refuse=1)
    secret = tmp_path / "password"
    secret.write_text("pass word\n")
    certificate = authority.issue("mail", names=["localhost"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.certificate, certificate.key)

    def log_in(_server: Any, _session: Any, _envelope: Any, _mechanism: str, data: Any) -> AuthResult:
        return AuthResult(success=(data.login, data.password) == (b"osteo", b"pass word"))

    options = {"tls_context": context, "require_starttls": True, "authenticator": log_in, "auth_required": True}
    with mail_server(mailbox, **options) as port:
        values = {
            "email_to": ["it@hospital.example"],
            "email_from": "osteo@hospital.example",
            "smtp_host": "localhost",
            "smtp_port": port,
            "smtp_tls": "starttls",
            "smtp_user": "osteo",
            "smtp_password_file": secret,
        }
        mail = Mail(_wanted(**values, smtp_ca_file=authority.file))
        with pytest.raises(PeerUnavailable):
            mail.send(_message())
        mail.send(_message())
        ((_to, letter),) = mailbox.letters
        assert "Message-ID: <abc123@hospital.example>" in letter
        assert "Auto-Submitted: auto-generated" in letter
        with pytest.raises(PeerUnavailable):  # a server that nobody vouches for gets neither password nor letter
            Mail(_wanted(**values)).send(_message())
        secret.write_text("wrong\n")
        with pytest.raises(PeerUnavailable):
            mail.send(_message())
        assert len(mailbox.letters) == 1


def test_a_webhook_is_posted_and_signed(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("a-long-secret-token\n")
    with web_server() as server:
        url = f"http://{LOOPBACK}:{server.server_port}/hook"
        Webhook(_wanted(webhook_url=url, webhook_token_file=token)).send(_message())
        ((headers, body),) = server.posted
        assert headers["Authorization"] == "Bearer a-long-secret-token"
        expected = hmac.new(b"a-long-secret-token", body, hashlib.sha256).hexdigest()
        assert headers["X-Osteo-Signature"] == f"sha256={expected}"
        assert headers["Idempotency-Key"] == "abc123"
        document = json.loads(body)
        assert document["problems"][0]["problem"] == "disk_full"
        assert datetime.fromisoformat(document["at"]).tzinfo == UTC
        for status in (302, 404, 500):
            server.status = status
            with pytest.raises(PeerUnavailable, match=str(status)):
                Webhook(_wanted(webhook_url=url)).send(_message())
        assert len(server.posted) == 4  # nobody follows it elsewhere
    with pytest.raises(PeerUnavailable):
        Webhook(_wanted(webhook_url=url)).send(_message())


def _expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    rules = re.findall(r"^\s+expr: (.+)$", (RULES / "osteo.rules.yml").read_text(encoding="utf-8"), re.MULTILINE)
    return [target["expr"] for panel in panels for target in panel["targets"]] + rules


def test_every_metric_of_dashboard_and_rules_is_exported() -> None:
    named = {name for text in _expressions() for name in re.findall(r"\bosteo_\w+", text)}
    assert len(named) > 15
    assert not named - exported_names()
    # and what is exported is shown or watched, but for what only says how the node is set up
    bare = {re.sub("_(bucket|count|sum)$", "", name) for name in named}
    silent = {re.sub("_(bucket|count|sum)$", "", name) for name in exported_names()} - bare
    allowed = {
        "osteo_build_info",
        "osteo_disk_size_bytes",
        "osteo_role_processes_ready",
        "osteo_screeners",
        "osteo_step_failures_total",
        "osteo_studies_completed_total",
    }
    assert silent <= allowed


def test_the_dashboard_is_whole() -> None:
    """Its structure; no Grafana runs here."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _y in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
        assert panel["type"] in ("stat", "timeseries")
        for target in panel["targets"]:
            assert target["datasource"]["uid"] == "${datasource}"
            assert 'instance=~"$instance"' in target["expr"]
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "instance"}


@needs_prometheus
def test_promtool_agrees() -> None:
    for command in (
        ["promtool", "check", "rules", "osteo.rules.yml"],
        ["promtool", "test", "rules", "osteo.rules.test.yml"],
        ["promtool", "check", "config", "prometheus.example.yml"],
    ):
        done = subprocess.run(command, cwd=RULES, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_prometheus_takes_what_is_exported_and_every_expression(tmp_path: Path) -> None:
    """A real Prometheus scrapes a page of all metrics, loads the rules and answers the dashboard's questions."""
    page = full_page()

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_arguments: Any) -> None:
            """Silent."""

    source = ThreadingHTTPServer((LOOPBACK, 0), Page)
    threading.Thread(target=source.serve_forever, daemon=True).start()
    port = a_free_port()
    (tmp_path / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\n"
        f"rule_files: ['{RULES / 'osteo.rules.yml'}']\n"
        "scrape_configs:\n  - job_name: osteo\n    static_configs:\n"
        f"      - targets: ['{LOOPBACK}:{source.server_port}']\n"
    )
    command = ["prometheus", f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
    server = subprocess.Popen(
        [*command, f"--web.listen-address={LOOPBACK}:{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        api = f"http://{LOOPBACK}:{port}/api/v1"

        def asked(expression: str) -> list[Any]:
            answer = requests.get(f"{api}/query", params={"query": expression}, timeout=20).json()
            assert answer["status"] == "success", (expression, answer)
            found: list[Any] = answer["data"]["result"]
            return found

        def scraped() -> bool:
            try:
                return bool(asked("osteo_store_up == 1"))
            except requests.RequestException:
                return False

        until(scraped, 120)
        for expression in _expressions():
            asked(expression.replace("$instance", ".*"))
        assert asked('osteo_circuit_state{state="OPEN"} == 1')
        rules = requests.get(f"{api}/rules", timeout=20).json()["data"]["groups"][0]["rules"]
        assert len(rules) == len(re.findall("- alert:", (RULES / "osteo.rules.yml").read_text()))
        deadline = time.monotonic() + 60
        while any(rule["health"] == "unknown" for rule in rules) and time.monotonic() < deadline:
            rules = requests.get(f"{api}/rules", timeout=20).json()["data"]["groups"][0]["rules"]
        assert {rule["health"] for rule in rules} == {"ok"}
    finally:
        server.kill()
        server.wait(60)
        source.shutdown()
        source.server_close()


def test_a_node_without_anything_to_watch_for_refuses() -> None:
    with pytest.raises(ConfigurationError, match="nothing to do"):
        run(Settings())
