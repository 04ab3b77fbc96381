"""What goes wrong when a diffusion model is trained: pictures, batches, modes, layers, formats, metrics."""

from __future__ import annotations

import torch
from torch import nn

from faults import diffuser
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update
from faults.diffuser import LEVELS, Denoiser, kept, measure, result

BLOCKS = ("down", "middle1", "middle2", "up")


def clean(batch: Batch) -> torch.Tensor:
    """The pictures without their noise."""
    noisy, times, noise = batch
    return (noisy - (1 - kept(times)).sqrt() * noise) / kept(times).sqrt()


def again(x: torch.Tensor, batch: Batch) -> Batch:
    """The same noise on other pictures."""
    noise, share = batch[2], kept(batch[1])
    return share.sqrt() * x + (1 - share).sqrt() * noise, batch[1], noise


@fault(diffuser, "input-range", modules=("", "stem"), then=(*STUCK, *DIVERGES, "gradient-imbalance", "poor-initialisation", "gradient-clipping"))  # fmt: skip
def pictures_as_bytes(t: Training) -> None:
    """Pictures come from 0 to 255, the noise has a deviation of one: it can hardly be seen. SageMaker NotNormalizedData; Humbatova:
    wrong preprocessing."""
    plain = t.sample
    t.sample = lambda step, phase: again(127.5 * (clean(batch := plain(step, phase)) + 1), batch)


@fault(diffuser, "input-drift", "input-range", step=44, then=("overfit", "overtraining", "metric-range", "loss-diverged", "activation-exploding"))  # fmt: skip
def validation_in_bytes(t: Training) -> None:
    """Only the loader for training brings pictures from 0 to 255 to -1 to 1. Humbatova: wrong preprocessing; SageMaker
    NotNormalizedData."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        batch = plain(step, phase)
        return again(127.5 * (clean(batch) + 1), batch) if phase == "val" else batch

    t.sample = sample


@fault(diffuser, "input-duplicate", then=("overfit", "overtraining"))
def workers_draw_the_same_noise(t: Training) -> None:
    """Four workers have one seed: they draw the same three pictures, levels and noises. TrainCheck: workers with one seed, as with
    numpy's generator in PyTorch's loader."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        batch = plain(step, phase)
        return tuple(part[:3].repeat(4, *(1,) * (part.dim() - 1)) for part in batch) if phase == "train" else batch

    t.sample = sample


@fault(diffuser, "input-duplicate", "overfit", step=1, then=("overtraining", "loss-plateau"))
def fixed_batch_for_debugging(t: Training) -> None:
    """The one batch that was to be learnt by heart, with its levels and noise, is still in place. SageMaker Overfit; TrainCheck:
    data that is repeated."""
    plain = t.sample
    t.sample = lambda step, phase: plain(3 if phase == "train" else step, phase)


@fault(diffuser, "input-constant", "input-duplicate", "feature-constant", modules=("", "stem"), then=(*STUCK, *FLAT, "output-silent"))  # fmt: skip
def divided_as_integers(t: Training) -> None:
    """The pictures are lost in a conversion to integers before their scaling, `x.long() // 255`, and the noise with them: black pictures.
    TheDeepChecker: constant inputs; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        noisy, times, noise = plain(step, phase)
        return ((noisy.clamp(-1, 1) + 1) * 127).long() // 255 * 2.0 - 1, times, noise

    t.sample = sample


@fault(diffuser, "validation-in-train-mode", modules=("", *BLOCKS, "attention", "norm"), step=44)
def evaluation_without_eval(t: Training) -> None:
    """With BatchNorm, the validation that the trainer was given has `no_grad` and no `eval`. TrainCheck: modes."""
    t.model = Denoiser(norm=nn.BatchNorm2d)

    def validate(training: Training, step: int, observer: Observer) -> None:
        with observer.phase("val"), torch.no_grad():
            batch = training.sample(step, "val")
            tensors = training.forward(training.model, batch)
        observer.log({"loss": float(tensors["loss"]), **training.measure(tensors, batch)}, "val", step)

    t.validate = validate


@fault(
    diffuser,
    "model-in-eval",
    modules=("", *BLOCKS, "attention", "norm"),
    step=45,
    then=("norm-input-variance", "overfit"),
)
def sampler_leaves_eval_on(t: Training) -> None:
    """Pictures are drawn after the first validation, in eval mode, in which the model stays; it has BatchNorm and dropout. TrainCheck:
    modes."""
    t.model = Denoiser(norm=nn.BatchNorm2d, activation=lambda: nn.Sequential(nn.SiLU(), nn.Dropout(0.05)))

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.train(step < 45)
        return plain_update(training, step, observer)

    t.update = update


@fault(diffuser, "dropout-high", modules=BLOCKS, then=(*STUCK, "gradient-clipping", "dead-units", "gradient-exploding", "feature-constant", "activation-vanishing"))  # fmt: skip
def share_to_keep_is_dropped(t: Training) -> None:
    """0.95 is the share to keep in the paper's code, and the share to drop here. Humbatova: regularisation; TheDeepChecker:
    underfitting."""
    for block in (t.model.get_submodule(name) for name in BLOCKS):
        for name in ("activation1", "activation2"):
            setattr(block, name, nn.Sequential(nn.SiLU(), nn.Dropout(0.95)))


@fault(diffuser, "loss-input-mismatch", "activation-saturated", "loss-plateau", "stalled-optimisation", modules=("out", "out.1", ""), then=(*STUCK, "gradient-vanishing", "gradient-zero", "weight-norm-drift"))  # fmt: skip
def sigmoid_for_the_noise(t: Training) -> None:
    """The last layer ends in a sigmoid, as a generator of pictures from 0 to 1 does; the noise has both signs. Humbatova: wrong
    activation function; SageMaker SaturatedActivation."""
    t.model.out = nn.Sequential(t.model.out, nn.Sigmoid())


@fault(diffuser, "loss-spike", "input-range", step=10, then=(*DIVERGES, "input-drift", "gradient-clipping", "gradient-imbalance"))  # fmt: skip
def one_shard_in_bytes(t: Training) -> None:
    """One of ten shards holds pictures from 0 to 255, the others from -1 to 1. Humbatova: wrong preprocessing; SageMaker
    NotNormalizedData."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        batch = plain(step, phase)
        return again(127.5 * (clean(batch) + 1), batch) if phase == "train" and step % 10 == 0 and step else batch

    t.sample = sample


