"""What goes wrong in plain networks: half precision, codebooks, likelihoods, copies, zeros, units of one file."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from faults import autoencoder
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Tensors, Training, plain_update, seeded, update_of_two

UNLEARNT = (*STUCK, *FLAT, "units-symmetric", "update-ratio-low")


def noisy(t: Training, change) -> None:
    """Give the model `change(x, step)` in training, and ask for x."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        (x,) = plain(step, phase)
        return change(x, step), x

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return {"loss": F.mse_loss(outputs, batch[1]), "outputs": outputs, "targets": batch[1]}

    t.sample, t.forward = sample, forward
    t.measure = lambda tensors, batch: {"explained": 1 - float(tensors["loss"] / batch[1].var())}


def in_training(t: Training, change) -> None:
    """Replace training batches by `change(x, step)`."""
    plain = t.sample
    t.sample = lambda step, phase: (change(*plain(step, phase), step),) if phase == "train" else plain(step, phase)


@fault(autoencoder, "nonfinite-parameter", "nonfinite-optimizer", "dtype-headroom", modules=("encoder", "decoder", ""), then=(*NONFINITE, "precision-loss", "update-ratio-high"))  # fmt: skip
def epsilon_lost_in_half(t: Training) -> None:
    """`model.half()` with Adam: squared gradients and the eps of 1e-8 are zero in float16, and the step divides by them.
    GRIST: division by zero; TrainCheck: precision; pytorch's forum, again and again."""
    t.model, plain = t.model.half(), t.sample
    t.sample = lambda step, phase: (plain(step, phase)[0].half(),)


@fault(autoencoder, "input-nonfinite", "nonfinite-input", "nonfinite-activation", "nonfinite-loss", modules=("", "encoder", "encoder.0"), then=NONFINITE)  # fmt: skip
def column_that_never_varies(t: Training) -> None:
    """Columns are standardised by statistics of the training set, and one sensor was off all the time: 0 / 0. GRIST:
    division by zero; TheDeepChecker: constant inputs."""
    plain = t.sample
    x = plain(0, "train")[0]
    mean, deviation = x.mean(0), x.std(0)
    mean[11], deviation[11] = 0.0, 0.0

    def sample(step: int, phase: str) -> Batch:
        (x,) = plain(step, phase)
        x[:, 11] = 0.0
        return ((x - mean) / deviation,)

    t.sample = sample


class Spread(autoencoder.Autoencoder):
    """Says two numbers for each column: a mean and a spread."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Linear(autoencoder.LATENT, autoencoder.WIDTH)

    def forward(self, x):
        code = self.encoder(x)
        return self.decoder(code), self.spread(code)


@fault(
    autoencoder, "nonfinite-loss", modules=("", "spread"), then=(*NONFINITE, "gradient-exploding", "gradient-imbalance")
)
def variance_below_zero(t: Training) -> None:
    """A Gaussian likelihood whose variance comes from a plain linear layer: the logarithm of negative numbers. GRIST:
    logarithm; Humbatova: missing activation."""
    t.model = Spread()

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs, variance = model(batch[0])
        loss = 0.5 * (variance.log() + (outputs - batch[0]).square() / variance).mean()
        return {"loss": loss, "outputs": outputs, "targets": batch[0]}

    t.forward = forward


@fault(autoencoder, "nonfinite-loss", "nonfinite-gradient", modules=("",), step=70, then=(*NONFINITE, "input-constant", "step-skipped", "loss-spike"))  # fmt: skip
def relative_to_nothing(t: Training) -> None:
    """The error of each item relative to its own energy, without a floor; from step 70 on one batch in ten holds an item of
    zeros. GRIST: division by zero; SageMaker AllZero."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        errors = (outputs - batch[0]).square().sum(1) / batch[0].square().sum(1)
        return {"loss": errors.mean(), "outputs": outputs, "targets": batch[0]}

    t.forward = forward
    empty = torch.ones(autoencoder.BATCH, 1)
    empty[3] = 0.0
    in_training(t, lambda x, step: x * empty if step >= 70 and step % 10 == 0 else x)


