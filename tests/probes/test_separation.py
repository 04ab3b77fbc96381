from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torchmetrics.functional.audio import permutation_invariant_training as reference_pit
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio as reference_si_sdr

from stethoscope._protocols import Attachment, Key, Probe
from stethoscope.probes import Separation
from stethoscope.testing import assert_no_sync


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def measure(given, phase="train", **fields):
    attached = Separation(**fields).attach(nn.Identity())
    attached.arm(True, phase)
    return {key.name.removeprefix("separation/"): float(value) for key, value in attached.read(given).items()}


def scene(sources: int = 2, size: int = 2000, noise: float = 0.5) -> dict[str, torch.Tensor]:
    references = some(4, sources, size)
    estimates = (references + noise * some(4, sources, size, seed=1)).flip(1)
    return {"estimates": estimates, "references": references, "mixture": references.sum(1)}


def test_it_is_a_probe():
    assert isinstance(Separation(), Probe)
    assert isinstance(Separation().attach(nn.Identity()), Attachment)


@pytest.mark.filterwarnings("ignore:In pit metric:UserWarning")  # recommends scipy
@pytest.mark.parametrize("sources", [2, 3])
def test_scores_are_those_of_torchmetrics(sources):
    given = scene(sources)

    def si_sdr(estimate, target):
        return reference_si_sdr(estimate, target, zero_mean=True)

    best, _ = reference_pit(given["estimates"], given["references"], si_sdr, eval_func="max")
    before = si_sdr(given["mixture"][:, None].expand_as(given["references"]), given["references"]).mean()
    found = measure(given)
    assert found["si_sdr_db"] == pytest.approx(best.mean().item(), abs=0.02)
    assert found["si_sdri_db"] == pytest.approx((best.mean() - before).item(), abs=0.02)
    assert found["worst_si_sdr_db"] <= found["si_sdr_db"]
    assert found["source1_si_sdr_db"] == pytest.approx(found["si_sdr_db"], abs=1)
    assert found["margin_db"] > 10
    assert found["out_cos"] < 0.2
    assert found["alike_fraction"] == found["quiet_fraction"] == found["copy_fraction"] == 0


def test_layouts_of_the_toolkits_give_the_same_numbers():
    given = scene()
    expected = measure(given)
    speechbrain = {name: x.movedim(1, 2) if x.dim() == 3 else x for name, x in given.items()}
    assert measure(speechbrain, source_axis=2) == pytest.approx(expected)
    assert measure(speechbrain, source_axis=-1) == pytest.approx(expected)
    espnet = {name: list(x.unbind(1)) if x.dim() == 3 else x for name, x in given.items()}
    assert measure(espnet) == pytest.approx(expected)
    channel = given | {"mixture": given["mixture"][:, None]}
    assert measure(channel) == pytest.approx(expected)


def test_complex_spectra_are_read_with_frames_as_lengths():
    real = some(3, 2, 20, 2 * 16)
    spectra = [torch.view_as_complex(x.unflatten(-1, (16, 2)).contiguous()) for x in real.unbind(1)]
    lengths = torch.tensor([20, 11, 5])
    found = measure({"estimates": spectra, "lengths": lengths}, max_delay=0)
    flat = measure({"estimates": real.flatten(2), "lengths": lengths * 32}, max_delay=0)
    assert found == pytest.approx(flat)


def test_lengths_may_be_samples_or_shares_and_padding_is_blank():
    given = scene()
    lengths = torch.tensor([2000, 1500, 1000, 500])
    for item, length in enumerate(lengths):
        given["estimates"][item, :, length:] = 7.0  # alike in the padding only
    found = measure(given | {"lengths": lengths})
    assert found["out_cos"] < 0.2
    assert measure(given | {"lengths": lengths / 2000}) == pytest.approx(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int16])
def test_other_number_types_are_read(dtype):
    given = {name: (1000 * x).to(dtype) for name, x in scene().items()}
    assert measure(given)["si_sdr_db"] == pytest.approx(measure(scene())["si_sdr_db"], abs=0.1)


def test_copies_are_seen_scaled_flipped_delayed_and_in_one_pair_of_many():
    voice = some(4, 1, 2000)
    assert measure({"estimates": torch.cat([voice, -0.02 * voice], 1)})["alike_fraction"] == 1
    late = {"estimates": torch.cat([voice, voice.roll(40, -1)], 1)}
    assert measure(late)["alike_fraction"] == 1
    assert measure(late)["out_cos"] < 0.2
    assert measure(late, max_delay=0)["alike_fraction"] == 0
    five = torch.cat([some(4, 4, 2000, seed=1), voice, voice], 1)
    assert measure({"estimates": five})["alike_fraction"] == 1
    half = torch.cat([some(4, 1, 2000, seed=2), voice], 1)
    half[:2, 0] = voice[:2, 0]
    assert measure({"estimates": half})["alike_fraction"] == 0.5


