import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from stethoscope._aside import aside
from stethoscope._protocols import Key
from stethoscope.probes import Inputs


def read(attachment, given=None):
    return {key.name: float(value) for key, value in attachment.read(given or {}).items()}


@pytest.fixture(autouse=True)
def _detached(monkeypatch):
    """What a test attaches is detached after it: an armed probe has compiled code run eagerly, in the whole process."""
    made, attach = [], Inputs.attach

    def keep(self, model):
        made.append(attach(self, model))
        return made[-1]

    monkeypatch.setattr(Inputs, "attach", keep)
    yield
    for attached in made:
        attached.detach()


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
    attachment.detach()


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
    assert len(found) == 7


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


def test_a_pass_inside_of_a_transform_is_left_alone_and_the_next_one_is_read(model):
    attachment = Inputs().attach(model)
    attachment.arm(True, "train")
    torch.func.vmap(model)(torch.ones(3, 8))
    model(torch.full((4, 8), 2.0))
    assert read(attachment)["input/mean"] == 2.0
    attachment.detach()


def test_a_model_that_moves_within_a_step_is_measured_from_there_on(model):
    attachment = Inputs().attach(model)
    attachment.arm(True, "train")
    model(torch.ones(4, 8))
    model.to("meta")(torch.ones(4, 8, device="meta"))
    readings = attachment.read({})
    assert {tensor.device.type for tensor in readings.values()} == {"meta"}
    attachment.detach()


def test_there_are_no_hooks_between_observed_steps(model):
    def hooks():
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())

    attached = Inputs().attach(model)
    assert hooks() == 0
    attached.arm(True, "train")
    assert hooks() == 4  # the model and its parts, until one of them is called, and the layer that data may reach
    model(torch.ones(2, 8))
    read(attached)
    attached.arm(False, "train")
    attached.arm(True, "train")
    assert hooks() == 2
    attached.arm(True, "val")
    assert hooks() == 2  # the layer that data has reached
    attached.arm(False, "train")
    assert hooks() == 0
    attached.arm(True, "train")
    attached.detach()
    assert hooks() == 0


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def extract_features(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_of_a_model_without_forward_the_part_that_is_called_first_is_read():
    attached = Inputs().attach(model := Parts())
    for _ in range(2):
        attached.arm(True, "train")
        model.extract_features(torch.full((2, 8), 3.0))
        found = read(attached, {"batch/0": torch.ones(2, 8)})
        assert found["input/rms"] == found["input/column_rms"] == 3
    attached.arm(True, "val")
    model.layers[1](torch.ones(2, 8))
    assert read(attached) == {}
    attached.detach()


def test_passes_of_audits_checkpointing_and_evaluation_do_not_count(model):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.body = 0, model

        def forward(self, x):
            self.calls += 1
            return self.body(x)

    attached = Inputs().attach(outer := Checkpointed())
    attached.arm(True, "train")
    with aside():
        outer(torch.full((4, 8), 9.0))
    outer.eval()
    outer(torch.full((4, 8), 9.0))
    outer.train()
    x = torch.full((4, 8), 2.0, requires_grad=True)
    checkpoint(outer, x, use_reentrant=False).sum().backward()
    assert outer.calls == 4  # checkpointing calls twice
    found = read(attached)
    assert (found["input/rms"], found["input/column_rms"]) == (2, 2)
    attached.detach()


def test_padding_and_masks_leave_the_level_as_it_is(model):
    attached = Inputs().attach(nn.Identity())
    attached.arm(True, "train")
    x = torch.randn(4, 50)
    attached.take([("0", x)])
    whole = read(attached)
    attached.take([("0", nn.functional.pad(x, (0, 150)))])
    padded = read(attached)
    assert padded["input/rms"] == pytest.approx(whole["input/rms"], rel=1e-5)
    assert padded["input/mean"] == pytest.approx(whole["input/mean"], rel=1e-4)
    attached.take([("0", torch.zeros(4, 50))])
    assert read(attached)["input/rms"] == 0
    attached.detach()


def test_the_tensor_with_values_carries_the_plain_name_wherever_it_stands():
    attached = Inputs().attach(nn.Identity())
    attached.arm(True, "train")
    attached.take([("0", torch.full((4,), 900.0)), ("1", torch.full((4, 20), 2.0))])
    found = read(attached)
    assert (found["input/rms"], found["input/rms.0"]) == (2, 900)
    attached.detach()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(4, 40),
    st.integers(8, 40),
    st.integers(0, 1000),
    st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8, torch.bfloat16]),
)
def test_copies_are_counted_exactly(items, width, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 50, (items, width), generator=generator).to(dtype)
    x = x[torch.randint(items, (items,), generator=generator)]
    distinct = len({tuple(row) for row in x.tolist()})
    attached = Inputs().attach(nn.Identity())
    attached.arm(True, "train")
    attached.take([("0", x)])
    first = read(attached)
    attached.take([("0", x)])
    again = read(attached)
    attached.detach()
    assert first["input/repeated"] == pytest.approx(1 if distinct == 1 else (items - distinct) / items)
    assert first["input/returned"] == 0
    assert again["input/returned"] == float(distinct < items)


def test_with_dropout_a_batch_of_everything_twice_is_meant_and_four_times_is_not():
    attached = Inputs().attach(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.1)))
    attached.arm(True, "train")
    items = torch.randn(8, 8)
    shares = []
    for batch in (items.repeat(2, 1), items.repeat_interleave(2, 0), items.repeat(4, 1), items.repeat_interleave(4, 0)):
        attached.take([("0", batch)])
        shares.append(read(attached)["input/repeated"])
    attached.detach()
    assert shares == [0, 0, 0.75, 0.75]


def test_numbers_beside_an_embedding_are_data():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.city, self.first = nn.Embedding(3, 4), nn.Linear(6, 2)

        def forward(self, numbers, city):
            return self.first(torch.cat([numbers, self.city(city)], -1))

    attached = Inputs().attach(Table())
    attached.arm(True, "train")
    model = attached._model
    model(torch.tensor([[3e4, 1.0]]).expand(8, -1), torch.zeros(8, dtype=torch.long))
    assert float(attached.read({})[Key("input/column_rms", "first")]) == pytest.approx(3e4)
    attached.detach()
