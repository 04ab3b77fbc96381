"""What goes wrong in variational autoencoders: who is trained, first weights, rates, the order of calls, modes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR

from faults import generator
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, plain_update, update_of_two

# -- who is trained --------------------------------------------------------------------------------------------------


@fault(generator, "optimizer-misses-parameters", "parameter-unchanged", modules=("decoder",), then=(*STUCK, "update-ratio-low", "gradient-accumulation", "gradient-exploding", "gradient-imbalance"))  # fmt: skip
def encoder_given_twice_by_name(t: Training) -> None:
    """The list of parameters names the encoder's heads once more where the decoder is meant. TrainCheck: parameters not in the
    optimizer; SageMaker UnchangedTensor."""
    body = [*t.model.encoder.layer1.parameters(), *t.model.encoder.layer2.parameters()]
    heads = [*t.model.encoder.mean.parameters(), *t.model.encoder.log_variance.parameters()]
    t.optimizers = [torch.optim.Adam([{"params": body}, {"params": heads}], 3e-3)]


@fault(generator, "optimizer-frozen-parameters", "parameter-unchanged", modules=("encoder",), then=("loss-plateau", "update-ratio-low", "gradient-zero", "output-constant"))  # fmt: skip
def encoder_frozen_from_stage_two(t: Training) -> None:
    """`encoder.requires_grad_(False)` belongs to the second stage, and runs in the first as well: random filters for ever.
    TrainCheck: frozen parameters."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model.encoder.requires_grad_(False)


@fault(generator, "optimizer-duplicate-parameters", then=(*DIVERGES,))
def both_optimizers_hold_everything(t: Training) -> None:
    """One optimizer for the encoder, one for the decoder, and both are given `model.parameters()`. TrainCheck: parameters in two
    optimizers; Humbatova: wrong optimiser."""
    t.optimizers = [torch.optim.Adam(t.model.parameters(), 3e-3), torch.optim.Adam(t.model.parameters(), 3e-3)]
    t.update = update_of_two


