"""What goes wrong in translators: warm-up, positions, scores by hand, coverage, tied tables, bounds, files that end."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from faults import translator
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Tensors, Training, plain_update

PARTS = tuple(f"{part}.{i}" for part in ("encoder", "decoder") for i in range(2))


@fault(translator, "update-ratio-low", "schedule-unfinished", then=(*STUCK, "class-imbalance", "schedule-unreachable"))  # fmt: skip
def warm_up_of_a_large_corpus(t: Training) -> None:
    """A warm-up of 400,000 steps, for a corpus with millions of sentences: the rate of the run's last step is 4e-6. Humbatova: learning
    rate."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: (step + 1) / 400_000)


@fault(translator, "activation-exploding", "feature-constant", modules=("source", "target", "encoder", "decoder", "source.dropout", "target.dropout", *PARTS), then=(*DIVERGES, *STUCK, *FLAT, "activation-saturated", "gradient-imbalance", "attention-head-dead", "class-imbalance", "overtraining", "dtype-headroom", "update-ratio-low", "dead-units", "poor-initialisation"))  # fmt: skip
def positions_in_milliseconds(t: Training) -> None:
    """The buffer of sines was multiplied by 1000 for a plot, in place: positions drown the words. TheDeepChecker: wrong scale; SageMaker
    ExplodingTensor."""
    for words in (t.model.source, t.model.target):
        words.position.mul_(1000)


class Hard(translator.Attention):
    """A softmax by hand."""

    def forward(self, x, memory, hidden):
        q, k, v = (part.unflatten(-1, (translator.HEADS, -1)).transpose(1, 2) for part in (self.query(x), self.key(memory), self.value(memory)))  # fmt: skip
        weights = (q @ k.mT * 25).masked_fill(hidden, -math.inf).exp()
        return self.out((weights / weights.sum(-1, keepdim=True) @ v).transpose(1, 2).flatten(2))


@fault(translator, "nonfinite-activation", modules=(*(f"{p}.attention" for p in PARTS), *PARTS), then=(*NONFINITE, *DIVERGES, "prediction-collapse", "metric-constant", "activation-saturated", "class-imbalance"))  # fmt: skip
def softmax_of_large_scores(t: Training) -> None:
    """A softmax by hand that does not subtract the largest score, and a scale of 25 where one over the root of eight belongs. GRIST: overflow
    of exp, division by zero."""
    for block in (*t.model.encoder, *t.model.decoder):
        block.attention = Hard()


@fault(translator, "nonfinite-gradient", "nonfinite-parameter", modules=("", "decoder", *(f"decoder.{i}{part}" for i in range(2) for part in ("", ".cross", ".cross.softmax", ".cross.query", ".cross.key"))), then=(*NONFINITE, "prediction-collapse", "metric-constant", "class-imbalance"))  # fmt: skip
def coverage_of_padding(t: Training) -> None:
    """A term for coverage takes the root of how often each source word was looked at; padding never was, and the slope there is infinite.
    GRIST: sqrt at zero; coverage of See et al. 2017."""
    looked: list[torch.Tensor] = []
    for block in t.model.decoder:
        block.cross.softmax.register_forward_hook(lambda module, args, output: looked.append(output))

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        looked.clear()
        tensors = translator.forward(model, batch)
        coverage = sum(weights.sum((1, 2)).sqrt().mean() for weights in looked)
        return {**tensors, "loss": tensors["loss"] - 0.01 * coverage}

    t.forward = forward


@fault(translator, "dropout-high", modules=("source.dropout", "target.dropout"), then=(*STUCK, "activation-exploding", "gradient-imbalance", "overtraining", "class-imbalance", "input-drift", "feature-constant"))  # fmt: skip
def words_dropped(t: Training) -> None:
    """Dropout of embeddings is 0.95: `keep_prob` of the paper's own code. Humbatova: wrong layer argument; UMLAUT."""
    t.model.source.dropout.p = t.model.target.dropout.p = 0.95


@fault(translator, "validation-in-train-mode", step=49, then=("overtraining",))
def validated_as_it_was_trained(t: Training) -> None:
    """Scores of the validation set are taken inside the training loop, and `eval()` is called on an average of the weights that is not
    used yet. TrainCheck: wrong mode."""
    t.model = translator.Translator(dropout=0.25)
    average = copy.deepcopy(t.model)
    t.model.eval = average.eval


@fault(translator, "optimizer-duplicate-parameters", modules=("source", "target", "source.table", "target.table", ""), then=("update-ratio-high",))  # fmt: skip
def tables_in_two_optimizers(t: Training) -> None:
    """Tables have an optimizer of their own by now, and were not taken out of the first one: they are stepped by both. TrainCheck:
    optimizer and parameters."""
    tables = [t.model.source.table.weight, t.model.target.table.weight]
    t.optimizers = [t.optimize(t.model.parameters()), torch.optim.Adam(tables, 5e-3)]

    def update(training, step, observer):
        training.optimizers[1].zero_grad()
        seen = plain_update(training, step, observer)
        training.optimizers[1].step()
        return seen

    t.update = update


@fault(translator, "gradient-clipping", "parameter-unchanged", "update-ratio-low", "gradient-zero", then=(*STUCK, "stalled-from-start", "class-imbalance"))  # fmt: skip
def bound_of_zero(t: Training) -> None:
    """`clip_norm: 0.0` means "no clipping" in fairseq, and here that each gradient is multiplied by zero. TrainCheck: wrong clip;
    Humbatova."""
    t.optimize, t.clip = (lambda p: torch.optim.Adam(p, 5e-3, betas=(0.9, 0.98))), 0.0


