from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stethoscope import Monitor, Record
from stethoscope.probes import Activations
from stethoscope.testing import replay
from stethoscope.watches import NonFinite


class Net(nn.Module):
    """Embed, attend with a causal mask of -Inf, and project; `fault` runs inside of the second block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([Block(), Block(), Block()])
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc, self.act = nn.Linear(8, 8), nn.ReLU(inplace=True)
        self.fault = lambda x: x

    def forward(self, x):
        mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1)
        y = self.norm(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.act(self.fc(self.fault(x)))


def train(fault=None, at=3, steps=6, loss_of=lambda out: out.square().mean(), **arguments):
    """Train for some steps; `fault(model, x)` runs before step `at` and may return another batch."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, watches=[NonFinite()], strict=True, **arguments) as monitor:
        for step in range(steps):
            x = torch.randn(3, 5, 4)
            if step == at and fault is not None:
                x = fault(model, x) if fault(model, x) is not None else x
            loss = loss_of(model(x))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss)
    return monitor.findings


def poison_weight(model, x):
    model.blocks[1].fc.weight.data[0, 0] = torch.nan


def poison_absurd(model, x):
    model.blocks[1].fc.weight.data.fill_(3e38)


def poison_input(model, x):
    return x.index_fill(0, torch.tensor([1]), torch.nan)


def divide_by_zero(model, x):
    model.blocks[1].fault = lambda y: y / (y - y)


def break_module(model, x):
    model.blocks[1].norm.eps = torch.nan


@pytest.mark.parametrize(("loss", "told"), [(math.nan, "NaN"), (math.inf, "Inf"), (-math.inf, "-Inf")])
def test_the_loss_is_told_as_everywhere_else(loss, told):
    records = [Record("activation/nonfinite", 0.0, 3, module="a"), Record("loss", loss, 3, source="step")]
    (found,) = replay(NonFinite(), records)
    assert f"The loss is {told}. " in found.message


def test_a_healthy_run_with_inf_masks_has_no_finding():
    assert train() == []


@pytest.mark.parametrize(
    ("fault", "code", "module", "origin"),
    [
        (poison_weight, "nonfinite-parameter", "blocks.1.fc", "parameter"),
        (poison_absurd, "nonfinite-activation", "blocks.1.fc", "operation"),
        (poison_input, "nonfinite-activation", "embed", "input"),
        (divide_by_zero, "nonfinite-activation", "blocks.1.fc", "input"),
        (break_module, "nonfinite-activation", "blocks.1.norm", "operation"),
    ],
)
def test_the_producer_is_told_from_those_who_pass_it_on(fault, code, module, origin):
    findings = train(fault)
    assert [finding.code for finding in findings] == [code]
    assert (findings[0].step, findings[0].module, findings[0].evidence["origin"]) == (3, module, origin)
    assert findings[0].severity == "error"


def test_inf_that_turns_into_nan_later_is_told_apart():
    class Scale(nn.Module):
        def forward(self, x):
            return x * 3e38 * 10

    class Difference(nn.Module):
        def forward(self, x):
            return x - x

    model = nn.Sequential(nn.Linear(2, 2), Scale(), nn.Identity(), Difference())
    with Monitor(model, watches=[NonFinite()], strict=True) as monitor:
        monitor.step(loss=model(torch.ones(3, 2)).sum())
    (finding,) = monitor.findings
    assert finding.module == "1"
    assert finding.evidence["first_nan"] == "3"
    assert "turns into NaN in '3'" in finding.message


def test_a_loss_that_makes_nan_of_finite_outputs():
    (finding,) = train(loss_of=lambda out: torch.log(-out.square().mean()))
    assert (finding.code, finding.step, finding.module) == ("nonfinite-loss", 0, "")


def test_nan_born_in_backward_is_found_in_the_weights_of_the_next_step():
    def root_of_zero(model, x):
        model.blocks[1].fault = lambda y: y + torch.sqrt(y.detach() * 0 * y)

    (finding,) = train(root_of_zero)
    assert finding.code == "nonfinite-parameter"
    assert finding.step == 4
    assert "step before" in finding.message + finding.advice


