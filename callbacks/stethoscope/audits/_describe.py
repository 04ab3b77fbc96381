"""Configuration facts: what tensors cannot tell (stride, activation, norm, sample rate), recorded and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from stethoscope.audits._keys import unwrapped

if TYPE_CHECKING:
    from torch import nn

    from stethoscope._record import JSON

# Regularisation while training, and bookkeeping: they change nothing that a trained model computes.
_NO_MATTER = {
    *("training", "p", "dropout", "drop_prob", "layerdrop", "momentum", "inplace", "gradient_checkpointing"),
    *("call_super_init", "dump_patches"),
}
# Recorded beside the architecture, and different on purpose when a model is trained further.
_OF_THE_TRAINING = (
    *("lr", "rate_schedule", "decay", "batch", "epoch", "optim", "sched", "seed", "warmup", "dropout", "patience"),
    *("path", "dir", "root", "file", "name", "worker", "gpu", "device", "precision", "steps", "clip", "version"),
    *("loss", "freeze", "log_", "strategy", "accumul", "checkpointing", "layerdrop", "mask_time", "mask_feature"),
    # of Hugging Face's: how it is run and which head sits on top
    *(
        "dtype",
        "cache",
        "implementation",
        "output_",
        "return_",
        "architectures",
        "token_id",
        "label",
        "task",
        "problem",
    ),
)


class Difference(NamedTuple):
    """One fact that differs: `where` is a fact's name or `module.attribute`."""

    where: str
    recorded: JSON
    actual: JSON


def describe(model: nn.Module, facts: Mapping[str, JSON] | None = None) -> dict[str, JSON]:
    """Describe a model beyond its tensors, to be saved beside them.

    `audits.checkpoint` compares the description with the model at hand, so that "same keys, same shapes, but another
    stride, activation or norm" is caught; `load_state_dict(strict=True)` cannot see that.

    **Returns:** a JSON dictionary: `modules` holds class, plain attributes (numbers, text, flags, names of functions)
    of every module, `facts` what you give. Wrappers (DDP, compile), regularisation such as dropout and attributes with a
    leading underscore are left out; give such a name to a counter that training moves.
    **Cost:** host only, no tensor is read.

    Args:
        model: any module.
        facts: what else a user of the weights must know, e.g. `{"sample_rate": 8000, "sources": ["speech", "noise"]}`.

    Examples:
        >>> from torch import nn
        >>> describe(nn.Conv1d(1, 4, 3, stride=2), {"sample_rate": 8000})["facts"]
        {'sample_rate': 8000}
        >>> # torch.save({"state_dict": model.state_dict(), "stethoscope": audits.describe(model)}, "model.pt")
    """
    modules = {
        unwrapped(f"{name}."): {"type": type(module).__name__, **_attributes(module)}
        for name, module in model.named_modules()
        if not _is_wrapper(module) and not _does_nothing(module)
    }
    return {"version": 1, "facts": dict(facts or {}), "modules": modules}


def of_model(model: nn.Module) -> dict[str, JSON]:
    """What the model at hand says about itself: attributes, Lightning's `hparams`, `config`, Asteroid's arguments."""
    facts = _attributes(model)
    for name in ("hparams", "config"):
        held = getattr(model, name, None)
        as_dict = getattr(held, "to_dict", None)
        plain = as_dict() if callable(as_dict) else held
        facts |= _scalars(plain) if isinstance(plain, Mapping) else {}
    arguments = getattr(model, "get_model_args", None)
    if callable(arguments):
        plain = arguments()
        facts |= _scalars(plain) if isinstance(plain, Mapping) else {}
    return facts


def differing_facts(recorded: Mapping[str, JSON], actual: Mapping[str, JSON], *, given: bool) -> list[Difference]:
    """Facts of the same last name that differ; those of the training count only when the user gave them.

    Where the checkpoint records a name several times (`encoder.width`, `decoder.width`), one that is equal suffices.
    """
    by_name: dict[str, list[JSON]] = {}
    for path, value in recorded.items():
        by_name.setdefault(last_name(path), []).append(value)
    return [
        Difference(path, values[0] if len(values) == 1 else values, value)
        for path, value in actual.items()
        if (values := by_name.get(last_name(path)))
        and not any(_same(each, value) for each in values)
        and (given or not any(word in path.lower() for word in _OF_THE_TRAINING))
    ]


def last_name(path: str) -> str:
    """`"sample_rate"` of `"train_conf.data.sample_rate"`."""
    return path.rpartition(".")[2]


def differing_modules(recorded: Mapping[str, Any], actual: Mapping[str, Any]) -> list[Difference]:
    """Modules that exist on both sides and differ in class or attribute, or exist on one side only."""
    found = []
    for name in [*recorded, *(name for name in actual if name not in recorded)]:
        old, new = recorded.get(name, {}), actual.get(name, {})
        if old.get("type") != new.get("type"):
            found.append(Difference(name.rstrip(".") or "model", old.get("type"), new.get("type")))
            continue
        found += [
            Difference(f"{name}{key}".removeprefix("."), old.get(key), new.get(key))
            for key in dict.fromkeys([*old, *new])
            if not _same(old.get(key), new.get(key))
        ]
    return found


def _same(recorded: JSON, actual: JSON) -> bool:
    listed = list(actual) if isinstance(actual, tuple) else actual
    return bool(recorded == listed or str(recorded) == str(listed))


def _is_wrapper(module: nn.Module) -> bool:
    return type(module).__name__ in {"DistributedDataParallel", "DataParallel", "OptimizedModule"}


def _does_nothing(module: nn.Module) -> bool:
    """When evaluated: dropout of all kinds, and what people put in its place for a rate of 0."""
    return not any(True for _ in module.children()) and (
        "Drop" in type(module).__name__ or type(module).__name__ == "Identity"
    )


def _attributes(module: nn.Module) -> dict[str, JSON]:
    return _scalars({key: value for key, value in vars(module).items() if not key.startswith("_")})


def _scalars(values: Mapping[str, Any]) -> dict[str, JSON]:
    plain = {str(key): _plain(value) for key, value in values.items() if str(key) not in _NO_MATTER}
    return {key: value for key, value in plain.items() if value is not None}


def _plain(value: object) -> JSON:
    if isinstance(value, (bool, int, float, str)):
        return value
    if (
        isinstance(value, (tuple, list))
        and len(value) <= 8
        and all(isinstance(item, (bool, int, float, str)) for item in value)
    ):
        return list(value)
    if isinstance(value, Callable) and not hasattr(value, "forward"):  # type: ignore[arg-type]  # mypy: abstract class
        return getattr(value, "__name__", None)
    return None
