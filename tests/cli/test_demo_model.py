import pytest
import torch

from stethoscope.audits import causality
from stethoscope.cli._demo_model import FrameNorm, Separator, pit_loss, si_sdr_db


def test_the_separator_returns_two_signals_as_long_as_the_mixture():
    assert Separator()(torch.randn(3, 800)).shape == (3, 2, 800)


@pytest.mark.parametrize(("eps", "finite"), [(1e-8, True), (0.0, False)])
def test_without_eps_a_silent_frame_is_divided_by_zero(eps, finite):
    x = torch.randn(2, 4, 5)
    x[1, :, 3] = 0
    assert FrameNorm(4, eps)(x).isfinite().all() == finite


def test_the_separator_looks_ahead_as_far_as_it_says_unless_its_norm_spans_the_recording():
    model, x = Separator(dilations=(1, 3)), torch.randn(2, 400)
    assert causality(model, x, modes="eval").lookahead == model.lookahead == 47
    model.masker.norm.over = (1, 2)
    assert causality(model, x, allowed=model.lookahead, modes="eval").culprit == "masker.norm"


def test_si_sdr_ignores_scale_and_counts_what_is_orthogonal():
    time = torch.arange(800) / 800
    reference = torch.sin(2 * torch.pi * 5 * time).expand(2, -1)
    other = torch.sin(2 * torch.pi * 9 * time)
    expected = torch.tensor([0.0, 20.0])  # noise of the same power, and of a hundredth of it
    estimate = 3 * (reference + other * torch.tensor([[1.0], [0.1]]))
    torch.testing.assert_close(si_sdr_db(estimate, reference), expected, rtol=0, atol=1e-2)


def test_the_loss_takes_each_item_in_its_better_order():
    sources = torch.randn(4, 2, 400)
    estimates = sources + 0.1 * torch.randn(4, 2, 400)
    swapped = estimates.clone()
    swapped[:2] = estimates[:2].flip(1)
    torch.testing.assert_close(pit_loss(swapped, sources), pit_loss(estimates, sources))
    assert pit_loss(estimates, sources) < -15
