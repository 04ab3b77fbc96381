"""What goes wrong in speaker verification: modes, optimizers, schedules, statistics, trials, validation, speakers added later."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR

from faults import verifier
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Observer, Tensors, Training, finish_update, mean_of, plain_update, seeded

FITS = ("overfit", "overtraining")


@fault(verifier, "model-in-eval", then=(*STUCK, "activation-vanishing", "gradient-vanishing"))  # fmt: skip
def embeddings_extracted_before(t: Training) -> None:
    """Embeddings are extracted for a first picture, in eval mode, and the loop follows without `train()`: BatchNorm passes everything as
    it comes. TrainCheck: wrong mode."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.model.eval()
        return plain_update(training, step, observer)

    t.update = update


@fault(verifier, "validation-in-train-mode", step=49)
def trials_scored_in_training_mode(t: Training) -> None:
    """`model.embed` is called by the validation as it was left by the loop, in train mode: BatchNorm takes the trials into its
    statistics, and the margin is on. TrainCheck: wrong mode."""

    def validate(training: Training, step: int, observer: Observer) -> None:
        metrics: dict[str, list[object]] = {}
        with observer.phase("val"), torch.no_grad():
            for i in range(2):
                batch = training.sample(step * 2 + i, "val")
                tensors = training.forward(training.model, batch)
                for name, value in {"loss": float(tensors["loss"]), **training.measure(tensors, batch)}.items():
                    metrics.setdefault(name, []).append(value)
        observer.log({name: mean_of(values) for name, values in metrics.items()}, "val", step)

    t.validate = validate


@fault(verifier, "update-ratio-high", "weight-norm-drift", "activation-exploding", then=(*STUCK, *FLAT, "dead-units", "gradient-vanishing", "norm-input-variance", "loss-spike", "loss-diverged"))  # fmt: skip
def rate_for_ninety_six_devices(t: Training) -> None:
    """The rate of a recipe for a batch of many thousands, on one device: 10. AutoTrainer: oscillating loss; Humbatova: learning
    rate."""
    t.optimize = lambda p: torch.optim.SGD(p, 10.0, 0.9)


