"""What is declared about one metric, and how a declaration is read from Python's own ways to declare types."""

from __future__ import annotations

import dataclasses
import types
import warnings
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from typing_extensions import NotRequired, Required, get_type_hints, is_typeddict

from stethoscope.watches import _metric_names as names


class Fault(NamedTuple):
    """Why a value breaks its declaration: the code of the finding and the rule in words."""

    code: str
    rule: str


@dataclass(frozen=True)
class Field:
    """What is declared about one metric.

    Args:
        type: `float`, `int`, `bool` or `torch.Tensor` (the code that reads it calls methods of a tensor), also with
            `| None`, also `Annotated[...]` with pydantic's constraints. pydantic decides what fits.
        required: whether it must be in every dictionary of its phases.
        nullable: whether it may be None; `| None` in `type` says the same.
        finite: whether NaN and infinities are wrong.
        ge: smallest legal value, in `unit`.
        gt: the value that it must be above.
        le: largest legal value.
        lt: the value that it must be below.
        unit: e.g. `"dB"`, for messages and documentation.
        phases: phases in which it is given; `"val"` is valid, dev, cv and eval as well; empty means every one.
        aliases: other names for the same metric.
        better: `"higher"` or `"lower"`.
        mean_of: name of the metric, logged once per batch, whose mean over an epoch this one claims to be.
        weight: name of the metric that holds the number of items of each batch, for `mean_of`.
        description: one line of documentation.
        tensor: whether it must be given as a tensor; `torch.Tensor` in `type` says the same.

    Raises:
        ValueError: not a type for numbers, or limits that contradict one another.

    Examples:
        >>> Field(float, ge=0.0, le=1.0).check(26.8)
        Fault(code='metric-range', rule='must be less than or equal to 1')
    """

    type: Any = float
    _: KW_ONLY
    required: bool = True
    nullable: bool = False
    finite: bool = True
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    unit: str = ""
    phases: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    better: Literal["", "higher", "lower"] = ""
    mean_of: str = ""
    weight: str = ""
    description: str = ""
    tensor: bool = False

    def __post_init__(self) -> None:
        number, nullable, tensor = _number(self.type)
        for name, value in (
            ("type", number),
            ("nullable", self.nullable or nullable),
            ("tensor", self.tensor or tensor),
        ):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "phases", tuple(names.phase(phase) for phase in _several(self.phases)))
        object.__setattr__(self, "aliases", _several(self.aliases))
        if self.better not in {"", "higher", "lower"}:
            raise ValueError(f"better={self.better!r} is unknown. Legal: 'higher', 'lower' or ''.")
        low = max((limit for limit in (self.ge, self.gt) if limit is not None), default=None)
        high = min((limit for limit in (self.le, self.lt) if limit is not None), default=None)
        if (
            low is not None
            and high is not None
            and (low > high or (low == high and (self.gt, self.lt) != (None, None)))
        ):
            raise ValueError(f"No number is within the limits ge={self.ge}, gt={self.gt}, le={self.le}, lt={self.lt}.")
        if self.schema.get("type") not in {"number", "integer", "boolean"}:
            raise ValueError(
                f"{self.type!r} is no type for a metric. Legal: float, int, bool, torch.Tensor, each also with | None "
                "or in Annotated."
            )

    @cached_property
    def _adapter(self) -> Any:
        from pydantic import Field as Limits
        from pydantic import TypeAdapter

        limits: dict[str, Any] = {
            name: getattr(self, name) for name in ("ge", "gt", "le", "lt") if getattr(self, name) is not None
        }
        if self.finite and _bare(self.type) is float:
            limits["allow_inf_nan"] = False
        constrained: Any = Annotated[self.type, Limits(**limits)]
        return TypeAdapter(constrained)

    @cached_property
    def schema(self) -> Mapping[str, Any]:
        """JSON schema of the value, with all limits, as pydantic writes it."""
        from pydantic import PydanticUserError
        from pydantic.errors import PydanticInvalidForJsonSchema

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what JSON cannot hold is refused by the caller
                return dict(self._adapter.json_schema())
        except (PydanticUserError, PydanticInvalidForJsonSchema, TypeError, AttributeError):  # of no type at all
            return {}

    @cached_property
    def _validate(self) -> Any:
        return self._adapter.validator.validate_python

    def check(self, value: float) -> Fault | None:
        """Return what is wrong with a number, None if nothing is."""
        try:
            self._validate(value)
        except _validation_error() as error:  # evaluated only when something was raised
            first = error.errors()[0]
            rule = first["msg"].removeprefix("Input should be ").removeprefix("a valid ")
            if first["type"] == "finite_number":
                return Fault("metric-nonfinite", "must be finite")
            if first["type"].startswith(("int", "bool", "float")):
                return Fault("metric-type", f"is declared as {_bare(self.type).__name__}")
            return Fault("metric-range", f"must be {rule}")
        return None

    def covers(self, phase: str) -> bool:
        """Whether the metric belongs into a phase."""
        return not self.phases or phase in self.phases


