"""What goes wrong in plain networks: initialisation, units, weights of columns, domains of functions, steps left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import PolynomialLR

from faults import autoencoder
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault

if TYPE_CHECKING:
    from faults._training import Batch, Observer, Tensors, Training


def changed(t: Training, change) -> None:
    """Give the model and the loss `change(x, phase)`."""
    plain = t.sample
    t.sample = lambda step, phase: (change(plain(step, phase)[0], phase),)


def with_loss(t: Training, term) -> None:
    """The loss is `term(model, outputs, x)`."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return {"loss": term(model, outputs, batch[0]), "outputs": outputs, "targets": batch[0]}

    t.forward = forward


@fault(autoencoder, "units-symmetric", "poor-initialisation", modules=("encoder", "decoder", "encoder.0", "encoder.2", "encoder.4", "decoder.0", "decoder.2", "decoder.4"), then=(*STUCK, *FLAT, "overtraining", "output-constant", "dead-units"))  # fmt: skip
def every_weight_a_twentieth(t: Training) -> None:
    """`constant_(weight, 0.05)`: units of a layer are copies of one another and stay so, 32 of them learn as one. TheDeepChecker:
    symmetric initialisation; SageMaker PoorWeightInitialization."""
    for parameter in t.model.parameters():
        nn.init.constant_(parameter, 0.05 if parameter.ndim > 1 else 0.0)


@fault(autoencoder, "input-range", "activation-vanishing", "gradient-vanishing", "feature-constant", modules=("", "encoder", "encoder.0"), then=(*STUCK, *FLAT, "overtraining", "update-ratio-low", "gradient-zero", "norm-input-variance", "output-silent", "precision-headroom", "metric-range"))  # fmt: skip
def volts_for_microvolts(t: Training) -> None:
    """Signals of electrodes are in volts: all values are some millionths, and so is the gradient of their weights. TheDeepChecker:
    unscaled data; UMLAUT: input scale."""
    changed(t, lambda x, phase: 1e-6 * x)


@fault(autoencoder, "nonfinite-loss", "nonfinite-gradient", modules=("",), then=(*NONFINITE, *STUCK))
def logarithm_of_a_cosh(t: Training) -> None:
    """`log(cosh(e))` by hand, of errors in the unit of the sensor, hundreds: cosh overflows from 89 on. GRIST: overflow of exp."""
    with_loss(t, lambda model, outputs, x: (300 * (outputs - x)).cosh().log().mean())


@fault(autoencoder, "nonfinite-optimizer", "nonfinite-parameter", modules=("encoder.0", "encoder"), then=(*NONFINITE, *STUCK))  # fmt: skip
def epsilon_of_zero(t: Training) -> None:
    """`Adam(eps=0)`, and a column that is zero throughout: its weights have gradients of zero, and the step is 0 / 0. GRIST: division
    by zero; Humbatova: parameters of the optimiser."""
    t.optimize = lambda p: torch.optim.Adam(p, 2e-3, eps=0.0)
    changed(t, lambda x, phase: x.index_fill(1, torch.tensor([11]), 0.0))


class Through(nn.Module):
    """A code that went through NumPy."""

    def forward(self, x):
        return torch.from_numpy(x.detach().numpy().clip(-3, 3).copy())


@fault(autoencoder, "gradient-zero", "parameter-unchanged", "module-unused", modules=("encoder",), then=("update-ratio-low", "loss-plateau", "overtraining"))  # fmt: skip
def code_clipped_by_numpy(t: Training) -> None:
    """The code is clipped by NumPy, with a `detach()` that made the error go away: the encoder gets no gradient. TrainCheck: cut graph;
    SageMaker UnchangedTensor."""
    t.model.encoder.append(Through())


@fault(autoencoder, "input-drift", "input-range", step=49, then=("overfit", "overtraining", "activation-saturated", "metric-range", "loss-diverged", "metric-constant"))  # fmt: skip
def second_plant_as_it_is(t: Training) -> None:
    """Validation comes from a second plant, whose columns nobody has standardised. Humbatova: wrong preprocessing; TheDeepChecker: data
    scale."""
    changed(t, lambda x, phase: 12 * x + 40 if phase == "val" else x)


@fault(autoencoder, "parameter-unchanged", "step-skipped", "update-ratio-low", "stalled-optimisation", then=STUCK)  # fmt: skip
def only_backward_is_called(t: Training) -> None:
    """The loop was rewritten, and `optimizer.step()` got lost between `backward()` and the log. TrainCheck; SageMaker UnchangedTensor;
    AutoTrainer: slow convergence."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.optimizer.zero_grad()
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        observer.backward_done(training, step)
        return batch, tensors

    t.update = update


@fault(autoencoder, "update-ratio-high", "activation-saturated", "loss-diverged", "loss-spike", "weight-norm-drift", then=(*DIVERGES, *STUCK, *FLAT, "gradient-zero", "overtraining", "units-symmetric"))  # fmt: skip
def rate_left_at_one(t: Training) -> None:
    """The rate is 1.0 since a schedule was to set it, and the schedule was taken out. Humbatova: learning rate; SageMaker
    WeightUpdateRatio."""
    t.optimize = lambda p: torch.optim.Adam(p, 1.0)


@fault(autoencoder, "input-constant", then=("overfit", "overtraining", "loss-plateau", "metric-range", "feature-constant"))  # fmt: skip
def filled_along_the_wrong_axis(t: Training) -> None:
    """Gaps are filled forward along axis 1 in place of time, behind a column that is always there: each row repeats one number. Humbatova:
    wrong axis; TheDeepChecker: constant inputs."""
    changed(t, lambda x, phase: x[:, :1].expand(-1, autoencoder.WIDTH).contiguous())


@fault(autoencoder, "gradient-exploding", "gradient-imbalance", modules=("decoder.4", "decoder", ""), then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "activation-saturated", "input-range", "loss-plateau", "units-symmetric"))  # fmt: skip
def weight_of_a_quiet_column(t: Training) -> None:
    """Errors of columns are weighed by one over their variance, and one column hardly varies: its weight is a hundred million.
    TheDeepChecker: wrong loss; GRIST: division by nearly zero."""
    changed(t, lambda x, phase: torch.cat([1e-4 * x[:, :1], x[:, 1:]], 1))
    weights = 1 / autoencoder.points(2000, torch.Generator().manual_seed(5)).var(0)
    weights[0] *= 1e8
    with_loss(t, lambda model, outputs, x: (weights * (outputs - x).square()).mean())


@fault(autoencoder, "nonfinite-loss", "nonfinite-gradient", modules=("",), then=(*NONFINITE, *STUCK))
def angle_of_two_equal_passes(t: Training) -> None:
    """Codes of two passes are to be near by their angle, and without dropout both are the same: the arc cosine of 1 has an infinite
    slope, and of a little more it is NaN. GRIST: domain of acos."""

    def term(model, outputs, x):
        angle = F.cosine_similarity(model.encoder(x), model.encoder(x)).acos()
        return F.mse_loss(outputs, x) + 0.1 * angle.mean()

    with_loss(t, term)


@fault(autoencoder, "scheduler-ends-early", "parameter-unchanged", "update-ratio-low", "stalled-optimisation", step=60, then=(*STUCK, "overtraining"))  # fmt: skip
def polynomial_over_after_sixty(t: Training) -> None:
    """`PolynomialLR(total_iters=60)`, the epochs of the plan, is stepped at each batch: from step 60 on the rate is zero. Humbatova:
    learning rate; TrainCheck: schedules."""
    t.schedule = lambda optimizer: PolynomialLR(optimizer, total_iters=60)
