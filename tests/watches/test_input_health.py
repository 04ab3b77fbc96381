"""Real training loops that give nothing to `step` but the loss."""

import copy
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stethoscope import Monitor, presets
from stethoscope._record import Record
from stethoscope.testing import replay, series
from stethoscope.watches import InputDrift, InputHealth


def train(model, batch, steps=20, validation=None):
    """Findings about inputs, as (code, severity, module)."""
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, watches=[InputHealth(), InputDrift()], every=3, strict=True) as monitor:
        for step in range(steps):
            x = batch(step)
            out = model(*x) if isinstance(x, tuple) else model(x)
            loss = out.float().square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss.detach())
        if validation is not None:
            model.eval()
            with monitor.phase("val"), torch.no_grad():
                for step in range(3):
                    x = validation(step)
                    model(*x) if isinstance(x, tuple) else model(x)
    return [(f.code, f.severity, f.module) for f in monitor.findings]


def seeded(step, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(step))


def mlp(width=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Linear(16, 4))


# -- copies ------------------------------------------------------------------------------------------------------------

COPIES = {
    "four workers with one seed": lambda step: seeded(step, 4, 16).repeat(4, 1),
    "every second item": lambda step: seeded(step, 8, 16).repeat_interleave(2, 0),
    "one item expanded": lambda step: seeded(step, 1, 16).expand(8, 16),
    "always the same item": lambda step: seeded(0, 1, 16).expand(8, 16),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_within_the_batch_are_said_once(name):
    assert train(mlp(), COPIES[name]) == [("input-duplicate", "warning", "")]


def test_copies_of_token_ids_are_seen():
    model = nn.Sequential(nn.Embedding(50, 8), nn.Flatten(), nn.Linear(96, 4))
    tokens = lambda step: torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(step)).repeat(3, 1)  # noqa: E731
    assert train(model, tokens) == [("input-duplicate", "warning", "")]


class Pairs(nn.Module):
    """Of users and films."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 4)

    def forward(self, user, film):
        return self.layer(torch.cat([user, film], -1))


def states(step, kinds=12):
    return nn.functional.one_hot(torch.randint(kinds, (64,), generator=torch.Generator().manual_seed(step)), 16).float()


def padded(step):
    x = seeded(step, 8, 16)
    x[2:] = 0
    x[:2, 8:] = 0
    return x


HEALTHY_COPIES = {
    "distinct": (mlp, lambda step: seeded(step, 16, 16)),
    "discrete states of an agent": (mlp, states),
    "a small table with few rows": (mlp, lambda step: seeded(0, 9, 16)[torch.randint(9, (32,), generator=torch.Generator().manual_seed(step))]),
    "a few drawn with replacement": (mlp, lambda step: seeded(step, 16, 16)[[*range(12), 0, 1, 2, 3]]),
    "items of four numbers": (lambda: mlp(4), lambda step: seeded(step, 1, 4).expand(8, 4)),
    "three items": (mlp, lambda step: seeded(step, 1, 16).expand(3, 16)),
    "each user with four films": (Pairs, lambda step: (seeded(step, 4, 16).repeat(4, 1), seeded(step + 999, 16, 16))),
    "augmentations of one item": (mlp, lambda step: seeded(step, 4, 16).repeat(4, 1) + 0.01 * seeded(step + 999, 16, 16)),
    "both copies for R-Drop": (lambda: nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.1), nn.Linear(8, 2)), lambda step: seeded(step, 8, 16).repeat(2, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY_COPIES)
def test_healthy_batches_hold_no_copies(name):
    model, batch = HEALTHY_COPIES[name]
    assert train(model(), batch) == []


def test_rows_of_padding_are_constant_and_no_copies():
    assert [code for code, *_ in train(mlp(), padded)] == ["input-constant"]


# -- scale -------------------------------------------------------------------------------------------------------------


def timestamps(step):
    x = seeded(step, 16, 16)
    x[:, 3] = 1.6e9 + 1e5 * x[:, 3]
    return x


def test_a_column_of_timestamps_is_named_with_its_layer():
    assert ("input-range", "warning", "0") in train(mlp(), timestamps)


def test_a_column_of_timestamps_is_seen_behind_a_dictionary_and_a_conversion():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, batch):
            return self.body(torch.cat(list(batch.values()), -1).float())

    batch = lambda step: {"all": timestamps(step)[:, :8].double(), "more": seeded(step, 16, 8).double()}  # noqa: E731
    assert ("input-range", "warning", "body.0") in train(Model(), batch)


def test_a_column_drowns_the_others_before_a_batchnorm_too():
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    assert ("input-range", "warning", "0") in train(model, timestamps)


def conv(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 8, 5), *more, nn.ReLU(), nn.Conv1d(8, 1, 5))


def test_int16_samples_into_a_convolution_are_named():
    found = train(conv(), lambda step: (3000 * seeded(step, 4, 1, 200)).round())
    assert ("input-range", "warning", "0") in found


def in_bytes(step):
    return torch.randint(256, (8, 3, 8, 8), generator=torch.Generator().manual_seed(step)).float()


def framed(step):
    x = in_bytes(step)
    x[..., :2], x[..., :2, :] = 0, 0  # like the digits of MNIST
    return x.flatten(1)


PLAIN = {
    "convolution": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3)), in_bytes),
    "linear layer, frames of zeros": (lambda: mlp(192), framed),
    "normalised too late": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)), in_bytes),
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_pictures_in_bytes_are_named_once_where_nothing_normalises_them(name):
    model, batch = PLAIN[name]
    found = train(model(), batch)
    assert [(code, severity) for code, severity, *_ in found] == [("input-range", "warning")]


class Spectrogram(nn.Module):
    """STFT magnitudes of full-scale noise."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(257, 4)

    def forward(self, x):
        return self.layer(
            torch.stft(x, 512, window=torch.hann_window(512), return_complex=True).abs().transpose(1, 2) / 100
        )


