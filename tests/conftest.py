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
            gc.collect()  # a monitor that was dropped without `close`, and holds itself
        left = dynamo.eval_frame._stance.stance
        torch.compiler.set_stance("default")  # so that one test fails, and not all that come after it
        assert left == "default", "This test has left a monitor open, or a stance of its own."
