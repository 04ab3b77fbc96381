from hypothesis import given
from hypothesis import strategies as st

from stethoscope import Finding
from stethoscope.report import causes
from stethoscope.report._causes import worst

CODES = st.sampled_from(["a", "b", "c", "d"])
FOUND = st.builds(
    Finding,
    code=CODES,
    severity=st.sampled_from(["info", "warning", "error"]),
    message=st.just("m"),
    advice=st.just(""),
    step=st.none() | st.integers(0, 50),
    cause=st.just("") | CODES | st.just("unknown"),
)


@given(st.lists(FOUND, max_size=20))
def test_each_finding_is_told_exactly_once_whatever_explains_what(findings):
    found = causes(findings)
    told = sum(len(cause.findings) + sum(other.count for other in cause.explains) for cause in found)
    assert told == len(findings)
    ranks = ["error", "warning", "info"]
    order = [ranks.index(cause.severity) for cause in found]
    assert order == sorted(order)


def test_a_code_that_was_told_with_two_causes_breaks_no_report():
    told = [Finding("b", "info", "m", "", cause=cause) for cause in ("", "c")] + [
        Finding("c", "info", "m", "", cause="b")
    ]
    told += [Finding("a", "info", "m", "", cause="b"), Finding("c", "info", "m", "", cause="unknown")]
    for order in (told, told[::-1], told[1:] + told[:1]):
        assert sum(len(c.findings) + sum(o.count for o in c.explains) for c in causes(order)) == len(told)


def test_a_chain_of_causes_leads_to_its_beginning():
    found = causes(
        [
            Finding("loss-diverged", "warning", "", "", 9, cause="nonfinite-loss"),
            Finding("nonfinite-loss", "error", "", "", 8, cause="nonfinite-parameter"),
            Finding("nonfinite-parameter", "error", "Weight.", "", 7, "enc.weight", rank=2),
        ]
    )
    assert [(cause.code, cause.steps, cause.modules, cause.ranks) for cause in found] == [
        ("nonfinite-parameter", (7, 7), ("enc.weight",), (2,))
    ]
    assert [(other.code, other.step) for other in found[0].explains] == [("nonfinite-loss", 8), ("loss-diverged", 9)]


def test_errors_come_before_earlier_warnings_and_a_warning_that_explains_an_error_counts_as_one():
    found = causes(
        [
            Finding("loss-spike", "warning", "", "", 1),
            Finding("output-silent", "warning", "", "", 5),
            Finding("output-collapse", "error", "", "", 6, cause="output-silent"),
        ]
    )
    assert [(cause.code, cause.severity) for cause in found] == [("output-silent", "error"), ("loss-spike", "warning")]


def test_an_explanation_that_was_not_found_leaves_the_finding_on_its_own():
    assert [cause.code for cause in causes([Finding("loss-plateau", "warning", "", "", 3, cause="stalled")])] == [
        "loss-plateau"
    ]
    assert worst([]) is None
