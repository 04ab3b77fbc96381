"""`stethoscope run` from outside: real processes, with it and without."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stethoscope import presets, sinks
from stethoscope.cli import app
from stethoscope.cli._run import GuardName, PresetName, _folder
from stethoscope.integrations._script._settings import Settings

SCRIPT = """
import argparse, atexit, os, random, signal, sys, time
sys.stderr.write("before torch\\n")
seen = [__name__, __file__, sys.argv, sys.path[0], sorted(name for name in sys.modules if name == "sitecustomize")]
random.seed(1)
atexit.register(print, "at exit, first registered")
parser = argparse.ArgumentParser()
parser.add_argument("--end", default="normally")
parser.add_argument("--every", type=int)
arguments = parser.parse_args()

import torch
from torch import nn

atexit.register(print, "at exit, last registered")

def train(seed):
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(12):
        loss = model(torch.randn(4, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(seed, loss.item(), [each.double().sum().item() for each in model.parameters()], torch.rand(1), flush=True)
    return loss

if __name__ == "__main__":
    if arguments.end in ("fork", "spawn"):
        import multiprocessing
        children = [multiprocessing.get_context(arguments.end).Process(target=train, args=(1,))]
        train(0)
        for child in children:
            child.start()
            child.join()
        print([child.exitcode for child in children])
        sys.exit(0)
    print(seen)
    loss = train(0)
    print(random.random())
    if arguments.end == "raising":
        loss.backward()
    if arguments.end == "_exit":
        os._exit(3)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # handed on by a shell that runs the suite in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if arguments.end in ("SIGTERM", "SIGINT"):
        os.kill(os.getpid(), getattr(signal, arguments.end))
        time.sleep(9)
    if arguments.end == "text":
        sys.exit("this text")
"""


def call(folder, *command, **variables):
    source = str(Path(sinks.__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": source, "COLUMNS": "200", **variables}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def run(folder, *arguments, **variables):
    return call(folder, "-m", "stethoscope", "run", *arguments, **variables)


def theirs(done):
    """What a script says and how it ends, without our lines."""
    kept = [line for line in done.stderr.splitlines() if not line.startswith("stethoscope: ")]
    return done.returncode, done.stdout, kept


@pytest.fixture
def script(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    return tmp_path


@pytest.mark.parametrize(
    "end",
    ["raising", *(pytest.param(each, marks=pytest.mark.slow) for each in ("normally", "text", "_exit", "SIGINT"))],
)
def test_a_script_says_and_does_the_same_under_it(script, end):
    arguments = ("train.py", "--end", end, "--every", "3")
    under = run(script, "--to", "run", "--every", "5", *arguments)
    assert theirs(under) == theirs(call(script, *arguments))
    assert sinks.read_run(script / "run").every == 5
    assert len([d for d in sinks.read(script / "run") if any(r.name == "loss" for r in d.records)]) == 12
    last = under.stderr.splitlines()[-3:]
    if end != "_exit":
        assert last == [
            "stethoscope: 12 steps of Sequential: run",
            "stethoscope: nothing was found.",
            "stethoscope: see more: stethoscope report run",
        ]


def test_a_script_that_is_killed_leaves_all_its_steps(script):
    under = run(script, "--to", "run", "train.py", "--end", "SIGTERM")
    assert under.returncode == -signal.SIGTERM
    assert under.stderr == "before torch\n"
    assert max(delivery.step for delivery in sinks.read(script / "run")) == 11


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_what_children_train_is_recorded_as_well(script, way):
    under = run(script, "--to", "run", "train.py", "--end", way)
    assert theirs(under) == theirs(call(script, "train.py", "--end", way))
    assert under.stderr.count("stethoscope: 12 steps of Sequential: run") == 2


DISTRIBUTED = """
import torch, torch.distributed as dist
from torch import nn
torch.set_num_threads(1)
dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)))
optimizer = torch.optim.SGD(model.parameters(), 0.01)
for i in range(6):
    x = torch.randn(4, 8) * (float("nan") if i == 4 and dist.get_rank() == 1 else 1)
    loss = model(x).square().mean()
    optimizer.zero_grad(); loss.backward(); optimizer.step()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("outer", ["run", "torchrun"])
