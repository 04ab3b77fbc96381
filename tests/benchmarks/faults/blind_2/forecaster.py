"""What goes wrong in forecasters: graphs that are kept, percentages, modes, depth, a second optimizer."""

from __future__ import annotations

import torch
from torch import nn

from faults import forecaster
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update


@fault(forecaster, "metric-grad", "metric-type", step=49)
def validation_keeps_its_graph(t: Training) -> None:
    """Validation without `no_grad()`, and the list of its losses holds tensors: the graph of each one stays in memory.
    Humbatova: GPU memory; pytorch's FAQ on `total_loss += loss`."""
    history: list[torch.Tensor] = []

    def validate(training: Training, step: int, observer: Observer) -> None:
        training.model.eval()
        with observer.phase("val"):
            batch = training.sample(step, "val")
            tensors = training.forward(training.model, batch)
            history.append(tensors["loss"])
        observer.log({"loss": history[-1], **training.measure(tensors, batch)}, "val", step)

    t.validate = validate


@fault(forecaster, "loss-spike", "gradient-clipping", "gradient-exploding", "loss-plateau", "stalled-optimisation", "output-constant", then=(*DIVERGES, *STUCK, *FLAT, "update-ratio-low", "overfit"))  # fmt: skip
def percentage_of_nearly_zero(t: Training) -> None:
    """The mean absolute percentage error of values around zero: whichever target is nearest to zero is the whole loss.
    Humbatova: wrong loss; GRIST: division by nearly zero."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        loss = ((outputs - batch[1]) / batch[1]).abs().mean()
        return {"loss": loss, "outputs": outputs, "targets": batch[1]}

    t.forward = forward


class AlwaysEvaluated(forecaster.Forecaster):
    """`train` as in a frozen teacher."""

    def train(self, mode: bool = True):
        return super().train(False)


@fault(forecaster, "model-in-eval", then=("overfit", "overtraining", "watch-starved", "probe-read-nothing"))  # fmt: skip
def train_overridden(t: Training) -> None:
    """The class was derived from a teacher whose `train()` does nothing, so that dropout is never on. TrainCheck: wrong mode;
    Humbatova: training process."""
    t.model = AlwaysEvaluated(dropout=0.4)


@fault(forecaster, "gradient-vanishing", "gradient-imbalance", "activation-vanishing", "feature-constant", "loss-plateau", "stalled-optimisation", modules=("project", "lstm", ""), then=(*STUCK, *FLAT, "update-ratio-low", "gradient-zero", "parameter-unchanged", "poor-initialisation", "dead-units"))  # fmt: skip
def ten_lstms_in_a_row(t: Training) -> None:
    """`num_layers=10`: without connections around them hardly any gradient comes through. AutoTrainer: vanishing gradient;
    SageMaker VanishingGradient."""
    width = t.model.project.out_features
    t.model.lstm = nn.LSTM(width, width, num_layers=10, batch_first=True)
    t.optimize = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)


@fault(forecaster, "gradient-accumulation", "gradient-exploding", "gradient-clipping", "update-ratio-high", "gradient-imbalance", "weight-norm-drift", modules=("head", "norm", ""), step=1, then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "update-ratio-low", "overfit", "dead-units", "activation-saturated", "gradient-zero"))  # fmt: skip
def second_optimizer_not_zeroed(t: Training) -> None:
    """Body and head have optimizers of their own, and `zero_grad()` is called for the first one only. TrainCheck: missing
    `zero_grad`; Humbatova: training process."""
    head = [*t.model.norm.parameters(), *t.model.head.parameters()]
    body = [*t.model.project.parameters(), *t.model.lstm.parameters()]
    t.optimizers, t.clip = [torch.optim.Adam(body, 5e-3), torch.optim.SGD(head, 0.1)], None

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.optimizers[0].zero_grad()
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        training.optimizers[1].step()
        return batch, tensors

    t.update = update
