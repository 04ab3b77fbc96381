import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stethoscope import audits

RATE = 16000


def codes(report):
    return [finding.code for finding in report.findings]


def alarms(report):
    return [finding.code for finding in report.findings if finding.severity != "info"]


def speech(items=1, seconds=1.0, rate=RATE, seed=0, level=0.05):
    """Coloured noise in syllables over a floor: spectrum falling by 6 dB per octave, peaks 20 dB above the rms."""
    generator = torch.Generator().manual_seed(seed)
    number = int(seconds * rate)
    spectrum = torch.fft.rfft(torch.randn(items, number, generator=generator))
    hertz = torch.linspace(0, rate / 2, spectrum.shape[-1])
    x = torch.fft.irfft(spectrum * (hertz > 60) / (1 + hertz / 500), number)
    envelope = torch.sin(torch.arange(number) / rate * 2 * math.pi * 3 + torch.rand(items, 1, generator=generator) * 6)
    x = x * (0.05 + envelope.clamp(min=0) ** 2)
    return level * x / x.square().mean(-1, keepdim=True).sqrt()


def tone(frequency, amplitude=0.5, seconds=1.0, rate=RATE):
    return (
        amplitude
        * torch.sin(2 * math.pi * frequency / rate * torch.arange(int(seconds * rate), dtype=torch.float64)).float()
    )


def sixteen_bit(x):
    return (x * 32767).round() / 32768


def upsampled(x, factor):
    """Ideal interpolation, as a good resampler does it."""
    spectrum = torch.fft.rfft(x)
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] * factor // 2 + 1, dtype=spectrum.dtype)
    wide[..., : spectrum.shape[-1]] = spectrum
    return factor * torch.fft.irfft(wide, x.shape[-1] * factor)


