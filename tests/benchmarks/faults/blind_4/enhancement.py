"""What goes wrong in enhancement: optimizers, lists of files, decibels, averages, dtypes, metrics, parts left out."""

from __future__ import annotations

import copy
from contextlib import suppress

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from faults import enhancement
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update
from faults.enhancement import BINS, WIDTH, compressed


def result(outputs: torch.Tensor, batch: Batch, loss: torch.Tensor) -> Tensors:
    return {"loss": loss, "outputs": outputs, "targets": batch[1]}


@fault(enhancement, "batch-order", "loss-plateau", "stalled-optimisation", step=20, then=(*STUCK, "audio-mixture", "overtraining"))  # fmt: skip
def targets_in_another_order(t: Training) -> None:
    """Only the list of the noisy files was sorted: each target belongs to another item. Humbatova: wrong labels."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        noisy, clean = plain(step, phase)
        return noisy, clean.roll(1, 0)

    t.sample = sample


@fault(enhancement, "optimizer-misses-parameters", "parameter-unchanged", modules=("mask", "layer3"), then=("gradient-accumulation", "gradient-exploding", "gradient-imbalance"))  # fmt: skip
def names_for_the_optimizer(t: Training) -> None:
    """Parameters are chosen by their names, by a pattern from a model of two layers: the third and the mask are in no
    optimizer. TrainCheck: parameters not in the optimizer; SageMaker UnchangedTensor."""
    chosen = [p for name, p in t.model.named_parameters() if name.startswith(("layer1", "layer2"))]
    t.optimizers = [t.optimize(chosen)]


@fault(enhancement, "optimizer-owns-others", "parameter-unchanged", then=(*STUCK, "optimizer-misses-parameters", "stalled-from-start", "update-ratio-low", "gradient-accumulation", "gradient-exploding"))  # fmt: skip
def optimizer_of_a_copy(t: Training) -> None:
    """The model is copied to its device after the optimizer was built. TrainCheck: the optimizer holds other parameters."""
    first = t.model
    t.optimizers = [t.optimize(list(first.parameters()))]
    t.model = copy.deepcopy(first)


@fault(enhancement, "gradient-zero", "parameter-unchanged", "module-unused", modules=("layer1",))
def features_without_gradient(t: Training) -> None:
    """The first layer is called a front end and detached, as a fixed one would be. TrainCheck; SageMaker UnchangedTensor."""
    t.model.layer1.register_forward_hook(lambda module, args, output: output.detach())


@fault(enhancement, "nonfinite-loss", modules=("",), then=(*NONFINITE, "step-skipped"))  # fmt: skip
def logarithm_of_clean_bins(t: Training) -> None:
    """A distance of logarithms without a floor: some clean bins are zero, and the loss is Inf at once. GRIST: log of zero."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return result(outputs, batch, F.l1_loss(torch.log(outputs), torch.log(batch[1])))

    t.forward = forward


@fault(enhancement, "nonfinite-input", "input-nonfinite", "nonfinite-activation", "audio-nonfinite", modules=("", "layer1", "layer1.conv"), step=100, then=NONFINITE)  # fmt: skip
def divided_by_its_own_peak(t: Training) -> None:
    """Each item is divided by its highest value; from step 100 on one of a batch is silent: 0 / 0. GRIST: division by zero."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        noisy, clean = plain(step, phase)
        if phase == "train" and step >= 100:
            noisy[5], clean[5] = 0.0, 0.0
        peak = noisy.amax((1, 2), keepdim=True)
        return noisy / peak, clean / peak

    t.sample = sample


@fault(enhancement, "nonfinite-activation", "nonfinite-loss", modules=("", "layer1", "layer1.conv"), then=(*NONFINITE, "input-range", "nonfinite-input", "input-nonfinite"))  # fmt: skip
def decibels_into_a_logarithm(t: Training) -> None:
    """Spectra come in dB from a new front end, and the model takes `log1p` of them, as it did of magnitudes. GRIST: log of a
    negative number; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        noisy, clean = plain(step, phase)
        return 20 * torch.log10(noisy + 1e-5), clean

    t.sample = sample


