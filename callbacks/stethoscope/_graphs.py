"""Whether the graph of a logged tensor reaches back over several steps: then each of them is kept in memory.

Autograd numbers its nodes in the order in which a thread makes them. The number at the end of each step tells of which
step a node is. A loss that was logged with its graph has nodes of one step; a sum, or a mean of a list, has those of many.
No tensor is read, and nodes are recognised by what they offer, as in `_metrics`.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import deque
from typing import Any

MARKS = 4
"""Ends of steps that are remembered."""
STEPS = 3
"""Steps that the nodes must be of. Two are also those of a loss from before a step to which something of after it is added."""
NODES = 32
"""Most nodes looked at, the nearest first, about 30 us: sums and means stand at the end of a graph."""
WIDE = 16
"""Most inputs looked at of one node, the latest: a stack of a whole epoch's losses has thousands."""


class _Ends(threading.local):
    """Numbers of the first node after each of the last steps; each thread counts for itself."""

    def __init__(self) -> None:
        self.marks: deque[int] = deque(maxlen=MARKS)


_ENDS = _Ends()


def mark(autograd: Any) -> None:
    """Note that a step ends here.

    Args:
        autograd: `torch.autograd`; without its private counter nothing is ever found.
    """
    if (count := getattr(autograd, "_get_sequence_nr", None)) is not None:
        _ENDS.marks.append(count())


def of_several_steps(last: Any) -> bool:
    """Whether the graph that ends with a node holds nodes of at least three of the last steps."""
    marks = list(_ENDS.marks)
    if last is None or len(marks) < STEPS:
        return False
    queue, seen, steps = deque([last]), {last}, set[int]()
    for _ in range(NODES):
        if not queue:
            break
        node = queue.popleft()
        # leaves have the largest number there is, and lead nowhere
        inputs = getattr(node, "next_functions", ())
        number = getattr(node, "_sequence_nr", None)
        if number is not None and inputs:
            # before all that is remembered, or from a thread of its own (DataParallel), is nothing that can be told
            if (made := number()) < marks[0]:
                continue
            steps.add(bisect_left(marks, made + 1))
            if len(steps) >= STEPS:
                return True
        for each, _ in inputs[-WIDE:]:
            if each is not None and each not in seen:
                seen.add(each)
                queue.append(each)
    return False
