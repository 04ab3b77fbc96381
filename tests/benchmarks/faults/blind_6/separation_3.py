"""What goes wrong when speakers are separated: modes, layers, masks, levels, rates, logarithms, metrics."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau

from faults import separation
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update
from faults.separation import CHANNELS, Separator, measure, pit, shown, si_sdr

COLLAPSED = ("stalled-assignment", "output-collapse", "assignment-ambiguous", "stalled-from-start")
THREE = ("layers.0", "layers.1", "layers.2")


@fault(separation, "validation-in-train-mode", modules=("", *THREE), step=49)
def separated_without_eval(t: Training) -> None:
    """With BatchNorm, the validation of the new trainer has `no_grad` only. TrainCheck: modes."""
    t.model = Separator(norm=nn.BatchNorm1d)

    def validate(training: Training, step: int, observer: Observer) -> None:
        with observer.phase("val"), torch.no_grad():
            batch = training.sample(step, "val")
            tensors = training.forward(training.model, batch)
        observer.log({"loss": float(tensors["loss"]), **training.measure(tensors, batch)}, "val", step)

    t.validate = validate


@fault(separation, "dropout-high", modules=THREE, then=(*STUCK, *COLLAPSED, "gradient-exploding", "dead-units", "feature-constant"))  # fmt: skip
def blocks_drop_nearly_all(t: Training) -> None:
    """A share to keep of 0.97, from a configuration of another framework, is given to `Dropout`. Humbatova: regularisation;
    TheDeepChecker: underfitting."""
    t.model = Separator(activation=lambda: nn.Sequential(nn.PReLU(), nn.Dropout(0.97)))


@fault(separation, "metric-range", step=49)
def separated_items_counted(t: Training) -> None:
    """The accuracy of the separation is the number of items above 3 dB, which is not divided by their number. Humbatova: wrong metric."""

    def scores(tensors: Tensors, batch: Batch) -> dict[str, object]:
        each = torch.stack([-pit(e[None], r[None]) for e, r in zip(tensors["estimates"], batch[1], strict=True)])
        return {**measure(tensors, batch), "separation_accuracy": float((each > 3).sum())}

    t.measure = scores


@fault(separation, "metric-always-none", "metric-missing", "metric-type", "metric-phase-mismatch", step=49, then=("metric-nonfinite",))  # fmt: skip
def intelligibility_is_none(t: Training) -> None:
    """The package for STOI is not installed; what wraps it returns None, and no one looks. Humbatova: wrong metric; speech:
    optional metrics."""
    t.measure = lambda tensors, batch: {**measure(tensors, batch), "stoi": None}


@fault(separation, "gradient-zero", "parameter-unchanged", modules=("layers", *THREE), then=(*STUCK, *COLLAPSED, "module-unused", "gradient-vanishing", "optimizer-misses-parameters"))  # fmt: skip
def blocks_under_no_grad(t: Training) -> None:
    """The blocks run under `no_grad`, left from a measurement of their speed. TrainCheck: parameters not updated; SageMaker
    UnchangedTensor."""
    t.model.layers.forward = torch.no_grad()(t.model.layers.forward)


@fault(separation, "activation-saturated", "output-collapse", "gradient-zero", "poor-initialisation", "parameter-unchanged", "feature-constant", modules=("mask", "sigmoid", "layers", ""), then=(*STUCK, *COLLAPSED, "gradient-vanishing", "units-symmetric", "gradient-imbalance"))  # fmt: skip
def both_masks_wide_open(t: Training) -> None:
    """The bias of the masks begins at 60, so that nothing is lost at first: both sigmoids are 1, both outputs the mixture, and no
    gradient comes through. SageMaker SaturatedActivation."""
    nn.init.constant_(t.model.mask.bias, 60.0)


@fault(separation, "update-ratio-high", "weight-norm-drift", "activation-saturated", modules=("", "mask", "sigmoid"), then=(*DIVERGES, *STUCK, *COLLAPSED, *FLAT, "gradient-clipping", "gradient-zero", "output-silent", "loss-at-80-db", "dead-units", "parameter-unchanged"))  # fmt: skip
def rate_of_three_for_descent(t: Training) -> None:
    """SGD at a rate of 3, which a typing error made of 3e-3; clipping to 5 makes steps of 15. Humbatova: learning rate; SageMaker
    WeightUpdateRatio."""
    t.optimize = lambda p: torch.optim.SGD(p, 3.0)


@fault(separation, "update-ratio-low", "stalled-optimisation", "loss-plateau", "stalled-from-start", then=(*STUCK, *COLLAPSED, "parameter-unchanged", "gradient-vanishing", "activation-vanishing"))  # fmt: skip
def divided_by_all_samples(t: Training) -> None:
    """The loss, which is a mean already, is divided by the number of samples of the batch, under SGD. TheDeepChecker: wrong reduction;
    AutoTrainer: slow convergence."""
    t.optimize = lambda p: torch.optim.SGD(p, 1e-4, momentum=0.9)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        estimates = model(batch[0])
        return shown(pit(estimates, batch[1]) / batch[0].numel(), estimates, batch)

    t.forward = forward


@fault(separation, "update-ratio-low", "stalled-optimisation", "loss-plateau", "scheduler-ends-early", "parameter-unchanged", step=100, then=(*STUCK,))  # fmt: skip
def cut_with_each_batch(t: Training) -> None:
    """`ReduceLROnPlateau` with a patience of one epoch is stepped with the loss of each batch. Humbatova: learning rate; TrainCheck:
    scheduler."""
    schedulers: list[ReduceLROnPlateau] = []

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        if not schedulers:
            schedulers.append(ReduceLROnPlateau(training.optimizer, factor=0.3, patience=1, threshold=0.1, eps=0.0))
        batch, tensors = plain_update(training, step, observer)
        schedulers[0].step(float(tensors["loss"]))
        return batch, tensors

    t.update = update


@fault(separation, "nonfinite-loss", "nonfinite-gradient", modules=("",), then=NONFINITE)
def epsilon_taken_off(t: Training) -> None:
    """A minus in place of a plus before the epsilon in the logarithm: what is poorly separated at first gives NaN. GRIST: log of a
    negative number."""

    def ratio(estimates: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        return 10 * torch.log10(10 ** (si_sdr(estimates, references) / 10) - 1e-2)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        estimates, references = model(batch[0]), batch[1]
        both = torch.stack([ratio(estimates, r).mean(1) for r in (references, references.flip(1))])
        return shown(-both.amax(0).mean(), estimates, batch)

    t.forward = forward


@fault(separation, "audio-dc", "audio-mixture", "input-range", "batch-order", then=("activation-exploding", "gradient-exploding", "gradient-imbalance", "loss-plateau", "stalled-optimisation", "activation-saturated", "gradient-clipping", "audio-peak", *COLLAPSED))  # fmt: skip
def offset_of_the_converter(t: Training) -> None:
    """Mixtures come from a converter with an offset, 20 times their level, which the references do not have. Humbatova: wrong
    preprocessing; SageMaker NotNormalizedData."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        mixture, references = plain(step, phase)
        return mixture + 30.0, references

    t.sample = sample


