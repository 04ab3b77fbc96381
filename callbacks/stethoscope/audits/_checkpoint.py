"""Does a checkpoint fit a model, and does what it leaves out matter?"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parameter import is_lazy

from stethoscope._record import Finding, Report
from stethoscope.audits import _checkpoint_words, _keys, _tensors, _weights
from stethoscope.audits._describe import Difference, describe, differing_facts, differing_modules, last_name, of_model
from stethoscope.audits._effect import Effect, effect

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from stethoscope._record import JSON


@dataclass(frozen=True, kw_only=True)
class CheckpointReport(Report):
    """What `load_state_dict(strict=False)` would do with the checkpoint as it is, and what can be done better.

    Args:
        loaded: model keys that the file fills, in the model's order; a tied tensor counts when one of its names is there.
        missing: model keys that the file does not have.
        unexpected: file keys that the model does not have.
        mismatched: keys on both sides to (shape in the file, shape in the model).
        loaded_fraction: elements of parameters and persistent buffers that the file fills, of all, in [0, 1]; a tensor
            with several names counts once.
        suggested_prefix: text to strip from the file's keys so that they fit, e.g. `"module."`; `""` for none.
        suggested_addition: text to put in front of the file's keys so that they fit; `""` for none.
        fraction_with_prefix: `loaded_fraction` after that renaming, which is what `load` reaches.
        by_module: direct child of the model to (elements filled, all elements), without renaming.
        effect: what the loaded and the missing tensors do to the output; None without an example.
        differences: configuration facts that differ.
    """

    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict[str, Any])
    loaded_fraction: float = 0.0
    suggested_prefix: str = ""
    suggested_addition: str = ""
    fraction_with_prefix: float = 0.0
    by_module: Mapping[str, tuple[int, int]] = field(default_factory=dict[str, Any])
    effect: Effect | None = None
    differences: tuple[Difference, ...] = ()
    _model: nn.Module | None = field(default=None, repr=False, compare=False)
    _fitting: Mapping[str, Tensor] = field(default_factory=dict[str, Any], repr=False, compare=False)

    def load(self) -> tuple[str, ...]:
        """Load what fits into the audited model, prefix applied; shapes that differ are left out.

        Returns:
            The model keys that were filled.

        Raises:
            RuntimeError: the file could not be read, nothing in it fits, or the model is quantised.
        """
        if self._model is None or not self._fitting:
            raise RuntimeError(f"Nothing to load: no tensor of the checkpoint fits the model.\n{self}")
        if _packed(self._model):
            raise RuntimeError(
                "A quantised model packs its weights: only model.load_state_dict with all keys loads it."
            )
        state = self._model.state_dict(keep_vars=True)
        on_meta = any(isinstance(tensor, torch.Tensor) and tensor.is_meta for tensor in state.values())
        self._model.load_state_dict(dict(self._fitting), strict=False, assign=on_meta)
        if on_meta:
            _tie_again(self._model, state)
        return tuple(self._fitting)


def checkpoint(
    model: nn.Module | None,
    source: Mapping[str, Any] | str | Path,
    *,
    example: Any = None,
    config: Mapping[str, JSON] | None = None,
    partial: Sequence[str] = (),
) -> CheckpointReport:
    """Examine a checkpoint before it is loaded: what fits, what is missing, and whether that matters.

    **Reads** state dicts, `.pt .pth .ckpt .bin` (zip and legacy), `.safetensors`, folders with an index of shards, and
    checkpoints of Lightning, Asteroid and the like, where the network sits under a key. Never runs code from a file: one
    that needs it becomes the finding `checkpoint-refused`, a damaged one `checkpoint-unreadable`.
    **Changes nothing:** the model is only written by `report.load()`. With an example, copies of the model run in eval
    mode and the state of the random generators is restored.
    **Cost:** one pass over the tensors, host. Measured on one core: 0.1 s per 100 million parameters in memory or cache. An example adds a copy
    of the model and three forward passes.

    Args:
        model: the model that is to receive the weights, on any device, meta included. None examines the file alone.
        source: state dict, checkpoint dictionary, file or folder.
        example: an input (tensor, tuple of positional or dict of keyword arguments) on the model's device. Missing
            tensors that do not reach its output are then reported as info.
        config: facts about the model at hand, nested or not, to compare with those of the same last name in the
            checkpoint, e.g. `{"sample_rate": 8000}`. What the model says about itself (attributes, `hparams`, `config`)
            is compared anyway.
        partial: modules or patterns (`"head"`, `"*.lora_*"`) that are left out on purpose, in the model or in the
            file, as in fine-tuning with a new head.

    Returns:
        The report; `.loaded_fraction`, `.missing` and so on describe the file as it is, `.load()` applies the prefix.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: `source` is neither a mapping nor a path.
        ValueError: the model has lazy parameters that no batch has given a shape yet.

    Examples:
        >>> from torch import nn
        >>> model = nn.Linear(2, 2)
        >>> report = checkpoint(model, {f"module.{key}": value for key, value in model.state_dict().items()})
        >>> report.loaded_fraction, report.suggested_prefix
        (0.0, 'module.')
        >>> report.load()
        ('weight', 'bias')
    """
    try:
        weights = _weights.read(source)
    except _weights.UnreadableError as error:
        return CheckpointReport(
            title="checkpoint",
            findings=(Finding(code=error.code, severity="error", message=str(error), advice=error.advice),),
        )
    if model is None:
        return _alone(weights)
    state = {key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    lazy = [key for key, value in state.items() if is_lazy(value)]
    if lazy:
        raise ValueError(
            f"The model has lazy parameters without a shape: {_checkpoint_words.listed(lazy)}. Run one batch through it first."
        )
    ours = {key: tuple(value.shape) for key, value in state.items()}
    tensors, match = _best_group(weights, ours)
    theirs = {key: tuple(value.shape) for key, value in tensors.items()}
    ties = _keys.tied(state)

    asis = _with_ties(_keys.plain(ours, theirs).pairs, ties)
    pairs = _with_ties(match.pairs, ties)
    fitting = {key: tensors[pairs[key]] for key in ours if key in pairs}
    left_out = tuple(key for key in ours if key not in pairs and not _keys.declared(key, partial))
    example_effect = None
    runs = not _packed(model) and not any(tensor.is_meta for tensor in state.values())
    if example is not None and fitting and runs:
        example_effect = effect(model, fitting, left_out, example)

    recorded = {**weights.facts, **weights.card.get("facts", {})}
    config = _weights.flat(config or {})
    stated, known = {last_name(path) for path in config}, {last_name(path) for path in recorded}
    given = differing_facts(recorded, config, given=True)
    own = [item for item in differing_facts(recorded, of_model(model), given=False) if item.where not in stated]
    modules = (
        differing_modules(weights.card["modules"], describe(model)["modules"]) if "modules" in weights.card else []
    )

    report = CheckpointReport(
        title=f"checkpoint {weights.label}",
        loaded=tuple(key for key in ours if key in asis),
        missing=tuple(key for key in ours if key not in asis and key not in theirs),
        unexpected=tuple(key for key in theirs if key not in ours),
        mismatched={key: (theirs[key], ours[key]) for key in ours if key in theirs and key not in asis},
        loaded_fraction=_share(asis, ours, ties),
        suggested_prefix=match.strip,
        suggested_addition=match.add,
        fraction_with_prefix=_share(pairs, ours, ties),
        by_module=_by_module(asis, ours, ties),
        effect=example_effect,
        differences=(*given, *own, *modules),
        _model=model,
        _fitting=fitting,
    )
    findings = [
        *_checkpoint_words.renaming(report, len(ours)),
        *_checkpoint_words.gaps(report, pairs, ours, theirs, state, partial),
        *_tensors.broken(tensors, {file: state[key] for key, file in pairs.items()}),
        *_checkpoint_words.configuration(report, certain=bool(given or modules)),
    ]
    return _finished(report, findings, ours, sorted(stated - known))


def _alone(weights: _weights.Weights) -> CheckpointReport:
    """What can be said without a model: damage, and what is in there."""
    tensors = {
        f"{path}.{key}" if path else key: value
        for path, group in weights.groups.items()
        for key, value in group.items()
    }
    elements = sum(value.numel() for value in tensors.values())
    facts = {**weights.facts, **weights.card.get("facts", {})}
    lines = [
        f"{len(tensors)} tensors, {elements:,} elements, in {', '.join(path or 'the top level' for path in weights.groups)}"
    ]
    lines += [f"{name}: {value}" for name, value in list(facts.items())[:20]]
    return CheckpointReport(
        title=f"checkpoint {weights.label}",
        summary="\n".join(lines),
        findings=tuple(_tensors.broken(tensors, {})),
        unexpected=tuple(tensors),
    )


def _best_group(weights: _weights.Weights, ours: _keys.Shapes) -> tuple[Mapping[str, Tensor], _keys.Match]:
    """Of several networks in one file (weights and their average, generator and discriminator) the one that fits best."""
    normed = any(key.endswith(".original0") for key in ours)  # weight norm: torch renames old files when it loads them
    groups = [
        {_keys.modern(key): value for key, value in group.items()} if normed else group
        for group in weights.groups.values()
    ]
    found = [(group, _keys.best(ours, {key: tuple(value.shape) for key, value in group.items()})) for group in groups]
    return max(found, key=lambda item: sum(_keys.elements(ours[key]) for key in item[1].pairs))


def _packed(model: nn.Module) -> bool:
    """Whether quantised modules are in there, whose state is more than tensors and cannot be loaded in parts."""
    return any("_packed_params" in key for key in model.state_dict())


def _tie_again(model: nn.Module, before: Mapping[str, Any]) -> None:
    """Assignment gives each name a tensor of its own; names that shared one share one again."""
    tensors = {key: value for key, value in before.items() if isinstance(value, torch.Tensor)}
    loaded = model.state_dict(keep_vars=True)
    for key, names in _keys.tied(tensors).items():
        path, _, name = key.rpartition(".")
        if key != names[0]:
            setattr(model.get_submodule(path), name, loaded[names[0]])


def _with_ties(pairs: Mapping[str, str], ties: Mapping[str, tuple[str, ...]]) -> dict[str, str]:
    """A tensor with two names in the model is filled through either of them."""
    return {
        key: next(pairs[name] for name in names if name in pairs)
        for key, names in ties.items()
        if any(name in pairs for name in names)
    }


def _share(filled: Mapping[str, str], ours: _keys.Shapes, ties: Mapping[str, tuple[str, ...]]) -> float:
    once = [key for key in ours if ties[key][0] == key]
    total = sum(_keys.elements(ours[key]) for key in once)
    return sum(_keys.elements(ours[key]) for key in once if key in filled) / total if total else 1.0


def _by_module(
    filled: Mapping[str, str], ours: _keys.Shapes, ties: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[int, int]]:
    counts: dict[str, tuple[int, int]] = {}
    for key, shape in ours.items():
        if ties[key][0] == key:
            child = key.partition(".")[0]
            done, total = counts.get(child, (0, 0))
            number = _keys.elements(shape)
            counts[child] = (done + number * (key in filled), total + number)
    return counts


def _finished(
    report: CheckpointReport, findings: Sequence[Finding], ours: _keys.Shapes, unknown: Sequence[str]
) -> CheckpointReport:
    missing, unexpected, mismatched = len(report.missing), len(report.unexpected), len(report.mismatched)
    filled = f"fills {len(report.loaded)} of {len(ours)} tensors, {report.loaded_fraction:.1%} of the elements"
    lines = [f"{filled}; missing {missing}, unexpected {unexpected}, mismatched {mismatched}"]
    gaps = {name: counts for name, counts in report.by_module.items() if counts[0] < counts[1]}
    lines += [f"{name}: {done:,} of {total:,} elements" for name, (done, total) in list(gaps.items())[:20]]
    lines += [f"not recorded in the checkpoint, so not compared: {', '.join(unknown)}"] if unknown else []
    return replace(report, summary="\n".join(lines), findings=tuple(findings))
