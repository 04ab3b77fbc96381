"""What goes wrong with taggers of words: padding, rare tags, vocabularies, recurrent layers, files of annotations, scores."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from faults import tagger
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, plain_update, seeded


def changed(t: Training, change, phases: tuple[str, ...] = ("train", "val")) -> None:
    """Replace batches of these phases by `change(words, shapes, tags, step)`."""
    plain = t.sample
    t.sample = lambda step, phase: change(*plain(step, phase), step) if phase in phases else plain(step, phase)


def with_loss(t: Training, loss) -> None:
    """Replace the loss by that of `(logits, tags)`, both flat."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(*batch[:2])
        return {"loss": loss(logits.flatten(0, 1), batch[2].flatten()), "logits": logits, "targets": batch[2]}

    t.forward = forward


@fault(tagger, "class-imbalance", "prediction-collapse", step=49, then=(*STUCK, "overtraining", "overfit", "output-constant", "input-constant", "input-duplicate"))  # fmt: skip
def padding_is_tagged_as_other(t: Training) -> None:
    """Sentences are padded to 400 words, and the padding has the tag `other`, which counts: 99.6 % of all tags. SageMaker
    NLPSequenceRatio and ClassImbalance."""
    t.steps, t.optimize = 120, lambda p: torch.optim.SGD(p, 0.2, momentum=0.9)

    def change(words, shapes, tags, step):
        wide = lambda part: F.pad(part, (0, 400 - tagger.LENGTH))  # noqa: E731
        return wide(words), wide(shapes), wide(tags.clamp(min=0))

    changed(t, change)


@fault(tagger, "class-imbalance", "prediction-collapse", step=49, then=(*STUCK, "loss-spike", "overtraining", "overfit", "metric-range", "gradient-vanishing", "output-constant"))  # fmt: skip
def weights_by_frequency(t: Training) -> None:
    """Weights of the classes are their shares, where the inverse belongs: a rare tag weighs a twentieth of `other`, and is not
    said. Humbatova: wrong loss; SageMaker ClassImbalance."""
    shares = torch.tensor([15350.0, 701.0, 868.0, 842.0])
    with_loss(t, lambda logits, tags: F.cross_entropy(logits, tags, weight=shares / shares.mean()))


@fault(tagger, "feature-constant", "input-duplicate", "input-constant", modules=("words", ""), then=("class-imbalance", "prediction-collapse", "loss-plateau", "stalled-optimisation", "gradient-zero", "overtraining", "metric-constant", "overfit"))  # fmt: skip
def all_words_unknown(t: Training) -> None:
    """The vocabulary is in lower case and the corpus in capitals: each word is the unknown one. Humbatova: wrong preprocessing;
    SageMaker TensorVariance."""
    changed(t, lambda words, shapes, tags, step: (words.clamp(max=1), shapes, tags))


@fault(tagger, "prediction-collapse", "loss-plateau", "stalled-optimisation", step=60, then=(*STUCK, *FLAT, "overfit", "overtraining", "output-constant", "class-imbalance"))  # fmt: skip
def tags_of_another_file(t: Training) -> None:
    """Words come from one file and tags from another one, whose order is not the same: each sentence has the tags of another, in
    validation as well. Humbatova: wrong labels."""

    def change(words, shapes, tags, step):
        return (
            words,
            shapes,
            tags[torch.randperm(len(tags), generator=seeded(151, step))].where(words > 0, tagger.NOTHING),
        )

    changed(t, change)


@fault(tagger, "units-symmetric", "poor-initialisation", modules=("lstm", "hidden", "hidden.0"), then=("feature-constant", "class-imbalance", "prediction-collapse", "loss-plateau", "stalled-optimisation", "metric-constant", "gradient-imbalance", "overtraining"))  # fmt: skip
def constant_recurrent_weights(t: Training) -> None:
    """A function that initialises linear and recurrent layers writes 0.05 into all of their weights. TheDeepChecker: symmetric
    initialisation; Humbatova: wrong weights initialisation."""
    for part in (t.model.lstm, t.model.hidden):
        for parameter in part.parameters():
            nn.init.constant_(parameter, 0.05)