@fault(separation, "activation-exploding", "poor-initialisation", "activation-saturated", modules=("layers", *THREE, "mask", "sigmoid", ""), then=(*DIVERGES, *STUCK, *COLLAPSED, "gradient-clipping", "gradient-imbalance", "gradient-vanishing", "gradient-zero", "output-silent"))  # fmt: skip
def blocks_without_norms(t: Training) -> None:
    """Normalisations are taken out for streaming, and the weights are left at the deviation that they had beside them, one. SageMaker
    ExplodingTensor and PoorWeightInitialization."""
    t.model = Separator(norm=lambda channels: nn.Identity())
    for layer in t.model.layers:
        nn.init.normal_(layer.conv.weight)
        nn.init.normal_(layer.out.weight)


@fault(separation, "output-silent", "loss-at-80-db", "gradient-zero", "poor-initialisation", "parameter-unchanged", modules=("decoder", ""), then=(*STUCK, *COLLAPSED, *FLAT, "units-symmetric", "dead-units", "update-ratio-low", "module-unused"))  # fmt: skip
def decoder_allocated_not_filled(t: Training) -> None:
    """A converter allocates the decoder's filters as zeros and does not find their name in the file: silence, and no gradient.
    SageMaker AllZero; TheDeepChecker: zero weights."""
    nn.init.zeros_(t.model.decoder.weight)


