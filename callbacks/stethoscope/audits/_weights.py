"""Reads tensors out of whatever people save them in, and never runs code that is stored in a file."""

from __future__ import annotations

import argparse
import json
import pathlib
import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from stethoscope._record import JSON

_CONFIGURATION = (
    *("hyper_parameters", "hparams", "model_args", "model_kwargs", "model_config", "config", "conf", "args"),
    *("train_conf", "infos"),
)
_LFS = b"version https://git-lfs.github.com/spec/"
_NOT_THE_MODEL = ("optim", "sched", "callbacks", "loops", "scaler", "rng")


class UnreadableError(ValueError):
    """A file that cannot be read as weights; `code` is the finding that it becomes, `advice` what to do."""

    def __init__(self, message: str, *, code: str, advice: str) -> None:
        super().__init__(message)
        self.code = code
        self.advice = advice


@dataclass(frozen=True)
class Weights:
    """What a file or a mapping holds.

    Args:
        label: where it comes from.
        groups: path inside the file (`"state_dict"`, `""` for the top) to its tensors; several where a file holds
            several networks. All on the host.
        facts: recorded configuration, dotted path to scalar.
        card: the record that `audits.describe` makes, empty where there is none.
    """

    label: str
    groups: Mapping[str, Mapping[str, Tensor]]
    facts: Mapping[str, JSON] = field(default_factory=dict[str, Any])
    card: Mapping[str, JSON] = field(default_factory=dict[str, Any])


def read(source: Mapping[str, Any] | str | pathlib.Path) -> Weights:
    """Read a state dict, a checkpoint dictionary, a file, or a folder of shards.

    Raises:
        TypeError: neither a mapping nor a path.
        FileNotFoundError: no such file or folder.
        UnreadableError: damaged, unknown, or a pickle that needs code.
    """
    if isinstance(source, Mapping):
        return _sort("state dict", source)
    if not isinstance(source, (str, pathlib.Path)):
        raise TypeError(f"A checkpoint is a state dict (a mapping) or a path, not {type(source).__name__}.")
    path = pathlib.Path(source)
    if not path.exists():
        raise FileNotFoundError(
            f"No checkpoint at '{path}'. Give a .pt, .pth, .ckpt, .bin or .safetensors file or a folder."
        )
    return _folder(path) if path.is_dir() else _file(path)


def _file(path: pathlib.Path) -> Weights:
    if path.stat().st_size == 0:
        raise _damaged(path, "the file is empty")
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise UnreadableError(
                f"'{path.name}' is a pointer of git-lfs: the weights themselves were not downloaded.",
                code="checkpoint-unreadable",
                advice="Run 'git lfs install' and 'git lfs pull' in its folder, or download the file itself.",
            )
    if path.suffix == ".safetensors":
        tensors, metadata = _safetensors(path)
        card = _card(_parsed(metadata.get("stethoscope", "")))
        facts = {key: _parsed(value) for key, value in metadata.items() if key != "stethoscope"}
        return Weights(path.name, {"": tensors}, facts, card)
    return _sort(path.name, _torch_load(path))


