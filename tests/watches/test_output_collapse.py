from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stethoscope import Record
from stethoscope.probes import Separation
from stethoscope.testing import replay, series
from stethoscope.watches import OutputCollapse

ITEMS, TIME = 8, 1000


def voices(g: torch.Generator, sources: int) -> Tensor:
    """Coloured noise with a slow envelope: (ITEMS, sources, TIME), unit level."""
    x = torch.randn(ITEMS, sources, TIME + 8, generator=g).unfold(-1, 9, 1).mean(-1)
    x = x * (1.1 + torch.sin(torch.arange(TIME) / 60 + 6 * torch.rand(ITEMS, sources, 1, generator=g)))
    return x / x.std(-1, keepdim=True)


def blurred(references: Tensor, g: torch.Generator, db: float) -> Tensor:
    return references + 10 ** (-db / 20) * torch.randn(references.shape, generator=g)


def same(references: Tensor, g: torch.Generator, db: float = 40) -> Tensor:
    return blurred(references.mean(1, keepdim=True).expand_as(references) * 1.4, g, db)


def scaled(x: Tensor, *gains: float) -> Tensor:
    return x * torch.tensor(gains)[:, None]


def delayed(x: Tensor, samples: int) -> Tensor:
    return torch.stack([x[:, 0], x[:, 0].roll(samples, -1)], 1)


def pair_of(references: Tensor, g: torch.Generator) -> Tensor:
    out = blurred(references, g, 12)
    out[:, -1] = out[:, 0] * 0.7
    return out


def half_of_the_items(references: Tensor, g: torch.Generator) -> Tensor:
    out = blurred(references, g, 12)
    out[::2, 1] = -out[::2, 0]
    return out


def padded(references: Tensor, g: torch.Generator) -> dict[str, Tensor]:
    out = same(references, g)
    out[..., 400:] = 5 * torch.randn(ITEMS, 2, TIME - 400, generator=g)
    return {"estimates": out, "lengths": torch.full((ITEMS,), 400)}


def shares(references: Tensor, g: torch.Generator) -> dict[str, Tensor]:
    return padded(references, g) | {"lengths": torch.full((ITEMS,), 0.4)}


MODES = {
    "equal": (2, same),
    "equal, noisy": (2, lambda r, g: same(r, g, 18)),
    "scaled": (2, lambda r, g: scaled(same(r, g), 1, 0.1)),
    "sign flipped": (2, lambda r, g: scaled(same(r, g), 1, -1)),
    "scaled and flipped": (2, lambda r, g: scaled(same(r, g), -3, 0.2)),
    "delayed by 5": (2, lambda r, g: delayed(same(r, g), 5)),
    "delayed by 40": (2, lambda r, g: delayed(same(r, g), 40)),
    "delayed and flipped": (2, lambda r, g: scaled(delayed(same(r, g), -23), 1, -2)),
    "half of the items": (2, half_of_the_items),
    "one pair of three": (3, pair_of),
    "one pair of five": (5, pair_of),
    "all five": (5, same),
    "padded, lengths in samples": (2, padded),
    "padded, lengths as shares": (2, shares),
    "copies of the mixture": (2, lambda r, g: r.sum(1, keepdim=True).repeat(1, 2, 1)),
    "copies of one source": (2, lambda r, g: r[:, :1].repeat(1, 2, 1)),
    "different offsets": (2, lambda r, g: same(r, g) + torch.tensor([3.0, -2.0])[:, None]),
    "half precision": (2, lambda r, g: same(r, g).half()),
    "silent output": (2, lambda r, g: scaled(r, 1, 1e-3)),
    "output of zeros": (2, lambda r, g: scaled(r, 0, 1)),
    "all outputs zero": (3, lambda r, g: torch.zeros_like(r)),
    "one output for every input": (1, lambda r, g: torch.sin(torch.arange(TIME) / 3).expand_as(r)),
}