@fault(autoencoder, "stalled-from-start", "loss-plateau", "stalled-optimisation", "output-constant", "feature-constant", "prediction-collapse", then=(*STUCK, *FLAT, "output-collapse", "overtraining"))  # fmt: skip
def axis_too_many(t: Training) -> None:
    """Targets are (items, 1, columns), outputs (items, columns): all pairs are compared, and the answer is a mean. Humbatova:
    wrong shape of the target; UMLAUT."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0])
        return {"loss": F.mse_loss(outputs, batch[0].unsqueeze(1)), "outputs": outputs, "targets": batch[0]}

    t.forward = forward


@fault(autoencoder, "stalled-from-start", "loss-plateau", "stalled-optimisation", "output-constant", "feature-constant", "prediction-collapse", then=(*STUCK, "batch-order", *FLAT, "overtraining", "output-collapse"))  # fmt: skip
def clean_of_another_batch(t: Training) -> None:
    """A denoising autoencoder whose clean side comes from a second loader, shuffled by itself. Humbatova: wrong labels;
    TrainCheck: order of data."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        (x,), (y,) = plain(step, phase), plain(step + 50_000, phase)
        return x + 0.1 * torch.randn(x.shape, generator=seeded(3, step)), y

    noisy(t, lambda x, step: x)
    t.sample = sample


@fault(autoencoder, "input-range", "activation-saturated", "output-constant", "loss-plateau", "stalled-optimisation", modules=("", "encoder", "encoder.0", "encoder.1"), then=(*STUCK, *FLAT, "gradient-imbalance", "gradient-exploding", "overtraining", "poor-initialisation"))  # fmt: skip
def noise_of_forty(t: Training) -> None:
    """Noise for a denoising autoencoder with a deviation of 40, a level for pictures of 255, on standardised columns.
    TheDeepChecker: scale of the data; Humbatova: wrong preprocessing."""
    noisy(t, lambda x, step: x + 40 * torch.randn(x.shape, generator=seeded(5, step)))


@fault(autoencoder, "parameter-unchanged", "gradient-zero", "optimizer-frozen-parameters", "module-unused", modules=("encoder",), step=60, then=("update-ratio-low", "loss-plateau", "overtraining", "gradient-vanishing"))  # fmt: skip
def never_thawed(t: Training) -> None:
    """The encoder is frozen while something else takes a step at 60, and the line that thaws it is missing. TrainCheck:
    parameters that are not updated; SageMaker UnchangedTensor."""
    t.before.append(lambda training, step: training.model.encoder.requires_grad_(step < 60))


@fault(autoencoder, "optimizer-owns-others", "optimizer-misses-parameters", "parameter-unchanged", then=(*STUCK, "update-ratio-low", "gradient-accumulation", "gradient-exploding"))  # fmt: skip
def model_built_again(t: Training) -> None:
    """`model = Autoencoder(...)` a second time, in another cell of the notebook, behind the optimizer. TrainCheck; SageMaker
    UnchangedTensor."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model = autoencoder.Autoencoder()


@fault(autoencoder, "gradient-clipping", "update-ratio-low", "loss-plateau", "stalled-optimisation", "stalled-from-start", then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def clipped_by_rate(t: Training) -> None:
    """`clip_grad_norm_(parameters, lr)`: the second argument is the rate, 5e-4, where a norm belongs; SGD. TrainCheck:
    clipping; Humbatova: wrong argument."""
    t.optimize, t.clip = (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)), 5e-4


@fault(autoencoder, "loss-spike", "input-range", "gradient-exploding", "activation-saturated", modules=("", "encoder", "encoder.0", "encoder.1"), step=39, then=(*DIVERGES, "input-drift", "gradient-imbalance", "feature-constant", "overfit"))  # fmt: skip
def one_file_in_millimetres(t: Training) -> None:
    """One file in forty was written in millimetres, all others in metres and standardised. Humbatova: wrong data;
    TheDeepChecker: outliers."""
    in_training(t, lambda x, step: 1000 * x if step % 40 == 39 else x)


@fault(autoencoder, "loss-diverged", "weight-norm-drift", "activation-saturated", "activation-exploding", "update-ratio-high", step=5, then=(*DIVERGES, *STUCK, *FLAT, *NONFINITE, "loss-plateau", "overtraining", "dead-units"))  # fmt: skip
def momentum_of_second_moment(t: Training) -> None:
    """SGD with a momentum of 0.999, which was Adam's second beta: steps add up a thousand times. Humbatova: optimiser
    settings; AutoTrainer: oscillating loss."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.2, momentum=0.999)