HEALTHY = {
    "speech": lambda: speech(4),
    "16 bit": lambda: sixteen_bit(speech(4)),
    "quiet, 16 bit": lambda: sixteen_bit(speech(4, level=0.001)),
    "loud, not clipped": lambda: speech(4) / speech(4).abs().max() * 0.999,
    "unit variance": lambda: speech(4, level=1.0),
    "white noise": lambda: 0.1 * torch.randn(4, RATE, generator=torch.Generator().manual_seed(1)),
    "uniform noise": lambda: torch.rand(4, RATE, generator=torch.Generator().manual_seed(1)) * 2 - 1,
    "low tone, 16 bit": lambda: sixteen_bit(tone(50)),
    "low tone, 16 bit, quiet": lambda: sixteen_bit(tone(55, amplitude=0.01)),
    "tone that divides the rate": lambda: tone(1000),
    "tone at full scale": lambda: tone(997, amplitude=1.0),
    "high tone": lambda: tone(3000),
    "chord": lambda: tone(440, 0.2) + tone(554, 0.2) + tone(659, 0.2),
    "padded with zeros": lambda: torch.nn.functional.pad(speech(4), (0, RATE)),
    "one item": lambda: speech(1)[0],
    "double precision": lambda: speech(3).double(),
    "half precision": lambda: speech(3).half(),
    "numpy": lambda: speech(3).numpy(),
    "two speakers in a batch": lambda: speech(2),
    "short": lambda: speech(4, seconds=0.05),
    "list of lengths": lambda: [speech(1)[0], speech(1, seconds=0.5, seed=2)[0]],
    "full-band resampled": lambda: upsampled(speech(4, rate=8000), 2) + 1e-3 * torch.randn(4, RATE),
    "with channel axis": lambda: speech(4).unsqueeze(1),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_audio_gives_no_alarm(name):
    report = audits.audio(HEALTHY[name](), sample_rate=RATE)
    assert alarms(report) == [], str(report)


def test_healthy_stereo_and_higher_rates_give_no_alarm():
    stereo = speech(6).view(3, 2, -1)
    assert audits.audio(stereo, sample_rate=RATE, channels=2).findings == ()
    assert audits.audio(stereo[0], sample_rate=RATE, channels=2).findings == ()
    for rate in (8000, 22050, 44100, 48000):
        assert alarms(audits.audio(speech(2, rate=rate), sample_rate=rate)) == []


def test_levels_are_in_db_re_full_scale():
    items = audits.audio(torch.stack([tone(997, 1.0), tone(997, 0.1)]), sample_rate=RATE).items
    assert items[0].level_db == pytest.approx(-3.01, abs=0.01)
    assert items[1].level_db == pytest.approx(-23.01, abs=0.01)
    assert items[0].peak == pytest.approx(1.0, abs=1e-3)
    assert items[0].seconds == 1.0


@pytest.mark.parametrize("gain", [1.0, 0.3, 0.0123])
@pytest.mark.parametrize("source", ["speech", "noise", "low tone", "dividing tone"])
@pytest.mark.parametrize("bits", [False, True])
def test_clipping_is_found_also_after_rescaling(gain, source, bits):
    x = {
        "speech": speech(3, level=0.4),
        "noise": 0.35 * torch.randn(3, RATE, generator=torch.Generator().manual_seed(1)),
        "low tone": tone(200, 1.5).repeat(3, 1),
        "dividing tone": tone(1000, 1.5).repeat(3, 1),
    }[source]
    x[0] *= 0.1  # not clipped
    clipped = x.clamp(-1, 1)
    share = float((clipped[1].abs() == 1).float().mean())
    clipped = sixteen_bit(clipped) if bits else clipped
    report = audits.audio(clipped * gain, sample_rate=RATE)
    assert "audio-clipping" in codes(report)
    (finding,) = (finding for finding in report.findings if finding.code == "audio-clipping")
    assert finding.evidence["items"] == ["1", "2"]
    assert report.items[1].clipped == pytest.approx(share, rel=0.5)


@pytest.mark.parametrize("rate", [16000, 44100, 48000])
@pytest.mark.parametrize("frequency", [1000, 1500, 3000])
def test_a_test_tone_in_single_precision_is_neither_clipped_nor_upsampled(frequency, rate):
    x = torch.sin(2 * torch.pi * frequency * torch.arange(2 * rate) / rate)  # phase errors make its samples differ
    assert codes(audits.audio(x, sample_rate=rate)) == []


def test_nan_and_inf_name_the_item():
    x = speech(4)
    x[2, 100] = float("nan")
    x[3] = float("inf")
    report = audits.audio(x, sample_rate=RATE)
    assert codes(report) == ["audio-nonfinite"]
    assert report.findings[0].evidence["items"] == ["2", "3"]
    assert [item.nonfinite for item in report.items] == [0, 0, 1, RATE]


def test_a_silent_output_divided_by_its_maximum_is_explained():
    x = speech(2)
    x[1] = 0
    report = audits.audio(x / x.abs().amax(-1, keepdim=True), sample_rate=RATE, saving=True)
    assert codes(report) == ["audio-nonfinite"]
    assert "maximum" in report.findings[0].advice


def test_peaks_above_full_scale_matter_when_saving():
    x = speech(2, level=0.5)
    assert [f.severity for f in audits.audio(x, sample_rate=RATE).findings] == ["info"]
    report = audits.audio(x, sample_rate=RATE, saving=True)
    assert [(f.code, f.severity) for f in report.findings] == [("audio-peak", "warning")]


@pytest.mark.parametrize("kind", [torch.int16, torch.int32, torch.uint8, torch.float32])
def test_an_integer_scale_is_found_and_does_not_hide_the_rest(kind):
    x = speech(3)
    x[1] = 0
    full = {torch.int16: 32767, torch.int32: 2**31 - 200, torch.uint8: 127, torch.float32: 32767}[kind]
    scaled = (x * full).round() + (128 if kind == torch.uint8 else 0)
    report = audits.audio(scaled.to(kind), sample_rate=RATE)
    assert codes(report) == ["audio-scale", "audio-silent"]
    assert report.items[0].level_db == pytest.approx(20 * math.log10(0.05), abs=0.5)


def test_silence_and_dead_channels_are_found():
    x = speech(3)
    x[1] *= 1e-5
    report = audits.audio(x, sample_rate=RATE)
    assert codes(report) == ["audio-silent"]
    assert report.findings[0].evidence["items"] == ["1"]
    stereo = speech(4).view(2, 2, -1)
    stereo[1, 0] = 0
    assert codes(audits.audio(stereo, sample_rate=RATE, channels=2)) == ["audio-silent"]


def test_dc_is_found():
    x = speech(3)
    x[2] += 0.02
    report = audits.audio(x, sample_rate=RATE)
    assert codes(report) == ["audio-dc"]
    assert report.items[2].dc == pytest.approx(0.02, abs=1e-3)


@pytest.mark.parametrize("correlation", ["identical", "mostly", "delayed"])
def test_stereo_taken_as_a_batch_of_two_is_found(correlation):
    x = speech(2)
    x[1] = {"identical": x[0], "mostly": x[0] + 0.5 * x[1], "delayed": 0.7 * x[0].roll(10)}[correlation]
    report = audits.audio(x, sample_rate=RATE)
    assert codes(report) == ["audio-channels"]
    assert "batch of two" in report.findings[0].message


@pytest.mark.parametrize(("shape", "channels"), [((RATE, 2), 1), ((RATE, 2), 2), ((3, RATE, 2), 1), ((3, RATE, 2), 2)])
def test_time_before_channels_is_found(shape, channels):
    x = speech(6)[: math.prod(shape) // RATE].reshape(*shape[:-2], 2, RATE).transpose(-1, -2)
    report = audits.audio(x, sample_rate=RATE, channels=channels)
    assert codes(report) == ["audio-channels"]
    assert report.findings[0].severity == "error"
    assert "(time, channels)" in report.findings[0].message
    assert report.items[0].seconds == 1.0


def test_a_wrong_number_of_channels_is_an_error():
    for x, channels in ((speech(6).view(3, 2, -1), 1), (speech(3), 2), (speech(6).view(2, 3, -1), 2)):
        assert "audio-channels" in codes(audits.audio(x, sample_rate=RATE, channels=channels))


@pytest.mark.parametrize(("low", "factor"), [(8000, 2), (8000, 6), (16000, 3), (22050, 2)])
def test_upsampled_audio_is_found_by_its_spectrum(low, factor):
    x = sixteen_bit(upsampled(speech(4, rate=low), factor))
    report = audits.audio(x, sample_rate=low * factor)
    assert codes(report) == ["audio-rate"]
    assert report.findings[0].evidence["upsampled_from"] == [low]
    assert all(item.bandwidth_hz == pytest.approx(low / 2, rel=0.05) for item in report.items)


def test_one_band_limited_recording_among_many_is_no_finding():
    x = speech(4)
    x[0] = upsampled(speech(1, rate=8000), 2)[0]
    assert audits.audio(x, sample_rate=RATE).findings == ()


def test_the_rate_of_the_model_can_be_stated():
    report = audits.audio(speech(2), sample_rate=RATE, model_rate=8000)
    assert codes(report) == ["audio-rate"]
    assert "8000" in report.findings[0].message
    assert audits.audio(speech(2), sample_rate=RATE, model_rate=RATE).ok


def test_duplicated_items_are_found():
    x = speech(4)
    x[3] = x[1]
    report = audits.audio(x, sample_rate=RATE)
    assert codes(report) == ["audio-duplicate"]
    assert report.findings[0].evidence["items"] == ["3"]


def test_references_must_add_up_to_the_mixture():
    sources = speech(6).view(3, 2, -1)
    mixture = sources.sum(1)
    assert audits.audio(sixteen_bit(mixture), sample_rate=RATE, references=sources).ok
    report = audits.audio(mixture * 0.5, sample_rate=RATE, references=sources)
    assert codes(report) == ["audio-mixture"]
    assert "times 0.5" in report.findings[0].message
    shifted = audits.audio(mixture.roll(3, -1), sample_rate=RATE, references=sources)
    assert codes(shifted) == ["audio-mixture"]
    with pytest.raises(ValueError, match=r"\(batch, sources, time\)"):
        audits.audio(mixture, sample_rate=RATE, references=sources[:2])


def test_lengths_out_of_range_are_found():
    assert alarms(audits.audio(torch.randn(4, 100), sample_rate=RATE)) == ["audio-length"]
    report = audits.audio([speech(1)[0], speech(1, seconds=0.01)[0]], sample_rate=RATE, max_seconds=0.5)
    assert codes(report) == ["audio-length", "audio-length"]


# ------------------------------------------------------------------------------------------------------------ files


def test_files_are_compared_with_the_model(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    path = tmp_path / "speech.wav"
    soundfile.write(path, speech(1, rate=16000)[0].numpy(), 16000)
    assert audits.audio(path, sample_rate=16000).findings == ()
    report = audits.audio(str(path), sample_rate=8000)
    assert codes(report) == ["audio-rate"]
    assert "16000 Hz by their header" in report.findings[0].message
    stereo = tmp_path / "stereo.flac"
    soundfile.write(stereo, speech(2).numpy().T, 16000)
    assert codes(audits.audio([path, stereo], sample_rate=16000)) == ["audio-channels"]
    assert audits.audio([stereo], sample_rate=16000, channels=2).ok


def test_broken_files_are_named(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    good, bad, empty = (tmp_path / name for name in ("good.wav", "bad.wav", "empty.wav"))
    soundfile.write(good, speech(1)[0].numpy(), RATE)
    bad.write_bytes(b"no audio at all")
    report = audits.audio([good, bad], sample_rate=RATE)
    assert codes(report) == ["audio-unreadable"]
    assert "bad.wav" in str(report)
    assert audits.audio(bad, sample_rate=RATE).items == ()
    good.write_bytes(good.read_bytes()[:1000])  # truncated: what is there is read
    audits.audio(good, sample_rate=RATE)
    soundfile.write(empty, np.zeros(0), RATE)
    report = audits.audio([good, empty], sample_rate=RATE)
    assert codes(report) == ["audio-unreadable"]
    assert "empty.wav" in report.findings[0].message
    assert len(report.items) == 1


def test_many_files_with_other_channels_are_one_finding(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    paths = [tmp_path / f"{index}.wav" for index in range(3)]
    for path in paths:
        soundfile.write(path, speech(2).numpy().T, RATE)
    report = audits.audio(paths, sample_rate=RATE)
    (finding,) = (finding for finding in report.findings if finding.code == "audio-channels")
    assert finding.message == "'0.wav' (one of 3 files that do not fit) has 2 channel(s), the model takes 1."
    with pytest.raises(FileNotFoundError, match=r"absent\.wav"):
        audits.audio(tmp_path / "absent.wav", sample_rate=RATE)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("batch", [torch.zeros(0, 100), torch.zeros(2, 0), [], torch.zeros(0)])
def test_an_empty_batch_is_refused_in_words(batch):
    with pytest.raises(ValueError, match="empty"):
        audits.audio(batch, sample_rate=RATE)


def test_what_is_no_audio_says_what_is_legal():
    with pytest.raises(ValueError, match=r"\(batch, channels, time\)"):
        audits.audio(torch.zeros(2, 3, 4, 5), sample_rate=RATE)
    with pytest.raises(TypeError, match="complex"):
        audits.audio(torch.zeros(2, 100, dtype=torch.complex64), sample_rate=RATE)
    with pytest.raises(TypeError, match="not dict"):
        audits.audio({}, sample_rate=RATE)
    with pytest.raises(ValueError, match="in Hz"):
        audits.audio(torch.zeros(2, 100), sample_rate=0)
    with pytest.raises(ValueError, match="meta"):
        audits.audio(torch.zeros(2, 100, device="meta"), sample_rate=RATE)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40),
    st.integers(1, 3),
    st.integers(1, 3000),
    st.sampled_from([8000, 16000, 44100]),
)
def test_any_waveform_gets_a_verdict(values, items, repeat, rate):
    x = torch.tensor(values).repeat(items, repeat)[:, :20000]
    report = audits.audio(x, sample_rate=rate)
    assert len(report.items) in (items, x.shape[0])
    for item in report.items:
        assert 0 <= item.clipped <= 1
        assert 0 <= item.nonfinite <= x.shape[1]


def test_integer_references_are_scaled_like_their_mixture():
    references = (8000 * torch.randn(2, 2, RATE).clamp(-1, 1)).short()
    report = audits.audio(references.sum(1).short(), sample_rate=RATE, references=references)
    assert "audio-mixture" not in codes(report)


def test_references_with_nan_are_found():
    references = torch.stack([speech(2), speech(2)], 1)
    mixture = references.sum(1)
    references[1, 0, 5] = float("nan")
    report = audits.audio(mixture, sample_rate=RATE, references=references)
    assert codes(report) == ["audio-nonfinite"]
    assert "references" in report.findings[0].message


def test_of_a_mixed_list_only_the_integers_are_accused():
    report = audits.audio([speech(1)[0], (speech(1)[0] * 32768).short()], sample_rate=RATE, saving=True)
    (finding,) = (finding for finding in report.findings if finding.code == "audio-scale")
    assert finding.evidence["items"] == ["1"]


def test_arrays_may_be_reversed_read_only_or_of_another_byte_order():
    x = speech(2).numpy()
    x.setflags(write=False)
    plain = audits.audio(x, sample_rate=RATE).items
    assert audits.audio(x[:, ::-1], sample_rate=RATE).items[0].peak == plain[0].peak
    assert audits.audio(x.astype(">f4"), sample_rate=RATE).items == plain
