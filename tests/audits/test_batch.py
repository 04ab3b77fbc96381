import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stethoscope import audits


def codes(report):
    return [finding.code for finding in report.findings]


def images(items=4):
    return torch.randint(0, 256, (items, 3, 16, 16), generator=torch.Generator().manual_seed(0)).float()


HEALTHY = {
    "normalised images": lambda: (images() / 255 - 0.45) / 0.22,
    "bytes": lambda: images().to(torch.uint8),
    "features": lambda: torch.randn(32, 20),
    "images, labels and names": lambda: (images() / 255, torch.tensor([3, 3, 3, 3]), ["a", "b"]),
    "tokens and mask": lambda: {"x": torch.randn(2, 5), "ids": torch.zeros(2, 9, dtype=torch.long), "mask": torch.ones(2, 9)},
    "class maps as float": lambda: torch.randint(0, 5, (4, 1, 16, 16)).float(),
    "targets": lambda: {"x": torch.randn(4, 3), "y": torch.ones(4)},
    "half precision": lambda: torch.randn(4, 8).half(),
    "spectra": lambda: torch.randn(4, 9, dtype=torch.complex64),
    "a vector": lambda: torch.randn(9),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_batches_give_no_finding(name):
    report = audits.batch(HEALTHY[name]())
    assert report.findings == (), str(report)


def test_unscaled_images_are_found_and_a_stated_range_decides():
    assert codes(audits.batch(images())) == ["input-range"]
    assert audits.batch(images(), value_range=(0, 255)).ok
    assert codes(audits.batch(images() / 255 * 2, value_range=(0, 1))) == ["input-range"]


def test_nan_constant_and_repeated_items_are_named():
    x = torch.randn(5, 6)
    x[1] = 0
    x[4] = x[2]
    x[3, 0] = float("nan")
    report = audits.batch({"features": x})
    assert codes(report) == ["input-nonfinite", "input-constant", "input-duplicate"]
    assert report.tensors[0].constant == (1,)
    assert report.tensors[0].repeated == (4,)
    assert all("'features'" in finding.message for finding in report.findings)


def test_dead_features_and_double_precision_are_mentioned():
    x = torch.randn(16, 4, dtype=torch.float64)
    x[:, 2] = 7
    report = audits.batch(x)
    assert codes(report) == ["input-dtype", "input-constant"]
    assert report.ok


def test_a_batch_without_values_is_refused_in_words():
    for nothing in (torch.zeros(0, 4), [], {"a": "text"}, torch.zeros(3, device="meta")):
        with pytest.raises(ValueError, match="no values"):
            audits.batch(nothing)
    with pytest.raises(ValueError, match="value_range"):
        audits.batch(torch.ones(2, 2), value_range=(1, 0))


@given(st.lists(st.lists(st.floats(), min_size=3, max_size=3), min_size=1, max_size=12))
def test_any_values_get_a_verdict(rows):
    report = audits.batch(torch.tensor(rows, dtype=torch.float64))
    (facts,) = report.tensors
    assert 0 <= facts.nonfinite <= 3 * len(rows)
    assert len(facts.constant) + len(facts.repeated) <= len(rows)


@pytest.mark.parametrize(
    "labels",
    [
        torch.eye(100)[torch.arange(16) % 3],
        torch.tensor([[0.0, 1.0, 1.0]] * 8 + [[1.0, 1.0, 1.0]] * 8),
        torch.tensor([[3.0, 1.0]] * 16),
        torch.ones(16, 12).tril(),
    ],
    ids=["one-hot", "multi-hot", "categories", "padding mask"],
)
def test_labels_and_codes_are_no_repeated_signals(labels):
    report = audits.batch((torch.randn(16, 40), labels))
    assert [finding.code for finding in report.findings if finding.severity != "info"] == []


def test_a_map_of_classes_is_no_image():
    assert audits.batch({"segmentation": torch.randint(0, 150, (4, 1, 32, 32)).float()}).ok


def test_features_of_zeros_are_still_found():
    assert [finding.code for finding in audits.batch(torch.zeros(4, 40)).findings] == ["input-constant"]


def test_tensors_without_dense_storage_are_passed_over():
    sparse = torch.eye(4).to_sparse()
    assert len(audits.batch((torch.randn(4, 40), sparse)).tensors) == 1
    with pytest.raises(ValueError, match="dense"):
        audits.batch(sparse)
