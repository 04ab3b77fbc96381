"""What goes wrong in forecasters and image classifiers: prices, surgery, temperatures, first weights, metrics."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from faults import classifier, forecaster
from faults._fault import DIVERGES, FLAT, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, plain_update

# -- forecasters -----------------------------------------------------------------------------------------------------


@fault(forecaster, "input-range", "activation-exploding", "activation-saturated", modules=("project", "activation", "lstm", ""), then=(*STUCK, *DIVERGES, *FLAT, "gradient-imbalance", "gradient-clipping", "gradient-zero", "dead-units", "output-constant"))  # fmt: skip
def prices_as_they_are(t: Training) -> None:
    """Targets are standardised, pasts are prices of about 45,000, in training and in validation. UMLAUT and Humbatova: data that are not
    normalised."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return torch.cat([45_000 + 900 * x[..., :1], x[..., 1:]], -1), y

    t.sample = sample


@fault(forecaster, "input-dtype", then=("precision-loss",))
def columns_of_pandas(t: Training) -> None:
    """`frame.to_numpy()` is float64 and stays so until the model, whose first line turns it back. TrainCheck: mistakes of dtype."""
    plain = t.sample
    t.model.register_forward_pre_hook(lambda module, args: (args[0].float(),))

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        return x.double(), y

    t.sample = sample


@fault(forecaster, "model-changed", "parameter-unchanged", "optimizer-misses-parameters", "optimizer-owns-others", modules=("head",), step=120, then=("loss-spike", "loss-diverged", "gradient-accumulation", "gradient-exploding", "gradient-clipping", "update-ratio-low"))  # fmt: skip
def horizon_of_twelve(t: Training) -> None:
    """At step 120 the horizon grows to twelve hours and the head is built anew; the optimizer keeps the old one. TrainCheck:
    huggingface/accelerate#2665."""

    def grow(training: Training, step: int) -> None:
        if step == 120:
            training.model.head = nn.Linear(24, 2 * forecaster.HORIZON)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])[:, : forecaster.HORIZON]
        return {"loss": F.mse_loss(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}

    t.before.append(grow)
    t.forward = forward


@fault(forecaster, "metric-nonfinite", step=49)
def skill_on_closed_days(t: Training) -> None:
    """The skill is computed item by item and averaged; on closed days repeating the last value has no error, and is divided by. GRIST:
    division by zero; Humbatova: wrong metrics."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, y = plain(step, phase)
        x, y = x.clone(), y.clone()
        x[:2, :, 0], y[:2] = 0.0, 0.0
        return x, y

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        error = (tensors["outputs"] - batch[1]).abs().mean(1)
        naive = (batch[0][:, -1:, 0] - batch[1]).abs().mean(1)
        return {"mae": float(error.mean()), "skill": float((1 - error / naive).mean())}

    t.sample, t.measure = sample, measure


@fault(forecaster, "gradient-zero", "parameter-unchanged", "module-unused", modules=("project", "lstm"), then=("update-ratio-low", "gradient-vanishing"))  # fmt: skip
def state_through_numpy(t: Training) -> None:
    """The last state goes through NumPy, for a filter of SciPy's that was taken out again: no gradient comes back. TrainCheck: a part
    without gradients; SageMaker UnchangedTensor."""
    t.model.norm.register_forward_pre_hook(lambda module, args: (torch.from_numpy(args[0].detach().numpy().copy()),))


@fault(forecaster, "metric-grad", step=0, then=("metric-phase-mismatch",))
def errors_in_a_list(t: Training) -> None:
    """`history.append(loss)` without `detach()`, the mean of which is logged in each step: no graph is ever freed. PyTorch FAQ;
    TrainCheck: memory."""
    history: list[torch.Tensor] = []

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        history.append(tensors["loss"])
        observer.log({"mean_loss": torch.stack(history[-20:]).mean()}, "train", step)
        return batch, tensors

    t.update = update


# -- classifiers -----------------------------------------------------------------------------------------------------


@fault(classifier, "gradient-vanishing", "stalled-optimisation", "update-ratio-low", then=(*STUCK, *FLAT, "parameter-unchanged", "stalled-from-start"))  # fmt: skip
def temperature_of_ten_thousand(t: Training) -> None:
    """Scores are divided by a temperature of 10,000, the number of steps, which is one line above in the configuration: all classes are
    equally likely, and gradients a ten-thousandth. Humbatova: wrong loss; SageMaker VanishingGradient."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0]) / 1e4
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits, "targets": batch[1]}

    t.forward = forward


@fault(classifier, "poor-initialisation", "activation-vanishing", "gradient-vanishing", modules=("block1", "block2", "block3", "head", ""), then=(*STUCK, *FLAT, "update-ratio-low", "dead-units", "gradient-zero", "update-ratio-high", "gradient-imbalance", "weight-norm-drift"))  # fmt: skip
def layers_of_a_thousandth(t: Training) -> None:
    """`normal_(weight, std=1e-3)` in all layers of a network without normalisation: pictures hardly come to the head. SageMaker
    PoorWeightInitialization; TheDeepChecker."""
    t.model = classifier.Classifier(norm=lambda channels: nn.Identity())
    for parameter in t.model.parameters():
        nn.init.normal_(parameter, std=1e-3) if parameter.ndim > 1 else nn.init.zeros_(parameter)


@fault(classifier, "parameter-unchanged", "gradient-zero", then=(*STUCK, "update-ratio-low", "module-unused", "stalled-from-start"))  # fmt: skip
def stepped_before_the_backward_pass(t: Training) -> None:
    """`zero_grad()`, `step()`, and only then `backward()`: each step sees no gradient. TrainCheck: wrong order in the loop; Humbatova:
    training process."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        training.optimizer.zero_grad()
        finish_update(training, step, observer)
        tensors["loss"].backward()
        return batch, tensors

    t.update = update


@fault(classifier, "metric-phase-mismatch", "metric-missing", "metric-unexpected", step=49)
def accuracy_with_another_name(t: Training) -> None:
    """Training reports `acc`, validation `accuracy`, and the plot asks for both under one name. speech: metrics with another name in
    validation."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        accuracy = classifier.measure({"logits": tensors["logits"].detach()}, batch)["accuracy"]
        observer.log({"loss": float(tensors["loss"].detach()), "acc": accuracy}, "train", step)
        return batch, tensors

    t.update = update
