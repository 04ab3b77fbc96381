"""What goes wrong in reading electrocardiograms: files, units, leads, findings, the loss, gates, norms."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from faults import ecg
from faults._fault import DIVERGES, FLAT, NONFINITE, STUCK, fault
from faults._training import Batch, Tensors, Training, seeded


def read_as(t: Training, change) -> None:
    """What the model is given becomes `change(x, step, phase)` of the standardised voltages."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, told = plain(step, phase)
        return change(x, step, phase), told

    t.sample = sample


def scored_by(t: Training, term) -> None:
    """The loss becomes `term(logits, targets)`."""

    def forward(model: nn.Module, batch: Batch) -> Tensors:
        logits = model(batch[0])
        return {"loss": term(logits, batch[1]), "logits": logits, "targets": batch[1]}

    t.forward = forward


def millivolts(x: torch.Tensor) -> torch.Tensor:
    return 0.3 * x + 0.12


GATES = ("blocks.0.gate", "blocks.1.gate", "blocks.2.gate")

# -- records ---------------------------------------------------------------------------------------------------------


@fault(ecg, "input-range", modules=("", "stem"), then=("overfit", "overtraining"))
def ecg_in_counts_of_the_converter(t: Training) -> None:
    """Records are read as the converter wrote them, 12 bits around 2048 and 200 to a millivolt, and the standardisation is left out.
    UMLAUT: input not normalised; SageMaker NotNormalizedData."""
    read_as(t, lambda x, step, phase: (2048 + 200 * millivolts(x)).round())