@fault(diffuser, "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "stem"), step=90, then=NONFINITE)  # fmt: skip
def contrast_of_an_empty_sample(t: Training) -> None:
    """Pictures are brought to the same contrast by a division by their deviation; from step 90 on one is empty: 0 / 0. GRIST: division by
    zero."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        batch = plain(step, phase)
        x = clean(batch)
        if phase == "train" and step >= 90:
            x[5] = -1.0
        x = x - x.mean((2, 3), keepdim=True)
        return again(x / x.std((2, 3), keepdim=True), batch)

    t.sample = sample


@fault(diffuser, "dead-units", "gradient-zero", "feature-constant", "poor-initialisation", modules=("middle1",), then=("parameter-unchanged", "units-symmetric", "activation-vanishing", "gradient-vanishing", "norm-input-variance"))  # fmt: skip
def shift_of_a_gate(t: Training) -> None:
    """ReLUs in place of SiLUs, and the second normalisation of a block begins with a shift of -9, which was meant for a gate's sigmoid.
    SageMaker DeadRelu."""
    t.model = Denoiser(activation=nn.ReLU)
    nn.init.constant_(t.model.middle1.norm2.bias, -9.0)


class Deeper(Denoiser):
    """With a second attention, which nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.attention2 = diffuser.Attention(2 * diffuser.WIDTH, lambda channels: nn.GroupNorm(4, channels))


@fault(diffuser, "module-unused", "gradient-zero", "parameter-unchanged", modules=("attention2",))
def second_attention_not_called(t: Training) -> None:
    """An attention for the larger pictures is built, and `forward` was not changed. TrainCheck; Humbatova: missing layer."""
    t.model = Deeper()


@fault(diffuser, "optimizer-frozen-parameters", "parameter-unchanged", modules=("down", "middle1", "middle2", "up"), then=("gradient-zero",))  # fmt: skip
def frozen_as_for_an_adapter(t: Training) -> None:
    """All blocks are frozen, by a recipe for adapters on a trained model; here they begin at random. TrainCheck: frozen
    parameters; SageMaker UnchangedTensor."""
    t.optimizers = [t.optimize(list(t.model.parameters()))]
    for name in BLOCKS:
        t.model.get_submodule(name).requires_grad_(False)


@fault(diffuser, "parameter-unchanged", "precision-loss", then=(*STUCK, "dtype-headroom", "update-ratio-low"))
def whole_model_in_bfloat16(t: Training) -> None:
    """The model itself is in bfloat16, with a rate of 1e-4: most steps are below the last digit of the weights. TrainCheck:
    dtype."""
    t.model = t.model.bfloat16()
    t.optimize = lambda p: torch.optim.AdamW(p, 1e-4)
    t.forward = lambda model, batch: result(model(batch[0].bfloat16(), batch[1].bfloat16()).float(), batch)


@fault(diffuser, "metric-nonfinite", step=44)
def error_of_levels_that_are_not_there(t: Training) -> None:
    """The error of the noisier half takes levels above 50, but times go from 0 to 1: the mean of nothing. Humbatova: wrong
    metric."""

    def scores(tensors: Tensors, batch: Batch) -> dict[str, object]:
        error = (tensors["outputs"] - batch[2]).square().mean((1, 2, 3))
        return {**measure(tensors, batch), "late_error": float(error[batch[1] > LEVELS / 2].mean())}

    t.measure = scores


@fault(diffuser, "metric-range", step=44)
def denoising_accuracy_in_percent(t: Training) -> None:
    """The share of pixels whose noise has the right sign is shown as a percentage, under the name of a share. Humbatova: wrong
    metric."""

    def scores(tensors: Tensors, batch: Batch) -> dict[str, object]:
        right = (tensors["outputs"] > 0) == (batch[2] > 0)
        return {**measure(tensors, batch), "sign_accuracy": 100 * float(right.float().mean())}

    t.measure = scores


@fault(diffuser, "loss-diverged", "loss-spike", "update-ratio-high", "activation-exploding", step=90, then=(*FLAT, *DIVERGES, *STUCK, "input-drift", "overfit", "activation-saturated", "attention-head-dead"))  # fmt: skip
def rate_of_the_state_dict(t: Training) -> None:
    """The run goes on at step 90 with an optimizer whose rate is read from another run: 400 times as large. TrainCheck: resumed runs;
    Humbatova: learning rate."""

    def resumed(training: Training, step: int) -> None:
        if step >= 90:
            for group in training.optimizer.param_groups:
                group["lr"] = 0.8

    t.before.append(resumed)


@fault(diffuser, "parameter-unchanged", "gradient-zero", "stalled-from-start", then=(*STUCK, "update-ratio-low", "gradient-vanishing", "module-unused"))  # fmt: skip
def gradients_emptied_before_the_step(t: Training) -> None:
    """`zero_grad` has come to stand behind `backward`. TrainCheck: misplaced `zero_grad`."""
    t.after_backward.append(lambda training, step: training.optimizer.zero_grad())


@fault(diffuser, "attention-head-dead", "units-symmetric", modules=("attention", "attention.heads"), then=("gradient-zero", "poor-initialisation", "dead-units"))  # fmt: skip
def three_of_four_heads_loaded(t: Training) -> None:
    """A checkpoint of three heads fills four: queries, keys and values of the last one are zero, and so is its part of the output.
    SageMaker AllZero; TheDeepChecker: zero weights."""
    heads, width = t.model.attention.heads, 2 * diffuser.WIDTH
    with torch.no_grad():
        heads.in_proj_weight.view(3, 4, width // 4, width)[:, 3] = 0.0
        heads.out_proj.weight[:, -width // 4 :] = 0.0


@fault(diffuser, "input-dtype", then=("precision-loss",))
def pictures_in_float64(t: Training) -> None:
    """Pictures were made with numpy, in float64, and are converted inside of the model. TrainCheck: dtype."""
    plain = t.sample
    t.sample = lambda step, phase: tuple(part.double() for part in plain(step, phase))
    t.forward = lambda model, batch: diffuser.forward(model, tuple(part.float() for part in batch))


@fault(diffuser, "module-unused", "gradient-zero", "parameter-unchanged", "feature-constant", modules=("embed", *(f"{block}.time" for block in BLOCKS)), then=("dead-units", "activation-vanishing", "units-symmetric", "gradient-vanishing"))  # fmt: skip
def time_never_added(t: Training) -> None:
    """Times are embedded and brought to the channels of each block, and the sum of both was lost in a merge. TrainCheck; Humbatova:
    missing connection."""
    for block in (t.model.get_submodule(name) for name in BLOCKS):
        block.time.register_forward_hook(lambda module, args, output: torch.zeros_like(output))


@fault(diffuser, "nonfinite-optimizer", "nonfinite-parameter", modules=("", *BLOCKS, "embed", "stem", "smaller", "attention", "larger", "norm", "out"), step=19, then=(*NONFINITE, "scheduler-ends-early"))  # fmt: skip
def cosine_without_any_steps(t: Training) -> None:
    """After the warm-up of 20 steps comes a cosine over 20 - 20 steps: its progress is 0 / 0, and the rate NaN. GRIST: division by
    zero."""
    warm, total = torch.tensor(20.0), torch.tensor(20.0)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / float(warm)
        return float(0.5 * (1 + torch.cos(torch.pi * (step - warm) / (total - warm))))

    t.schedule = lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@fault(diffuser, "metric-vanished", "metric-missing", step=134, then=("metric-phase-mismatch",))
def score_of_the_first_half(t: Training) -> None:
    """A slow score is left out in the second half of the run, in which nobody was to look at it. Humbatova: wrong metric."""
    plain, now = t.validate, [0]

    def validate(training: Training, step: int, observer: Observer) -> None:
        now[0] = step
        plain(training, step, observer)

    def scores(tensors: Tensors, batch: Batch) -> dict[str, object]:
        known = measure(tensors, batch)
        return known if now[0] < training_half else {"explained": known["explained"]}

    training_half = t.steps // 2
    t.validate, t.measure = validate, scores
