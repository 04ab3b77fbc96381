"""One bad step as a folder: what was found, and all that it takes to run it again on another machine.

Two files: `incident.json` (strict JSON) and `tensors.safetensors`. Never a pickle; no environment variables, no
arguments of the command line.
"""

from __future__ import annotations

import errno
import inspect
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stethoscope._record import strict
from stethoscope._run import versions
from stethoscope._secrets import redacted
from stethoscope._tree import plain, size_of
from stethoscope.audits._pack import Packer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stethoscope._randomness import RandomState
    from stethoscope._record import JSON, Finding
    from stethoscope.audits._nonfinite import NonFiniteReport
    from stethoscope.audits._nonfinite_call import Call

FORMAT = 1
"""Raised when an old reader could no longer understand a new bundle."""
MAX_BYTES = 256 * 2**20
"""Of all tensors of a bundle. What does not fit is left out, and listed: first all weights but those concerned."""
NOTE, TENSORS = "incident.json", "tensors.safetensors"


@dataclass(frozen=True)
class Incident:
    """What there is to keep.

    Args:
        model: without wrappers, in the state of the bad step.
        findings: what was concluded.
        report: of the audit, where it found a culprit.
        calls: the step's outermost calls.
        batches: what the loop was given, one per micro-batch.
        loss: as it was, if known.
        step, rank: None outside of a training.
        left_out: what is known to be missing already.
    """

    model: nn.Module
    findings: Sequence[Finding]
    report: NonFiniteReport | None
    calls: Sequence[Call]
    batches: Sequence[Any] = ()
    loss: float | None = None
    step: int | None = None
    rank: int = 0
    left_out: Sequence[str] = ()


