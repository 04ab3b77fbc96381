"""What goes wrong with molecules: units, batches of graphs, sums over neighbours, readouts, missing labels, rates, optimizers."""

from __future__ import annotations

import math
import warnings

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR

from faults import molecules
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, seeded


def changed(t: Training, change, phases: tuple[str, ...] = ("train", "val")) -> None:
    """Replace batches of these phases by `change(batch, step)`."""
    plain = t.sample
    t.sample = lambda step, phase: change(plain(step, phase), step) if phase in phases else plain(step, phase)


@fault(molecules, "output-constant", "feature-constant", "prediction-collapse", "batch-leak", "input-constant", modules=("", "readout", "head", "dropout"), then=("update-ratio-low", *STUCK, *FLAT, "gradient-exploding", "activation-exploding", "loss-spike", "overfit", "gradient-imbalance", "loss-diverged", "dead-units", "input-duplicate"))  # fmt: skip
def molecule_numbers_forgotten(t: Training) -> None:
    """The vector that says which molecule an atom is of is all zeros, the default for one graph: the first molecule gets all atoms
    of the batch, the others nothing. Humbatova: wrong input of a layer; TheDeepChecker: constant activations."""

    def change(batch: Batch, step: int) -> Batch:
        numbers, kinds, edges, bonds, graph, values = batch
        return numbers, kinds, edges, bonds, torch.zeros_like(graph), values

    changed(t, change)


@fault(molecules, "input-range", "gradient-exploding", then=(*STUCK, *DIVERGES, *FLAT, "update-ratio-low", "overfit", "overtraining", "metric-range", "dead-units", "activation-saturated", "gradient-zero", "class-imbalance", "gradient-imbalance"))  # fmt: skip
def energies_not_standardised(t: Training) -> None:
    """Total energies in eV, -11,000 with a deviation of 1,100, instead of standardised ones: the loss is 1e8 and its gradients
    follow. TheDeepChecker: wrong data scale; Humbatova: missing normalisation."""
    changed(t, lambda batch, step: (*batch[:5], -1.1e4 + 1.1e3 * batch[5]))


@fault(molecules, "input-range", "activation-exploding", "gradient-imbalance", modules=("numbers", "layers.0", ""), then=(*DIVERGES, *STUCK, *FLAT, "dead-units", "activation-saturated", "overfit", "overtraining", "dtype-headroom", "gradient-zero", "update-ratio-low", "metric-range", "poor-initialisation"))  # fmt: skip
def radius_in_femtometres(t: Training) -> None:
    """The second number of an atom was in units of 100 pm, and comes in fm from the new file: a hundred thousand times as large.
    UMLAUT and Humbatova: features that are not normalised."""
    changed(t, lambda batch, step: (batch[0] * torch.tensor([1.0, 1e5]), *batch[1:]))


@fault(molecules, "activation-saturated", "activation-vanishing", "output-constant", "feature-constant", modules=("readout", "readout.gate", "readout.sigmoid"), then=(*STUCK, *FLAT, "gradient-zero", "gradient-imbalance", "poor-initialisation", "overtraining", "parameter-unchanged", "update-ratio-low"))  # fmt: skip
def gates_begin_closed(t: Training) -> None:
    """The gate of the readout begins with a bias of -20, an exponent misread: no atom is counted. SageMaker SaturatedActivation;
    TheDeepChecker: biases."""
    nn.init.constant_(t.model.readout.gate.bias, -20.0)


@fault(molecules, "dead-units", "gradient-zero", "feature-constant", "poor-initialisation", modules=tuple(f"layers.{i}.{part}" for i in range(3) for part in ("activation", "bond", "message")), then=("parameter-unchanged", "module-unused", "overfit", "overtraining", "loss-plateau", "update-ratio-low", *FLAT))  # fmt: skip
def bonds_that_mute(t: Training) -> None:
    """Embeddings of bonds begin at -30, the fill value of missing bonds: no message is ever above zero. SageMaker DeadRelu;
    Humbatova: wrong weights initialisation."""
    for layer in t.model.layers:
        nn.init.normal_(layer.bond.weight, mean=-30.0)


@fault(molecules, "gradient-accumulation", step=1, then=(*DIVERGES, *STUCK, *FLAT, "dead-units", "overfit", "overtraining"))  # fmt: skip
def zeroed_outside_the_inner_loop(t: Training) -> None:
    """`zero_grad()` stands in front of the inner loop: gradients of all 47 batches of an epoch add up. TrainCheck: misplaced
    `zero_grad`."""
    t.schedule = None
    t.optimize = lambda p: torch.optim.SGD(p, 0.01)

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        if step % 47 == 0:
            training.optimizer.zero_grad()
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