HEALTHY_SCALES = {
    "BatchNorm first": (lambda: nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 4)), timestamps),
    "pictures of 0 to 255": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3)),
                             in_bytes),
    "pictures, normalised behind a ReLU": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 3)), in_bytes),
    "decibels": (mlp, lambda step: 18 * seeded(step, 8, 50, 16) - 45),
    "two large columns of sixteen": (mlp, lambda step: seeded(step, 32, 16) * torch.tensor([600.0, 900.0] + 14 * [1.0])),
    "int16 before a normalisation": (lambda: conv(nn.GroupNorm(1, 8)), lambda step: 3000 * seeded(step, 4, 1, 200)),
    "fbank": (mlp, lambda step: 12 + 3 * seeded(step, 8, 50, 16)),
    "STFT magnitudes": (Spectrogram, lambda step: seeded(step, 4, 4000)),
    "divided inside": (lambda: nn.Sequential(nn.Flatten(), Divide(), nn.Linear(16, 4)), lambda step: 1e6 * seeded(step, 8, 16)),
    "token ids": (lambda: nn.Sequential(nn.Embedding(30000, 8), nn.Linear(8, 2)),
                  lambda step: torch.randint(30000, (8, 12), generator=torch.Generator().manual_seed(step))),
}  # fmt: skip


class Divide(nn.Module):
    def forward(self, x):
        return x / 1e6


@pytest.mark.parametrize("name", HEALTHY_SCALES)
def test_healthy_scales_are_no_finding(name):
    model, batch = HEALTHY_SCALES[name]
    assert train(model(), batch) == []


def test_large_activations_are_not_taken_for_data():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    nn.init.constant_(model[0].bias, 1e5)
    assert "input-range" not in {code for code, *_ in train(model, lambda step: seeded(step, 8, 16))}


def test_a_scale_that_spoils_the_training_is_the_cause_of_its_trouble():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Monitor(model, optimizer, **presets.full(), every=5, strict=True) as monitor:
        for step in range(100):
            x = torch.randint(256, (16, 64), generator=torch.Generator().manual_seed(step)).float()
            loss = (model(x) - x.mean(1, keepdim=True) / 255).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.step(loss=loss.detach())
    found = {f.code: f for f in monitor.findings}
    assert found["input-range"].severity == "warning"
    assert found["activation-saturated"].cause == "input-range"


