"""Runs an incident again, on the CPU, and says whether the same culprit is found."""

from __future__ import annotations

import importlib
import inspect
import json
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stethoscope._randomness import random_state
from stethoscope._record import Finding, Report
from stethoscope._run import versions
from stethoscope._tree import plain, unwrap
from stethoscope.audits._nonfinite_call import Call
from stethoscope.audits._nonfinite_repeat import repeat_batches, repeat_calls
from stethoscope.audits._pack import printable, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from stethoscope.audits._incident_file import KeptCall, KeptCulprit, KeptModel, Note
    from stethoscope.audits._nonfinite import NonFiniteReport


@dataclass(frozen=True, kw_only=True)
class ReplayReport(Report):
    """What `audits.replay` returns; `.ok` is `.reproduced`.

    Args:
        reproduced: whether the incident's culprit was found again.
        culprit: what `audits.nonfinite` says of this run; None where nothing could be run.
        differs: what is not as in the bundle, one line each.
        left_out: what the bundle does not hold.
    """

    reproduced: bool = False
    culprit: NonFiniteReport | None = None
    differs: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the incident's culprit was found again."""
        return self.reproduced


def replay(
    folder: str | Path,
    model: nn.Module | None = None,
    *,
    forward: str | Callable[..., Any] | None = None,
    step: Callable[..., Any] | None = None,
) -> ReplayReport:
    """Run an incident bundle again and compare the culprit: origin, module, operation, source line, parameter, samples.

    Weights, buffers, flags and random states become those of the bundle; then its calls are repeated under `audits.nonfinite`,
    forward, and backward with the gradients that their outputs were handed. A bundle may come from anybody: nothing of it is
    executed, no path of it is opened. Only without `model`, the class that it names is imported from what is installed or lies in
    the current folder, if it is a `torch.nn.Module` that needs no arguments.

    Args:
        folder: as written by the guard or by a report's `.save`.
        model: of the same structure, on the CPU; it is changed. Without: see above.
        forward: for calls of something else than modules: a method's name, or `fn(model, *args, **kwargs)`.
        step: for a fault in the loss: `fn(model, batch)` that returns the loss. A bundle without batch gives the call's arguments.

    Raises:
        ValueError: no bundle, or a damaged one; a model that does not fit; no model can be made.
        Exception: what the model raises, unless a non-finite value was born before.

    Examples:
        >>> from stethoscope.audits import nonfinite
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> with torch.no_grad():
        ...     _ = model[1].bias.fill_(float("inf"))
        >>> folder = nonfinite(model, torch.ones(3, 2)).save("runs/inf")
        >>> report = replay(folder, torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)))
        >>> report.reproduced, report.culprit.parameter
        (True, '1.bias')
    """
    from stethoscope.audits._incident_file import read

    folder, now = Path(folder), random_state()
    try:
        note, tensors = read(folder)
        made = unwrap(_rebuilt(note.model, folder) if model is None else model)
        missing = _restore(made, note, tensors)
        calls = [_call(made, each, tensors, forward, lenient=step is not None) for each in note.calls]
        found = _run(made, note, tensors, calls, step)
    finally:
        now.put()
    differs = _differences(note.culprit, found)
    reproduced = found is not None and found.origin is not None and not differs
    lines = [
        f"Step {note.step}, rank {note.rank}." if note.step is not None else "Outside of a training.",
        *(f"Not in the bundle: {printable(each)}." for each in note.left_out[:20]),
        *([f"Weights of the model given, not of the bundle: {missing}."] if missing else []),
        _verdict(note, found, differs, [call.spoilt for call in calls], stepped=step is not None),
    ]
    return ReplayReport(
        title=f"replay of {printable(str(folder))}",
        summary="\n".join(lines),
        findings=(*(found.findings if found else ()), *_finding(note, differs)),
        reproduced=reproduced,
        culprit=found,
        differs=tuple(differs),
        left_out=tuple(map(printable, note.left_out)),
    )