def correlated(references: Tensor, cosine: float) -> Tensor:
    common = torch.linalg.vector_norm(references[:, :1], dim=-1, keepdim=True)
    out = math.sqrt(cosine) * references[:, :1] + math.sqrt(1 - cosine) * references[:, 1:]
    return out * common / torch.linalg.vector_norm(out, dim=-1, keepdim=True)


def stems(cosine: float):
    def make(references: Tensor, g: torch.Generator) -> dict[str, Tensor]:
        alike = correlated(references, cosine)
        return {"references": alike, "estimates": blurred(alike, g, 15)}

    return make


def faint(references: Tensor, g: torch.Generator) -> dict[str, Tensor]:
    one = scaled(references, 1, 10 ** (-50 / 20))
    return {"references": one, "estimates": one + 0.003 * one[:, :1]}


def offset(references: Tensor, g: torch.Generator) -> Tensor:
    return blurred(references, g, 12) + 5


def padding_alike(references: Tensor, g: torch.Generator) -> dict[str, Tensor]:
    out = blurred(references, g, 12)
    out[..., 500:] = torch.sin(torch.arange(500.0))
    return {"estimates": out, "lengths": torch.full((ITEMS,), 500)}


def truly_silent(references: Tensor, g: torch.Generator) -> dict[str, Tensor]:
    one = scaled(references, 1, 1, 0)
    return {"references": one, "estimates": one + 0.004 * references.roll(1, 1)}


NEGATIVES = {
    "good": (2, lambda r, g: blurred(r, g, 20)),
    "fair, other order": (3, lambda r, g: blurred(r, g, 10).flip(1)),
    "weak, 3 dB": (2, lambda r, g: r + 0.7 * r.flip(1)),
    "stems at .7": (3, stems(0.7)),
    "stems at .9": (3, stems(0.9)),
    "stems at .97": (3, stems(0.97)),
    "near-silent true source": (2, faint),
    "truly silent source": (3, truly_silent),
    "offset": (2, offset),
    "padding alike": (2, padding_alike),
    "tiny scale of all outputs": (2, lambda r, g: 1e-3 * blurred(r, g, 12)),
    "one output": (1, lambda r, g: blurred(r, g, 5)),
}


def run(sources: int, make, seed: int, observations: int = 26) -> list[str]:
    """Codes found by probe and watch over a run that is observed every 50 steps."""
    g = torch.Generator().manual_seed(seed)
    attached = Separation().attach(nn.Identity())
    attached.arm(True, "train")
    watch = OutputCollapse()
    state, codes = watch.init(), []
    for step in range(0, 50 * observations, 50):
        references = voices(g, sources)
        given = {"references": references}
        made = make(references, g)
        given |= made if isinstance(made, dict) else {"estimates": made}
        given["mixture"] = given["references"].sum(1) + (torch.randn(ITEMS, TIME, generator=g) if sources == 1 else 0)
        records = [Record(key.name, float(value), step) for key, value in attached.read(given).items()]
        records.append(Record("loss", 20.0 if step < 150 else 0.0, step, source="step"))
        state, found = watch.update(state, records)
        codes += [finding.code for finding in found]
    return codes


@pytest.mark.parametrize("mode", MODES)
def test_collapse_at_full_strength_is_found(mode):
    wanted = {"output-collapse", "output-silent", "output-constant"}
    hits = sum(bool(wanted & set(run(*MODES[mode], seed))) for seed in range(3))
    assert hits == 3


@pytest.mark.parametrize("negative", NEGATIVES)
def test_hard_negatives_are_left_alone(negative):
    """Stems with |cos| above 0.95 may say that the references are alike: that is so."""
    for seed in range(4):
        codes = set(run(*NEGATIVES[negative], seed))
        assert codes <= ({"references-alike"} if negative == "stems at .97" else set())


def story(cos, loss, **more):
    steps = range(0, 50 * len(cos), 50)
    names = {f"separation/{name}": values for name, values in more.items()}
    return series(steps, loss=loss, **{"separation/out_cos": cos}, **names)