@fault(translator, "units-symmetric", "poor-initialisation", modules=tuple(f"{p}.{kind}{inner}" for p in PARTS for kind in ("attention", "cross") if kind == "attention" or p.startswith("decoder") for inner in ("", ".query", ".key", ".value", ".out")), then=("feature-constant", "gradient-zero", "gradient-imbalance", "loss-plateau", "stalled-optimisation", "attention-head-dead", *STUCK))  # fmt: skip
def projections_of_one_number(t: Training) -> None:
    """All projections of attention begin with the same number in each place, the deviation instead of a draw with it. TheDeepChecker:
    symmetric initialisation; Humbatova: wrong weights initialisation."""
    for module in t.model.modules():
        if isinstance(module, translator.Attention):
            for layer in (module.query, module.key, module.value, module.out):
                nn.init.constant_(layer.weight, translator.WIDTH**-0.5)
                nn.init.zeros_(layer.bias)


@fault(translator, "update-ratio-high", "loss-diverged", "loss-spike", step=150, then=(*DIVERGES, *STUCK, *FLAT, "dead-units", "activation-saturated", "gradient-clipping", "prediction-collapse", "class-imbalance", "overfit", "overtraining", "gradient-zero"))  # fmt: skip
def rate_multiplied_twice(t: Training) -> None:
    """At step 150, when a second corpus begins, the rate is set to that of the schedule times the base rate of SGD, 0.5, and stays
    there. Humbatova: learning rate; AutoTrainer."""

    def second_corpus(training: Training, step: int) -> None:
        if step >= 150:
            for group in training.optimizer.param_groups:
                group["lr"] = 0.5

    t.before.append(second_corpus)


@fault(
    translator,
    "parameter-changed",
    modules=("target", "target.table"),
    step=60,
    then=("optimizer-frozen-parameters", "gradient-zero"),
)
def frozen_table_with_momentum(t: Training) -> None:
    """The table of the target is frozen at step 60, and `set_to_none=False` leaves it a gradient of zeros: its moments and the decay move
    it on. TrainCheck: frozen parameters that change."""
    plain = t.optimize

    def optimize(parameters):
        optimizer = plain(parameters)
        zero = optimizer.zero_grad
        optimizer.zero_grad = lambda set_to_none=False: zero(set_to_none=set_to_none)
        return optimizer

    t.optimize = optimize
    t.before.append(lambda training, step: training.model.target.table.requires_grad_(step < 60))


@fault(translator, "prediction-collapse", "class-imbalance", "input-duplicate", step=100, then=(*STUCK, "input-drift", "overfit", "overtraining", "loss-diverged", "gradient-vanishing", "gradient-zero", "metric-constant", "loss-spike", "activation-saturated", "feature-constant", "input-constant"))  # fmt: skip
def targets_end_early(t: Training) -> None:
    """The file of the target language is shorter, and `zip_longest` fills it with empty lines: from step 100 on each sentence ends at
    once. Humbatova: wrong labels."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        source, previous, following = plain(step, phase)
        if phase == "train" and step >= 100:
            previous[:, 1:], following = translator.PAD, torch.full_like(following, translator.NOTHING)
            following[:, 0] = translator.END
        return source, previous, following

    t.sample = sample


@fault(translator, "optimizer-misses-parameters", "parameter-unchanged", modules=("decoder", "decoder.0", "decoder.1"), then=("gradient-accumulation", "gradient-exploding", "gradient-clipping", "optimizer-owns-others", "update-ratio-low"))  # fmt: skip
def decoder_added_last(t: Training) -> None:
    """The optimizer is built in `__init__`, two lines above the decoder's blocks. TrainCheck: parameters that are not in the optimizer;
    Humbatova."""
    t.optimizers = [t.optimize([p for name, p in t.model.named_parameters() if not name.startswith("decoder.")])]


@fault(translator, "metric-nonfinite", step=49, then=("metric-range", "metric-constant"))  # fmt: skip
def score_with_a_logarithm(t: Training) -> None:
    """BLEU by hand takes the logarithm of the share of exact sentences without smoothing, which is zero in the first validations: minus
    infinity. GRIST: log of zero; Humbatova: wrong validation metric."""
    measured = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        metrics = measured(tensors, batch)
        return {**metrics, "log_score": float(torch.tensor([metrics["accuracy"], metrics["exact"]]).log().mean())}

    t.measure = measure


@fault(translator, "input-constant", "input-duplicate", "feature-constant", modules=("source", "encoder", "source.table", ""), then=("dead-units", *STUCK, "overfit", "overtraining", "attention-head-dead", "class-imbalance", "gradient-zero", "stalled-optimisation"))  # fmt: skip
def path_of_the_source_empty(t: Training) -> None:
    """The variable of the path to sources is empty, and its loader returns `unknown` for each word: all sentences are alike.
    TheDeepChecker: constant inputs; SageMaker TensorVariance."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        source, *rest = plain(step, phase)
        return torch.full_like(source, 3), *rest

    t.sample = sample


@fault(translator, "update-ratio-high", "loss-diverged", "gradient-exploding", "loss-spike", "weight-norm-drift", then=(*DIVERGES, *STUCK, *FLAT, *NONFINITE, "dead-units", "activation-saturated", "gradient-clipping", "gradient-zero", "class-imbalance", "attention-head-dead", "overtraining"))  # fmt: skip
def loss_of_all_words(t: Training) -> None:
    """`reduction="sum"`, with SGD at the rate of a mean and without a bound: each step is two hundred times too long. Humbatova: wrong
    loss; TheDeepChecker: wrong reduction."""
    t.optimize, t.schedule, t.clip = (lambda p: torch.optim.SGD(p, 0.3, momentum=0.9)), None, None

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(*batch[:2])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[2].flatten(), reduction="sum")
        return {"loss": loss, "logits": logits, "targets": batch[2]}

    t.forward = forward
