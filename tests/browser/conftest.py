"""A headless Chromium and pages opened in it; what a page may never do is checked when it is closed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "unit")]

from opened import DESKTOP, Open, Opened  # noqa: E402

_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


# by module: while it runs, its event loop counts as running in this thread, and nobody else may start one
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium here; apt-get install chromium")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=chromium, args=_ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Open a page; it may ask for nothing but itself, and may not complain."""
    complaints: list[str] = []
    requests: list[str] = []
    contexts = []

    def open_page(path: Path, viewport: dict[str, int] | None = None, **options: Any) -> Opened:
        context = browser.new_context(viewport=viewport or DESKTOP, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url) if request.url != path.as_uri() else None)
        page.goto(path.as_uri())
        if options.get("java_script_enabled", True):
            page.wait_for_selector("html[data-ready]")
            assert page.get_attribute("html", "data-ready") == "true"
        return Opened(page)

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    # the icon is a data: address, and so are the pictures that plotly makes of heat maps
    assert [url for url in requests if not url.startswith(("data:", "blob:"))] == []
