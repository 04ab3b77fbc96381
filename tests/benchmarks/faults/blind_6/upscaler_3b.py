"""More of what goes wrong when pictures are enlarged: modes, types, depth, optimizers, single batches, logs."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from faults import upscaler
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update
from faults.upscaler import WIDTH, Upscaler, measure, result

BODY = ("body", "body.0", "body.1", "body.2", "body.3")


@fault(upscaler, "validation-in-train-mode", modules=("", *BODY), step=49)
def enlarged_without_eval(t: Training) -> None:
    """The blocks have BatchNorm, as in SRResNet, and the validation has `no_grad` only. TrainCheck: modes."""
    for block in t.model.body:
        block.activation = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.ReLU())

    def validate(training: Training, step: int, observer: Observer) -> None:
        with observer.phase("val"), torch.no_grad():
            batch = training.sample(step, "val")
            tensors = training.forward(training.model, batch)
        observer.log({"loss": float(tensors["loss"]), **training.measure(tensors, batch)}, "val", step)

    t.validate = validate


@fault(upscaler, "dropout-high", modules=BODY, then=(*STUCK, "dead-units", "gradient-zero", "activation-vanishing"))
def blocks_keep_five_percent(t: Training) -> None:
    """`Dropout(0.95)` in each block, where 0.95 was the share to keep. Humbatova: regularisation; TheDeepChecker: underfitting."""
    t.model = Upscaler(activation=lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.95)))


@fault(upscaler, "input-dtype", then=("precision-loss",))
def photos_in_float64(t: Training) -> None:
    """Pictures were divided by 255 in numpy, which makes float64 of them; the model converts. TrainCheck: dtype."""
    plain = t.sample
    t.sample = lambda step, phase: tuple(part.double() for part in plain(step, phase))
    t.forward = lambda model, batch: upscaler.forward(model, tuple(part.float() for part in batch))


@fault(upscaler, "metric-type", step=49)
def psnr_in_words(t: Training) -> None:
    """PSNR is returned as it is printed, with its unit. Humbatova: wrong metric."""
    t.measure = lambda tensors, batch: {"psnr_db": f"{measure(tensors, batch)['psnr_db']:.2f} dB"}


@fault(upscaler, "metric-grad", step=9)
def average_loss_as_a_tensor(t: Training) -> None:
    """`average += 0.1 * (loss - average)` keeps the graphs of all steps, and is logged. Humbatova: memory; PyTorch: `total_loss +=
    loss`."""
    average: list[torch.Tensor] = [torch.zeros(())]

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        average[0] = average[0] + 0.1 * (tensors["loss"] - average[0])
        if (step + 1) % 10 == 0:
            observer.log({"average_loss": average[0]}, "train", step)
        return batch, tensors

    t.update = update


@fault(upscaler, "metric-phase-mismatch", "metric-constant", "metric-missing", step=49, then=("metric-unexpected",))
def likeness_by_another_name(t: Training) -> None:
    """Training logs SSIM; validation looks for `ssim_y`, which nobody computes, and shows 0.0. Humbatova: wrong metric."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        if (step + 1) % 10 == 0:
            observer.log({"ssim": measure({"outputs": tensors["outputs"].detach()}, batch)["ssim"]}, "train", step)
        return batch, tensors

    def scores(tensors: Tensors, batch: Batch) -> dict[str, object]:
        known = measure(tensors, batch)
        return {"psnr_db": known["psnr_db"], "ssim": known.get("ssim_y", 0.0)}

    t.update, t.measure = update, scores


