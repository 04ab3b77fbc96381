"""The arithmetic of placements, with stand-ins for a device mesh; real ones are in tests/distributed."""

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from stethoscope._shards import local, parts, prefix, tiles


def dtensor(shape, mesh, placements):
    return SimpleNamespace(
        shape=torch.Size(shape), placements=placements, device_mesh=SimpleNamespace(size=lambda axis: mesh[axis])
    )


@pytest.mark.parametrize(
    ("mesh", "placements", "number"),
    [
        ((4,), (Shard(0),), 4),
        ((2, 4), (Replicate(), Shard(0)), 4),
        ((2, 4), (_StridedShard(0, split_factor=4), Shard(0)), 8),
        ((2,), (Replicate(),), 1),
        ((2,), (Partial(),), 1),
    ],
)
def test_replicas_count_once(mesh, placements, number):
    x = dtensor((8, 8), mesh, placements)
    assert parts(x) == number
    assert prefix(x) == ("shard_" if number > 1 else "")


def test_a_plain_tensor_is_whole():
    x = torch.ones(3)
    assert local(x) is x
    assert (parts(x), prefix(x), tiles(x, (2, 2))) == (1, "", True)


@pytest.mark.parametrize(("rows", "tiled"), [(16, True), (12, False), (20, False), (9, False)])
def test_blocks_tile_a_split_matrix_when_they_tile_every_part(rows, tiled):
    assert tiles(dtensor((rows, 8), (2,), (Shard(0),)), (4, 2)) is tiled


def test_columns_that_are_split_are_not_counted_in_blocks():
    assert not tiles(dtensor((16, 8), (2,), (Shard(1),)), (4, 2))