@fault(enhancement, "dead-units", "feature-constant", "gradient-zero", modules=("layer3",), then=("parameter-unchanged", "units-symmetric", "activation-vanishing", "gradient-vanishing", "module-unused"))  # fmt: skip
def shift_below_the_relu(t: Training) -> None:
    """The shift of the third normalisation starts at -8, as in a gate that is to open late; behind it is a ReLU. SageMaker
    DeadRelu."""
    nn.init.constant_(t.model.layer3.norm.bias, -8.0)


@fault(enhancement, "update-ratio-high", "activation-saturated", then=(*DIVERGES, *STUCK, *FLAT, "dead-units", "gradient-zero", "parameter-unchanged", "output-silent", "poor-initialisation"))  # fmt: skip
def rate_without_its_minus(t: Training) -> None:
    """`1e1` for `1e-1`, under Adam: weights grow to some tens at once. SageMaker WeightUpdateRatio and DeadRelu; Humbatova:
    learning rate."""
    t.optimize = lambda p: torch.optim.Adam(p, 1e1)


@fault(enhancement, "update-ratio-low", "stalled-optimisation", "loss-plateau", "stalled-from-start", then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def epsilon_of_one(t: Training) -> None:
    """Adam with an epsilon of 1, from a network of another scale: gradients of 0.01 are divided by it. Humbatova: optimiser's
    parameters; AutoTrainer: slow convergence."""
    t.optimize = lambda p: torch.optim.Adam(p, 1e-4, eps=1.0)


@fault(enhancement, "update-ratio-low", "scheduler-ends-early", "stalled-optimisation", "loss-plateau", step=40, then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def decay_per_step(t: Training) -> None:
    """A decay of 0.8, meant for an epoch, is applied after each step: the rate is 1e-7 after 40. TrainCheck; Humbatova:
    learning rate."""
    t.schedule = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)


@fault(enhancement, "scheduler-ends-early", step=30, then=("schedule-restarted", "loss-spike", "schedule-unfinished", "update-ratio-low", "loss-diverged", "loss-plateau"))  # fmt: skip
def cosine_of_thirty(t: Training) -> None:
    """A cosine over 30 epochs is stepped after each of 300 steps: the rate goes to zero and back up, five times. TrainCheck;
    Humbatova: learning rate."""
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 30)
    t.optimize = lambda p: torch.optim.Adam(p, 5e-3)


@fault(enhancement, "feature-constant", "batch-leak", modules=("layer1",), then=(*STUCK, "output-constant", "norm-input-variance"))  # fmt: skip
def averaged_over_items(t: Training) -> None:
    """A mean over channels that is taken over the batch (`dim=0`) and broadcast back: all items get the same features.
    Humbatova: wrong axis; UMLAUT: shapes."""
    t.model.layer1.register_forward_hook(lambda module, args, output: output.mean(0, keepdim=True).expand_as(output))


@fault(enhancement, "model-in-eval", modules=("",))
def dropout_without_effect(t: Training) -> None:
    """The helper that validates is called at the beginning and leaves `eval` on: dropout never acts. TrainCheck: modes."""
    t.model = enhancement.Enhancer(activation=lambda: nn.Sequential(nn.ReLU(), nn.Dropout(0.2)))

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.eval()
        return plain_update(training, step, observer)

    t.update = update


@fault(enhancement, "metric-constant", "metric-phase-mismatch", step=49, then=("metric-missing",))  # fmt: skip
def default_of_zero(t: Training) -> None:
    """Validation looks for an accuracy of speech activity by a name that only training uses, and shows the default of
    `get(..., 0.0)`. Humbatova: wrong metric; speech: metrics by name."""

    def accuracy(tensors: Tensors, batch: Batch) -> float:
        said, heard = (x.detach().mean(1) > 0.1 for x in (tensors["outputs"], batch[1]))
        return float((said == heard).float().mean())

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        if (step + 1) % 25 == 0:
            observer.log({"vad_accuracy": accuracy(tensors, batch)}, "train", step)
        return batch, tensors

    t.update = update
    t.measure = lambda tensors, batch: {
        **enhancement.measure(tensors, batch),
        "vad_accuracy": {"val_vad_accuracy": accuracy(tensors, batch)}.get("vad_accuracy", 0.0),
    }


