"""What a classifier answers, and what it should have answered, counted per class."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stethoscope._protocols import Key, Readings
from stethoscope.stats import is_dense

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from stethoscope._protocols import Attachment, Probe

MOST = 1000
"""Classes that are counted; a vocabulary is no set of classes."""


BARE = ("logits", "log_probs")
"""Names that stand for scores of classes also where no targets are given."""


@dataclass(frozen=True)
class Classes:
    """How often each class is predicted, is the target, and is predicted rightly, from tensors given to `observe` or `step`.

    **Records**, per observed step, as histograms with one bin per class (of width 1, from 0): `classes/predicted`,
    `classes/target`, `classes/right`, for scores of shape (items, classes) and integer targets of shape (items,). Of sequences and images, scores
    (items, ..., classes) or (items, classes, ...) and targets (items, ...), the same as `tokens/predicted` and so on: their classes are often a
    vocabulary. Targets outside of the classes (an ignored index) are left out. Where no targets fit (CTC), of what is called `logits` or
    `log_probs`, with the classes last, `tokens/predicted` alone. What is called `logits` and has one value per target, all of them 0 or 1 (binary
    cross entropy), stands for two classes: `classes/...` of one value per item, `tokens/...` of three axes and more.

    Once, at the first observed step of a training: `classes/surprise` (or `tokens/surprise`), the mean cross entropy of the scores, taken as
    logits, above that of guessing, ln(classes), in nats.

    **Cost:** one `argmax` and three sums over the scores on observed steps. Never waits for the device.

    Args:
        outputs: names under which scores may be given; the first that is there is taken.
        targets: the same for labels.
        every: observe when `step % every == 0`; None takes the monitor's.

    Examples:
        >>> attached = Classes().attach(nn.Identity())
        >>> attached.arm(True, "train")
        >>> given = {"logits": torch.eye(3), "targets": torch.tensor([0, 1, 1])}
        >>> {key.name: tensor.tolist() for key, tensor in attached.read(given).items()}["classes/right"]
        [1.0, 1.0, 0.0]
    """

    outputs: tuple[str, ...] = ("logits", "log_probs", "outputs", "output", "scores", "predictions")
    targets: tuple[str, ...] = ("targets", "target", "labels", "label", "y")
    every: int | None = None

    def attach(self, model: nn.Module) -> Attachment:
        """Nothing is hooked: the tensors are given."""
        return _Counting(self)

    def covers(self, other: Probe) -> bool:
        """Whether `other` counts the same, and no more often."""
        if not isinstance(other, Classes) or (self.outputs, self.targets) != (other.outputs, other.targets):
            return False
        return self.every == other.every or self.every == 1


class _Counting:
    """The attachment of one `Classes`."""

    def __init__(self, spec: Classes) -> None:
        self.spec, self._armed, self._training = spec, False, False
        self._begun = False  # the first answers of the training were looked at

    def arm(self, on: bool, phase: str) -> None:
        """See `Attachment`."""
        self._armed, self._training = on, phase == "train"

    def read(self, given: Mapping[str, Tensor]) -> Mapping[Key, Tensor]:
        """See `Attachment`."""
        if not self._armed:
            return Readings(())
        name = next((name for name in self.spec.outputs if name in given), None)
        labels = next((given[name] for name in self.spec.targets if name in given), None)
        if name is None or not is_dense(given[name]) or not (labels is None or is_dense(labels)):
            return Readings(())
        with torch.no_grad():
            scores = given[name].detach()
            axis = None if labels is None else class_axis(scores, labels)
            if labels is not None and axis is not None:
                counts = _counts(scores.movedim(axis, -1), labels)
                if self._training and not self._begun:
                    self._begun = True
                    counts |= _surprise(scores.movedim(axis, -1), labels)
                return counts
            if name == "logits" and labels is not None and _is_binary(scores, labels):
                return _binary_counts(scores, labels)
            alike = labels is not None and labels.shape == scores.shape  # a question per column, no classes
            if name in BARE and not alike and scores.dim() in (2, 3) and 2 <= scores.shape[-1] <= MOST:
                answers = scores.argmax(-1)
                every = torch.ones_like(answers, dtype=torch.bool)
                found = _count(answers, every, scores.shape[-1])
                return {Key("tokens/predicted", edges=_edges(scores.shape[-1])): found}
        return Readings(())

    def detach(self) -> None:
        """See `Attachment`."""
        self._armed = False


def class_axis(scores: Tensor, labels: Tensor) -> int | None:
    """The axis of the classes, None where labels do not belong to scores."""
    whole = not labels.is_floating_point() and not labels.is_complex() and labels.dtype is not torch.bool
    if not whole or scores.dim() != labels.dim() + 1 or labels.dim() == 0:
        return None
    # of (items, length, length) nobody can tell: language models put the vocabulary last
    for axis in (-1, 1):
        others = scores.shape[:-1] if axis == -1 else (*scores.shape[:1], *scores.shape[2:])
        if others == labels.shape and 2 <= scores.shape[axis] <= MOST:
            return axis
    return None


def _is_binary(scores: Tensor, labels: Tensor) -> bool:
    """Whether each label has one score; a table (items, labels) is of several questions, not of two classes."""
    if labels.is_complex() or labels.dim() == 0 or scores.numel() != labels.numel() or len(scores) != len(labels):
        return False
    return labels.numel() == len(labels) or labels.dim() > 2


def _binary_counts(scores: Tensor, labels: Tensor) -> Mapping[Key, Tensor]:
    labels = labels.detach().flatten()
    valid = (labels == 0) | (labels == 1)
    valid &= valid.all()  # any other number makes these measurements, not classes
    group = "classes" if labels.numel() == len(scores) else "tokens"
    return _of_answers((scores.flatten() > 0).long(), labels, valid, 2, group)


def _surprise(scores: Tensor, labels: Tensor) -> dict[Key, Tensor]:
    classes = scores.shape[-1]
    valid = (labels >= 0) & (labels < classes)
    surprise = -scores.float().log_softmax(-1).gather(-1, labels.clamp(0, classes - 1).long().unsqueeze(-1)).squeeze(-1)
    mean = torch.where(valid, surprise, 0.0).sum() / valid.sum().clamp(min=1)
    return {Key(f"{_group(labels)}/surprise"): mean - math.log(classes)}


def _group(labels: Tensor) -> str:
    return "classes" if labels.dim() == 1 else "tokens"


def _counts(scores: Tensor, labels: Tensor) -> dict[Key, Tensor]:
    classes = scores.shape[-1]
    valid = (labels >= 0) & (labels < classes)
    return _of_answers(scores.argmax(-1), labels, valid, classes, _group(labels))


def _of_answers(answers: Tensor, labels: Tensor, valid: Tensor, classes: int, group: str) -> dict[Key, Tensor]:
    place = labels.clamp(0, classes - 1).long()
    counts = {
        "predicted": _count(answers, valid, classes),
        "target": _count(place, valid, classes),
        "right": _count(place, valid & (answers == place), classes),
    }
    return {Key(f"{group}/{name}", edges=_edges(classes)): count for name, count in counts.items()}


def _edges(classes: int) -> tuple[float, ...]:
    return tuple(float(i) for i in range(classes + 1))


def _count(places: Tensor, counted: Tensor, classes: int) -> Tensor:
    # bincount would ask the device how many bins it needs
    return torch.zeros(classes, device=places.device).scatter_add_(0, places.flatten(), counted.flatten().float())
