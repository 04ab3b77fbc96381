"""What goes wrong in CTC recognisers: lengths, axes, labels, saturated recurrences, metric dictionaries."""

from __future__ import annotations

import copy

import torch
from torch import nn

from faults import recogniser
from faults._fault import DIVERGES, NONFINITE, STUCK, fault
from faults._training import Training, seeded


@fault(recogniser, "nonfinite-loss", "loss-diverged", modules=("",), then=NONFINITE)
def subsampled_too_far(t: Training) -> None:
    """A stride of 11 leaves fewer frames than labels: the CTC loss is infinite. Speech: espnet and wenet, many issues."""
    t.model = recogniser.Recogniser(stride=11)


@fault(recogniser, "overfit", "overtraining", step=150)
def twenty_utterances(t: Training) -> None:
    """Twenty utterances only, learnt by heart. SageMaker Overfit and Overtraining."""
    few, plain = recogniser.utterances(20, seeded(99)), t.sample
    t.sample = lambda step, phase: tuple(p[step % 2 :: 2] for p in few) if phase == "train" else plain(step, phase)
    t.steps = 400


@fault(recogniser, "prediction-collapse", "poor-initialisation", "output-constant", "activation-saturated", "loss-plateau", modules=("head", ""), then=STUCK)  # fmt: skip
def blank_preferred(t: Training) -> None:
    """The blank starts at a bias of 80 and a slow optimizer: nothing but blanks, the peak of every CTC collapse."""
    with torch.no_grad():
        t.model.head.bias[0] = 80.0


@fault(recogniser, "update-ratio-high", "loss-spike", "loss-diverged", "gradient-exploding", step=150, then=(*DIVERGES, *STUCK, "dead-units", "activation-saturated", "gradient-clipping", "gradient-vanishing", "feature-constant", "norm-input-variance"))  # fmt: skip
def warm_restart_too_hot(t: Training) -> None:
    """A restart of the schedule at step 150 takes the rate to 1. Humbatova: learning rate."""
    t.schedule = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1.0 if step < 150 else 500.0
    )


@fault(recogniser, "input-drift", step=49)
def validation_not_scaled(t: Training) -> None:
    """Features are normalised in training only: 20 dB less and shifted in validation. Speech: CMVN in one pipeline."""
    plain = t.sample

    def sample(step: int, phase: str):
        x, *rest = plain(step, phase)
        return (x * 0.1 - 4 if phase == "val" else x), *rest

    t.sample = sample


@fault(recogniser, "activation-saturated", "poor-initialisation", "gradient-vanishing", modules=("gru",), then=(*STUCK, "gradient-imbalance", "gradient-zero", "update-ratio-low"))  # fmt: skip
def saturated_recurrence(t: Training) -> None:
    """Input weights of the recurrent layer 300 times too large: its states are -1 or 1. SageMaker SaturatedActivation."""
    with torch.no_grad():
        for name, parameter in t.model.gru.named_parameters():
            if name.startswith("weight_ih"):
                parameter.mul_(300.0)


@fault(recogniser, "dead-units", modules=("activation", "conv"), then=(*STUCK, "feature-constant", "norm-input-variance", "gradient-zero", "gradient-vanishing", "parameter-unchanged", "module-unused", "activation-vanishing", "poor-initialisation"))  # fmt: skip
def dead_front_end(t: Training) -> None:
    """The convolution starts at a bias of -20 before its ReLU. SageMaker DeadRelu."""
    nn.init.constant_(t.model.conv.bias, -20.0)


@fault(recogniser, "metric-always-none", "metric-type", "metric-missing", "metric-nonfinite", step=49)
def accuracy_is_none(t: Training) -> None:
    """The accuracy is None in every validation: the model has no such branch. Speech: wenet-e2e/wenet#2336."""
    measured = t.measure
    t.measure = lambda tensors, batch: {**measured(tensors, batch), "exact": None}


@fault(recogniser, "loss-plateau", "stalled-optimisation", "prediction-collapse", step=80)
def transcripts_of_others(t: Training) -> None:
    """Audio is sorted by length, transcripts are not. Humbatova: wrong labels; speech: data preparation."""
    plain = t.sample

    def sample(step: int, phase: str):
        x, labels, lengths = plain(step, phase)
        order = torch.randperm(len(x), generator=seeded(2, step))
        return x, labels[order], lengths[order]

    t.sample = sample


@fault(recogniser, "optimizer-owns-others", "parameter-unchanged", "optimizer-misses-parameters", then=(*STUCK,))  # fmt: skip
def copy_is_trained(t: Training) -> None:
    """The model is copied after the optimizer was built: gradients flow, nothing moves. TrainCheck: accelerate#2665."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model = copy.deepcopy(t.model)
