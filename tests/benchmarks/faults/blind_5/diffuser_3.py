"""What goes wrong when a diffusion model is trained: times, noise, initial weights, rates, optimizers, gradients."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from faults import diffuser
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, update_of_two
from faults.diffuser import WIDTH, Denoiser, kept, result

BLOCKS = ("down", "middle1", "middle2", "up")
EMBED = ("embed", "embed.linear1", "embed.activation", "embed.linear2")


@fault(diffuser, "feature-constant", modules=(*EMBED, *(f"{block}.time" for block in BLOCKS)), then=("loss-plateau", "stalled-optimisation", "gradient-zero", "input-constant"))  # fmt: skip
def times_turned_into_integers(t: Training) -> None:
    """Times from 0 to 1 are made integers, as the numbers of levels were before: all are 0, and the embedding says the same of
    every item. TrainCheck: dtype; Humbatova: wrong preprocessing."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        return result(model(batch[0], batch[1].long()), batch)

    t.forward = forward


@fault(diffuser, "dead-units", "gradient-zero", "feature-constant", "poor-initialisation", modules=EMBED, then=("parameter-unchanged", "units-symmetric", "activation-vanishing", "gradient-vanishing", "module-unused"))  # fmt: skip
def embedding_shut_from_the_start(t: Training) -> None:
    """A ReLU in the embedding of the times, and a first layer whose biases are read from a file of another unit, at -40. SageMaker
    DeadRelu."""
    t.model.embed.activation = nn.ReLU()
    nn.init.constant_(t.model.embed.linear1.bias, -40.0)


@fault(diffuser, "gradient-zero", "parameter-unchanged", modules=EMBED, then=("module-unused", "optimizer-misses-parameters", "gradient-vanishing"))  # fmt: skip
def embedding_under_no_grad(t: Training) -> None:
    """Times are embedded under `no_grad`, since they are constants; the two layers are not. TrainCheck: parameters not
    updated."""
    t.model.embed.forward = torch.no_grad()(t.model.embed.forward)


@fault(diffuser, "gradient-zero", "parameter-unchanged", modules=("stem", "down", "smaller", "middle1"), then=("module-unused", "gradient-vanishing"))  # fmt: skip
def contracting_half_detached(t: Training) -> None:
    """The results of the contracting half are kept for the other half with `.detach()`, to save memory. TrainCheck: parameters
    not updated; SageMaker UnchangedTensor."""
    t.model.down.register_forward_hook(lambda module, args, output: output.detach())
    t.model.middle1.register_forward_hook(lambda module, args, output: output.detach())


@fault(diffuser, "gradient-zero", "parameter-unchanged", "poor-initialisation", "feature-constant", "stalled-from-start", "dead-units", "output-constant", modules=("norm", "out", "activation", ""), then=(*STUCK, *FLAT, "units-symmetric", "module-unused", "gradient-imbalance", "update-ratio-low", "output-silent", "gradient-exploding", "weight-decay-on-norms"))  # fmt: skip
def zeros_on_both_sides(t: Training) -> None:
    """The last convolution begins at zero, as it should, and so does the gain of the normalisation before it: neither gets a gradient.
    TheDeepChecker: zero weights; SageMaker AllZero."""
    for parameter in (*t.model.out.parameters(), *t.model.norm.parameters()):
        nn.init.zeros_(parameter)


