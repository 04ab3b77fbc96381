"""What losses are given, read off the graph that autograd has written down: logits, probabilities, or logarithms of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from stethoscope import stats
from stethoscope._protocols import Columns, Key, Readings
from stethoscope._tree import plain
from stethoscope.probes import _targets
from stethoscope.probes._hook import Hook, is_traced, takes_hooks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch.utils.hooks import RemovableHandle

    from stethoscope._protocols import Attachment, Probe

OTHER, LAYER, SOFTMAX, LOG_SOFTMAX, SIGMOID, RELU, TANH, OTHER_AXIS = range(8)
"""What `loss/<kind>_input` says: something else; a layer's own output; what has been through this activation; a log-softmax
over another axis than that of the classes."""

_FORMS = {
    "SoftmaxBackward": SOFTMAX,
    "LogSoftmaxBackward": LOG_SOFTMAX,
    "SigmoidBackward": SIGMOID,
    "ReluBackward": RELU,
    "TanhBackward": TANH,
    **dict.fromkeys(("AddmmBackward", "MmBackward", "BmmBackward", "LinearBackward", "ConvolutionBackward"), LAYER),
}
_LOG_LOSSES = {
    "NllLossBackward": ("nll", 1),
    "NllLoss2DBackward": ("nll", 1),
    "CtcLossBackward": ("ctc", 2),
    "CudnnCtcLossBackward": ("ctc", 2),
}
"""Losses of log-probabilities, and the axis of the classes."""


_ARITHMETIC = frozenset(
    f"{name}Backward"
    for name in (
        *("Add", "Sub", "Rsub", "Mul", "Div", "Neg", "Pow", "Abs", "Sum", "Mean", "Dot"),
        *("MaskedFill", "Where", "Stack", "Cat", "Gather"),
    )
)
"""What lies between a sum of losses and its terms, beside shapes."""

_SHAPES = frozenset(
    f"{name}Backward"
    for name in (
        *(
            "View",
            "UnsafeView",
            "ReshapeAlias",
            "Unflatten",
            "Squeeze",
            "Unsqueeze",
            "Expand",
            "Transpose",
            "Permute",
            "T",
        ),
        *("Slice", "Narrow", "Select", "Index", "IndexSelect", "MaskedSelect", "Clone", "ToCopy", "Alias"),
    )
)
"""What leaves values as they are."""
_DIFFERENCES = frozenset(
    f"{name}Backward" for name in ("Sub", "Rsub", "MseLoss", "L1Loss", "SmoothL1Loss", "HuberLoss")
)
"""Where outputs meet targets, value by value."""

CROSSED = "crossed"
_FURTHEST = 200  # nodes from the loss: sums of many terms have some tens
_NAME = "stethoscope/module"

_Node: TypeAlias = Any  # torch.autograd.graph.Node does not declare what nodes have saved


@dataclass(frozen=True)
class LossInputs:
    """What cross entropies, CTC and their like are given: a layer's output, or what has been through an activation before.

    **Records**, in training only, from the losses given to `step` or `observe` (each tensor of one element that still has its
    graph: not `loss.item()`): `loss/terms`, how many terms were recognised, and per term what it is given, under the module that
    has returned it where that is an activation: `loss/cross_entropy_input`, `loss/nll_input`, `loss/bce_input` (with logits),
    `loss/ctc_input`, of values
    0 something else, 1 a layer's own output, 2 softmax, 3 log-softmax, 4 sigmoid, 5 ReLU, 6 tanh, 7 a log-softmax over another axis
    than that of the classes. Of differences between outputs and something without a gradient, `loss/crossed`, the size of the batch, where each
    output of a batch meets each target: (items, 1) against (items,).

    Where outputs and targets of one shape are given as well (`outputs=`, `targets=`, floating point): `output/rms`, `target/rms`, `target/low`,
    `target/high`, and, under the module that has returned the outputs, `target/beyond` (mean square of what lies beyond the reach of the last
    activation, over the variance of the targets) and `target/loss_gap` (how far the loss is, relative to itself, from the nearest usual error of the two).

    Only the first nodes of the graph are walked, from the loss to the operation before it; no tensor is read, so that this works for
    `torch.nn.functional.softmax` as well. What compiled code computes is one node, and cannot be told.

    **Cost:** on observed steps one Python call per module, some tens of nodes, and about ten passes over the targets; nothing in between. Never waits for the device.

    Args:
        every: observe when `step % every == 0`; None takes the monitor's.

    Examples:
        >>> attached = LossInputs().attach(nn.Identity())
        >>> attached.arm(True, "train")
        >>> scores = torch.randn(4, 3, requires_grad=True)
        >>> loss = nn.functional.cross_entropy(scores.softmax(-1), torch.tensor([0, 1, 2, 0]))
        >>> {key.name: float(value) for key, value in attached.read({"loss": loss}).items()}
        {'loss/terms': 1.0, 'loss/cross_entropy_input': 2.0}
    """

    every: int | None = None

    def attach(self, model: nn.Module) -> Attachment:
        """Choose the modules of `model`, which sign what they return while armed."""
        return _Walk(model)

    def covers(self, other: Probe) -> bool:
        """Whether `other` looks no more often."""
        return isinstance(other, LossInputs) and (self.every == other.every or self.every == 1)


class _Walk:
    """The attachment of one `LossInputs`."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(plain(name), each) for name, each in model.named_modules() if takes_hooks(each)]
        self._armed = False
        self.failure: Exception | None = None
        self._handles: list[RemovableHandle] = []

    def arm(self, on: bool, phase: str) -> None:
        """See `Attachment`."""
        self.detach()
        self._armed = on and phase == "train"
        if self._armed:
            self._handles = [each.register_forward_hook(_Signs(self, name)) for name, each in self._modules]

    def read(self, given: Mapping[str, Tensor]) -> Readings:
        """See `Attachment`."""
        if self.failure is not None:
            raise self.failure
        losses = [each for each in given.values() if each.numel() == 1 and each.grad_fn is not None]
        if not self._armed or not losses:
            return Readings(())
        found = {
            Key(f"loss/{kind}" if kind == CROSSED else f"loss/{kind}_input", module): form
            for loss in losses
            for kind, module, form in _terms(loss)
        }
        values = [float(len(found)), *map(float, found.values())]
        numbers = stats.upload(values, torch.float32, losses[0].device)
        return Readings([Columns([Key("loss/terms"), *found], numbers, range(len(values))), *_compared(given, losses)])

    def detach(self) -> None:
        """See `Attachment`."""
        self._armed = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _compared(given: Mapping[str, Tensor], losses: Sequence[Tensor]) -> list[Columns]:
    """Outputs and targets, and what made the outputs."""
    both = _targets.pair(given)
    if both is None or both[0].grad_fn is None:
        return []
    loss = given["loss"] if any(each is given.get("loss") for each in losses) else losses[0]
    source: _Node = both[0].grad_fn
    while _kind(source) in _SHAPES:
        source = source.next_functions[0][0]
    return _targets.measure(*both, loss, _signature(source), _kind(source))


