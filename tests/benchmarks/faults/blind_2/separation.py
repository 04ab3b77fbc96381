"""What goes wrong when speakers are separated: offsets, groups, gains, silence, assignments."""

from __future__ import annotations

import torch
from torch import nn

from faults import separation
from faults._fault import DIVERGES, NONFINITE, STUCK, fault
from faults._training import Batch, Tensors, Training, seeded
from faults.separation import shown, si_sdr

COLLAPSED = ("stalled-assignment", "output-collapse", "assignment-ambiguous", "stalled-from-start")


@fault(separation, "batch-order", "loss-plateau", "stalled-optimisation", "stalled-from-start", then=(*COLLAPSED, *STUCK, "output-silent", "references-alike"))  # fmt: skip
def offset_drawn_twice(t: Training) -> None:
    """Long files are cut at random, and the offset is drawn once for the mixture and once more for its references. Speech: a
    data set's class of one's own; Humbatova: wrong labels."""
    plain, t.steps = t.sample, 400

    def sample(step: int, phase: str) -> Batch:
        mixture, references = plain(step, phase)
        offsets = torch.randint(60, 450, (len(mixture),), generator=seeded(81, step)).tolist()
        moved = torch.stack([pair.roll(offset, -1) for pair, offset in zip(references, offsets, strict=True)])
        return mixture, moved

    t.sample = sample


@fault(separation, "parameter-unchanged", "optimizer-misses-parameters", "update-ratio-low", modules=("encoder", "decoder"), then=(*STUCK, *COLLAPSED))  # fmt: skip
def filters_with_a_rate_of_zero(t: Training) -> None:
    """Encoder and decoder are a group of their own whose rate is 0.0, from the configuration of a fine-tuning; here they
    start at random. Humbatova: learning rate; SageMaker UnchangedTensor."""
    filters = [*t.model.encoder.parameters(), *t.model.decoder.parameters()]
    rest = [*t.model.layers.parameters(), *t.model.mask.parameters()]
    t.optimize = lambda p: torch.optim.Adam([{"params": rest}, {"params": filters, "lr": 0.0}], 2e-3)
    t.steps = 400


@fault(separation, "input-range", "input-drift", "activation-exploding", "gradient-exploding", "norm-input-variance", then=(*DIVERGES, "activation-vanishing", "loss-at-80-db", "gradient-clipping", "dtype-headroom", *STUCK, *COLLAPSED, "gradient-imbalance", "output-silent", "activation-saturated", "gradient-vanishing", "feature-constant", "precision-headroom", "input-constant"))  # fmt: skip
def decibels_without_twenty(t: Training) -> None:
    """A random gain of -6 to 6 dB for training, made by `10 ** gain`: levels from a millionth to a million. Speech:
    augmentation; Humbatova: wrong preprocessing."""
    plain, t.steps = t.sample, 400

    def sample(step: int, phase: str) -> Batch:
        mixture, references = plain(step, phase)
        if phase != "train":
            return mixture, references
        gain = 10 ** (12 * torch.rand(len(mixture), 1, generator=seeded(82, step)) - 6)
        return mixture * gain, references * gain[..., None]

    t.sample = sample


def without_epsilon(estimates: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """SI-SDR in dB."""
    scale = (estimates * references).sum(-1, keepdim=True) / references.square().sum(-1, keepdim=True)
    target = scale * references
    return 10 * torch.log10(target.square().sum(-1) / (target - estimates).square().sum(-1))


@fault(separation, "nonfinite-loss", "nonfinite-gradient", "loss-diverged", modules=("",), step=110, then=(*NONFINITE, "loss-at-80-db", "output-silent", "references-alike", "output-collapse", "input-constant"))  # fmt: skip
def ratio_of_silence(t: Training) -> None:
    """SI-SDR without an epsilon: from step 110 on one speaker of one item says nothing in the segment, and 0 / 0 is NaN. GRIST:
    division by zero; speech: asteroid#704."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        mixture, references = plain(step, phase)
        if phase == "train" and step >= 110:
            references[3, 1] = 0.0
            mixture[3] = references[3, 0]
        return mixture, references

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        estimates = model(batch[0])
        both = [without_epsilon(estimates, references).mean(1) for references in (batch[1], batch[1].flip(1))]
        return shown(-torch.maximum(*both).mean(), estimates, batch)

    t.sample, t.forward = sample, forward


@fault(separation, *COLLAPSED, "loss-plateau", "stalled-optimisation", then=STUCK)
def worst_assignment(t: Training) -> None:
    """The smaller SI-SDR of both assignments is taken, since the smaller loss was meant: whichever output gets better at one
    speaker is punished. Speech: asteroid#708, the PIT of a home-made loss; Humbatova: wrong loss."""
    t.steps = 400

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        estimates = model(batch[0])
        both = [si_sdr(estimates, references).mean(1) for references in (batch[1], batch[1].flip(1))]
        return shown(-torch.minimum(*both).mean(), estimates, batch)

    t.forward = forward