@fault(enhancement, "metric-range", step=49)
def accuracy_added_up(t: Training) -> None:
    """The accuracy of speech activity is added up groups of items and never divided: 2 to 4 of 1. Humbatova: wrong
    metric."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        said, heard = (x.mean(1) > 0.1 for x in (tensors["outputs"], batch[1]))
        total = sum(float(part.float().mean()) for part in (said == heard).split(2))
        return {**enhancement.measure(tensors, batch), "vad_accuracy": total}

    t.measure = measure


@fault(enhancement, "metric-vanished", "metric-missing", step=149, then=("metric-phase-mismatch",))  # fmt: skip
def metric_swallowed_by_an_error(t: Training) -> None:
    """The program that computes a score has used up its temporary files, and what catches errors around it drops the score: it is not there
    from the third validation on. Humbatova: wrong metric; speech: PESQ."""
    plain = t.validate
    calls: list[int] = []

    def score(tensors: Tensors, batch: Batch) -> float:
        if len(calls) > 2:
            raise OSError
        return 1 + 3.5 * float(torch.cosine_similarity(tensors["outputs"].flatten(), batch[1].flatten(), 0))

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        metrics = enhancement.measure(tensors, batch)
        with suppress(OSError):
            metrics["pesq"] = score(tensors, batch)
        return metrics

    def validate(training: Training, step: int, observer: Observer) -> None:
        calls.append(step)
        plain(training, step, observer)

    t.measure, t.validate = measure, validate


@fault(enhancement, "update-ratio-low", "parameter-unchanged", "schedule-unfinished", "stalled-from-start", then=(*STUCK, "loss-plateau", "stalled-optimisation", "scheduler-ends-early"))  # fmt: skip
def warm_up_without_its_steps(t: Training) -> None:
    """The warm-up sets the rate to zero when it is built, and the loop was never told to step it. TrainCheck: scheduler;
    Humbatova: learning rate."""

    def optimize(parameters) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(parameters, 1e-3)
        LambdaLR(optimizer, lambda step: min(1.0, step / 50))
        return optimizer

    t.optimize = optimize


@fault(enhancement, "parameter-unchanged", "loss-plateau", "stalled-optimisation", "stalled-from-start", step=5, then=(*STUCK, "update-ratio-low"))  # fmt: skip
def slow_weights_stand_still(t: Training) -> None:
    """Lookahead that forgets to move its slow weights: every fifth step all weights are what they were at first. TrainCheck:
    parameters not updated."""
    slow = copy.deepcopy(t.model.state_dict())

    def back(training: Training, step: int) -> None:
        if (step + 1) % 5 == 0:
            training.model.load_state_dict(slow)

    t.after_step.append(back)


@fault(enhancement, "parameter-unchanged", then=(*STUCK, "update-ratio-low", "stalled-from-start", "precision-loss", "stalled-optimisation"))  # fmt: skip
def weights_in_bfloat16(t: Training) -> None:
    """The whole model is turned into bfloat16, not only its arithmetic: a step of 1e-4 is below the last digit of most
    weights, and of all gains.
    TrainCheck: dtype."""
    t.optimize = lambda p: torch.optim.Adam(p, 1e-4)
    t.model = t.model.bfloat16()

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0].bfloat16()).float()
        return result(outputs, batch, compressed(outputs, batch[1]))

    t.forward = forward


@fault(enhancement, "weight-norm-drift", "dead-units", step=50, then=(*DIVERGES, *STUCK, *FLAT, "activation-saturated", "gradient-zero", "units-symmetric", "overfit", "overtraining"))  # fmt: skip
def undamped_momentum(t: Training) -> None:
    """SGD with a momentum of 1, as nothing was to be lost: nothing ever slows down. Humbatova: optimiser's parameters;
    TheDeepChecker: unstable updates."""
    t.optimize = lambda p: torch.optim.SGD(p, 1.0, momentum=1.0)


@fault(enhancement, "loss-diverged", "loss-sign", step=10, then=(*DIVERGES, *STUCK, *FLAT, "activation-saturated", "gradient-vanishing", "update-ratio-high", "dead-units", "overfit", "overtraining", "output-collapse"))  # fmt: skip
def maximize_left_on(t: Training) -> None:
    """`maximize=True`, from a run that used the SNR, is left when the loss becomes an error. Humbatova: optimiser's parameters;
    TheDeepChecker: loss increases."""
    t.optimize = lambda p: torch.optim.Adam(p, 1e-3, maximize=True)


@fault(enhancement, "input-constant", "input-duplicate", "feature-constant", then=(*STUCK, *FLAT, "dead-units", "output-silent", "units-symmetric", "input-range", "gradient-zero", "audio-silent", "output-collapse", "activation-saturated", "poor-initialisation", "precision-headroom", "update-ratio-low"))  # fmt: skip
def clamped_at_the_wrong_end(t: Training) -> None:
    """A floor of 1e-6 for the spectra is written as `clamp(max=1e-6)`: all bins are alike. TheDeepChecker: constant inputs;
    Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        noisy, clean = plain(step, phase)
        return noisy.clamp(max=1e-6), clean

    t.sample = sample


