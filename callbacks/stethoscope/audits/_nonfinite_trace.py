"""Follows NaN and Inf from operation to operation, below autograd and autocast, so that nothing is missed or guessed.

Each storage that holds something not finite carries the *births* that it stems from. An operation whose inputs are finite
and whose result is not is a birth; one with bad inputs passes their births on; one with a finite result heals them.
"""

from __future__ import annotations

import linecache
import math
import re
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from stethoscope.audits._nonfinite_tensor import Flags, absmax, flags, heal, inside, needed, samples, storage, varies

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import FrameType

_TORCH = str(Path(torch.__file__).parent) + "/"
_TORCH_NN = _TORCH + "nn/"
_HERE = str(Path(__file__).parent) + "/"
_RUNNER = _HERE + "_nonfinite_run.py"
_RAW = ("aten.empty", "aten.empty_like", "aten.new_empty", "aten.empty_strided", "aten.new_empty_strided")
_ARITHMETIC = ("aten.mul", "aten.div", "aten.add", "aten.sub", "aten.rsub")

Phase = Literal["forward", "loss", "backward"]
Kind = Literal["input", "parameter", "buffer", "operation", "mask"]


class Place(NamedTuple):
    """Where something happens.

    Args:
        module: innermost module that was running, its first qualified name; `""` for the root or outside of every module.
        call_index: which call of that module in this run, from 0.
        operation: e.g. `"aten.sqrt"`; of a backward operation, the forward operation that it belongs to.
        source: `file:line in function: code` of the innermost frame outside of torch, `""` where there is none.
    """

    module: str = ""
    call_index: int = 0
    operation: str = ""
    source: str = ""


@dataclass(eq=False)
class Birth:
    """Something not finite that does not come from something else in this run.

    Args:
        index: of the operation, or the order among inputs, parameters and buffers; tells births of two runs apart.
        first_inf, first_nan: first operation, in time, that holds it as Inf or as NaN.
        reached: index of the first operation that it reached.
        details: JSON for the report.
    """

    kind: Kind
    index: int
    place: Place
    flags: Flags
    phase: Phase = "forward"
    name: str = ""
    samples: tuple[int, ...] = ()
    first_inf: Place | None = None
    first_nan: Place | None = None
    reached: float = math.inf
    details: dict[str, Any] | None = None

    @property
    def key(self) -> tuple[str, int, str]:
        """The same in every run of the same computation."""
        return self.kind, self.index, self.name


