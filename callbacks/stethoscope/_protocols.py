"""The seams: `Probe` and `Attachment` (read tensors), `Watch` (decides), `Diagnosis` (relates), `Sink` (writes).

Standard library only; torch appears in annotations alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from stethoscope._record import Finding, Record

State: TypeAlias = Any
"""A watch's memory: JSON, so that it can be saved, resumed and replayed."""


class Key(NamedTuple):
    """Names one tensor that an attachment hands over; becomes the fields of one `Record`.

    Args:
        name: see `Record.name`.
        module: see `Record.module`.
        call: see `Record.call`.
        edges: where set, the tensor holds the `len(edges) - 1` bin counts of a `Histogram`.
    """

    name: str
    module: str = ""
    call: int = 0
    edges: tuple[float, ...] | None = None


class Columns(NamedTuple):
    """Many keys over one tensor: `keys[i]` names `tensor[rows[i]]`. Saves one tiny tensor per number.

    With `sparse`, a zero is not worth a record: flags of healthy modules.
    """

    keys: Sequence[Key]
    tensor: Tensor
    rows: Sequence[int]
    sparse: bool = False


class Readings(Mapping[Key, "Tensor"]):
    """A mapping of keys to device tensors that stays packed until somebody asks for one of them."""

    __slots__ = ("columns",)

    def __init__(self, columns: Sequence[Columns]) -> None:
        self.columns = columns

    def __getitem__(self, key: Key) -> Tensor:
        for keys, tensor, rows, _ in self.columns:
            if key in keys:
                return tensor[rows[keys.index(key)]]
        raise KeyError(key)

    def __iter__(self) -> Iterator[Key]:
        for column in self.columns:
            yield from column.keys

    def __len__(self) -> int:
        return sum(len(column.keys) for column in self.columns)


@runtime_checkable
class Probe(Protocol):
    """A frozen specification of what to measure; its fields are its configuration. Called by the monitor, once."""

    @property
    def every(self) -> int | None:
        """Observe when `step % every == 0`; None takes the monitor's."""
        ...

    def attach(self, model: nn.Module) -> Attachment:
        """Put hooks on `model` (without wrappers) and return them, disarmed."""
        ...

    def covers(self, other: Probe) -> bool:
        """Whether everything that `other` records is recorded by this one, at the same steps or more often."""
        ...


@runtime_checkable
class Attachment(Protocol):
    """Live hooks and device buffers. Nothing in here waits for the device.

    An attachment may carry `notes: list[Finding]`, what it has to say about itself (a pattern that matched nothing, a
    tensor that it cannot read); the monitor takes them out after each `read`.
    """

    def arm(self, on: bool, phase: str) -> None:
        """Observe, or do not, what comes from now on, under `phase`. What another phase has gathered is kept apart."""
        ...

    def read(self, given: Mapping[str, Tensor]) -> Mapping[Key, Tensor]:
        """Hand over what was gathered in the armed phase since the last read, in call order, and start anew.

        `given` holds the tensors handed to `Monitor.observe` and `Monitor.step`.
        """
        ...

    def detach(self) -> None:
        """Remove every hook. May be called twice."""
        ...


@runtime_checkable
class Watch(Protocol):
    """A pure fold over records: no torch, no clock, no I/O. Called on the training's thread, once per step or log.

    With a true attribute `urgent` it does not wait for records that are to be combined over ranks: it sees this rank's own.
    """

    @property
    def needs(self) -> tuple[Probe, ...]:
        """Probes that must run for this watch to see anything."""
        ...

    def init(self) -> State:
        """The state before the first record, JSON."""
        ...

    def update(self, state: State, records: Sequence[Record]) -> tuple[State, Sequence[Finding]]:
        """Take in the records of one step or of one log call; return the new state and what was found."""
        ...


class Diagnosis(Protocol):
    """A pure fold over findings and their records: sets causes, adds findings that explain several, never deletes."""

    def init(self) -> State:
        """The state before the first finding, JSON."""
        ...

    def update(
        self, state: State, records: Sequence[Record], findings: Sequence[Finding]
    ) -> tuple[State, Sequence[Finding]]:
        """Take in what one step or log call brought; return the new state and the findings to deliver."""
        ...


@dataclass(frozen=True)
class Run:
    """Facts about a run, given to every sink when it opens.

    Args:
        id: unique name of this run, kept when it is resumed.
        started: wall clock at the start, ISO 8601, UTC.
        modules: `(name, type)` of every module, in `named_modules()` order.
        planned_steps: optimizer steps that the run is to make; None where unknown.
        every: the monitor's `every`, in steps.
        versions: package name to version.
        rank: this process's rank.
        world_size: number of processes.
        resumed_from: step after which a resumed run goes on; None for a fresh run.
        shards: into how many different parts the model's parameters are split over ranks: `""` for most of them, names
            for those that differ; empty where none is.
    """

    id: str
    started: str
    modules: tuple[tuple[str, str], ...] = ()
    planned_steps: int | None = None
    every: int = 50
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    rank: int = 0
    world_size: int = 1
    resumed_from: int | None = None
    shards: Mapping[str, int] = field(default_factory=dict[str, int])


@runtime_checkable
class Sink(Protocol):
    """Writes records and findings somewhere.

    A sink may carry a true attribute `background`: it is then opened and written from one thread of its own, which the
    training never waits for. Without it, all happens on the training's thread.
    A sink may have a `folder: Path | None`, where further files of the run belong: incidents are written there.
    A sink that holds back what it is given may have a method `flush()`, called by `Monitor.flush` and `state_dict`, after `write`, on the same
    thread: a resumed run misses nothing from before its checkpoint then.
    """

    def open(self, run: Run) -> None:
        """Called once, before the first write."""
        ...

    def write(self, step: int, records: Sequence[Record], findings: Sequence[Finding]) -> None:
        """Take what one step or one log call brought. Steps never go backwards within one phase."""
        ...

    def close(self) -> None:
        """Write out everything. May be called twice."""
        ...
