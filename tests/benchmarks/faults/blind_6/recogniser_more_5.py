"""What goes wrong in CTC recognisers: masks of other layers, divisions, schedules of epochs, first weights, roots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

from faults import recogniser
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import seeded

if TYPE_CHECKING:
    from faults._training import Batch, Tensors, Training


def features(t: Training, change) -> None:
    """Pass features through `change(x, step, phase)`."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, *rest = plain(step, phase)
        return change(x, step, phase), *rest

    t.sample = sample


@fault(recogniser, "input-nonfinite", "nonfinite-input", "nonfinite-activation", "audio-nonfinite", modules=("", "conv"), then=(*NONFINITE, "metric-constant", "prediction-collapse", "output-constant"))  # fmt: skip
def root_of_centred_features(t: Training) -> None:
    """Features are compressed by a root after their mean has been taken off, not before: the root of negative numbers. GRIST: root
    of a negative number; speech: the order of a front end."""
    features(t, lambda x, step, phase: x.sqrt())


@fault(recogniser, "input-range", "input-drift", modules=("", "conv"), then=(*DIVERGES, *STUCK, *FLAT, "dead-units", "gradient-clipping", "gradient-imbalance", "overfit", "overtraining", "activation-saturated"))  # fmt: skip
def masked_like_attention(t: Training) -> None:
    """SpecAugment fills its masks with -1e4, the number for masks of an attention, where the mean, 0, is meant. Speech: augmentation of
    one's own; Humbatova: wrong preprocessing."""

    def mask(x, step, phase):
        if phase == "train":
            x = x.clone()
            start = int(torch.randint(recogniser.FRAMES - 8, (), generator=seeded(71, step)))
            x[:, start : start + 8] = -1e4
        return x

    features(t, mask)


@fault(recogniser, "update-ratio-low", "loss-plateau", "stalled-optimisation", then=(*STUCK, "gradient-vanishing", "metric-constant", "parameter-unchanged"))  # fmt: skip
def divided_by_all_there_is(t: Training) -> None:
    """The mean over labels that `ctc_loss` makes is divided by frames, features and items once more, under SGD. TheDeepChecker: wrong
    reduction; AutoTrainer: slow convergence."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.02)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        return {"loss": recogniser.ctc(logits, batch) / batch[0].numel(), "logits": logits}

    t.forward = forward


@fault(recogniser, "update-ratio-low", "scheduler-ends-early", "loss-plateau", "stalled-optimisation", step=20, then=(*STUCK, "parameter-unchanged", "overtraining", "metric-constant"))  # fmt: skip
def tenths_at_every_fifth_batch(t: Training) -> None:
    """`StepLR(5, 0.1)` is meant for epochs and stepped with each batch: after forty of them the rate is 2e-11. Humbatova: learning
    rate; AutoTrainer: slow convergence."""
    t.schedule = lambda optimizer: StepLR(optimizer, 5, 0.1)


@fault(recogniser, "poor-initialisation", "activation-exploding", modules=("head", ""), then=(*DIVERGES, *STUCK, "activation-saturated", "gradient-clipping", "gradient-imbalance", "update-ratio-low", "prediction-collapse"))  # fmt: skip
def head_in_the_scale_of_decibels(t: Training) -> None:
    """The head's weights are drawn with the deviation 60, as if they were levels: scores begin in the hundreds. SageMaker
    PoorWeightInitialization; TheDeepChecker: wrong initialisation."""
    nn.init.normal_(t.model.head.weight, std=60.0)


@fault(recogniser, "update-ratio-low", "loss-plateau", "stalled-optimisation", then=(*STUCK, "metric-constant", "parameter-unchanged"))  # fmt: skip
def tolerance_as_epsilon(t: Training) -> None:
    """The third number of a configuration, a tolerance of 100, is given to AdamW as `eps`: steps are a thousandth of what they should
    be. Humbatova: wrong optimiser settings."""
    t.optimize = lambda p: torch.optim.AdamW(p, 2e-3, eps=100.0)


@fault(recogniser, "gradient-zero", "parameter-unchanged", "module-unused", modules=("conv", "norm", "gru"), then=("update-ratio-low", "loss-plateau", "stalled-optimisation", "gradient-vanishing", "metric-constant"))  # fmt: skip
def encoder_in_inference_mode(t: Training) -> None:
    """What the recurrence returns is detached, since the script once trained heads on frozen features. TrainCheck: a part without
    gradients; SageMaker UnchangedTensor."""
    t.model.gru.register_forward_hook(lambda module, given, returned: (returned[0].detach(), returned[1]))