@fault(molecules, "optimizer-misses-parameters", "parameter-unchanged", modules=("kinds", "numbers", "layers"), then=("gradient-accumulation", "gradient-exploding", "optimizer-owns-others", "update-ratio-low", "loss-plateau", "stalled-optimisation", "overtraining"))  # fmt: skip
def rates_by_a_name_that_changed(t: Training) -> None:
    """Groups are made by a search for "conv" and for "readout" or "head" in names; layers are not called "conv" any more.
    TrainCheck: parameters that are not in the optimizer."""
    named = list(t.model.named_parameters())
    conv = [p for name, p in named if "conv" in name]
    rest = [p for name, p in named if name.startswith(("readout", "head"))]
    t.optimizers = [torch.optim.Adam([{"params": conv, "lr": 1e-3}, {"params": rest}], 3e-3)]


class MeanPassing(molecules.Passing):
    """Divides by the number of neighbours."""

    def forward(self, x, edges, bonds):
        sent = self.activation(self.message(x)[edges[0]] + self.bond(bonds))
        heard = molecules.summed(sent, edges[1], len(x)) / torch.bincount(edges[1], minlength=len(x))[:, None]
        return x + self.update(torch.cat([x, heard], 1))


@fault(molecules, "nonfinite-activation", modules=("layers.0", "layers.0.update", "layers.0.update.0"), step=80, then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "output-constant"))  # fmt: skip
def atoms_without_neighbours(t: Training) -> None:
    """The mean of the messages divides by the number of neighbours; from step 80 on salts come, whose ions have none. GRIST:
    division by zero."""
    t.model.layers = nn.ModuleList(MeanPassing(nn.ReLU, nn.BatchNorm1d) for _ in range(3))

    def change(batch: Batch, step: int) -> Batch:
        numbers, kinds, edges, bonds, graph, values = batch
        bound = (edges != len(kinds) - 1).all(0) if step >= 80 else torch.ones_like(bonds, dtype=torch.bool)
        return numbers, kinds, edges[:, bound], bonds[bound], graph, values

    changed(t, change, ("train",))


class Apart(molecules.Passing):
    """Messages fade with the distance between atoms in the hidden space; each atom hears itself, too."""

    def forward(self, x, edges, bonds):
        itself = torch.arange(len(x)).expand(2, -1)
        edges, bonds = torch.cat([edges, itself], 1), torch.cat([bonds, torch.zeros(len(x), dtype=torch.long)])
        distance = (x[edges[0]] - x[edges[1]]).square().sum(1, keepdim=True).sqrt()
        sent = self.activation(self.message(x)[edges[0]] + self.bond(bonds)) * torch.exp(-0.1 * distance)
        return x + self.update(torch.cat([x, molecules.summed(sent, edges[1], len(x))], 1))


@fault(molecules, "nonfinite-gradient", "nonfinite-parameter", modules=("", "layers", "kinds", "numbers", *(f"layers.{i}" for i in range(3))), then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "output-constant"))  # fmt: skip
def distance_of_an_atom_from_itself(t: Training) -> None:
    """Loops from each atom to itself were added, and the distance of an atom from itself is the root of zero, whose slope is
    infinite. GRIST: sqrt at zero."""
    t.model.layers = nn.ModuleList(Apart(nn.ReLU, nn.BatchNorm1d) for _ in range(3))


@fault(molecules, "overfit", "overtraining", "input-duplicate", step=99, then=("loss-plateau", "input-drift", "update-ratio-low"))  # fmt: skip
def first_page_of_the_database(t: Training) -> None:
    """The query of the database returns its first page only, 24 molecules. SageMaker Overfit; Humbatova: too little data."""
    few = molecules.molecules(24, seeded(141))
    chosen = lambda step: torch.randperm(24, generator=seeded(142, step))  # noqa: E731
    t.schedule = None
    changed(t, lambda batch, step: molecules.collate([few[i] for i in chosen(step)]), ("train",))


@fault(molecules, "metric-nonfinite", step=49, then=("metric-range",))  # fmt: skip
def variance_of_one_molecule(t: Training) -> None:
    """The explained variance is taken of each molecule and then averaged: the variance of one value is zero. GRIST: division by
    zero; Humbatova: wrong validation metric."""
    measured = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        each = batch[5][:, None]
        r2 = 1 - (tensors["outputs"][:, None] - each).square().mean(1) / each.var(1, correction=0)
        return {**measured(tensors, batch), "r2": float(r2.mean())}

    t.measure = measure