def test_under_torchrun_every_rank_writes_to_one_folder(tmp_path, outer):
    (tmp_path / "ddp.py").write_text(DISTRIBUTED)
    (tmp_path / "torchrun").write_text(f"#!{sys.executable}\nfrom torch.distributed.run import main\nmain()\n")
    (tmp_path / "torchrun").chmod(0o755)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if outer == "run":
        done = run(tmp_path, "./torchrun", *torchrun[1:], "ddp.py")
    else:
        done = call(tmp_path, "-m", *torchrun, "-m", "stethoscope", "run", "ddp.py")
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("ddp-")
    for rank in (0, 1):
        assert len([d for d in sinks.read(folder, rank=rank) if any(r.name == "loss" for r in d.records)]) == 6
    assert "stethoscope: rank 1, 6 steps of Sequential:" in done.stderr
    assert "input" in done.stderr.partition("rank 1, 6 steps")[2].splitlines()[1]


WITHOUT_TORCH = "import sys; print(sys.argv, __name__, sys.stdin.read()); sys.exit({code!r})"


def test_modules_and_scripts_without_torch_get_their_own_arguments(tmp_path):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    (tmp_path / "package" / "train.py").write_text(WITHOUT_TORCH.format(code="text"))
    under = run(tmp_path, "-m", "package.train", "-m", "--help", "--to", "x")
    assert theirs(under) == theirs(call(tmp_path, "-m", "package.train", "-m", "--help", "--to", "x"))
    assert under.stderr.splitlines()[-1].startswith("stethoscope: no training was seen in package.train")
    assert not (tmp_path / "runs").exists()


def test_a_sitecustomize_of_the_environment_is_run_as_well(tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("print('from sitecustomize')")
    (tmp_path / "train.py").write_text(
        "import sys, sitecustomize; print(sitecustomize.__file__, 'startup' in str(sys.path))"
    )
    path = os.pathsep.join([str(Path(sinks.__file__).parents[2]), str(tmp_path / "site")])
    under = run(tmp_path, "train.py", PYTHONPATH=path)
    plain = call(tmp_path, "train.py", PYTHONPATH=path)
    # once for the command that becomes the script
    assert under.stdout == f"from sitecustomize\n{plain.stdout}"


def test_threads_are_those_that_the_script_asks_for_before_it_imports_torch(tmp_path):
    (tmp_path / "train.py").write_text(
        "import os; os.environ['OMP_NUM_THREADS'] = '1'; import torch; print(torch.get_num_threads())"
    )
    assert run(tmp_path, "train.py", OMP_NUM_THREADS="2").stdout == "1\n"


@pytest.fixture
def become(tmp_path, monkeypatch):
    """What the command would become, in place of becoming it."""
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    became = []
    monkeypatch.setattr("stethoscope.cli._run._become", lambda *what: became.append(what))
    return became


@pytest.mark.parametrize(
    ("table", "arguments", "said"),
    [
        ("", ["nope.py"], "There is no script 'nope.py'"),
        ("", ["--every", "0", "train.py"], "'--every'"),
        ("", ["--preset", "nope", "train.py"], "'first_aid'"),
        ("every = 0", ["train.py"], "'--every'"),
        ("evry = 5", ["train.py"], "has ['evry']; known are ['every', 'guard', 'planned_steps', 'preset', 'to']"),
        ("every = = 5", ["train.py"], "could not be read"),
        ("", [], "TARGET"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(become, tmp_path, table, arguments, said):
    (tmp_path / "pyproject.toml").write_text(f"[tool.stethoscope]\n{table}\n")
    done = CliRunner().invoke(app, ["run", *arguments], env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.replace("│", " ").split())
    assert done.stdout == ""
    assert become == []


def test_pyproject_gives_the_defaults_and_flags_win(become, tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        "[tool.stethoscope]\nevery = 7\npreset = 'full'\nguard = 'skip'\nplanned-steps = 100\nto = 'there'\n"
    )
    CliRunner().invoke(app, ["run", "--every", "9", "train.py"])
    ((_, environment),) = become
    said = json.loads(environment["STETHOSCOPE_RUN"])
    assert said.pop("pid")
    assert said.pop("start") == str(tmp_path)
    expected = Settings(target="train.py", to="there", preset="full", every=9, guard="skip", planned_steps=100)
    assert Settings(**said) == expected


def test_runs_that_begin_in_the_same_second_get_folders_of_their_own(monkeypatch):
    chosen = set()
    for pid in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda pid=pid: pid)
        chosen.add(_folder("a/train.py", [], module=False))
    first, second = sorted(chosen)
    assert (first.endswith("-1"), second.endswith("-2"), first.startswith("runs/train-")) == (True, True, True)


def test_options_are_the_presets_and_guards_that_there_are():
    assert {each.value for each in PresetName} == {"first_aid", "separation", "full", "none"}
    assert all(callable(getattr(presets, each.value)) for each in PresetName if each.value != "none")
    assert {each.value for each in GuardName} == {"skip", "raise"}
