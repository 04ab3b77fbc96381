"""What goes wrong in keyword spotting: little data, repeated data, precision, copies, second optimizers, logs."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from faults import keywords
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, plain_update, seeded, update_of_two


def heard(t: Training, change) -> None:
    """What the model is given passes through `change(x, step, phase)`."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, words = plain(step, phase)
        return change(x, step, phase), words

    t.sample = sample


# -- data ------------------------------------------------------------------------------------------------------------


@fault(keywords, "overfit", "overtraining", step=60, then=("input-duplicate", "audio-duplicate"))
def forty_clips_of_the_authors(t: Training) -> None:
    """Only the forty clips that the authors have spoken are in the list, and no noise is added. SageMaker Overfit; TheDeepChecker:
    overfitting."""
    energies, words = keywords.spoken(40, seeded(31))
    plain, t.schedule = t.sample, None
    t.optimize = lambda p: torch.optim.SGD(p, 0.08, momentum=0.9)

    def sample(step: int, phase: str) -> Batch:
        chosen = torch.randperm(40, generator=seeded(32, step))[: keywords.BATCH]
        return (keywords.log_mel(energies[chosen]), words[chosen]) if phase == "train" else plain(step, phase)

    t.sample = sample


@fault(keywords, "input-duplicate", "audio-duplicate", then=("overfit", "overtraining"))
def speeds_that_change_nothing(t: Training) -> None:
    """Each clip is taken at six speeds, and the function that resamples returns its input: a batch of four clips, six times each.
    TrainCheck: duplicated data; speech: augmentation without effect."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, words = plain(step, phase)
        return (x[:4].repeat(6, 1, 1, 1), words[:4].repeat(6)) if phase == "train" else (x, words)

    t.sample = sample


@fault(keywords, "input-constant", "audio-silent", "input-drift", "input-duplicate", step=39, then=("metric-constant", "overfit", "overtraining", "output-constant", "prediction-collapse", "audio-duplicate", "feature-constant", "loss-diverged"))  # fmt: skip
def clips_cut_before_the_word(t: Training) -> None:
    """Validation clips are cut from the start of recordings with a second of digital silence: the floor is all there is. Speech: data
    preparation; Humbatova: wrong data."""
    heard(t, lambda x, step, phase: torch.full_like(x, -4.59) if phase == "val" else x)


@fault(keywords, "input-drift", step=39, then=("audio-clipping", "overfit", "overtraining", "input-range", "prediction-collapse", "loss-diverged", "metric-constant"))  # fmt: skip
def another_microphone(t: Training) -> None:
    """Validation clips come from a device with automatic gain: all bins lie high and hardly differ. Speech: mismatch of recordings;
    SageMaker: drift of inputs."""
    heard(t, lambda x, step, phase: (0.15 * x + 4.0).clamp(max=4.2) if phase == "val" else x)


@fault(keywords, "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "stem"), step=72, then=(*NONFINITE, "nonfinite-buffer", "metric-constant", "prediction-collapse", "output-constant", "audio-nonfinite"))  # fmt: skip
def clip_of_one_level(t: Training) -> None:
    """Each clip is scaled to its own range, `(x - min) / (max - min)`; at step 72 one is silent throughout. GRIST: division by zero."""

    def change(x, step, phase):
        if phase == "train" and step == 72:
            x = x.clone()
            x[9] = -4.59
        low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        return 2 * (x - low) / (high - low) - 1

    heard(t, change)


# -- who is trained --------------------------------------------------------------------------------------------------


@fault(keywords, "optimizer-frozen-parameters", "parameter-unchanged", modules=("blocks",), then=("loss-plateau", "update-ratio-low", "gradient-zero"))  # fmt: skip
def frozen_for_another_language(t: Training) -> None:
    """`blocks.requires_grad_(False)` from the script that adapts to a new language; this run starts from nothing. TrainCheck: frozen
    parameters; SageMaker UnchangedTensor."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model.blocks.requires_grad_(False)