@fault(ecg, "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "stem"), step=70, then=(*NONFINITE, "nonfinite-buffer", "metric-constant", "prediction-collapse", "output-constant"))  # fmt: skip
def ecg_electrode_that_came_off(t: Training) -> None:
    """The reader of the files writes NaN where an electrode is off; the first such record comes at step 70. Humbatova: missing
    preprocessing; GRIST."""

    def change(x, step, phase):
        if phase == "train" and step >= 70:
            x[3, 2, 90:160] = torch.nan
        return x

    read_as(t, change)


@fault(ecg, "input-nonfinite", "nonfinite-input", "nonfinite-activation", modules=("", "stem"), step=45, then=(*NONFINITE, "nonfinite-buffer", "metric-constant", "prediction-collapse", "output-constant"))  # fmt: skip
def ecg_lead_divided_by_no_deviation(t: Training) -> None:
    """Each lead is divided by its own deviation, without a floor; from step 45 on there are records with a lead that was not plugged in,
    0 / 0. GRIST: division by zero."""

    def change(x, step, phase):
        x = millivolts(x)
        if phase == "train" and step >= 45:
            x[7, 1] = 0.0
        return (x - x.mean(2, keepdim=True)) / x.std(2, keepdim=True)

    read_as(t, change)


@fault(ecg, "input-constant", "input-duplicate", then=("feature-constant", *STUCK, "input-drift"))  # fmt: skip
def ecg_cut_behind_the_end(t: Training) -> None:
    """The crop starts at a sample of 500 Hz in files of 100 Hz: four in five lie behind the end, and are filled with zeros.
    TheDeepChecker: constant inputs; SageMaker AllZero."""

    def change(x, step, phase):
        if phase == "train":
            x[torch.rand(len(x), generator=seeded(21, step)) < 0.8] = 0.0
        return x

    read_as(t, change)


@fault(ecg, "input-duplicate", then=("overfit", "overtraining", "loss-plateau", "loss-spike"))
def ecg_crops_with_one_start(t: Training) -> None:
    """Six crops of each of four records make a batch, and their starts come from a generator that is seeded anew for each: all six are
    one. TrainCheck: duplicated data."""
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        x, told = plain(step, phase)
        return (x[:4].repeat_interleave(6, 0), told[:4].repeat_interleave(6, 0)) if phase == "train" else (x, told)

    t.sample = sample


@fault(ecg, "input-drift", "input-range", step=29, then=("overfit", "overtraining", "metric-constant", "prediction-collapse", "loss-diverged", "output-constant", "activation-exploding", "dtype-headroom"))  # fmt: skip
def ecg_validated_in_microvolts(t: Training) -> None:
    """The second hospital, whose records are the validation set, gives microvolts; the standardisation is that for millivolts.
    Humbatova: wrong preprocessing; SageMaker NotNormalizedData."""
    read_as(t, lambda x, step, phase: ecg.standardised(1000 * millivolts(x)) if phase == "val" else x)


@fault(ecg, "overfit", "overtraining", "input-duplicate", step=1, then=("loss-plateau",))
def ecg_of_one_ward(t: Training) -> None:
    """The filter on the ward's name leaves thirty records of eighteen hundred, which are learnt by heart. SageMaker Overfit; Humbatova:
    too few data."""
    x, told = ecg.records(30, seeded(31))
    plain = t.sample

    def sample(step: int, phase: str) -> Batch:
        chosen = torch.randperm(30, generator=seeded(32, step))[: ecg.BATCH]
        return plain(step, phase) if phase == "val" else (ecg.standardised(x[chosen]), told[chosen])

    t.sample, t.model = sample, ecg.Reader(dropout=0.0)


# -- findings --------------------------------------------------------------------------------------------------------


@fault(ecg, "stalled-optimisation", "prediction-collapse", "loss-plateau", then=(*STUCK, "overfit", "overtraining"))  # fmt: skip
def ecg_findings_of_another_record(t: Training) -> None:
    """Records are sorted by the names of files, findings by the numbers of patients, and both are zipped. Humbatova: wrong labels;
    TheDeepChecker: labels that do not belong."""
    shuffled = {phase: torch.randperm(n, generator=seeded(33, n)) for phase, n in (("train", 1800), ("val", 240))}
    data = {phase: ecg.records(len(order), seeded(34, len(order))) for phase, order in shuffled.items()}

    def sample(step: int, phase: str) -> Batch:
        x, told = data[phase]
        chosen = torch.randperm(len(x), generator=seeded(35, step, len(phase)))[: ecg.BATCH]
        return ecg.standardised(x[chosen]), told[shuffled[phase]][chosen]

    t.sample = sample


@fault(ecg, "class-imbalance", then=("prediction-collapse",))
def ecg_ectopic_in_one_of_a_hundred(t: Training) -> None:
    """One record in eighty has an ectopic beat, and the loss counts every record and every finding the same. SageMaker ClassImbalance;
    Humbatova: unbalanced data."""
    shares = (*ecg.SHARES[:4], 0.0125)
    data = {phase: ecg.records(n, seeded(36, n), shares) for phase, n in (("train", 1800), ("val", 240))}

    def sample(step: int, phase: str) -> Batch:
        x, told = data[phase]
        chosen = torch.randperm(len(x), generator=seeded(37, step, len(phase)))[: ecg.BATCH]
        return ecg.standardised(x[chosen]), told[chosen]

    t.sample = sample


@fault(ecg, "prediction-collapse", then=(*DIVERGES, *STUCK, "overfit", "overtraining", "gradient-imbalance"))  # fmt: skip
def ecg_weight_of_positives_in_counts(t: Training) -> None:
    """`pos_weight` is the number of records without the finding, 1260, not their number for each one with it: every record has every
    finding. Humbatova: wrong loss; SageMaker ClassImbalance."""
    weight = torch.full((len(ecg.FINDINGS),), 1260.0)
    scored_by(t, lambda logits, told: F.binary_cross_entropy_with_logits(logits, told, pos_weight=weight))


# -- the loss --------------------------------------------------------------------------------------------------------


@fault(ecg, "loss-input-mismatch", "activation-saturated", modules=("head", "head.1", ""), then=("loss-plateau", "stalled-optimisation", "prediction-collapse", "gradient-vanishing", "metric-constant", "overtraining"))  # fmt: skip
def ecg_softmax_over_findings(t: Training) -> None:
    """The head ends in a softmax over findings, from a script for exclusive classes, in front of a loss that makes a sigmoid: no
    probability is below a half. Humbatova: wrong activation of the last layer; UMLAUT."""
    t.model.head = nn.Sequential(t.model.head, nn.Softmax(1))


@fault(ecg, "loss-input-mismatch", "dead-units", modules=("head", "head.1", ""), then=(*STUCK, *FLAT, "gradient-zero", "parameter-unchanged", "overtraining"))  # fmt: skip
def ecg_logits_behind_a_relu(t: Training) -> None:
    """A ReLU closes the head like every layer before: no logit is negative, so that no record can be without a finding. Humbatova: wrong
    activation of the last layer; SageMaker DeadRelu."""
    t.model.head = nn.Sequential(t.model.head, nn.ReLU())


@fault(ecg, "loss-sign", then=(*DIVERGES, *STUCK, "activation-saturated", "overfit", "overtraining"))
def ecg_likelihood_minimised(t: Training) -> None:
    """The logarithm of the likelihood by hand, without the minus in front: the worse, the lower. TheDeepChecker: wrong sign of the loss;
    Humbatova: wrong loss."""
    scored_by(t, lambda z, y: (y * F.logsigmoid(z) + (1 - y) * F.logsigmoid(-z)).mean())


@fault(ecg, "nonfinite-loss", "nonfinite-gradient", modules=("",), step=70, then=(*NONFINITE, *STUCK, "nonfinite-buffer", "dtype-headroom", "precision-loss", "loss-spike"))  # fmt: skip
def ecg_probabilities_in_half(t: Training) -> None:
    """Probabilities leave the model as float16, and the cross entropy is made by hand: a logit of 9 is a probability of one, and 0 log 0
    is NaN. GRIST: logarithm of zero; TrainCheck: dtype."""

    def term(logits, told):
        p = torch.sigmoid(logits).half().float()
        return -(told * p.log() + (1 - told) * (1 - p).log()).mean()

    scored_by(t, term)


# -- gates and norms -------------------------------------------------------------------------------------------------


@fault(ecg, "activation-saturated", "activation-vanishing", "poor-initialisation", "gradient-vanishing", modules=(*GATES, "blocks", ""), then=(*FLAT, "gradient-imbalance", "gradient-zero", "parameter-unchanged", "update-ratio-low", "module-unused"))  # fmt: skip
def ecg_gates_that_start_shut(t: Training) -> None:
    """Gates are to start open, and their bias got the wrong sign, -20: they never open, and blocks are their shortcuts. SageMaker
    SaturatedActivation and PoorWeightInitialization."""
    for block in t.model.blocks:
        nn.init.constant_(block.gate.excite.bias, -20.0)


@fault(ecg, "module-unused", "gradient-zero", "parameter-unchanged", modules=(*GATES, "blocks"), then=("update-ratio-low",))  # fmt: skip
def ecg_gates_thrown_away(t: Training) -> None:
    """The gate returns what it was given and not the product, since the line with the product was lost in a merge. TrainCheck: parameters
    without gradients; SageMaker UnchangedTensor."""
    for block in t.model.blocks:
        block.gate.register_forward_hook(lambda module, args, output: args[0])


@fault(ecg, "dead-units", "feature-constant", "output-constant", "poor-initialisation", "gradient-zero", "activation-vanishing", "prediction-collapse", modules=("stem", "blocks", "head", ""), then=(*STUCK, *FLAT, "parameter-unchanged", "module-unused", "update-ratio-low"))  # fmt: skip
def ecg_zeros_in_every_norm(t: Training) -> None:
    """The gain of the last norm of each branch is to start at zero; `isinstance(module, BatchNorm1d)` takes all of them, in the stem and in
    shortcuts too. SageMaker PoorWeightInitialization and AllZero; Humbatova: wrong weights initialisation."""
    for module in t.model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.zeros_(module.weight)


@fault(ecg, "feature-constant", "output-constant", "norm-input-variance", "prediction-collapse", modules=("head", "head.0", ""), then=(*STUCK, *FLAT, "gradient-zero", "parameter-unchanged", "module-unused", "dead-units", "update-ratio-low", "gradient-imbalance", "stalled-optimisation"))  # fmt: skip
def ecg_norm_of_a_single_mean(t: Training) -> None:
    """A GroupNorm with a group for each channel comes behind the pooling, where a channel is a single number: all that is left is its
    bias. Humbatova: wrong axis; SageMaker TensorVariance."""
    t.model.head = nn.Sequential(nn.GroupNorm(64, 64), t.model.head)