def _terms(loss: Tensor) -> Iterator[tuple[str, str, int]]:
    """Each term of a loss: its kind, the module that returned what it is given, and the form of that."""
    waiting, seen = [loss.grad_fn], set[_Node]()
    while waiting and len(seen) < _FURTHEST:
        node: _Node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = _kind(node)
        if kind in _LOG_LOSSES:
            name, classes = _LOG_LOSSES[kind]
            source, axis = _source(node, classes)
            if _kind(source) == "LogSoftmaxBackward" and not _over(source, axis):
                yield name, _signature(source), OTHER_AXIS
            elif _kind(source) == "LogSoftmaxBackward" and name == "nll":
                yield _term("cross_entropy", source)
            else:
                yield name, *_told(source)
        elif kind == "LogSoftmaxBackward":
            yield _term("cross_entropy", node)  # labels are smoothed, or shares of classes
        elif kind == "BinaryCrossEntropyWithLogitsBackward":
            yield _term("bce", node)
        elif kind in _ARITHMETIC or kind in _SHAPES or kind in _DIFFERENCES:
            items = _crossed(node) if kind in _DIFFERENCES else 0
            if items:
                yield CROSSED, "", items
            waiting += [each for each, _ in node.next_functions]


def _crossed(node: _Node) -> int:
    """The size of a batch of which each output meets each target, 0 where they meet one by one.

    Only one of the two may have a graph: differences between all outputs of a batch are what losses of ranks are made of.
    """
    nodes = [each for each, _ in node.next_functions if each is not None]
    if len(nodes) != 1:
        return 0
    shape = _shape(nodes[0])
    if _kind(nodes[0]) == "ExpandBackward":
        crossed, shape = shape, _shape(nodes[0].next_functions[0][0])
    else:
        crossed = _shape(node)
    items = crossed[0] if crossed else 0
    return items if items > 1 and crossed == (items, items) and shape in ((items, 1), (items,)) else 0


