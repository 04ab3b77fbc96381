"""What goes wrong with tables: missing values, units, joins, unknown categories, groups of parameters, shapes, counts."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR

from faults import tabular
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Tensors, Training, seeded


@fault(tabular, "input-nonfinite", "nonfinite-input", "nonfinite-activation", "nonfinite-loss", modules=("", "numbers"), step=120, then=(*NONFINITE, *STUCK, "nonfinite-buffer", "feature-constant"))  # fmt: skip
def missing_values_left(t: Training) -> None:
    """From step 120 on rows of a new month come, in which one column has gaps: they reach the model as NaN. Humbatova: missing
    preprocessing; TheDeepChecker: corrupt data."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        numbers, *rest = plain(step, phase)
        if phase == "train" and step >= 120:
            numbers[torch.rand(len(numbers), generator=seeded(1, step)) < 0.05, 4] = math.nan
        return numbers, *rest

    t.sample = sample


@fault(tabular, "input-range", "activation-exploding", "gradient-imbalance", "gradient-vanishing", modules=("", "numbers", "layer1", "tables"), then=(*DIVERGES, *STUCK, *FLAT, "dead-units", "parameter-unchanged", "update-ratio-low", "overfit", "dtype-headroom", "gradient-zero"))  # fmt: skip
def income_in_cents(t: Training) -> None:
    """One column was forgotten in the list of those to standardise: an income in cents. UMLAUT and Humbatova: features that are
    not normalised."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        numbers, *rest = plain(step, phase)
        numbers[:, 5] = 4.2e6 + 1.1e6 * numbers[:, 5]
        return numbers, *rest

    t.sample = sample


class Column(tabular.Table):
    """The last axis of the head stays."""

    def forward(self, numbers, categories):
        return super().forward(numbers, categories)[:, None]


@fault(tabular, "output-constant", "feature-constant", "prediction-collapse", "loss-plateau", "stalled-optimisation", "loss-input-mismatch", then=(*STUCK, *FLAT, "output-collapse", "weight-norm-drift", "overfit", "overtraining"))  # fmt: skip
def squeeze_forgotten(t: Training) -> None:
    """Answers are (batch, 1) and targets (batch,): the squared error compares each with each, and the mean of all prices is the
    best answer. Humbatova: wrong tensor shape; a warning of torch's, easily lost."""
    t.model = Column()


@fault(tabular, "optimizer-misses-parameters", "parameter-unchanged", modules=("numbers", "tables"), then=("optimizer-owns-others",))  # fmt: skip
def columns_in_no_group(t: Training) -> None:
    """One group with weight decay for linear layers, one without it for norms; embeddings are in neither. TrainCheck: parameters
    that no optimizer holds."""
    groups = [
        {"params": [p for m in t.model.modules() if isinstance(m, kind) for p in m.parameters()], "weight_decay": decay}
        for kind, decay in ((nn.Linear, 1e-4), (nn.BatchNorm1d, 0.0))
    ]
    t.optimizers = [torch.optim.AdamW(groups, 5e-3)]


@fault(tabular, "nonfinite-loss", "loss-diverged", "output-nonfinite", modules=("",), then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "output-constant", "gradient-exploding", "loss-spike"))  # fmt: skip
def exposure_not_in_logarithm(t: Training) -> None:
    """A Poisson loss of counts of claims: to the logarithm of the rate the days of exposure are added, not their logarithm, and
    the exponential of 300 is Inf. GRIST: overflow of exp."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        numbers, categories, price = plain(step, phase)
        days = torch.randint(30, 366, (len(price),), generator=seeded(5, step, len(phase))).float()
        return numbers, categories, torch.poisson(days / 100 * (price / 2).exp(), seeded(6, step, len(phase))), days

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        outputs = model(*batch[:2]) + batch[3]
        return {"loss": F.poisson_nll_loss(outputs, batch[2]), "outputs": outputs, "targets": batch[2]}

    t.sample, t.forward = sample, forward


@fault(tabular, "dead-units", "feature-constant", modules=("numbers",), then=("gradient-zero", "parameter-unchanged", "module-unused", "poor-initialisation", "overfit", "overtraining", *FLAT, "units-symmetric"))  # fmt: skip
def edges_in_raw_units(t: Training) -> None:
    """The lines of each column start at quantiles of the raw data, 20 to 80, and columns are standardised: no line is ever above
    zero. SageMaker DeadRelu; Humbatova: wrong weights initialisation."""
    nn.init.ones_(t.model.numbers.weight)
    with torch.no_grad():
        t.model.numbers.bias.copy_(-torch.linspace(20.0, 80.0, tabular.EACH).expand(tabular.NUMBERS, -1))


@fault(tabular, "feature-constant", modules=("tables.0",), then=("gradient-zero", "loss-plateau", "stalled-optimisation", "overfit", "overtraining"))  # fmt: skip
def every_town_unknown(t: Training) -> None:
    """Keys are text in the file and numbers in the dictionary, so that each lookup of a town falls back to 0. SageMaker
    TensorVariance; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        numbers, categories, price = plain(step, phase)
        categories[:, 0] = 0
        return numbers, categories, price

    t.sample = sample