def _run(
    model: nn.Module, note: Note, tensors: Mapping[str, Tensor], calls: Sequence[Call], step: Callable[..., Any] | None
) -> NonFiniteReport | None:
    if step is None:
        return repeat_calls(model, calls)
    batches: list[tuple[tuple[Any, ...], dict[str, Any]]] = [((unpack(each, tensors),), {}) for each in note.batches]
    batches = batches or [(each.args, each.kwargs) for each in calls]
    return repeat_batches(model, partial(step, model), batches, calls)


def _rebuilt(kept: KeptModel, folder: Path) -> nn.Module:
    """Make a model of the class that the bundle names, from code that is this machine's own."""
    name = printable(kept.name)
    what = f"a {name}, defined in the script {printable(kept.script)}" if kept.script else f"a {name}"
    ask = f"Give a model (--model module:name of what makes one); it was {what}."
    if kept.script:
        ask += " Move the class to a file that can be imported without training."
    path, _, inner = kept.class_.partition(":")
    if not all(part.isidentifier() for part in f"{path}.{inner}".split(".")):
        raise ValueError(f"The bundle does not say where its model can be imported from. {ask}")
    here = Path.cwd().resolve()
    if here.is_relative_to(folder.resolve()):
        raise ValueError(f"Not from inside of the bundle, as code could be imported from it: change the folder. {ask}")
    sys.path.insert(0, str(here))  # as `python -m` does: the user's own code lies where they stand
    try:
        found: Any = importlib.import_module(path)
        for part in inner.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{printable(kept.class_)} cannot be imported here: {printable(str(error))}. {ask}") from error
    finally:
        sys.path.remove(str(here))
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise ValueError(f"{printable(kept.class_)} is no torch.nn.Module. {ask}")  # noqa: TRY004 - of the file
    needed = [
        each.name
        for each in inspect.signature(found).parameters.values()
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]
    if needed:
        given = json.dumps({each: kept.arguments.get(each, "...") for each in needed})
        command = (
            f"stethoscope replay {shlex.quote(str(folder))} --model {kept.class_} --arguments {shlex.quote(given)}"
        )
        raise ValueError(f"{name} needs arguments ({', '.join(needed)}). Give a model, in Python or by: {command}")
    return found()


def _restore(model: nn.Module, note: Note, tensors: Mapping[str, Tensor]) -> str:
    """Give the model the bundle's weights, buffers and flags; return which of its parameters the bundle lacks."""
    modules = {plain(name): module for name, module in model.named_modules()}
    parameters = {plain(name): each for name, each in model.named_parameters(remove_duplicate=False)}
    buffers = {plain(name): each for name, each in model.named_buffers(remove_duplicate=False)}
    kept = {name: unpack(node, tensors) for name, node in note.state.items()}
    kept = {name: each for name, each in kept.items() if isinstance(each, Tensor)}
    own = parameters | buffers
    wrong = [f"{printable(name)!r} is not in the model" for name in kept if name not in own]
    wrong += [
        f"{printable(name)!r} is {tuple(each.shape)} there and {tuple(own[name].shape)} here"
        for name, each in kept.items()
        if name in own and own[name].shape != each.shape
    ]
    missing = [name for name in parameters if name not in kept]
    if note.model.whole:
        wrong += [f"{name!r} is not in the bundle" for name in missing]
    if wrong:
        raise ValueError(f"{type(model).__name__} does not fit the incident: {_few(wrong)}.")
    for name, each in kept.items():
        if name in parameters:
            parameters[name].data = each.detach()
            parameters[name].requires_grad_(name not in note.model.frozen)
        else:
            owner, _, key = name.rpartition(".")
            modules[owner]._buffers[key] = each.detach()  # noqa: SLF001 - a buffer that is no part of the state as well
    for name, node in note.attributes.items():
        owner, _, key = name.rpartition(".")
        value = unpack(node, tensors)
        if isinstance(value, Tensor) and isinstance(vars(modules.get(owner, model)).get(key), Tensor):
            vars(modules[owner])[key] = value
    evaluating = set(note.model.evaluating)
    for name, module in modules.items():
        module.training = name not in evaluating
    return _few(missing) if missing else ""


