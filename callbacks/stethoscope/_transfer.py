"""The way from the device to the host: the only file that may wait for the device.

Tensors are packed into one buffer per device and dtype class (float32, float64, int64) and copied without blocking; the
numbers are picked up when they have arrived, a step or more later on an accelerator, at once on the CPU. What is handed
over is always a fresh copy, since CPU tensors alias.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from stethoscope._protocols import Columns, Key, Readings
from stethoscope._record import Histogram, Record

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_new = tuple.__new__
"""Makes a record of a tuple in half the time of `Record(...)`; there are thousands in a step of a deep model."""

NOT_SENT = "A tensor among the readings (sparse, nested or on meta) has no numbers to send and is left out;"

MAX_PENDING = 64
"""Deliveries under way; with more, the oldest is waited for, so that memory stays bounded."""


class Part(NamedTuple):
    """Readings of one origin, with the fields that all their records share."""

    readings: Mapping[Key, Tensor]
    stamp: Record


class _Packet(NamedTuple):
    ready: Sequence[Record]
    columns: Sequence[tuple[Columns, Record, torch.dtype, int]]  # with dtype class and offset in its buffer
    buffers: Mapping[tuple[torch.device, torch.dtype], Tensor]
    arrivals: Sequence[torch.cuda.Event]


def fetch(numbers: Sequence[Tensor]) -> list[float]:
    """Wait for the device and return numbers at once: for decisions that cannot be put off.

    Args:
        numbers: tensors without dimensions, on any devices.
    """
    place = numbers[0].device
    real = torch.float32
    return torch.stack(
        [each if each.dtype is real and each.device == place else each.to(place, real) for each in numbers]
    ).tolist()


class Transfer:
    """Deliveries on their way to the host, first in, first out."""

    def __init__(self) -> None:
        self._pending: deque[_Packet] = deque()

    def send(self, ready: Sequence[Record], parts: Sequence[Part]) -> None:
        """Start one delivery.

        Args:
            ready: records that the host has already.
            parts: device tensors; each becomes a record with its part's stamp.
        """
        columns: list[tuple[Columns, Record, torch.dtype, int]] = []
        flat: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        placed: dict[int, tuple[torch.dtype, int]] = {}
        sizes: dict[tuple[torch.device, torch.dtype], int] = {}
        for readings, stamp in parts:
            for column in _columns(readings):
                tensor = column.tensor
                if id(tensor) not in placed:
                    place = tensor.device, _class_of(tensor.dtype)
                    placed[id(tensor)] = place[1], sizes.get(place, 0)
                    flat.setdefault(place, []).append(_flat(tensor, place[1]))
                    sizes[place] = sizes.get(place, 0) + tensor.numel()
                columns.append((column, stamp, *placed[id(tensor)]))
        buffers, arrivals = {}, list[torch.cuda.Event]()
        for place, pieces in flat.items():
            packed = torch.cat(pieces)
            if place[0].type == "cuda":
                host = torch.empty(packed.shape, dtype=packed.dtype, device="cpu", pin_memory=True)
                packed = host.copy_(packed, non_blocking=True)
                arrivals.append(torch.cuda.Event())  # type: ignore[no-untyped-call]
                arrivals[-1].record(torch.cuda.current_stream(place[0]))
            buffers[place] = packed
        self._pending.append(_Packet(ready, columns, buffers, arrivals))

    def receive(self, *, wait: bool = False) -> Iterator[tuple[list[Record], Exception | None]]:
        """Hand over the deliveries that have arrived, oldest first, with what went wrong in them, if anything did.

        Args:
            wait: wait for the device until all have arrived.
        """
        while self._pending:
            packet = self._pending[0]
            must = wait or len(self._pending) > MAX_PENDING
            if not must and not all(arrival.query() for arrival in packet.arrivals):  # type: ignore[no-untyped-call]
                return
            for arrival in packet.arrivals:
                arrival.synchronize()
            self._pending.popleft()
            yield _unpack(packet)


def can_be_sent(part: Part) -> bool:
    """Whether these readings can be packed; where several parts were sent and one cannot, the others still can."""
    try:
        Transfer().send((), [part])
    except Exception:
        return False
    return True


def _class_of(dtype: torch.dtype) -> torch.dtype:
    if dtype.is_floating_point:
        return torch.float64 if dtype is torch.float64 else torch.float32
    return torch.int64


def _flat(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # most are flat numbers without a graph already, and to ask costs less than three operations that do nothing
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dim() != 1:
        tensor = tensor.reshape(-1)
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _columns(readings: Mapping[Key, Tensor]) -> Sequence[Columns]:
    if isinstance(readings, Readings):
        return readings.columns
    return [
        Columns([key], (tensor.abs() if tensor.is_complex() else tensor).reshape(1, -1), [0])
        for key, tensor in readings.items()
    ]


def _unpack(packet: _Packet) -> tuple[list[Record], Exception | None]:
    records, failed = list(packet.ready), None
    arrays: dict[tuple[torch.device, torch.dtype], Any] = {}
    for column, stamp, dtype, offset in packet.columns:
        place = column.tensor.device, dtype
        try:
            if place not in arrays:
                arrays[place] = packet.buffers[place].cpu().numpy()
            records += _name(column, stamp, arrays[place][offset : offset + column.tensor.numel()])
        except Exception as error:  # the numbers of other probes are fine
            failed = error
    return records, failed


def _name(column: Columns, stamp: Record, flat: Any) -> list[Record]:
    """The records of one column, from its values on the host."""
    keys, tensor, rows, sparse = column
    if sparse and not flat.any():
        return []
    _, _, step, _, phase, _, rank, source, kind = stamp
    if tensor.dim() <= 1 or tensor[0].numel() == 1:
        numbers = flat.astype("float64", copy=False).tolist()
        return [
            _new(Record, (name, numbers[row], step, module, phase, call, rank, source, kind))
            for (name, module, call, _), row in zip(keys, rows, strict=True)
            if numbers[row] or not sparse
        ]
    counts = list(map(tuple, flat.reshape(len(tensor), -1).tolist()))
    records = []
    for key, row in zip(keys, rows, strict=True):
        assert key.edges is not None, f"{key} has several values and no edges"
        value = Histogram(key.edges, counts[row])
        records.append(Record(key.name, value, step, key.module, phase, key.call, rank, source, "histogram"))
    return records
