"""What goes wrong in variational autoencoders: repeated parts, second optimizers, restarts, wrong modes of metrics and rates."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from faults import generator
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, seeded


def shown(t: Training, change) -> None:
    """Pictures pass through `change(x, step, phase)`."""
    plain = t.sample
    t.sample = lambda step, phase: (change(plain(step, phase)[0].clone(), step, phase),)


@fault(generator, "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "encoder"), step=85, then=(*NONFINITE, "nonfinite-buffer", "output-constant", "prediction-collapse"))  # fmt: skip
def gamma_of_dark_pixels(t: Training) -> None:
    """The gamma is taken off by `x ** 0.45` after a dark frame has been subtracted; from step 85 on some pixels are below zero: NaN. GRIST:
    power of a negative number."""

    def change(x, step, phase):
        dark = 0.02 * torch.rand(x.shape, generator=seeded(41, step)) if phase == "train" and step >= 85 else 0.0
        return (x - dark) ** 0.45

    shown(t, change)


@fault(generator, "input-drift", step=49, then=("overfit", "overtraining", "loss-diverged", "metric-range"))
def black_and_white_exchanged(t: Training) -> None:
    """Validation pictures are ink on paper, those of the training light on black. Humbatova: wrong preprocessing; SageMaker
    CheckInputImages."""
    shown(t, lambda x, step, phase: 1 - x if phase == "val" else x)


@fault(generator, "input-constant", "input-drift", "input-duplicate", step=49, then=("overfit", "overtraining", "output-constant", "feature-constant", "metric-range", "loss-diverged", "metric-nonfinite"))  # fmt: skip
def cut_outside_of_the_page(t: Training) -> None:
    """Validation pictures are cut at offsets of a larger scan, outside of the page: all black. TheDeepChecker: constant inputs;
    Humbatova: wrong data."""
    shown(t, lambda x, step, phase: 0 * x if phase == "val" else x)


@fault(generator, "optimizer-owns-others", "parameter-unchanged", "optimizer-misses-parameters", then=(*STUCK, "gradient-accumulation", "gradient-exploding"))  # fmt: skip
def decoder_and_encoder_built_twice(t: Training) -> None:
    """A cell of the notebook is run again and makes a new model; the optimizer holds the old one. TrainCheck: parameters of another
    model; UMLAUT."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model = generator.Generator()


@fault(generator, "optimizer-misses-parameters", "parameter-unchanged", modules=("encoder.log_variance", "encoder"), then=("update-ratio-low", "gradient-accumulation", "gradient-exploding", "gradient-imbalance"))  # fmt: skip
def second_head_added_later(t: Training) -> None:
    """From an autoencoder a variational one was made: the new head is set after the optimizer was built. TrainCheck: parameters not in
    the optimizer."""
    t.optimizers = [t.optimize(p for name, p in t.model.named_parameters() if "log_variance" not in name)]


@fault(generator, "dropout-high", modules=("decoder.activation",), then=("loss-plateau", "dead-units", "loss-spike", "output-constant", "feature-constant", "overtraining"))  # fmt: skip
def keep_probability_in_the_decoder(t: Training) -> None:
    """`Dropout(0.95)` behind the first layer of the decoder, 0.95 being the share to keep. Humbatova: wrong dropout."""
    t.model.decoder.activation = nn.Sequential(nn.ReLU(), nn.Dropout(0.95))


@fault(generator, "units-symmetric", "poor-initialisation", modules=("encoder", "decoder"), then=(*DIVERGES, *STUCK, *FLAT, "norm-input-variance", "gradient-zero", "gradient-imbalance"))  # fmt: skip
def kernels_all_of_one_value(t: Training) -> None:
    """`apply` of a function that fills each matrix with 0.05 and each bias of a layer with 0: channels are copies of one another.
    TheDeepChecker: symmetry; SageMaker PoorWeightInitialization."""
    for module in t.model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.constant_(module.weight, 0.05)
            nn.init.zeros_(module.bias)


@fault(generator, "loss-spike", "update-ratio-high", step=60, then=(*DIVERGES, *STUCK))
def resumed_from_the_first_file(t: Training) -> None:
    """Every 60 steps the job is cut off and resumed, always from the checkpoint with the number 0. TrainCheck: something writes weights
    back; Humbatova: training process."""
    first = copy.deepcopy(t.model.state_dict())

    def load(training: Training, step: int) -> None:
        if step and step % 60 == 0:
            training.model.load_state_dict(first)

    t.before.append(load)


