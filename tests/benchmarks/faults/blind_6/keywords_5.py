"""What goes wrong in keyword spotting: front ends, silence, lists of words, cycles of the rate, modes, who is trained."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from faults import keywords
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Tensors, Training, seeded


def front_end(t: Training, change) -> None:
    """What the model is given becomes `change(energies, step, phase)`."""
    data = {phase: keywords.spoken(n, seeded(3, n)) for phase, n in (("train", 1200), ("val", 240))}

    def sample(step: int, phase: str) -> Batch:
        energies, words = data[phase]
        chosen = torch.randint(len(words), (keywords.BATCH,), generator=seeded(4, step, len(phase)))
        return change(energies[chosen], step, phase), words[chosen]

    t.sample = sample


LAYERS = ("stem", "blocks", "pool", "dropout", "head")

# -- front ends ------------------------------------------------------------------------------------------------------


@fault(keywords, "input-range", "audio-scale", modules=("", "stem"), then=("activation-exploding", "gradient-imbalance", "dtype-headroom", *STUCK, *DIVERGES, "dead-units"))  # fmt: skip
def power_of_integer_samples(t: Training) -> None:
    """The logarithm is left out, and energies are those of 16-bit samples: some 1e9. UMLAUT: input not normalised; speech: front
    ends of one's own."""
    front_end(t, lambda energies, step, phase: energies * 32768.0**2)


@fault(keywords, "input-nonfinite", "nonfinite-input", "nonfinite-activation", "audio-nonfinite", modules=("", "stem"), step=96, then=(*NONFINITE, "nonfinite-buffer", "metric-constant", "prediction-collapse", "output-constant"))  # fmt: skip
def muted_clip_without_floor(t: Training) -> None:
    """`log(energies)` without a floor: at step 96 a clip comes whose last frames the recorder has muted, -inf. GRIST: log of
    zero; speech: log-mel of digital silence."""

    def change(energies, step, phase):
        if phase == "train" and step == 96:
            energies[5, ..., -6:] = 0.0
        return (energies.log() + 1.4) / 1.2

    front_end(t, change)


@fault(keywords, "input-nonfinite", "nonfinite-input", "nonfinite-activation", "audio-nonfinite", modules=("", "stem"), then=(*NONFINITE, "nonfinite-buffer", "metric-constant", "prediction-collapse", "output-constant"))  # fmt: skip
def energies_kept_in_half(t: Training) -> None:
    """Energies of samples in [-1, 1] are cached as float16 to save disk, and the smallest become zero before the logarithm.
    GRIST: log of an underflow; TrainCheck: dtype."""
    front_end(t, lambda energies, step, phase: ((energies * 1e-6).half().float().log() + 15.2) / 1.2)


@fault(keywords, "input-drift", "input-range", step=39, then=("overfit", "overtraining", "metric-constant", "prediction-collapse", "loss-diverged"))  # fmt: skip
def decibels_in_validation(t: Training) -> None:
    """The script for validation takes 20 log10 and leaves the standardisation out, that for training the natural logarithm. Speech:
    two front ends; Humbatova: wrong preprocessing."""
    front_end(t, lambda x, step, phase: keywords.log_mel(x) if phase == "train" else 20 * (x + 1e-3).log10())


@fault(
    keywords,
    "audio-channels",
    "input-drift",
    step=39,
    then=("overfit", "overtraining", "metric-constant", "loss-diverged"),
)
def axes_swapped_in_validation(t: Training) -> None:
    """The reader of the validation set returns (frames, mels), and a network that ends in a mean takes any shape. Humbatova: wrong
    axis; speech: order of axes."""

    def change(energies, step, phase):
        return keywords.log_mel(energies).transpose(2, 3) if phase == "val" else keywords.log_mel(energies)

    front_end(t, change)


@fault(keywords, "input-constant", "input-duplicate", "audio-silent", "input-drift", then=("audio-duplicate", "feature-constant", "overfit", "overtraining", *STUCK, *FLAT))  # fmt: skip
def shifted_by_samples(t: Training) -> None:
    """The clip is moved in time by up to 1600 samples, and the number is applied to frames: it is mostly moved out. Speech:
    augmentation of one's own; TheDeepChecker: constant inputs."""

    def change(energies, step, phase):
        if phase == "val":
            return keywords.log_mel(energies)
        shifts = torch.randint(-1600, 1601, (len(energies),), generator=seeded(5, step))
        moved = torch.full_like(energies, 1e-6)
        for i, shift in enumerate(shifts.tolist()):
            if abs(shift) < keywords.FRAMES:
                moved[i] = energies[i].roll(shift, -1)
        return keywords.log_mel(moved)

    front_end(t, change)


@fault(keywords, "input-constant", "input-duplicate", "feature-constant", "output-constant", modules=("", *LAYERS), then=(*STUCK, *FLAT, "input-range", "audio-silent", "audio-duplicate", "dead-units", "class-imbalance", "update-ratio-low", "gradient-zero", "overtraining"))  # fmt: skip
def floor_above_the_speech(t: Training) -> None:
    """`clamp(min=80)` where the floor is 80 dB below: every bin of every clip is the floor. Humbatova: wrong preprocessing;
    TheDeepChecker: constant inputs."""
    front_end(t, lambda energies, step, phase: (10 * (energies + 1e-8).log10()).clamp(min=80.0) / 80.0)