@fault(diffuser, "gradient-accumulation", step=1, then=(*DIVERGES, *STUCK, "gradient-clipping", "overfit"))
def gradients_of_all_steps(t: Training) -> None:
    """`zero_grad` went with the old trainer; the new one steps with the sum of all gradients so far. TrainCheck: missing
    `zero_grad`."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


@fault(diffuser, "loss-sign", "gradient-exploding", "activation-exploding", then=(*DIVERGES, *STUCK, *FLAT, "overfit", "overtraining", "gradient-clipping", "metric-range", "gradient-imbalance"))  # fmt: skip
def bound_without_its_minus(t: Training) -> None:
    """The likelihood's lower bound, which is minus the squared error, is handed on as the loss. Humbatova: wrong
    loss; TheDeepChecker: loss increases."""
    t.forward = lambda model, batch: result(outputs := model(batch[0], batch[1]), batch, -F.mse_loss(outputs, batch[2]))


@fault(diffuser, "gradient-clipping", "update-ratio-low", "stalled-optimisation", "loss-plateau", "stalled-from-start", "parameter-unchanged", then=(*STUCK, "gradient-exploding"))  # fmt: skip
def bound_of_a_millionth(t: Training) -> None:
    """SGD, and gradients clipped to 1e-6, which was meant as the epsilon of the clipping. TrainCheck: clipping; AutoTrainer: slow
    convergence."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)
    t.clip = 1e-6


@fault(diffuser, "optimizer-misses-parameters", "parameter-unchanged", "optimizer-owns-others", modules=("stem",), then=("model-changed", "gradient-accumulation", "gradient-exploding", "gradient-imbalance", "gradient-clipping"))  # fmt: skip
def stem_for_grey_pictures(t: Training) -> None:
    """The first convolution is replaced by one for grey pictures after the optimizer was built. TrainCheck: parameters not in the
    optimizer; SageMaker UnchangedTensor."""
    t.optimizers = [t.optimize(list(t.model.parameters()))]
    t.model.stem = nn.Conv2d(1, WIDTH, 3, padding=1)


@fault(diffuser, "optimizer-owns-others", "optimizer-misses-parameters", "parameter-unchanged", "stalled-from-start", then=(*STUCK, "update-ratio-low", "gradient-accumulation", "gradient-exploding", "gradient-imbalance", "gradient-clipping"))  # fmt: skip
def optimizer_of_the_average(t: Training) -> None:
    """The optimizer is given the parameters of the running average, which is never trained. TrainCheck: the optimizer holds other
    parameters."""
    t.optimizers = [t.optimize(list(copy.deepcopy(t.model).parameters()))]


@fault(diffuser, "update-ratio-low", "parameter-unchanged", "loss-plateau", "stalled-optimisation", "stalled-from-start", then=STUCK)  # fmt: skip
def average_is_trained_on(t: Training) -> None:
    """The running average of the weights, at 0.9999, is copied back into the model after each step. TrainCheck: parameters not
    updated."""
    average = copy.deepcopy(t.model.state_dict())

    def back(training: Training, step: int) -> None:
        for name, value in training.model.state_dict().items():
            average[name].lerp_(value, 1e-4)
        training.model.load_state_dict(average)

    t.after_step.append(back)