@fault(upscaler, "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "centre", "head"), step=110, then=(*NONFINITE,))  # fmt: skip
def brightest_pixel_of_a_night(t: Training) -> None:
    """Pictures are divided by their brightest pixel; from step 110 on one is black: 0 / 0. GRIST: division by zero."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        low, high = plain(step, phase)
        if phase == "train" and step >= 110:
            low[2], high[2] = 0.0, 0.0
        top = high.amax((1, 2, 3), keepdim=True)
        return low / top, high / top

    t.sample = sample


@fault(upscaler, "scheduler-ends-early", step=25, then=("schedule-restarted", "loss-spike", "schedule-unfinished", "update-ratio-low", "loss-diverged", "loss-plateau"))  # fmt: skip
def cosine_of_twenty_five(t: Training) -> None:
    """A cosine for 25 epochs is stepped with each batch: the rate falls and rises five times. TrainCheck: scheduler; Humbatova: learning
    rate."""
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 25)


@fault(upscaler, "gradient-clipping", "update-ratio-low", "stalled-optimisation", "loss-plateau", "stalled-from-start", then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def clipped_like_very_deep_networks(t: Training) -> None:
    """Gradients are clipped to a bound over the rate, as in VDSR, and the quotient is upside down: 1e-5, under SGD. TrainCheck: clipping;
    AutoTrainer: slow convergence."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)
    t.clip = 1e-5


@fault(upscaler, "parameter-unchanged", "gradient-zero", "stalled-from-start", then=(*STUCK, "update-ratio-low", "gradient-vanishing", "module-unused"))  # fmt: skip
def zeroed_right_before_the_step(t: Training) -> None:
    """`zero_grad` is called between `backward` and `step`. TrainCheck: misplaced `zero_grad`."""
    t.after_backward.append(lambda training, step: training.optimizer.zero_grad())


@fault(upscaler, "optimizer-frozen-parameters", "parameter-unchanged", modules=("head", *BODY, "merge"), then=("gradient-zero",))  # fmt: skip
def all_but_the_end_frozen(t: Training) -> None:
    """All but the end is frozen, as for another scale with trained weights; they are random. TrainCheck: frozen parameters; SageMaker
    UnchangedTensor."""
    t.optimizers = [t.optimize(list(t.model.parameters()))]
    for part in (t.model.head, t.model.body, t.model.merge):
        part.requires_grad_(False)


class Plain(nn.Module):
    """A convolution and a sigmoid, with no way around them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.sigmoid = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Sigmoid()

    def forward(self, x):
        return self.sigmoid(self.conv(x))


@fault(upscaler, "gradient-vanishing", "gradient-imbalance", "feature-constant", modules=("body", "head", ""), then=(*STUCK, "activation-vanishing", "update-ratio-low", "poor-initialisation"))  # fmt: skip
def nine_plain_sigmoid_layers(t: Training) -> None:
    """Nine layers with sigmoids and no residual, and the long skip taken out as well. AutoTrainer and SageMaker: vanishing gradients;
    Humbatova: wrong activation function."""

    class Straight(Upscaler):
        def forward(self, low):
            return self.restore(self.tail(self.upsample(self.merge(self.body(self.head(self.centre(low)))))))

    t.model = Straight()
    t.model.body = nn.Sequential(*(Plain() for _ in range(9)))


@fault(upscaler, "loss-diverged", "update-ratio-high", "loss-spike", "activation-exploding", "gradient-exploding", step=120, then=(*DIVERGES, *STUCK, *FLAT, "dead-units", "gradient-zero", "overfit", "parameter-unchanged"))  # fmt: skip
def resumed_with_another_rate(t: Training) -> None:
    """The run goes on at step 120 with a rate of 0.3 from the command line of an SGD run. TrainCheck: resumed runs; Humbatova: learning
    rate."""

    def resumed(training: Training, step: int) -> None:
        if step >= 120:
            for group in training.optimizer.param_groups:
                group["lr"] = 0.3

    t.before.append(resumed)


@fault(upscaler, "loss-spike", "input-range", "gradient-exploding", step=12, then=(*DIVERGES, "input-drift", "gradient-imbalance", "dead-units", "gradient-zero"))  # fmt: skip
def one_file_format_in_bytes(t: Training) -> None:
    """Files of one format, each twelfth batch, are read as 0 to 255, all others as 0 to 1. Humbatova: wrong preprocessing; SageMaker
    NotNormalizedData."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        factor = 255.0 if phase == "train" and step and step % 12 == 0 else 1.0
        return tuple(factor * part for part in plain(step, phase))

    t.sample = sample


@fault(upscaler, "activation-saturated", "input-range", modules=("", "head", *(f"body.{i}.activation" for i in range(4))), then=(*STUCK, *DIVERGES, "gradient-vanishing", "gradient-zero", "gradient-imbalance"))  # fmt: skip
def grey_levels_into_tanh(t: Training) -> None:
    """Blocks with tanh are given pictures from 0 to 255; the loss divides by 255. SageMaker SaturatedActivation and NotNormalizedData."""
    plain = t.sample
    t.model = Upscaler(activation=nn.Tanh)
    t.sample = lambda step, phase: tuple(255 * part for part in plain(step, phase))

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return result(outputs, batch, (outputs - batch[1]).abs().mean() / 255)

    t.forward = forward
    t.measure = lambda tensors, batch: measure({"outputs": tensors["outputs"] / 255}, (batch[0], batch[1] / 255))


@fault(upscaler, "update-ratio-low", "stalled-optimisation", "loss-plateau", "stalled-from-start", then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def epsilon_of_ten(t: Training) -> None:
    """Adam with an epsilon of 10, and a rate of 1e-4 from the paper: gradients of 0.3 are divided by it. Humbatova: optimiser's
    parameters."""
    t.optimize = lambda p: torch.optim.Adam(p, 1e-4, eps=10.0)


@fault(upscaler, "loss-sign", "loss-diverged", "activation-exploding", "weight-norm-drift", "gradient-exploding", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "metric-range", "overfit", "overtraining", "dead-units", "gradient-zero"))  # fmt: skip
def maximised_like_psnr(t: Training) -> None:
    """`maximize=True` stays in the optimizer when the loss becomes an error again. Humbatova: optimiser's parameters;
    TheDeepChecker: loss increases."""
    t.optimize = lambda p: torch.optim.Adam(p, 3e-3, maximize=True)


@fault(upscaler, "nonfinite-buffer", "nonfinite-input", "input-nonfinite", "nonfinite-activation", modules=("", "centre", "head", *BODY, *(f"body.{i}.activation.0" for i in range(4))), step=90, then=(*NONFINITE, "step-skipped", "gradient-zero", "overfit"))  # fmt: skip
def broken_picture_in_the_statistics(t: Training) -> None:
    """A broken file gives Inf at step 90; the loop takes out its gradients, but BatchNorm has seen it, and validation is NaN. TrainCheck:
    buffers."""
    plain = t.sample
    for block in t.model.body:
        block.activation = nn.Sequential(nn.BatchNorm2d(WIDTH), nn.ReLU())

    def sample(step: int, phase: str) -> Batch:
        low, high = plain(step, phase)
        if phase == "train" and step == 90:
            low[1, :, 4, 4] = torch.inf
        return low, high

    def leave_out(training: Training, step: int) -> None:
        if any(p.grad is not None and not p.grad.isfinite().all() for p in training.model.parameters()):
            training.optimizer.zero_grad()

    t.sample = sample
    t.after_backward.append(leave_out)
