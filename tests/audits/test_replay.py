from __future__ import annotations

import json
import random
import shlex
import sys
import traceback

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from stethoscope import Monitor, audits

nan, inf = float("nan"), float("inf")


class Net(nn.Module):
    """Dropout, BatchNorm, one random number of Python per call; a dictionary out."""

    def __init__(self):
        super().__init__()
        self.inp, self.norm, self.drop, self.out = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2)

    def middle(self, y):
        return y

    def forward(self, x, *, scale=1.0):
        y = self.drop(self.norm(F.relu(self.inp(x)))) * (1 + 0.01 * random.random())
        return {"out": self.out(self.middle(y)) * scale, "features": y}


class Overflow(Net):
    def middle(self, y):
        return (y * 1e30).square()


class Log(Net):
    def middle(self, y):
        return torch.log(-y.square())


class Slope(Net):
    def middle(self, y):
        return (y - y.detach()).abs().sqrt() + y


class Lucky(Net):
    """NaN when three random numbers, drawn one after the other, say so."""

    def middle(self, y):
        return y / (torch.rand(()) > 0.5)


class Level(Net):
    def __init__(self):
        super().__init__()
        self.level = nn.Buffer(torch.ones(()), persistent=False)
        self.ema = torch.ones(())

    def middle(self, y):
        return y / self.level / self.ema


def make(kind):
    torch.manual_seed(0)
    random.seed(0)
    return kind()


def loss_of(model, x):
    return model(x, scale=0.5)["out"].square().mean()


def incident(folder, kind, *, change=lambda model, x: None, calls=1, replay=None, clip=False, loss=loss_of):
    """Train for three steps, the last one bad."""
    model = make(kind)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    given = {"replay": lambda x: loss(model, x)} if replay else {}
    with Monitor(model, optimizer, guard="skip", sinks=[folder], strict=True, **given) as monitor:
        generator = torch.Generator().manual_seed(1)
        for step in range(3):
            optimizer.zero_grad()
            for part in range(calls):
                x = torch.randn(6, 4, generator=generator)
                # what is wrong with the model is so from the step's beginning, an input may be the last one
                if step == 2 and part == (calls - 1 if change is poison_input else 0):
                    change(model, x)
                value = loss(model, x)
                value.backward()
                monitor.observe(x, loss=value)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            monitor.step()
            if monitor.findings:
                break
    return folder / "incidents" / f"step{step}", monitor.findings[0]


def poison_input(model, x):
    x[3, 1] = nan


def poison_weight(model, x):
    model.out.weight.data[1, 2] = inf


def huge_weight(model, x):
    model.inp.weight.data[1, 2] = 3e38
    x[0, 2] = 5


def poison_statistics(model, x):
    model.norm.running_var.fill_(-1)
    model.norm.eval()


def poison_state(model, x):
    model.level.zero_()


def poison_attribute(model, x):
    model.ema.zero_()


CASES = {
    "input": (Net, poison_input),
    "parameter": (Net, poison_weight),
    "absurd": (Net, huge_weight),
    "statistics in eval": (Net, poison_statistics),
    "buffer that is not in the state": (Level, poison_state),
    "plain attribute": (Level, poison_attribute),
    "operation": (Overflow, lambda model, x: None),
    "random": (Lucky, lambda model, x: None),
    "backward": (Slope, lambda model, x: None),
}


@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_the_same_culprit_is_found_in_another_model_from_the_folder_alone(tmp_path, case, calls):
    kind, change = CASES[case]
    folder, finding = incident(tmp_path, kind, change=change, calls=calls, clip=True)
    torch.manual_seed(99)
    other = kind()
    report = audits.replay(folder, other)
    assert report.reproduced, report
    assert report.ok
    assert report.differs == ()
    again = report.findings[0]
    assert again.module == finding.module
    assert case == "parameter" or again.code == finding.code  # which the guard ascribes to the optimizer
    for key in ("origin", "operation", "source", "parameter", "samples"):
        assert case == "parameter" or again.evidence[key] == finding.evidence[key]
    assert again.evidence["origin"] is not None
    if case == "backward":
        assert again.evidence["operation"] == "aten.sqrt"
        assert "in middle" in again.evidence["source"]
    if case == "random":
        assert again.evidence["operation"] == "aten.div"


