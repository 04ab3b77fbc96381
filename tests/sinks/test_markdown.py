import pytest
from markdown import Markdown

from stethoscope import Finding
from stethoscope.sinks._markdown import MAX_ROWS, escape, table


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "a|b",
        "**bold** _x_",
        "[link](http://a)",
        "`code`",
        "a\\b",
        "слой.0",
        "a\nb",
        "&lt;",
    ],
)
def test_text_from_anywhere_is_shown_as_it_is(text):
    finding = Finding("a-code", "error", text, "advice", step=3, module=text)
    page = Markdown(extensions=["tables"]).convert(table([finding]))
    assert page.count("<td") == 3
    for tag in ("<script", "<strong", "<em", "<a ", "<code"):
        assert tag not in page
    import html

    assert " ".join(text.split()) in html.unescape(page)


def test_a_lone_surrogate_does_not_break_the_encoding():
    escape("a\ud800b").encode("utf-8")


def test_the_newest_finding_comes_first_and_the_table_stays_short():
    text = table([Finding(f"code-{i}", "info", "", "", step=i) for i in range(MAX_ROWS + 5)])
    rows = text.splitlines()
    assert rows[2].startswith(f"| info code-{MAX_ROWS + 4}, step {MAX_ROWS + 4} |")
    assert rows[-1] == "5 earlier findings are not shown."
    assert len(rows) == MAX_ROWS + 4
