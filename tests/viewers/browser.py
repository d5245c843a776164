"""A headless Chromium without a graphics card."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Page, sync_playwright

from tests.conftest import require_command

_OPTIONS = (
    "--no-sandbox",  # tests may run as root, and see nothing but what they serve themselves
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",  # WebGL in software
    "--ignore-gpu-blocklist",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # no request leaves the machine
)


@contextmanager
def page(width: int = 1400, height: int = 900) -> Iterator[Page]:
    """A blank page in Debian's Chromium."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=require_command("chromium"), args=list(_OPTIONS))
        try:
            yield browser.new_page(viewport={"width": width, "height": height})
        finally:
            browser.close()
