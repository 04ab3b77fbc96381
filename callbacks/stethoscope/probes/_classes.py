"""What a classifier answers, and what it should have answered, counted per class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stethoscope._protocols import Key, Readings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from stethoscope._protocols import Attachment, Probe

MOST = 1000
"""Classes that are counted; a vocabulary is no set of classes."""


@dataclass(frozen=True)
class Classes:
    """How often each class is predicted, is the target, and is predicted rightly, from tensors given to `observe` or `step`.

    **Records**, per observed step, as histograms with one bin per class (of width 1, from 0): `classes/predicted`,
    `classes/target`, `classes/right`. Only where there is one label per item: scores of shape (items, classes) and integer targets of shape
    (items,). Targets outside of the classes (an ignored index) are left out.

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

    outputs: tuple[str, ...] = ("logits", "outputs", "output", "scores", "predictions")
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
        self.spec, self._armed = spec, False

    def arm(self, on: bool, phase: str) -> None:
        """See `Attachment`."""
        self._armed = on

    def read(self, given: Mapping[str, Tensor]) -> Mapping[Key, Tensor]:
        """See `Attachment`."""
        scores = next((given[name] for name in self.spec.outputs if name in given), None)
        labels = next((given[name] for name in self.spec.targets if name in given), None)
        if not self._armed or scores is None or labels is None or not _fit(scores, labels):
            return Readings(())
        with torch.no_grad():
            classes = scores.shape[1]
            answers = scores.detach().argmax(1)
            valid = (labels >= 0) & (labels < classes)
            place = labels.clamp(0, classes - 1).long()
            edges = tuple(float(i) for i in range(classes + 1))
            counts = {
                "predicted": _count(answers, valid, classes),
                "target": _count(place, valid, classes),
                "right": _count(place, valid & (answers == place), classes),
            }
        return {Key(f"classes/{name}", edges=edges): count for name, count in counts.items()}

    def detach(self) -> None:
        """See `Attachment`."""
        self._armed = False


def _fit(scores: Tensor, labels: Tensor) -> bool:
    whole = not labels.is_floating_point() and not labels.is_complex() and labels.dtype is not torch.bool
    return whole and scores.dim() == 2 and 2 <= scores.shape[1] <= MOST and labels.shape == scores.shape[:1]


def _count(places: Tensor, counted: Tensor, classes: int) -> Tensor:
    # bincount would ask the device how many bins it needs
    return torch.zeros(classes, device=places.device).scatter_add_(0, places, counted.float())
