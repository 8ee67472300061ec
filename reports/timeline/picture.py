"""The page's chart as a picture, drawn by whatever Chromium or Chrome this machine has.

Kaleido would need the same browser and a second copy of the chart's code; the browser alone draws the page itself.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import unquote

from stallscope.tracer.errors import StallscopeError, SurroundingsError

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")
BROWSER_VARIABLE = "STALLSCOPE_BROWSER"
WIDTH_PX = 1280
_TIMEOUT_S = 120
_PICTURE = re.compile(r'<pre id="picture">([^<]*)</pre>')
_FAILURE = re.compile(r'<p id="loading">(The chart[^<]*)</p>')


def find_browser() -> str:
    """Return the path of a Chromium or Chrome.

    Raises:
        SurroundingsError: there is none.
    """
    wanted = os.environ.get(BROWSER_VARIABLE)
    found = shutil.which(wanted) if wanted else next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        what = f"{BROWSER_VARIABLE}={wanted} is no program" if wanted else "there is no Chromium or Chrome here"
        raise SurroundingsError(
            f"{what}, and pictures are drawn by one; install it (apt-get install chromium), name it in "
            f"{BROWSER_VARIABLE}, or write only the page"
        )
    return found


def draw_picture(html: str, kind: str, beside: Path) -> bytes:
    """Return the chart of a page as a picture.

    Args:
        html: the page; kind: ``png`` or ``svg``.
        beside: where the picture will be. The page lies there while it is drawn: a browser installed as a snap
            may not read /tmp.

    Raises:
        SurroundingsError: there is no browser.
        StallscopeError: the browser failed, or nothing can be written beside the picture.
    """
    browser = find_browser()
    try:
        with tempfile.TemporaryDirectory(prefix="stallscope-", dir=beside.absolute().parent) as folder:
            page = Path(folder) / "page.html"
            page.write_text(html, encoding="utf-8")
            text = _dump(browser, f"{page.as_uri()}#{kind}", Path(folder))
    except OSError as error:
        raise StallscopeError(f"cannot write beside {beside}: {error.strerror}; choose another folder") from error
    found = _PICTURE.search(text)
    if found is None:
        reason = _FAILURE.search(text)
        why = reason[1] if reason else "it ended before the chart was drawn"
        raise StallscopeError(f"{browser} made no picture: {why}; try another browser with {BROWSER_VARIABLE}")
    data = found[1].partition(",")[2]
    return base64.b64decode(data) if kind == "png" else unquote(data).encode()


def _dump(browser: str, address: str, profile: Path) -> str:
    """Return the page's elements as they are once its scripts have run."""
    command = [
        browser, "--headless", "--disable-gpu", "--no-first-run", "--disable-extensions", "--hide-scrollbars",
        f"--user-data-dir={profile / 'profile'}", f"--window-size={WIDTH_PX},1000", "--virtual-time-budget=60000",
        "--dump-dom", address,
    ]  # fmt: skip
    if os.geteuid() == 0:
        # Chromium refuses to run as root with its sandbox; the page is our own
        command.insert(1, "--no-sandbox")
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise StallscopeError(f"{browser} took more than {_TIMEOUT_S} s; draw a smaller window") from error
    if done.returncode != 0 and not done.stdout:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise StallscopeError(f"{browser} failed: {lines[-1] if lines else f'exit code {done.returncode}'}")
    return done.stdout.decode(errors="replace")
