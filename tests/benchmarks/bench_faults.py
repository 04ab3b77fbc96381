"""Precision and recall of `presets.full()` on seeded faults and healthy runs, and of peers on the same.

    python tests/benchmarks/bench_faults.py [--held-out] [--peers written blind_1] [--jobs 2] [--markdown docs/scoreboard.md]
    python tests/benchmarks/bench_faults.py --only dead_relu        # one case, everything that was said

Without `--held-out`, the cases that may be looked at while watches are written. Those held out, in `faults/blind_6` and
`faults/blind_7`, are run once, when the watches are finished. Rules and catalogue: `faults/`, `docs/scoreboard.md`.
"""

from __future__ import annotations

import argparse
import pickle
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from faults import _page
from faults._cost import ratio
from faults._score import Result, judge, run
from faults.cases import CASES, FOLDERS, OBSERVERS, installed


def one(observer: str, case: str) -> Result:
    return run(CASES[case], OBSERVERS[observer]())


def cost(observer: str) -> float:
    return ratio(OBSERVERS[observer])


def again(r: Result) -> Result:
    """Judge what was kept by the truth as it is now."""
    return judge(CASES[r.case], [*r.right, *r.wrong, *r.asides], r.crash, r.seconds)


def command(arguments: argparse.Namespace) -> str:
    """What a reader has to type for the same page."""
    peers = " ".join(["--peers", *arguments.peers])
    flags = [flag for flag, on in (("--held-out", arguments.held_out), (peers, arguments.peers)) if on]
    return " ".join(["python tests/benchmarks/bench_faults.py", *flags, "--jobs 2 --markdown docs/scoreboard.md"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", action="store_true", help="those held out, too")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=FOLDERS,
        default=[],
        help="torch-audit, TorchLens, trainpulse, training-doctor, on the cases of these folders",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--markdown", type=Path, help="write the page to this file")
    parser.add_argument("--resume", type=Path, help="keep results in this file, and take those that it has")
    parser.add_argument("--commit", default="", help="where kept results are from, if not from here")
    parser.add_argument("--only", default="", help="cases whose name contains this, told at length")
    arguments = parser.parse_args()
    names = [n for n, case in CASES.items() if arguments.only in n and (arguments.held_out or not case.held_out)]
    observers = [name for name in OBSERVERS if name == "stethoscope" or arguments.peers]
    present = [name for name in observers if installed(name)]
    few = [name for name in names if CASES[name].folder in arguments.peers]
    cases = {name: names if name == "stethoscope" else few for name in present}
    done: dict[tuple[str, str], Result | float] = {}
    if arguments.resume and arguments.resume.exists():
        kept = pickle.loads(arguments.resume.read_bytes())
        done = {key: again(value) if isinstance(value, Result) else value for key, value in kept.items()}
    with ProcessPoolExecutor(arguments.jobs) as pool:
        keys = [(observer, name) for observer in present for name in cases[observer]]
        todo = {pool.submit(one, *key): key for key in keys if key not in done}
        if not arguments.only:
            todo |= {pool.submit(cost, name): (name, "cost") for name in present if (name, "cost") not in done}
        for job in as_completed(todo):
            done[todo[job]] = job.result()
            if arguments.resume:
                fresh = arguments.resume.with_suffix(".new")
                fresh.write_bytes(pickle.dumps(done))
                fresh.replace(arguments.resume)  # whole at any time, also when cut off
    results = {name: [done[name, case] for case in cases[name]] for name in present}
    if arguments.only:
        for name, found in results.items():
            print(*(_page.at_length(name, result) for result in found), sep="\n")
        return
    costs = {name: done[name, "cost"] for name in present}
    missing = [name for name in observers if name not in present]
    page = _page.page(results, costs, missing, command(arguments), arguments.commit)
    print(page)
    if arguments.markdown:
        arguments.markdown.write_text(page)


if __name__ == "__main__":
    main()
