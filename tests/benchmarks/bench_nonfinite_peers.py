"""Who names the culprit? `audits.nonfinite` beside other tools, on the runs of tests/audits/nonfinite_corpus.

    pip install transformers torchlens torch-audit; python tests/benchmarks/bench_nonfinite_peers.py [--each]

A tool that is not installed is shown as such. `--each` prints every answer that is not right. What counts:

- Every tool gets the same fresh run, in the grad mode and autocast of the case. Tools that see forward passes only get the
  loss as part of a forward pass; without a loss, backward tools get the sum of the output. Trainings that the optimizer
  spoils are left out: no peer looks there.
- An answer is right when the line of code or, where none of the corpus is named, the module is the guilty one. For a weight
  or buffer its name, its owner or the first line that computes with it is right; for an input, saying so or the first
  line that computes with it. `stethoscope` has to be right about origin, module, operation, line and parameter at once.
- TorchLens is asked twice, `find_nan` and, where that finds nothing and there is a loss, `bisect_nan_backward`.
- Nothing said about a fault is silent, an exception of the tool's own is failed, anything said about a healthy run is a
  false alarm. Of torch-audit only errors count, not its advice.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import re
import sys
import time
import traceback
import warnings
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from stethoscope.audits import nonfinite

sys.path.insert(0, str(Path(__file__).parents[1] / "audits"))
from nonfinite_corpus import CASES, Case, Run

if TYPE_CHECKING:
    from collections.abc import Callable

TESTS = str(Path(__file__).parents[1])


class Answer(NamedTuple):
    """What a tool names, as far as it does."""

    line: str = ""
    module: str | None = None
    parameter: str | None = None
    input: bool = False


class WithLoss(nn.Module):
    """The loss as the end of a forward pass."""

    def __init__(self, run: Run):
        super().__init__()
        self.model, self.run = run.model, [run]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output, loss = self.model(*args, **kwargs), self.run[0].loss
        return output if loss is None else loss(output)


def scalar(run: Run, output: Any) -> torch.Tensor:
    if run.loss is not None:
        return run.loss(output)
    leaves = tree_leaves(vars(output) if dataclasses.is_dataclass(output) else output)
    floats = [each for each in leaves if isinstance(each, torch.Tensor) and each.requires_grad]
    return sum((each.abs() if each.is_complex() else each).float().sum() for each in floats)


def code(place: str) -> str:
    """The line of code at `file:number`; none when that is only where this file calls the model."""
    file, _, number = place.rpartition(":")
    return Path(file).read_text().splitlines()[int(number) - 1].strip() if file and file != __file__ else ""


# -- the tools: an answer, or None when nothing is found ---------------------------------------------------------------


def detect_anomaly(run: Run) -> Answer | None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with torch.autograd.detect_anomaly():
                loss = scalar(run, run.model(*run.args, **run.kwargs))
                if isinstance(loss, torch.Tensor) and loss.requires_grad:
                    loss.backward()
        except RuntimeError as error:
            if "returned nan values" not in str(error):
                raise
            frames = [line for each in said for line in str(each.message).split('File "') if line.startswith(TESTS)]
            return Answer(line=frames[-1].splitlines()[1].strip() if frames else "")
    return None


def debug_underflow_overflow(run: Run) -> Answer | None:
    from transformers.debug_utils import DebugUnderflowOverflow

    model, printed = WithLoss(run), io.StringIO()
    DebugUnderflowOverflow(model)
    with contextlib.redirect_stdout(printed):
        try:
            model(*run.args, **run.kwargs)
        except ValueError as error:
            if "DebugUnderflowOverflow" not in str(error):
                raise
    text, *_ = printed.getvalue().partition("Detected inf/nan")
    bad = re.findall(r"^(\S+) has (?:nans|infs)", text, re.MULTILINE)
    if not bad:
        return None
    headers = re.findall(r"^ {8,}(\S+ )?([A-Z]\w*)$", printed.getvalue(), re.MULTILINE)
    module = headers[-1][0].strip().removeprefix("model").removeprefix(".") if headers else ""
    if bad[0].startswith("input"):
        return Answer(input=True)
    return Answer(module=module, parameter=None if bad[0].startswith("output") else f"{module}.{bad[0]}".lstrip("."))


def torchlens(run: Run) -> Answer | None:
    import torchlens as tl

    model = WithLoss(run)
    arguments = list(run.args), dict(run.kwargs) or None
    found = tl.debug.find_nan(model, arguments[0], input_kwargs=arguments[1]).first_bad_thing
    if not found.found and run.loss is not None:
        capture = tl.options.CaptureOptions(save_grads=True, backward_ready=True)
        trace = tl.trace(model, arguments[0], input_kwargs=arguments[1], capture=capture)
        trace.log_backward(trace[trace.output_layers[0]].out)
        found = tl.debug.bisect_nan_backward(trace).first_bad_thing
    if not found.found:
        return None
    module = (found.module or "").removeprefix("model").removeprefix(".").partition(":")[0]
    return Answer(code(found.source_line or ""), module or None, input="op='none'" in (found.message or ""))


def torch_audit(run: Run) -> Answer | None:
    from torch_audit import Auditor, Severity

    auditor = Auditor(run.model, every_n_steps=1, reporters=[], suppress_internal_errors=True)
    with auditor:
        auditor.audit_static()
        loss = scalar(run, auditor.forward(*run.args, **run.kwargs))
        if isinstance(loss, torch.Tensor) and loss.requires_grad:
            auditor.backward(loss)
    for finding in auditor.finish().findings:
        if finding.severity is Severity.ERROR:
            name = re.search(r"'(.+?)'", finding.message)
            return Answer(parameter=name.group(1) if name else None, module=finding.module_path)
    return None


PEERS: dict[str, tuple[str, Callable[[Run], Answer | None]]] = {
    "detect_anomaly": ("torch", detect_anomaly),
    "DebugUnderflow": ("transformers", debug_underflow_overflow),
    "torch-audit": ("torch_audit", torch_audit),
    "TorchLens": ("torchlens", torchlens),  # last: it leaves torch's functions wrapped
}


# -- the verdicts ------------------------------------------------------------------------------------------------------


def ours(case: Case) -> tuple[str, str, tuple[str, ...]]:
    """Verdict, what was said, and the lines at which the fault is first seen."""
    run = case()
    with run.context():
        report = nonfinite(run.model, *run.args, loss=run.loss, **run.kwargs)
    said = f"{report.origin} {report.module!r} {report.operation} {report.parameter} {report.source}"
    lines = tuple(place.source.rpartition(": ")[2] for place in (report.first_inf, report.first_nan) if place)
    if case.truth is None:
        return ("false alarm" if report.findings else "right"), said, lines
    culprit = dataclasses.replace(case.truth, samples=None, call=None, first_inf=None, first_nan=None)
    wrong = culprit.wrong(report)
    return "right" if not wrong else "wrong" if report.findings else "silent", said, lines


def verdict(case: Case, answer: Answer | None, first: tuple[str, ...]) -> str:
    truth = case.truth
    if truth is None:
        return "right" if answer is None else "false alarm"
    if answer is None:
        return "silent"
    guilty = truth.line.split("|") if truth.line else [line for line in first if line]
    modules = [name for name in (truth.module or "").split("|") if name]
    owned = "parameter" in truth.origin or "buffer" in truth.origin
    right = (
        any(part in answer.line for part in guilty if answer.line)
        or (not answer.line and answer.module in modules)
        or (owned and (answer.module in modules or (answer.parameter or "-") in (truth.parameter or "").split("|")))
        or (truth.origin == "input" and answer.input)
    )
    return "right" if right else "wrong"


def ask(peer: Callable[[Run], Answer | None], case: Case, first: tuple[str, ...]) -> tuple[str, str]:
    run = case()
    try:
        with run.context():
            answer = peer(run)
    except Exception as error:  # a model's own exception is what a user of the tool would see, too
        return "failed", traceback.format_exception_only(error)[-1].strip()
    return verdict(case, answer, first), str(answer)


def kind(case: Case) -> str:
    return case.truth.origin.partition("|")[0] if case.truth else "healthy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", action="store_true", help="print every answer that is not right")
    each = parser.parse_args().each
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    installed = {name: peer for name, (package, peer) in PEERS.items() if find_spec(package) is not None}
    names = ["stethoscope", *installed]
    total = Counter(kind(case) for _, case in CASES)
    right, verdicts, seconds = Counter(), Counter(), Counter()
    first: dict[str, tuple[str, ...]] = {}
    ours(CASES[0][1])  # torch's own first call is nobody's time
    for name in names:
        for model, case in CASES:
            start = time.process_time()
            if name == "stethoscope":
                result, said, first[case.name] = ours(case)
            else:
                result, said = ask(installed[name], case, first[case.name])
            seconds[name] += time.process_time() - start
            right[kind(case), name] += result == "right"
            verdicts[case.truth is None, result, name] += 1
            if each and result != "right":
                print(f"{name:<16}{result:<12}{model}: {case.name}: {said[:200]}", flush=True)
    width = 16
    print(f"\n{'':<22}{'runs':>5}" + "".join(f"{name:>{width}}" for name in names))
    for origin, number in sorted(total.items(), key=lambda item: (item[0] == "healthy", -item[1])):
        print(f"{origin + ', right':<22}{number:>5}" + "".join(f"{right[origin, name]:>{width}}" for name in names))
    faults = total.total() - total["healthy"]
    for healthy, number, results in (
        (False, faults, ("right", "wrong", "silent", "failed")),
        (True, total["healthy"], ("false alarm", "failed")),
    ):
        for result in results:
            cells = "".join(f"{verdicts[healthy, result, name]:>{width}}" for name in names)
            print(f"{('healthy' if healthy else 'faults') + ', ' + result:<22}{number:>5}{cells}")
    print(f"{'CPU seconds':<22}{'':>5}" + "".join(f"{seconds[name]:>{width}.1f}" for name in names))
    for name, (package, _) in PEERS.items():
        if name not in installed:
            print(f"{name}: not installed ({package})")


if __name__ == "__main__":
    main()
