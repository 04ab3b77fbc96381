"""Prints what a report costs: `python tests/benchmarks/bench_report.py [--layers 200] [--observed 5000] [--browser]`.

Writes a run with what `presets.first_aid` records of so many layers at so many observed steps (values are drawn anew for 50
of them and repeated), then a page of it. Reading needs the file's size in disk space and no more than a small part in memory.
`--browser` also scrolls the page in Chromium and prints how long frames take.
"""

import argparse
import random
import resource
import tempfile
import time
from pathlib import Path

from stethoscope import Finding, Record, report, sinks, stats
from stethoscope._protocols import Run
from stethoscope._record import Histogram
from stethoscope.report._summary import summarise

EVERY, DRAWN = 10, 50
STATISTICS = ("mean", "rms", "min", "max", "zero_fraction")


def write(folder, layers, observed):
    names = [f"encoder.layers.{index}.linear" for index in range(layers)]
    run = Run("bench", "2026-01-01T00:00:00+00:00", tuple((name, "Linear") for name in names), observed * EVERY, EVERY)
    sink = sinks.Jsonl(folder)
    sink.open(run)
    generator = random.Random(0)
    edges = tuple(float(edge) for edge in stats.HISTOGRAM_EDGES)
    for step in range(min(DRAWN, observed)):
        sink.write(step, delivery(generator, names, edges, step), [])
    sink.close()
    file = Path(folder) / "records.jsonl"
    head, *lines = file.read_bytes().splitlines(keepends=True)
    texts = [line.partition(b",")[2] for line in lines]
    with file.open("wb") as whole:
        whole.write(head)
        for step in range(observed):
            whole.write(b'{"step":%d,' % (step * EVERY) + texts[step % len(texts)])
    sink.open(run)
    sink.write(observed * EVERY, [], [Finding("loss-spike", "warning", "A spike.", "", observed * EVERY, names[-1])])
    sink.close()
    return file.stat().st_size


def delivery(generator, names, edges, step):
    records = [Record("loss", generator.random(), 0, source="step"), Record("lr", 1e-3, 0, source="step")]
    for name in names:
        for side in ("input_", ""):
            records += [Record(f"activation/{side}{s}", generator.gauss(0, 1), 0, module=name) for s in STATISTICS]
            counts = tuple(float(generator.randrange(200)) if 15 < bin_ < 65 else 0.0 for bin_ in range(len(edges) - 1))
            records.append(
                Record(f"activation/{side}histogram", Histogram(edges, counts), 0, module=name, kind="histogram")
            )
        for statistic in ("gradient/norm", "parameter/norm", "parameter/update_ratio", "parameter/unchanged"):
            records.append(Record(statistic, abs(generator.gauss(0, 1)), 0, module=f"{name}.weight"))
    return [record._replace(step=step) for record in records]


def scroll(page):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--window-size=1280,900"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    try:
        began = time.perf_counter()
        driver.get(page.as_uri())
        while driver.execute_script("return document.documentElement.dataset.ready") != "true":
            time.sleep(0.05)
        print(f"{'opened, s':<34}{time.perf_counter() - began:>10.1f}")
        driver.set_script_timeout(60)
        for turn in ("first pass, figures are drawn", "second pass"):
            frames = driver.execute_async_script(
                "const done = arguments[0], frames = []; let before = performance.now(), y = 0;"
                "document.documentElement.style.scrollBehavior = 'auto';"
                "const end = document.documentElement.scrollHeight;"
                "const frame = (now) => { frames.push(now - before); before = now; y += 40; window.scrollTo(0, y);"
                "y < end ? requestAnimationFrame(frame) : done(frames); }; requestAnimationFrame(frame);"
            )
            frames = sorted(frames)
            print(
                f"frames, {turn}: median {frames[len(frames) // 2]:.0f} ms, 95 % {frames[int(0.95 * len(frames))]:.0f} ms"
            )
    finally:
        driver.quit()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--observed", type=int, default=5000)
    parser.add_argument("--browser", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = write(folder, arguments.layers, arguments.observed)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        began, busy = time.perf_counter(), time.process_time()
        summary = summarise(folder)
        read, read_busy = time.perf_counter() - began, time.process_time() - busy
        page = Path(folder) / "report.html"
        page.write_text(report.to_html(summary), encoding="utf-8")
        wall, total_busy = time.perf_counter() - began, time.process_time() - busy
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        print(f"{arguments.layers} layers, {arguments.observed} observed steps")
        print(f"{'records.jsonl, MB':<34}{size / 1e6:>10.0f}")
        print(f"{'read, s (of the processor)':<34}{read:>10.1f} ({read_busy:.1f})")
        print(f"{'read and written, s':<34}{wall:>10.1f} ({total_busy:.1f})")
        print(f"{'page, MB':<34}{page.stat().st_size / 1e6:>10.1f}")
        print(f"{'memory before, at the peak, MB':<34}{before:>10.0f} {peak:.0f}")
        if arguments.browser:
            scroll(page)


if __name__ == "__main__":
    main()