Births = frozenset[int]
NONE: Births = frozenset()


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of one run.

    Args:
        module: returns name and call index of the innermost running module.
        owner: names a tensor that the run did not make, by its storage, or returns `""`.
        batch: batch size, to name samples.
        heal: indices of operations whose result is made finite, to see what the run would be without them.
        keep_lines: remember every operation's line, for a backward pass.
    """

    def __init__(
        self,
        module: Callable[[], tuple[str, int]],
        owner: Callable[[Tensor], str],
        *,
        batch: int | None = None,
        heal: Iterable[int] = (),
        keep_lines: bool = False,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.births: list[Birth] = []
        self.phase: Phase = "forward"
        self.operations = 0
        self._away = False
        self._module, self._owner, self._batch = module, owner, batch
        self._heal, self._keep_lines = frozenset(heal), keep_lines
        self._next_node = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]  # noqa: SLF001 - as torch.fx does
        # weak references keep a storage's address from being used again, not its memory
        self._bad: dict[int, tuple[StorageWeakRef, Births]] = {}
        self._raw: dict[int, tuple[StorageWeakRef, Place]] = {}
        self._nodes: dict[int, tuple[str, int, str, tuple[str, int, str], bool]] = {}

    # -- what is known of a tensor -----------------------------------------------------------------------------------

    def mark(self, tensor: Tensor, birth: Birth) -> None:
        """Say where a tensor's bad values come from."""
        self.births.append(birth)
        self._remember(tensor, frozenset([len(self.births) - 1]))

    def sources(self, tensor: Tensor) -> Births:
        """Return the births in a tensor as it is now; those in a storage of which it is a finite view do not count."""
        place = storage(tensor) if self._bad else None
        known = self._bad.get(place._cdata) if place is not None else None  # noqa: SLF001 - the address names a storage
        return known[1] if known and any(flags(tensor)) else NONE

    def _remember(self, tensor: Tensor, births: Births) -> None:
        place = storage(tensor)
        if place is not None:
            earlier = self._bad.get(place._cdata, (None, NONE))[1]  # noqa: SLF001
            self._bad[place._cdata] = _weakly(place), earlier | births  # noqa: SLF001

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        """Do not see operations that are not the model's."""
        self._away = True
        try:
            yield
        finally:
            self._away = False

    # -- operations --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and look at its result."""
        kwargs = kwargs or {}
        if self._away:
            return func(*args, **kwargs)
        index = self.operations = self.operations + 1
        name = str(func.overloadpacket)
        if self._keep_lines:
            self._keep_line(name)
        if func.is_view:
            return func(*args, **kwargs)
        written = _written(func, args, kwargs)
        reads = [*inside(args), *inside(kwargs)]
        births = NONE.union(*map(self.sources, reads)) if self._bad else NONE
        before = {id(each): each.clone() for each in written if each.is_floating_point() or each.is_complex()}
        result = func(*args, **kwargs)
        if name in _RAW:
            for each in inside(result):
                self._remember_raw(each, name)
            return result
        for each in [*inside(result), *written] if written else inside(result):
            found = flags(each)
            if any(found):
                arguments = _swap(args, before), _swap(kwargs, before)
                births = self._bad_result(func, name, index, each, found, births, arguments)
                if index in self._heal:
                    heal(each)
        return result

    def _bad_result(
        self, func: Any, name: str, index: int, tensor: Tensor, found: Flags, births: Births, arguments: Any
    ) -> Births:
        """Tell a producer from a propagator; return the births that the result stems from."""
        if not births:
            births = self._unseen(name, inside(arguments))
        masked = births and all(self.births[i].kind == "mask" for i in births)
        # who multiplies numbers of a model by Inf does not write a mask, whatever their signs
        computed = name.removesuffix("_") in _ARITHMETIC and any(map(varies, inside(arguments)))
        written = found.inf and _infinite_constant(arguments) and not computed
        place: Place | None = None
        if not births or (masked and found.nan):
            place = self._place(name)
            birth = Birth("operation", index, place, found, self.phase, samples=samples(tensor, self._batch))
            # nobody writes both signs
            if written and not found.nan and not (found.positive and found.negative):
                birth.kind = "mask"
            else:
                birth.details = self._details(func, tensor, found, arguments, masked=bool(masked))
            self.births.append(birth)
            births = frozenset([len(self.births) - 1])
        elif written and not masked:
            self.births.append(Birth("mask", index, self._place(name), found, self.phase))
            births |= {len(self.births) - 1}
        self._remember(tensor, births)
        from_mask = any(self.births[i].kind == "mask" for i in births)
        for i in births:
            birth = self.births[i]
            birth.reached = min(birth.reached, index)
            if birth.first_nan is None and found.nan:
                birth.first_nan = place = place or self._place(name)
            # beside a real fault, the -Inf of a mask is still the mask's
            if birth.first_inf is None and (found.positive or (found.negative and not from_mask)):
                birth.first_inf = place = place or self._place(name)
        return births

    def _unseen(self, name: str, tensors: Iterable[Tensor]) -> Births:
        """Find bad tensors that no operation of this run has made: attributes, constants, NumPy, raw memory."""
        births = NONE
        for each in tensors:
            found = flags(each)
            if not any(found) or self.sources(each):
                continue
            place = storage(each)
            raw = self._raw.get(place._cdata) if place is not None else None  # noqa: SLF001
            owner = self._owner(each)
            birth = Birth("operation", self.operations, raw[1] if raw else self._place(name), found, self.phase)
            if owner:
                birth.kind, birth.name = "buffer", owner
            elif not raw and not found.nan and (each.dim() == 0 or not found.positive):
                birth.kind = "mask"
            birth.samples = samples(each, self._batch)
            birth.details = {"raw_memory": True} if raw else {"outside": True}
            self.mark(each, birth)
            births |= {len(self.births) - 1}
        return births

    def _details(
        self, func: Any, tensor: Tensor, found: Flags, arguments: tuple[Any, Any], *, masked: bool
    ) -> dict[str, Any]:
        top = absmax(iter([*inside(arguments[0]), *inside(arguments[1])]))
        details: dict[str, Any] = {"dtype": str(tensor.dtype).removeprefix("torch."), "input_absmax": top}
        if self.phase == "backward":
            kept = self._nodes.get(_node_number())
            details["in_loss"] = kept is not None and kept[4]
        elif masked:
            details["masked"] = True
        elif found.inf:
            details["needed"] = needed(func, *arguments)
        return details

    # -- places ------------------------------------------------------------------------------------------------------

    def _remember_raw(self, tensor: Tensor, name: str) -> None:
        place = storage(tensor)
        if place is not None:
            self._raw[place._cdata] = _weakly(place), self._place(name)  # noqa: SLF001

    def _keep_line(self, name: str) -> None:
        # autograd makes nodes right before the operation, so those that are new at an operation are its own: one, or under
        # torch.func one for each level; a custom Function's first operation runs without gradients
        made = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]  # noqa: SLF001 - as torch.fx does
        if made > self._next_node:
            kept = (*self._running(), name, _position(_frame()), self.phase == "loss")
            self._nodes.update(dict.fromkeys(range(self._next_node, made), kept))
            self._next_node = made

    def _running(self) -> tuple[str, int]:
        """Return the innermost module; where a backward pass runs the user's code, the one that its node was made in."""
        inner = self._module()
        kept = None if inner[0] else self._nodes.get(_node_number())
        return kept[:2] if kept is not None else inner

    def _place(self, name: str) -> Place:
        frame = _frame()
        node = torch._C._current_autograd_node()  # noqa: SLF001 - as detect_anomaly
        if node is not None and not _is_users(frame):
            kept = self._nodes.get(_node_number())
            return Place(*kept[:3], _line(kept[3])) if kept is not None else Place(operation=_of_node(node.name()))
        return Place(*self._running(), name, _line(_position(frame)))


