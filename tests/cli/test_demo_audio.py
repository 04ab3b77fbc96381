import torch

from stethoscope.cli._demo_audio import SAMPLE_RATE, Talkers


def talkers(seed):
    return Talkers.record(3, 1.5, torch.Generator().manual_seed(seed))


def test_a_seed_gives_the_same_audio_again():
    assert torch.equal(talkers(1).low, talkers(1).low)
    assert not torch.equal(talkers(1).low, talkers(2).low)


def test_voices_are_as_loud_as_said_and_never_exactly_silent():
    voices = talkers(0).high
    assert voices.shape == (3, 1.5 * SAMPLE_RATE)
    torch.testing.assert_close(voices.square().mean(-1).sqrt(), torch.ones(3), rtol=1e-3, atol=0)
    frames = voices.unfold(-1, 80, 80)
    assert frames.abs().amax(-1).min() > 0


def test_a_low_voice_is_lower_than_a_high_one():
    def pitch_hz(voice):  # the highest peak of the autocorrelation between 70 and 300 Hz
        spectrum = torch.fft.rfft(voice, 2 * voice.shape[-1]).abs().square()
        lags = torch.fft.irfft(spectrum)[:, SAMPLE_RATE // 300 : SAMPLE_RATE // 70]
        return SAMPLE_RATE / (lags.argmax(-1) + SAMPLE_RATE // 300)

    assert pitch_hz(talkers(0).low).max() < 165 < pitch_hz(talkers(0).high).min()


def test_a_mixture_is_the_sum_of_its_talkers_in_either_order():
    generator = torch.Generator().manual_seed(0)
    recorded = talkers(0)
    mixture, sources = recorded.mix(16, 0.5, generator)
    assert sources.shape == (16, 2, SAMPLE_RATE // 2)
    torch.testing.assert_close(mixture, sources.sum(1))
    again = recorded.mix(16, 0.5, generator)
    assert not torch.equal(mixture, again.mixture)
