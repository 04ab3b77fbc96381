"""All of docs/cost.md by one command: ours and peers, growth, two ranks, and compiled models.

    python tests/benchmarks/bench_all.py [--pairs 30] [--only overhead growth ranks compile] [--write]

Runs bench_overhead.py with --peers, bench_growth.py, bench_ranks.py and bench_compile.py one after the other, since they would slow
each other down, and fails if one of them did. With --write the tables that they print replace those of docs/cost.md, between
`<!-- begin overhead -->` and `<!-- end overhead -->` and so on.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from itertools import groupby
from pathlib import Path

PARTS = {"overhead": ["--peers"], "growth": [], "ranks": [], "compile": []}
PAGE = Path(__file__).parents[2] / "docs" / "cost.md"


def run(script: Path, arguments: list[str]) -> tuple[bool, list[str]]:
    """Run a benchmark, show what it prints, and return whether it succeeded and its lines."""
    lines = []
    command = [sys.executable, str(script), *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    return process.returncode == 0, lines


def tables(lines: list[str]) -> str:
    """The Markdown tables among the lines."""
    blocks = [list(block) for is_table, block in groupby(lines, lambda line: line.startswith("|")) if is_table]
    return "\n\n".join("\n".join(block) for block in blocks)


def write(part: str, text: str) -> None:
    begin, end = f"<!-- begin {part} -->", f"<!-- end {part} -->"
    page = PAGE.read_text(encoding="utf-8")
    assert begin in page, f"{PAGE} has no {begin}"
    page = re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n\n{text}\n\n{end}", page, flags=re.DOTALL)
    PAGE.write_text(page, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    failed = []
    for part in arguments.only:
        script = Path(__file__).with_name(f"bench_{part}.py")
        print(f"\n# {script.name}", flush=True)
        began = time.monotonic()
        succeeded, lines = run(script, ["--pairs", str(arguments.pairs), *PARTS[part]])
        print(f"# {script.name}: {time.monotonic() - began:.0f} s", flush=True)
        if not succeeded:
            failed.append(script.name)
        elif arguments.write:
            write(part, tables(lines))
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