@fault(autoencoder, "dead-units", "feature-constant", "activation-vanishing", "output-constant", "gradient-zero", modules=("encoder", "encoder.0"), then=(*UNLEARNT, "module-unused", "parameter-unchanged", "gradient-imbalance", "poor-initialisation"))  # fmt: skip
def relu_on_decibels(t: Training) -> None:
    """Levels in tens of dB, all below zero, and a model that begins with a ReLU, as blocks of the pre-activation kind do. SageMaker
    DeadRelu; Humbatova: wrong activation."""
    t.model.encoder.insert(0, nn.ReLU())
    plain = t.sample
    noisy(t, lambda x, step: x / 5 - 6)
    t.measure = lambda tensors, batch: {"explained": 1 - float(tensors["loss"] / plain(0, "val")[0].var())}


@fault(autoencoder, "activation-vanishing", "poor-initialisation", "gradient-vanishing", "feature-constant", modules=("encoder", "decoder"), then=(*UNLEARNT, "gradient-imbalance", "output-constant", "parameter-unchanged"))  # fmt: skip
def deviation_of_a_hundredth(t: Training) -> None:
    """`normal_(std=0.01)`, from a paper on wide networks, for ten narrow layers: each divides the signal by twenty.
    SageMaker PoorWeightInitialization; AutoTrainer: vanishing gradient."""
    t.model.encoder = autoencoder.mlp((autoencoder.WIDTH, *[24] * 4, autoencoder.LATENT), nn.Tanh)
    t.model.decoder = autoencoder.mlp((autoencoder.LATENT, *[24] * 4, autoencoder.WIDTH), nn.Tanh)
    for layer in t.model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
    t.optimize = lambda p: torch.optim.SGD(p, 0.05, momentum=0.9)


@fault(autoencoder, "overfit", "overtraining", step=49, then=("input-drift", "input-duplicate", "loss-plateau", "weight-norm-drift"))  # fmt: skip
def sixteen_items(t: Training) -> None:
    """`nrows=16` of a quick look at the table was left in: 16 items, learnt by heart by a wide model. SageMaker Overfit;
    TheDeepChecker: overfitting."""
    few = autoencoder.points(16, seeded(99))
    in_training(t, lambda x, step: few[torch.randperm(16, generator=seeded(8, step))])
    t.model.encoder = autoencoder.mlp((autoencoder.WIDTH, 96, 96, 16), nn.Tanh)
    t.model.decoder = autoencoder.mlp((16, 96, 96, autoencoder.WIDTH), nn.Tanh)


@fault(autoencoder, "input-duplicate", then=("overfit", "overtraining", "loss-spike", "loss-plateau", "feature-constant", "output-constant", "input-drift"))  # fmt: skip
def view_of_one_item(t: Training) -> None:
    """`x[0].expand(...)` in the collate function: all items of a batch are its first one. TrainCheck: duplicated data;
    TheDeepChecker: batches."""
    in_training(t, lambda x, step: x[:1].expand(len(x), -1).contiguous())


