"""What goes wrong in enhancement: gains, squares, warm-ups, second terms, masks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from faults import enhancement
from faults._fault import DIVERGES, FLAT, STUCK, fault

if TYPE_CHECKING:
    from faults._training import Batch, Tensors, Training


@fault(enhancement, "dead-units", "feature-constant", "gradient-zero", "parameter-unchanged", "activation-vanishing", "poor-initialisation", modules=("layer1", "layer2", "layer3"), then=("units-symmetric", "module-unused", *STUCK, *FLAT, "gradient-imbalance", "update-ratio-low"))  # fmt: skip
def gains_taken_for_biases(t: Training) -> None:
    """An initialisation that sets all parameters of one axis to zero means biases, and takes the gains of the normalisations
    as well. SageMaker AllZero and PoorWeightInitialization; TheDeepChecker: zero weights."""
    for parameter in t.model.parameters():
        if parameter.ndim == 1:
            nn.init.zeros_(parameter)


@fault(enhancement, "input-drift", step=49, then=("overfit", "overtraining", "metric-range"))
def validation_of_power(t: Training) -> None:
    """Magnitudes in training, powers in validation: `power=2.0` is the default of the class that makes the spectra there.
    Speech: front ends; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        return tuple(part.square() if phase == "val" else part for part in plain(step, phase))

    t.sample = sample


@fault(enhancement, "update-ratio-low", "schedule-unfinished", "schedule-unreachable", "loss-plateau", "stalled-optimisation", "stalled-from-start", then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def warm_up_of_a_large_run(t: Training) -> None:
    """A warm-up of 100,000 steps, from a paper's configuration, in a run of 300. Humbatova: learning rate; AutoTrainer: slow
    convergence."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 1e5))


@fault(enhancement, "loss-diverged", "gradient-exploding", "loss-spike", step=150, then=("activation-saturated", "gradient-clipping", *DIVERGES, *STUCK, *FLAT, "output-silent", "output-collapse", "dead-units", "overfit", "gradient-zero"))  # fmt: skip
def second_term_not_averaged(t: Training) -> None:
    """From step 150 on what is left of the noise costs as well; it is a sum where all else is a mean, and the masks close.
    TheDeepChecker: missing reduction; Humbatova: wrong loss."""
    calls: list[int] = []

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = enhancement.forward(model, batch)
        calls.extend([1] if model.training else [])
        left = tensors["outputs"][batch[1] < 0.3].sum()
        return {**tensors, "loss": tensors["loss"] + (left if len(calls) > 150 else 0.0)}

    t.forward = forward


@fault(enhancement, "loss-plateau", "stalled-optimisation", "activation-saturated", modules=("sigmoid", "mask", ""), then=(*STUCK, *FLAT, "weight-norm-drift", "output-collapse", "update-ratio-low", "dead-units"))  # fmt: skip
def mask_through_two_sigmoids(t: Training) -> None:
    """A sigmoid in the mask's layer and one in `forward`: masks of 0.5 to 0.73 can hardly take noise away. Humbatova: wrong
    activation function; TheDeepChecker: saturated units."""
    t.model.sigmoid = nn.Sequential(nn.Sigmoid(), nn.Sigmoid())
    t.optimize = lambda p: torch.optim.Adam(p, 5e-3)
