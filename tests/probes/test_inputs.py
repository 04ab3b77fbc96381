import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from stethoscope.probes import Inputs


def read(attachment, given=None):
    return {key.name: float(value) for key, value in attachment.read(given or {}).items()}


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU())


def test_the_statistics_are_those_of_numpy_over_all_calls_of_a_step(model):
    attachment = Inputs().attach(model)
    attachment.arm(True, "train")
    batches = [torch.randn(4, 8, dtype=torch.float32) * scale + 1 for scale in (1.0, 3.0)]
    for batch in batches:
        model(batch)
    found = read(attachment)
    both = np.stack([batch.double().numpy() for batch in batches])
    assert found["input/mean"] == pytest.approx(both.mean())
    assert found["input/rms"] == pytest.approx(np.sqrt((both**2).mean()))
    assert found["input/absmax"] == pytest.approx(np.abs(both).max())
    rough = np.sqrt((np.diff(both, axis=-1) ** 2).mean() / (both**2).mean())
    assert found["input/roughness"] == pytest.approx(rough)
    assert found["input/length"] == 8
    assert found["input/constant"] == 0
    assert read(attachment) == {}


def test_constant_items_are_counted(model):
    attachment = Inputs().attach(model)
    attachment.arm(True, "train")
    x = torch.randn(4, 8)
    x[0], x[1] = 0, 7
    model(x)
    assert read(attachment)["input/constant"] == 0.5


def test_phases_are_kept_apart_and_disarmed_calls_ignored(model):
    attachment = Inputs().attach(model)
    attachment.arm(True, "train")
    model(torch.ones(2, 8))
    attachment.arm(True, "val")
    model(5 * torch.ones(2, 8))
    assert read(attachment)["input/rms"] == 5
    attachment.arm(True, "train")
    assert read(attachment)["input/rms"] == 1
    attachment.arm(False, "train")
    model(torch.ones(2, 8))
    attachment.arm(True, "train")
    assert read(attachment) == {}


def test_keywords_nested_and_odd_tensors_are_named_by_path():
    class Model(nn.Module):
        def forward(self, x, *, mask=None, extra=None):
            return x["audio"].sum()

    attachment = Inputs().attach(model := Model())
    attachment.arm(True, "train")
    model(
        {"audio": torch.ones(2, 9, dtype=torch.float16), "tokens": torch.arange(6).view(2, 3)},
        mask=torch.ones(2, 9, dtype=torch.bool),
        extra=[torch.ones(3, 3, dtype=torch.complex64), torch.zeros(0, 3), torch.tensor(1.0)],
    )
    found = read(attachment)
    assert found["input/rms"] == 1
    assert found["input/length.0.tokens"] == 3
    assert "input/rms.0.tokens" not in found
    assert "input/rms.mask" not in found
    assert found["input/absmax.extra.0"] == 1


def test_a_model_without_forward_is_measured_by_its_batch():
    class Extractor(nn.Module):
        def extract_features(self, x):
            return x

    attachment = Inputs().attach(Extractor())
    attachment.arm(True, "train")
    found = read(attachment, {"batch/0": torch.full((2, 4), 3.0), "loss": torch.ones(2, 4)})
    assert found["input/rms"] == 3
    assert len(found) == 6


def test_unsigned_images_count_and_nan_is_passed_on(model):
    attachment = Inputs().attach(nn.Identity())
    attachment.arm(True, "train")
    attachment.take([("0", torch.full((2, 3, 4), 255, dtype=torch.uint8))])
    assert read(attachment)["input/rms"] == 255
    attachment.take([("0", torch.full((2, 3), math.nan))])
    assert math.isnan(read(attachment)["input/rms"])


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")
def test_nested_and_sparse_tensors_are_left_out():
    attachment = Inputs().attach(nn.Identity())
    attachment.arm(True, "train")
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)])
    attachment.take([("0", nested), ("1", torch.eye(3).to_sparse()), ("2", torch.ones(2, 3))])
    assert read(attachment)["input/rms"] == 1


def test_no_hook_waits_for_the_device():
    with torch.device("meta"):
        model, x = nn.Linear(8, 2), torch.empty(3, 8)
    attachment = Inputs().attach(model)
    attachment.arm(True, "train")
    model(x)
    model(x)
    assert all(value.is_meta for value in attachment.read({}).values())


def test_outputs_random_state_and_copies_are_untouched_and_detach_leaves_nothing(model):
    x = torch.randn(2, 8)
    expected, state = model(x), torch.get_rng_state()
    attachment = Inputs().attach(model)
    attachment.arm(True, "train")
    assert torch.equal(model(x), expected)
    assert torch.equal(torch.get_rng_state(), state)
    twin = copy.deepcopy(model)
    read(attachment)
    twin(x)
    assert read(attachment) == {}
    attachment.detach()
    attachment.detach()
    assert not model._forward_pre_hooks
    model(x)
    assert read(attachment) == {}


def test_what_one_covers():
    assert Inputs(every=1).covers(Inputs(every=7))
    assert not Inputs(every=7).covers(Inputs(every=1))


@pytest.mark.parametrize(("width", "share"), [(1, 0.0), (7, 0.0), (8, 1.0)])
def test_items_of_a_few_values_do_not_count_as_constant(width, share):
    attached = Inputs().attach(nn.Linear(width, 1))
    attached.arm(True, "train")
    attached.take([("0", torch.arange(4.0)[:, None].expand(4, width))])
    assert read(attached)["input/constant"] == share
    attached.detach()