class Counting(Separator):
    """With a head that says how many speak."""

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.ReLU(), nn.Linear(CHANNELS, 3))


@fault(separation, "module-unused", "gradient-zero", "parameter-unchanged", modules=("count",))
def counter_of_speakers_not_called(t: Training) -> None:
    """A head is added that counts the speakers, and `forward` does not know of it. TrainCheck; Humbatova: missing layer."""
    t.model = Counting()


@fault(separation, "input-drift", "audio-scale", "input-range", step=49, then=("overfit", "overtraining", "output-collapse", "activation-exploding", "activation-saturated", "assignment-ambiguous", "audio-peak"))  # fmt: skip
def validation_of_integers(t: Training) -> None:
    """The validation set is read by another function, which leaves samples as integers up to 32767. Speech: integer and float
    readers; Humbatova: wrong preprocessing."""
    plain = t.sample
    t.sample = lambda step, phase: tuple(x * (8000.0 if phase == "val" else 1.0) for x in plain(step, phase))


@fault(separation, "input-dtype", then=("precision-loss",))
def mixtures_in_float64(t: Training) -> None:
    """Mixtures are added up in numpy, in float64, and converted by the loop. TrainCheck: dtype."""
    plain = t.sample
    t.sample = lambda step, phase: tuple(part.double() for part in plain(step, phase))
    t.forward = lambda model, batch: separation.forward(model, tuple(part.float() for part in batch))


@fault(separation, "metric-grad", step=19)
def progress_with_its_graphs(t: Training) -> None:
    """The SI-SDR of the last 20 steps is logged as the sum of tensors that keep their graphs. Humbatova: memory; PyTorch:
    `total_loss += loss`."""
    kept: list[torch.Tensor] = []

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        kept.append(-tensors["loss"])
        if len(kept) == 20:
            observer.log({"train_si_sdr_db": sum(kept) / 20}, "train", step)
            kept.clear()
        return batch, tensors

    t.update = update


@fault(separation, "metric-vanished", "metric-missing", step=199, then=("metric-phase-mismatch",))
def improvement_while_it_improves(t: Training) -> None:
    """The gain over the mixture is only put into the results until step 150, where a list of its own names ends. Humbatova: wrong
    metric."""
    plain, now = t.validate, [0]

    def validate(training: Training, step: int, observer: Observer) -> None:
        now[0] = step
        plain(training, step, observer)

    def scores(tensors: Tensors, batch: Batch) -> dict[str, object]:
        gain = float(si_sdr(batch[0][:, None].expand_as(batch[1]), batch[1]).mean())
        known = measure(tensors, batch)
        return {**known, "si_sdri_db": float(str(known["si_sdr_db"])) - gain} if now[0] < 150 else known

    t.validate, t.measure = validate, scores


@fault(separation, "scheduler-ends-early", step=40, then=("schedule-restarted", "loss-spike", "schedule-unfinished", "update-ratio-low", "loss-diverged", "loss-plateau"))  # fmt: skip
def cosine_of_forty_batches(t: Training) -> None:
    """A cosine for 40 epochs is stepped after each batch, and goes up and down. TrainCheck: scheduler; Humbatova: learning rate."""
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 40)


@fault(separation, "update-ratio-low", "parameter-unchanged", "loss-plateau", "stalled-optimisation", "stalled-from-start", then=(*STUCK, *COLLAPSED))  # fmt: skip
def average_replaces_the_model(t: Training) -> None:
    """The running average, at 0.9999, is loaded into the model for each validation and, by a mistake of indentation, after each
    step. TrainCheck: parameters not updated."""
    average = copy.deepcopy(t.model.state_dict())

    def back(training: Training, step: int) -> None:
        for name, value in training.model.state_dict().items():
            average[name].lerp_(value, 1e-4)
        training.model.load_state_dict(average)

    t.after_step.append(back)


@fault(separation, "update-ratio-low", "stalled-optimisation", "loss-plateau", "stalled-from-start", "parameter-unchanged", then=(*STUCK, *COLLAPSED))  # fmt: skip
def epsilon_of_ten_thousand(t: Training) -> None:
    """Adam's epsilon is 1e4, with its sign lost: gradients are divided by it. Humbatova: optimiser's parameters; AutoTrainer: slow
    convergence."""
    t.optimize = lambda p: torch.optim.Adam(p, 2e-3, eps=1e4)