@fault(tagger, "activation-saturated", "poor-initialisation", modules=("hidden", "hidden.0", "hidden.1", "lstm", ""), then=(*STUCK, *FLAT, *DIVERGES, "gradient-imbalance", "class-imbalance", "overfit", "overtraining", "gradient-zero", "parameter-unchanged", "update-ratio-low"))  # fmt: skip
def hidden_layer_begins_wide(t: Training) -> None:
    """Weights of the hidden layer are drawn with a deviation of its width instead of one over its root: each tanh is at its
    end. SageMaker PoorWeightInitialization and SaturatedActivation."""
    nn.init.normal_(t.model.hidden[0].weight, std=2.0 * tagger.HIDDEN)


@fault(tagger, "loss-input-mismatch", modules=("head", "", "head.1"), then=(*STUCK, "gradient-vanishing", "activation-saturated", "update-ratio-low", "class-imbalance", "overtraining", "gradient-zero"))  # fmt: skip
def softmax_in_front_of_the_loss(t: Training) -> None:
    """The head returns probabilities, for the demo, and the cross entropy makes a softmax of its own. Humbatova: wrong activation
    of the last layer; UMLAUT."""
    t.model.head = nn.Sequential(t.model.head, nn.Softmax(-1))


@fault(tagger, "loss-input-mismatch", modules=("head", ""), then=(*DIVERGES, *STUCK, *FLAT, "activation-saturated", "gradient-clipping", "class-imbalance", "gradient-imbalance", "loss-sign", "metric-range", "gradient-zero"))  # fmt: skip
def likelihood_of_scores(t: Training) -> None:
    """`nll_loss` of the head's scores, without the logarithm of a softmax: the loss falls below zero and has no end. Humbatova:
    wrong loss; UMLAUT."""
    with_loss(t, F.nll_loss)


