"""Real training loops whose targets belong to their inputs, or to others."""

import pytest
import torch
from torch import nn

from stethoscope import Monitor, Record
from stethoscope.testing import replay, series
from stethoscope.watches import AnswerHealth

STEPS = 150


def train(task, order=lambda x: x, sign=1.0, steps=STEPS, optimizers=1):
    """Codes and severities of a small model; `order` is what happens to inputs alone."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    classes = task == "classes"
    model = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4))
    opts = [torch.optim.Adam(model.parameters(), 3e-3) for _ in range(optimizers)]
    truth = torch.randn(6, 4)
    with Monitor(model, opts, watches=[AnswerHealth()], every=5, planned_steps=steps, strict=True) as monitor:
        for _ in range(steps):
            x = torch.randn(32, 6)
            y = x @ truth + 0.3 * torch.randn(32, 4)
            y = y.argmax(1) if classes else y
            out = model(order(x))
            if classes:
                loss = nn.functional.cross_entropy(out, y)
            elif sign < 0:
                loss = nn.functional.cosine_similarity(out, y).mean()
            else:
                loss = nn.functional.mse_loss(out, y)
            opts[0].zero_grad()
            loss.backward()
            opts[0].step()
            monitor.step(loss=loss, **({"logits": out} if classes else {"outputs": out}), targets=y)
    return [(f.code, f.severity) for f in monitor.findings if f.code != "watch-starved"]


@pytest.mark.parametrize("task", ["classes", "values"])
def test_targets_of_other_items_are_told_and_right_ones_are_not(task):
    assert train(task) == []
    assert train(task, order=lambda x: x.roll(1, 0)) == [("stalled-optimisation", "warning")]


def test_an_input_that_never_arrives_is_told():
    assert train("values", order=torch.zeros_like) == [("stalled-optimisation", "warning")]


def test_a_game_of_several_optimizers_is_an_info():
    assert train("values", order=lambda x: x.roll(1, 0), optimizers=2) == [("stalled-optimisation", "info")]


def test_a_similarity_that_is_minimised_is_told():
    assert train("values", sign=-1.0) == [("loss-sign", "warning")]


@pytest.mark.parametrize(("width", "told"), [(4.0, ["loss-sign"]), (1.0, [])])
def test_a_single_number_may_run_against_its_target_by_right(width, told):
    """The risk of a Cox model against the time that is left; the distance of a pair against whether it is one."""
    values = {"answer/concordance": [0.1] * 40, "answer/pairs": [496.0] * 40, "answer/values": [width] * 40}
    assert [f.code for f in replay(AnswerHealth(), series(range(0, 400, 10), **values))] == told


def test_the_first_half_of_a_run_is_patience():
    plan = Record("plan/steps", 1000.0, 0, source="step")
    values = {"answer/concordance": [0.5] * 29 + [0.9] * 71, "answer/pairs": [496.0] * 100}
    assert replay(AnswerHealth(), [plan, *series(range(0, 1000, 10), **values)]) == []


def test_few_pairs_prove_nothing():
    values = {"answer/concordance": [0.4] * 40, "answer/pairs": [3.0] * 40}
    assert replay(AnswerHealth(), series(range(0, 20_000, 500), **values)) == []