# -- the watch itself --------------------------------------------------------------------------------------------------


def test_two_observations_say_nothing():
    records = series(range(2), **{"input/repeated": [0.9] * 2, "input/returned": [0.0] * 2})
    assert replay(InputHealth(), records) == []


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["input/repeated", "input/returned", "input/column_rms", "loss"]),
            st.one_of(st.none(), st.floats()),
            st.sampled_from(["", "a"]),
        ),
        max_size=40,
    )
)
def test_any_records_are_survived_and_the_state_is_json(rows):
    watch = InputHealth()
    state = watch.init()
    for step, (name, value, module) in enumerate(rows):
        before = copy.deepcopy(state)
        after, _ = watch.update(state, [Record(name, value, step, module=module)])
        assert state == before
        state = json.loads(json.dumps(after))


# -- validation against training, with nothing given -------------------------------------------------------------------


def pictures(step, count=16):
    """Of dark ground with bright strokes, from 0 to 1."""
    x = seeded(step, count, 1, 8, 8)
    return (x.clamp(min=0) / 3).clamp(max=1)


def standard(x):
    return (x - 0.13) / 0.19


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(1, 4, 3)

    def forward(self, x, more=None):
        return self.body(x)


def test_a_normalisation_that_validation_lacks_is_a_drift():
    found = train(Net(), lambda step: standard(pictures(step)), validation=pictures)
    assert {code for code, *_ in found} == {"input-drift"}


def test_a_model_that_is_called_by_another_method_is_read_at_its_first_part():
    class Extractor(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList([nn.Conv2d(1, 4, 3), nn.Conv2d(4, 1, 3)])
            self.norm = nn.GroupNorm(1, 1)

        def extract_features(self, x):
            for part in self.parts:
                x = part(x)
            return self.norm(x)

    model, memory = Extractor(), []
    with Monitor(model, watches=[InputDrift()], every=1, strict=True, on_finding=memory.append) as monitor:
        for step in range(8):
            model.extract_features(standard(pictures(step)))
            monitor.step()
        with monitor.phase("val"), torch.no_grad():
            model.extract_features(pictures(0))
    assert {finding.code for finding in memory} == {"input-drift"}


def flipped(step):
    return standard(pictures(step)).flip(-1).roll(step % 3, -1)


def erased(step):
    x = standard(pictures(step))
    x[..., 1:7, :] = 0
    return x


HEALTHY_VALIDATION = {
    "augmentation": (flipped, lambda step: standard(pictures(step))),
    "erased and masked": (erased, lambda step: standard(pictures(step))),
    "padding": (lambda step: standard(pictures(step)), lambda step: nn.functional.pad(standard(pictures(step)), (0, 16, 0, 8))),
    "another class mix": (lambda step: standard(pictures(step)), lambda step: standard(pictures(step) * 1.3)),
    "timesteps": (lambda step: (seeded(step, 16, 1, 8, 8), torch.rand(16, generator=torch.Generator().manual_seed(step))),
                  lambda step: (seeded(step, 16, 1, 8, 8), torch.ones(16))),
    "decoder inputs": (lambda step: (seeded(step, 16, 1, 8, 8), seeded(step + 1, 16, 20)),
                       lambda step: (seeded(step, 16, 1, 8, 8), torch.full((16, 20), 5.0))),
    "masks": (lambda step: (seeded(step, 16, 1, 8, 8), torch.ones(16, 20)),
              lambda step: (seeded(step, 16, 1, 8, 8), (seeded(step, 16, 20) > 1).float())),
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY_VALIDATION)
def test_what_validation_changes_with_right_is_no_drift(name):
    batch, validation = HEALTHY_VALIDATION[name]
    assert train(Net(), batch, validation=validation) == []


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(9, 8), nn.Embedding(12, 8), nn.Embedding(2, 8)
        self.ear, self.head = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, sound, words):
        places = torch.arange(words.shape[1]).expand_as(words)
        text = self.words(words) + self.places(places) + self.kinds(torch.zeros_like(words))
        return self.head(self.ear(sound) * text.mean(1))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (lambda i: torch.tensor([[1, 0, 0, 0]]).expand(8, -1), ["words"]),
        (lambda i: torch.randint(9, (1, 4)).expand(8, -1), []),  # one prompt for all, another one at each step
        (lambda i: torch.randint(9, (8, 4)), []),
        (lambda i: torch.full((8, 4), 3), []),
        (lambda i: torch.tensor([[1, 0]]).expand(8, -1), []),
    ],
)
def test_an_embedding_that_is_given_one_sequence_for_all_items(words, told):
    torch.manual_seed(0)
    model = Reader()
    with Monitor(model, watches=[InputHealth()], every=1, strict=True) as monitor:
        for i in range(8):
            loss = model(torch.randn(8, 8), words(i)).mean()
            loss.backward()
            monitor.step(loss=loss)
    assert [f.module for f in monitor.findings if f.code == "input-duplicate"] == told


