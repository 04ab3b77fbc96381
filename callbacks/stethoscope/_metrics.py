"""Any toolkit's metric dictionary as a flat list of named scalars, without waiting for the device.

Tensors and arrays are recognised by what they offer, so that host-side code may use this file too.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from stethoscope._graphs import of_several_steps
from stethoscope._record import Finding

if TYPE_CHECKING:
    from torch import Tensor


class Metric(NamedTuple):
    """One entry of a metric dictionary.

    Args:
        name: its key; the keys of nested dictionaries are joined with `/`.
        value: host float or a detached 0-d tensor on its device; None where there is no scalar.
        kind: `float int bool none tensor tensor-grad tensor-graphs pair list str other`, see `normalise`.
    """

    name: str
    value: float | Tensor | None
    kind: str


def normalise(metrics: object) -> list[Metric]:
    """Flatten a metric dictionary; reads no tensor.

    | given                                                             | value             | kind               |
    |-------------------------------------------------------------------|-------------------|--------------------|
    | Python or NumPy number, array of one element                      | float             | `float int bool`   |
    | tensor of one element                                             | detached, 0-d     | `tensor`           |
    | the same with `requires_grad`                                     | detached, 0-d     | `tensor-grad`      |
    | the same with nodes of several steps in its graph, see `_graphs` | detached, 0-d     | `tensor-graphs`    |
    | `(value, weight)`, a tuple of two scalars; no weight has a gradient | that of the first | `pair`             |
    | list or tuple of scalars, e.g. one per batch                      | None              | `list`             |
    | None; text                                                        | None              | `none`; `str`      |
    | a tensor or array of another size, complex, sparse, on meta; any other object | None  | `other`            |

    Args:
        metrics: a mapping with string keys, nested at will, or a tuple `(loss, stats, weight)` as ESPnet and FunASR
            return it. Its loss, which has a gradient by design and counts as `tensor`, is called `loss` unless the
            stats have one, its weight `weight` likewise.

    Returns:
        The entries in the order given. Tensors stay where they are. About 0.3 us per number, 1 us per tensor.

    Raises:
        TypeError: not a mapping and not such a tuple, or a key that is not a string.

    Examples:
        >>> [tuple(metric) for metric in normalise({"loss": 2, "acc": {"top1": None}})]
        [('loss', 2.0, 'int'), ('acc/top1', None, 'none')]
    """
    if isinstance(metrics, Mapping):
        return list(_flatten(metrics, ""))
    if isinstance(metrics, tuple) and len(metrics) == 3 and isinstance(metrics[1], Mapping):
        loss, stats, weight = metrics
        flat = list(_flatten(stats, ""))
        names = {metric.name for metric in flat}
        value, kind = _scalar(loss)
        first = Metric("loss", value, "tensor" if kind == "tensor-grad" else kind)
        last = Metric("weight", *_scalar(weight))
        return ([first] if "loss" not in names else []) + flat + ([last] if "weight" not in names else [])
    raise TypeError(
        f"Metrics must be a dictionary of numbers or a tuple (loss, stats, weight), got {_describe(metrics)}. "
        "Give each number a name, e.g. {'loss': loss}."
    )


def _flatten(metrics: Mapping[Any, object], prefix: str) -> Iterator[Metric]:
    for key, given in metrics.items():
        if not isinstance(key, str):
            where = f" in {prefix[:-1]!r}" if prefix else ""
            raise TypeError(f"Names of metrics must be strings, got {key!r} ({type(key).__name__}){where}.")
        if isinstance(given, Mapping):
            yield from _flatten(given, f"{prefix}{key}/")
        else:
            try:
                value, kind = _scalar(given)
            except Exception:  # an object of the user's own; the other entries are worth having
                value, kind = None, "other"
            yield Metric(prefix + key, value, kind)


_EXACT = {float: "float", int: "int", bool: "bool"}


def _scalar(given: object) -> tuple[float | Tensor | None, str]:
    kind = _EXACT.get(type(given))
    if kind is not None:
        return _number(given, kind)
    if given is None:
        return None, "none"
    if hasattr(given, "requires_grad"):
        return _tensor(given)
    if isinstance(given, str | bytes):
        return None, "str"
    if isinstance(given, numbers.Integral):
        return _number(given, "int")
    if isinstance(given, numbers.Real):
        return _number(given, "float")
    if isinstance(given, list | tuple):
        return _sequence(given)
    if hasattr(given, "dtype"):
        return _array(given)
    return None, "other"


def _number(given: Any, kind: str) -> tuple[float | None, str]:
    try:
        return float(given), kind
    except OverflowError:
        return None, "other"


def _tensor(given: Any) -> tuple[Tensor | None, str]:
    # Nested and other exotic tensors raise on the simplest questions; they are no scalars either way.
    try:
        if given.is_meta or given.is_nested or not _plain(given.dtype, given.layout):
            return None, "other"
        if given.dim() == 0:
            scalar = given
        elif given.numel() == 1:
            scalar = given.reshape(())
        else:
            return None, "other"
        if not given.requires_grad:
            return scalar, "tensor"
        return scalar.detach(), "tensor-graphs" if of_several_steps(given.grad_fn) else "tensor-grad"
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None, "other"


@lru_cache(maxsize=256)
def _plain(dtype: Any, layout: Any) -> bool:
    """Whether elements are real numbers, one after the other."""
    return not dtype.is_complex and not str(dtype).startswith("torch.q") and str(layout) == "torch.strided"


def _sequence(given: list[object] | tuple[object, ...]) -> tuple[float | Tensor | None, str]:
    # Lists may be long and are not looked into beyond their first entry: a list of anything else is no metric.
    if isinstance(given, tuple) and len(given) == 2:
        (value, kind), (weight, of_weight) = map(_scalar, given)
        if value is not None and weight is not None and of_weight not in {"tensor-grad", "tensor-graphs", "pair"}:
            return (value, "pair") if kind != "pair" else (None, "other")
        return None, "other"
    if given and _scalar(given[0])[1] in {"float", "int", "bool", "tensor", "tensor-grad", "tensor-graphs"}:
        return None, "list"
    return None, "list" if isinstance(given, list) and not given else "other"


def _array(given: Any) -> tuple[float | None, str]:
    kind = {"f": "float", "i": "int", "u": "int", "b": "bool"}.get(getattr(given.dtype, "kind", ""))
    if kind is None or getattr(given, "size", 1) != 1:
        return None, "other"
    return _number(given.reshape(()), kind)


def _describe(given: object) -> str:
    if isinstance(given, tuple | list):
        inside = ", ".join(type(item).__name__ for item in given[:4])
        return f"a {type(given).__name__} of {len(given)} ({inside}{', ...' if len(given) > 4 else ''})"
    return f"{given!r:.80}" if isinstance(given, str | int | float | None) else f"a {type(given).__name__}"


def unreadable(error: Exception, step: int, phase: str) -> Finding:
    """What to say of something given to `log` that is no dictionary of metrics."""
    said = str(error) if isinstance(error, TypeError) else f"The metrics cannot be read: {error!r}."
    return Finding("metric-type", "error", said, "Give log() a dictionary of names to numbers.", step, phase=phase)