@fault(molecules, "output-constant", "prediction-collapse", "loss-plateau", "stalled-optimisation", "feature-constant", step=60, then=(*STUCK, *FLAT, "overfit", "overtraining", "output-collapse", "dead-units", "update-ratio-low", "weight-norm-drift", "loss-spike"))  # fmt: skip
def values_sorted_alone(t: Training) -> None:
    """Molecules are sorted by size for the batch, and their values are not: each has the value of another. Humbatova: wrong labels;
    TheDeepChecker: data."""
    changed(t, lambda batch, step: (*batch[:5], batch[5][torch.randperm(len(batch[5]), generator=seeded(143, step))]))


@fault(molecules, "weight-norm-drift", "output-constant", "feature-constant", "activation-vanishing", step=20, then=(*STUCK, *FLAT, "gradient-zero", "dead-units", "gradient-imbalance", "loss-diverged", "overtraining", "weight-decay-on-norms", "update-ratio-high", "norm-input-variance", "loss-spike", "nonfinite-buffer"))  # fmt: skip
def decay_of_the_dropout(t: Training) -> None:
    """Two positional arguments changed places: `weight_decay=20`, the dropout in percent. Weights are gone after some steps.
    Humbatova: regularisation; TheDeepChecker: weights that vanish."""
    t.optimize = lambda p: torch.optim.AdamW(p, 3e-3, weight_decay=20.0)


@fault(molecules, "update-ratio-low", "parameter-unchanged", "scheduler-ends-early", step=10, then=(*STUCK, "overtraining"))  # fmt: skip
def decay_after_one_step(t: Training) -> None:
    """`StepLR(optimizer, 1, 0.4)`, written for epochs, is stepped at each batch: the rate is a millionth after 15. Humbatova:
    learning rate."""
    t.schedule = lambda optimizer: StepLR(optimizer, 1, 0.4)


@fault(molecules, "dropout-high", modules=("dropout",), then=(*STUCK, *FLAT, "gradient-exploding", "loss-spike", "overfit", "metric-range", "activation-exploding", "overtraining", "gradient-imbalance"))  # fmt: skip
def share_that_is_kept(t: Training) -> None:
    """`dropout: 0.97` in the configuration is the share that is kept in the old framework. Humbatova: wrong layer argument;
    UMLAUT."""
    t.model.dropout.p = 0.97


@fault(molecules, "input-duplicate", then=("overfit", "overtraining", "loss-plateau", "loss-spike"))
def conformers_without_positions(t: Training) -> None:
    """The database has eight conformers of each molecule, one behind another, and the graph does not tell them apart: a batch is
    four molecules, eight times each. TrainCheck: duplicated data."""
    some = molecules.molecules(400, seeded(145))

    def change(batch: Batch, step: int) -> Batch:
        chosen = torch.randint(len(some), (4,), generator=seeded(146, step)).repeat_interleave(8)
        return molecules.collate([some[i] for i in chosen])

    changed(t, change, ("train",))


@fault(molecules, "input-dtype")  # fmt: skip
def values_from_pandas(t: Training) -> None:
    """Values come from a table as float64, and with them the loss is. TrainCheck: dtype; Humbatova: wrong type of data."""
    changed(t, lambda batch, step: (*batch[:5], batch[5].double()))


@fault(molecules, "feature-constant", "input-constant", modules=("kinds", ""), then=("gradient-zero", "loss-plateau", "stalled-optimisation", "overfit", "overtraining", "prediction-collapse", "class-imbalance", "input-duplicate"))  # fmt: skip
def all_elements_unknown(t: Training) -> None:
    """Symbols of elements have a blank behind them in the new file, so that each atom is of the kind `unknown`. SageMaker
    TensorVariance; Humbatova: wrong preprocessing."""
    changed(t, lambda batch, step: (batch[0], torch.full_like(batch[1], molecules.KINDS - 1), *batch[2:]))


@fault(molecules, "gradient-zero", "parameter-unchanged", modules=("kinds", "numbers", "layers.0", "layers.1"), then=("loss-plateau", "stalled-optimisation", "gradient-vanishing", "module-unused", "overtraining", "update-ratio-low"))  # fmt: skip
def kept_for_a_plot(t: Training) -> None:
    """Hidden states behind the second layer are kept for a plot with `x = x.detach()`, which the third layer reads as well.
    TrainCheck: a part without gradients; SageMaker UnchangedTensor."""
    t.model.layers[1].register_forward_hook(lambda module, args, output: output.detach())