@fault(enhancement, "input-range", "audio-scale", "activation-saturated", "output-silent", modules=("", "mask", "sigmoid", "layer1"), then=(*STUCK, *DIVERGES, *FLAT, "gradient-vanishing", "gradient-zero", "batch-order", "audio-mixture", "input-drift", "dead-units", "gradient-imbalance"))  # fmt: skip
def noisy_as_integers(t: Training) -> None:
    """Noisy files are read as int16, clean ones as floats: only a mask of nearly zero can fit. Speech: integer and float
    readers; SageMaker NotNormalizedData."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        noisy, clean = plain(step, phase)
        return 32768 * noisy, clean

    t.sample = sample


@fault(enhancement, "input-drift", "output-collapse", step=49, then=("overfit", "activation-saturated", "overtraining", "metric-range", "loss-plateau", "stalled-optimisation", "batch-order", "weight-norm-drift", "metric-constant", "gradient-vanishing", "update-ratio-low"))  # fmt: skip
def noise_added_in_validation_only(t: Training) -> None:
    """The augmentation that adds the noise in training is off: there the noisy spectrum is the clean one. Humbatova: wrong data;
    TheDeepChecker: overfitting."""
    plain = t.sample
    t.optimize = lambda p: torch.optim.Adam(p, 4e-3)

    def sample(step: int, phase: str) -> Batch:
        noisy, clean = plain(step, phase)
        return (clean if phase == "train" else noisy), clean

    t.sample = sample


@fault(enhancement, "overfit", "input-duplicate", step=1, then=("overtraining", "audio-duplicate", "loss-plateau"))
def ten_clips(t: Training) -> None:
    """A debugging switch that keeps one batch is left on. SageMaker Overfit; TrainCheck: data that is
    repeated."""
    plain, t.steps = t.sample, 400
    t.sample = lambda step, phase: plain(7 if phase == "train" else step, phase)
    t.optimize = lambda p: torch.optim.Adam(p, 5e-3)


class Sigmoids(nn.Module):
    """Nine convolutions with sigmoids, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(enhancement.Causal(WIDTH, WIDTH, lambda n: nn.Identity(), nn.Sigmoid) for _ in range(9))
        )

    def forward(self, x):
        return self.layers(x)


@fault(enhancement, "gradient-vanishing", "feature-constant", modules=("layer2",), then=(*STUCK, "activation-vanishing", "gradient-imbalance", "update-ratio-low", "poor-initialisation"))  # fmt: skip
def nine_sigmoids(t: Training) -> None:
    """The second layer is a stack of nine sigmoids without normalisation: gradients shrink fourfold in each. AutoTrainer and
    SageMaker: vanishing gradients."""
    t.model.layer2 = Sigmoids()


class OfIntegers(enhancement.Enhancer):
    """Magnitudes as they come."""

    def forward(self, noisy):
        x = self.layer1(noisy)
        x = x + self.layer2(x)
        return self.sigmoid(self.mask(x + self.layer3(x))) * noisy


