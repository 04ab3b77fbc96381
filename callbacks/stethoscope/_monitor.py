"""The wiring: probes are armed and read, their numbers travel to the host, watches decide, sinks write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, autograd, nn
from torch._compile import _disable_dynamo  # what torch.optim uses, since torch.compiler.disable loads the compiler

from stethoscope._agreement import Agreement
from stethoscope._delivery import Delivery
from stethoscope._dropped import left_open, weakly, when_dropped
from stethoscope._flattened import flattened, is_flattened
from stethoscope._graphs import mark
from stethoscope._guard import Guard, check_guard
from stethoscope._incidents import Incidents
from stethoscope._metrics import normalise, unreadable
from stethoscope._overhead import parse
from stethoscope._parts import Notes, asked, check_finding, check_parts, check_steps, describe, goes_on
from stethoscope._probing import Probing, unused, with_needs
from stethoscope._protocols import Key, Probe, Sink, Watch
from stethoscope._ranks import Ranks
from stethoscope._record import JSON, Finding, Record, Report
from stethoscope._resuming import VERSION, backwards, check_state
from stethoscope._run import new_run
from stethoscope._scalars import by_path, numbers_of_step, plan, pretrained, several
from stethoscope._stalled import Heartbeat
from stethoscope._transfer import NOT_SENT, Part, Transfer, can_be_sent
from stethoscope._tree import unwrap
from stethoscope.sinks import resolve

if TYPE_CHECKING:
    from types import TracebackType

    from torch.optim import Optimizer
    from typing_extensions import Self


class Monitor:
    """Listens to one model while it trains: the plain-loop interface that all integrations use.

    Call `step` once per optimizer step, at its end. All else is optional. Nothing in here changes weights, gradients,
    outputs or random numbers; an exception inside of a probe, watch or sink becomes a finding and switches that part
    off. Works on the thread that created it. Dropped without `close`, it takes its hooks along.

    Args:
        model: any module, also inside of DDP, FSDP or `torch.compile` wrappers.
        optimizer: one or several, for the records of the learning rates.
        probes: what to measure, e.g. `[probes.Activations()]`.
        watches: what to decide; the probes that a watch needs are added unless a given one covers them.
        sinks: where to write. A sink, a path (`"runs/today"`, `"today.jsonl"`), a `SummaryWriter`, a W&B run, or
            anything with `log_metrics`. Without any, nothing is written, but findings still reach `logging`.
        every: observe a step when `step % every == 0`; a probe's own `every` goes before.
        planned_steps: optimizer steps that the run will make, where known.
        guard: look at the loss (from `observe(loss=loss)`) and at all gradients right before an optimizer writes, at the
            price of one wait for the device per step. If something is not finite, the step is run again to find the culprit;
            then `"raise"` leaves `optimizer.step()` by a `FindingsError`, and `"skip"` takes the gradients away. Weights, buffers
            and random states are then as before the step, and a sink's folder gets an incident bundle. Ranks that train one
            model decide alike. None never waits.
        replay: `fn(batch) -> loss`, for the guard to run a bad step again exactly, with the batches from `observe`; else the
            step's outermost calls of the model are repeated.
        on_finding: called with each finding, on this thread, after sinks have it. What it raises propagates out of
            `step`, `log`, `add` or `flush`: the way to stop a training.
        strict: raise what goes wrong inside of probes, watches and sinks (for tests).
        overhead: share of the training's time that observing may take, `"1%"` or `0.01`: all intervals are stretched alike
            until it holds, and never shorter than asked for. The share reached is recorded as `overhead/share`, and the interval as
            `overhead/every`. Where a probe is due at every step, one step in 16 goes unobserved, to be compared with.
        reduce: of a training on several ranks, combine the records of probes over all of them at observed steps; rank 0
            writes the result. None does so for what is split over ranks (FSDP2), so that norms are those of the whole;
            True for all records, so that a mean is the mean over all ranks; False for none. Never waits for other ranks.
            Not with `overhead`, which each rank keeps for itself. See docs/distributed.md.

    Raises:
        TypeError: a part that is none, such as a class in place of an object.
        ValueError: an argument out of range.

    Examples:
        >>> import torch
        >>> from stethoscope import watches
        >>> model = torch.nn.Linear(4, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with Monitor(model, optimizer, watches=[watches.NonFinite()]) as monitor:
        ...     for _ in range(3):
        ...         loss = model(torch.ones(8, 4)).square().mean()
        ...         optimizer.zero_grad()
        ...         loss.backward()
        ...         optimizer.step()
        ...         monitor.step(loss=loss)
        >>> monitor.findings
        []
    """

    @_disable_dynamo
    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        *,
        probes: Sequence[Probe] = (),
        watches: Sequence[Watch] = (),
        sinks: Sequence[Sink | Any] | Sink | str = (),
        every: int = 50,
        planned_steps: int | None = None,
        guard: Literal["raise", "skip"] | None = None,
        replay: Callable[[Any], Tensor] | None = None,
        on_finding: Callable[[Finding], object] | None = None,
        strict: bool = False,
        overhead: str | float | None = None,
        reduce: bool | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {describe(model)}.")
        check_steps(every, planned_steps)
        check_guard(guard, optimizer, replay)
        if reduce and overhead is not None:
            raise ValueError(f"reduce=True needs the same steps on all ranks; {overhead=} lets each find its own.")
        self.model = unwrap(model)
        self._planned_steps = planned_steps
        self._optimizers = several(optimizer)
        self._run = new_run(self.model, planned_steps, every)
        self._step = 0  # the step under way
        self._phase = "train"
        self._beginning: dict[Key, Tensor] | None = pretrained(self.model)  # until it was recorded
        self._given: dict[str, Tensor] = {}
        self._closed = False
        self._used = False  # whether anything was given to it
        self._notes = Notes(strict)
        self._transfer = Transfer()
        self._heartbeat = Heartbeat(self._notes.pending.append)
        self._ranks = Ranks(self._run, reduce if overhead is None else False, self._notes)
        chosen: list[Watch] = check_parts(watches, "update", "watches", "NonFinite")
        all_sinks = sinks if isinstance(sinks, Sequence) and not isinstance(sinks, str) else (sinks,)
        resolved = [resolve(sink) for sink in all_sinks]
        self._incidents = Incidents(resolved, self._run.rank)
        self._delivery = Delivery(chosen, [*resolved, *self._ranks.sinks()], on_finding, self._run.rank, self._notes)
        measured = with_needs(check_parts(probes, "attach", "probes", "Activations"), chosen, every)
        self._probing = Probing(self.model, measured, every, self._notes, parse(overhead))
        when_dropped(self, hooked := [self._probing.detach])
        left_open.add(self)
        self._probing.arm(self._step, self._phase)
        self._guard: Guard | None = None
        if guard:
            agreement = Agreement(model, self._run, weakly(self._meet))
            others = self._incidents.keep, self._notes, weakly(self._deliver), agreement
            self._guard = Guard(self.model, self._optimizers, guard, replay, *others)
            hooked.append(self._guard.detach)
        if is_flattened(model) and not self._run.rank:
            self._notes.pending.append(flattened())

    @property
    def findings(self) -> list[Finding]:
        """What was found and delivered so far; `flush` and `close` deliver everything."""
        return self._delivery.findings

    @property
    def planned_steps(self) -> int | None:
        """Optimizer steps that the run will make. To be set before the first step, where it becomes known late."""
        return self._planned_steps

    @planned_steps.setter
    def planned_steps(self, steps: int | None) -> None:
        if steps is not None and steps < 1:
            raise ValueError(f"planned_steps must be at least 1, or None where unknown, got {steps}.")
        self._planned_steps = steps
        self._run = replace(self._run, planned_steps=steps)

    # -- what the loop calls -----------------------------------------------------------------------------------------

    @_disable_dynamo
    @goes_on
    def observe(self, batch: object = None, **tensors: object) -> None:
        """Hand over tensors of the step under way before it ends; `step` adds to them.

        Args:
            batch: anything with tensors inside; probes see them as `batch`, `batch/0`, `batch/name`.
            **tensors: tensors or containers of tensors, by the names that probes ask for, e.g. `estimates=...`.
        """
        for name, value in (("batch", batch), *tensors.items()):
            try:
                self._given.update(by_path(name, value))
            except Exception as error:  # of a container of the user's own, which loads its items when asked, say
                self._notes.unreadable(name, error)
        if self._guard is not None:
            self._guard.observe(batch, tensors)

    @_disable_dynamo
    def step(self, batch: object = None, **tensors: object) -> None:
        """Close an optimizer step. The first call closes step 0.

        Args:
            batch: see `observe`.
            **tensors: see `observe`. Each tensor of one element and each number is recorded at every step, under its
                name: `loss=loss`. A `lr` given here goes before the optimizer's.

        Raises:
            RuntimeError: the monitor is closed.
            FindingsError: with `guard="raise"`, for a loss that is not finite in a step that `GradScaler` has skipped.
        """
        self._use()
        self.observe(batch, **{name: value for name, value in tensors.items() if not isinstance(value, Real)})
        step, ready, parts, error = self._step, list[Record](), list[Part](), None
        self._take_step(tensors, ready, parts)
        with self._notes.going_on(self._guard, "decision of the"):
            if self._guard is not None:
                error = self._guard.end_step(step)
                ready += self._guard.count(step, self._run.rank)
        self._given = {}
        self._step += 1
        self._notes.step = step
        mark(autograd)
        self._arm()
        self._deliver(ready, parts)
        with self._notes.going_on(self, "clock of the"):
            self._probing.lap(step)
            self._heartbeat.beat(step, self._planned_steps)
        if error is not None:
            raise error

    @goes_on
    def _take_step(self, named: Mapping[str, object], ready: list[Record], parts: list[Part]) -> None:
        """Add what there is to know of the step that ends; what is there when something fails is not lost."""
        stamp = Record("", None, self._step, rank=self._run.rank, source="step")
        numbers, scalars = numbers_of_step(named, self._given, self._optimizers, stamp)
        ready += numbers
        parts += [Part({name: value}, stamp._replace(kind="tensor")) for name, value in scalars.items()]
        if self._beginning is not None:
            ready += plan(self._planned_steps, self._optimizers, stamp)
            parts += [Part(self._beginning, stamp._replace(kind="tensor"))]
            self._beginning = None
        ready += [stamp._replace(name=name, value=value) for name, value in self._probing.overhead(self._step).items()]
        parts += self._probing.read(self._given, stamp._replace(source="probe"))

    @_disable_dynamo
    @goes_on
    def log(self, metrics: object, phase: str = "val") -> None:
        """Take any toolkit's metric dictionary, stamped with the last closed step (0 before the first).

        Args:
            metrics: names to numbers, nested at will; tensors are read later, without waiting for the device.
            phase: e.g. `"train"`, `"val"`, `"test"`.

        Raises:
            RuntimeError: the monitor is closed.
        """
        self._use()
        self._probing.interrupt()
        stamp = Record("", None, self._notes.step, phase=phase, rank=self._run.rank, source="log")
        ready, parts = list[Record](), list[Part]()
        try:
            for name, value, kind in normalise(metrics):
                if isinstance(value, Tensor):
                    parts.append(Part({Key(name): value}, stamp._replace(kind=kind)))
                else:
                    ready.append(stamp._replace(name=name, value=value, kind=kind))
        except Exception as error:
            # an epoch of training is worth more than one dictionary
            if self._notes.strict:
                raise
            self.add(unreadable(error, stamp.step, phase))
        self._deliver(ready, parts)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record what runs inside under another phase: `with monitor.phase("val"): validate()`.

        Read once, at the end, and stamped with the last closed step.

        Raises:
            RuntimeError: the monitor is closed.
        """
        self._use()
        outer, given = self._phase, self._given
        self._phase, self._given = name, {}
        self._arm()
        parts: list[Part] = []
        try:
            yield
            with self._notes.going_on(self, "phase of the"):
                stamp = Record("", None, self._notes.step, phase=name, rank=self._run.rank)
                parts = self._probing.read(self._given, stamp)
        finally:
            self._phase, self._given = outer, given
            self._arm()
        self._deliver([], parts)

    def add(self, found: Report | Finding) -> None:
        """Send an audit's findings the way of all findings: to `findings`, `on_finding`, logging and sinks.

        Raises:
            RuntimeError: the monitor is closed.
            TypeError: it is neither a report nor a finding.
        """
        self._use()
        self._notes.pending.extend(map(check_finding, found.findings if isinstance(found, Report) else [found]))
        self._deliver()

    @goes_on
    def flush(self) -> None:
        """Wait until everything measured so far is delivered, and written by the sinks."""
        self._deliver(wait=True)
        self._delivery.flush(self._run)

    @_disable_dynamo
    def close(self) -> None:
        """Remove all hooks, deliver everything, close the sinks. May be called twice."""
        if self._closed:
            return
        self._closed = True
        left_open.discard(self)
        try:
            for each in (self._probing.detach, self._heartbeat.close, *([self._guard.close] if self._guard else [])):
                with self._notes.going_on(self, "end of the"):
                    each()
            self._deliver(wait=True)
            with self._notes.going_on(self, "end of the"):
                self._delivery.judge_watches(self._step)
                self._ranks.part(self.findings)
            self.flush()
        finally:
            self._delivery.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._closed and not self._used:
            self._notes.pending.append(unused())
        self.close()

    def _use(self) -> None:
        self._used = True
        if self._closed:
            raise asked(RuntimeError("This monitor is closed. Create a new one to observe further steps."))
        with self._notes.going_on(self, "clock of the"):
            self._heartbeat.beat()

    @goes_on
    def _arm(self) -> None:
        if self._phase != "train":
            self._probing.interrupt()
        self._probing.arm(self._step, self._phase)

    def _meet(self) -> Any:
        self._run = self._ranks.join(self._run)
        return self._ranks.store

    @goes_on
    def _deliver(self, ready: Sequence[Record] = (), parts: Sequence[Part] = (), *, wait: bool = False) -> None:
        try:
            if ready or parts:
                self._transfer.send(ready, parts)
        except Exception as error:
            self._notes.disabled(self._transfer, "transfer", error, NOT_SENT)
            self._transfer.send(ready, [part for part in parts if can_be_sent(part)])
        self._meet()
        arrived = self._delivery.ahead(self._arrived(wait)) if self._ranks.hold_back else self._arrived(wait)
        self._delivery.deliver(self._ranks.pass_on(arrived, self.findings, wait=wait), self._run)

    def _arrived(self, wait: bool) -> Iterator[list[Record]]:
        for records, error in self._transfer.receive(wait=wait):
            if error is not None:
                self._notes.disabled(self._transfer, "transfer", error, NOT_SENT)
            yield records

    # -- resuming ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, JSON]:
        """Return what a resumed run needs, as JSON: the run's name, the next step, what the watches remember.

        All steps before are written by then, so that a run resumed from here misses none.
        """
        self.flush()
        return {"version": VERSION, "run": self._run.id, "step": self._step, **self._delivery.state_dict()}

    def load_state_dict(self, state: Mapping[str, JSON]) -> None:
        """Go on with an earlier run. Call it before the first step.

        Args:
            state: from `state_dict`. Watches are found by their type and arguments; others start anew.

        Raises:
            ValueError: not such a state.
        """
        check_state(state)
        step = int(state["step"])
        if step < self._step:
            self._notes.pending.append(backwards(self._step, step, self._notes.step))
        self._step, self._notes.step = step, max(step - 1, 0)
        self._run = replace(self._run, id=str(state["run"]), resumed_from=step - 1 if step else None)
        self._delivery.load_state_dict(state)
        if self._guard is not None:
            self._guard.step = step
        self._probing.arm(self._step, self._phase)