def test_outputs_no_more_alike_than_the_references_are_not_flagged():
    common, own = some(4, 1, 2000), some(4, 2, 2000, seed=1)
    references = common + 0.2 * own
    found = measure({"estimates": references + 0.02 * some(4, 2, 2000, seed=2), "references": references})
    assert found["ref_cos"] > 0.95
    assert found["out_cos"] > 0.95
    assert found["alike_fraction"] == 0


def test_quiet_output_is_relative_to_the_other_and_to_the_references():
    references = some(4, 2, 2000)
    given = {"estimates": references * torch.tensor([1.0, 1e-3])[:, None], "references": references}
    assert measure(given)["quiet_fraction"] == 1
    assert measure(given | {"estimates": 1e-2 * references})["quiet_fraction"] == 0
    faint = references * torch.tensor([1.0, 2e-3])[:, None]
    assert measure({"estimates": faint, "references": faint})["quiet_fraction"] == 0
    assert measure({"estimates": torch.zeros(4, 2, 2000), "mixture": references.sum(1)})["quiet_fraction"] == 1


def test_nonfinite_items_are_counted_and_left_out_of_the_means():
    given = scene()
    expected = measure({name: x[1:] for name, x in given.items()})
    given["estimates"][0, 1, 5] = torch.nan
    found = measure(given)
    assert found.pop("nonfinite_fraction") == 0.25
    expected.pop("nonfinite_fraction")
    assert found["margin_db"] > 10
    for name in ("ref_cos", "ref_delay_cos", "ref_level_db", "margin_db"):  # the references of that item are fine
        found.pop(name), expected.pop(name)
    assert found == pytest.approx(expected, abs=1e-4)


def test_silent_reference_decides_nothing():
    given = scene(3)
    given["references"][:, 2] = 0
    found = measure(given)
    assert found["si_sdr_db"] == pytest.approx(6, abs=1.5)


def test_one_output_tells_whether_it_ignores_the_input():
    mixture = some(4, 2000)
    assert measure({"estimates": mixture * 0.5, "mixture": mixture})["batch_cos"] < 0.2
    ignoring = measure({"estimates": some(1, 2000).expand(4, -1), "mixture": mixture})
    assert ignoring["batch_cos"] > 0.99 > 0.2 > ignoring["mix_batch_cos"]
    assert "out_cos" not in ignoring


@pytest.mark.parametrize(("outputs", "sources"), [(3, 2), (2, 3)])
def test_differing_numbers_of_outputs_and_references_are_survived(outputs, sources):
    found = measure({"estimates": some(4, outputs, 1000), "references": some(4, sources, 900, seed=1)})
    assert found["margin_db"] >= 0
    assert ("si_sdr_db" in found) == (outputs >= sources)


def test_pairwise_losses_alone_give_the_margin():
    losses = torch.tensor([[[-10.0, 5.0], [4.0, -9.0]]]).expand(4, 2, 2)
    found = measure({"estimates": some(4, 2, 100), "pairwise": losses})
    assert found["margin_db"] == pytest.approx((9.5 + 4.5), abs=1e-4)


def test_flips_follow_the_sample_and_phases_are_apart():
    attached = Separation().attach(nn.Identity())
    references = some(4, 2, 500)
    given = {"estimates": references, "references": references, "ids": torch.tensor([7, 70_000, -3, 12])}

    def flips(estimates, phase="train"):
        attached.arm(True, phase)
        found = attached.read(given | {"estimates": estimates})
        return float(found[Key("separation/flips")]), float(found[Key("separation/revisits")])

    assert flips(references) == (0, 0)
    swapped = references.clone()
    swapped[:3] = references[:3].flip(1)
    assert flips(swapped) == (0.75, 4)
    assert flips(swapped) == (0, 4)
    assert flips(references, "val") == (0, 0)


def test_validation_adds_sir_and_sar():
    found = measure(scene(), phase="val")
    assert found["sar_db"] == pytest.approx(found["si_sdr_db"], abs=0.5)
    assert found["sir_db"] > found["sar_db"]
    assert found["source0_sar_db"] == pytest.approx(found["source0_si_sdr_db"], abs=0.5)
    assert "sir_db" not in measure(scene())