class Conditioned(generator.Generator):
    """Told which of two kinds a picture is, by a table whose row joins the code."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Embedding(2, generator.LATENT)

    def draw(self, mean, log_variance):
        code = super().draw(mean, log_variance)
        code.add(self.kinds.weight[(mean[:, 0] > 0).long()])
        return code


@fault(generator, "module-unused", "parameter-unchanged", "gradient-zero", modules=("kinds",))
def condition_not_added(t: Training) -> None:
    """`code.add(...)` for `code.add_(...)`: the table of conditions reaches nothing, and never learns. Humbatova: wrong API call;
    SageMaker UnchangedTensor."""
    t.model = Conditioned()


class CutOff(generator.Generator):
    def forward(self, x):
        with torch.no_grad():
            hidden = self.encoder.layer2(self.encoder.layer1(x)).flatten(1)
        mean, log_variance = self.encoder.mean(hidden), self.encoder.log_variance(hidden)
        return self.decoder(self.draw(mean, log_variance)), mean, log_variance


@fault(generator, "gradient-zero", "parameter-unchanged", "module-unused", modules=("encoder", "encoder.layer1", "encoder.layer2"))  # fmt: skip
def filters_under_no_grad(t: Training) -> None:
    """To save memory the filters of the encoder run under `no_grad()`, as if they came from elsewhere. TrainCheck: a part without
    gradients."""
    t.model = CutOff()


# -- first weights and layers ----------------------------------------------------------------------------------------


@fault(generator, "dead-units", "feature-constant", "poor-initialisation", "gradient-zero", "output-constant", modules=("decoder", "decoder.activation", "decoder.start"), then=(*STUCK, *FLAT, "parameter-unchanged", "module-unused", "units-symmetric", "update-ratio-low"))  # fmt: skip
def background_before_the_relu(t: Training) -> None:
    """The bias of black, -15, is meant for the logits of pixels, and set in the layer that starts the decoder: its ReLU is shut.
    SageMaker DeadRelu; TheDeepChecker: wrong initialisation of biases."""
    nn.init.constant_(t.model.decoder.start.bias, -15.0)


@fault(generator, "poor-initialisation", "dead-units", "gradient-zero", "feature-constant", "parameter-unchanged", "units-symmetric", "activation-vanishing", modules=("decoder",), then=(*STUCK, *FLAT, "output-constant", "module-unused", "update-ratio-high"))  # fmt: skip
def decoder_filled_with_zeros(t: Training) -> None:
    """The loader makes a decoder of zeros and fills in what the checkpoint has, which is nothing: all of it is zero. SageMaker
    AllZero; TheDeepChecker: symmetry."""
    for parameter in t.model.decoder.parameters():
        nn.init.zeros_(parameter)


@fault(generator, "loss-input-mismatch", "activation-saturated", modules=("decoder.head", "decoder", ""), then=(*STUCK, "gradient-vanishing", "output-constant", "dead-units", *FLAT, "overtraining"))  # fmt: skip
def pictures_squashed_twice(t: Training) -> None:
    """The decoder ends in a sigmoid, and its result is taken for logits by the loss. Humbatova: wrong loss for the last layer;
    UMLAUT."""
    t.model.decoder.head = nn.Sequential(t.model.decoder.head, nn.Sigmoid())


@fault(generator, "poor-initialisation", "activation-exploding", "gradient-exploding", modules=("decoder.head", "decoder", ""), then=(*DIVERGES, *STUCK, "dead-units", "gradient-imbalance", "activation-saturated", "update-ratio-low"))  # fmt: skip
def head_drawn_like_a_table(t: Training) -> None:
    """The last convolution is drawn with the deviation 20, taken from the scale of levels: logits begin in the hundreds. SageMaker
    PoorWeightInitialization; TheDeepChecker: exploding."""
    nn.init.normal_(t.model.decoder.head.weight, std=20.0)


@fault(generator, "activation-vanishing", "gradient-vanishing", "feature-constant", "poor-initialisation", modules=("encoder", "decoder", ""), then=(*STUCK, *FLAT, "output-constant", "update-ratio-low", "gradient-zero", "gradient-imbalance", "units-symmetric", "update-ratio-high", "weight-norm-drift"))  # fmt: skip
def tiny_filters_without_norms(t: Training) -> None:
    """DCGAN's `normal_(0, 0.02)` became 0.0002, without norms and with SGD: nothing comes through. TheDeepChecker: vanishing; AutoTrainer:
    vanishing gradient."""
    t.model = generator.Generator(norm=lambda channels: nn.Identity())
    for parameter in t.model.parameters():
        nn.init.normal_(parameter, std=2e-4) if parameter.ndim > 1 else nn.init.zeros_(parameter)
    t.optimize = lambda p: torch.optim.SGD(p, 1e-4, momentum=0.9)


@fault(generator, "input-range", "activation-saturated", modules=("encoder", ""), then=(*STUCK, *FLAT, "gradient-zero", "gradient-imbalance", "gradient-vanishing", "poor-initialisation"))  # fmt: skip
def tanh_of_raw_levels(t: Training) -> None:
    """An encoder of tanh without norms, and pictures of 0 to 255 for it; only targets are divided. SageMaker SaturatedActivation;
    UMLAUT: input not normalised."""
    t.model = generator.Generator(norm=lambda channels: nn.Identity(), activation=nn.Tanh)
    plain = t.sample
    t.sample = lambda step, phase: ((255 * plain(step, phase)[0]).round(), plain(step, phase)[0])

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits, mean, log_variance = model(batch[0])
        pixels = F.binary_cross_entropy_with_logits(logits, batch[1], reduction="none").sum((1, 2, 3)).mean()
        apart = generator.divergence(mean, log_variance).mean()
        outputs = logits.sigmoid()
        return {"loss": pixels + model.beta * apart, "divergence": apart, "outputs": outputs, "targets": batch[1]}

    t.forward, t.measure = forward, lambda tensors, batch: generator.measure(tensors, batch[1:])


# -- steps -----------------------------------------------------------------------------------------------------------


@fault(generator, "update-ratio-high", "loss-spike", "loss-diverged", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "activation-saturated", "gradient-zero", "output-constant", "gradient-imbalance"))  # fmt: skip
def rate_of_three_tenths(t: Training) -> None:
    """`lr=3e-1` for `3e-3` with Adam: two zeros were lost. Humbatova: learning rate; SageMaker WeightUpdateRatio."""
    t.optimize = lambda p: torch.optim.Adam(p, 3e-1)


@fault(generator, "update-ratio-low", "scheduler-ends-early", "loss-plateau", "stalled-optimisation", step=30, then=(*STUCK, "parameter-unchanged", "overtraining"))  # fmt: skip
def gamma_of_an_epoch(t: Training) -> None:
    """`ExponentialLR(0.85)`, meant for epochs, is stepped with each batch: after a hundred the rate is 1e-10. Humbatova: learning rate;
    AutoTrainer: slow convergence."""
    t.schedule = lambda optimizer: ExponentialLR(optimizer, 0.85)


@fault(generator, "update-ratio-low", "parameter-unchanged", "scheduler-ends-early", "stalled-optimisation", "loss-plateau", step=1, then=(*STUCK,))  # fmt: skip
def schedule_in_whole_numbers(t: Training) -> None:
    """A linear fall by `(steps - step) // steps` in place of `/`: the factor is 1 in the first step and 0 in all others. Humbatova:
    learning rate; TrainCheck: parameters not updated."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: (250 - step) // 250)


@fault(generator, "gradient-accumulation", step=2, then=(*DIVERGES, *STUCK, "dead-units", "gradient-imbalance", "output-constant", *FLAT, "gradient-zero", "loss-plateau"))  # fmt: skip
def zeroing_deleted_by_mistake(t: Training) -> None:
    """`zero_grad()` was deleted with a line beside it. TrainCheck: missing `zero_grad`; Humbatova: training process."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


@fault(generator, "weight-norm-drift", "update-ratio-high", "feature-constant", "activation-vanishing", "output-constant", then=(*DIVERGES, *STUCK, *FLAT, "norm-input-variance", "dead-units", "weight-decay-on-norms"))  # fmt: skip
def decay_in_percent(t: Training) -> None:
    """`weight_decay=20` with AdamW, in percent where a share is meant: each step takes 6 % off all weights. Humbatova:
    regularisation."""
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=20.0)


@fault(generator, "model-in-eval", step=50, then=("overfit", "overtraining", "watch-starved", "probe-read-nothing", *DIVERGES, *STUCK))  # fmt: skip
def drawn_from_and_left(t: Training) -> None:
    """After 50 steps a page of samples is drawn in eval mode, and nobody goes back: codes are means, norms take what they know.
    TrainCheck: wrong mode."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.train(step < 50)
        return plain_update(training, step, observer)

    t.update = update


@fault(generator, "parameter-unchanged", "precision-loss", "update-ratio-low", then=STUCK)
def bfloat_weights_at_a_small_rate(t: Training) -> None:
    """`model.bfloat16()` to save memory, at a rate of 5e-6: most weights are not moved by half of their last bit. TrainCheck:
    dtype; Humbatova: wrong tensor type."""
    t.model = t.model.bfloat16()
    plain = t.sample
    t.sample = lambda step, phase: (plain(step, phase)[0].bfloat16(),)
    t.optimize = lambda p: torch.optim.Adam(p, 5e-6)