@fault(verifier, "update-ratio-low", "stalled-optimisation", "stalled-from-start", then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def rate_of_the_last_epoch(t: Training) -> None:
    """A run was started anew with the rate at which the last one had ended, 1e-7. Humbatova: learning rate."""
    t.optimize = lambda p: torch.optim.SGD(p, 1e-7, 0.9)


@fault(verifier, "gradient-accumulation", step=1, then=(*DIVERGES, *STUCK, *FLAT, "dead-units", "gradient-vanishing"))  # fmt: skip
def average_zeroed_in_its_place(t: Training) -> None:
    """`zero_grad()` is called on a wrapper that copies the parameters for EMA, and the gradients of the network stay: each step repeats
    all earlier ones. TrainCheck: missing `zero_grad`."""

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    t.update = update


@fault(verifier, "gradient-clipping", "update-ratio-low", "stalled-optimisation", then=(*STUCK, "stalled-from-start"))  # fmt: skip
def clipped_as_if_by_value(t: Training) -> None:
    """A bound of 1e-4, meant for each value, is given to the clipping of the norm of all. Humbatova: wrong optimiser settings;
    TrainCheck: wrong clipping."""
    t.clip = 1e-4


@fault(verifier, "weight-norm-drift", "activation-vanishing", "update-ratio-high", "norm-input-variance", step=10, then=(*DIVERGES, *STUCK, *FLAT, "weight-decay-on-norms", "dead-units"))  # fmt: skip
def decay_of_one(t: Training) -> None:
    """`weight_decay=1` for 1e-4, in a file where decays are given as powers. Humbatova: regularisation; TheDeepChecker: weights that
    vanish."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.02, 0.9, weight_decay=1.0)


@fault(verifier, "update-ratio-low", "scheduler-ends-early", "stalled-optimisation", step=30, then=(*STUCK, "parameter-unchanged"))  # fmt: skip
def decay_stepped_by_batches(t: Training) -> None:
    """A decay by a quarter, once an epoch in the recipe, is stepped after each batch: 1e-9 after sixty. Humbatova: learning rate."""
    t.schedule = lambda optimizer: ExponentialLR(optimizer, 0.75)


@fault(verifier, "scheduler-ends-early", step=60, then=("loss-spike", "update-ratio-low"))  # fmt: skip
def cosine_of_a_quarter(t: Training) -> None:
    """`T_max` counts the steps of one of four devices: the cosine is at its end after 60 of 250 steps, and climbs again. Humbatova:
    learning rate."""
    t.schedule = lambda optimizer: CosineAnnealingLR(optimizer, 60)


@fault(verifier, "optimizer-duplicate-parameters", modules=("classifier", ""))
def classifier_in_both_lists(t: Training) -> None:
    """The network's parameters hold those of the classifier already, which has an optimizer with a higher rate of its own: two steps
    for it each time. TrainCheck: parameters in two optimizers."""
    t.optimizers = [
        torch.optim.SGD(t.model.parameters(), 0.02, 0.9),
        torch.optim.SGD(t.model.classifier.parameters(), 0.1),
    ]
    t.before.append(lambda training, step: training.optimizers[1].zero_grad())
    t.after_step.append(lambda training, step: training.optimizers[1].step())


@fault(verifier, "nonfinite-buffer", "input-range", modules=("", "frame1", "frame1.norm"), step=140, then=(*DIVERGES, *NONFINITE, "input-drift", "output-constant", "prediction-collapse", "metric-constant", "metric-nonfinite", "gradient-vanishing", "dtype-headroom"))  # fmt: skip
def broken_file_in_the_statistics(t: Training) -> None:
    """At step 140 one utterance is read from a broken file, with floats up to 1e24: the batch passes, and the running variance is
    infinite ever after. GRIST: overflow; TrainCheck: state that is not a parameter."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        features, speakers = plain(step, phase)
        if phase == "train" and step == 140:
            features[0] *= 1e24
        return features, speakers

    t.sample = sample


@fault(verifier, "metric-nonfinite", step=49)
def trials_without_targets(t: Training) -> None:
    """Trials are pairs of neighbours in a list that is sorted so that these differ: with no pair of one speaker the rate of refusals is
    0 / 0. Humbatova: wrong validation metric; GRIST: division by zero."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        scores, same = verifier.trials(tensors["embeddings"], batch[1])
        scores, same = scores[~same], same[~same]
        refused = (scores < scores.median()) & same
        return {**verifier.measure(tensors, batch), "refused": float(refused.sum() / same.sum())}

    t.measure = measure


@fault(verifier, "metric-range", step=49)
def accuracy_in_percent(t: Training) -> None:
    """The accuracy is given in percent since a table wanted it: 97. Humbatova: wrong validation metric."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        metrics = verifier.measure(tensors, batch)
        return {"eer": metrics["eer"], "accuracy": 100 * metrics["accuracy"]}

    t.measure = measure


@fault(verifier, "metric-constant", step=49, then=("metric-phase-mismatch",))
def names_compared_with_numbers(t: Training) -> None:
    """Answers are numbers and the keys of the dictionary of speakers text: no answer is ever right. Humbatova: wrong validation
    metric."""

    def measure(tensors: Tensors, batch: Batch) -> dict[str, object]:
        keys = [str(int(speaker)) for speaker in batch[1]]
        right = sum(said == key for said, key in zip(tensors["logits"].argmax(1).tolist(), keys, strict=True))
        return {"eer": verifier.measure(tensors, batch)["eer"], "accuracy": right / len(keys)}

    t.measure = measure


@fault(verifier, "input-drift", "input-range", step=49, then=("loss-diverged", "activation-exploding"))  # fmt: skip
def enrolled_with_another_front_end(t: Training) -> None:
    """Validation utterances were prepared by another toolkit, whose logarithm is in decibels with no mean taken out. Speech: features of
    two kinds; Humbatova: wrong preprocessing."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        features, speakers = plain(step, phase)
        return (10 * features - 60 if phase == "val" else features), speakers

    t.sample = sample


@fault(verifier, "overfit", "overtraining", "input-duplicate", step=1, then=("loss-plateau",))  # fmt: skip
def two_utterances_each(t: Training) -> None:
    """The list of the training was cut with `head -48` for a test, and stays so: two utterances a speaker, on the average.
    SageMaker Overfit."""
    plain, few = t.sample, verifier.utterances(48, seeded(531))
    t.optimize = lambda p: torch.optim.Adam(p, 2e-3)
    t.sample = lambda step, phase: few if phase == "train" else plain(step, phase)


@fault(verifier, "input-duplicate", "audio-duplicate")  # fmt: skip
def six_copies_without_noise(t: Training) -> None:
    """Each utterance comes six times in a batch for six kinds of noise, and the noise is switched off. TrainCheck: duplicated data;
    speech: items of a batch that are equal."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        batch = plain(step, phase)
        return tuple(part[::6].repeat_interleave(6, 0) for part in batch) if phase == "train" else batch

    t.sample = sample


@fault(verifier, "model-changed", "optimizer-misses-parameters", "parameter-unchanged", modules=("classifier", ""), step=100, then=("loss-spike", "loss-diverged", "optimizer-owns-others", "gradient-accumulation", "gradient-imbalance"))  # fmt: skip
def classifier_made_anew(t: Training) -> None:
    """At step 100 the classifier is made anew, for a list with other speakers, and the optimizer keeps the old one. TrainCheck:
    parameters that no optimizer holds; Humbatova: training process."""

    def replaced(training: Training, step: int) -> None:
        if step == 100:
            training.model.classifier = verifier.MarginSoftmax(verifier.WIDTH, verifier.SPEAKERS)

    t.before.append(replaced)


@fault(verifier, "parameter-changed", modules=("frame1", "frame2"), step=100, then=("gradient-zero", "optimizer-frozen-parameters", "module-unused", "weight-norm-drift"))  # fmt: skip
def frozen_layers_roll_on(t: Training) -> None:
    """Two layers are frozen at step 100, with gradients set to zero and not to None: SGD's momentum rolls on, and its decay. TrainCheck:
    frozen parameters that change."""
    t.optimize = lambda p: torch.optim.SGD(p, 0.02, 0.98, weight_decay=1e-3)

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        training.optimizer.zero_grad(set_to_none=False)
        batch = training.sample(step, "train")
        tensors = training.forward(training.model, batch)
        tensors["loss"].backward()
        finish_update(training, step, observer)
        return batch, tensors

    def frozen(training: Training, step: int) -> None:
        if step == 100:
            training.model.frame1.requires_grad_(False)
            training.model.frame2.requires_grad_(False)

    t.update = update
    t.before.append(frozen)


@fault(verifier, "input-dtype")
def features_from_numpy(t: Training) -> None:
    """Features come from NumPy as float64, and `forward` converts them: twice the memory in every queue. TrainCheck: wrong dtype."""
    plain, embed = t.sample, t.model.embed
    t.model.embed = lambda features: embed(features.float())

    def sample(step: int, phase: str) -> Batch:
        features, speakers = plain(step, phase)
        return features.double(), speakers

    t.sample = sample


@fault(verifier, "activation-saturated", "input-range", "feature-constant", "gradient-vanishing", modules=("", "frame1", "frame1.activation", "frame2", "frame3", "frame4"), then=(*STUCK, *FLAT, "class-imbalance", "dead-units", "gradient-zero", "gradient-imbalance", "update-ratio-low", "weight-norm-drift"))  # fmt: skip
def decibels_into_sigmoids(t: Training) -> None:
    """Layers of sigmoids are given decibels around -60, as their mean is not taken out: those of the first are at their ends.
    SageMaker SaturatedActivation; UMLAUT."""
    t.model, plain = verifier.Verifier(activation=nn.Sigmoid), t.sample

    def sample(step: int, phase: str) -> Batch:
        features, speakers = plain(step, phase)
        return 10 * features - 60, speakers

    t.sample = sample


@fault(verifier, "metric-phase-mismatch", step=49)
def loss_of_the_last_batch_again(t: Training) -> None:
    """The validation computes embeddings and their error rate, and logs as its loss the variable of that name, that of the last step of
    the training. Humbatova: wrong validation metric."""
    last: list[float] = []

    def update(training: Training, step: int, observer: Observer) -> tuple[Batch, Tensors]:
        batch, tensors = plain_update(training, step, observer)
        last[:] = [float(tensors["loss"].detach())]
        return batch, tensors

    def validate(training: Training, step: int, observer: Observer) -> None:
        training.model.eval()
        with observer.phase("val"), torch.no_grad():
            batch = training.sample(step, "val")
            rates = verifier.trials(F.normalize(training.model.embed(batch[0])), batch[1])
        observer.log({"loss": last[0], "eer": verifier.equal_error_rate(*rates)}, "val", step)

    t.update, t.validate = update, validate