def test_replaying_leaves_the_random_states_alone(tmp_path):
    folder, _ = incident(tmp_path, Net, change=poison_input)
    model = Net()
    before = torch.get_rng_state(), random.getstate()
    assert audits.replay(folder, model).reproduced
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


def log_loss(model, x):
    return torch.log(-loss_of(model, x))


@pytest.mark.parametrize("replay", [True, False])
def test_a_fault_in_the_loss_needs_the_step_and_says_so(tmp_path, replay):
    folder, _ = incident(tmp_path, Net, replay=replay, loss=log_loss)
    report = audits.replay(folder, Net())
    assert not report.reproduced
    assert "--step" in report.summary
    report = audits.replay(folder, Net(), step=log_loss)
    assert report.reproduced
    assert (report.culprit.origin, report.culprit.operation) == ("loss", "aten.log")


def test_a_fault_in_the_loss_that_is_born_in_backward(tmp_path):
    def root_loss(model, x):
        out = model(x)["out"]
        return (out - out.detach()).square().sum().sqrt()

    folder, finding = incident(tmp_path, Net, loss=root_loss, clip=True)
    assert finding.evidence["in_loss"]
    assert "the fault is in the loss function" in finding.message
    report = audits.replay(folder, Net())
    assert not report.reproduced
    assert "what the loss hands back to the model is not finite" in report.summary
    report = audits.replay(folder, Net(), step=root_loss)
    assert (report.culprit.origin, report.culprit.operation) == ("backward", "aten.sqrt")


def test_code_that_was_mended_gives_another_answer(tmp_path):
    folder, _ = incident(tmp_path, Overflow)
    report = audits.replay(folder, Net())
    assert not report.reproduced
    assert not report.ok
    assert report.findings[-1].code == "replay-differed"
    assert "nothing non-finite here" in report.findings[-1].message


def test_another_culprit_is_named_beside_the_first(tmp_path):
    folder, _ = incident(tmp_path, Overflow)
    report = audits.replay(folder, Log())
    assert not report.reproduced
    assert "operation: aten.pow there, aten.log here" in report.findings[-1].message
    assert [each.code for each in report.findings] == ["nonfinite-activation", "replay-differed"]


def test_a_saved_report_is_replayed(tmp_path):
    model = make(Slope)
    x = torch.randn(5, 4)
    report = audits.nonfinite(model, x, loss=lambda out: out["out"].sum())
    assert report.origin == "backward"
    again = audits.replay(report.save(tmp_path / "one"), Slope())
    assert again.reproduced
    assert again.culprit.operation == report.operation == "aten.sqrt"


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)

    def extract_features(self, x):
        return torch.log(self.linear(x) * 0)


def test_a_bundle_does_not_choose_the_method_that_is_called(tmp_path):
    folder = audits.nonfinite(Features(), torch.randn(3, 4), forward="extract_features").save(tmp_path / "one")
    with pytest.raises(ValueError, match=r"the method 'extract_features'.*--forward"):
        audits.replay(folder, Features())
    assert audits.replay(folder, Features(), forward="extract_features").reproduced
    folder = audits.nonfinite(Features(), torch.randn(3, 4), forward=lambda m, x: m.extract_features(x)).save(
        tmp_path / "two"
    )
    with pytest.raises(ValueError, match=r"a function"):
        audits.replay(folder, Features())
    report = audits.replay(folder, Features(), forward=lambda m, x: m.extract_features(x))
    assert report.reproduced


