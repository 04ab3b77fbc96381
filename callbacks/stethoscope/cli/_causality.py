"""`stethoscope audit causality`: measures a model's look-ahead; for a CI job."""

from __future__ import annotations

import json
import traceback
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
    arguments: Annotated[
        str, typer.Option(help="Keyword arguments to call it with, as JSON, e.g. '{\"causal\": true}'.")
    ] = "{}",
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
    from stethoscope.cli._model import load

    torch.manual_seed(seed)
    try:
        model = load(factory, arguments)
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
    except Exception as error:  # of the user's code; python's own exit code for it, 1, would say that the model leaks
        traceback.print_exc()
        raise typer.Exit(2) from error
    if as_json:
        typer.echo(json.dumps(_plain(report), indent=2))
    else:
        from rich.console import Console

        Console(soft_wrap=True).print(report)
    raise typer.Exit(0 if report.ok else 1)


def _input(shape: str, dtype: str) -> Any:
    import torch

    if dtype not in _DTYPES:
        raise ValueError(f"Unknown --dtype {dtype!r}. Known: {list(_DTYPES)}.")
    kind = getattr(torch, dtype)
    try:
        sizes = [int(size) for size in shape.split(",")]
    except ValueError as error:
        raise ValueError(f"--shape {shape!r} is not a list of whole numbers such as 2,1,8000.") from error
    if min(sizes) < 1:
        raise ValueError(f"--shape {shape!r}: every size must be 1 or more.")
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
