"""What goes wrong in translators: masks, memories, vocabularies, padding, rates, tables, metrics of sentences."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from faults import translator
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, plain_update, seeded

ENCODER = ("encoder", "source", "encoder_norm")


def in_training(t: Training, change) -> None:
    """Replace training batches by `change(*batch, step)`."""
    plain = t.sample
    t.sample = lambda step, phase: change(*plain(step, phase), step) if phase == "train" else plain(step, phase)


def with_loss(t: Training, loss) -> None:
    """Replace the loss by that of `(logits, targets)`, both flat."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(*batch[:2])
        return {"loss": loss(logits.flatten(0, 1), batch[2].flatten()), "logits": logits, "targets": batch[2]}

    t.forward = forward


@fault(translator, "nonfinite-activation", "nonfinite-loss", "input-constant", modules=("encoder.0.attention", "encoder.0.attention.softmax"), step=90, then=(*NONFINITE, "prediction-collapse", "metric-constant", "step-skipped"))  # fmt: skip
def source_of_padding_only(t: Training) -> None:
    """From step 90 on one source is empty, as the file has blank lines: attention may look at nothing, and its softmax is NaN.
    GRIST: division by zero; pytorch/pytorch#41508."""

    def blank(source, previous, following, step):
        if step >= 90:
            source = source.clone()
            source[7] = translator.PAD
        return source, previous, following

    in_training(t, blank)


@fault(translator, "nonfinite-activation", "nonfinite-loss", "output-nonfinite", modules=("encoder.0.attention", "encoder.0.attention.softmax"), then=(*NONFINITE, "prediction-collapse", "metric-constant", "class-imbalance"))  # fmt: skip
def mask_of_the_other_kind(t: Training) -> None:
    """`source != PAD`, a mask of what is kept, where that of what is hidden belongs: sentences without padding may look at
    nothing. GRIST; Humbatova: wrong tensor; the two kinds of mask in pytorch and Hugging Face."""

    def invert(module, args):
        x, memory, hidden = args
        return x, memory, ~hidden

    for block in t.model.encoder:
        block.attention.register_forward_pre_hook(invert)


@fault(translator, "gradient-zero", "module-unused", "parameter-unchanged", modules=(*ENCODER, "decoder.0.cross", "decoder.0.norm2", "decoder.1.cross", "decoder.1.norm2"), then=("loss-plateau", "stalled-optimisation", "update-ratio-low", "overfit", "overtraining", "feature-constant"))  # fmt: skip
def memory_not_passed(t: Training) -> None:
    """The decoder is called without the encoder's memory, and its default of None skips the attention to it: a language model
    remains. TrainCheck: a part without gradients; Humbatova: missing argument."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        model.encode(batch[0])
        logits = model.decode(batch[1], None, None)
        loss = F.cross_entropy(logits.flatten(0, 1), batch[2].flatten())
        return {"loss": loss, "logits": logits, "targets": batch[2]}

    t.forward = forward


@fault(translator, "gradient-zero", "parameter-unchanged", "module-unused", modules=ENCODER, then=("update-ratio-low",))
def source_without_gradient(t: Training) -> None:
    """`encode` has the `@torch.no_grad()` that was meant for `translate` below it. SageMaker UnchangedTensor; TrainCheck: no
    gradients."""
    t.model.encode = torch.no_grad()(t.model.encode)


@fault(translator, "optimizer-misses-parameters", "parameter-unchanged", modules=("target", "target.table"), then=("optimizer-owns-others",))  # fmt: skip
def vocabulary_grown_too_late(t: Training) -> None:
    """The target's table is replaced, for a vocabulary with two more words, behind the optimizer. TrainCheck:
    huggingface/accelerate#2665; SageMaker UnchangedTensor."""
    t.optimizers = [t.optimize(t.model.parameters())]
    table = nn.Embedding(translator.WORDS + 2, translator.WIDTH, padding_idx=translator.PAD)
    with torch.no_grad():
        table.weight[: translator.WORDS] = t.model.target.table.weight
    t.model.target.table = table