def test_nan_that_where_removes_is_healthy():
    def healed(model, x):
        model.blocks[1].fault = lambda y: torch.where(y > 1e9, (y.detach() - y.detach()) / 0.0 * 0.0, y)

    assert train(healed) == []


def test_without_a_loss_the_model_output_decides():
    model = nn.Sequential(nn.Linear(2, 2), nn.Identity())
    with Monitor(model, watches=[NonFinite()], strict=True) as monitor:
        model(torch.full((2, 2), torch.nan))
        monitor.step()
    assert [(finding.severity, finding.module) for finding in monitor.findings] == [("error", "0")]


def test_a_loss_that_stays_bad_is_reported_once_and_again_after_a_recovery():
    model = nn.Linear(2, 2)
    with Monitor(model, watches=[NonFinite()], strict=True) as monitor:
        for scale in (1.0, torch.nan, torch.nan, 1.0, torch.nan):
            monitor.step(loss=model(torch.full((3, 2), scale)).sum())
    assert [finding.step for finding in monitor.findings] == [1, 4]


def test_validation_is_judged_on_its_own():
    model = nn.Linear(2, 2)
    with Monitor(model, watches=[NonFinite()], strict=True) as monitor:
        monitor.step(loss=model(torch.ones(3, 2)).sum())
        with monitor.phase("val"):
            model(torch.full((3, 2), torch.nan))
    assert [(finding.phase, finding.module) for finding in monitor.findings] == [("val", "")]


def test_a_bad_weight_is_named_in_validation_too():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].bias.data[0] = torch.nan
    with Monitor(model, watches=[NonFinite()], strict=True) as monitor:
        monitor.step(loss=model(torch.ones(3, 2))[:, 1].sum())
        with monitor.phase("val"):
            model(torch.ones(3, 2))
    assert [(f.code, f.phase, f.module) for f in monitor.findings] == [
        ("nonfinite-parameter", "train", "1"),
        ("nonfinite-parameter", "val", "1"),
    ]


RECORDS = st.lists(
    st.builds(
        Record,
        name=st.sampled_from(
            ["loss", "activation/nonfinite", "activation/input_nonfinite", "parameter/nonfinite", "lr"]
        ),
        value=st.one_of(st.floats(), st.none()),
        step=st.integers(0, 5),
        module=st.sampled_from(["", "a", "a.b", "a.b.weight"]),
        source=st.sampled_from(["probe", "step", "log"]),
    ),
    max_size=30,
)


@given(RECORDS)
def test_any_records_are_survived_and_the_state_is_json(records):
    records.sort(key=lambda record: record.step)
    watch = NonFinite()
    for finding in replay(watch, records):
        assert finding.step in {record.step for record in records}
        json.dumps(dict(finding.evidence))
    state, _ = watch.update(watch.init(), records)
    assert json.loads(json.dumps(state)) == state