def _call(
    model: nn.Module,
    kept: KeptCall,
    tensors: Mapping[str, Tensor],
    forward: str | Callable[..., Any] | None,
    *,
    lenient: bool,
) -> Call:
    from stethoscope.audits._incident_file import random_from

    modules = {plain(name): module for name, module in model.named_modules()}
    owner = modules.get(kept.module) if kept.module is not None else model
    if owner is None:
        raise ValueError(f"The model has no module {printable(str(kept.module))!r}, which the incident calls.")
    called: Any = owner
    if callable(forward):
        called = partial(forward, model)
    elif forward is not None:
        called = getattr(owner, forward)
    elif (kept.method or kept.module is None) and not lenient:
        what = f"the method {printable(kept.method)!r}" if kept.method else "a function"
        raise ValueError(f"The incident calls {what}, and a bundle chooses no code: say so with forward= (--forward).")
    args, kwargs = unpack(kept.args, tensors), unpack(kept.kwargs, tensors)
    slopes = unpack(kept.grad_outputs, tensors)
    if not isinstance(args, tuple) or not isinstance(kwargs, dict) or not isinstance(slopes, dict):
        raise ValueError("The arguments of a call are damaged.")  # noqa: TRY004 - of the file
    autocast = tuple(("cpu", getattr(torch, dtype)) for _, dtype in kept.autocast)
    given = {path: each for path, each in slopes.items() if isinstance(each, Tensor)}
    return Call(called, args, kwargs, kept.grad, autocast, random_from(kept.random, tensors), given)


def _differences(kept: KeptCulprit | None, found: NonFiniteReport | None) -> list[str]:
    """Compare culprits; operations have other names on other devices, so one on the same line is the same."""
    if kept is None:
        return []
    if found is None or found.origin is None:
        return [f"the {printable(kept.origin)} in {_module(printable(kept.module))} there, nothing non-finite here"]
    pairs = {
        "origin": (kept.origin, found.origin),
        "module": (kept.module, found.module),
        "parameter": (kept.parameter, found.parameter),
        "samples": (kept.samples, list(found.samples)),
    }
    if _code(kept.source) != _code(found.source) or not found.source:
        pairs["operation"] = kept.operation, found.operation
        pairs["source"] = _code(kept.source), _code(found.source)
    return [
        f"{name}: {printable(str(there)) or 'none'} there, {here or 'none'} here"
        for name, (there, here) in pairs.items()
        if there != here
    ]


def _code(source: str) -> str:
    """Return a source line without its file, which lies elsewhere on another machine, and without its number."""
    return source.partition(" in ")[2]


def _verdict(
    note: Note, found: NonFiniteReport | None, differs: Sequence[str], spoilt: Sequence[bool], *, stepped: bool
) -> str:
    if found is not None and found.origin is not None:
        if differs:
            return "The replay differed: another culprit was found."
        return "The same culprit." if note.culprit else "The guard had found no culprit; this run has."
    if note.culprit is None and not note.calls and not stepped:
        return "The bundle holds no call of the model: give step= (--step module:function)."
    said = printable(note.findings[0].message) if note.findings else "nothing"
    if (note.culprit is not None and note.culprit.origin not in ("loss", "backward")) or stepped:
        return "The replay differed: all is finite here."
    where = (
        "what the loss hands back to the model is not finite" if any(spoilt) else "the calls of the model are finite"
    )
    return f"Here {where}. The incident said: {said} To repeat the loss, give step= (--step module:function)."


def _finding(note: Note, differs: Sequence[str]) -> list[Finding]:
    if not differs:
        return []
    other = [
        f"{name} {printable(there)} there, {here} here"
        for name, here in versions().items()
        if (there := note.versions.get(name, "?")) != here
    ]
    if note.device != "cpu":
        other.append(f"device {printable(note.device)} there, cpu here")
    return [
        Finding(
            "replay-differed",
            "warning",
            f"The replay differed. {'; '.join(differs)}.{f' Also: {_few(other)}.' if other else ''}",
            "What the bundle does not hold decides: code that has changed, another version or device, random numbers of another "
            "thread or of the data, what was left out. For a fault in the loss give the training step (--step).",
            note.step,
            evidence={"differs": list(differs), "environment": other},
        )
    ]


def _module(name: str) -> str:
    return repr(name) if name else "no module"


def _few(items: Sequence[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")