@fault(tabular, "gradient-accumulation", "gradient-exploding", "weight-norm-drift", "loss-diverged", step=1, then=(*DIVERGES, *STUCK, *FLAT, "dead-units", "overfit", "overtraining"))  # fmt: skip
def average_is_zeroed(t: Training) -> None:
    """`zero_grad()` is called for the running average of the model, a name away: gradients of all steps add up. TrainCheck:
    missing `zero_grad`."""
    average = copy.deepcopy(t.model)

    def zero_another(training: Training, step: int) -> None:
        training.optimizer.zero_grad = average.zero_grad

    t.before.append(zero_another)


@fault(tabular, "update-ratio-low", "loss-plateau", "stalled-optimisation", "parameter-unchanged", "schedule-unfinished", "scheduler-ends-early", step=40, then=STUCK)  # fmt: skip
def decay_at_each_batch(t: Training) -> None:
    """A decay by 0.8 per epoch is stepped at each batch: after 60 of them the rate is a millionth. Humbatova: learning rate."""
    t.schedule = lambda optimizer: ExponentialLR(optimizer, 0.8)


@fault(tabular, "input-duplicate", then=("overfit", "overtraining", "loss-plateau"))
def join_multiplies_rows(t: Training) -> None:
    """The key of a join is not unique: each customer comes eight times in a row, and the file is read in its order. TrainCheck:
    duplicated data; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        batch = plain(step, phase)
        return tuple(column[:8].repeat_interleave(8, 0) for column in batch) if phase == "train" else batch

    t.sample = sample


@fault(tabular, "input-constant", "input-duplicate", step=100, then=(*STUCK, *FLAT, "input-drift", "loss-spike", "loss-diverged", "dead-units", "overfit", "overtraining"))  # fmt: skip
def join_without_partners(t: Training) -> None:
    """From step 100 on keys have another spelling: three rows of four find no partner in the table of features, and `fillna(0)`
    hides it. TheDeepChecker: constant inputs."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        numbers, categories, price = plain(step, phase)
        if phase == "train" and step >= 100:
            found = torch.rand(len(price), 1, generator=seeded(12, step)) < 0.25
            numbers, categories = numbers * found, categories * found
        return numbers, categories, price

    t.sample = sample


@fault(tabular, "class-imbalance", "prediction-collapse", step=49, then=("overfit", "overtraining", "output-constant", "gradient-vanishing"))  # fmt: skip
def frauds_are_rare(t: Training) -> None:
    """A classifier of frauds, two in a hundred rows, with no weights and no sampling: it says `no` to all, and is right in 98 %
    of the cases. SageMaker ClassImbalance."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        numbers, categories, price = plain(step, phase)
        chance = torch.sigmoid(1.2 * price - 4.3)
        return numbers, categories, torch.bernoulli(chance, generator=seeded(14, step, len(phase)))

    t.sample = sample
    tabular.classified(t, 0.5)


@fault(tabular, "update-ratio-high", "weight-norm-drift", "dead-units", "loss-diverged", "loss-spike", "gradient-exploding", "activation-exploding", then=(*DIVERGES, *STUCK, *FLAT, "gradient-zero", "overfit", "overtraining", "gradient-imbalance", "dtype-headroom"))  # fmt: skip
def rate_of_adadelta(t: Training) -> None:
    """Adadelta was replaced by Adam, and its rate of 1.0 was kept: each step is as large as the weights. Humbatova: learning rate;
    AutoTrainer: oscillating loss."""
    t.optimize = lambda p: torch.optim.Adam(p, 1.0)


@fault(tabular, "scheduler-ends-early", step=101, then=("loss-spike", "overfit", "update-ratio-low"))
def cosine_of_one_third(t: Training) -> None:
    """`T_max=100` from a shorter run: the cosine is at zero after a third of the run, and goes up again. Humbatova: learning
    rate."""
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 100)