def read(declared: Any) -> dict[str, Field]:
    """Read a declaration of several metrics.

    Args:
        declared: a mapping of names to types or `Field`s, or a TypedDict, dataclass or pydantic model. A key that need
            not be there is `NotRequired`, or has a default.

    Raises:
        TypeError: none of these. ValueError: a type that is not one of a number.
    """
    if isinstance(declared, Mapping):
        return {_named(name): _field(name, given, required=True) for name, given in declared.items()}
    if is_typeddict(declared):
        hints = get_type_hints(declared, include_extras=True)
        return {name: _field(name, hint, required=name in declared.__required_keys__) for name, hint in hints.items()}
    if isinstance(declared, type) and dataclasses.is_dataclass(declared):
        hints = get_type_hints(declared, include_extras=True)
        return {
            field.name: _field(field.name, hints[field.name], required=_no_default(field))
            for field in dataclasses.fields(declared)
        }
    if isinstance(declared, type) and hasattr(declared, "model_fields"):
        return {name: _pydantic(name, info) for name, info in declared.model_fields.items()}
    raise TypeError(
        f"Cannot read metrics from {declared!r:.80}. Legal: a mapping of names to types or Field(...), a TypedDict, a "
        "dataclass or a pydantic model (the class, not an instance)."
    )


def _field(name: str, given: object, *, required: bool) -> Field:
    if isinstance(given, Field):
        return given
    if get_origin(given) in {Required, NotRequired}:
        (given,) = get_args(given)
    try:
        for extra in get_args(given)[1:] if get_origin(given) is Annotated else ():
            if isinstance(extra, Field):
                return dataclasses.replace(extra, type=get_args(given)[0], required=required and extra.required)
        return Field(given, required=required)
    except ValueError as error:
        raise ValueError(f"Metric {name!r}: {error}") from error


def _pydantic(name: str, info: Any) -> Field:
    annotation = Annotated[(info.annotation, *info.metadata)] if info.metadata else info.annotation
    found = _field(name, annotation, required=info.is_required())
    alias = (info.alias,) if isinstance(info.alias, str) else ()
    return dataclasses.replace(found, aliases=found.aliases + alias, description=info.description or found.description)


def _named(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"Names of metrics must be strings, got {name!r} ({type(name).__name__}).")
    return name


def _no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _several(given: str | tuple[str, ...]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _number(annotation: Any) -> tuple[Any, bool, bool]:
    """Return the annotation without None and with float in place of a tensor; whether there was a None, a tensor."""
    if get_origin(annotation) is Annotated:
        inner, *extras = get_args(annotation)
        number, nullable, tensor = _number(inner)
        return Annotated[(number, *extras)], nullable, tensor
    if get_origin(annotation) in {Union, types.UnionType}:
        members = [_number(member) for member in get_args(annotation) if member is not types.NoneType]
        numbers = {number for number, _, _ in members}
        # Where a number and a tensor are legal, nothing is known about tensors.
        return (
            float if numbers == {float, int} else Union[tuple(numbers)],  # noqa: UP007 - members known at run time only
            len(members) < len(get_args(annotation)) or any(nullable for _, nullable, _ in members),
            all(tensor for _, _, tensor in members),
        )
    if getattr(annotation, "__name__", "") == "Tensor":
        return float, False, True
    if getattr(annotation, "__module__", "") == "numpy":
        return float, False, False
    return annotation, False, False


def _validation_error() -> type[Any]:
    from pydantic import ValidationError

    return ValidationError


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
