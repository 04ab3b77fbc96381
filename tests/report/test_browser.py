"""The page in Chromium, without a network: what a reader sees, with a mouse, with a keyboard, on a phone."""

import json
import math
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from stethoscope import Finding, Record, report, sinks
from stethoscope._protocols import Run
from stethoscope._record import Histogram

pytestmark = pytest.mark.browser
NAMES = (
    "encoder.0",
    "a/very.deep/layer.with.an.exceedingly.long.name.that.goes.on.and.on.0",
    "größe.层",
    "<b>bold</b>.1",
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    edges = tuple(float(edge) for edge in range(-8, 9))
    for run in ("first", "second"):
        sink = sinks.Jsonl(folder / run)
        sink.open(
            Run(run, "2026-01-01T00:00:00+00:00", tuple((name, "Linear") for name in NAMES), 60, 2, {"torch": "2.13"})
        )
        for step in range(40):
            broken = run == "first" and step > 30
            records = [Record("loss", math.nan if broken else 5.0 - step / 10, step, source="step")]
            if step % 2 == 0:
                for depth, name in enumerate(NAMES):
                    value = math.nan if broken and depth else 1.0 + depth
                    records.append(Record("activation/rms", value, step, module=name))
                    records.append(Record("activation/mean", -0.1 * value, step, module=name))
                    counts = Histogram(edges, tuple(float(bin_ % 5) for bin_ in range(16)))
                    records.append(Record("activation/histogram", counts, step, module=name, kind="histogram"))
                records += [
                    Record("accuracy_fraction", step / 50, step, phase=phase, source="log")
                    for phase in ("train", "val")
                ]
            found = Finding("nonfinite-activation", "error", f"'{NAMES[1]}' makes NaN.", "Look.", 31, NAMES[1])
            sink.write(step, records, [found] if broken and step == 31 else [])
        sink.close()
    first, second = (report.summarise(folder / run) for run in ("first", "second"))
    (folder / "report.html").write_text(report.to_html(first), encoding="utf-8")
    (folder / "compare.html").write_text(report.compared_html(report.compare(second, first)), encoding="utf-8")
    return folder


@contextmanager
def browser(page: Path, width=1280, dark=False):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.execute_cdp_cmd("Network.enable", {})
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get(page.as_uri())
        until(driver, "return document.documentElement.dataset.ready === 'true'")
        yield driver
    finally:
        driver.quit()


def until(driver, script):
    end = time.monotonic() + 60
    while not driver.execute_script(script):
        assert time.monotonic() < end, script
        time.sleep(0.1)


def complaints(driver):
    return [entry["message"] for entry in driver.get_log("browser") if entry["level"] in {"SEVERE", "WARNING"}]


def through(driver):
    """Scroll to the end, so that all figures are drawn."""
    for place in range(0, driver.execute_script("return document.documentElement.scrollHeight"), 700):
        driver.execute_script(f"window.scrollTo({{top: {place}, behavior: 'instant'}})")
        time.sleep(0.1)
    drawn = "return [...document.querySelectorAll('.plot')].every((plot) => plot.firstElementChild !== null)"
    until(driver, drawn)


@pytest.mark.parametrize("name", ["report.html", "compare.html"])
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (390, True)])
def test_it_opens_offline_and_can_be_read(pages, name, width, dark):
    with browser(pages / name, width, dark) as driver:
        through(driver)
        assert complaints(driver) == []
        wide = driver.execute_script("return document.documentElement.scrollWidth")
        assert wide <= width
        small = driver.execute_script(
            "return [...document.querySelectorAll('main *')].filter((e) => e.textContent.trim() && e.offsetParent"
            " && parseFloat(getComputedStyle(e).fontSize) < 14).map((e) => e.outerHTML.slice(0, 80))"
        )
        assert small == []
        fonts = driver.execute_script(
            "return Bokeh.documents.flatMap((d) => d.roots()).flatMap((p) => [...p.below, ...p.left])"
            ".map((axis) => parseFloat(axis.major_label_text_font_size))"
        )
        assert fonts
        assert min(fonts) >= 14
        asked = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        urls = [each["params"]["request"]["url"] for each in asked if each["method"] == "Network.requestWillBeSent"]
        assert [url for url in urls if not url.startswith(("file:", "data:"))] == []


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_from_its_ground(pages, dark):
    script = """
    const light = (colour) => {
      const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
        .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
      return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const ground = (e) => {
      for (; e; e = e.parentElement) {
        const colour = getComputedStyle(e).backgroundColor;
        if (!/, 0\\)$/.test(colour) && colour !== "transparent") return colour;
      }
      return "rgb(255, 255, 255)";
    };
    return [...document.querySelectorAll("h1,h2,h3,p,dt,dd,small,a,code,summary,label,select,td,th,li,.badge,.mark")]
      .filter((e) => e.offsetParent && e.textContent.trim() && !e.matches(".skip"))
      .map((e) => {
        const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
        return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 80)];
      }).filter(([contrast]) => contrast < 4.5);
    """
    with browser(pages / "report.html", dark=dark) as driver:
        assert driver.execute_script(script) == []


def test_the_keyboard_reaches_and_moves_everything(pages):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    with browser(pages / "report.html") as driver:

        def readout():
            return driver.find_element("id", "readout").text

        def press(*keys):
            ActionChains(driver).send_keys(*keys).perform()

        assert (
            readout() == f"{NAMES[1]} (Linear), step 32: NaN"
        )  # the finding's layer, at the first observed step after it
        reached = []
        for _ in range(30):
            press(Keys.TAB)
            active = driver.switch_to.active_element
            reached.append(active.get_attribute("id") or active.text or active.tag_name)
            style = driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
            assert style != "none", reached[-1]
            if reached[-1] == "layer":
                break
        order = ["Skip to what is wrong", "statistic", "step", "heat-frame", "layer"]
        assert [name for name in reached if name in order] == order
        driver.execute_script("document.getElementById('heat-frame').focus()")
        press(Keys.ARROW_UP)
        assert readout() == "encoder.0 (Linear), step 32: 1"
        press(Keys.ARROW_LEFT, Keys.ARROW_DOWN, Keys.ARROW_DOWN)
        assert readout() == "größe.层 (Linear), step 30: 3"
        driver.execute_script("document.getElementById('statistic').focus()")
        press("Activation mean")
        until(driver, "return document.getElementById('readout').textContent.endsWith('-0.3')")
        assert driver.execute_script("return document.getElementById('layer').selectedOptions[0].text") == "größe.层"
        assert complaints(driver) == []


def test_the_mouse_reads_a_cell_and_chooses_it(pages):
    from selenium.webdriver.common.action_chains import ActionChains

    with browser(pages / "report.html") as driver:
        frame = driver.find_element("id", "heat-frame")
        driver.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", frame)
        time.sleep(0.5)
        ActionChains(driver).move_to_element_with_offset(frame, 100, -20).perform()
        until(driver, "return !document.getElementById('tip').hidden")
        tip = driver.find_element("id", "tip").text
        assert "step" in tip
        ActionChains(driver).click().perform()
        until(driver, f"return document.getElementById('readout').textContent === {json.dumps(tip)}")
        cells = driver.execute_script(
            "const cells = Bokeh.documents.map((d) => d.get_model_by_name('heat-cells')).find(Boolean).data.image[0];"
            "return [cells.shape, Array.from(cells).filter((c) => c === 2).length]"
        )
        assert cells == [[4, 20], 3 * 4]
