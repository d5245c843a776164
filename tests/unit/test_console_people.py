"""Users, sessions, limits of logins, and the small functions that keep a redirect and a secret where they belong."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher
from click.testing import CliRunner
from pydantic import ValidationError

from osteo_daemon.cli import cli
from osteo_daemon.console.explanations import read_explanations
from osteo_daemon.console.formats import duration, is_local, is_uid, moment
from osteo_daemon.console.login_limits import PER_ADDRESS, PER_PAIR, PER_USER, WINDOW_SECONDS, LoginLimits
from osteo_daemon.console.sessions import Sessions
from osteo_daemon.console.settings_page import sections_of
from osteo_daemon.console.users import LONGEST_PASSWORD, Role, User, UserFile
from osteo_daemon.domain.eligibility import ExclusionCode
from osteo_daemon.errors import ConfigurationError
from osteo_daemon.settings import Settings, load_settings
from tests.meta.test_documents import _flag_codes

GOOD = "correct horse battery"


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def users(tmp_path: Path) -> UserFile:
    # the parameters that a node uses are those of the first test
    return UserFile(tmp_path / "console" / "users.json", PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))


def test_a_user_is_kept_as_argon2id_in_a_file_of_the_node_alone(tmp_path: Path) -> None:
    users = UserFile(tmp_path / "console" / "users.json")
    users.add("ada", Role.ADMINISTRATOR, GOOD)
    path = tmp_path / "console" / "users.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    text = path.read_text()
    assert GOOD not in text
    assert json.loads(text)["users"][0]["hash"].startswith("$argon2id$v=19$m=65536,")
    found = users.verify("ada", GOOD)
    assert found is not None
    assert found.role is Role.ADMINISTRATOR
    assert users.verify("ada", GOOD + "!") is None
    assert users.verify("nobody", GOOD) is None
    users.set_password("ada", "another horse battery")
    assert users.verify("ada", GOOD) is None
    assert users.users()["ada"].changed_at > found.changed_at


@pytest.mark.parametrize(
    ("name", "password", "says"),
    [
        ("Ada", GOOD, "is no user name"),
        ("../ada", GOOD, "is no user name"),
        ("a" * 33, GOOD, "is no user name"),
        ("", GOOD, "is no user name"),
        ("a\nb", GOOD, "is no user name"),
        ("ada", "elevenchars", "12 to 256"),
        ("ada", "x" * (LONGEST_PASSWORD + 1), "12 to 256"),
        ("ada", "aaaaaaaaaaaaaaaa", "different"),
        ("administrator", "administrator1", "little more than the name"),
    ],
)
def test_names_and_passwords_that_are_not_taken(users: UserFile, name: str, password: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        users.add(name, Role.VIEWER, password)
    assert users.users() == {}


def test_changes_at_one_moment_lose_nobody(users: UserFile) -> None:
    names = [f"user{number}" for number in range(6)]
    threads = [threading.Thread(target=users.add, args=(name, Role.VIEWER, GOOD)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(users.users()) == names


def test_a_damaged_file_lets_nobody_in_and_is_not_overwritten(users: UserFile, tmp_path: Path) -> None:
    path = tmp_path / "console" / "users.json"
    path.parent.mkdir()
    for text in ("", "{}", '{"schema": "osteo-users/9", "users": []}', '{"schema": "osteo-users/1", "users": [{}]}'):
        path.write_text(text)
        for act in (users.users, lambda: users.add("ada", Role.VIEWER, GOOD), lambda: users.verify("ada", GOOD)):
            with pytest.raises(ConfigurationError):
                act()
        assert path.read_text() == text


def test_each_role_may_what_the_one_before_may() -> None:
    ranks = [Role.VIEWER, Role.OPERATOR, Role.ADMINISTRATOR]
    for place, role in enumerate(ranks):
        assert [role.may(needed) for needed in ranks] == [number <= place for number in range(3)]


def test_the_command(tmp_path: Path) -> None:
    config, password = tmp_path / "osteo.toml", tmp_path / "password"
    config.write_text(f'state_dir = "{tmp_path / "state"}"\n')
    password.write_text(GOOD + "\nrest\n")

    def run(*arguments: str, answer: str | None = None) -> Any:
        return CliRunner().invoke(cli, ["users", *arguments, "--config", str(config)], input=answer)

    assert "nobody may log in" in run("list").output
    assert run("add", "ada", "--role", "operator", "--password-file", str(password)).exit_code == 0
    assert isinstance(
        run("add", "ada", "--role", "viewer", "--password-file", str(password)).exception, ConfigurationError
    )
    assert run("role", "ada", "viewer").exit_code == 0
    typed = run("password", "ada", answer="another horse battery\nanother horse battery\n")
    assert typed.exit_code == 0
    assert "horse" not in typed.output
    (shown,) = json.loads(run("list", "--json").output)
    assert (shown["name"], shown["role"], "hash" in shown) == ("ada", "viewer", False)
    file = UserFile(tmp_path / "state" / "console" / "users.json")
    assert file.verify("ada", "another horse battery") is not None
    assert run("remove", "ada").exit_code == 0
    assert isinstance(run("remove", "ada").exception, ConfigurationError)
    assert file.users() == {}


def _user(name: str = "ada") -> User:
    return User(name, Role.VIEWER, "", "2026-01-01")


def test_sessions_end_by_idleness_by_age_and_by_logout() -> None:
    clock = Clock()
    sessions = Sessions(60, 300, clock)
    token = sessions.begin(_user())
    for _ in range(5):
        clock.now += 59
        assert sessions.find(token, by_person=True) is not None
    clock.now += 6  # 301 seconds after the login
    assert sessions.find(token, by_person=True) is None

    token = sessions.begin(_user())
    for _ in range(6):
        clock.now += 10
        assert sessions.find(token, by_person=False) is not None
    clock.now += 1  # pages that fetch parts of themselves kept nothing alive
    assert sessions.find(token, by_person=True) is None
    assert sessions.find(token, by_person=False) is None

    token = sessions.begin(_user())
    sessions.end(token)
    assert sessions.find(token, by_person=True) is None
    assert sessions.find("", by_person=True) is None


def test_a_person_has_few_sessions_and_the_oldest_goes() -> None:
    sessions = Sessions(60, 300, Clock())
    other = sessions.begin(_user("otto"))
    tokens = [sessions.begin(_user()) for _ in range(10)]
    assert len(set(tokens)) == 10
    assert [sessions.find(token, by_person=True) is not None for token in tokens] == [False] * 2 + [True] * 8
    assert sessions.find(other, by_person=True) is not None


@pytest.mark.parametrize(
    ("attempts", "most"),
    [
        ([("10.0.0.1", "ada")] * 100, PER_PAIR),
        ([("10.0.0.1", f"user{number}") for number in range(100)], PER_ADDRESS),
        ([(f"10.0.{number}.1", "ada") for number in range(100)], PER_USER),
        ([(f"2001:db8::{number:x}", "ada") for number in range(1, 101)], PER_PAIR),  # one customer's network
        ([("::ffff:10.0.0.1", "ada"), ("10.0.0.1", "ada")] * 50, PER_PAIR),
    ],
)
def test_attempts_are_bounded_by_address_user_and_both(attempts: list[tuple[str, str]], most: int) -> None:
    clock = Clock()
    limits = LoginLimits(clock)
    assert sum(limits.admit(*attempt) == 0.0 for attempt in attempts) == most
    wait = limits.admit(*attempts[-1])
    assert 0.0 < wait <= WINDOW_SECONDS
    clock.now += wait
    assert limits.admit(*attempts[-1]) == 0.0


def test_a_person_who_mistypes_is_not_locked_out_by_it() -> None:
    limits = LoginLimits(Clock())
    for _ in range(PER_USER):
        for _ in range(PER_PAIR):
            assert limits.admit("10.0.0.1", "ada") == 0.0
        limits.succeeded("10.0.0.1", "ada")


def test_a_success_forgives_nobody_else() -> None:
    limits = LoginLimits(Clock())
    for _ in range(PER_PAIR):
        limits.admit("10.0.0.2", "ada")
        limits.admit("10.0.0.1", "otto")
    limits.admit("10.0.0.1", "ada")
    limits.succeeded("10.0.0.1", "ada")
    assert limits.admit("10.0.0.2", "ada") > 0.0
    assert limits.admit("10.0.0.1", "otto") > 0.0


@pytest.mark.parametrize("target", ["/", "/studies", "/studies/1.2.3", "/models/osteo-moe/0.2.0+here.1"])
def test_pages_of_the_console_may_be_returned_to(target: str) -> None:
    assert is_local(target)


@pytest.mark.parametrize(
    "target",
    [
        "",
        "studies",
        "//evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "https://evil.example",
        "javascript:alert(1)",
        "/studies\r\nSet-Cookie: a=b",
        "/studies\n",
        "/studies/../x",
        "/.well-known",
        "/a//b",
        "/studies?x=1",
        "/%2f%2fevil",
        "/studies/",
        "/a\x00",
    ],
)
def test_nothing_else_becomes_a_redirect(target: str) -> None:
    assert not is_local(target)


def test_formats() -> None:
    texts = ("1.2.3", "1" * 64, "1" * 65, "1..2", "1.2.", "a", "", "1.2\n")
    assert [text for text in texts if is_uid(text)] == ["1.2.3", "1" * 64]
    assert [duration(value) for value in (None, 0, 59.9, 3600, 90061, -5)] == [
        "–",
        "0 s",
        "59 s",
        "1 h",
        "1 d 1 h",
        "0 s",
    ]
    assert moment("<script>") == "–"
    assert str(moment("2026-11-23T05:00:00+01:00")) == (
        '<time datetime="2026-11-23T04:00:00+00:00">2026-11-23 04:00:00</time>'
    )


def test_every_code_is_explained_in_the_words_of_the_document() -> None:
    explanations = read_explanations()
    assert not [code for code in _flag_codes() if len(explanations.flag(code)) < 10]
    assert not [code for code in ExclusionCode if len(explanations.exclusion(code.value)) < 10]
    assert explanations.flag("no_such_flag") == ""


def test_settings_say_where_they_come_from_and_keep_secrets(tmp_path: Path) -> None:
    config = tmp_path / "osteo.toml"
    config.write_text(
        'state_dir = "/srv/osteo"\n[receiver]\nport = 104\n[store]\nurl = "postgresql://osteo@db/osteo"\n'
        '[[sources]]\nae_title = "CT1"\naddresses = ["192.0.2.1"]\n'
        '[notifications]\nwebhook_url = "https://it:s3cret@chat.example/hooks/T0PS3CRET"\n'
    )
    environment = {"OSTEO_RECEIVER__AE_TITLE": "NODE", "OSTEO_STORE__PASSWORD": "hunter2 hunter2"}
    sections = sections_of(load_settings(config, environment), environment)
    shown = {(title, entry.key): (entry.value, entry.origin) for title, keys in sections.items() for entry in keys}
    assert shown["", "state_dir"] == ("/srv/osteo", "osteo.toml")
    assert shown["[receiver]", "port"] == ("104", "osteo.toml")
    assert shown["[receiver]", "ae_title"] == ("NODE", "OSTEO_RECEIVER__AE_TITLE")
    assert shown["[receiver]", "address"] == ("127.0.0.1", "default")
    assert shown["[store]", "password"] == ("set, not shown", "OSTEO_STORE__PASSWORD")
    assert shown["[[sources]] 1", "ae_title"] == ("CT1", "osteo.toml")
    assert "hunter2" not in str(sections)
    assert shown["[notifications]", "webhook_url"][0].startswith("https://chat.example/… ")
    assert "s3cret" not in str(sections).lower()
    keys = {title for title, _key in shown}
    assert {f"[{name}]" for name, value in Settings() if hasattr(value, "model_fields_set")} <= keys


@pytest.mark.parametrize(
    "console",
    [
        {"port": 8443, "address": "0.0.0.0"},
        {"port": 8443, "address": "192.0.2.1"},
        {"port": 8443, "address": "::"},
        {"certificate_file": "a.pem"},
        {"port": 8443, "key_file": "a.key"},
    ],
)
def test_the_console_goes_beyond_loopback_over_tls_only(console: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Settings.model_validate({"console": console})
    both = {**console, "certificate_file": "a.pem", "key_file": "a.key"}
    assert Settings.model_validate({"console": both}).console.key_file == Path("a.key")