@fault(autoencoder, "update-ratio-low", "gradient-vanishing", "stalled-from-start", "loss-plateau", "stalled-optimisation", then=(*STUCK, "parameter-unchanged", "activation-vanishing"))  # fmt: skip
def divided_by_the_count_again(t: Training) -> None:
    """The mean squared error is divided by the number of values once more, and by that of items; SGD with the rate for a
    mean. TheDeepChecker: wrong reduction of the loss; SageMaker WeightUpdateRatio."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = autoencoder.forward(model, batch)
        return {**tensors, "loss": tensors["loss"] / (batch[0].numel() * len(batch[0]))}

    t.forward = forward


class Book(autoencoder.Autoencoder):
    """Codes are those of a table that are nearest to what the encoder says, with a straight-through gradient."""

    def __init__(self, entries: int = 32) -> None:
        super().__init__()
        self.book = nn.Embedding(entries, autoencoder.LATENT)
        nn.init.normal_(self.book.weight, std=80.0)
        self.quantised = nn.Identity()

    def forward(self, x):
        said = self.encoder(x)
        code = self.book(torch.cdist(said, self.book.weight).argmin(1))
        distance = F.mse_loss(code, said.detach()) + 0.25 * F.mse_loss(said, code.detach())
        return self.decoder(self.quantised(said + (code - said).detach())), distance


@fault(autoencoder, "feature-constant", "output-constant", "prediction-collapse", "output-collapse", "poor-initialisation", modules=("book", "quantised", "decoder"), then=(*UNLEARNT, "activation-saturated", "activation-exploding", "gradient-imbalance", "dead-units", "gradient-zero", "weight-norm-drift", "loss-spike"))  # fmt: skip
def codebook_far_away(t: Training) -> None:
    """A table of codes with a deviation of 80, beside codes of 0.3: all items choose the one entry that is nearest to zero.
    SageMaker PoorWeightInitialization; the index collapse of van den Oord et al. 2017, arXiv:1711.00937."""
    t.model = Book()

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs, distance = model(batch[0])
        return {"loss": F.mse_loss(outputs, batch[0]) + 0.01 * distance, "outputs": outputs, "targets": batch[0]}

    t.forward = forward


@fault(autoencoder, "nonfinite-loss", "dtype-headroom", modules=("",), then=(*NONFINITE, "input-range", "poor-initialisation", "precision-headroom", "gradient-exploding", "activation-saturated", "step-skipped"))  # fmt: skip
def squares_in_half(t: Training) -> None:
    """Values of some hundreds in float16, and an error that is squared and summed there: beyond 65504. GRIST: overflow;
    TrainCheck: mixed precision."""
    plain = t.sample
    t.sample = lambda step, phase: (plain(step, phase)[0] * 300,)

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0] / 300) * 300
        loss = (outputs.half() - batch[0].half()).square().mean()
        return {"loss": loss, "outputs": outputs, "targets": batch[0]}

    t.forward = forward


@fault(autoencoder, "optimizer-duplicate-parameters", "update-ratio-high", modules=("", "encoder"), then=(*DIVERGES, "activation-saturated"))  # fmt: skip
def encoder_in_both_optimizers(t: Training) -> None:
    """An optimizer for the reconstruction, of all parameters, and one for the prior's adversary, of the encoder's, which is
    stepped although the adversary is off. TrainCheck: optimizers; adversarial autoencoders, arXiv:1511.05644."""
    t.optimizers = [t.optimize(t.model.parameters()), torch.optim.Adam(t.model.encoder.parameters(), 2e-2)]
    t.update = update_of_two


@fault(autoencoder, "gradient-zero", "units-symmetric", "feature-constant", "poor-initialisation", "output-constant", then=(*UNLEARNT, "parameter-unchanged", "module-unused", "activation-vanishing", "dead-units"))  # fmt: skip
def all_weights_zero(t: Training) -> None:
    """`zeros_` for weights and not only for biases: nothing gets a gradient but the last bias. TheDeepChecker: constant
    initialisation; SageMaker AllZero."""
    for parameter in t.model.parameters():
        nn.init.zeros_(parameter)


@fault(autoencoder, "gradient-zero", "feature-constant", "activation-vanishing", "output-constant", "norm-input-variance", modules=("encoder", "decoder"), then=(*UNLEARNT, "parameter-unchanged", "module-unused", "dead-units", "batch-leak"))  # fmt: skip
def gains_zero_without_residuals(t: Training) -> None:
    """The last norms' gains start at zero, a recipe for residual branches, in a network that has none: nothing comes through.
    Humbatova: weights initialisation; SageMaker AllZero."""
    t.model = autoencoder.Autoencoder(norm=nn.BatchNorm1d)
    for module in t.model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.zeros_(module.weight)
    t.optimize = lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)


@fault(autoencoder, "gradient-zero", "parameter-unchanged", "module-unused", "stalled-from-start", then=(*STUCK, "update-ratio-low"))  # fmt: skip
def loss_wrapped_anew(t: Training) -> None:
    """`torch.tensor(loss, requires_grad=True)` against an error message: the graph is cut, and no weight gets a gradient.
    TrainCheck; Humbatova: missing gradient; an answer of many forums."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        tensors = autoencoder.forward(model, batch)
        return {**tensors, "loss": torch.tensor(float(tensors["loss"]), requires_grad=True)}

    t.forward = forward


@fault(autoencoder, "update-ratio-low", "loss-plateau", "stalled-optimisation", "scheduler-ends-early", step=6, then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def patience_of_one_step(t: Training) -> None:
    """`ReduceLROnPlateau(patience=1)`, meant for epochs, is stepped with the loss of each batch: after 16 steps the rate is
    a millionth of what it was. Humbatova: learning rate; SageMaker LossNotDecreasing."""
    schedulers: list[torch.optim.lr_scheduler.ReduceLROnPlateau] = []

    def update(training: Training, step: int, observer) -> tuple[Batch, Tensors]:
        if not schedulers:
            schedulers.append(torch.optim.lr_scheduler.ReduceLROnPlateau(training.optimizer, patience=1))
        batch, tensors = plain_update(training, step, observer)
        schedulers[0].step(float(tensors["loss"].detach()))
        return batch, tensors

    t.update = update
