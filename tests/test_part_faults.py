"""One part fails, whichever it is and however: the training is that of a run without us, and all other parts go on.

Parts are found by looking into the packages, so that a new one is tried as well.
"""

import inspect
import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from stethoscope import Finding, Monitor, probes, sinks, watches
from stethoscope._protocols import Key

sys.path.insert(0, str(Path(__file__).parent))

from faulty import FailAt, batch, hooks, make, same_weights_as_unobserved


def classes(package, method):
    return [each for _, each in sorted(vars(package).items()) if inspect.isclass(each) and hasattr(each, method)]


PROBES, WATCHES, SINKS = classes(probes, "attach"), classes(watches, "update"), classes(sinks, "write")
names = {"ids": lambda each: each.__name__}

ERRORS = (RuntimeError, MemoryError, RecursionError, OSError, KeyError)
PLACES = 5  # of each part, from its first line to its last one in a run


class Log:
    """A logger of somebody's."""

    def log_metrics(self, metrics, step):
        pass


class WandBRun:
    """What a W&B run is asked for."""

    step = 0

    def define_metric(self, *args, **kwargs):
        pass

    def log(self, row, commit=None):
        pass

    def alert(self, **kwargs):
        pass


@dataclass(eq=False)
class Kept:
    """A sink of the user's, beside the one that fails."""

    records: list = field(default_factory=list)
    findings: list = field(default_factory=list)

    def open(self, run):
        pass

    def write(self, step, records, findings):
        self.records += records
        self.findings += findings

    def close(self):
        pass


def sink_of(kind, tmp_path):
    needed = [name for name, each in inspect.signature(kind).parameters.items() if each.default is each.empty]
    needed += ["run"] if kind is sinks.WandB else []
    given = {"logger": Log(), "run": WandBRun(), "sink": Kept(), "every": 1}
    return kind(**{name: given.get(name, tmp_path / name) for name in needed})