# -- words -----------------------------------------------------------------------------------------------------------


@fault(keywords, "class-imbalance", then=("metric-constant", "loss-plateau", "overtraining", "stalled-optimisation", "prediction-collapse"))  # fmt: skip
def background_in_nearly_all(t: Training) -> None:
    """Clips are cut out of long recordings: 98 of 100 hold the last class, background, and the loss counts each the same. SageMaker
    ClassImbalance; Humbatova: unbalanced data."""
    data = {phase: keywords.spoken(n, seeded(3, n)) for phase, n in (("train", 3000), ("val", 600))}
    for energies, words in data.values():
        hushed = torch.arange(len(words)) % 50 > 0
        energies[hushed] = 0.3 * torch.rand(energies[hushed].shape, generator=seeded(6)).clamp(min=1e-6).log().neg()
        words[hushed] = keywords.WORDS - 1

    def sample(step: int, phase: str) -> Batch:
        chosen = torch.randint(len(data[phase][1]), (keywords.BATCH,), generator=seeded(4, step, len(phase)))
        return keywords.log_mel(data[phase][0][chosen]), data[phase][1][chosen]

    t.sample = sample


@fault(keywords, "loss-plateau", "stalled-optimisation", "prediction-collapse", step=60, then=(*STUCK, "overfit", "overtraining", "gradient-vanishing"))  # fmt: skip
def words_of_the_next_clip(t: Training) -> None:
    """Clips are shuffled after the list of their words was read: sounds and words do not belong together. Humbatova: wrong
    labels; speech: data preparation."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, words = plain(step, phase)
        return x, words[torch.randperm(len(words), generator=seeded(8, step, len(phase)))]

    t.sample = sample


@fault(keywords, "metric-constant", step=39, then=("metric-phase-mismatch",))
def whole_rows_compared(t: Training) -> None:
    """The accuracy compares the softmax with one-hot rows by `==` and `all`: no item is ever right. UMLAUT: accuracy; Humbatova:
    wrong validation metric."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        wanted = F.one_hot(batch[1], keywords.WORDS)
        return {"accuracy": float((tensors["logits"].softmax(1) == wanted).all(1).float().mean())}

    t.measure = measure


@fault(keywords, "metric-range", step=39)
def correct_ones_by_batches(t: Training) -> None:
    """The number of right answers is divided by the number of batches, not of clips. Humbatova: wrong validation metric."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        return {"accuracy": float((tensors["logits"].argmax(1) == batch[1]).sum())}

    t.measure = measure


# -- network ---------------------------------------------------------------------------------------------------------


class Averaged(nn.Module):
    """A mean over axis 0, which is time in a framework that puts items second."""

    def forward(self, x):
        return F.adaptive_avg_pool2d(x, (keywords.BANDS, 1)).mean(0, keepdim=True).expand(len(x), -1, -1, -1)


@fault(keywords, "feature-constant", "batch-leak", "prediction-collapse", "output-constant", modules=("pool", "dropout", "head", ""), then=(*STUCK, *FLAT, "gradient-zero", "class-imbalance", "metric-constant"))  # fmt: skip
def mean_of_the_wrong_axis(t: Training) -> None:
    """The mean over time is taken over axis 0, the items: each one gets the same vector. Humbatova: wrong axis."""
    t.model.pool = Averaged()


class Deviation(nn.Module):
    """Mean and deviation over time, as in networks that tell speakers."""

    def forward(self, x):
        mean = x.mean(-1, keepdim=True)
        deviation = (x - mean).square().mean(-1, keepdim=True).sqrt()
        return F.adaptive_avg_pool2d(mean + deviation, (keywords.BANDS, 1))


@fault(keywords, "nonfinite-gradient", "nonfinite-parameter", modules=("", "pool", "blocks", "stem"), then=(*NONFINITE, "nonfinite-buffer", "metric-constant", "prediction-collapse", "output-constant"))  # fmt: skip
def deviation_of_channels_left_out(t: Training) -> None:
    """Statistics pooling without an epsilon, behind a dropout of whole channels: those have the deviation 0, where the slope of the
    root is infinite. GRIST: root of zero; speech: statistics pooling."""
    t.model.pool = nn.Sequential(nn.Dropout2d(0.1), Deviation())


class Compressed(keywords.Spotter):
    """Energies to a power that is learnt, for each band, in front of the stem."""

    def __init__(self) -> None:
        super().__init__()
        self.power = nn.Parameter(torch.full((keywords.MELS, 1), 0.3))

    def forward(self, energies):
        return super().forward((self.power * energies.log()).exp())


@fault(keywords, "nonfinite-gradient", "nonfinite-parameter", modules=("",), step=100, then=(*NONFINITE, "nonfinite-buffer", "metric-constant", "prediction-collapse", "output-constant"))  # fmt: skip
def learnt_power_of_nothing(t: Training) -> None:
    """A learnt compression, `exp(power * log(energy))`: at step 100 a clip has bins of exactly zero, whose output is 0, and whose
    gradient is 0 * inf. GRIST: log of zero; speech: PCEN of one's own."""
    t.model = Compressed()

    def change(energies, step, phase):
        if phase == "train" and step == 100:
            energies[2, ..., :4] = 0.0
        return energies

    front_end(t, change)
