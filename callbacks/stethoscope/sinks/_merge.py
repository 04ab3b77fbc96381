"""What the ranks of one run have written, read as one run."""

from __future__ import annotations

from heapq import merge
from itertools import groupby
from typing import TYPE_CHECKING, TypeAlias

from stethoscope import _combine
from stethoscope._record import Finding, Histogram, Record
from stethoscope.sinks._lines import Delivery

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from stethoscope._protocols import Run

_Told: TypeAlias = "tuple[int, Delivery]"
"""A rank, and what it has delivered."""


def of_one_run(runs: Mapping[int, Run]) -> list[int]:
    """Return the ranks whose files belong to the same run: a folder may hold those of an earlier, larger one.

    Args:
        runs: rank -> the last run in its file; not empty.
    """
    first = runs[min(runs)]
    same = [rank for rank, run in runs.items() if run.id == first.id]
    # without a process group the ranks do not know of each other's names
    return sorted(same if len(same) > 1 else (rank for rank in runs if rank < first.world_size))


def together(streams: Mapping[int, Iterable[Delivery]], run: Run) -> Iterator[Delivery]:
    """Combine deliveries that belong together, step by step, holding one step of all ranks at a time.

    Args:
        streams: rank -> its deliveries, in order of steps.
        run: facts about the run, of any rank.
    """
    tagged = [_tagged(rank, stream, streams.keys() - {rank}) for rank, stream in streams.items()]
    for step, told in groupby(merge(*tagged, key=_step), key=_step):
        groups: dict[tuple[str, bool, int], list[_Told]] = {}
        seen: dict[tuple[int, str, bool], int] = {}
        for rank, delivery in told:
            head = delivery.records[0] if delivery.records else Record("", None, step)
            place = rank, head.phase, head.source == "log"
            seen[place] = seen.get(place, -1) + 1
            groups.setdefault((*place[1:], seen[place]), []).append((rank, delivery))
        for several in groups.values():
            yield Delivery(step, tuple(_records(several, run)), tuple(_findings(several)))


def _tagged(rank: int, stream: Iterable[Delivery], others: AbstractSet[int]) -> Iterator[_Told]:
    for delivery in stream:
        # what another rank has passed on to this one is in its own file as well
        own = tuple(finding for finding in delivery.findings if finding.rank not in others)
        if delivery.records or own:
            yield rank, delivery._replace(findings=own)


def _step(told: _Told) -> int:
    return told[1].step


def _findings(several: Sequence[_Told]) -> list[Finding]:
    found = [finding for _, delivery in several for finding in delivery.findings]
    return sorted(found, key=lambda finding: (-1 if finding.step is None else finding.step, finding.rank))


def _records(several: Sequence[_Told], run: Run) -> list[Record]:
    alike: dict[tuple[object, ...], list[Record]] = {}
    for _, delivery in several:
        for record in delivery.records:
            edges = record.value.edges if isinstance(record.value, Histogram) else None
            key: tuple[object, ...] = (record.name, record.module, record.call, record.phase, record.source, edges)
            alike.setdefault(key if _combine.operation(record) else (*key, record.rank), []).append(record)
    out: list[Record] = []
    for records in alike.values():
        out += _as_one(records, run)
    return _combine.with_ratios(out)


def _as_one(records: Sequence[Record], run: Run) -> list[Record]:
    first, part = records[0], _combine.is_part(records[0])
    if (part and len(records) < run.world_size and not _combine.is_lone(first)) or not _combine.operation(first):
        return list(records)  # a whole that lacks a part would be wrong
    total = _combine.add_up([_combine.terms(record) for record in records])
    parts = run.shards.get(first.module, run.shards.get("", 1))
    return [_combine.combined(first, total, run.world_size if part else len(records), parts)]
