"""The report in a browser: headless Chromium, as wide as a desk and as a phone, and printed."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("lightning")

from csdiv.models.config import TrainConfig
from csdiv.models.run import train_and_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
PROBE = """
<script>
addEventListener("load", () => {
  const found = {
    images: [...document.images].map(i => [i.naturalWidth, i.naturalHeight, i.alt.length]),
    width: document.documentElement.scrollWidth, visible: innerWidth,
    smallest: Math.min(...[...document.querySelectorAll("p, td, th, figcaption")].map(
      e => parseFloat(getComputedStyle(e).fontSize))),
    headings: [...document.querySelectorAll("h1, h2")].map(e => e.textContent),
  };
  document.documentElement.dataset.found = JSON.stringify(found);
});
</script>
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "digits"
    config = TrainConfig(
        output_dir=directory, epochs=3, warmup_epochs=1, num_components=12, importance_samples=5, num_threads=1
    )
    train_and_report(config)
    train_and_report(replace(config, output_dir=directory.parent / "vae", model="vae", likelihood="gaussian"))
    return directory / "report.html"


def chromium(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    base = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", *QUIET, profile]
    return subprocess.run([*base, *flags], capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.parametrize("model", ["digits", "vae"])
@pytest.mark.parametrize("size", ["1280,900", "500,900"])
def test_report_in_a_browser(report: Path, model: str, size: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text((report.parent.parent / model / "report.html").read_text().replace("</body>", PROBE + "</body>"))
    done = chromium(tmp_path, f"--window-size={size}", "--dump-dom", path.as_uri())
    assert "CONSOLE" not in done.stderr, done.stderr
    match = re.search(r'data-found="([^"]*)"', done.stdout)
    assert match, done.stdout[:2000]
    found = json.loads(html.unescape(match[1]))
    assert len(found["images"]) == (6 if model == "digits" else 5)  # a standard normal prior has no prototypes
    assert all(width > 500 and height > 100 and words > 20 for width, height, words in found["images"])
    assert found["width"] <= found["visible"]  # nothing to scroll sideways but the figures themselves
    assert found["smallest"] >= 14
    assert found["headings"][1:] == ["Scores on the test split", "Protocol", "Figures", "Options", "Versions"]


def test_report_can_be_printed(report: Path, tmp_path: Path) -> None:
    chromium(tmp_path, f"--print-to-pdf={tmp_path / 'report.pdf'}", report.as_uri())
    pdf = (tmp_path / "report.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 12
