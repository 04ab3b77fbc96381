from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio as reference_si_sdr

from stethoscope import separation_stats as stats


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("noise", [0.03, 0.3, 3.0])
def test_si_sdr_from_cosines_is_that_of_torchmetrics(noise):
    target, estimate = some(4, 1000), 0.01 * (some(4, 1000) + noise * some(4, 1000, seed=1)) + 5
    both = stats.centred(torch.stack([estimate, target], 1))
    ours = stats.si_sdr_db(stats.cosine(stats.gram(both)))[:, 0, 1]
    torch.testing.assert_close(ours, reference_si_sdr(estimate, target, zero_mean=True), atol=0.02, rtol=0)


def test_padding_does_not_count_whatever_it_holds():
    signals, lengths = some(3, 2, 500), torch.tensor([500, 300, 120])
    padded = signals.clone()
    for item, length in enumerate(lengths):
        padded[item, :, length:] = torch.nan
    cos = stats.cosine(stats.gram(stats.centred(padded, lengths)))
    for item, length in enumerate(lengths):
        alone = np.corrcoef(signals[item, :, :length].numpy())[0, 1]
        assert cos[item, 0, 1].item() == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("max_delay", [1, 7, 64])
def test_delayed_cosine_agrees_with_trying_every_lag(max_delay):
    signals = stats.centred(some(2, 3, 700))
    signals[1, 2, 5:] = -0.5 * signals[1, 0, :-5]
    found = stats.largest_pair_delayed(signals, 1 / torch.linalg.vector_norm(signals, dim=-1), max_delay)
    for item in range(2):
        x, best = signals[item].double().numpy(), 0.0
        for i, j in ((0, 1), (0, 2), (1, 2)):
            every = np.correlate(x[i], x[j], "full")[699 - max_delay : 700 + max_delay]
            best = max(best, np.abs(every).max() / np.linalg.norm(x[i]) / np.linalg.norm(x[j]))
        assert found[item].item() == pytest.approx(best, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 4), st.integers(2, 4), st.integers(0, 1000))
def test_assignment_and_margin_agree_with_brute_force(rows, columns, seed):
    scores = some(3, rows, columns, seed=seed)
    found = stats.assign(scores)
    for item in range(3):
        matrix = scores[item] if rows >= columns else scores[item].T
        means = sorted(
            (np.mean([matrix[r, c].item() for c, r in enumerate(order)]), order)
            for order in permutations(range(matrix.shape[0]), matrix.shape[1])
        )
        assert found.score[item].item() == pytest.approx(means[-1][0], abs=1e-5)
        assert found.margin[item].item() == pytest.approx(means[-1][0] - means[-2][0], abs=1e-5)
        assert tuple(found.matches[item].tolist()) == means[-1][1]


def test_permutations_are_all_and_each_once():
    assert sorted(map(tuple, stats.permutations(4, torch.device("cpu")).tolist())) == sorted(permutations(range(4)))


def test_sir_and_sar_agree_with_projections():
    sources = stats.centred(some(2, 3, 400))
    sources[:, 1] += 0.5 * sources[:, 0]
    estimates = stats.centred(sources + 0.2 * sources.roll(1, 1) + 0.1 * some(2, 3, 400, seed=1))
    sir, sar = stats.sir_sar_db(stats.gram(torch.cat([estimates, sources], 1)), 3)
    for item in range(2):
        for i in range(3):
            e, s = estimates[item, i].double().numpy(), sources[item].double().numpy()
            target = (e @ s[i]) / (s[i] @ s[i]) * s[i]
            spanned = s.T @ np.linalg.lstsq(s.T, e, rcond=None)[0]
            power = float(target @ target)
            interference, artefact = spanned - target, e - spanned
            assert sir[item, i].item() == pytest.approx(10 * np.log10(power / (interference @ interference)), abs=0.05)
            assert sar[item, i].item() == pytest.approx(10 * np.log10(power / (artefact @ artefact)), abs=0.05)


@pytest.mark.parametrize("sources", [2, 3, 4])
def test_equal_outputs_of_orthogonal_sources_reach_what_the_bound_says(sources):
    """10 log10(1 / (n - 1)) dB: the figure on which the diagnosis of a collapsed run rests."""
    references = torch.eye(sources, 64)[None]
    signals = torch.cat([references.sum(1, keepdim=True), references], 1)
    reached = stats.si_sdr_db(stats.cosine(stats.gram(signals)))[0, 0, 1:].mean()
    assert reached.item() == pytest.approx(10 * np.log10(1 / (sources - 1)), abs=1e-3)
