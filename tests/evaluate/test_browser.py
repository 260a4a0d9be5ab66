"""A report in a real browser: every picture is there, no network is asked, nothing complains."""

import re
import shutil
import subprocess

import numpy as np
import pytest
from example_evaluation import three_models
from matplotlib.image import imread

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WIDTHS = (1280, 600)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=2000",
    "--enable-logging=stderr",
    "--v=0",
)
# A copy of the page tells what the browser made of it, under a rule that refuses whatever does not
# stand in the file and says so on the console; the report itself holds no script.
RULE = (
    '<head><meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:;'
    " style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
)
PROBE = """<script>addEventListener('load', () => {
  const bad = [...document.images].filter(i => !i.complete || !i.naturalWidth).length;
  const hidden = [...document.images].filter(i => !i.getBoundingClientRect().width).length;
  const wide = document.documentElement.scrollWidth > innerWidth;
  document.title = `images ${document.images.length} bad ${bad} hidden ${hidden} wide ${wide}`;
})</script></body>"""


def probed(page):
    return page.replace("<head>", RULE).replace("</body>", PROBE)


@pytest.fixture(scope="module")
def browser():
    binary = next(filter(None, map(shutil.which, BROWSERS)), None)
    if binary is None:
        pytest.skip(f"no browser on this machine: none of {', '.join(BROWSERS)} is on the path")
    return binary


@pytest.fixture(scope="module")
def page():
    """Three models, with all that is closed on the page open: a picture there is to be seen too."""
    return three_models()[1].replace("<details>", "<details open>")


def look(browser, address, folder, width, *more):
    return subprocess.run(
        [
            browser,
            *FLAGS,
            f"--window-size={width},1400",
            f"--user-data-dir={folder / 'profile'}",
            *more,
            address,
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=True,
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_every_picture_is_shown_without_network_or_complaint(browser, page, tmp_path, width):
    copy = tmp_path / "probe.html"
    copy.write_text(probed(page))
    seen = look(browser, copy.as_uri(), tmp_path, width, "--dump-dom")
    title = re.search("<title>(.*?)</title>", seen.stdout)
    count = page.count("<img ")
    assert count > 20
    assert title[1] == f"images {count} bad 0 hidden 0 wide false"
    assert "CONSOLE" not in seen.stderr


def test_the_report_itself_is_drawn(browser, page, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page)
    shot = tmp_path / "page.png"
    seen = look(browser, file.as_uri(), tmp_path, 1280, f"--screenshot={shot}")
    assert "CONSOLE" not in seen.stderr
    pixels = imread(shot)[:, :, :3]
    assert pixels.shape[:2] == (1400, 1280)
    is_ink = pixels.min(axis=2) < 0.9
    assert 0.01 < is_ink.mean() < 0.5
    assert is_ink.any(axis=1).mean() > 0.3  # from top to bottom, not a corner
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_a_missing_picture_would_be_noticed(browser, page, tmp_path):
    copy = tmp_path / "broken.html"
    broken = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "missing.png", page, count=1)
    copy.write_text(probed(broken))
    seen = look(browser, copy.as_uri(), tmp_path, 1280, "--dump-dom")
    assert re.search("<title>images [0-9]+ bad 1 ", seen.stdout)
    assert "CONSOLE" in seen.stderr
    assert "missing.png" in seen.stderr