@fault(translator, "update-ratio-high", "activation-saturated", "dead-units", "weight-norm-drift", "loss-plateau", "stalled-optimisation", "loss-diverged", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "gradient-zero", "gradient-clipping", "attention-head-dead", "class-imbalance"))  # fmt: skip
def rate_without_the_width(t: Training) -> None:
    """The schedule of Vaswani et al. without its factor of the width: a peak of 0.16. Humbatova: learning rate;
    AutoTrainer: oscillating loss."""
    t.optimize = lambda p: torch.optim.Adam(p, 1.0, betas=(0.9, 0.98), eps=1e-9)
    t.schedule = lambda o: LambdaLR(o, lambda step: min((step + 1) ** -0.5, (step + 1) * 40**-1.5))


@fault(translator, "class-imbalance", "prediction-collapse", then=(*STUCK, "overfit", "overtraining", "input-constant", "gradient-imbalance", "feature-constant", "output-constant", "input-duplicate"))  # fmt: skip
def padding_is_scored(t: Training) -> None:
    """Sentences are padded to 48, and the padding is a target like any word: six targets in seven. SageMaker
    NLPSequenceRatio and ClassImbalance."""
    plain = t.sample
    wide = lambda x: F.pad(x.clamp(min=0), (0, 48 - x.shape[1]))  # noqa: E731 - one line beside its use
    t.sample = lambda step, phase: tuple(wide(part) for part in plain(step, phase))
    t.steps = 100


@fault(translator, "gradient-accumulation", then=(*DIVERGES, *STUCK, *FLAT, "gradient-clipping", "dead-units", "activation-saturated"))  # fmt: skip
def zeroed_in_the_copy(t: Training) -> None:
    """`zero_grad()` is called on the model that was wrapped, a deep copy by now, so that gradients of all batches add up.
    TrainCheck: zero_grad."""
    t.optimize, t.clip = (lambda p: torch.optim.SGD(p, 0.05)), None

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


@fault(translator, "update-ratio-high", "loss-diverged", "loss-spike", "activation-exploding", "gradient-exploding", then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "activation-saturated", "gradient-zero", "gradient-clipping", "attention-head-dead", "class-imbalance", "parameter-unchanged"))  # fmt: skip
def exponent_lost(t: Training) -> None:
    """`lr: 5` in the configuration, where `5e-3` was. Humbatova: learning rate; TheDeepChecker: diverging loss."""
    t.optimize = lambda p: torch.optim.AdamW(p, 5.0, betas=(0.9, 0.98), weight_decay=0.0)


@fault(translator, "activation-saturated", modules=("decoder.0.cross", "decoder.1.cross", "decoder.0.cross.softmax", "decoder.1.cross.softmax"), then=("gradient-vanishing", "gradient-imbalance", "gradient-zero", "loss-plateau", "stalled-optimisation", "update-ratio-low", "gradient-exploding"))  # fmt: skip
def temperature_of_a_hundredth(t: Training) -> None:
    """Scores of the attention to the source are divided by a temperature of 0.01, meant for sampling: each softmax is one-hot.
    SageMaker SaturatedActivation; TheDeepChecker."""
    for block in t.model.decoder:
        block.cross.softmax.register_forward_pre_hook(lambda module, args: (args[0] / 0.01,))


@fault(translator, "loss-input-mismatch", "loss-plateau", "stalled-optimisation", "gradient-vanishing", "activation-saturated", modules=("head",), then=(*STUCK, "update-ratio-low", "gradient-imbalance", "overtraining"))  # fmt: skip
def probabilities_into_cross_entropy(t: Training) -> None:
    """The head ends in a softmax, for the beam search, and the loss makes another one. Humbatova: wrong loss for the last
    layer; UMLAUT."""
    t.model.head = nn.Sequential(t.model.head, nn.Softmax(-1))


@fault(translator, "dead-units", "feature-constant", modules=("encoder.0.mlp", "encoder.1.mlp", "decoder.0.mlp", "decoder.1.mlp"), then=("gradient-zero", "parameter-unchanged", "activation-vanishing", "poor-initialisation", "module-unused", "update-ratio-low"))  # fmt: skip
def biases_of_minus_ten(t: Training) -> None:
    """All feed-forward layers begin with a bias of -10, as a head for rare events does: no ReLU ever opens. SageMaker
    DeadRelu; TheDeepChecker: biases."""
    for block in (*t.model.encoder, *t.model.decoder):
        nn.init.constant_(block.mlp[0].bias, -10.0)