def train(model, optimizer, monitor, steps=4):
    for step in range(steps):
        x = batch(step)
        estimates = model(x)
        loss = (estimates - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        logits = estimates[:, 0].detach()
        given = {"estimates": x[:, :2], "references": x[:, 2:4], "mixture": x[:, 0], "logits": logits}
        monitor.step({"x": x}, loss=loss, targets=torch.tensor([0, 1]), **given)
        with monitor.phase("val"), torch.no_grad():
            model(x)
        monitor.log({"loss": loss.detach(), "th_accuracy": 0.5}, phase="val")
        if step == 1:
            monitor.add(Finding("loss-spike", "warning", "planted", "nothing"))


def run(tmp_path, parts, fault):
    model, optimizer = make()
    memory = Kept()
    others = {"probes": [], "watches": [], "sinks": [], **parts}
    monitor = Monitor(
        model,
        optimizer,
        probes=[*others["probes"], Other()],
        watches=[*others["watches"], Counting()],
        sinks=[*others["sinks"], memory],
        every=1,
    )
    with fault:
        train(model, optimizer, monitor)
        monitor.flush()
        monitor.close()
    return model, monitor, memory


class Other:
    """A probe of the user's, beside the one that fails."""

    every = 1

    def attach(self, model):
        return self

    def covers(self, other):
        return False

    def arm(self, on, phase):
        pass

    def read(self, given):
        return {Key("other/one"): torch.ones(())}

    def detach(self):
        pass


class Counting:
    """A watch of the user's, beside the one that fails."""

    needs = ()

    def init(self):
        return 0

    def update(self, state, records):
        losses = sum(record.name == "loss" and record.phase == "train" for record in records)
        return state + losses, [Finding("counted", "info", str(state + losses), "")] * losses


def the_training_was_not_touched(model, monitor, memory):
    assert same_weights_as_unobserved(model, range(4))
    assert not hooks(model)
    assert [r.step for r in memory.records if r.name == "loss" and r.phase == "train"] == list(range(4))
    assert [r.step for r in memory.records if r.name == "other/one" and r.phase == "train"] == list(range(4))
    assert [f.message for f in monitor.findings if f.code == "counted"] == ["1", "2", "3", "4"]
    assert "planted" in [f.message for f in memory.findings]
    assert memory.findings == monitor.findings


class Count(FailAt):
    """Counts the lines, and lets them pass."""

    def __init__(self, folders):
        super().__init__(10**9, RuntimeError, folders)


def places(kind, tmp_path, parts):
    folder = [inspect.getfile(kind).partition("/stethoscope/")[2]]
    count = Count(folder)
    run(tmp_path / "count", parts(tmp_path / "count"), count)
    lines = 10**9 - count.left
    return folder, sorted({round(i * (lines - 1) / (PLACES - 1)) for i in range(PLACES)})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # files of sinks that fail in closing
@pytest.mark.parametrize("kind", [*PROBES, *WATCHES, *SINKS], **names)
def test_a_part_of_ours_that_fails_anywhere_is_switched_off_said_and_nothing_else_changes(kind, tmp_path):
    def parts(where):
        role = "probes" if kind in PROBES else "watches" if kind in WATCHES else "sinks"
        return {role: [sink_of(kind, where) if kind in SINKS else kind()]}

    folder, at = places(kind, tmp_path, parts)
    for n, error in zip(at, itertools.cycle(ERRORS)):
        where = tmp_path / str(n)
        fault = FailAt(n, error, folder)
        result = run(where, parts(where), fault)
        the_training_was_not_touched(*result)
        said = [f for f in result[1].findings if f.code == "part-disabled"]
        closing = fault.at is not None and kind in SINKS and not said  # what fails in closing is in the log
        assert fault.at is None or said or closing, fault.at
        if said and kind not in PROBES:
            assert kind.__name__ in said[0].message, fault.at


@pytest.mark.parametrize("method", ["arm", "read", "detach"])
@pytest.mark.parametrize("call", [0, 1, 3])
@pytest.mark.parametrize("kind", PROBES, **names)
def test_a_probe_whose_method_fails_at_a_later_call_is_off_from_there(kind, call, method, tmp_path, monkeypatch):
    calls = itertools.count()
    attach = kind.attach

    def failing(self, model):
        attachment = attach(self, model)
        original = getattr(attachment, method)

        def fails(*args):
            if next(calls) == call:
                raise MemoryError("injected")
            return original(*args)

        object.__setattr__(attachment, method, fails)
        return attachment

    monkeypatch.setattr(kind, "attach", failing)
    with Quiet() as quiet:
        result = run(tmp_path, {"probes": [kind()]}, quiet)
    model, monitor, memory = result
    # where detaching fails, hooks and the compiler's stance may stay: nobody else knows where they are
    if method == "detach":
        torch.compiler.set_stance("default")
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        for parameter in model.parameters():
            parameter._backward_hooks = None
    the_training_was_not_touched(model, monitor, memory)
    if next(calls) > call + 1:
        assert f"{kind.__name__} failed with MemoryError" in next(
            f.message for f in monitor.findings if f.code == "part-disabled"
        )


class Quiet:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class Hostile:
    """A watch of the user's that does not keep the contract."""

    needs = ()

    def __init__(self, **methods):
        for name, method in methods.items():
            setattr(self, name, method)

    def init(self):
        return {}

    def update(self, state, records):
        return state, []


def fails(*_):
    raise MemoryError("injected")


def endless(*args):
    return endless(*args)


WRONG_WATCHES = {
    "returns nothing": {"update": lambda state, records: None},
    "returns no findings": {"update": lambda state, records: (state, None)},
    "returns text": {"update": lambda state, records: (state, ["spike"])},
    "fails while its findings are read": {"update": lambda state, records: (state, (1 / 0 for _ in records))},
    "gives a message that is no text": {"update": lambda s, r: (s, [Finding("loss-spike", "error", 3, "a")])},
    "keeps a tensor": {"init": lambda: torch.zeros(3)},
    "never returns": {"update": endless},
    "takes records away": {"update": lambda state, records: (state, records.clear())},
    "has no memory": {"update": fails},
}


@pytest.mark.parametrize("how", WRONG_WATCHES)
def test_a_watch_that_does_not_keep_the_contract_is_switched_off(how, tmp_path):
    result = run(tmp_path, {"watches": [Hostile(**WRONG_WATCHES[how])]}, Quiet())
    the_training_was_not_touched(*result)
    assert [f.evidence["part"] for f in result[1].findings if f.code == "part-disabled"] == ["Hostile"]


WRONG_PROBES = {
    "reads nothing": {"read": lambda given: None},
    "reads a list": {"read": lambda given: [torch.ones(())]},
    "reads numbers": {"read": lambda given: {"one": 1.0}},
    "reads by text": {"read": lambda given: {"one": torch.ones(())}},
    "has notes that are none": {"notes": ["text"]},
    "is armed in vain": {"arm": fails},
}


@pytest.mark.parametrize("how", WRONG_PROBES)
def test_a_probe_that_does_not_keep_the_contract_is_switched_off(how, tmp_path):
    probe = Other()
    for name, method in WRONG_PROBES[how].items():
        setattr(probe, name, method)
    result = run(tmp_path, {"probes": [probe]}, Quiet())
    the_training_was_not_touched(*result)
    assert [f.evidence["part"] for f in result[1].findings if f.code == "part-disabled"] == ["Other"]


class Thief(sinks.Memory):
    """Takes away what it is given."""

    def write(self, step, records, findings):
        for given in (records, findings):
            given.clear()


class Exits(sinks.Memory):
    """A sink on a thread of its own that ends it."""

    background = True

    def write(self, step, records, findings):
        raise GeneratorExit


@pytest.mark.parametrize("kind", [Thief, Exits])
def test_a_sink_that_does_not_keep_the_contract_is_switched_off(kind, tmp_path):
    result = run(tmp_path, {"sinks": [kind()]}, Quiet())
    the_training_was_not_touched(*result)
    assert [f.evidence["part"] for f in result[1].findings if f.code == "part-disabled"] == [kind.__name__]


class Lazy(dict):
    """A container that reads its items when they are asked for, and fails."""

    def items(self):
        raise OSError("the archive is gone")


class Number:
    dtype = torch.float32

    def __getattr__(self, name):
        raise ValueError(name)


def test_what_cannot_be_looked_into_costs_itself_and_is_said(tmp_path):
    model, memory = nn.Linear(3, 2), sinks.Memory()
    cyclic = {}
    cyclic["again"] = cyclic
    with Monitor(model, sinks=[memory, tmp_path]) as monitor:
        monitor.step(Lazy(), loss=1.0, count=10**400)
        monitor.step(Lazy(), loss=2.0)
        monitor.log({"loss": 1.0, "odd": Number()})
        monitor.log(Lazy())
        monitor.log(cyclic)
        monitor.add(
            Finding("loss-spike", "error", "m", "a", evidence={"tensor": torch.ones(3), 1: Number(), "f": fails})
        )
        with pytest.raises(TypeError, match="must be a Finding"):
            monitor.add("spike")
    assert [r.value for r in memory.records if r.name == "loss"] == [1.0, 2.0, 1.0]
    assert [f.code for f in monitor.findings] == ["probe-read-nothing", "metric-type", "metric-type", "loss-spike"]
    assert len([f for d in sinks.read(tmp_path) for f in d.findings]) == 4


def test_a_probe_that_fails_beside_one_that_covers_it_leaves_that_one(tmp_path):
    result = run(tmp_path, {"probes": [probes.Activations()], "watches": [watches.NonFinite()]}, Quiet())
    the_training_was_not_touched(*result)
