import base64
import hashlib
import html
import json
import re
from dataclasses import replace

import pytest

from stethoscope import Finding, report
from stethoscope.report._page import embedded

EVIL = "</script><script>alert(1)</script>&<b>\u2028"


def scripts(page):
    return re.findall(r"<script(?P<kind>[^>]*)>(.*?)</script>", page, re.DOTALL)


def seen(page):
    """The page without its scripts."""
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def data(page):
    return json.loads(next(text for kind, text in scripts(page) if "json" in kind))


def test_what_is_wrong_comes_first_with_its_reason_and_its_page(faulty):
    page = report.to_html(report.summarise(faulty))
    text = html.unescape(seen(page))
    order = [
        "'enc.1' makes NaN.",
        'id="wrong"',
        "nonfinite-loss",
        'id="layers"',
        'id="loss"',
        'id="bins"',
        'id="facts"',
    ]
    places = [text.find(part) for part in order]
    assert places == sorted(places)
    assert -1 not in places
    assert "How it is decided" in text
    assert "step 12 · enc.1" in text
    assert text.count("<article") == 2  # the loss is explained by the activation


def test_a_healthy_run_is_said_to_be_fine(healthy):
    page = report.to_html(report.summarise(healthy))
    assert "Nothing of severity warning or above was found up to step 19" in page
    assert "No finding" in page


def test_the_policy_lets_run_exactly_the_scripts_of_the_page(faulty):
    page = report.to_html(report.summarise(faulty))
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    ours = {
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for kind, text in scripts(page)
        if "json" not in kind
    }
    assert allowed == ours
    assert len(ours) == 2
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert not re.search(r'(src|href)="(https?:)?//|\son\w+=|\sstyle=', seen(page))


def test_names_from_the_run_are_text_everywhere(tmp_path, writing):
    run = writing(
        tmp_path / "evil",
        names=((EVIL, EVIL), ("a/b.c", "X")),
        findings=[Finding(EVIL, "error", EVIL, EVIL, 3, EVIL, phase=EVIL, evidence={EVIL: [EVIL]}, cause=EVIL)],
    )
    summary = report.summarise(run)
    page = report.to_html(replace(summary, run=replace(summary.run, versions={EVIL: EVIL}, id=EVIL)))
    page = page.encode("utf-8", "replace").decode()
    assert len(scripts(page)) == 3
    assert "alert(1)</script>" not in page
    assert "<b>" not in seen(page)
    assert any("alert(1)" in row for row in data(page)["statistics"][0]["rows"])
    assert "<script" not in report.to_markdown(summary)
    json.loads(report.to_json(summary))


def test_embedded_json_cannot_end_its_element():
    text = embedded({"a": EVIL, "b": [float("inf"), float("nan")]})
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"a": EVIL, "b": [None, None]}


def test_cells_and_their_scale_reach_the_page(faulty):
    tables = data(report.to_html(report.summarise(faulty)))["statistics"]
    rms, mean = tables
    assert (rms["title"], rms["scale"], rms["rows"]) == ("Activation rms", "log", ["enc.0", "enc.1", "enc.2", "enc.3"])
    assert mean["scale"] == "asinh"
    assert len(base64.b64decode(rms["values"])) == 4 * 10 * 4
    assert rms["steps"][:2] == [[0, 0], [2, 2]]


def test_the_loss_carries_the_findings_on_its_axis(faulty):
    loss = data(report.to_html(report.summarise(faulty)))["curves"]["loss"]
    assert [(mark["label"], mark["step"], mark["severity"]) for mark in loss["marks"]] == [("1", 12, "error")]
    assert loss["lines"][0]["points"][0] == [0, 0, 1.0, 1.0, 1.0, None]


@pytest.mark.parametrize("form", [report.to_markdown, report.to_json])
def test_other_formats_tell_the_same(faulty, form):
    text = form(report.summarise(faulty))
    for part in ("nonfinite-activation", "nonfinite-loss", "enc.1", "Look."):
        assert part in text


def test_json_is_strict_and_says_the_worst(faulty):
    told = json.loads(report.to_json(report.summarise(faulty)), parse_constant=pytest.fail)
    assert told["worst"] == "error"
    assert told["causes"][0]["steps"] == [12, 12]
    assert told["causes"][0]["explains"][0]["code"] == "nonfinite-loss"
    assert (told["last_step"], told["state"]) == (19, "finished")
