"""The console in Debian's Chromium, by keyboard, on a desk and on a phone, in light and dark, judged by axe-core."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import axe_playwright_python
import pytest
from playwright.sync_api import Page

from osteo_daemon.domain.job import JobState
from tests.consoles import FAILED, PASSWORD, PEOPLE, add_people, add_reported, console_settings, fill, running
from tests.fakes import LOOPBACK
from tests.report_cases import STUDY_UID
from tests.viewers import browser

_BAD = ("error", "warning")
_AXE = Path(axe_playwright_python.__file__).with_name("axe.min.js")
_PAGES = ("/", "/studies", f"/studies/{STUDY_UID}", "/peers", "/models", "/labels", "/drift", "/settings", "/audit")
_IN_THE_DARK = ("/", f"/studies/{STUDY_UID}", "/labels")
"""Judged in dark colours too: between them they hold every kind of mark, form and table."""

_TITLES = {"vera": 5, "otto": 7, "ada": 8}
_SERIOUS = """async () => (await axe.run(document)).violations
    .filter(found => ["serious", "critical"].includes(found.impact))
    .map(found => found.id + ": " + found.nodes.map(node => node.html).join(" "))"""


@pytest.mark.slow
@pytest.mark.timeout(900)  # a browser on two busy cores
def test_the_console_in_a_browser(tmp_path: Path) -> None:
    settings = console_settings(
        tmp_path, destinations=[{"name": "pacs", "ae_title": "PACS", "host": LOOPBACK, "port": 9}]
    )
    add_people(settings)
    store = fill(settings)
    add_reported(store, settings)
    said: list[str] = []
    hosts: set[str] = set()
    with running(settings) as url, browser.page() as page:
        page.on("console", lambda message: said.append(message.text) if message.type in _BAD else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        for name in PEOPLE:
            log_in_by_keyboard(page, url, name)
            assert page.locator("nav a").count() == _TITLES[name]
            if name == "otto":
                retry_by_keyboard(page, url)
                job = store.job(FAILED)
                assert job is not None
                assert job.state is JobState.READY
            if name == "ada":
                judge(page, url)
            page.get_by_role("button", name="Log out").click()
            page.wait_for_url(url + "/login")
        assert said == []  # no script failed, and nothing was against the Content-Security-Policy
        refreshed(page, url)
    store.close()
    assert hosts == {urlsplit(url).netloc}


def judge(page: Page, url: str) -> None:
    """Every page at both widths: nothing wider than the screen, and nothing that axe-core finds serious."""
    for path in _PAGES:
        for width, scheme in ((1280, "light"), (360, "dark")):
            page.set_viewport_size({"width": width, "height": 800})
            page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            if width == 1280:
                page.goto(url + path)
            assert page.locator("h1").count() == 1, path
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (path, width)
            if width == 1280 or path in _IN_THE_DARK:
                page.evaluate(_AXE.read_text(encoding="utf-8"))
                assert page.evaluate(_SERIOUS) == [], (path, width, scheme)


def log_in_by_keyboard(page: Page, url: str, name: str) -> None:
    """The field has the focus, Tab leads on, Enter sends."""
    page.goto(url + "/")
    # the browser gives the focus when it has drawn the page, which may be after it was loaded
    page.wait_for_function("document.activeElement.name === 'user'")
    page.keyboard.type(name)
    page.keyboard.press("Tab")
    page.keyboard.type(PASSWORD)
    page.keyboard.press("Enter")
    page.wait_for_url(url + "/")


def retry_by_keyboard(page: Page, url: str) -> None:
    """Open the acts of a failed study, say why, and press the button that retries."""
    page.goto(f"{url}/studies/{FAILED}")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.type("the disk was full")
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "Retry":
            break
    page.keyboard.press("Enter")
    page.wait_for_selector(".notice.done")
    assert page.locator(".timeline li").last.inner_text().endswith("the disk was full")


def refreshed(page: Page, url: str) -> None:
    """The overview fetches its changing part by itself, and leads to the login when the session is over."""
    log_in_by_keyboard(page, url, "vera")
    before = page.locator("#live time").last.get_attribute("datetime")
    page.wait_for_function(
        "before => [...document.querySelectorAll('#live time')].pop().dateTime !== before", arg=before, timeout=60_000
    )
    page.context.clear_cookies()
    page.wait_for_url(url + "/login", timeout=60_000)
