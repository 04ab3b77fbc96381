import torch
from torch import nn
from torch.nn.utils import prune

from stethoscope.probes import Density


def read(attachment, phase="train"):
    attachment.arm(True, phase)
    return {(key.name, key.module): float(value) for key, value in attachment.read({}).items()}


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(8, 16)
        self.conv = nn.Conv1d(4, 8, 3)
        self.norm = nn.LayerNorm(8)


def test_elements_and_blocks_are_measured_per_matrix():
    model = Two()
    with torch.no_grad():
        model.dense.weight[:8, :4] = 0  # one block of 8 x 4 out of four
        model.conv.weight[:2] = 0
        model.dense.weight[8, 4] = 0  # in a block that is not empty
    found = read(Density(block=(8, 4)).attach(model))
    assert found["density/elements", "dense.weight"] == 95 / 128
    assert found["density/blocks", "dense.weight"] == 0.75
    assert found["density/elements", "conv.weight"] == 0.75
    assert found["density/blocks", "conv.weight"] == 1.0
    assert found["density/weights", "conv.weight"] == 96
    assert {module for _, module in found} == {"dense.weight", "conv.weight"}


def test_the_state_when_attached_comes_once():
    model = Two()
    model.dense.weight.data[::2, ::2] = 0  # pruned
    nn.init.zeros_(model.conv.weight[:2])  # initialised so
    attachment = Density().attach(model)
    nn.init.ones_(model.dense.weight)
    first = read(attachment)
    assert first["density/initial", "dense.weight"] == 0.75
    assert first["density/initial", "conv.weight"] == 1.0
    assert first["density/elements", "dense.weight"] == 1.0
    assert {name for name, _ in read(attachment)} == {"density/elements"}


def test_masks_of_torch_pruning_count_before_they_are_applied():
    model = Two()
    attachment = Density().attach(model)
    prune.random_unstructured(model.dense, "weight", amount=32)  # replaces the parameter while attached
    found = read(attachment)
    assert found["density/elements", "dense.weight"] == 0.75
    prune.remove(model.dense, "weight")
    assert read(attachment)["density/elements", "dense.weight"] == 0.75


def test_masks_of_parametrisations_count():
    class Masked(nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.register_buffer("mask", torch.ones(shape))

        def forward(self, weight):
            return weight * self.mask

    model = Two()
    nn.utils.parametrize.register_parametrization(model.dense, "weight", Masked((16, 8)))
    model.dense.parametrizations.weight[0].mask[:4] = 0
    assert read(Density().attach(model))["density/elements", "dense.weight"] == 0.75


def test_patterns_choose_and_nothing_is_said_aloud():
    attachment = Density(weights=("conv*",)).attach(Two())
    assert {module for _, module in read(attachment)} == {"conv.weight"}
    assert attachment.notes == []
    lonely = Density(weights=("absent*",)).attach(Two())
    assert read(lonely) == {}
    assert [note.code for note in lonely.notes] == ["probe-read-nothing"]


def test_only_training_is_measured_and_only_while_armed():
    attachment = Density().attach(Two())
    assert read(attachment, "val") == {}
    attachment.arm(False, "train")
    assert attachment.read({}) == {}
    assert read(attachment)
    attachment.detach()
    attachment.detach()
    assert read(attachment) == {}


def test_no_reading_waits_for_the_device():
    with torch.device("meta"):
        model = Two()
    attachment = Density(block=(8, 4)).attach(model)
    attachment.arm(True, "train")
    assert all(value.is_meta for value in attachment.read({}).values())


def test_odd_weights_are_measured():
    model = nn.ParameterDict(
        {
            "bfloat": nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16)),
            "nan": nn.Parameter(torch.full((4, 4), float("nan"))),
            "empty": nn.Parameter(torch.zeros(4, 0)),
            "vector": nn.Parameter(torch.ones(4)),
            "row": nn.Parameter(torch.ones(1, 4)),
            "transposed": nn.Parameter(torch.ones(4, 8).t()),
        }
    )
    found = read(Density(block=(2, 2)).attach(model))
    assert {module for _, module in found} == {"bfloat", "nan", "transposed"}
    assert all(value == 1.0 for (name, _), value in found.items() if name != "density/weights")


def test_lazy_modules_are_measured_once_they_have_a_shape():
    model = nn.LazyLinear(4)
    attachment = Density().attach(model)
    assert read(attachment) == {}
    model(torch.ones(2, 3))
    assert read(attachment)["density/elements", "weight"] == 1.0


def test_what_one_covers():
    assert Density(every=1).covers(Density(every=50))
    assert Density(block=(8, 4)).covers(Density())
    assert not Density().covers(Density(block=(8, 4)))
    assert not Density(every=50).covers(Density(every=1))
    assert not Density(weights=("a*",)).covers(Density())
    assert Density(weights=["a*"]).covers(Density(weights=("a*",)))
