"""Everything on docs/cost.md by one command: ours and peers, growth, two ranks, and compiled models.

    python tests/benchmarks/bench_all.py [--pairs 30] [--only overhead growth ranks compile]

Runs bench_overhead.py with --peers, bench_growth.py, bench_ranks.py and bench_compile.py one after the other, since they would slow
each other down, and fails if one of them did.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

PARTS = {"overhead": ["--peers"], "growth": [], "ranks": [], "compile": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    arguments = parser.parse_args()
    failed = []
    for part in arguments.only:
        script = Path(__file__).with_name(f"bench_{part}.py")
        print(f"\n# {script.name}", flush=True)
        command = [sys.executable, str(script), "--pairs", str(arguments.pairs), *PARTS[part]]
        if subprocess.run(command, check=False).returncode:
            failed.append(script.name)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}.")


if __name__ == "__main__":
    main()
