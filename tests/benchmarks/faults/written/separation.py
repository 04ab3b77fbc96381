"""What goes wrong when speakers are separated. The symptoms are those of asteroid-team/asteroid#708 and #704."""

from __future__ import annotations

import copy

import torch
from torch import nn

from faults import separation
from faults._fault import DIVERGES, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_validation
from faults.separation import shown, si_sdr

COLLAPSED = ("stalled-assignment", "output-collapse", "assignment-ambiguous")


@fault(separation, *COLLAPSED, step=50, then=("loss-plateau", "stalled-from-start"))
def order_of_speakers_fixed(t: Training) -> None:
    """The loss takes outputs and references in the order given, which is random. Speech: asteroid#708."""
    t.steps = 400

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        estimates = model(batch[0])
        return shown(-si_sdr(estimates, batch[1]).mean(), estimates, batch)

    t.forward = forward


@fault(separation, "references-alike", then=(*COLLAPSED, "loss-plateau"))
def references_are_the_mixture(t: Training) -> None:
    """Both references are nearly the mixture: a good-looking loss, outputs alike. Speech: asteroid#708."""
    plain = t.sample

    def sample(step: int, phase: str):
        mixture, references = plain(step, phase)
        return mixture, 0.05 * references + mixture[:, None]

    t.sample, t.steps = sample, 400


@fault(separation, "output-silent", "activation-saturated", "dead-units", modules=("", "mask", "sigmoid"), then=("loss-plateau", "stalled-optimisation", "feature-constant", "poor-initialisation", "gradient-vanishing", "output-constant"))  # fmt: skip
def second_mask_closed(t: Training) -> None:
    """The second speaker's mask starts at a bias of -300: a sigmoid of exactly zero, with no gradient. SageMaker SaturatedActivation."""
    t.steps = 400
    with torch.no_grad():
        t.model.mask.bias[separation.CHANNELS :] = -300.0


@fault(
    separation,
    "stalled-optimisation",
    "loss-plateau",
    "update-ratio-low",
    "scheduler-ends-early",
    step=100,
    then=(*STUCK, "parameter-unchanged"),
)
def rate_cut_too_early(t: Training) -> None:
    """A scheduler takes the rate down to 1e-8 at step 100 of 400, at -9 dB. Speech: speechbrain/speechbrain#2471."""
    t.steps = 400
    t.schedule = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 100, 5e-6)


@fault(separation, *COLLAPSED, step=50, then=("loss-plateau", "stalled-from-start"))
def mean_over_permutations(t: Training) -> None:
    """The mean over the permutations in place of the best one. Speech: the PIT of a home-made loss."""
    t.steps = 400

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        estimates = model(batch[0])
        loss = -(si_sdr(estimates, batch[1]) + si_sdr(estimates, batch[1].flip(1))).mean() / 2
        return shown(loss, estimates, batch)

    t.forward = forward


@fault(separation, "loss-at-80-db", "loss-diverged", "loss-spike", step=150, then=("gradient-zero", "gradient-vanishing", "assignment-ambiguous", "references-alike", "loss-plateau", "stalled-optimisation"))  # fmt: skip
def references_are_silent(t: Training) -> None:
    """From step 150 on the references are zeros: +80 dB, and no gradient. Speech: asteroid#704."""
    plain = t.sample

    def sample(step: int, phase: str):
        mixture, references = plain(step, phase)
        return mixture, (torch.zeros_like(references) if phase == "train" and step >= 150 else references)

    t.sample = sample


@fault(separation, "stalled-from-start", "loss-plateau", "stalled-optimisation", "update-ratio-low", then=(*STUCK, "parameter-unchanged", "output-collapse", "assignment-ambiguous"))  # fmt: skip
def rate_of_1e_7(t: Training) -> None:
    """A learning rate of 1e-7. SageMaker WeightUpdateRatio and LossNotDecreasing."""
    t.optimize = lambda p: torch.optim.Adam(p, 1e-7)
    t.steps = 400


@fault(separation, "output-collapse", "overfit", "metric-phase-mismatch", step=99, then=("assignment-ambiguous", "overtraining"))  # fmt: skip
def validation_of_untrained_weights(t: Training) -> None:
    """The inference path builds the model and forgets to load the checkpoint. Speech: asteroid#708."""
    first = copy.deepcopy(t.model.state_dict())
    t.steps = 400

    def validate(training: Training, step: int, observer: Observer) -> None:
        trained = copy.deepcopy(training.model.state_dict())
        training.model.load_state_dict(first)
        plain_validation(training, step, observer)
        training.model.load_state_dict(trained)

    t.validate = validate


class Divide(nn.Module):
    """A global normalisation without an epsilon."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels, 1))

    def forward(self, x):
        return self.gain * (x - x.mean((1, 2), keepdim=True)) / x.std((1, 2), keepdim=True)


@fault(separation, "nonfinite-activation", "nonfinite-loss", modules=("layers.0.norm",), step=120, then=NONFINITE)  # fmt: skip
def normalisation_of_silence(t: Training) -> None:
    """A global normalisation without an epsilon meets a silent mixture at step 120. GRIST: division by zero."""
    t.model = separation.Separator(norm=Divide)
    plain = t.sample

    def sample(step: int, phase: str):
        mixture, references = plain(step, phase)
        if phase == "train" and step >= 120:
            mixture[2], references[2] = 0.0, 0.0
        return mixture, references

    t.sample = sample


@fault(separation, "dead-units", "output-silent", "output-constant", "loss-at-80-db", modules=("", "mask", "sigmoid"), then=(*STUCK, "gradient-zero", "gradient-vanishing", "feature-constant", "assignment-ambiguous", "parameter-unchanged", "output-collapse"))  # fmt: skip
def rectified_masks_closed(t: Training) -> None:
    """Masks through a ReLU that starts at a bias of -5: all masks are zero for good. SageMaker DeadRelu; asteroid#704."""
    t.model.sigmoid = nn.ReLU()
    nn.init.constant_(t.model.mask.bias, -5.0)


@fault(separation, "gradient-zero", "parameter-unchanged", "module-unused", modules=("encoder",))
def encoder_without_gradient(t: Training) -> None:
    """The encoder runs under `no_grad`, copied from an inference script. SageMaker UnchangedTensor; TrainCheck."""
    t.model.encoder.register_forward_hook(lambda module, args, output: output.detach())


@fault(separation, "update-ratio-high", "loss-diverged", "loss-spike", "gradient-exploding", "schedule-restarted", step=150, then=(*DIVERGES, *STUCK, *NONFINITE, *COLLAPSED, "output-silent", "activation-saturated", "dead-units", "gradient-clipping", "gradient-vanishing", "loss-at-80-db"))  # fmt: skip
def rate_restarted(t: Training) -> None:
    """After a resume at step 150 the rate is 500 times as large for the rest of the run. Humbatova: learning rate."""
    t.schedule = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1.0 if step < 150 else 500.0
    )
