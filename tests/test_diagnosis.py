from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stethoscope import Finding, Monitor, Record, watches
from stethoscope._diagnosis import Relate
from stethoscope._rules import RULES
from stethoscope.separation_stats import centred, cosine, gram, si_sdr_db


def finding(code: str, step: int = 1000, severity: str = "warning", phase: str = "train") -> Finding:
    return Finding(code, severity, f"{code}.", "", step, phase=phase)


def numbers(step: int = 0, **values: float) -> list[Record]:
    names = {"margin": "separation/margin_db", "out_cos": "separation/out_cos", "norm": "gradient/norm", "lr": "lr"}
    return [Record(names[name], value, step) for name, value in values.items()]


def told(*deliveries) -> list[tuple[str, str]]:
    """Codes and causes of all that is delivered; the state goes through JSON each time."""
    relate, out = Relate(), []
    state = relate.init()
    for records, found in deliveries:
        state, delivered = relate.update(json.loads(json.dumps(state, allow_nan=False)), records, found)
        assert {f.code for f in found} <= {f.code for f in delivered}
        out += [(f.code, f.cause) for f in delivered]
    return out


def test_flat_with_outputs_apart_and_a_clear_margin_is_the_optimisation():
    assert told((numbers(margin=20, out_cos=0.2, lr=1e-7), []), ([], [finding("loss-plateau")])) == [
        ("stalled-optimisation", ""),
        ("loss-plateau", "stalled-optimisation"),
    ]


def test_flat_alike_and_without_margin_is_the_assignment_and_explains_what_follows():
    history = told(
        (numbers(margin=0.3, out_cos=0.99), [finding("loss-plateau", 500)]),
        (numbers(margin=0.3, out_cos=0.99), [finding("output-collapse", 800)]),
        ([], [finding("assignment-ambiguous", 900)]),
        ([], [finding("loss-plateau", 1500)]),
    )
    assert history == [
        ("loss-plateau", ""),
        ("stalled-assignment", ""),
        ("output-collapse", "stalled-assignment"),
        ("assignment-ambiguous", "stalled-assignment"),
        ("loss-plateau", "stalled-assignment"),
    ]


@pytest.mark.parametrize("cause", ["output-silent", "references-alike", "stalled-from-start", "loss-diverged"])
def test_specific_reason_explains_the_plateau_and_nothing_is_added(cause):
    clear = numbers(margin=20, out_cos=0.2) if cause == "loss-diverged" else []
    history = told((clear, [finding(cause)]), (clear, [finding("loss-plateau", 1100)]))
    assert history[:2] == [(cause, ""), ("loss-plateau", cause)]
    assert len(history) == 2


def test_nothing_learns_although_gradients_flow_is_the_optimizer():
    both = [finding("loss-plateau"), finding("parameter-unchanged")]
    assert ("optimizer-owns-others", "") in told((numbers(norm=300.0, lr=1e-3), both))
    assert told((numbers(norm=300.0, lr=0.0), both)) == [("loss-plateau", ""), ("parameter-unchanged", "")]
    assert told((numbers(norm=0.0, lr=1e-3), both)) == [("loss-plateau", ""), ("parameter-unchanged", "")]


def test_converged_run_gets_no_diagnosis():
    history = told((numbers(margin=20, out_cos=0.2), [finding("loss-plateau", severity="info")]))
    assert history == [("loss-plateau", "")]


def test_without_separation_records_a_plateau_stays_alone():
    assert told((numbers(lr=1e-3), [finding("loss-plateau")])) == [("loss-plateau", "")]


def test_diagnosis_is_said_once_while_it_lasts():
    flat = (numbers(margin=20, out_cos=0.2), [finding("loss-plateau")])
    codes = [code for code, _ in told(flat, (flat[0], [finding("loss-plateau", 1500)]))]
    assert codes.count("stalled-optimisation") == 1
    late = told(flat, (flat[0], [finding("loss-plateau", 9000)]))
    assert [code for code, _ in late].count("stalled-optimisation") == 2


def test_phases_are_kept_apart():
    assert told(([], [finding("output-silent"), finding("loss-plateau", phase="val")])) == [
        ("output-silent", ""),
        ("loss-plateau", ""),
    ]


def test_cause_that_is_set_already_is_kept():
    set_before = Finding("loss-plateau", "warning", "", "", 5, cause="elsewhere")
    assert told(([], [finding("output-silent", 5), set_before]))[1] == ("loss-plateau", "elsewhere")


def test_parameter_explains_what_became_nonfinite_after_it():
    codes = ["nonfinite-parameter", "nonfinite-activation", "nonfinite-loss", "loss-diverged"]
    assert [cause for _, cause in told(([], [finding(code) for code in codes]))] == ["", *3 * ["nonfinite-parameter"]]


def test_what_another_rank_found_earlier_is_not_explained_by_what_came_of_it_here():
    history = told(
        ([], [finding("nonfinite-parameter", 12)]),
        ([], [finding("nonfinite-activation", 11), finding("loss-diverged", 13)]),
    )
    assert history == [
        ("nonfinite-parameter", ""),
        ("nonfinite-activation", ""),
        ("loss-diverged", "nonfinite-parameter"),
    ]


def test_no_rule_explains_itself():
    assert all(rule.code not in rule.explains for rule in RULES)


