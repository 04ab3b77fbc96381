"""One rank of a world that tests start: `rank.py RANK WORLD_SIZE`, then one scenario per line on standard input.

A scenario is a function of a test file that is called with the rank, in a process group of its own, and returns JSON.
"""

import importlib.util
import json
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
from torch import distributed

from stethoscope import _reduce


def run(rank: int, world_size: int, line: dict) -> dict:
    spec = importlib.util.spec_from_file_location(Path(line["file"]).stem, line["file"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(line["port"]))
    distributed.init_process_group(line["backend"], rank=rank, world_size=world_size)
    torch.manual_seed(0)
    try:
        return {"result": getattr(module, line["function"])(rank, **line["arguments"])}
    except Exception:
        return {"error": traceback.format_exc()}
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()


def main() -> None:
    rank, world_size = int(sys.argv[1]), int(sys.argv[2])
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of torch's own, about names that it gives up
    logging.getLogger("stethoscope").addHandler(logging.NullHandler())
    _reduce.WAIT_S = (
        30.0  # a busy machine is no reason to keep records apart; scenarios that are about waiting set their own
    )
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        answers.write(json.dumps(run(rank, world_size, json.loads(line))) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