@fault(generator, "loss-diverged", "loss-spike", "update-ratio-high", step=130, then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "output-constant", "gradient-zero"))  # fmt: skip
def restart_a_hundred_times_higher(t: Training) -> None:
    """A warm restart at step 130, whose rate is given as a factor and taken for a rate: 150 times too high. Humbatova: learning
    rate; SageMaker WeightUpdateRatio."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: 1.0 if step < 130 else 150.0)


@fault(generator, "scheduler-ends-early", then=("loss-spike", "schedule-unfinished"))
def cosine_of_fifty_batches(t: Training) -> None:
    """`T_max` is the number of batches between two evaluations: the rate touches zero and rises, over and over. Humbatova: learning
    rate."""
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 50)


@fault(
    generator,
    "gradient-clipping",
    "update-ratio-low",
    "loss-plateau",
    "stalled-optimisation",
    then=(*STUCK, "output-constant"),
)
def bound_for_averaged_losses(t: Training) -> None:
    """The bound 0.001 is from when the loss was a mean over pixels; it is a sum now, and gradients are in the hundreds; SGD. TrainCheck:
    wrong clip."""
    t.optimize, t.clip = (lambda p: torch.optim.SGD(p, 0.01, momentum=0.9)), 1e-3


@fault(generator, "gradient-exploding", "update-ratio-high", "loss-diverged", "loss-spike", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "gradient-zero", "output-constant", "gradient-imbalance"))  # fmt: skip
def sum_over_the_batch_with_sgd(t: Training) -> None:
    """Sums over pixels and over items, under SGD with a rate for means. TheDeepChecker: missing reduction; AutoTrainer:
    exploding gradient."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits, mean, log_variance = model(batch[0])
        apart = generator.divergence(mean, log_variance)
        loss = F.binary_cross_entropy_with_logits(logits, batch[0], reduction="sum") + model.beta * apart.sum()
        return {"loss": loss, "divergence": apart.mean(), "outputs": logits.sigmoid(), "targets": batch[0]}

    t.forward = forward


@fault(generator, "metric-vanished", "metric-missing", step=149, then=("metric-phase-mismatch",))
def divergence_no_longer_returned(t: Training) -> None:
    """After the warm-up another branch of the evaluation runs, whose dictionary lacks the divergence. Speech and others: metrics that
    are missing; Humbatova: wrong validation metric."""
    plain = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        metrics = plain(tensors, batch)
        return metrics if tensors["beta"] < 1 else {"explained": metrics["explained"]}

    plain_forward = t.forward
    t.forward = lambda model, batch: {**plain_forward(model, batch), "beta": torch.tensor(model.beta)}
    t.measure = measure


@fault(generator, "metric-phase-mismatch", step=49)
def loss_of_the_last_step_again(t: Training) -> None:
    """The function that validates returns the loss that it finds in the trainer: that of the last training step. Humbatova: wrong
    validation metric."""
    last: list[float] = []

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        last[:] = [float(tensors["loss"].detach())]
        return batch, tensors

    def validate(training: Training, step: int, observer: Observer) -> None:
        training.model.eval()
        with observer.phase("val"), torch.no_grad():
            batch = training.sample(step, "val")
            tensors = training.forward(training.model, batch)
        observer.log({"loss": last[0], **training.measure(tensors, batch)}, "val", step)

    t.update, t.validate = update, validate


@fault(generator, "metric-grad", step=49)
def evaluated_with_its_graph(t: Training) -> None:
    """The evaluation has no `no_grad()`, and its losses are kept as tensors for a plot. PyTorch FAQ; Humbatova: GPU memory."""
    kept: list[torch.Tensor] = []

    def validate(training: Training, step: int, observer: Observer) -> None:
        training.model.eval()
        with observer.phase("val"):
            batch = training.sample(step, "val")
            tensors = training.forward(training.model, batch)
            kept.append(tensors["loss"])
        observer.log({"loss": kept[-1], **training.measure(tensors, batch)}, "val", step)

    t.validate = validate
