import pytest
import torch
from torch import nn

from stethoscope.audits import streaming

torch.set_num_threads(1)


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def rnn_stream(rnn, x, size, *, keep):
    state = None
    for part in x.split(size, dim=1):
        out, new = rnn(part, state)
        state = new if keep else None
        yield out


@pytest.mark.parametrize("size", [1, 7, 40])
def test_an_rnn_that_keeps_its_state_streams_equally(size):
    rnn = nn.GRU(3, 4, batch_first=True)
    report = streaming(lambda x: rnn(x)[0], lambda x: rnn_stream(rnn, x, size, keep=True), noise(2, 40, 3), time_axis=1)
    assert report.ok
    assert report.equal
    assert report.first_difference is None
    assert report.size < 1e-6


def test_lost_state_is_found_at_the_end_of_the_first_chunk():
    rnn = nn.GRU(3, 4, batch_first=True)
    report = streaming(lambda x: rnn(x)[0], lambda x: rnn_stream(rnn, x, 8, keep=False), noise(2, 40, 3), time_axis=1)
    assert not report.ok
    assert report.first_difference == 8
    assert report.delay is None
    assert [f.code for f in report.findings] == ["streaming-mismatch"]


def test_a_stream_called_chunk_by_chunk_keeps_its_own_state():
    total = torch.zeros(2, 1)

    def step(part):
        nonlocal total
        out = total + part.cumsum(-1)
        total = out[:, -1:]
        return out

    assert streaming(lambda x: x.cumsum(-1), step, noise(2, 33), chunk=5).equal


def test_a_delay_and_a_missing_tail_are_told_from_different_values():
    late = streaming(lambda x: x, lambda x: torch.cat([torch.zeros(2, 3), x[:, :-3]], 1), noise(2, 50))
    assert (late.equal, late.delay) == (False, 3)
    assert "3 output steps late" in late.findings[0].message
    short = streaming(lambda x: x, lambda x: x[:, :45], noise(2, 50))
    assert (short.equal, short.first_difference, short.stream_steps) == (False, 45, 45)
    assert "Flush" in short.findings[0].advice


def test_equal_nans_do_not_differ_and_a_single_one_does():
    x = noise(2, 20)
    x[0, 5] = float("nan")
    assert streaming(lambda x: x, lambda x: x, x).equal
    assert streaming(lambda x: x.nan_to_num(), lambda x: x, x).first_difference == 5


def test_nans_and_infs_hide_no_other_difference():
    x = noise(2, 20)
    assert streaming(lambda x: x * float("nan"), lambda x: x, x).first_difference == 0
    x[0, 15] = float("inf")
    assert streaming(lambda x: x, lambda x: torch.where(torch.arange(20) == 7, 2 * x, x), x).first_difference == 7


def test_masks_are_compared():
    assert streaming(lambda x: x > 0, lambda x: x > 0, noise(2, 20)).equal
    assert streaming(lambda x: x > 0, lambda x: x < 0, noise(2, 20)).first_difference == 0


def test_bad_input_is_refused():
    x = noise(2, 20)
    with pytest.raises(ValueError, match="returned no tensor"):
        streaming(lambda x: x, lambda x: [], x)
    with pytest.raises(ValueError, match="only axis"):
        streaming(lambda x: x, lambda x: x[:1], x)
    with pytest.raises(ValueError, match="chunk"):
        streaming(lambda x: x, lambda x: x, x, chunk=0)
    with pytest.raises(ValueError, match="must return a tensor"):
        streaming(lambda x: (x,), lambda x: x, x)
    with pytest.raises(ValueError, match="without states"):
        streaming(lambda x: x, lambda x: (x, x[:1]), x)
    with pytest.raises(ValueError, match="no axis 5"):
        streaming(lambda x: x, lambda x: x, x, time_axis=5)
    with pytest.raises(ValueError, match="must be a tensor, got list"):
        streaming(lambda x: x, lambda x: x, [1.0])
