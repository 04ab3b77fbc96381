"""Whether a model's answers follow their own targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stethoscope._protocols import Columns, Key, Readings
from stethoscope.probes._classes import Classes, class_axis
from stethoscope.probes._targets import OUTPUTS, TARGETS
from stethoscope.probes._thinned import thinned
from stethoscope.stats import is_dense

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from stethoscope._protocols import Attachment, Probe

NAMES = tuple(dict.fromkeys((*Classes().outputs, *OUTPUTS)))
FEWEST, MOST_ITEMS = 4, 32
"""Items of a batch that are compared with each other, evenly spread."""
MOST_VALUES = 256
"""Values, or places of a sequence or an image, of an item, evenly spread."""


@dataclass(frozen=True)
class Agreement:
    """Compares the answers to the items of a batch, two by two, with their targets, from tensors given to `observe` or `step`.

    **Records**, in training, per observed step: `answer/concordance`, the share of pairs of items with different targets in which the
    difference of the two answers points the way of the difference of the two targets: `<a - b, s - t> > 0` (a tie counts half). That is 0.5 where
    answers have nothing to do with their own targets, 1 where they follow them, below 0.5 where they do the opposite; for single numbers it is
    Kendall's tau as a share, for two classes the area under the ROC curve. Adding the same to all answers or scaling them changes nothing, and no loss needs to be known.
    `answer/pairs`, how many they are, and `answer/values`, how many numbers an answer of an item is (1 for scores of classes, which are one answer). Outputs and targets are floating point and of one shape, or scores of classes and whole numbers, whose targets stand for one-hot vectors
    (targets outside of the classes are left out, for both items of a pair).

    **Cost:** on observed steps, products of 32 items by 32 at 256 places at most. Never waits for the device.

    Args:
        every: observe when `step % every == 0`; None takes the monitor's.

    Examples:
        >>> attached = Agreement().attach(nn.Identity())
        >>> attached.arm(True, "train")
        >>> read = attached.read({"outputs": torch.tensor([0.1, 0.2, 0.3, 0.4]), "targets": torch.tensor([1.0, 3.0, 2.0, 4.0])})
        >>> {key.name: round(float(value), 3) for key, value in read.items()}
        {'answer/concordance': 0.833, 'answer/pairs': 6.0, 'answer/values': 1.0}

    References: Kendall 1938, Biometrika 30(1/2).
    """

    every: int | None = None

    def attach(self, model: nn.Module) -> Attachment:
        """Nothing is hooked: the tensors are given."""
        return _Comparing()

    def covers(self, other: Probe) -> bool:
        """Whether `other` compares no more often."""
        return isinstance(other, Agreement) and self.every in (1, other.every)


class _Comparing:
    """The attachment of one `Agreement`."""

    def __init__(self) -> None:
        self._armed = False

    def arm(self, on: bool, phase: str) -> None:
        """See `Attachment`."""
        self._armed = on and phase == "train"

    def read(self, given: Mapping[str, Tensor]) -> Mapping[Key, Tensor]:
        """See `Attachment`."""
        answers = next((given[name] for name in NAMES if name in given), None)
        targets = next((given[name] for name in TARGETS if name in given), None)
        if not self._armed or answers is None or targets is None or answers.device != targets.device:
            return Readings(())
        if not (is_dense(answers) and is_dense(targets) and answers.is_floating_point()) or targets.dim() == 0:
            return Readings(())
        with torch.no_grad():
            axis = class_axis(answers, targets)
            if axis is not None:
                return _of_classes(answers.detach().movedim(axis, -1), targets)
            sizes = [[size for size in x.shape[1:] if size != 1] for x in (answers, targets)]
            if answers.dim() == 0 or targets.is_complex() or len(answers) != len(targets) or sizes[0] != sizes[1]:
                return Readings(())
            return _of_values(answers.detach(), targets)

    def detach(self) -> None:
        """See `Attachment`."""
        self._armed = False


def _of_values(answers: Tensor, targets: Tensor) -> Readings:
    if len(answers) < FEWEST:
        return Readings(())
    a, t = (thinned(thinned(x, MOST_ITEMS).flatten(1) if x.dim() > 1 else thinned(x, MOST_ITEMS)[:, None], MOST_VALUES, 1).float() for x in (answers, targets))  # fmt: skip
    a, t = a - a.mean(0), t - t.mean(0)  # a common part cancels in differences, and would only round them off
    products = a @ t.T
    differ = (t[:, None] != t).any(-1)
    return _shares(products, differ, a.shape[1])


def _of_classes(scores: Tensor, targets: Tensor) -> Readings:
    if len(scores) < FEWEST:
        return Readings(())
    classes = scores.shape[-1]
    scores = thinned(scores, MOST_ITEMS)
    targets = thinned(targets, MOST_ITEMS).reshape(len(scores), -1)
    scores = thinned(scores.reshape(len(scores), -1, classes), MOST_VALUES, 1).float().log_softmax(-1)
    targets = thinned(targets, MOST_VALUES, 1)
    counted = (targets >= 0) & (targets < classes)
    targets = targets.clamp(0, classes - 1).long()
    items = len(scores)
    every = scores[:, None].expand(items, items, -1, classes)
    likely = every.gather(-1, targets[None, :, :, None].expand(items, -1, -1, 1))[..., 0]  # [i, j]: answer i, target j
    both = counted[:, None] & counted
    own = likely.diagonal().T  # (items, places)
    products = torch.where(both, likely - own[:, None], 0.0).sum(-1)  # minus what the item's own target gets there
    differ = (both & (targets[:, None] != targets)).any(-1)
    return _shares(products, differ, 1)


def _shares(products: Tensor, differ: Tensor, width: int) -> Readings:
    """Of products of each answer with each target, up to a constant per answer."""
    own = products.diagonal()
    agree = (own[:, None] + own) - (products + products.T)
    follows = (agree > 0).float() + 0.5 * (agree == 0).float()
    pairs = (differ & agree.isfinite()).triu(1)
    count = pairs.sum()
    share = (follows * pairs).sum() / count.clamp(min=1)
    values = torch.stack([share, count.float(), torch.full_like(share, width)])
    keys = [Key(f"answer/{name}") for name in ("concordance", "pairs", "values")]
    return Readings([Columns(keys, values, range(len(keys)))])