@pytest.mark.parametrize("wired", [True, False])
def test_real_training_with_and_without_a_fault_in_the_loss(wired):
    """A linear separator of a low and a high voice; without PIT on references in random order it can only copy."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Conv1d(1, 2, 33, padding=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    time = torch.arange(800) / 8000
    watching = [watches.Plateau(), watches.OutputCollapse(), watches.Assignment()]
    with Monitor(model, optimizer, watches=watching, every=5, planned_steps=400, strict=True) as monitor:
        for _ in range(400):
            pitch = torch.tensor([150.0, 1500.0]) * (1 + 0.3 * torch.rand(8, 2, generator=g))
            references = torch.sin(6.283 * pitch[..., None] * time + 6 * torch.rand(8, 2, 1, generator=g))
            swap = torch.rand(8, 1, 1, generator=g) < 0.5
            references = torch.where(swap, references.flip(1), references)
            mixture = references.sum(1)
            estimates = model(mixture[:, None])
            cos = cosine(gram(centred(torch.cat([estimates, references], 1))))[:, :2, 2:]
            straight = -si_sdr_db(cos).diagonal(dim1=1, dim2=2).mean(1)
            crossed = -si_sdr_db(cos.flip(1)).diagonal(dim1=1, dim2=2).mean(1)
            loss = (torch.minimum(straight, crossed) if wired else straight).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss, estimates=estimates, references=references, mixture=mixture)
    serious = {f.code for f in monitor.findings if f.severity != "info"} - {"loss-plateau", "stalled-optimisation"}
    assert serious == (set() if wired else {"output-collapse"})


@pytest.mark.parametrize("cause", ["nonfinite-optimizer", "nonfinite-buffer", "nonfinite-input"])
def test_what_the_guard_has_found_explains_what_the_watch_sees_of_that_step_alone(cause):
    history = told(
        ([], [finding(cause, 5)]),
        ([], [finding("nonfinite-activation", 5)]),
        ([], [finding("nonfinite-activation", 9)]),
    )
    assert [explained for _, explained in history] == ["", cause, ""]


@settings(deadline=None)
@given(st.permutations(sorted({code for rule in RULES for code in (rule.code, *rule.explains)})), st.integers(2, 60))
def test_what_is_found_in_one_step_has_a_first_cause(codes, count):
    relate = Relate()
    found = [Finding(code, "error", "m", "a", step=3) for code in codes[:count]]
    _, out = relate.update(relate.init(), (), found)
    causes = {finding.code: finding.cause for finding in out}
    for code in causes:
        for _ in causes:
            code = causes.get(code, "")  # noqa: PLW2901  up to the root
        assert not code


def test_what_began_is_told_first_and_what_followed_from_it_after():
    found = [Finding(code, "warning", "It is.", "", step=200) for code in (
        "nonfinite-optimizer", "nonfinite-gradient", "dead-units", "nonfinite-activation",
    )]  # fmt: skip
    relate = Relate()
    told = relate.update(relate.init(), (), found)[1]
    assert [f.code for f in told] == ["dead-units", "nonfinite-activation", "nonfinite-gradient", "nonfinite-optimizer"]
    assert [f.cause for f in told] == ["", "", "nonfinite-activation", "nonfinite-gradient"]


def test_weights_that_decayed_away_explain_what_is_lost_with_them():
    lost = [finding("gradient-vanishing", 250), finding("activation-vanishing", 270), finding("loss-diverged", 280)]
    assert told(([], [finding("weight-norm-drift", 220)]), *(([], [each]) for each in lost)) == [
        ("weight-norm-drift", ""),
        *((each.code, "weight-norm-drift") for each in lost),
    ]
    # grown by steps that are too long, it is no beginning
    assert told(([], [finding("update-ratio-high", 0)]), ([], [finding("weight-norm-drift", 220)]))[1] == (
        "weight-norm-drift",
        "update-ratio-high",
    )


def test_a_deep_net_without_a_signal_has_one_cause():
    codes = ("parameter-unchanged", "feature-constant", "gradient-zero", "gradient-vanishing")
    relate = Relate()
    told = relate.update(relate.init(), (), [Finding(code, "warning", "It is.", "", step=100) for code in codes])[1]
    assert [f.cause for f in told] == ["", *["gradient-vanishing"] * 3]
    assert told[0].code == "gradient-vanishing"


def test_a_dropout_of_nearly_all_and_batches_of_one_class_are_causes():
    assert told(([], [finding("dropout-high", 0)]), ([], [finding("loss-plateau", 300)]))[-1] == (
        "loss-plateau",
        "dropout-high",
    )
    assert told(([], [finding("class-imbalance", 60)]), ([], [finding("dead-units", 90)]))[-1] == (
        "dead-units",
        "class-imbalance",
    )


def test_an_info_explains_nothing():
    history = told(([], [finding("dead-units", 20, "info")]), ([], [finding("loss-plateau", 100)]))
    assert history[-1] == ("loss-plateau", "")


def test_an_optimizer_that_is_never_stepped_owns_no_others():
    never = [*numbers(norm=300.0, lr=1e-3), Record("optimizer/steps", 0.0, 0)]
    assert told((never, [finding("loss-plateau")])) == [("loss-plateau", "")]
