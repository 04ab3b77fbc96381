"""Who may import whom, what may wait for the device, which names are public: read from the source, not from memory."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import stethoscope

ROOT = Path(stethoscope.__file__).parent
SOURCES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(ROOT.rglob("*.py"))}

# package or file -> what of stethoscope it may import; "" stands for the package's own files
LAYERS = {
    "_record.py": set(),
    "_protocols.py": {"_record"},
    "_tree.py": set(),
    "_aside.py": set(),
    "stats.py": set(),
    "_secrets.py": {"_record"},
    "_parts.py": {"_record"},
    "_graphs.py": set(),
    "_metrics.py": {"_graphs", "_record"},  # nodes of a graph are gone once a tensor is detached, which happens here
    "_transfer.py": {"_protocols", "_record"},
    "_combine.py": {"_record"},
    "_shards.py": set(),
    "_dropped.py": {"_secrets"},
    "probes": {
        "",
        "_aside",
        "_dropped",
        "_protocols",
        "_record",
        "_density",
        "_shards",
        "_tree",
        "stats",
        "separation_stats",
    },
    "watches": {
        "",
        "_metrics",
        "_protocols",
        "_record",
        "_schedule",
        "probes",
    },  # _metrics names tensors in annotations only
    "sinks": {"", "_combine", "_protocols", "_record"},
    "_rules.py": set(),
    "_diagnosis.py": {"_protocols", "_record", "_rules"},
    "_schedule.py": {"_record"},
    "_density.py": {"_shards"},
}


def imported(source: str) -> set[str]:
    """The parts of stethoscope that a file imports."""
    parts = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("stethoscope"):
            inner = node.module.split(".")[1:]
            parts |= {inner[0]} if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            parts |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("stethoscope.")}
    return parts


def trespassers(sources: dict[str, str]) -> list[str]:
    """Imports against the layers."""
    found = []
    for name, source in sources.items():
        home = name.split("/")[0]
        allowed = LAYERS.get(home)
        if allowed is not None:
            own = {home} if "" in allowed else set()
            found += [f"{name} imports {part}" for part in imported(source) - allowed - own]
    return found


WAITS = {"item", "cpu", "tolist", "numpy", "nonzero"}


def waits(source: str) -> list[int]:
    """Lines that fetch values from the device."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITS
    ]


def test_imports_follow_the_layers():
    assert trespassers(SOURCES) == []


def test_only_the_transfer_fetches_values_from_the_device():
    device_side = [name for name in SOURCES if name.startswith("probes/") or name.endswith("stats.py")]
    assert device_side
    assert {name: waits(SOURCES[name]) for name in device_side if waits(SOURCES[name])} == {}
    assert waits(SOURCES["_transfer.py"])


def test_watches_sinks_and_types_know_no_torch():
    names = [
        name for name in SOURCES if name.split("/")[0] in {"watches", "_record.py", "_protocols.py", "_diagnosis.py"}
    ]
    for name in names:
        for node in ast.parse(SOURCES[name]).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
                assert not (module or "").startswith("torch"), name


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("probes/_x.py", "from stethoscope.sinks import Jsonl"),
        ("watches/_x.py", "from stethoscope import audits"),
        ("_record.py", "import stethoscope._monitor"),
    ],
)
def test_a_trespasser_is_caught(name, source):
    assert len(trespassers({name: source})) == 1


def test_a_wait_is_caught():
    assert waits("def hook(x):\n    return x.mean().item()") == [2]


def test_the_public_names():
    source = SOURCES["__init__.py"]
    exported = {
        alias.asname for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    values = {"Finding", "FindingsError", "Monitor", "Record", "Report"}
    assert exported == values | {"audits", "presets", "probes", "sinks", "testing", "watches"}


def test_importing_stethoscope_loads_torch_and_numpy_and_nothing_heavier():
    heavy = [
        "lightning",
        "pytorch_lightning",
        "wandb",
        "tensorboard",
        "rich",
        "typer",
        "pydantic",
        "matplotlib",
        "scipy",
        "transformers",
        "torch._dynamo",
    ]
    code = f"import torch, sys; before = set(sys.modules); import stethoscope; print([m for m in {heavy!r} if m in sys.modules and m not in before])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
