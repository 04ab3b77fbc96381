"""One thread: the models are tiny, and the machine may be busy."""

import gc
import sys

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    """What one test compiles or observes without closing is no business of the next: both are process-wide in torch."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.utils.counters.clear()
        if dynamo.eval_frame._stance.stance != "default":
            gc.collect()
            compiled = sys.modules.get("stethoscope.probes._compiled")
            if compiled is not None and compiled._ours:  # a monitor that is still alive and was never closed
                compiled._lookers.clear()
                compiled._restore()