@fault(translator, "nonfinite-buffer", "nonfinite-activation", "nonfinite-loss", modules=("source", "target", "source.dropout", "target.dropout"), then=(*NONFINITE, "prediction-collapse", "metric-constant", "class-imbalance"))  # fmt: skip
def logarithm_of_position_zero(t: Training) -> None:
    """Positions on a logarithmic scale, and the first one is zero: the sine of minus infinity is NaN. GRIST: logarithm of
    zero."""
    for words in (t.model.source, t.model.target):
        rates = torch.exp(-math.log(100.0) * torch.arange(0, translator.WIDTH, 2) / translator.WIDTH)
        angles = torch.arange(len(words.position)).log()[:, None] * rates
        words.position.copy_(torch.cat([angles.sin(), angles.cos()], 1))


@fault(translator, "nonfinite-loss", modules=("",), then=(*NONFINITE, "step-skipped"))
def forbidden_words_are_smoothed(t: Training) -> None:
    """Padding and start may not be said: their logits are minus infinity, and label smoothing asks for a share of them.
    GRIST: logarithm of zero; Humbatova: wrong loss."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(*batch[:2])
        allowed = logits.index_fill(-1, torch.tensor([translator.PAD, translator.START]), -math.inf)
        loss = F.cross_entropy(allowed.flatten(0, 1), batch[2].flatten(), label_smoothing=0.1)
        return {"loss": loss, "logits": logits, "targets": batch[2]}

    t.forward = forward


@fault(translator, "loss-plateau", "stalled-optimisation", "prediction-collapse", step=40, then=(*STUCK, "overfit", "overtraining", "feature-constant", "attention-head-dead", "class-imbalance"))  # fmt: skip
def lines_out_of_step(t: Training) -> None:
    """One of the two files lost a line: each source has the translation of another one, in training and in validation.
    Humbatova: wrong labels; TheDeepChecker: data."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        source, previous, following = plain(step, phase)
        return source.roll(1, 0), previous, following

    t.sample = sample


@fault(translator, "overfit", "overtraining", step=49, then=("input-duplicate", "input-drift", "loss-plateau", "weight-norm-drift"))  # fmt: skip
def forty_pairs(t: Training) -> None:
    """`head -40` of the corpus, from a test of the script: learnt by heart. SageMaker Overfit; TheDeepChecker."""
    few = translator.sentences(40, seeded(3))
    rows = lambda step: torch.randperm(40, generator=seeded(4, step))[: translator.BATCH]  # noqa: E731
    in_training(t, lambda *batch: tuple(part[rows(batch[-1])] for part in few))