@pytest.mark.parametrize(("spread", "told"), [(0.0, False), (12.0, False), (60.0, True)])
@pytest.mark.parametrize("items", [4, 32])
def test_levels_of_items_that_are_orders_of_magnitude_apart(spread, told, items):
    torch.manual_seed(0)
    model = nn.Conv1d(1, 2, 3)
    with Monitor(model, watches=[InputHealth()], every=1, strict=True) as monitor:
        for _ in range(20):
            gain = 10 ** (spread * torch.randn(items, 1, 1) / 20)
            loss = model(1e-2 * gain * torch.randn(items, 1, 200)).mean()
            loss.backward()
            monitor.step(loss=loss)
    assert [f.evidence["items_db"] > 30 for f in monitor.findings if "levels of the items" in f.message] == [
        True
    ] * told


def test_silent_items_have_no_level():
    model = nn.Conv1d(1, 2, 3)
    with Monitor(model, watches=[InputHealth()], every=1, strict=True) as monitor:
        for _ in range(6):
            x = torch.randn(8, 1, 50)
            x[:3] = 0.0
            monitor.step(loss=model(x).mean())
    assert [f for f in monitor.findings if f.severity != "info"] == []


# -- the same items again and again, blank ones, one row ---------------------------------------------------------------


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(lambda step: seeded(0, 6, 16), id="a generator that is made anew"),
        pytest.param(lambda step: seeded(step % 3, 4, 16), id="twelve items"),
        pytest.param(lambda step: seeded(0, 20, 16)[torch.randperm(20)[:8]], id="twenty items in another order"),
    ],
)
def test_few_items_again_and_again_are_told(batch):
    assert train(mlp(), batch, 60) == [("input-duplicate", "warning", "")]


KEPT = seeded(0, 64, 16)


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(lambda step: seeded(0, 200, 16)[torch.randperm(200)[:16]], id="a small data set"),
        pytest.param(lambda step: KEPT, id="the whole data set at once"),
        pytest.param(lambda step: torch.eye(16)[torch.randint(16, (24,))], id="states of an agent"),
        pytest.param(lambda step: seeded(0, 6, 16) + 0.1 * torch.randn(6, 16), id="augmented"),
    ],
)
def test_small_data_and_states_and_full_batches_are_fine(batch):
    assert train(mlp(), batch, 90) == []


def test_one_batch_for_ever_is_told_where_validation_shows_more():
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, watches=[InputHealth()], every=1, strict=True) as monitor:
        for step in range(30):
            model(seeded(0, 64, 16)).square().mean().backward()
            optimizer.step()
            monitor.step()
            if step % 4 == 3:
                with monitor.phase("val"), torch.no_grad():
                    model.eval()(seeded(1000 + step, 64, 16))
                model.train()
    assert [f.code for f in monitor.findings] == ["input-duplicate"]


@pytest.mark.parametrize(("items", "told"), [(8, ["input-duplicate"]), (64, [])])
def test_a_batch_that_is_kept_may_be_all_there_is_unless_it_is_a_handful(items, told):
    torch.manual_seed(0)
    model, kept = mlp(), seeded(0, items, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, watches=[InputHealth()], every=1, strict=True) as monitor:
        for step in range(30):
            model(kept).square().mean().backward()
            optimizer.step()
            monitor.step()
            if step % 4 == 3:
                with monitor.phase("val"), torch.no_grad():
                    model.eval()(seeded(1000 + step, 32, 16))
                model.train()
    assert [f.code for f in monitor.findings] == told


