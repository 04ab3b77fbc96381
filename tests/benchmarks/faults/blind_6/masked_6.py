"""What goes wrong in pre-training: what the optimizer holds, rates, decay, modes, where gradients end, frozen parts."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from faults import masked
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_validation

# -- what the optimizer holds ----------------------------------------------------------------------------------------


@fault(masked, "optimizer-misses-parameters", "parameter-unchanged", modules=("",), then=("gradient-accumulation", "gradient-imbalance", "gradient-exploding", "weight-decay-on-norms", "overtraining"))  # fmt: skip
def token_in_no_group(t: Training) -> None:
    """Groups with and without decay are made of names that end in `weight` or `bias`: the token of hidden frames, a bare parameter,
    is in none. TrainCheck: parameters not in the optimizer."""
    named = list(t.model.named_parameters())
    groups = [
        {"params": [p for name, p in named if name.endswith("weight")], "weight_decay": 0.01},
        {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0},
    ]
    t.optimize = lambda p: torch.optim.AdamW(groups, 3e-3, betas=(0.9, 0.98))


@fault(masked, "optimizer-owns-others", "parameter-unchanged", "optimizer-misses-parameters", then=("gradient-accumulation", "gradient-clipping", *STUCK, "update-ratio-low"))  # fmt: skip
def optimizer_of_the_slow_copy(t: Training) -> None:
    """`ema = deepcopy(model)`, and by a slip it is `ema.parameters()` that the optimizer is given. TrainCheck: optimizer with the
    parameters of another model."""
    average = copy.deepcopy(t.model)
    t.optimizers = [t.optimize(average.parameters())]


@fault(masked, "optimizer-frozen-parameters", "parameter-unchanged", modules=("blocks", "blocks.0", "blocks.1"), then=("update-ratio-low", "gradient-zero", *STUCK))  # fmt: skip
def frozen_for_the_probe(t: Training) -> None:
    """The blocks are still frozen, as for a linear probe, when pre-training begins. TrainCheck: frozen parameters; SageMaker
    UnchangedTensor."""
    t.model.blocks.requires_grad_(False)
    t.optimizers = [t.optimize(t.model.parameters())]


@fault(masked, "optimizer-misses-parameters", "parameter-unchanged", modules=("blocks.2", "blocks.3", "blocks"), then=("gradient-accumulation", "gradient-clipping", "gradient-exploding", "gradient-imbalance", "update-ratio-low"))  # fmt: skip
def grown_behind_the_optimizer(t: Training) -> None:
    """Progressive stacking: two blocks are copied on top of the model, when the optimizer exists already. TrainCheck:
    huggingface/accelerate#2665."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model.blocks.extend(copy.deepcopy(block) for block in list(t.model.blocks))


@fault(
    masked,
    "optimizer-duplicate-parameters",
    modules=("project", "positions", ""),
    then=("loss-spike", "update-ratio-high"),
)
def layers_in_two_groups(t: Training) -> None:
    """Rates that fall from layer to layer: what comes before the blocks is in an optimizer of its own, and in that of the whole
    model as well. TrainCheck: optimizers and their parameters."""
    front = [*t.model.project.parameters(), *t.model.positions.parameters()]
    t.optimizers = [t.optimize(t.model.parameters()), torch.optim.AdamW(front, 1e-3)]
    t.before.append(lambda training, step: training.optimizers[1].zero_grad())
    t.after_step.append(lambda training, step: training.optimizers[1].step())


# -- steps -----------------------------------------------------------------------------------------------------------


@fault(masked, "parameter-unchanged", "gradient-zero", then=(*STUCK, "update-ratio-low", "module-unused"))
def zeroed_before_the_step(t: Training) -> None:
    """`loss.backward(); optimizer.zero_grad(); optimizer.step()`: there is nothing to step with. TrainCheck: `zero_grad` misplaced;
    SageMaker UnchangedTensor."""
    t.after_backward.append(lambda training, step: training.optimizer.zero_grad())