@fault(translator, "input-drift", step=49, then=("overfit", "overtraining", "input-duplicate", "metric-constant", "input-constant"))  # fmt: skip
def validation_of_unknown_words(t: Training) -> None:
    """Validation reads its sources by a vocabulary in capitals: each word is the unknown one. Humbatova: preprocessing that
    differs; TrainCheck: data."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        source, previous, following = plain(step, phase)
        return (source.clamp(max=3) if phase == "val" else source), previous, following

    t.sample = sample


@fault(translator, "metric-constant", step=99, then=("metric-phase-mismatch", "metric-range"))
def exact_against_its_input(t: Training) -> None:
    """Sentences are compared with what the decoder was given, whose first token is the start that it never says: exactly 0.0
    for ever. Humbatova: wrong validation metric; speech: wenet-e2e/wenet."""
    measured = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        said = tensors["logits"].argmax(-1)
        return {**measured(tensors, batch), "exact": float((said == batch[1]).all(1).float().mean())}

    t.measure = measure


@fault(translator, "metric-range", step=49)
def hits_for_each_sentence(t: Training) -> None:
    """The accuracy is the number of right words divided by that of sentences: 4.2. Humbatova: wrong validation metric."""
    measured = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        hits = (tensors["logits"].argmax(-1) == batch[2]).sum()
        return {**measured(tensors, batch), "accuracy": float(hits / len(batch[2]))}

    t.measure = measure


@fault(translator, "metric-nonfinite", "metric-range", step=49)
def perplexity_of_summed_losses(t: Training) -> None:
    """The exponential of the summed loss, where that of its mean belongs: Inf in each validation. GRIST: overflow of an
    exponential; Humbatova: wrong validation metric."""
    measured = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        summed = F.cross_entropy(tensors["logits"].flatten(0, 1), batch[2].flatten(), reduction="sum")
        return {**measured(tensors, batch), "perplexity": float(summed.exp())}

    t.measure = measure


@fault(translator, "scheduler-ends-early", then=("schedule-unfinished", "schedule-restarted", "loss-plateau", "loss-spike", "update-ratio-low", "update-ratio-high"))  # fmt: skip
def cosine_of_a_shorter_run(t: Training) -> None:
    """`CosineAnnealingLR(T_max=40)`, the length of an older run: the rate is zero at step 40, then rises and falls again and
    again. Humbatova: learning rate."""
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 40)


@fault(translator, "optimizer-misses-parameters", "parameter-unchanged", modules=("encoder_norm", "decoder_norm", *(f"{part}.{i}.{norm}" for part, norms in (("encoder", (1, 3)), ("decoder", (1, 2, 3))) for i in range(2) for norm in (f"norm{n}" for n in norms))))  # fmt: skip
def norms_in_no_group(t: Training) -> None:
    """Matrices go to the group that decays, biases to the other; gains of norms are neither. TrainCheck: parameters that are
    not in the optimizer; minGPT's assertion against it."""
    named = list(t.model.named_parameters())
    groups = [
        {"params": [p for name, p in named if name.endswith("weight") and p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0},
    ]
    t.optimizers = [torch.optim.AdamW(groups, 5e-3, betas=(0.9, 0.98))]


@fault(translator, "loss-sign", "prediction-collapse", "metric-constant", "output-constant", "activation-exploding", then=(*DIVERGES, *STUCK, *FLAT, "gradient-clipping", "activation-saturated", "dead-units", "overfit", "gradient-imbalance", "class-imbalance"))  # fmt: skip
def likelihood_without_its_minus(t: Training) -> None:
    """The mean log probability of the right words is minimised, as the minus was forgotten. TheDeepChecker: wrong sign of the
    loss; Humbatova."""

    def likelihood(logits, targets):
        asked = targets >= 0
        return logits.log_softmax(-1)[asked].gather(1, targets[asked][:, None]).mean()

    with_loss(t, likelihood)


@fault(translator, "feature-constant", "batch-leak", modules=("encoder_norm", "decoder.0.cross", "decoder.1.cross"), then=("loss-plateau", "stalled-optimisation", "attention-head-dead", "prediction-collapse", "overtraining"))  # fmt: skip
def memory_averaged_over_items(t: Training) -> None:
    """A mean over axis 0 to smooth the memory, from a model whose first axis was time: all sentences share one memory.
    Humbatova: wrong axis; TheDeepChecker."""
    t.model.encoder_norm.register_forward_hook(lambda module, args, output: output.mean(0, keepdim=True).expand_as(output))  # fmt: skip


@fault(translator, "module-unused", "gradient-zero", "parameter-unchanged", modules=("encoder.1",))
def return_inside_the_loop(t: Training) -> None:
    """The line that returns the memory is indented by four too many: the second block of the encoder never runs. TrainCheck:
    parameters that are not updated; Humbatova: wrong layer."""

    def encode(source):
        x, padding = t.model.source(source), (source == translator.PAD)[:, None, None]
        for block in t.model.encoder:
            x = block(x, padding)
            return t.model.encoder_norm(x), padding
        return x, padding

    t.model.encode = encode


@fault(translator, "update-ratio-low", "loss-plateau", "stalled-optimisation", then=(*STUCK, "parameter-unchanged", "class-imbalance"))  # fmt: skip
def large_epsilon(t: Training) -> None:
    """`eps=1.0` for Adam, from a recipe for another network: all steps are a thousandth of the rate. Humbatova: optimiser
    settings; SageMaker WeightUpdateRatio."""
    t.optimize = lambda p: torch.optim.AdamW(p, 1e-3, betas=(0.9, 0.98), eps=1.0)


@fault(translator, "optimizer-frozen-parameters", "parameter-unchanged", "gradient-zero", "module-unused", modules=("encoder",), then=("update-ratio-low",))  # fmt: skip
def encoder_still_frozen(t: Training) -> None:
    """A new encoder, and the line of a fine-tuning script that freezes it: random for ever, though the optimizer holds it.
    TrainCheck: frozen parameters; SageMaker UnchangedTensor."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model.encoder.requires_grad_(False)


@fault(translator, "poor-initialisation", "activation-exploding", modules=("head", "target", "target.table"), then=(*DIVERGES, *STUCK, *FLAT, "dead-units", "gradient-clipping", "gradient-imbalance", "update-ratio-low", "class-imbalance", "activation-saturated"))  # fmt: skip
def exponent_of_the_table(t: Training) -> None:
    """`width ** 0.5` for the deviation of the tied table, where `width ** -0.5` belongs: logits of 30 at the start. SageMaker
    PoorWeightInitialization; TheDeepChecker."""
    nn.init.normal_(t.model.target.table.weight, std=translator.WIDTH**0.5)
    t.model.head.weight = t.model.target.table.weight


@fault(translator, "units-symmetric", modules=tuple(f"{part}.{i}.mlp{inner}" for part in ("encoder", "decoder") for i in range(2) for inner in ("", ".0", ".2")), then=("feature-constant", "gradient-zero", "dead-units", "poor-initialisation", "gradient-imbalance"))  # fmt: skip
def each_unit_with_the_same_seed(t: Training) -> None:
    """The function that draws a unit's weights seeds itself, so that all hidden units of a feed-forward layer are copies.
    TheDeepChecker: symmetric initialisation; Humbatova: wrong weights initialisation."""
    for block in (*t.model.encoder, *t.model.decoder):
        with torch.no_grad():
            block.mlp[0].weight.copy_(block.mlp[0].weight[:1].expand_as(block.mlp[0].weight))
            block.mlp[2].weight.copy_(block.mlp[2].weight[:, :1].expand_as(block.mlp[2].weight))
            nn.init.zeros_(block.mlp[0].bias)


@fault(translator, "model-in-eval", step=60, then=("overfit", "overtraining", "watch-starved", "probe-read-nothing"))
def samples_leave_eval_on(t: Training) -> None:
    """Every 60 steps a sample is translated and printed, and the function that does it leaves the model in eval mode. TrainCheck:
    wrong mode; tk-rusch/coRNN#1."""
    t.model = translator.Translator(dropout=0.2)

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.train(step < 60)
        return plain_update(training, step, observer)

    t.update = update


@fault(translator, "nonfinite-loss", "nonfinite-gradient", "loss-diverged", modules=("",), step=150, then=(*NONFINITE, *DIVERGES, "activation-saturated", "overfit"))  # fmt: skip
def temperature_reaches_zero(t: Training) -> None:
    """A temperature of the logits is annealed in a line, to exactly zero at step 200. GRIST: division by zero; Humbatova."""
    now = [0]
    t.before.append(lambda training, step: now.__setitem__(0, step))
    with_loss(t, lambda logits, targets: F.cross_entropy(logits / (1 - min(now[0], 200) / 200), targets))


@fault(translator, "update-ratio-high", "weight-norm-drift", modules=("source", "target", "source.table", "target.table"), then=(*DIVERGES, *STUCK, *FLAT, "activation-saturated", "gradient-vanishing", "gradient-imbalance", "overfit", "poor-initialisation", "dead-units"))  # fmt: skip
def rate_of_the_tables(t: Training) -> None:
    """Tables have a group of their own, at a rate of 5: it was written for a sparse optimizer whose gradients were means over
    the vocabulary. Humbatova: learning rate; SageMaker WeightUpdateRatio."""
    tables = [t.model.source.table.weight, t.model.target.table.weight]
    others = [p for p in t.model.parameters() if all(p is not table for table in tables)]
    t.optimizers = [torch.optim.AdamW([{"params": others, "lr": 5e-3}, {"params": tables, "lr": 5.0}])]


@fault(translator, "input-duplicate", then=("overfit", "overtraining", "loss-spike"))
def four_sentences_eight_times(t: Training) -> None:
    """`num_workers=8` over an iterable data set that is not split among them: each sentence comes eight times. TrainCheck:
    data of workers; pytorch's page on IterableDataset."""
    in_training(t, lambda *batch: tuple(part[:4].repeat_interleave(8, 0) for part in batch[:-1]))