def test_a_model_that_does_not_fit_is_told(tmp_path):
    folder, _ = incident(tmp_path, Net, change=poison_input)
    with pytest.raises(ValueError, match=r"Linear does not fit the incident: .*'inp.weight' is not in the model"):
        audits.replay(folder, nn.Linear(4, 2))
    other = Net()
    other.out = nn.Linear(8, 3)
    with pytest.raises(ValueError, match=r"'out.weight' is \(2, 8\) there and \(3, 8\) here"):
        audits.replay(folder, other)
    other = Net()
    other.more = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"'more.weight' is not in the bundle"):
        audits.replay(folder, other)


def test_the_class_is_imported_where_it_can_be(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (tmp_path / "work" / "replayed_net.py").write_text(
        "import torch\nclass Log(torch.nn.Linear):\n    def __init__(self, size=2):\n        super().__init__(size, size)\n"
        "    def forward(self, x):\n        return torch.log(super().forward(x) * 0)\n"
        "class Sized(Log):\n    def __init__(self, size, name):\n        super().__init__(size)\n        self.size = size\nNumber = 3\n"
    )
    monkeypatch.syspath_prepend(".")
    import replayed_net

    folder = audits.nonfinite(replayed_net.Log(), torch.ones(3, 2)).save(tmp_path / "one")
    assert audits.replay(folder).reproduced
    sized = audits.nonfinite(replayed_net.Sized(2, "a"), torch.ones(3, 2)).save(tmp_path / "two it's")
    with pytest.raises(ValueError, match=r"needs arguments \(size, name\)") as caught:
        audits.replay(sized)
    command = shlex.split(str(caught.value).partition("by: ")[2])
    assert command[:5] == ["stethoscope", "replay", str(sized), "--model", "replayed_net:Sized"]
    assert (command[5], json.loads(command[6])) == ("--arguments", {"size": 2, "name": "..."})
    for name, message in {
        "replayed_net:Number": "is no torch.nn.Module",
        "replayed_net:Nothing": "cannot be imported here",
        "os:system": "is no torch.nn.Module",
        "../evil:Net": "does not say where",
        "": "does not say where",
    }.items():
        rewrite(folder, lambda note, name=name: note["model"].update({"class": name}))
        with pytest.raises(ValueError, match=message):
            audits.replay(folder)


def test_code_that_lies_in_the_bundle_is_never_imported(tmp_path, monkeypatch):
    folder, _ = incident(tmp_path, Net, change=poison_input)
    rewrite(folder, lambda note: note["model"].update({"class": "evil_net:Net"}))
    (folder / "evil_net.py").write_text("raise SystemExit('it was run')")
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match="inside of the bundle"):
        audits.replay(folder)
    assert "evil_net" not in sys.modules


def rewrite(folder, change):
    note = json.loads((folder / "incident.json").read_text())
    change(note)
    (folder / "incident.json").write_text(json.dumps(note))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder, _ = incident(tmp_path_factory.mktemp("run"), Net, change=poison_input)
    return folder


@pytest.fixture
def broken(bundle, tmp_path):
    """Copies the bundle, with other bytes in one of its files."""

    def copied(name=None, data=None):
        folder = tmp_path / "copied"
        folder.mkdir(exist_ok=True)
        for each in bundle.iterdir():
            (folder / each.name).write_bytes(data if each.name == name else each.read_bytes())
        return folder

    return copied