def _weakly(place: torch.UntypedStorage) -> StorageWeakRef:
    return StorageWeakRef(place)  # type: ignore[no-untyped-call]


def _node_number() -> int:
    """Return the number of the autograd node that is running backward, -1 without one."""
    node = torch._C._current_autograd_node()  # noqa: SLF001 - as detect_anomaly
    return int(node._sequence_nr()) if node is not None else -1  # noqa: SLF001 - as torch.fx does


def _frame() -> FrameType | None:
    """Return the innermost frame of the user's code, else of torch.nn, within this run and this backward pass."""
    frame, torch_nn = sys._getframe(1), None  # noqa: SLF001 - the only way to see the caller without formatting a traceback
    while frame is not None:
        name = frame.f_code.co_filename
        if name == _RUNNER or frame.f_code.co_name == "_engine_run_backward":
            break
        if not name.startswith((_TORCH, _HERE)):
            return frame
        if torch_nn is None and name.startswith(_TORCH_NN):
            torch_nn = frame
        frame = frame.f_back  # type: ignore[assignment]
    return torch_nn


def _is_users(frame: FrameType | None) -> bool:
    return frame is not None and not frame.f_code.co_filename.startswith(_TORCH)


def _position(frame: FrameType | None) -> tuple[str, int, str]:
    return (frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name) if frame else ("", 0, "")


def _line(position: tuple[str, int, str]) -> str:
    file, number, function = position
    if not file:
        return ""
    path = Path(file)
    here = Path.cwd()
    shown = path.relative_to(here) if path.is_relative_to(here) else Path(*path.parts[-3:])
    return f"{shown}:{number} in {function}: {linecache.getline(file, number).strip()}"


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the arguments that an operation writes to."""
    if not func._schema.is_mutable:  # noqa: SLF001 - the schema is the only place that knows
        # these write their running statistics without saying so
        return list(inside(args[3:5])) if str(func.overloadpacket).endswith("_batch_norm") else []
    found: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):  # noqa: SLF001
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += inside(args[i] if i < len(args) else kwargs.get(argument.name))
    return found


def _swap(value: Any, before: dict[int, Tensor]) -> Any:
    """Return the arguments as they were before the operation."""
    if not before:
        return value
    if isinstance(value, Tensor):
        return before.get(id(value), value)
    if isinstance(value, tuple | list):
        return type(value)(_swap(each, before) for each in value)
    return {name: _swap(each, before) for name, each in value.items()} if isinstance(value, dict) else value


def _infinite_constant(value: Any) -> bool:
    """Whether somebody wrote an Inf on purpose: `masked_fill(mask, float("-inf"))`."""
    if isinstance(value, float):
        return math.isinf(value)
    if isinstance(value, tuple | list):
        return any(map(_infinite_constant, value))
    return isinstance(value, dict) and any(map(_infinite_constant, value.values()))


def _of_node(name: str) -> str:
    """Name the operation of an autograd node that was made outside of this run: `SqrtBackward0` is `aten.sqrt`."""
    return "aten." + re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", re.sub(r"Backward\d*$", "", name)).lower()