@fault(tagger, "metric-constant", step=99, then=("metric-phase-mismatch", "metric-range"))
def tags_by_another_list(t: Training) -> None:
    """The score reads what was said by a list of tags that begins with `padding`: all numbers are off by one, and F1 is 0.0 for
    ever. Humbatova: wrong validation metric."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        said = tensors["logits"].argmax(-1) - 1
        return {"f1": tagger.scores(said.clamp(min=0) * (said > 2), batch[2])["f1"]}

    t.measure = measure


@fault(tagger, "metric-nonfinite", step=9, then=("metric-constant", "metric-vanished"))
def precision_of_nothing_said(t: Training) -> None:
    """The precision divides by the number of rare tags that were said, which is zero in the first validations. GRIST: division by
    zero; speech and Humbatova: wrong validation metric."""
    t.val_every, measured = 10, t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        said = (tensors["logits"].argmax(-1) == 1) & (batch[2] >= 0)
        right = (said & (batch[2] == 1)).sum()
        return {**measured(tensors, batch), "precision": float(right / said.sum())}

    t.measure = measure


@fault(tagger, "metric-range", step=49)
def hits_over_sentences(t: Training) -> None:
    """The accuracy is the number of right tags divided by the number of sentences: about 9. Humbatova: wrong validation metric."""
    measured = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        hits = (tensors["logits"].argmax(-1) == batch[2]).sum()
        return {**measured(tensors, batch), "accuracy": float(hits / len(batch[2]))}

    t.measure = measure


@fault(tagger, "metric-type", step=49, then=("metric-unexpected",))
def scores_without_average(t: Training) -> None:
    """`average=None` is the default of the score, so that F1 is a tensor of one number for each tag. Humbatova: wrong validation
    metric; Lightning-AI/torchmetrics."""
    measured = t.measure

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        said = tensors["logits"].argmax(-1)
        each = [
            2 * ((said == tag) & (batch[2] == tag)).sum() / ((said == tag).sum() + (batch[2] == tag).sum())
            for tag in range(4)
        ]
        return {**measured(tensors, batch), "f1": torch.stack(each)}

    t.measure = measure


@fault(tagger, "metric-vanished", "metric-unexpected", "metric-missing", step=99, then=("metric-phase-mismatch",))  # fmt: skip
def score_has_a_new_name(t: Training) -> None:
    """The first validation, by the trainer, logs `f1`; later ones, by a callback, log `f1_score`. Humbatova: wrong validation
    metric; speech: metrics of another name."""
    measured, calls = t.measure, []

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        calls.append(1)
        metrics = measured(tensors, batch)
        return {("f1_score" if name == "f1" and len(calls) > 2 else name): value for name, value in metrics.items()}

    t.measure = measure


@fault(tagger, "gradient-accumulation", step=1, then=(*DIVERGES, *STUCK, *FLAT, "activation-saturated", "overfit", "overtraining", "class-imbalance", "gradient-clipping"))  # fmt: skip
def zeroed_for_the_teacher(t: Training) -> None:
    """`zero_grad()` of the optimizer of the old tagger is called, which was left in the script. TrainCheck: missing
    `zero_grad`."""
    old = torch.optim.Adam(tagger.Tagger().parameters())

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        old.zero_grad()
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


@fault(tagger, "model-in-eval", step=50, then=("overfit", "overtraining", "watch-starved", "probe-read-nothing"))  # fmt: skip
def train_called_once(t: Training) -> None:
    """`model.train()` stands in front of the loop, and each validation calls `eval()`: from the first one on no dropout acts.
    TrainCheck: wrong mode."""
    t.model = tagger.Tagger(dropout=0.3)

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.train(step < 50)
        return plain_update(training, step, observer)

    t.update = update


@fault(tagger, "validation-in-train-mode", step=49, then=("overtraining",))
def tags_validated_with_dropout(t: Training) -> None:
    """Validation has its `no_grad()`, but no `eval()`: 40 % of the words are dropped there, too. TrainCheck: wrong mode."""
    t.model = tagger.Tagger(dropout=0.4)
    t.model.eval = lambda: t.model


@fault(tagger, "dropout-high", modules=("dropout",), then=(*STUCK, "class-imbalance", "metric-constant", "gradient-exploding", "loss-spike", "overtraining", "feature-constant", "activation-vanishing"))  # fmt: skip
def dropout_in_percent(t: Training) -> None:
    """`dropout: 95` in the configuration is the share that is kept, in percent. Humbatova: wrong layer argument; UMLAUT."""
    t.model.dropout.p = 0.95


@fault(tagger, "gradient-zero", "parameter-unchanged", modules=("words", "shapes", "lstm"), then=("gradient-vanishing", "module-unused", "loss-plateau", "stalled-optimisation", "overtraining", "update-ratio-low", "class-imbalance"))  # fmt: skip
def states_through_numpy(t: Training) -> None:
    """Outputs of the recurrent layer go through numpy to be sorted, and come back without a graph. TrainCheck: a part without
    gradients; SageMaker UnchangedTensor."""
    t.model.hidden.register_forward_pre_hook(lambda module, args: (torch.from_numpy(args[0].detach().numpy()),))


@fault(tagger, "overfit", "overtraining", "input-duplicate", step=99, then=("loss-plateau", "input-drift", "class-imbalance"))  # fmt: skip
def sample_of_the_annotators(t: Training) -> None:
    """The path is that of the sample for annotators, 32 sentences. SageMaker Overfit; Humbatova: too little data."""
    few = tagger.sentences(32, seeded(153))
    order = lambda step: torch.randperm(32, generator=seeded(154, step))  # noqa: E731
    changed(t, lambda words, shapes, tags, step: tuple(part[order(step)] for part in few), ("train",))


@fault(tagger, "input-duplicate", then=("overfit", "overtraining", "loss-plateau", "loss-spike", "class-imbalance"))  # fmt: skip
def rare_sentences_copied(t: Training) -> None:
    """A sampler that should draw sentences with persons more often multiplies by the wrong count: each batch is three sentences, ten
    times and more. TrainCheck: duplicated data."""
    few = lambda part: part[:3].repeat(11, *[1] * (part.ndim - 1))[: tagger.BATCH]  # noqa: E731
    changed(t, lambda words, shapes, tags, step: (few(words), few(shapes), few(tags)), ("train",))


@fault(tagger, "nonfinite-loss", modules=("",), step=7, then=(*NONFINITE, "prediction-collapse", "metric-constant", "class-imbalance", "step-skipped"))  # fmt: skip
def weights_of_missing_tags(t: Training) -> None:
    """Weights of the classes are one over their counts in the batch, and a batch without a tag has a weight of Inf for it, which is
    multiplied by zero. GRIST: division by zero."""
    t.sample, plain = (lambda step, phase: tuple(part[:8] for part in plain(step, phase))), t.sample

    def loss(logits, tags):
        asked = tags >= 0
        hits = F.one_hot(tags[asked], len(tagger.TAGS)).float()
        weights = 1 / hits.sum(0)
        return -(logits[asked].log_softmax(-1) * hits * weights).sum() / len(tagger.TAGS)

    with_loss(t, loss)


@fault(tagger, "update-ratio-low", "scheduler-ends-early", "parameter-unchanged", step=25, then=(*STUCK, "class-imbalance", "overtraining"))  # fmt: skip
def linear_over_epochs(t: Training) -> None:
    """A linear decay over 25 epochs is stepped at each batch, and the rate is zero from step 25 on. Humbatova: learning rate."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: max(0.0, 1 - step / 25))