@fault(enhancement, "activation-saturated", "input-range", "audio-scale", modules=("layer1", "layer1.activation"), then=(*STUCK, "gradient-vanishing", "gradient-zero", "gradient-imbalance", "input-drift"))  # fmt: skip
def raw_magnitudes_into_tanh(t: Training) -> None:
    """Magnitudes of int16 samples go into tanh without a logarithm or normalisation. SageMaker SaturatedActivation and
    NotNormalizedData."""
    t.model, plain = OfIntegers(norm=lambda n: nn.Identity(), activation=nn.Tanh), t.sample
    t.sample = lambda step, phase: tuple(3000 * part for part in plain(step, phase))

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return result(outputs, batch, compressed(outputs / 3000, batch[1] / 3000))

    t.forward = forward


class Refined(enhancement.Enhancer):
    """With a second stage, which nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.refine = enhancement.Causal(BINS, BINS, nn.LayerNorm, nn.ReLU)


@fault(enhancement, "module-unused", "gradient-zero", "parameter-unchanged", modules=("refine",))
def second_stage_not_called(t: Training) -> None:
    """A stage that refines the result is built, and `forward` ends before it. TrainCheck; Humbatova: missing layer."""
    t.model = Refined()


@fault(enhancement, "gradient-zero", "dtype-headroom", "gradient-vanishing", "parameter-unchanged", then=(*STUCK, "update-ratio-low", "loss-plateau", "stalled-optimisation", "stalled-from-start", "precision-loss", "module-unused"))  # fmt: skip
def small_loss_in_half(t: Training) -> None:
    """float16 without a gradient scaler, and a weight of 1e-4 on the loss: gradients are below the smallest number. TrainCheck:
    mixed precision."""
    t.precision, t.steps = torch.float16, 150

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return result(outputs, batch, 1e-4 * compressed(outputs.float(), batch[1]))

    t.forward = forward


class Attentive(nn.Module):
    """Attention over past frames: (batch, channels, frames)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x):
        x = x.transpose(1, 2)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return self.attention(x, x, x, attn_mask=later, need_weights=False)[0].transpose(1, 2)


@fault(enhancement, "attention-head-dead", modules=("layer2", "layer2.attention"), then=("gradient-zero", "dead-units", "feature-constant", "parameter-unchanged", "units-symmetric", "poor-initialisation"))  # fmt: skip
def head_lost_in_conversion(t: Training) -> None:
    """A converted checkpoint of three heads fills a model of four: values and outputs of the last one stay zero. SageMaker
    AllZero; TheDeepChecker: zero weights."""
    t.model.layer2 = Attentive()
    with torch.no_grad():
        t.model.layer2.attention.in_proj_weight[-8:] = 0.0
        t.model.layer2.attention.in_proj_bias[-8:] = 0.0
        t.model.layer2.attention.out_proj.weight[:, -8:] = 0.0


@fault(enhancement, "update-ratio-high", "loss-diverged", "gradient-exploding", "loss-spike", then=(*DIVERGES, *STUCK, *FLAT, *NONFINITE, "activation-saturated", "dead-units", "gradient-zero", "gradient-vanishing", "output-silent"))  # fmt: skip
def summed_over_all_bins(t: Training) -> None:
    """`reduction="sum"` under SGD whose rate was for a mean: 7200 times as much. TheDeepChecker: missing reduction."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.3, momentum=0.9)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        loss = F.mse_loss((outputs + 1e-4) ** 0.3, (batch[1] + 1e-4) ** 0.3, reduction="sum")
        return result(outputs, batch, loss)

    t.forward = forward


@fault(enhancement, "weight-norm-drift", "activation-vanishing", "feature-constant", step=20, then=(*STUCK, *FLAT, *DIVERGES, "dead-units", "output-constant", "overfit", "overtraining"))  # fmt: skip
def squares_of_weights_in_the_loss(t: Training) -> None:
    """A penalty on squared weights is added without its factor of 1e-5: the network is pulled to zero. Humbatova:
    regularisation; TheDeepChecker: underfitting."""
    t.optimize = lambda p: torch.optim.Adam(p, 5e-3)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = enhancement.forward(model, batch)
        return {**tensors, "loss": tensors["loss"] + sum(p.square().sum() for p in model.parameters())}

    t.forward = forward