@fault(diffuser, "update-ratio-low", "parameter-unchanged", "stalled-from-start", "schedule-unfinished", "loss-plateau", "stalled-optimisation", "schedule-unreachable", then=(*STUCK, "scheduler-ends-early"))  # fmt: skip
def warm_up_in_whole_numbers(t: Training) -> None:
    """The warm-up's factor is `step // 1000`: zero, until step 1000. Humbatova: learning rate; AutoTrainer: slow convergence."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, step // 1000))


@fault(diffuser, "scheduler-ends-early", step=30, then=("schedule-restarted", "loss-spike", "schedule-unfinished", "update-ratio-low", "loss-diverged", "loss-plateau"))  # fmt: skip
def cosine_of_thirty_epochs(t: Training) -> None:
    """A cosine for 30 epochs is stepped with every batch, and rises and falls three times. TrainCheck: scheduler; Humbatova:
    learning rate."""
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 30)


@fault(diffuser, "update-ratio-high", "activation-exploding", then=(*DIVERGES, *STUCK, *FLAT, "activation-saturated", "dead-units", "gradient-clipping", "attention-head-dead"))  # fmt: skip
def rate_of_one_half(t: Training) -> None:
    """A rate of 0.5, good for SGD with clipping, under AdamW. SageMaker WeightUpdateRatio; UMLAUT: learning rate."""
    t.optimize = lambda p: torch.optim.AdamW(p, 0.5)


@fault(diffuser, "weight-norm-drift", "activation-vanishing", step=10, then=(*STUCK, *FLAT, "output-silent", "update-ratio-high", "loss-diverged", "poor-initialisation", "weight-decay-on-norms", "overfit", "attention-head-dead"))  # fmt: skip
def decay_of_twenty(t: Training) -> None:
    """A weight decay of 20: with a rate of 2e-3 each step takes 4 % from all weights, gains of the norms too. Humbatova: regularisation;
    TheDeepChecker: underfitting."""
    t.optimize = lambda p: torch.optim.AdamW(p, 2e-3, weight_decay=20.0)


@fault(diffuser, "optimizer-duplicate-parameters", modules=("", "attention", "attention.heads", "attention.norm"))
def attention_in_two_optimizers(t: Training) -> None:
    """The attention gets an optimizer with a rate of its own, and stays in that of all. TrainCheck: optimizer; Humbatova: wrong
    optimiser."""
    t.optimizers = [t.optimize(list(t.model.parameters())), torch.optim.AdamW(t.model.attention.parameters(), 5e-4)]
    t.update = update_of_two


@fault(diffuser, "poor-initialisation", "activation-exploding", modules=("", "stem", "smaller", "larger", "out", *BLOCKS), then=(*DIVERGES, *STUCK, "gradient-imbalance", "gradient-clipping", "update-ratio-low"))  # fmt: skip
def convolutions_of_deviation_one(t: Training) -> None:
    """`nn.init.normal_` is called for all convolutions without its `std=0.02`. SageMaker PoorWeightInitialization; TheDeepChecker:
    initial weights."""
    for module in t.model.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight)


@fault(
    diffuser, "units-symmetric", "poor-initialisation", modules=EMBED, then=("feature-constant", "gradient-imbalance")
)
def embedding_filled_with_one_number(t: Training) -> None:
    """Both layers of the embedding are filled with 0.02, which was meant as their deviation: 32 units do the work of one.
    TheDeepChecker: symmetry."""
    t.model.embed.linear1.weight.data.fill_(0.02)
    t.model.embed.linear1.bias.data.fill_(0.0)
    t.model.embed.linear2.weight.data.fill_(0.02)


@fault(diffuser, "norm-input-variance", "activation-vanishing", modules=(*BLOCKS, "attention", "norm", ""), then=(*STUCK, *FLAT, "gradient-imbalance", "gradient-clipping"))  # fmt: skip
def epsilon_with_the_wrong_sign(t: Training) -> None:
    """The normalisations have an epsilon of 1e5, a typing error for 1e-5: what they return is nearly zero. GRIST: epsilons;
    SageMaker TensorVariance."""
    t.model = Denoiser(norm=lambda channels: nn.GroupNorm(4, channels, eps=1e5))


@fault(diffuser, "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "stem"), then=(*NONFINITE,))  # fmt: skip
def root_of_a_negative_share(t: Training) -> None:
    """The share of the picture that is left goes from 1.02 down, and the noise gets the root of one minus it: NaN at the lowest levels.
    GRIST: square root of a negative number."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        noisy, times, noise = plain(step, phase)
        share = (1.02 - times)[:, None, None, None]
        x = (noisy - (1 - kept(times)).sqrt() * noise) / kept(times).sqrt()
        return share.sqrt() * x + (1 - share).sqrt() * noise, times, noise

    t.sample = sample


@fault(diffuser, "nonfinite-loss", "nonfinite-gradient", modules=("",), step=26, then=NONFINITE)
def weight_of_pure_noise(t: Training) -> None:
    """Errors are weighted by `min(snr, 5) / snr`, and at the last level, at which nothing is left of the picture, that is 0 / 0.
    GRIST: division by zero."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs, share = model(batch[0], batch[1]), 1 - (batch[1] * 100 / 99).clamp(max=1)
        snr = share / (1 - share + 1e-5)
        error = (outputs - batch[2]).square().mean((1, 2, 3))
        return result(outputs, batch, (snr.clamp(max=5) / snr * error).mean())

    t.forward = forward
