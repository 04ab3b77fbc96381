"""`stethoscope run train.py`: a monitor for a script that knows nothing of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer


class PresetName(str, Enum):
    """What to measure and decide: the functions of `stethoscope.presets`, or nothing."""

    first_aid = "first_aid"
    separation = "separation"
    full = "full"
    none = "none"


class GuardName(str, Enum):
    """What to do with a step that is not finite."""

    skip = "skip"
    throw = "raise"


def _defaults(context: typer.Context, given: Path | None) -> Path | None:
    """Take `[tool.stethoscope]` as the defaults of all other options."""
    path = given or next((each / "pyproject.toml" for each in _upwards() if (each / "pyproject.toml").is_file()), None)
    if path is not None:
        table = _table(path)
        known = {each.name for each in context.command.params} - {"target", "arguments", "config", "module"}
        unknown = sorted(set(table) - known)
        if unknown:
            raise typer.BadParameter(f"[tool.stethoscope] in {path} has {unknown}; known are {sorted(known)}.")
        context.default_map = {**(context.default_map or {}), **table}
    return path


def run(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A script, with -m a module, or a command such as torchrun.")
    ],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS...", help="Its own arguments.")] = None,
    module: Annotated[bool, typer.Option("--module", "-m", help="TARGET is a module, as with python -m.")] = False,
    to: Annotated[
        str | None,
        typer.Option(help="Run folder, or a file that ends with .jsonl.  [default: runs/NAME-DATE-TIME-PID]"),
    ] = None,
    preset: Annotated[PresetName, typer.Option(help="What to measure and decide.")] = PresetName.first_aid,
    every: Annotated[int, typer.Option(min=1, help="Observe the optimizer steps that this number divides.")] = 50,
    guard: Annotated[
        GuardName | None, typer.Option(help="Skip a step that is not finite, or raise: nothing bad is written.")
    ] = None,
    planned_steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps that the run will make.")] = None,
    config: Annotated[  # noqa: ARG001 - its callback has done the work
        Path | None,
        typer.Option(
            is_eager=True, callback=_defaults, help="A pyproject.toml, in place of the next one from here upwards."
        ),
    ] = None,
) -> None:
    """Run a training script as it is, and observe what it trains.

    Options for stethoscope come before the script; all that follows belongs to the script. They may also stand in
    [tool.stethoscope] of pyproject.toml. Under torchrun: stethoscope run torchrun --nproc-per-node 4 train.py.
    """
    from stethoscope.integrations._script._settings import Settings

    command, itself = _command(target, arguments or [], module=module)
    settings = Settings(
        target=target,
        to=to or _folder(target, arguments or [], module=module),
        preset=preset.value,
        every=every,
        guard=guard.value if guard else None,
        planned_steps=planned_steps,
        pid=os.getpid() if itself else None,
        start=str(Path.cwd()),
    )
    _become(command, settings.environment())


def _command(target: str, arguments: list[str], *, module: bool) -> tuple[list[str], bool]:
    """Return what to run, and whether it is Python code that we run ourselves."""
    path = Path(target)
    found = None if module or path.suffix == ".py" or path.is_dir() else shutil.which(target)
    if found:
        return [found, *arguments], False
    if not module and not path.exists():
        raise typer.BadParameter(
            f"There is no script {target!r} here ({Path.cwd()}), and no command of that name. For a module: "
            f"stethoscope run -m {target.removesuffix('.py').replace('/', '.')}",
            param_hint="TARGET",
        )
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001 - what multiprocessing uses
    flags += ["-u"] if getattr(sys.stdout, "write_through", False) else []
    return [sys.executable, *flags, *(["-m"] if module else []), target, *arguments], True


def _folder(target: str, arguments: list[str], *, module: bool) -> str:
    """Choose a run folder that all ranks agree on."""
    script = next((each for each in (target, *arguments) if each.endswith(".py")), target)
    name = script.rpartition(".")[2] if module else Path(script).resolve().stem
    now = datetime.now().astimezone()
    # ranks that torchrun has started do not know when their neighbours began, but who started them; runs of a sweep
    # may begin within one second
    stamp = f"{now:%Y%m%d}-{os.getppid()}" if "RANK" in os.environ else f"{now:%Y%m%d-%H%M%S}-{os.getpid()}"
    return f"runs/{name}-{stamp}"


def _become(command: list[str], environment: dict[str, str]) -> NoReturn:
    """Be the command from here on: its process, signals, exit code and output are its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":  # there, exec starts a second process and ends this one at once
        raise SystemExit(subprocess.run(command, env=environment, check=False).returncode)  # noqa: S603 - the user's own command line
    os.execve(command[0], command, environment)  # noqa: S606 - the same


def _upwards() -> list[Path]:
    return [Path.cwd(), *Path.cwd().parents]


def _table(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise typer.BadParameter(f"{path} could not be read: {error}") from error
    tools = content.get("tool", {})
    table = tools.get("stethoscope", {}) if isinstance(tools, dict) else {}
    if not isinstance(table, dict):
        raise typer.BadParameter(f"[tool.stethoscope] in {path} must be a table, got {table!r:.80}.")
    return {name.replace("-", "_"): value for name, value in table.items()}