def test_start_with_outputs_alike_is_no_collapse_and_later_collapse_is():
    cos = [0.99] * 6 + [0.2] * 20 + [0.99] * 14
    found = replay(OutputCollapse(), story(cos, [20.0 - i for i in range(40)]))
    assert [f.code for f in found] == ["output-collapse"]
    assert found[0].step >= 26 * 50


def test_alike_from_the_start_with_a_loss_that_fell_is_collapse_after_the_warm_up():
    (found,) = replay(OutputCollapse(), story([0.99] * 40, [28.0, 10.0, 3.0] + [0.1] * 37, ref_cos=[0.02] * 40))
    assert (found.code, found.severity, found.step) == ("output-collapse", "error", 950)
    assert "output |cos| 0.990, reference |cos| 0.020" in found.message
    assert "reach 0.0 dB at most" in found.message


def test_alike_from_the_start_with_a_loss_that_never_fell_is_another_story():
    (found,) = replay(OutputCollapse(), story([0.99] * 40, [28.0 + 0.5 * (-1) ** i for i in range(40)]))
    assert found.code == "stalled-from-start"
    assert "optimizer owns this model's parameters" in found.advice


def test_minus_ten_decibels_and_alike_names_the_references_with_the_bound():
    records = story([0.97] * 40, [20.0, 5.0] + [-20.0] * 38, si_sdr_db=[20.0] * 40, si_sdri_db=[2.6] * 40)
    (found,) = replay(OutputCollapse(), records)
    assert found.code == "references-alike"
    assert "could not pass 2.2 dB" in found.message
    assert "inference path" in found.advice


def test_few_observations_are_not_enough_even_if_there_are_many_per_step():
    fast = series(loss=[20.0, 10.0] + [0.0] * 60, **{"separation/out_cos": [0.99] * 62})
    assert replay(OutputCollapse(), fast) == []


def test_nonfinite_outputs_are_an_error_of_their_own_and_said_once():
    cos = [0.3] * 10 + [math.nan] * 10
    found = replay(OutputCollapse(), story(cos, [1.0] * 20, nonfinite_fraction=[0.0] * 10 + [1.0] * 10))
    assert [(f.code, f.severity, f.step) for f in found] == [("output-nonfinite", "error", 500)]


def test_collapse_is_told_again_only_after_it_was_left():
    cos = [0.2] * 5 + [0.99] * 20 + [0.2] * 20 + [0.99] * 20
    found = replay(OutputCollapse(), story(cos, [20.0 - i for i in range(65)]))
    assert len(found) == 2


def test_other_phases_are_not_mixed_in():
    records = [r._replace(phase="val") for r in story([0.99] * 40, [28.0] + [0.1] * 39)]
    assert replay(OutputCollapse(), records) == []
    assert [f.phase for f in replay(OutputCollapse(phase="val"), records)] == ["val"]


def test_alike_in_validation_only_points_at_the_inference_path():
    train = story([0.99] * 4 + [0.2] * 16, [20.0 - i for i in range(20)])
    val = [r._replace(phase="val") for r in story([0.99] * 20, [0.0] * 20)]
    records = [r for pair in zip(train[::2], train[1::2], val[::2], val[1::2], strict=True) for r in pair]
    (found,) = replay(OutputCollapse(phase="val"), records)
    assert (found.code, found.phase, found.step) == ("output-collapse", "val", 250)
    assert "In training they are apart (|cos| 0.200)." in found.message
    assert "strict=False" in found.advice
    assert replay(OutputCollapse(), records) == []


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*3 * [st.floats(width=32)]), max_size=60))
def test_any_numbers_are_survived_and_state_is_json_at_any_moment(values):
    watch, state = OutputCollapse(), OutputCollapse().init()
    for step, (cos, share, loss) in enumerate(values):
        records = series(
            [50 * step], loss=[loss], **{"separation/out_cos": [cos], "separation/quiet_fraction": [share]}
        )
        state, _ = watch.update(json.loads(json.dumps(state, allow_nan=False)), records)


@pytest.mark.parametrize("fields", [{"fraction": 0}, {"fraction": 1.5}, {"hold": 0}])
def test_bad_fields_are_named(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        OutputCollapse(**fields)
