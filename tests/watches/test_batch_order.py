"""Batches of two sources with real probes; the mixture is wrong, or only looks as if it were."""

import pytest
import torch

from stethoscope import Monitor, presets
from stethoscope.testing import replay, series
from stethoscope.watches import BatchOrder

ITEMS, SIZE = 8, 8000


def voices(step, colour=0.9):
    """(ITEMS, 2, SIZE): coloured noise with pauses, as speech has them."""
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(ITEMS, 2, SIZE + 1, generator=generator)
    level = torch.rand(ITEMS, 2, 40, generator=generator).square().repeat_interleave(SIZE // 40, -1)
    return (noise[..., 1:] + colour * noise[..., :-1]) * level


def train(mix, steps=4, references=lambda r: r):
    model = torch.nn.Conv1d(1, 2, 3, padding=1)
    with Monitor(model, **presets.full(), every=1, strict=True) as monitor:
        for step in range(steps):
            r = voices(step)
            mixture = mix(r, step)
            estimates = model(mixture[:, None, :] if mixture.dim() == 2 else mixture[:, :1])
            estimates.sum().backward()
            monitor.step(estimates=estimates, references=references(r), mixture=mixture)
    codes = {"batch-order", "separation-layout"}
    return [finding for finding in monitor.findings if finding.code in codes]


def test_another_order_is_told_apart_from_other_data():
    (finding,) = train(lambda r, _: r.sum(1).roll(1, 0))
    assert (finding.code, finding.severity, finding.step) == ("batch-order", "warning", 2)
    assert "another item's mixture fits 100%" in finding.message
    (finding,) = train(lambda _, step: voices(step + 999).sum(1))
    assert (finding.code, finding.severity) == ("batch-order", "warning")
    assert "no other item's mixture fits" in finding.message


def reverberant(r, step):
    generator = torch.Generator().manual_seed(step)
    room = torch.randn(1, 1, 1600, generator=generator) * torch.exp(-torch.arange(1600) / 300)
    room[..., :80] = 0
    x = r.sum(1, keepdim=True)
    return torch.nn.functional.conv1d(torch.nn.functional.pad(x, (1599, 0)), room.flip(-1))[:, 0]


HEALTHY = {
    "the sum": lambda r, _: r.sum(1),
    "own gains": lambda r, step: (r * torch.rand(ITEMS, 2, 1, generator=torch.Generator().manual_seed(step)).clamp(min=0.1)).sum(1),
    "noise of the same level": lambda r, step: r.sum(1) + torch.randn(ITEMS, SIZE, generator=torch.Generator().manual_seed(step)),
    "reverberant, references dry": reverberant,
    "another microphone": lambda r, _: r.sum(1).roll(20, -1),
    "channels": lambda r, _: torch.stack([r.sum(1), r.sum(1).roll(9, -1)], 1),
    "other signs": lambda r, _: -r.sum(1),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_a_mixture_that_belongs_is_no_finding(name):
    assert train(HEALTHY[name]) == []


@pytest.mark.parametrize(
    "change", [lambda r: r.transpose(1, 2), lambda r: r.transpose(0, 1), lambda r: r.permute(2, 0, 1)]
)
def test_references_with_their_axes_in_another_order_are_a_warning_from_a_preset_as_well(change):
    (finding,) = train(lambda r, _: r.sum(1), references=change)
    assert (finding.code, finding.severity) == ("separation-layout", "warning")
    assert "same sizes in another order" in finding.message


def test_some_unrelated_items_and_two_observations_say_nothing():
    some = {"separation/unrelated_fraction": [0.5] * 9, "separation/misplaced_fraction": [0.0] * 9}
    assert replay(BatchOrder(), series(range(9), **some)) == []
    two = {"separation/unrelated_fraction": [1.0] * 2, "separation/misplaced_fraction": [0.0] * 2}
    assert replay(BatchOrder(), series(range(2), **two)) == []
