"""Reads an incident bundle that anybody may have written: two files of fixed names, checked before anything is believed."""

from __future__ import annotations

import stat
from collections.abc import Mapping  # noqa: TC003 - pydantic reads the annotations
from pathlib import Path  # noqa: TC003 - pydantic reads the annotations
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from stethoscope._randomness import RandomState, random_state
from stethoscope.audits._incident import FORMAT, NOTE, TENSORS
from stethoscope.audits._pack import printable, unpack

if TYPE_CHECKING:
    from torch import Tensor

MAX_NOTE = 64 * 2**20
"""Of `incident.json`, in bytes; ours have some ten thousand."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class KeptPlace(_Strict):
    """A `Place`."""

    module: str = ""
    call_index: int = 0
    operation: str = ""
    source: str = ""


class KeptCulprit(_Strict):
    """What the audit had found."""

    origin: str
    module: str = ""
    call_index: int = 0
    operation: str = ""
    source: str = ""
    first_inf: KeptPlace | None = None
    first_nan: KeptPlace | None = None
    parameter: str | None = None
    samples: list[int] = []
    gradients: list[str] = []


class KeptFinding(_Strict):
    """A `Finding`."""

    code: str
    severity: Literal["info", "warning", "error"]
    message: str
    advice: str = ""
    step: int | None = None
    module: str = ""
    evidence: dict[str, Any] = {}


class KeptModel(_Strict):
    """How the model can be made again, and its flags."""

    class_: str = Field(alias="class")
    name: str = ""
    script: str = ""
    arguments: dict[str, bool | int | float | str] = {}
    evaluating: list[str] = []
    frozen: list[str] = []
    whole: bool = False


class KeptCall(_Strict):
    """One outermost call; nodes are those of `_pack`."""

    module: str | None
    method: str = ""
    args: dict[str, Any]
    kwargs: dict[str, Any]
    grad: bool
    autocast: list[tuple[Literal["cpu", "cuda"], Literal["float16", "bfloat16"]]] = Field(default=[], strict=False)
    random: dict[str, Any] | None = None
    grad_outputs: dict[str, Any]


class Note(_Strict):
    """All of `incident.json`."""

    format: int
    step: int | None = None
    rank: int = 0
    versions: dict[str, str] = {}
    device: str = "cpu"
    findings: list[KeptFinding]
    culprit: KeptCulprit | None = None
    loss: float | str | None = None
    model: KeptModel
    state: dict[str, dict[str, Any]]
    attributes: dict[str, dict[str, Any]] = {}
    calls: list[KeptCall]
    batches: list[dict[str, Any]] = []
    left_out: list[str] = []


def read(folder: Path) -> tuple[Note, dict[str, Tensor]]:
    """Return what the two files say.

    Raises:
        ValueError: not a bundle, or a damaged one.
        OSError: it cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder. Give an incident's, such as runs/today/incidents/step3.")
    _check(folder / NOTE, MAX_NOTE)
    _check(folder / TENSORS, None)
    try:
        note = Note.model_validate_json((folder / NOTE).read_bytes())
    except (ValidationError, RecursionError) as error:
        first = (
            error.errors(include_url=False)[0]
            if isinstance(error, ValidationError)
            else {"loc": (), "msg": "nested too deep"}
        )
        where = ".".join(map(str, first["loc"]))[:200]
        text = printable(f"{where + ': ' if where else ''}{first['msg']}")
        raise ValueError(f"{folder / NOTE} is damaged: {text}") from error
    if note.format != FORMAT:
        raise ValueError(
            f"{folder / NOTE} has format {note.format}; this version of stethoscope reads format {FORMAT}."
        )
    try:
        with safe_open(folder / TENSORS, framework="pt") as file:
            return note, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / TENSORS} is damaged: {printable(str(error))}") from error


def _check(path: Path, most: int | None) -> None:
    """Refuse what is no plain file in this very folder."""
    try:
        facts = path.lstat()
    except FileNotFoundError as error:
        raise ValueError(f"{path.parent} is no complete incident: {path.name} is missing.") from error
    if not stat.S_ISREG(facts.st_mode):
        raise ValueError(f"{path} must be a plain file, not a link, a folder or a device.")
    if most is not None and facts.st_size > most:
        raise ValueError(f"{path} has {facts.st_size} bytes, more than the {most} that a bundle's may have.")


def random_from(node: dict[str, Any] | None, tensors: Mapping[str, Tensor]) -> RandomState | None:
    """Return the random states of a call, those of the CPU.

    Raises:
        ValueError: they are none.
    """
    if node is None:
        return None
    held, now = unpack(node, tensors), random_state()
    try:
        version, python, gauss = held["python"]
        kind, keys, position, has_gauss, cached = held["numpy"]
        python = (version, tuple(python.tolist()), gauss)
        state = RandomState(python, (kind, keys, position, has_gauss, cached), held["torch"])
        sound = kind == "MT19937" and keys.shape == (624,) and 0 <= position <= 624  # NumPy does not look itself
        if sound:
            state.put()
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"The random states are damaged: {printable(str(error))}") from error
    finally:
        now.put()
    if not sound:
        raise ValueError("The random states are damaged: NumPy's is none of its Mersenne twister.")
    return state