@fault(molecules, "module-unused", "parameter-unchanged", "gradient-zero", modules=("layers.1", "layers.2"))  # fmt: skip
def return_in_the_loop_of_layers(t: Training) -> None:
    """`return` is indented too far, into the loop over layers: only the first one runs. TrainCheck: parameters that are not
    updated; Humbatova: missing layer."""

    def forward(numbers, kinds, edges, bonds, graph, graphs):
        x = t.model.kinds(kinds) + t.model.numbers(numbers)
        for layer in t.model.layers:
            x = layer(x, edges, bonds)
            return t.model.head(t.model.dropout(t.model.readout(x, graph, graphs))).squeeze(1)
        return x

    t.model.forward = forward


class Attentive(molecules.Readout):
    """Attention over atoms, by hand."""

    def forward(self, x, graph, graphs: int):
        weights = (self.gate(x) * 30).exp()
        return molecules.summed(weights * self.value(x), graph, graphs) / molecules.summed(weights, graph, graphs)


@fault(molecules, "nonfinite-activation", modules=("readout",), then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "output-constant", "activation-saturated", "gradient-exploding", "loss-spike"))  # fmt: skip
def exponential_without_maximum(t: Training) -> None:
    """A softmax over the atoms of a molecule by hand, sharpened by 30, that does not subtract the largest score: Inf divided by
    Inf. GRIST: overflow of exp."""
    t.model.readout = Attentive()


@fault(molecules, "input-nonfinite", "nonfinite-loss", then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "output-constant"))  # fmt: skip
def assays_not_done(t: Training) -> None:
    """One measurement in 50 was not made, and its value is NaN in the table: it is in the loss as well. Humbatova: missing
    preprocessing; TheDeepChecker: corrupt labels."""

    def change(batch: Batch, step: int) -> Batch:
        missing = torch.rand(len(batch[5]), generator=seeded(147, step)) < 0.02
        return *batch[:5], batch[5].masked_fill(missing, math.nan)

    changed(t, change, ("train",))


@fault(molecules, "poor-initialisation", "activation-exploding", "gradient-exploding", modules=("", "numbers", "layers", "readout", "head", *(f"layers.{i}" for i in range(3)), *(f"layers.{i}.message" for i in range(3))), then=(*DIVERGES, *STUCK, *FLAT, "activation-saturated", "gradient-imbalance", "dead-units", "update-ratio-low", "overfit", "metric-range"))  # fmt: skip
def normal_of_deviation_three(t: Training) -> None:
    """All linear layers are drawn from `normal_(0, 3)`. SageMaker PoorWeightInitialization; TheDeepChecker."""
    for module in t.model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 3.0)


@fault(molecules, "input-drift", step=49, then=("overfit", "overtraining", "input-range", "metric-range", "loss-diverged", "loss-spike", "activation-exploding"))  # fmt: skip
def scaler_for_training_only(t: Training) -> None:
    """Numbers of atoms are standardised when the training set is made; those of validation are raw, with a mean of 15 and a
    deviation of 6. Humbatova: preprocessing that differs; TrainCheck: data."""
    changed(t, lambda batch, step: (15 + 6 * batch[0], *batch[1:]), ("val",))