def write(incident: Incident, folder: Path, max_bytes: int = MAX_BYTES) -> Path:
    """Write a bundle and return its folder: `folder`, or one with a number behind it where that exists.

    The folder appears when it is complete; a failed write leaves nothing behind.

    Raises:
        OSError: no space, no permission.
    """
    from safetensors.torch import save_file

    note, tensors = _describe(incident, max_bytes)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True, exist_ok=True)
    try:
        save_file(tensors, part / TENSORS)
        (part / NOTE).write_text(json.dumps(note, allow_nan=False, indent=1), encoding="utf-8")
        return _move(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _move(part: Path, folder: Path) -> Path:
    for number in count(1):
        place = folder if number == 1 else folder.with_name(f"{folder.name}.{number}")
        if not place.exists():
            try:
                return part.rename(place)
            except OSError as error:
                # another process was faster
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
    raise AssertionError


def _describe(incident: Incident, max_bytes: int) -> tuple[JSON, dict[str, Tensor]]:
    packer = Packer(max_bytes)
    packer.left_out += incident.left_out
    model = incident.model
    parameters = {plain(name): each for name, each in model.named_parameters(remove_duplicate=False)}
    concerned = _concerned(parameters, incident.report)
    random = [_random(packer, call.random, f"random.{i}") for i, call in enumerate(incident.calls)]
    state = {name: packer.pack(parameters[name], f"state.{name}") for name in concerned}
    for name, each in model.named_buffers(remove_duplicate=False):
        state[plain(name)] = packer.pack(each, f"state.{plain(name)}")
    attributes = {name: packer.pack(each, f"attribute.{name}") for name, each in _attributes(model)}
    calls = [
        _call(packer, model, call, f"calls.{i}", state_of)
        for i, (call, state_of) in enumerate(zip(incident.calls, random, strict=True))
    ]
    batches = [packer.pack(batch, f"batches.{i}") for i, batch in enumerate(incident.batches)]
    rest = {name: each for name, each in parameters.items() if name not in state}
    whole = packer.fits(sum(size_of(each) for each in rest.values()))
    if whole:
        state |= {name: packer.pack(each, f"state.{name}") for name, each in rest.items()}
    else:
        packer.left_out.append(
            f"{len(rest)} of {len(parameters)} parameters: only those of the module concerned are kept"
        )
    note = {
        "format": FORMAT,
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "step": incident.step,
        "rank": incident.rank,
        "versions": versions(),
        "device": next((each.device.type for each in parameters.values()), "cpu"),
        "findings": [strict(asdict(redacted(finding))) for finding in incident.findings],
        "culprit": _culprit(incident.report),
        "loss": strict(incident.loss),
        "model": {
            **_class(type(model)),
            "arguments": _arguments(model),
            "evaluating": [plain(name) for name, each in model.named_modules() if not each.training],
            "frozen": [name for name, each in parameters.items() if not each.requires_grad],
            "whole": whole and all(node["kind"] == "tensor" for node in state.values()),
        },
        "state": state,
        "attributes": attributes,
        "calls": calls,
        "batches": batches,
        "left_out": packer.left_out,
    }
    return note, packer.tensors


def _concerned(parameters: Mapping[str, Tensor], report: NonFiniteReport | None) -> list[str]:
    """Name the parameters to keep first: the guilty one, those of the guilty module, those whose gradient is bad."""
    if report is None:
        return []
    named = [name for name in parameters if name == report.parameter]
    named += [name for name in parameters if name.rpartition(".")[0] == report.module]
    named += [name for name in report.gradients if name in parameters]
    return list(dict.fromkeys(named))


def _attributes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that modules keep as plain attributes, such as averages."""
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor):
                yield f"{plain(name)}.{key}".lstrip("."), value


def _call(packer: Packer, model: nn.Module, call: Call, path: str, random: JSON) -> JSON:
    owner = getattr(call.module, "__self__", call.module)
    names = {id(module): plain(name) for name, module in reversed([*model.named_modules()])}
    return {
        "module": names.get(id(owner)),
        "method": "" if owner is call.module else getattr(call.module, "__name__", ""),
        "args": packer.pack(call.args, f"{path}.args"),
        "kwargs": packer.pack(call.kwargs, f"{path}.kwargs"),
        "grad": call.grad,
        "autocast": [[device, str(dtype).removeprefix("torch.")] for device, dtype in call.autocast],
        "random": random,
        "grad_outputs": packer.pack(dict(call.grad_outputs), f"{path}.grad_outputs"),
    }


def _random(packer: Packer, state: RandomState | None, path: str) -> JSON:
    if state is None:
        return None
    version, python, gauss = state.python
    held = {
        "python": [version, torch.tensor(python), gauss],
        "numpy": list(state.numpy),
        "torch": state.torch,
        "cuda": [each for _, each in state.cuda],
    }
    return packer.pack(held, path)


def _class(kind: type) -> dict[str, str]:
    """Say where a class can be imported from; a script is no module that one could import without running it."""
    if "<locals>" in kind.__qualname__:
        return {"class": "", "name": kind.__qualname__, "script": ""}
    file = getattr(sys.modules["__main__"], "__file__", None) if kind.__module__ == "__main__" else None
    where = "" if kind.__module__ == "__main__" else f"{kind.__module__}:{kind.__qualname__}"
    return {"class": where, "name": kind.__qualname__, "script": Path(file).name if file else ""}


def _arguments(model: nn.Module) -> JSON:
    """Return what the model was made with, as far as it keeps numbers by the names of its arguments: for a human to copy."""
    named = inspect.signature(type(model)).parameters
    hparams = vars(model).get("_hparams")  # of a LightningModule that saves them
    kept = {**vars(model), **(hparams if isinstance(hparams, Mapping) else {})}
    return {name: strict(kept[name]) for name in named if isinstance(kept.get(name), bool | int | float)}


def _culprit(report: NonFiniteReport | None) -> JSON:
    if report is None or report.origin is None:
        return None
    return strict(
        {
            "origin": report.origin,
            "module": report.module,
            "call_index": report.call_index,
            "operation": report.operation,
            "source": report.source,
            "first_inf": report.first_inf._asdict() if report.first_inf else None,
            "first_nan": report.first_nan._asdict() if report.first_nan else None,
            "parameter": report.parameter,
            "samples": report.samples,
            "gradients": report.gradients,
        }
    )