def test_data_that_are_not_finite_have_no_range():
    records = [Record("input/column_rms", math.inf, step, "stem") for step in range(5)]
    assert replay(InputHealth(), records) == []


class Converts(nn.Module):
    """The first line turns what NumPy has made back into float32."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        return self.body(x.to(self.body[0].weight.dtype))


@pytest.mark.parametrize(
    ("weights", "data", "told"),
    [
        pytest.param(torch.float32, torch.float64, [("input-dtype", "warning", "")], id="made by NumPy"),
        pytest.param(torch.float64, torch.float64, [], id="double precision is meant"),
        pytest.param(torch.bfloat16, torch.float32, [], id="low precision is meant"),
        pytest.param(torch.float32, torch.uint8, [], id="pictures"),
    ],
)
def test_data_in_double_precision_for_a_model_that_is_not_are_told(weights, data, told):
    def batch(step):
        return (50 * torch.rand(8, 16)).to(data)

    assert train(Converts().to(weights), batch) == told


def test_a_batch_that_the_loop_converts_is_looked_at_as_it_was_given():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, watches=[InputHealth()], every=1, strict=True) as monitor:
        for _ in range(5):
            batch = torch.randn(8, 16, dtype=torch.float64)
            model(batch.float()).square().mean().backward()
            optimizer.step()
            monitor.step(batch=batch)
    assert [f.code for f in monitor.findings] == ["input-dtype"]


def test_noise_that_the_loop_adds_does_not_hide_what_the_loader_gives():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Monitor(model, optimizer, watches=[InputHealth()], every=2, strict=True) as monitor:
        for _ in range(40):
            clean = seeded(0, 6, 16)
            model(clean + torch.randn(6, 16)).square().mean().backward()
            optimizer.step()
            monitor.step(batch=clean)
    assert [f.code for f in monitor.findings] == ["input-duplicate"]


class Table(nn.Module):
    """Numbers, and one category with an embedding."""

    def __init__(self):
        super().__init__()
        self.town, self.head = nn.Embedding(9, 4), nn.Linear(10, 1)

    def forward(self, numbers, town):
        return self.head(torch.cat([numbers, self.town(town)], 1))


def test_rows_without_a_partner_are_told_and_some_padding_is_not():
    def batch(share):
        def made(step):
            found = torch.rand(32, 1) > share
            return seeded(step, 32, 12) * found, torch.randint(1, 9, (32,)) * found[:, 0]

        return made

    class Wide(Table):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(16, 1)

    assert train(Wide(), batch(0.2)) == []
    assert [code for code, *_ in train(Wide(), batch(0.75))] == ["input-constant"]


def test_one_row_for_all_items_is_told_with_its_embedding():
    fine = lambda step: (seeded(step, 32, 6), torch.randint(9, (32,)))  # noqa: E731
    fallen_back = lambda step: (seeded(step, 32, 6), torch.zeros(32, dtype=torch.long))  # noqa: E731
    assert train(Table(), fine) == []
    assert train(Table(), fallen_back) == [("feature-constant", "warning", "town")]


class Sentences(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(50, 8), nn.Linear(8, 2)

    def forward(self, tokens):
        return self.head(self.words(tokens).mean(1))


def test_unknown_words_in_validation_are_told_and_more_padding_is_not():
    def made(step, shortest=4):
        g = torch.Generator().manual_seed(step)
        tokens = torch.randint(3, 50, (16, 12), generator=g)
        lengths = torch.randint(shortest, 9 if shortest < 4 else 13, (16, 1), generator=g)
        return tokens * (torch.arange(12) < lengths)

    assert train(Sentences(), made, 40, validation=lambda step: made(step + 100, 1)) == []
    found = train(Sentences(), made, 40, validation=lambda step: made(step + 100).clamp(max=1))
    assert found == [("input-drift", "warning", "words")]