@fault(
    molecules,
    "optimizer-duplicate-parameters",
    modules=("", "readout", "head"),
    then=("update-ratio-high", "loss-spike"),
)
def readout_listed_twice(t: Training) -> None:
    """The list of parameters is that of the model, with those of readout and head behind it, as once these were apart: they are
    stepped twice, and torch's warning is switched off. TrainCheck: optimizer and parameters."""
    listed = [*t.model.parameters(), *t.model.readout.parameters(), *t.model.head.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t.optimizers = [torch.optim.Adam(listed, 3e-3)]


@fault(molecules, "output-constant", "loss-plateau", "stalled-optimisation", "prediction-collapse", "feature-constant", "loss-input-mismatch", step=30, then=(*STUCK, *FLAT, "overtraining", "output-collapse", "update-ratio-low", "weight-norm-drift", "dead-units"))  # fmt: skip
def column_against_row(t: Training) -> None:
    """Answers are (molecules, 1) and values (molecules,): each answer is compared with each value, and their mean is the best one.
    Humbatova: wrong tensor shape."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(*batch[:5], len(batch[5]))[:, None]
        return {"loss": F.mse_loss(outputs, batch[5]), "outputs": outputs, "targets": batch[5]}

    t.forward = forward


@fault(molecules, "update-ratio-high", "loss-diverged", "loss-spike", "activation-exploding", "gradient-exploding", "weight-norm-drift", then=(*DIVERGES, *STUCK, *FLAT, *NONFINITE, "dead-units", "gradient-zero", "activation-saturated", "gradient-imbalance", "overfit", "metric-range", "dtype-headroom"))  # fmt: skip
def rate_in_thousandths(t: Training) -> None:
    """`lr: 3`, in thousandths for the old script, is read as it is. Humbatova: learning rate; TheDeepChecker: diverging loss."""
    t.optimize = lambda p: torch.optim.Adam(p, 3.0)


@fault(molecules, "input-range", "nonfinite-buffer", "activation-exploding", "gradient-exploding", modules=("", "numbers", "layers", "layers.0", *(f"layers.{i}.update.1" for i in range(3))), step=100, then=(*NONFINITE, *DIVERGES, *STUCK, *FLAT, "dtype-headroom", "gradient-zero", "activation-saturated", "input-drift", "gradient-imbalance", "metric-range", "overfit", "overtraining"))  # fmt: skip
def sentinel_of_missing_charges(t: Training) -> None:
    """From step 100 on some atoms of a new file have a charge of 1e30, which stands for "not computed" there: variances of BatchNorm
    overflow. Humbatova: missing preprocessing; TheDeepChecker: wrong data scale."""

    def change(batch: Batch, step: int) -> Batch:
        numbers, *rest = batch
        if step >= 100:
            numbers[torch.rand(len(numbers), generator=seeded(148, step)) < 0.01, 0] = 1e30
        return numbers, *rest

    changed(t, change, ("train",))


@fault(molecules, "parameter-unchanged", "precision-loss", "update-ratio-low", then=(*STUCK, "overtraining"))  # fmt: skip
def weights_of_eight_bits(t: Training) -> None:
    """The whole model is cast to bfloat16, optimizer and all, with the rate of 3e-5 of a fine-tuning: most steps are rounded away.
    TrainCheck: precision; Humbatova: wrong type."""
    t.model = t.model.bfloat16()
    t.optimize, t.schedule = (lambda p: torch.optim.SGD(p, 3e-5)), None

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(batch[0].bfloat16(), *batch[1:5], len(batch[5])).float()
        return {"loss": F.mse_loss(outputs, batch[5]), "outputs": outputs, "targets": batch[5]}

    t.forward = forward


@fault(molecules, "loss-spike", "input-range", "gradient-exploding", step=24, then=(*DIVERGES, *STUCK, "gradient-clipping", "overtraining", "overfit", "metric-range"))  # fmt: skip
def one_file_in_millielectronvolts(t: Training) -> None:
    """Each 25th batch comes from the file of another laboratory, whose values are in meV: a thousand times as large. Humbatova: wrong
    labels; TheDeepChecker: corrupt data."""
    changed(t, lambda batch, step: (*batch[:5], batch[5] * (1000 if step % 25 == 24 else 1)), ("train",))


@fault(molecules, "validation-in-train-mode", step=49, then=("overtraining",))  # fmt: skip
def normalised_by_validation(t: Training) -> None:
    """`no_grad()` is taken for `eval()`: BatchNorm normalises by batches of validation, and keeps their statistics. TrainCheck: wrong
    mode."""
    t.model.eval = lambda: t.model


@fault(
    molecules,
    "model-in-eval",
    then=("overfit", "overtraining", "watch-starved", "probe-read-nothing", "activation-exploding"),
)
def prepared_for_inference(t: Training) -> None:
    """The function that loads the model returns it in eval mode, and nobody calls `train()`: BatchNorm never sees the data. TrainCheck:
    wrong mode; Humbatova."""
    plain = t.update

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.eval()
        return plain(training, step, observer)

    t.update = update


@fault(molecules, "metric-always-none", "metric-type", step=49, then=("metric-phase-mismatch", "metric-missing"))
def correlation_without_scipy(t: Training) -> None:
    """The rank correlation is None where scipy is not installed, in each validation. Humbatova: wrong validation metric; speech: metrics
    that a model has not."""
    measured = t.measure
    t.measure = lambda tensors, batch: {**measured(tensors, batch), "spearman": None}


@fault(molecules, "input-constant", "gradient-zero", "feature-constant", "parameter-unchanged", modules=("numbers", ""), then=("module-unused", "gradient-vanishing", "dead-units", "input-duplicate", "activation-vanishing"))  # fmt: skip
def numbers_replaced_by_zeros(t: Training) -> None:
    """The columns of numbers are dropped by a filter that keeps integers, and filled with zeros: the weights that read them get gradients of
    zero. TheDeepChecker: constant inputs; SageMaker AllZero."""
    t.model.numbers = nn.Linear(molecules.NUMBERS, molecules.WIDTH, bias=False)
    changed(t, lambda batch, step: (torch.zeros_like(batch[0]), *batch[1:]))
