from __future__ import annotations

import torch

from stethoscope.probes._variety import Variety


def test_what_is_counted_lies_where_the_batches_lie():
    """A device without memory stands for one that is not the host: numbers of two devices cannot be stacked."""
    variety = Variety()
    for _ in range(12):
        variety.take(torch.empty(8, 16, device="meta"), "train")
    counts = variety.read()
    assert counts is not None
    assert (counts.device.type, counts.shape) == ("meta", (5,))
