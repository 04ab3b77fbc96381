"""The scoreboard's harness: two faults and two healthy runs, and the rules by which they are judged."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from faults._page import page
from faults._score import is_inside, judge, run, summarise
from faults._seen import Seen, once
from faults.cases import CASES, FAULTS, HEALTHY, PROGRAMS
from faults.observer_ours import Ours

LATE = CASES["root_of_zero"]  # seen from step 80, no module to blame


def test_there_are_enough_cases_of_every_program_and_no_two_have_one_name():
    assert len(FAULTS) >= 400
    assert len(HEALTHY) >= 150
    assert {fault.program for fault in FAULTS} == set(PROGRAMS)
    assert len(CASES) == len(FAULTS) + len(HEALTHY)


def test_each_code_of_the_truth_has_a_page():
    pages = {page.stem for page in (Path(__file__).parents[1] / "docs" / "findings").glob("*.md")}
    assert {code for fault in FAULTS for code in (*fault.codes, *fault.then)} - pages == set()


def test_every_fault_says_what_is_wrong_and_whose_catalogue_has_it():
    sources = [
        "SageMaker",
        "TheDeepChecker",
        "TrainCheck",
        "GRIST",
        "Humbatova",
        "AutoTrainer",
        "UMLAUT",
        "peech",
        "CTC",
    ]
    assert [fault.name for fault in FAULTS if not any(source in fault.why for source in sources)] == []


@pytest.mark.parametrize("name", ["root_of_zero", "log_of_zero"])
def test_a_fault_is_found_by_its_own_code(name):
    result = run(CASES[name], Ours())
    assert result.crash == ""
    assert result.found is not None
    assert result.delay is not None
    assert result.delay >= 0


@pytest.mark.parametrize("name", ["plain_autoencoder", "float64"])
def test_a_healthy_run_runs_and_what_is_said_about_it_is_wrong(name):
    result = run(CASES[name], Ours())
    assert result.crash == ""
    assert not result.faulty
    assert result.found is None
    assert result.right == []


def test_the_data_do_not_depend_on_who_looks():
    first, second = CASES["float64"].build(), CASES["float64"].build()
    for step in (0, 7):
        assert first.sample(step, "train")[0].equal(second.sample(step, "train")[0])


def test_a_report_before_the_fault_is_wrong_and_finds_nothing():
    result = judge(LATE, [Seen(("nonfinite-gradient",), step=79)])
    assert result.found is None
    assert len(result.wrong) == 1


def test_a_declared_consequence_is_right_but_finds_nothing():
    result = judge(LATE, [Seen(("loss-diverged",), step=90)])
    assert result.found is None
    assert len(result.right) == 1


def test_a_cause_makes_a_report_right_and_another_code_is_wrong():
    result = judge(LATE, [Seen(("dead-units",), 90, cause="nonfinite-gradient"), Seen(("dead-units",), 90)])
    assert (len(result.right), len(result.wrong)) == (1, 1)


def test_infos_neither_find_nor_alarm():
    result = judge(LATE, [Seen(("nonfinite-gradient",), 90, info=True)])
    assert (result.found, result.right, result.wrong) == (None, [], [])


def test_the_first_report_counts_for_the_module():
    fault = CASES["head_replaced_too_late"]
    late = Seen(("parameter-unchanged",), 40, ("head.weight",))
    assert judge(fault, [late, Seen(("parameter-unchanged",), 20, ("block1",))]).module_right is False
    assert judge(fault, [late, replace(late, step=60, modules=("",))]).module_right is True


def test_a_module_is_inside_of_itself_and_its_parents_only():
    assert is_inside("block2.norm.bias", ["block2"])
    assert is_inside("", ["", "mask"])
    assert not is_inside("block22", ["block2"])
    assert not is_inside("block2", ["block2.norm"])
    assert not is_inside("block2", [""])


def test_a_peer_that_repeats_itself_counts_once():
    assert len(once([Seen(("loss-spike",), step) for step in range(5)])) == 1


def test_the_page_lists_misses_and_false_alarms_and_figures_of_both_halves():
    healthy = CASES["float64"]
    results = [
        judge(LATE, [Seen(("dead-units",), 90, text="five of nine")]),
        replace(judge(LATE, [Seen(("nonfinite-gradient",), 85)]), held_out=True),
        judge(healthy, [Seen(("overfit",), 10)]),
    ]
    text = page({"stethoscope": results}, {"stethoscope": 1.5}, ["torch-audit"], "python bench_faults.py")
    assert "**root_of_zero** (autoencoder)" in text
    assert "dead-units at step 90: five of nine" in text
    assert "| torch-audit | | not installed |" in text
    assert summarise(results).recall == 0.5
    assert summarise(results).alarms == 1


def test_a_peer_stands_beside_ours_on_the_same_cases():
    hit, other = judge(LATE, [Seen(("nonfinite-gradient",), 85)]), judge(CASES["dead_relu"], [])
    results = {"stethoscope": [hit, other], "trainpulse": [judge(LATE, [])]}
    text = page(results, {}, [], "python bench_faults.py")
    assert "| stethoscope | seen | 1 of 2 (50%) |" in text
    assert "| stethoscope | written | 1 of 1 (100%) |" in text
    assert "| trainpulse | written | 0 of 1 (0%) |" in text
