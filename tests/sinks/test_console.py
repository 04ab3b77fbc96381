import io
import math
import subprocess
import sys
import textwrap

import pytest

from stethoscope import Finding
from stethoscope._protocols import Run
from stethoscope.sinks import Console
from stethoscope.testing import series

RUN = Run("a", "")
FINDING = Finding(
    "nonfinite-activation", "error", "8 values are NaN.", "Lower the learning rate.", step=40, module="enc.3"
)


def opened():
    file = io.StringIO()
    sink = Console(file)
    sink.open(RUN)
    return sink, file


def test_a_finding_is_printed_when_it_comes():
    sink, file = opened()
    sink.write(40, [], [FINDING])
    assert file.getvalue().splitlines() == [
        "error nonfinite-activation  step 40  enc.3",
        "  8 values are NaN.",
        "  Try: Lower the learning rate.",
    ]


def test_phase_rank_and_cause_are_said():
    sink, file = opened()
    sink.write(0, [], [Finding("a", "info", "m", "", phase="val", rank=2, cause="b")])
    assert "(val)  rank 2" in file.getvalue()
    assert "Explained by b." in file.getvalue()


def test_the_summary_tells_steps_last_loss_and_findings_by_code():
    sink, file = opened()
    for step in range(10):
        sink.write(step, series([step], loss=[10.0 - step]), [FINDING, FINDING] if step == 4 else [])
    sink.close()
    assert file.getvalue().splitlines()[-2:] == [
        "stethoscope: steps 0 to 9, last loss 1, 2 findings",
        "     2 x nonfinite-activation, first at step 40, first in enc.3",
    ]


def test_a_quiet_run_says_that_there_was_nothing():
    sink, file = opened()
    sink.write(0, series(loss=[math.nan]), [])
    sink.close()
    assert file.getvalue() == "stethoscope: steps 0 to 0, last loss nan, no findings\n"


@pytest.mark.parametrize("name", ["[bold red]x[/]", "[/]", ":smile:", "слой.0"])
def test_names_are_not_markup(name):
    sink, file = opened()
    sink.write(0, [], [Finding("a", "info", name, "", module=name)])
    sink.close()
    assert file.getvalue().count(name) == 3


def test_control_characters_do_not_reach_the_terminal():
    sink, file = opened()
    sink.write(0, [], [Finding("a", "info", "one\ntwo\x1b[31m", "", module="x\n\x1b]0;title\x07")])
    sink.close()
    assert "\x1b" not in file.getvalue()
    assert "\x07" not in file.getvalue()
    assert "  one\n  two" in file.getvalue()


def test_long_text_is_wrapped_at_the_width_of_the_screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    sink, file = opened()
    sink.write(0, [], [Finding("a", "warning", "word " * 60, "", step=1)])
    assert max(len(line) for line in file.getvalue().splitlines()) <= 80


def test_the_first_import_of_rich_leaves_the_random_numbers_alone():
    script = """
        import io, random
        from stethoscope._protocols import Run
        from stethoscope.sinks import Console
        state = random.getstate()
        Console(io.StringIO()).open(Run("a", ""))
        assert random.getstate() == state
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True)


def test_close_may_come_twice_and_a_write_after_it_is_an_error():
    sink, file = opened()
    sink.write(0, series(loss=[1.0]), [])
    sink.close()
    printed = file.getvalue()
    sink.close()
    assert file.getvalue() == printed
    with pytest.raises(RuntimeError, match="Console is not open"):
        sink.write(1, [], [])


def test_a_long_message_is_indented_as_a_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    sink, file = opened()
    sink.write(0, [], [Finding("a", "error", "many words " * 9, "some advice")])
    lines = file.getvalue().splitlines()
    assert len(lines) > 4
    assert all(line.startswith("  ") and len(line) <= 30 for line in lines[1:])


def test_findings_come_above_a_progress_bar_and_do_not_break_it(monkeypatch):
    from rich.console import Console as RichConsole
    from rich.progress import Progress

    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stdout", terminal)
    sink = Console()
    sink.open(RUN)
    console = RichConsole(force_terminal=True, width=80)
    with Progress(console=console, auto_refresh=False) as progress:
        progress.add_task("bar")
        progress.refresh()
        before = len(terminal.getvalue())
        sink.write(40, [], [FINDING])
    after = terminal.getvalue()[before:]
    erase_line = "\x1b[2K"
    assert 0 <= after.index(erase_line) < after.index("nonfinite-activation") < after.index("bar")