@fault(keywords, "optimizer-owns-others", "parameter-unchanged", "optimizer-misses-parameters", then=(*STUCK, "gradient-accumulation", "gradient-exploding"))  # fmt: skip
def fused_copy_is_trained(t: Training) -> None:
    """A function that fuses layers returns a copy, and the optimizer was built before it. TrainCheck: huggingface/accelerate#2665."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model = copy.deepcopy(t.model)


@fault(keywords, "parameter-unchanged", "optimizer-misses-parameters", "optimizer-owns-others", modules=("head",), then=("update-ratio-low", "loss-plateau", "gradient-accumulation", "gradient-exploding", "gradient-imbalance"))  # fmt: skip
def list_of_words_grew(t: Training) -> None:
    """The head is exchanged for one with more words after the optimizer was built. TrainCheck: parameters not in the
    optimizer."""
    t.optimizers = [t.optimize(t.model.parameters())]
    t.model.head = nn.Linear(keywords.WIDTH * keywords.BANDS, keywords.WORDS + 2)


@fault(keywords, "optimizer-duplicate-parameters", then=("update-ratio-high", *DIVERGES))
def regulariser_with_its_own_optimizer(t: Training) -> None:
    """A second optimizer was made for the norms, and is given all parameters. TrainCheck: parameters in two optimizers."""
    t.optimizers = [t.optimize(t.model.parameters()), torch.optim.SGD(t.model.parameters(), 1e-3)]
    t.update = update_of_two


@fault(keywords, "parameter-unchanged", "precision-loss", "update-ratio-low", then=STUCK)
def weights_in_sixteen_bits(t: Training) -> None:
    """`model.bfloat16()` to fit the chip, at a rate of 5e-4: hardly a weight moves by half of its last bit. TrainCheck: dtype."""
    t.model = t.model.bfloat16()
    heard(t, lambda x, step, phase: x.bfloat16())
    t.optimize, t.schedule = (lambda p: torch.optim.SGD(p, 5e-4)), None

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0]).float()
        return {"loss": F.cross_entropy(logits, batch[1]), "logits": logits, "targets": batch[1]}

    t.forward = forward


# -- steps -----------------------------------------------------------------------------------------------------------


@fault(keywords, "nonfinite-optimizer", "nonfinite-parameter", step=121, then=(*NONFINITE, "nonfinite-buffer", "prediction-collapse", "output-constant", "metric-constant", "scheduler-ends-early"))  # fmt: skip
def root_of_what_is_left(t: Training) -> None:
    """The rate falls as the root of the share of steps that are left, of 120, in a run of 200: the root of a negative number is NaN.
    GRIST: root of a negative number; Humbatova: learning rate."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: float(torch.tensor(1 - (step - 1) / 120).sqrt()))


@fault(keywords, "loss-diverged", "loss-spike", "update-ratio-high", step=140, then=(*DIVERGES, *NONFINITE, *STUCK, *FLAT, "dead-units", "overfit", "gradient-zero", "gradient-imbalance"))  # fmt: skip
def stage_two_multiplies(t: Training) -> None:
    """At step 140 the rate for the last stage, a hundredth, is multiplied by 100 where it is to be divided. Humbatova: learning
    rate; SageMaker WeightUpdateRatio."""
    t.schedule = lambda optimizer: LambdaLR(optimizer, lambda step: 4.0 if step < 140 else 1500.0)


@fault(keywords, "loss-spike", "update-ratio-high", step=40, then=(*DIVERGES, *STUCK))
def reloaded_before_each_part(t: Training) -> None:
    """In front of each of its five parts the training loads its checkpoint, which was written once, at the start. TrainCheck:
    something writes weights back; Humbatova: training process."""
    first = copy.deepcopy(t.model.state_dict())

    def load(training: Training, step: int) -> None:
        if step and step % 40 == 0:
            training.model.load_state_dict(first)

    t.before.append(load)


# -- logs ------------------------------------------------------------------------------------------------------------


@fault(keywords, "metric-nonfinite", step=39)
def recall_of_words_not_spoken(t: Training) -> None:
    """The recall of each word is averaged over words; one that the batch lacks has 0 / 0. GRIST: division by zero; Humbatova: wrong
    validation metric."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        right = F.one_hot(batch[1], 12) * (tensors["logits"].argmax(1) == batch[1])[:, None]
        return {"recall": float((right.sum(0) / F.one_hot(batch[1], 12).sum(0)).mean())}

    t.measure = measure


@fault(keywords, "metric-type", step=39, then=("metric-missing", "metric-unexpected"))
def accuracy_as_a_row(t: Training) -> None:
    """The accuracy is logged for each clip, a row of zeros and ones, since the mean was lost. Speech: metrics of another type; Humbatova:
    wrong validation metric."""
    t.measure = lambda tensors, batch: {"accuracy": (tensors["logits"].argmax(1) == batch[1]).float()}


@fault(keywords, "metric-grad", step=0, then=("metric-phase-mismatch",))
def sum_of_losses_with_graphs(t: Training) -> None:
    """`total += loss` and `log(total / n)`: tensors with their graphs, of all steps of an epoch. PyTorch FAQ; TrainCheck: memory."""
    total: list[torch.Tensor] = [torch.zeros(())]

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        total[0] = tensors["loss"] + (total[0] if step % 40 else 0.0)
        observer.log({"mean_loss": total[0] / (step % 40 + 1)}, "train", step)
        return batch, tensors

    t.update = update