def test_missing_estimates_record_nothing_and_disarmed_reads_nothing():
    attached = Separation().attach(nn.Identity())
    attached.arm(True, "val")
    assert attached.read({"mixture": some(4, 100)}) == {}
    attached.arm(False, "val")
    assert attached.read(scene()) == {}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"estimates": torch.zeros(4, 1000, 2)}, r"'estimates' has shape \(4, 1000, 2\).*source_axis=1"),
        ({"estimates": torch.zeros(1000)}, "has shape"),
        ({"estimates": torch.zeros(4, 2, 100), "references": torch.zeros(3, 2, 100)}, "differ in batch size"),
        ({"estimates": torch.zeros(0, 2, 100)}, "batch is empty"),
        ({"estimates": torch.zeros(4, 2, 0)}, "batch is empty"),
        ({"estimates": some(4, 2, 100), "lengths": torch.tensor([100, 90])}, "'lengths' has shape .* 4 items"),
        ({"estimates": some(4, 2, 100), "ids": torch.tensor([1, 2])}, "'ids' has shape .* 4 items"),
        ({"estimates": some(4, 2, 100), "pairwise": some(3, 2, 2)}, "'pairwise' has shape .* 4 items"),
        ({"estimates": [some(4, 100), some(3, 100)]}, "parts of 'estimates' differ"),
    ],
)
def test_unreadable_layout_is_noted_once(given, message):
    attached = Separation().attach(nn.Identity())
    attached.arm(True, "train")
    assert attached.read(given) == attached.read(given) == {}
    (note,) = attached.notes
    assert note.code == "separation-layout"
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(note.message)


def test_listed_outputs_of_different_length_are_compared_where_both_are():
    given = scene()
    first, second = given["estimates"].unbind(1)
    cut = {**given, "estimates": given["estimates"][..., :1500]}
    assert measure({**given, "estimates": [first, second[:, :1500]]}) == pytest.approx(measure(cut))


def test_reading_never_waits_for_the_device():
    """On the meta device every operation that would need a value raises."""
    given = {name: x.to("meta") for name, x in scene(3).items()}
    given |= {"ids": torch.zeros(4, dtype=torch.int64, device="meta"), "lengths": torch.ones(4, device="meta")}
    attached = Separation().attach(nn.Identity())
    for phase in ("train", "train", "val"):
        attached.arm(True, phase)
        assert all(value.is_meta and value.dim() == 0 for value in attached.read(given).values())
    one = {"estimates": given["mixture"], "mixture": given["mixture"]}
    assert all(value.is_meta for value in attached.read(one).values())
    assert_no_sync(Separation(), nn.Linear(4, 4), some(2, 4), scene())


def test_training_is_untouched():
    model = nn.Linear(100, 200)
    twin, x = copy.deepcopy(model), some(4, 100)
    attached = Separation().attach(model)
    attached.arm(True, "train")
    rng = torch.random.get_rng_state()
    estimates = model(x).unflatten(-1, (2, 100))
    before = estimates.clone()
    with torch.autocast("cpu", torch.bfloat16):
        attached.read({"estimates": estimates, "references": some(4, 2, 100)})
    assert torch.equal(rng, torch.random.get_rng_state())
    assert torch.equal(before, estimates)
    estimates.square().sum().backward()
    twin(x).square().sum().backward()
    assert torch.equal(model.weight.grad, twin.weight.grad)
    assert not model._forward_hooks
    attached.detach()
    attached.detach()


def test_spec_covers_what_it_names():
    assert Separation(references="src").covers(Separation())
    assert not Separation().covers(Separation(references="src"))
    assert Separation(every=10).covers(Separation(every=50))
    assert not Separation(every=50).covers(Separation(every=10))


@pytest.mark.parametrize(("fields", "message"), [({"max_delay": -1}, "max_delay"), ({"source_axis": 0}, "batch")])
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Separation(**fields)


def test_through_the_monitor_with_a_list_of_estimates_as_espnet_has_it():
    from stethoscope import Monitor, sinks

    given, memory = scene(), sinks.Memory()
    given["estimates"] = list(given["estimates"].unbind(1))
    with Monitor(nn.Identity(), probes=[Separation()], sinks=[memory], strict=True) as monitor:
        monitor.step(**given)
    values = {record.name: record.value for record in memory.records}
    assert values["separation/si_sdr_db"] == pytest.approx(measure(scene())["si_sdr_db"], abs=1e-3)
