"""`stethoscope audit causality`: measures a model's look-ahead; for a CI job."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from stethoscope.audits import CausalityReport

_DTYPES = ("float32", "float64", "complex64", "complex128", "int64")


def causality(
    factory: Annotated[
        str, typer.Argument(help="package.module:name of a model, or of a function or class that makes one.")
    ],
    shape: Annotated[list[str], typer.Option(help="Shape of the input, e.g. 2,1,8000. Again for further inputs.")],
    time_axis: Annotated[int, typer.Option(help="Axis of the input along which time runs.")] = -1,
    out_time_axis: Annotated[int | None, typer.Option(help="The same of the output; found by itself.")] = None,
    allowed: Annotated[int, typer.Option(help="Declared look-ahead, in input steps.")] = 0,
    mode: Annotated[list[str] | None, typer.Option(help="eval or train; both by default.")] = None,
    forward: Annotated[str | None, typer.Option(help="Method to call instead of the model itself.")] = None,
    output: Annotated[str | None, typer.Option(help="Key or index of the output to judge; all by default.")] = None,
    dtype: Annotated[str, typer.Option(help="Type of the input, e.g. complex64.")] = "float32",
    sample_rate: Annotated[float | None, typer.Option(help="Input steps per second, for milliseconds.")] = None,
    budget: Annotated[int | None, typer.Option(help="Largest number of forward passes.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the model's weights and of the input.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Measure how far a model looks ahead. Exit code 0: within what is allowed, 1: it leaks, 2: it cannot be judged."""
    import torch

    from stethoscope import audits

    torch.manual_seed(seed)
    try:
        model = _made(factory)
        inputs = tuple(_input(one, dtype) for one in shape)
        report = audits.causality(
            model,
            inputs,
            time_axis=time_axis,
            out_time_axis=out_time_axis,
            allowed=allowed,
            modes=tuple(mode or ("eval", "train")),
            forward=forward,
            output=int(output) if output is not None and output.isdecimal() else output,
            sample_rate=sample_rate,
            budget=budget,
        )
    except (ValueError, TypeError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(_plain(report), indent=2))
    else:
        from rich.console import Console

        Console(soft_wrap=True).print(report)
    raise typer.Exit(0 if report.ok else 1)


def _made(factory: str) -> Any:
    """Import what `package.module:name` says and call it where it is not a model yet."""
    from torch import nn

    path, separator, name = factory.partition(":")
    if not separator or not path or not name:
        raise ValueError(f"{factory!r} is not of the form package.module:name.")
    # As `python -m` does: the user's own code lies where they stand.
    sys.path.insert(0, str(Path.cwd()))
    try:
        found: Any = importlib.import_module(path)
    except ImportError as error:
        raise ValueError(
            f"Cannot import {path!r}: {error}. Run from the folder that holds it, or install it."
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{path!r} has no {name!r}.")
        found = getattr(found, part)
    return found if isinstance(found, nn.Module) else found()


def _input(shape: str, dtype: str) -> Any:
    import torch

    if dtype not in _DTYPES:
        raise ValueError(f"Unknown --dtype {dtype!r}. Known: {list(_DTYPES)}.")
    kind = getattr(torch, dtype)
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError as error:
        raise ValueError(f"--shape {shape!r} is not a list of whole numbers such as 2,1,8000.") from error
    return torch.randint(0, 2, sizes) if dtype == "int64" else torch.randn(sizes, dtype=kind)


def _plain(report: CausalityReport) -> dict[str, Any]:
    return {
        "title": report.title,
        "ok": report.ok,
        "causal": report.causal,
        "lookahead": report.lookahead,
        "lookahead_ms": report.lookahead_ms,
        "culprit": report.culprit,
        "batch_leak": report.batch_leak,
        "passes": report.passes,
        "per_mode": {
            name: {
                "ok": verdict.ok,
                "lookahead": verdict.lookahead,
                "culprit": verdict.culprit,
                "batch_leak": verdict.batch_leak,
                "where": verdict.where,
                "size": verdict.size,
            }
            for name, verdict in report.per_mode.items()
        },
        "findings": [
            {
                "code": finding.code,
                "severity": finding.severity,
                "module": finding.module,
                "phase": finding.phase,
                "message": finding.message,
                "advice": finding.advice,
                "evidence": dict(finding.evidence),
            }
            for finding in report.findings
        ],
    }