class Masked(nn.Module):
    """Attends over scores that a module of its own fills with -Inf."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.mask, self.softmax, self.head = Causal(), nn.Softmax(-1), nn.Linear(4, 1)

    def forward(self, x):
        scores = self.mask(self.query(x) @ self.key(x).mT)
        return self.head(self.softmax(scores) @ self.value(x))


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = 1

    def forward(self, scores):
        return scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(self.first), -torch.inf)


def masked_training(fault=None, steps=4, loss_of=lambda out: out.square().mean()):
    torch.manual_seed(0)
    model = Masked()
    with Monitor(model, watches=[NonFinite()], strict=True) as monitor:
        for step in range(steps):
            if step == steps - 1 and fault is not None:
                fault(model)
            monitor.step(loss=loss_of(model(torch.randn(3, 5, 4))))
    return monitor.findings


def test_a_mask_that_was_there_in_healthy_steps_is_not_accused_later():
    assert masked_training() == []
    (weight,) = masked_training(lambda model: model.value.bias.data.fill_(torch.nan))
    assert (weight.code, weight.module) == ("nonfinite-parameter", "value")
    (absurd,) = masked_training(lambda model: model.head.weight.data.fill_(3e38))
    assert (absurd.code, absurd.module, absurd.evidence["origin"]) == ("nonfinite-activation", "head", "operation")
    (whole,) = masked_training(lambda model: setattr(model.mask, "first", 0))
    assert (whole.module, whole.evidence["origin"]) == ("softmax", "operation")
    assert whole.evidence["harmless"] == ["mask"]


def test_a_loss_function_is_accused_beside_a_harmless_mask():
    (finding,) = masked_training(loss_of=lambda out: torch.log(-out.abs()).sum())
    assert finding.module == "mask"  # at the first step nothing is known to be harmless
    losses = iter([1.0, 1.0, 1.0, torch.nan])
    (finding,) = masked_training(loss_of=lambda out: out.mean() * next(losses))
    assert (finding.code, finding.module) == ("nonfinite-loss", "")
    assert "but for 'mask' as in healthy steps" in finding.message


@pytest.mark.parametrize("rows", [8, 2000])
def test_without_a_loss_masked_scores_of_minus_inf_are_healthy(rows):
    class Policy(nn.Linear):
        def forward(self, x):
            return super().forward(x).index_fill(1, torch.tensor([2]), -torch.inf)

    model = Policy(4, 6)
    with Monitor(model, watches=[NonFinite()], strict=True) as monitor:
        model(torch.randn(rows, 4))
        monitor.step()
        with monitor.phase("val"):
            model(torch.randn(rows, 4))
    assert monitor.findings == []


def test_without_a_loss_an_overflow_is_a_warning():
    model = nn.Linear(4, 6)
    model.weight.data.fill_(1.0)
    with Monitor(model, watches=[NonFinite()], strict=True) as monitor:
        model(torch.full((8, 4), 3e38))
        monitor.step()
    assert [(finding.severity, finding.code) for finding in monitor.findings] == [("warning", "nonfinite-activation")]


@pytest.mark.parametrize("statistics", [("nonfinite",), ("nonfinite", "rms")])
@pytest.mark.parametrize("length", [5, 80])
def test_a_mask_handed_over_is_no_bad_input_whatever_its_size(length, statistics):
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.attention = nn.Linear(4, 8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x, mask = self.embed(x), torch.full((length, length), -torch.inf).triu(0)  # masks the first row whole
            return self.attention(x, x, x, attn_mask=mask)[0]

    model = Attend()
    probe = Activations(statistics=statistics, every=1)
    with Monitor(model, probes=[probe], watches=[NonFinite()], strict=True) as monitor:
        monitor.step(loss=model(torch.randn(2, length, 4)).sum())
    (finding,) = monitor.findings
    assert (finding.module, finding.evidence["origin"]) == ("attention", "operation")


def test_a_bad_input_is_seen_when_a_leaf_is_called_by_keyword():
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(input=x / 0)

    model = Keyword()
    with Monitor(model, watches=[NonFinite()], strict=True) as monitor:
        monitor.step(loss=model(torch.randn(3, 4)).sum())
    (finding,) = monitor.findings
    assert (finding.module, finding.evidence["origin"]) == ("fc", "input")


def test_an_absurd_finite_weight_is_not_called_non_finite():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    model[1].weight.data.fill_(3e38)
    with Monitor(model, watches=[NonFinite()], strict=True) as monitor:
        monitor.step(loss=model(torch.full((3, 4), 5.0)).square().sum())
    (finding,) = monitor.findings
    assert (finding.code, finding.module, finding.evidence["origin"]) == ("nonfinite-activation", "1", "operation")


def test_the_loss_function_is_not_accused_where_no_module_was_seen():
    model = nn.Linear(2, 2).eval()
    model.bias.data.fill_(torch.nan)
    with Monitor(model, probes=[], watches=[NonFinite()], strict=True) as monitor:
        monitor.step(loss=model(torch.ones(3, 2)).sum())
    finding = monitor.findings[0]
    assert (finding.code, finding.evidence["origin"]) == ("nonfinite-loss", "unknown")
    assert "not observed" in finding.message