@pytest.mark.parametrize("name", ["incident.json", "tensors.safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
def test_a_file_that_was_cut_short_is_damaged(bundle, broken, name, part):
    data = (bundle / name).read_bytes()
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        audits.replay(broken(name, data[: int(part * len(data))]), Net())


def test_what_is_no_bundle_is_refused(tmp_path, broken):
    with pytest.raises(ValueError, match=r"is no folder"):
        audits.replay(tmp_path / "nothing", Net())
    with pytest.raises(ValueError, match=r"no complete incident: incident.json is missing"):
        audits.replay(tmp_path, Net())
    with pytest.raises(ValueError, match=r"nested too deep|damaged"):
        audits.replay(broken("incident.json", b"[" * 100_000), Net())
    folder = broken()
    rewrite(folder, lambda note: note.update(format=2))
    with pytest.raises(ValueError, match="format 2"):
        audits.replay(folder, Net())


@pytest.mark.parametrize("target", ["/etc/hostname", "/dev/zero", "nothing"])
@pytest.mark.parametrize("name", ["incident.json", "tensors.safetensors"])
def test_links_out_of_the_bundle_are_not_followed(broken, name, target):
    folder = broken()
    (folder / name).unlink()
    (folder / name).symlink_to(target)
    with pytest.raises(ValueError, match="plain file"):
        audits.replay(folder, Net())


def test_names_with_paths_or_code_in_them_reach_nothing(broken, tmp_path):
    folder = broken()
    outside = tmp_path / "outside"

    def change(note):
        note["state"]["../../outside"] = {"kind": "tensor", "name": "../../outside", "grad": False}

    rewrite(folder, change)
    with pytest.raises(ValueError, match=r"outside"):
        audits.replay(folder, Net())
    assert not outside.exists()
    folder = broken()
    rewrite(folder, lambda note: note["calls"][0].update(module="drop.__class__"))
    with pytest.raises(ValueError, match=r"no module 'drop.__class__'"):
        audits.replay(folder, Net())
    folder = broken()
    rewrite(folder, lambda note: note["calls"][0].update(method="share_memory"))
    with pytest.raises(ValueError, match="the method 'share_memory'"):
        audits.replay(folder, Net())


def test_texts_of_a_bundle_cannot_drive_a_terminal(broken):
    folder = broken()

    def change(note):
        note["left_out"] = ["\x1b[2J[bold red]gone[/]\u202e"]
        note["culprit"]["module"] = "\x1b]0;title\x07[link=http://x]y[/link]"

    rewrite(folder, change)
    text = str(audits.replay(folder, Net()))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\u202e" not in text
    assert "\\x1b[2J[bold red]gone[/]" in text


junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=5), inner, max_size=2)),
    max_leaves=4,
)


def paths(note, at=()):
    """Every place in a JSON value."""
    yield at
    items = note.items() if isinstance(note, dict) else enumerate(note) if isinstance(note, list) else ()
    for key, value in items:
        yield from paths(value, (*at, key))


def answers(folder, model):
    """Whether a replay ends with a report, a ValueError, or an error out of the model itself, which has got a strange input."""
    try:
        audits.replay(folder, model)
    except ValueError:
        return True
    except Exception as error:
        return any(frame.name == "_call_impl" for frame in traceback.extract_tb(error.__traceback__))
    return True


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_change_of_the_note_gives_a_clear_error_or_an_answer(bundle, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    folder.mkdir(exist_ok=True)
    (folder / "tensors.safetensors").write_bytes((bundle / "tensors.safetensors").read_bytes())
    note = json.loads((bundle / "incident.json").read_text())
    at = data.draw(st.sampled_from([each for each in paths(note) if each]))
    inner = note
    for key in at[:-1]:
        inner = inner[key]
    if data.draw(st.booleans()):
        del inner[at[-1]]
    else:
        inner[at[-1]] = data.draw(junk)
    (folder / "incident.json").write_text(json.dumps(note))
    model = Net()
    rng = torch.get_rng_state()
    assert answers(folder, model)
    assert torch.equal(rng, torch.get_rng_state())


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_change_of_bytes_gives_a_clear_error_or_an_answer(bundle, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "flipped"
    folder.mkdir(exist_ok=True)
    name = data.draw(st.sampled_from(["incident.json", "tensors.safetensors"]))
    for each in bundle.iterdir():
        (folder / each.name).write_bytes(each.read_bytes())
    content = bytearray((bundle / name).read_bytes())
    limit = len(content) if name == "incident.json" else 3000
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, limit - 1))] = data.draw(st.integers(0, 255))
    (folder / name).write_bytes(bytes(content))
    assert answers(folder, Net())
