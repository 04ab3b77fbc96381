"""What a user's own loading code really wrote."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.nn.parameter import is_lazy

from stethoscope._record import Finding, Report
from stethoscope.audits import _keys

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LoadingReport(Report):
    """What changed while a model was loaded.

    Args:
        changed: parameters and buffers with another value than before.
        unchanged: those with the same value that could have shown a change; constants (a scale of ones, a bias of
            zeros) cannot and are in neither list.
        changed_fraction: elements of `changed`, of those of both lists, in [0, 1].
    """

    changed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    changed_fraction: float = 1.0


@dataclass
class Loading:
    """Holds the report once the block of `loading` is left."""

    report: LoadingReport = field(default_factory=lambda: LoadingReport(title="loading, not finished"))


@contextmanager
def loading(model: nn.Module, *, partial: Sequence[str] = ()) -> Iterator[Loading]:
    """Watch any loading code and say which parameters it did not reach.

    For loaders that hide what they do: `strict=False`, a filtered dictionary, a library's `from_pretrained`. Where the file is
    at hand, `audits.checkpoint` says more.

    **Decides:** a parameter that is not constant and is the same, bit for bit, after the block keeps its initial value:
    `checkpoint-unchanged` (warning); so does one that is still on the meta device or still without a shape.
    **Cost:** two passes over the tensors, no copy; waits for the device.

    Args:
        model: the model that is loaded inside of the block.
        partial: modules or patterns that keep their values on purpose.

    Yields:
        An object whose `.report` is set when the block is left without an exception.

    Examples:
        >>> from torch import nn
        >>> model = nn.Linear(2, 2)
        >>> with loading(model) as watched:
        ...     _ = model.load_state_dict({"module.weight": model.weight + 1}, strict=False)
        >>> watched.report.unchanged
        ('weight', 'bias')
    """
    before = _fingerprints(model)
    watched = Loading()
    yield watched
    after = _fingerprints(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    changed = tuple(key for key, value in after.items() if value != before.get(key))
    state = model.state_dict(keep_vars=True)
    empty = {key for key, value in after.items() if value is None and (state[key].is_meta or is_lazy(state[key]))}
    constant = {key for key, value in after.items() if (value is None and key not in empty) or (value and value[2])}
    unchanged = tuple(key for key in after if key not in changed and key not in constant and key in parameters)
    written, kept = (
        sum(state[key].numel() for key in keys if not is_lazy(state[key])) for keys in (changed, unchanged)
    )
    undeclared = [key for key in unchanged if not _keys.declared(key, partial)]
    watched.report = LoadingReport(
        title="loading",
        summary=f"{len(changed)} tensors changed, {len(unchanged)} parameters did not",
        findings=tuple(_unreached(undeclared, len(parameters))),
        changed=changed,
        unchanged=unchanged,
        changed_fraction=written / (written + kept) if written + kept else 1.0,
    )


def _unreached(keys: Sequence[str], number: int) -> list[Finding]:
    if not keys:
        return []
    shown = ", ".join(f"'{key}'" for key in keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
    return [
        Finding(
            "checkpoint-unchanged",
            "warning",
            f"{len(keys)} of {number} parameters have the value that they had before loading: {shown}.",
            "Compare the keys with audits.checkpoint(model, file); list what is left out on purpose in partial=.",
            module=keys[0].rpartition(".")[0],
            evidence={"keys": list(keys[:100])},
        )
    ]


def _fingerprints(model: nn.Module) -> dict[str, tuple[int, str, bool] | None]:
    """Hash, sum and constancy of every tensor; None where there are no values to look at."""
    state = model.state_dict(keep_vars=True)
    return {key: _fingerprint(value) for key, value in state.items() if isinstance(value, torch.Tensor)}


def _fingerprint(tensor: Tensor) -> tuple[int, str, bool] | None:
    if is_lazy(tensor) or tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided or not tensor.numel():
        return None
    tensor = tensor.detach()
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    tensor = tensor.float() if tensor.element_size() == 1 else tensor  # bool, int8, float8: few operations know them
    # the sum beside the hash: XOR is blind to equal pairs. As text, so that NaN equals itself.
    total = str(float(tensor.sum(dtype=torch.float64)))
    constant = bool((tensor == tensor.flatten()[0]).all())
    return int(torch.hash_tensor(tensor).view(torch.int64)), total, constant