@fault(masked, "gradient-accumulation", step=1, then=(*DIVERGES, *STUCK, "overtraining", "gradient-clipping"))
def zeroed_every_seventy_five(t: Training) -> None:
    """`zero_grad()` stands in the loop over epochs, one level too far out: gradients of 75 batches add up. TrainCheck: missing
    `zero_grad`; Humbatova: training process."""

    def rarely(training: Training, step: int) -> None:
        if step == 0:
            zero = training.optimizer.zero_grad
            training.optimizer.zero_grad = lambda: zero() if training.epoch_begins else None
        training.epoch_begins = step % 75 == 0

    t.before.append(rarely)


@fault(masked, "update-ratio-low", "schedule-unfinished", "stalled-optimisation", then=(*STUCK, "parameter-unchanged"))
def warm_up_of_the_long_run(t: Training) -> None:
    """The warm-up of 200,000 steps comes from the recipe of the large model; this run has 250. Humbatova: learning rate; SageMaker
    WeightUpdateRatio."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 200_000))


@fault(masked, "update-ratio-high", "weight-norm-drift", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "activation-saturated", "dead-units", "gradient-clipping"))  # fmt: skip
def three_without_the_minus(t: Training) -> None:
    """A rate of `3e-1` where `3e-3` is meant, warmed up for 30 steps. Humbatova: learning rate; TheDeepChecker: unstable updates."""
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-1, betas=(0.9, 0.98), weight_decay=0.01)


@fault(masked, "weight-norm-drift", step=10, then=("activation-vanishing", *STUCK, *FLAT, "update-ratio-low", "update-ratio-high", "overtraining", "loss-diverged", "weight-decay-on-norms"))  # fmt: skip
def decay_divided_by_the_rate(t: Training) -> None:
    """The decay of SGD's recipes, 1e-4, is divided by the rate once and again, for AdamW multiplies by it: 11 in the end. All
    weights shrink. TheDeepChecker: wrong regularisation; Humbatova: parameters of the optimiser."""
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-3, betas=(0.9, 0.98), weight_decay=1e-4 / 3e-3**2)


@fault(masked, "update-ratio-low", "stalled-optimisation", then=(*STUCK, "parameter-unchanged"))
def epsilon_as_for_inception(t: Training) -> None:
    """`eps=1.0`, as an old hint for Inception says: the gradient is far below, and the step is the rate times it. Humbatova:
    parameters of the optimiser; SageMaker WeightUpdateRatio."""
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-4, betas=(0.9, 0.98), eps=1.0)


@fault(masked, "gradient-clipping", "update-ratio-low", then=STUCK)
def clipped_to_the_epsilon(t: Training) -> None:
    """Arguments exchanged in the configuration: the norm is clipped to 1e-8, what was meant for AdamW's eps. TrainCheck: wrong clip;
    Humbatova: parameters of the optimiser."""
    t.clip = 1e-8


# -- modes -----------------------------------------------------------------------------------------------------------


@fault(masked, "model-in-eval", step=75, then=("overfit", "overtraining", "watch-starved", "probe-read-nothing"))
def features_drawn_in_between(t: Training) -> None:
    """At step 75 features are drawn for a linear probe, with `model.eval()`, and the loop never calls `train()` again. TrainCheck:
    wrong mode."""
    t.model = masked.Pretrained(dropout=0.2)

    def drawn(training: Training, step: int) -> None:
        if step >= 75:
            training.model.eval()

    plain = t.update

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        drawn(training, step)
        return plain(training, step, observer)

    t.update = update


@fault(masked, "validation-in-train-mode", step=49, then=("overtraining",))
def tracks_validated_with_dropout(t: Training) -> None:
    """The validation loop was copied from training, and `model.eval()` is not in it: a dropout of 0.3 goes on. TrainCheck: wrong
    mode; Humbatova: training process."""
    t.model = masked.Pretrained(dropout=0.3)

    def validate(training: Training, step: int, observer: Observer) -> None:
        evaluate, training.model.eval = training.model.eval, lambda: training.model
        plain_validation(training, step, observer)
        training.model.eval = evaluate

    t.validate = validate


@fault(masked, "dropout-high", modules=("blocks.0.dropout", "blocks.1.dropout", "blocks", "blocks.0", "blocks.1"), then=(*STUCK, "overtraining", "input-drift"))  # fmt: skip
def keep_probability(t: Training) -> None:
    """`keep_prob=0.95` of the TensorFlow code is given to `nn.Dropout`. Humbatova: layer properties; TheDeepChecker: dropout."""
    t.model = masked.Pretrained(dropout=0.95)


# -- where gradients end ---------------------------------------------------------------------------------------------


class WithoutGradients(masked.Pretrained):
    def forward(self, frames, hidden):
        with torch.no_grad():
            states = self.encode(frames, hidden)
        return self.head(states)


@fault(masked, "parameter-unchanged", "gradient-zero", "module-unused", modules=("project", "positions", "norm", "blocks", "final", ""), then=(*STUCK, "update-ratio-low"))  # fmt: skip
def pretraining_under_no_grad(t: Training) -> None:
    """The encoder runs under `no_grad()`, which was right for drawing features: only the head learns. TrainCheck: a part without
    gradients; SageMaker UnchangedTensor."""
    t.model = WithoutGradients()


class Unmasked(masked.Pretrained):
    def encode(self, frames, hidden):
        x = self.norm(self.positions(self.project(frames)))
        for block in self.blocks:
            x = block(x)
        return self.final(x)


@fault(masked, "module-unused", "parameter-unchanged", "gradient-zero", modules=("",), then=("update-ratio-low",))
def token_never_put_in(t: Training) -> None:
    """Frames are never hidden: the token is in the model and the optimizer, and no step uses it. Humbatova: missing connection;
    SageMaker UnchangedTensor."""
    t.model = Unmasked()


class LastBlockOnly(masked.Pretrained):
    def encode(self, frames, hidden):
        x = torch.where(hidden[..., None], self.mask_token, self.project(frames))
        x = self.norm(self.positions(x))
        for block in self.blocks:
            y = block(x)
        return self.final(y)


@fault(
    masked, "module-unused", "gradient-zero", "parameter-unchanged", modules=("blocks.0",), then=("update-ratio-low",)
)
def each_block_from_the_input(t: Training) -> None:
    """`y = block(x)` in the loop where `x = block(x)` is meant: what the first block returns is thrown away. Humbatova: missing
    connection; TrainCheck."""
    t.model = LastBlockOnly()


@fault(masked, "output-constant", "feature-constant", "gradient-zero", modules=("project", ""), then=(*STUCK, "module-unused", "units-symmetric", "norm-input-variance", "prediction-collapse", "input-constant", *FLAT))  # fmt: skip
def all_frames_hidden(t: Training) -> None:
    """The mask is turned round twice, and `~hidden` is combined with `hidden`: all frames are hidden, and all tracks look alike to
    the model. Humbatova: wrong preprocessing; TheDeepChecker: constant inputs."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        frames, hidden = plain(step, phase)
        return frames, hidden | ~hidden

    t.sample = sample


@fault(masked, "feature-constant", "output-constant", modules=("head", "final", "blocks", "blocks.0", "blocks.1", ""), step=20, then=(*STUCK, *FLAT, "weight-norm-drift", "metric-range", "update-ratio-low", "overtraining", "output-collapse", "gradient-zero", "parameter-unchanged"))  # fmt: skip
def target_of_its_own(t: Training) -> None:
    """The model predicts its own output for whole frames, as in data2vec, but there is neither an average of weights nor a
    `detach()`: a constant is a perfect answer. The literature on self-supervision: collapse; Humbatova: wrong loss."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        frames, hidden = batch
        targets = model(frames, torch.zeros_like(hidden))
        outputs = model(frames, hidden)
        return {"loss": F.mse_loss(outputs[hidden], targets[hidden]), "outputs": outputs, "targets": targets}

    t.forward = forward
