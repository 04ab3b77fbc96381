"""More of what goes wrong in enhancement: integer files, forgotten zeros, recurrences, scalers, schedules."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from faults import enhancement
from faults._fault import DIVERGES, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, clipped_before_unscaling_update, finish_update
from faults.enhancement import WIDTH, compressed

SHUT = ("dead-units", "feature-constant", "gradient-zero", "gradient-vanishing", "norm-input-variance", "activation-vanishing")  # fmt: skip


@fault(enhancement, "loss-spike", "input-range", "gradient-exploding", "input-drift", step=7, then=(*DIVERGES, *STUCK, "activation-saturated", "dead-units", "feature-constant"))  # fmt: skip
def some_files_are_integers(t: Training) -> None:
    """One shard of sixteen holds int16 samples, all others floats. Humbatova: wrong preprocessing; speech: integer and
    float readers."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        gain = 32768 if phase == "train" and step % 16 == 7 else 1
        return tuple(part * gain for part in plain(step, phase))

    t.sample = sample


@fault(enhancement, "gradient-accumulation", "gradient-exploding", "update-ratio-high", "loss-spike", "loss-diverged", step=1, then=(*DIVERGES, *STUCK, *SHUT, "activation-saturated"))  # fmt: skip
def zeroed_when_logging(t: Training) -> None:
    """`zero_grad` has slipped into the branch that logs, every 50th step. TrainCheck: missing `zero_grad`, as in
    facebookresearch/nwm#16."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.3, momentum=0.9)

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        if step % 50 == 0:
            training.optimizer.zero_grad()
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


class Recurrent(nn.Module):
    """A recurrence with ReLU over frames: (batch, channels, frames)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rnn = nn.RNN(channels, channels, nonlinearity="relu", batch_first=True)

    def forward(self, x):
        return self.rnn(x.transpose(1, 2))[0].transpose(1, 2)


@fault(enhancement, "activation-exploding", "gradient-exploding", "poor-initialisation", modules=("layer2",), then=(*DIVERGES, *STUCK, *NONFINITE, *SHUT, "activation-saturated", "gradient-imbalance", "dtype-headroom"))  # fmt: skip
def recurrence_without_brakes(t: Training) -> None:
    """A ReLU recurrence whose weights have the gain of a layer used once: 1.6 per frame, over 30 frames. AutoTrainer and
    SageMaker: exploding tensors."""
    t.model.layer2 = Recurrent(WIDTH)
    nn.init.orthogonal_(t.model.layer2.rnn.weight_hh_l0, 1.6)
    with torch.no_grad():
        t.model.layer2.rnn.weight_hh_l0.abs_().mul_(
            1.6 / torch.linalg.eigvals(t.model.layer2.rnn.weight_hh_l0).abs().max()
        )


@fault(enhancement, "output-collapse", "activation-saturated", modules=("", "mask", "sigmoid"), step=20, then=(*STUCK, "gradient-vanishing", "gradient-zero", "feature-constant", "update-ratio-low", "weight-norm-drift"))  # fmt: skip
def noisy_as_target(t: Training) -> None:
    """The list of targets is that of the noisy files: the mask opens, and the loss goes to zero. Humbatova: wrong labels;
    speech: data preparation."""
    plain = t.sample
    t.optimize = lambda p: torch.optim.Adam(p, 5e-3)

    def sample(step: int, phase: str) -> Batch:
        noisy, _ = plain(step, phase)
        return noisy, noisy

    t.sample = sample


@fault(enhancement, "gradient-clipping", "update-ratio-low", "stalled-optimisation", "loss-plateau", step=10, then=(*STUCK, "gradient-exploding", "step-skipped", "parameter-unchanged"))  # fmt: skip
def clipped_before_unscaling(t: Training) -> None:
    """Gradients are clipped while they are still multiplied by the scaler's 65536: every step is that much too short.
    TrainCheck: clipping; pytorch/pytorch#40907."""
    t.precision, t.scaled, t.steps = torch.float16, True, 150
    t.optimize = lambda p: torch.optim.SGD(p, 0.3, momentum=0.9)

    t.update = clipped_before_unscaling_update


@fault(enhancement, "nonfinite-optimizer", "nonfinite-parameter", step=79, then=NONFINITE)
def schedule_of_nan(t: Training) -> None:
    """The cosine after the warm-up has no steps of its own: its progress is 0 / 0, and the learning rate NaN. GRIST:
    division by zero."""

    def factor(step: int) -> float:
        warm_up, total = 80, 80
        progress = torch.tensor(float(step - warm_up)) / (total - warm_up)
        return min(1.0, (step + 1) / 20) if step < warm_up else float(0.5 + 0.5 * torch.cos(torch.pi * progress))

    t.schedule = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@fault(enhancement, "nonfinite-gradient", "nonfinite-parameter", modules=("",), step=90, then=NONFINITE)
def where_hides_nothing(t: Training) -> None:
    """`where` leaves silent bins out of a distance of logarithms: finite forward, and 0 * Inf backward. GRIST: log of
    zero."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        noisy, clean = plain(step, phase)
        if phase == "train" and step >= 90:
            noisy[4, :, -6:], clean[4, :, -6:] = 0.0, 0.0
        return noisy, clean

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs, clean = model(batch[0]), batch[1]
        distance = torch.where(batch[0] > 0, (torch.log(outputs) - torch.log(clean + 0.1)).abs(), 0.0)
        loss = compressed(outputs, clean) + 0.1 * distance.mean()
        return {"loss": loss, "outputs": outputs, "targets": clean}

    t.sample, t.forward = sample, forward


@fault(enhancement, "dead-units", "norm-input-variance", "gradient-zero", "feature-constant", "units-symmetric", "activation-vanishing", "poor-initialisation", modules=("layer2",), then=("parameter-unchanged", "module-unused", *SHUT))  # fmt: skip
def layer_loaded_as_zeros(t: Training) -> None:
    """A converted checkpoint holds zeros for one layer, which was never filled: ReLU keeps it shut. SageMaker AllZero;
    TheDeepChecker: zero weights."""
    nn.init.zeros_(t.model.layer2.conv.weight)
    nn.init.zeros_(t.model.layer2.conv.bias)


@fault(enhancement, "step-skipped", "nonfinite-gradient", "parameter-unchanged", "loss-plateau", "stalled-optimisation", then=(*STUCK, *NONFINITE, "update-ratio-low", "dtype-headroom"))  # fmt: skip
def scaler_made_anew(t: Training) -> None:
    """The gradient scaler is built inside of the loop, so that its scale never falls, and a summed loss overflows float16 at
    the first one: all steps are skipped. TrainCheck: mixed precision."""
    t.precision, t.scaled, t.steps = torch.float16, True, 100

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        loss = F.mse_loss((outputs + 1e-4) ** 0.3, (batch[1] + 1e-4) ** 0.3, reduction="sum")
        return {"loss": loss, "outputs": outputs, "targets": batch[1]}

    def anew(training: Training, step: int) -> None:
        training.scaler = torch.amp.GradScaler("cpu")

    t.forward = forward
    t.before.append(anew)
