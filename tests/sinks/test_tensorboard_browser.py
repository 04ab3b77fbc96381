"""TensorBoard itself in Chromium: what we write is shown, without an error in its console."""

import math
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from stethoscope import Finding, Record
from stethoscope._protocols import Run
from stethoscope._record import Histogram
from stethoscope.sinks import TensorBoard
from stethoscope.testing import series

pytestmark = pytest.mark.browser
LAYERS = ("encoder.0", "encoder.1", "<b>bold</b>", "größe.层", "head(1)")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    sink = TensorBoard(folder / "today")
    sink.open(Run("a", "2026-01-01T00:00:00+00:00", tuple((name, "Linear") for name in LAYERS)))
    edges = tuple(float(edge) for edge in range(-4, 5))
    for step in range(0, 400, 10):
        records = list(series([step], loss=[5 - step / 100]))
        for depth, name in enumerate(LAYERS):
            value = math.nan if depth == 2 and step > 300 else 1.0 + depth
            records += [Record("activation/rms", value, step, module=name)]
            records += [Record("activation/histogram", Histogram(edges, (1.0,) * 8), step, module=name)]
        found = [Finding("nonfinite-activation", "error", "'<b>bold</b>' makes NaN.", "Look | there.", step, LAYERS[2])]
        sink.write(step, records, found if step == 310 else [])
    sink.close()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(folder),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugins_listing", timeout=2):
                    break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def driver():
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--window-size=1280,1600",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


# TensorBoard draws in shadow roots, so the text is gathered from all of them
TEXT = """
const seen = [];
(function walk(node) {
  if (node.shadowRoot) walk(node.shadowRoot);
  for (const child of node.childNodes) {
    if (child.nodeType === Node.TEXT_NODE) seen.push(child.textContent);
    else if (child.tagName !== 'STYLE' && child.tagName !== 'SCRIPT') walk(child);
  }
})(document.body);
return seen.join(' ');
"""


@pytest.mark.parametrize(
    ("tab", "expected"),
    [
        ("custom_scalars", ["step", "loss", "activation", "rms"]),
        ("images", ["layers/activation/rms"]),
        ("text", ["nonfinite-activation", "<b>bold</b>", "encoder.1"]),
        ("histograms", ["activation/histogram/encoder.0"]),
        ("timeseries", ["activation", "step"]),
    ],
)
def test_each_tab_shows_what_was_written_and_raises_no_error(address, driver, tab, expected):
    driver.get(f"{address}/#{tab}")
    driver.refresh()
    text, missing = "", expected
    for _ in range(60):
        text = driver.execute_script(TEXT)
        missing = [word for word in expected if word not in text]
        if not missing:
            break
        time.sleep(0.5)
    assert missing == []
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
