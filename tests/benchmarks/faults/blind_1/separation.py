"""More of what goes wrong when speakers are separated: files, axes, masks, silence, rates."""

from __future__ import annotations

import torch
from torch import nn

from faults import separation
from faults._fault import STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update
from faults.separation import CHANNELS, pit, shown

COLLAPSED = ("stalled-assignment", "output-collapse", "assignment-ambiguous", "stalled-from-start")


@fault(separation, "batch-order", "loss-plateau", "stalled-optimisation", then=(*COLLAPSED, *STUCK, "output-silent", "overfit", "overtraining"))  # fmt: skip
def mixtures_of_others(t: Training) -> None:
    """Mixtures are listed in another order than the references: each belongs to another item. Humbatova: wrong labels;
    speech: data preparation of several lists."""
    plain, t.steps = t.sample, 400

    def sample(step: int, phase: str) -> Batch:
        mixture, references = plain(step, phase)
        return mixture.roll(1, 0), references

    t.sample = sample


@fault(separation, "references-alike", "batch-order", then=(*COLLAPSED, *STUCK))
def first_speaker_twice(t: Training) -> None:
    """Both references are read from the folder of the first speaker. Humbatova: wrong data; speech: a copied line in the
    data set's class."""
    plain, t.steps = t.sample, 400

    def sample(step: int, phase: str) -> Batch:
        mixture, references = plain(step, phase)
        return mixture, references[:, :1].repeat(1, 2, 1)

    t.sample = sample


class Folded(separation.Separator):
    """Sources and items change places in a `view`."""

    def forward(self, mixture):
        estimates = super().forward(mixture)
        return estimates.reshape(2, len(mixture), -1).transpose(0, 1)


@fault(separation, "loss-plateau", "stalled-optimisation", "assignment-ambiguous", "batch-leak", step=20, then=STUCK)  # fmt: skip
def sources_folded_into_items(t: Training) -> None:
    """`view(sources, batch, time)` of a tensor that is (batch, sources, time): most estimates are of another item.
    Humbatova: wrong tensor shape; TrainCheck."""
    t.model, t.steps = Folded(), 400


@fault(separation, "separation-layout", then=(*COLLAPSED, *STUCK, "output-silent"))
def time_before_sources(t: Training) -> None:
    """References are (batch, time, sources), as audio files are read, and the estimates were turned to fit: the loss is a
    ratio over pairs of samples. Humbatova: wrong tensor shape; speech: `always_2d` of a reader."""
    plain, t.steps = t.sample, 400

    def sample(step: int, phase: str) -> Batch:
        mixture, references = plain(step, phase)
        return mixture, references.transpose(1, 2)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        estimates = model(batch[0]).transpose(1, 2)
        return shown(pit(estimates, batch[1]), estimates, batch)

    t.sample, t.forward = sample, forward


@fault(separation, "input-constant", "loss-at-80-db", "input-duplicate", step=120, then=("loss-diverged", "loss-spike", "norm-input-variance", "activation-vanishing", "output-silent", "output-collapse", "references-alike", "assignment-ambiguous", "batch-order", "input-drift", "gradient-exploding", "gradient-clipping", "gradient-zero", "gradient-vanishing", "feature-constant", *STUCK))  # fmt: skip
def segments_of_silence(t: Training) -> None:
    """From step 120 on the list of segments is in samples of another rate: four of six lie behind the end of their file
    and are padded with zeros. TheDeepChecker: constant inputs; speech: asteroid#704."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        mixture, references = plain(step, phase)
        if phase == "train" and step >= 120:
            mixture[:4], references[:4] = 0.0, 0.0
        return mixture, references

    t.sample = sample


@fault(separation, "update-ratio-low", "stalled-optimisation", "loss-plateau", "scheduler-ends-early", step=60, then=(*COLLAPSED, *STUCK, "parameter-unchanged"))  # fmt: skip
def plateau_of_wrong_mode(t: Training) -> None:
    """`ReduceLROnPlateau(mode="max")`, kept from a run that watched SI-SDR, is given the loss: the better it gets, the
    sooner the rate is cut. Humbatova: learning rate; speech: negative losses in dB."""
    schedulers: list[torch.optim.lr_scheduler.ReduceLROnPlateau] = []
    t.steps = 400

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        if not schedulers:
            schedulers.append(
                torch.optim.lr_scheduler.ReduceLROnPlateau(training.optimizer, "max", 0.5, 8, threshold=0.0)
            )
        batch, tensors = plain_update(training, step, observer)
        schedulers[0].step(float(tensors["loss"].detach()))
        return batch, tensors

    t.update = update


class OneMask(separation.Separator):
    """An index that should run over speakers stays at the first."""

    def forward(self, mixture):
        encoded = self.encoder(mixture[:, None])
        masks = self.sigmoid(self.mask(self.layers(encoded))).unflatten(1, (2, CHANNELS))
        outputs = [self.decoder(masks[:, 0] * encoded) for _ in range(2)]
        return torch.stack(outputs, 1)[:, :, 0]


@fault(separation, *COLLAPSED, then=(*STUCK, "gradient-zero"))
def first_mask_for_both(t: Training) -> None:
    """Both outputs are made with the mask of the first speaker: `masks[:, 0]` in a loop over speakers. Humbatova: wrong
    connection; speech: asteroid#708."""
    t.model, t.steps = OneMask(), 400


@fault(separation, "input-drift", "norm-input-variance", step=49, then=("output-silent", "output-collapse", "output-constant", "assignment-ambiguous", "overfit", "overtraining", "loss-at-80-db", "activation-vanishing", "feature-constant"))  # fmt: skip
def divided_twice_in_validation(t: Training) -> None:
    """Validation divides samples by 32768 that the reader has divided already. Humbatova: wrong preprocessing; speech:
    integer and float readers."""
    plain, t.steps = t.sample, 400

    def sample(step: int, phase: str) -> Batch:
        return tuple(part / (32768 if phase == "val" else 1) for part in plain(step, phase))

    t.sample = sample