def _shape(node: _Node) -> tuple[int, ...]:
    """Of what a node has made."""
    known = getattr(node, "_input_metadata", ())
    return tuple(known[0].shape) if known else ()


def _term(name: str, node: _Node) -> tuple[str, str, int]:
    return name, *_told(_source(node)[0])


def _told(source: _Node) -> tuple[str, int]:
    form = LAYER if _adds_bias(source) else _FORMS.get(_kind(source), OTHER)
    return (_signature(source) if form not in (OTHER, LAYER) else ""), form


def _adds_bias(node: _Node) -> bool:
    """Whether a parameter is added to a product: a Linear whose input is not contiguous, such as a `batch_first` GRU's output."""
    if _kind(node) != "AddBackward":
        return False
    (product, _), (bias, _) = node.next_functions
    while _kind(product) in _SHAPES:
        product = product.next_functions[0][0]
    return _FORMS.get(_kind(product)) == LAYER and _kind(bias) == "torch::autograd::AccumulateGrad"


def _source(node: _Node, axis: int | None = None) -> tuple[_Node, int | None]:
    """The operation that made what a node is given first, and where `axis` lies there; None where that is not known."""
    found = node.next_functions[0][0]
    while _kind(found) in _SHAPES:
        axis = _moved(found, axis)
        found = found.next_functions[0][0]
    return found, axis


def _moved(node: _Node, axis: int | None) -> int | None:
    """Where an axis was before an operation on shapes."""
    kind, size = _kind(node), _dimensions(node)
    if axis is None or kind in ("CloneBackward", "ToCopyBackward", "AliasBackward"):
        return axis
    if kind == "TransposeBackward":
        first, second = _axis(node._saved_dim0, size), _axis(node._saved_dim1, size)  # noqa: SLF001  # torch's own name
        return {first: second, second: first}.get(axis, axis)
    if kind == "PermuteBackward":
        return _axis(node._saved_dims[axis], size)  # noqa: SLF001
    return None


def _over(softmax: _Node, axis: int | None) -> bool:
    """Whether a log-softmax runs over an axis, as far as is known."""
    size = _dimensions(softmax)
    return axis is None or size < 2 or _axis(softmax._saved_dim, size) == axis  # noqa: SLF001


def _axis(saved: int, size: int) -> int:
    """A dimension as autograd has saved it, where -1 is the largest unsigned number."""
    return saved if saved < size else (saved - 2**64) % size


def _dimensions(node: _Node) -> int:
    return len(node._input_metadata[0].shape)  # noqa: SLF001


def _kind(node: _Node) -> str:
    """The name of an operation, `""` where there is none."""
    return "" if node is None else node.name().rstrip("0123456789")


def _signature(node: _Node) -> str:
    """The innermost module that has returned what a node makes, `""` where none has."""
    name: str = node.metadata.get(_NAME, "")
    return name


class _Signs(Hook):
    """Writes a module's name on the node of what it returns. A node's notes keep nothing alive."""

    __slots__ = ("name", "owner")

    def __init__(self, owner: _Walk, name: str) -> None:
        self.owner, self.name = owner, name

    def __call__(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        try:
            if isinstance(output, Tensor) and output.grad_fn is not None and not is_traced():
                node: _Node = output.grad_fn
                node.metadata.setdefault(_NAME, self.name)
        except Exception as error:  # instrumentation never stops a training
            self.owner.failure = error