def _parsed(text: str) -> JSON:
    """Safetensors metadata is text only: `"8000"` means 8000."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _folder(path: pathlib.Path) -> Weights:
    """A Hugging Face folder: one file, or an index of shards, with `config.json` beside it."""
    index = next(iter(sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.bin.index.json"))), None)
    if index is not None:
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            files = [path / pathlib.PurePath(shard).name for shard in shards]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(index, f"the index cannot be read ({error})") from error
    else:
        names = ("model.safetensors", "pytorch_model.bin", "pytorch_model.safetensors", "model.pt", "model.pth")
        files = [path / name for name in names if (path / name).exists()][:1]
        files = files or sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
    if not files:
        raise UnreadableError(
            f"The folder '{path.name}' holds no weights: no index, no .safetensors, no .bin.",
            code="checkpoint-unreadable",
            advice="Give the file itself. Distributed checkpoints are first gathered with torch.distributed.checkpoint.format_utils.dcp_to_torch_save.",
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise _damaged(file, "the index names this shard, but it is not there")
        for group in _file(file).groups.values():
            tensors.update(group)
    config = path / "config.json"
    facts = flat(_parsed(config.read_text(encoding="utf-8", errors="replace"))) if config.is_file() else {}
    return Weights(path.name, {"": tensors}, facts)


def _safetensors(path: pathlib.Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in list(file.keys())}, dict(file.metadata() or {})
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, MemoryError) as error:
        raise _damaged(path, str(error)) from error


def _torch_load(path: pathlib.Path) -> object:
    """Plain data beside tensors is let through (names, paths, NumPy numbers); nothing else is ever built."""
    is_zip = zipfile.is_zipfile(path)
    if is_zip and _compressed(path):
        raise _damaged(path, "it is a compressed archive, whose size nobody knows; torch.save compresses nothing")
    try:
        with torch.serialization.safe_globals(_plain_types()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about storage classes of old files, nothing that a reader could change
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if wants := _asks_for(path):
            raise _refused(path, f"it asks for {', '.join(wants[:5])}") from error
        # torch's own text advises to read it with weights_only=False
        raise _damaged(path, "no file of torch.save, or one whose pickle is damaged") from error
    except Exception as error:  # a damaged pickle fails with whatever its bytes lead to
        if "torchscript" in str(error).lower():
            raise _refused(path, "it is a TorchScript archive, a program") from error
        raise _damaged(path, str(error)) from error


def _compressed(path: pathlib.Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(each.compress_type != zipfile.ZIP_STORED for each in archive.infolist())
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError):
        return False  # torch says what is wrong with it


def _plain_types() -> list[Any]:
    import numpy as np

    numbers = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "?")]
    scalar = np.float64(0).__reduce__()[0]
    # Asteroid stores `torch.__version__`, which is text of a class of its own
    names = [argparse.Namespace, pathlib.PosixPath, pathlib.PurePosixPath, type(torch.__version__)]
    return [*names, np.dtype, scalar, *numbers]


def _asks_for(path: pathlib.Path) -> list[str]:
    """What the pickle in a file would import, read off without running it."""
    found: list[str] = []
    if zipfile.is_zipfile(path):
        try:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except Exception:
            return found  # damaged inside: nothing can be said
    strings: list[str] = []
    # ends in raw numbers after the last pickle, or at once where there is none
    with suppress(Exception), path.open("rb") as file:
        while file.peek(1):  # old files of torch.save are several pickles in a row
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "GLOBAL":
                    found.append(str(argument).replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    found.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
    ours = ("torch.", "collections.OrderedDict")
    return sorted({name for name in found if not name.startswith(ours)} or set(found))


def _refused(path: pathlib.Path, reason: str) -> UnreadableError:
    return UnreadableError(
        f"'{path.name}' holds more than tensors and plain data: {reason}. Reading it would run code from the file, so it was not read.",
        code="checkpoint-refused",
        advice=(
            "Convert it where you trust its origin, with the code that wrote it at hand: "
            f"state = torch.load('{path.name}', weights_only=False); "
            "safetensors.torch.save_file(state['state_dict'], 'weights.safetensors')."
        ),
    )


def _damaged(path: pathlib.Path, reason: str) -> UnreadableError:
    return UnreadableError(
        f"'{path.name}' cannot be read: {_first_line(reason)}.",
        code="checkpoint-unreadable",
        advice="Compare its size and checksum with the original and copy it again; a run killed while saving leaves a truncated file.",
    )


def _first_line(text: str) -> str:
    lines = text.strip().splitlines() or ["no reason given"]
    return lines[0].strip().rstrip(".:")[:200]


def _sort(label: str, content: object) -> Weights:
    """Tell the networks in a checkpoint from its configuration and from what belongs to the optimizer."""
    if isinstance(content, Tensor) or not isinstance(content, Mapping):
        raise UnreadableError(
            f"{label} holds a {type(content).__name__}, not a dictionary of tensors.",
            code="checkpoint-unreadable",
            advice="Save model.state_dict(), or a dictionary with it under 'state_dict'.",
        )
    groups = dict(_groups(content, "", depth=3))
    if not groups:
        keys = ", ".join(repr(key) for key in list(content)[:5])
        raise UnreadableError(
            f"{label} holds no tensors (keys: {keys or 'none'}).",
            code="checkpoint-unreadable",
            advice="Save model.state_dict(), or a dictionary with it under 'state_dict'.",
        )
    facts = {
        f"{key}.{name}": value
        for key in _CONFIGURATION
        if key in content
        for name, value in flat(_as_mapping(content[key])).items()
    }
    return Weights(label, groups, facts, _card(content.get("stethoscope")))


def _card(value: object) -> Mapping[str, Any]:
    """The record of `audits.describe`; whatever else stands under its name is left alone."""
    held = value if isinstance(value, Mapping) else {}
    facts, modules = held.get("facts"), held.get("modules")
    card = {"facts": facts} if isinstance(facts, Mapping) else {}
    if isinstance(modules, Mapping) and all(isinstance(module, Mapping) for module in modules.values()):
        card["modules"] = modules
    return card


def _groups(content: Mapping[Any, Any], path: str, depth: int) -> list[tuple[str, Mapping[str, Tensor]]]:
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    nested = [(key, value) for key, value in content.items() if isinstance(key, str) and isinstance(value, Mapping)]
    found: list[tuple[str, Mapping[str, Tensor]]] = []
    if tensors and len(tensors) >= len(nested):
        found.append((path, tensors))
    if depth:
        for key, value in nested:
            if not any(word in key.lower() for word in _NOT_THE_MODEL):
                found += _groups(value, f"{path}.{key}" if path else key, depth - 1)
    return found


def _as_mapping(value: object) -> object:
    return vars(value) if isinstance(value, argparse.Namespace) else value


def flat(value: object, path: str = "", depth: int = 32) -> dict[str, JSON]:
    """Scalars by dotted path, not deeper than `depth`; short lists of scalars count as one."""
    if isinstance(value, Mapping) and not depth:
        return {}
    if isinstance(value, Mapping):
        return {
            name: scalar
            for key, nested in value.items()
            for name, scalar in flat(nested, f"{path}.{key}" if path else str(key), depth - 1).items()
        }
    if (
        isinstance(value, (list, tuple))
        and len(value) <= 8
        and all(isinstance(item, (int, float, str)) for item in value)
    ):
        return {path: list(value)} if path else {}
    return {path: value} if path and isinstance(value, (bool, int, float, str)) else {}
