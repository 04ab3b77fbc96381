import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from stethoscope import audits


def blocks(rows, columns, block, keep, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    grid = torch.zeros(rows // block[0] * (columns // block[1]))
    grid[torch.randperm(grid.numel(), generator=generator)[: round(keep * grid.numel())]] = 1
    grid = grid.view(rows // block[0], -1)
    return weight * grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


@pytest.mark.parametrize("block", [(8, 4), (4, 8), (16, 1), (1, 16), (4, 4), (1, 1)])
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.8])
def test_the_block_shape_is_found(block, keep):
    layer = nn.Linear(192, 192, bias=False)
    layer.weight.data = blocks(192, 192, block, keep)
    (matrix,) = audits.sparsity(layer).matrices
    assert matrix.block == block
    assert matrix.block_density == pytest.approx(keep, abs=0.01)


def test_a_kept_diagonal_does_not_hide_the_blocks():
    layer = nn.Linear(384, 384, bias=False)
    layer.weight.data = blocks(384, 384, (8, 4), 0.3) + torch.eye(384)
    (matrix,) = audits.sparsity(layer).matrices
    assert matrix.block == (8, 4)


def test_sizes_and_targets():
    layer = nn.Linear(384, 1152, bias=False)
    report = audits.sparsity(layer, target=1 / 3)
    assert (report.nonzero, report.target_weights) == (442368, 147456)
    assert report.times_larger == 3.0
    assert "3.0 times" in str(report)
    assert "442368" in str(report)
    assert [finding.code for finding in report.findings] == ["sparsity-missed"]
    layer.weight.data = blocks(1152, 384, (8, 4), 1 / 3)
    report = audits.sparsity(layer, target={"weight": 1 / 3})
    assert report.ok
    assert report.nonzero == 147456
    assert report.times_larger == 1.0
    assert report.dense_bytes == 442368
    assert report.sparse_bytes == 147456 // 32 * (32 + 4)


def test_masks_count_and_dense_models_give_no_finding():
    layer = nn.Linear(16, 16)
    assert audits.sparsity(layer).findings == ()
    prune.ln_structured(layer, "weight", amount=0.5, n=2, dim=0)
    report = audits.sparsity(layer, target=0.5)
    assert report.ok
    assert report.nonzero == 128
    assert audits.sparsity(nn.ReLU()).weights == 0


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"target": 33}, "0 to 1"),
        ({"target": {"other": 0.1}}, "'other' matches no weight matrix. Examined: weight"),
        ({"weights": "other"}, "No weight matrix matches"),
        ({"block": (0, 4)}, "both 1 or more"),
    ],
)
def test_what_cannot_be_examined_says_what_is_legal(asked, message):
    with pytest.raises(ValueError, match=message):
        audits.sparsity(nn.Linear(8, 8), **asked)
    with pytest.raises(ValueError, match="meta device"):
        audits.sparsity(nn.Linear(8, 8, device="meta"))


def test_a_single_pattern_may_be_text():
    assert audits.sparsity(nn.Linear(8, 4), weights="weight").weights == 32