@fault(tagger, "update-ratio-low", then=(*STUCK, "class-imbalance", "output-constant", "parameter-unchanged"))  # fmt: skip
def rate_of_a_fine_tuning(t: Training) -> None:
    """SGD in place of Adam, at a rate of 1e-5 that was fine for the fine-tuning of a large model. Humbatova: learning rate;
    SageMaker WeightUpdateRatio."""
    t.optimize = lambda p: torch.optim.SGD(p, 1e-5)


@fault(tagger, "update-ratio-high", "loss-diverged", "loss-spike", "activation-saturated", "weight-norm-drift", modules=("", "hidden", "lstm", "head", "hidden.1"), then=(*DIVERGES, *STUCK, *FLAT, "gradient-zero", "class-imbalance", "gradient-clipping", "overfit", "overtraining", "parameter-unchanged", "gradient-imbalance"))  # fmt: skip
def adam_at_two(t: Training) -> None:
    """The rate of 2.0 that SGD had, for Adam: gates and tanh are at their ends after some steps. Humbatova: learning rate;
    AutoTrainer: oscillating loss."""
    t.optimize = lambda p: torch.optim.Adam(p, 2.0)


@fault(tagger, "gradient-zero", "module-unused", "parameter-unchanged", modules=("lstm",))
def one_direction_read(t: Training) -> None:
    """Only the first half of the recurrent layer's outputs is read, doubled to fit the next layer: what runs backwards never gets a
    gradient. TrainCheck: parameters that are not updated; Humbatova: wrong slice."""

    def first_half(module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        forwards = args[0][..., : tagger.HIDDEN]
        return (torch.cat([forwards, forwards], -1),)

    t.model.hidden.register_forward_pre_hook(first_half)


@fault(tagger, "nonfinite-parameter", "nonfinite-activation", modules=("words", ""), then=(*NONFINITE, "prediction-collapse", "metric-constant", "class-imbalance"))  # fmt: skip
def vector_that_was_not_parsed(t: Training) -> None:
    """A line of the file of word vectors has an empty field, and its word begins as NaN. Humbatova: wrong data; TrainCheck:
    a spoilt state."""
    with torch.no_grad():
        t.model.words.weight[113, 7] = math.nan


@fault(tagger, "optimizer-frozen-parameters", "parameter-unchanged", "gradient-zero", modules=("lstm",), then=("module-unused", "update-ratio-low", "loss-plateau", "overtraining", "class-imbalance"))  # fmt: skip
def recurrent_layer_still_frozen(t: Training) -> None:
    """A line that freezes the pretrained recurrent layer was kept when its weights were not loaded any more. TrainCheck: frozen
    parameters; SageMaker UnchangedTensor."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model.lstm.requires_grad_(False)


@fault(tagger, "gradient-clipping", "update-ratio-low", then=(*STUCK, "class-imbalance", "parameter-unchanged"))  # fmt: skip
def clipped_by_the_tolerance(t: Training) -> None:
    """`clip_grad_norm_(parameters, 1e-4)`: the tolerance of early stopping went to the wrong argument, and SGD takes what is left.
    TrainCheck: wrong clip."""
    t.optimize, t.clip = (lambda p: torch.optim.SGD(p, 0.5)), 1e-4


@fault(tagger, "prediction-collapse", "class-imbalance", "output-constant", step=120, then=(*STUCK, "input-drift", "overfit", "overtraining", "loss-diverged", "gradient-vanishing", "gradient-zero", "metric-constant", "loss-spike", "activation-saturated", "input-constant", "input-duplicate"))  # fmt: skip
def annotations_end(t: Training) -> None:
    """The file of annotations is shorter than the corpus, and what is missing is `other`: from step 120 on nothing else is. Humbatova:
    wrong labels."""
    changed(
        t, lambda words, shapes, tags, step: (words, shapes, tags.clamp(max=0) if step >= 120 else tags), ("train",)
    )


@fault(tagger, "dead-units", "feature-constant", modules=("hidden", "hidden.1", "hidden.0"), then=(*STUCK, *FLAT, "gradient-zero", "parameter-unchanged", "class-imbalance", "metric-constant", "output-constant", "poor-initialisation", "update-ratio-low", "overtraining", "module-unused"))  # fmt: skip
def hidden_layer_without_a_unit(t: Training) -> None:
    """A ReLU in the hidden layer, whose biases begin at -5, the logarithm of the rare tags' share, as those of the head should.
    SageMaker DeadRelu; TheDeepChecker: biases."""
    t.model = tagger.Tagger(activation=nn.ReLU)
    nn.init.constant_(t.model.hidden[0].bias, -5.0)


@fault(tagger, "optimizer-owns-others", "optimizer-misses-parameters", "parameter-unchanged", then=("gradient-accumulation", "gradient-exploding", "gradient-clipping", *STUCK, "update-ratio-low", "class-imbalance"))  # fmt: skip
def copied_for_the_average(t: Training) -> None:
    """The model is copied for an average, and the two names change places: the optimizer has the average's weights. TrainCheck: optimizer and
    parameters."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model = copy.deepcopy(t.model)


@fault(tagger, "input-drift", step=49, then=("metric-constant", "overfit", "overtraining", "prediction-collapse", "class-imbalance", "input-duplicate", "input-constant"))  # fmt: skip
def validation_in_capitals(t: Training) -> None:
    """The validation file is in capitals, and all its words are the unknown one. Humbatova: preprocessing that differs."""
    changed(t, lambda words, shapes, tags, step: (words.clamp(max=1), shapes, tags), ("val",))


@fault(tagger, "weight-norm-drift", "activation-vanishing", "feature-constant", "output-constant", step=20, then=(*STUCK, *FLAT, "class-imbalance", "gradient-zero", "overtraining", "update-ratio-high", "gradient-imbalance"))  # fmt: skip
def decay_inside_the_gradient(t: Training) -> None:
    """`weight_decay=1` from AdamW, in Adam, where it is a part of the gradient and overrules the loss. Humbatova: regularisation;
    TheDeepChecker: weights that vanish."""
    t.optimize = lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1.0)


@fault(tagger, "poor-initialisation", "activation-saturated", "activation-exploding", modules=("lstm", "words", "", "dropout"), then=(*STUCK, *FLAT, "class-imbalance", "gradient-imbalance", "overfit", "overtraining", "input-range", "gradient-exploding", "update-ratio-low"))  # fmt: skip
def vectors_in_another_scale(t: Training) -> None:
    """Word vectors are from a file whose numbers are hundredths, without the division: a deviation of 100, and all gates are at their ends.
    SageMaker PoorWeightInitialization and SaturatedActivation."""
    with torch.no_grad():
        t.model.words.weight.mul_(100)
