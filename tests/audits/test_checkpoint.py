import argparse
import copy
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from stethoscope import audits


class Separator(nn.Module):
    """Encoder, masker, decoder, as in TasNet."""

    def __init__(self, activation=nn.ReLU):
        super().__init__()
        self.encoder = nn.Conv1d(1, 16, 8, stride=4, bias=False)
        self.masker = nn.Sequential(
            nn.GroupNorm(1, 16), nn.Conv1d(16, 24, 1), nn.PReLU(), nn.Conv1d(24, 32, 1), activation()
        )
        self.decoder = nn.ConvTranspose1d(16, 1, 8, stride=4, bias=False)
        self.sample_rate = 8000

    def forward(self, mixture):
        encoded = self.encoder(mixture.unsqueeze(1))
        masks = self.masker(encoded).unflatten(1, (2, 16))
        return torch.stack([self.decoder(encoded * masks[:, i]).squeeze(1) for i in range(2)], 1)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.auxiliary = nn.Linear(4, 3)  # only its own loss needs it

    def forward(self, x):
        return self.head(self.body(x))


def codes(report):
    return {finding.code for finding in report.findings}


def alarms(report):
    return [finding for finding in report.findings if finding.severity != "info"]


@pytest.fixture
def trained():
    torch.manual_seed(1)
    return Separator().state_dict()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Separator()


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def test_a_fitting_file_loads_completely(model, trained):
    report = audits.checkpoint(model, trained)
    assert report.ok
    assert not report.findings
    assert report.loaded_fraction == 1.0
    assert not report.missing + report.unexpected
    assert not report.mismatched
    report.load()
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod.", "net.generator."])
def test_a_prefix_loads_nothing_and_is_offered(model, trained, prefix):
    report = audits.checkpoint(model, prefixed(trained, prefix))
    assert report.loaded == ()
    assert report.loaded_fraction == 0.0
    assert report.suggested_prefix == prefix
    assert report.fraction_with_prefix == 1.0
    assert codes(report) == {"checkpoint-prefix"}
    report.load()
    assert all(torch.equal(value, trained[key]) for key, value in model.state_dict().items())


def test_a_wrapped_model_gets_the_prefix_added(trained):
    wrapped = nn.DataParallel(Separator())
    report = audits.checkpoint(wrapped, trained)
    assert (report.suggested_prefix, report.suggested_addition) == ("", "module.")
    report.load()
    assert torch.equal(wrapped.module.encoder.weight, trained["encoder.weight"])


def test_compiled_submodules_are_seen_through(model, trained):
    inside = {key.replace("masker.", "masker._orig_mod."): value for key, value in trained.items()}
    report = audits.checkpoint(model, inside)
    assert 0 < report.loaded_fraction < 1
    assert report.suggested_prefix == "_orig_mod."
    assert report.fraction_with_prefix == 1.0


def test_a_prefix_is_not_guessed_from_a_few_equal_endings():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(300, 300))
    report = audits.checkpoint(model, {"other.0.weight": torch.randn(3, 3), "other.9.weight": torch.randn(90, 90)})
    assert report.suggested_prefix == ""
    assert codes(report) == {"checkpoint-partial", "checkpoint-unexpected"}


def test_two_lost_keys_of_many_weigh_by_what_they_do(model, trained):
    few = {key: value for key, value in trained.items() if "coder" not in key}
    report = audits.checkpoint(model, few, example=torch.randn(3, 400))
    assert set(report.missing) == {"encoder.weight", "decoder.weight"}
    (finding,) = alarms(report)
    assert finding.code == "checkpoint-partial"
    assert finding.severity == "error"
    assert report.effect.missing > 0.5
    assert report.by_module["encoder"] == (0, 128)
    assert report.by_module["masker"][0] == report.by_module["masker"][1]


def test_what_does_not_reach_the_output_is_only_mentioned():
    model = TwoHeads()
    state = {key: value for key, value in TwoHeads().state_dict().items() if "auxiliary" not in key}
    report = audits.checkpoint(model, state, example=torch.randn(5, 4))
    assert report.effect.missing == 0.0
    assert report.effect.loaded > 0.1
    assert [finding.severity for finding in report.findings] == ["info"]
    assert not audits.checkpoint(model, state).ok


def test_the_example_leaves_model_and_random_state_alone(model, trained):
    model.train()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    audits.checkpoint(model, {"encoder.weight": trained["encoder.weight"]}, example=torch.randn(2, 400).mul_(1))
    torch.set_rng_state(random)
    audits.checkpoint(model, trained, example=torch.ones(2, 400))
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_other_shapes_are_mismatched_and_left_out(model, trained):
    trained["masker.3.weight"] = torch.randn(48, 24, 1)
    report = audits.checkpoint(model, trained)
    assert report.mismatched == {"masker.3.weight": ((48, 24, 1), (32, 24, 1))}
    assert "[48, 24, 1] against [32, 24, 1]" in str(report)
    assert "masker.3.weight" not in report.load()


def test_partial_fine_tuning_can_be_declared(trained):
    model = nn.ModuleDict({"encoder": Separator().encoder, "head": nn.Linear(4, 2)})
    state = {"encoder.weight": trained["encoder.weight"], "head.weight": torch.randn(9, 4), "head.bias": torch.randn(9)}
    assert not audits.checkpoint(model, state).ok
    for declared in (["head"], ["head.*"], ["*.weight", "*.bias"]):
        assert audits.checkpoint(model, state, partial=declared).findings == ()


def test_another_name_for_the_same_tensor_is_hinted_at(model, trained):
    trained["enc.weight"] = trained.pop("encoder.weight")
    report = audits.checkpoint(model, trained)
    assert "'enc.weight' in the file may be 'encoder.weight'" in str(report)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weight_norm_of_old_files_is_renamed_as_torch_does(prefix):
    state = {"0.bias": torch.ones(3), "0.weight_g": torch.ones(3, 1), "0.weight_v": torch.randn(3, 2)}
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)))
    report = audits.checkpoint(model, prefixed(state, prefix))
    assert report.ok == (not prefix)
    assert report.fraction_with_prefix == 1.0
    report.load()
    assert torch.equal(model[0].parametrizations.weight.original1, state["0.weight_v"])


def test_a_compiled_model_gets_the_prefix_added(trained):
    compiled = torch.compile(Separator(), backend="eager")
    report = audits.checkpoint(compiled, trained)
    assert report.suggested_addition == "_orig_mod."
    report.load()
    assert torch.equal(compiled._orig_mod.encoder.weight, trained["encoder.weight"])


def test_lazy_parameters_ask_for_a_batch_first():
    with pytest.raises(ValueError, match="one batch"):
        audits.checkpoint(nn.LazyLinear(3), {"weight": torch.ones(3, 3)})


def test_tied_weights_count_once():
    def make():
        net = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50, bias=False))
        net[2].weight = net[0].weight
        return net

    state = make().state_dict()
    del state["2.weight"]  # as Hugging Face saves it
    report = audits.checkpoint(make(), state)
    assert report.ok
    assert report.missing == ()
    assert report.loaded_fraction == 1.0
    assert sum(total for _, total in report.by_module.values()) == 50 * 8 + 8 * 8 + 8


def test_nan_zero_and_constant_tensors_are_named(model, trained):
    trained["masker.1.weight"][0, 0] = float("nan")
    trained["masker.3.weight"].zero_()
    report = audits.checkpoint(model, trained)
    assert codes(report) == {"checkpoint-nonfinite", "checkpoint-constant"}
    assert "'masker.1.weight'" in str(report)
    assert "'masker.3.weight'" in str(report)


def test_zero_by_design_is_healthy():
    def make():
        layer = nn.Linear(4, 4)
        nn.init.zeros_(layer.weight)
        return layer

    state = make().state_dict()
    state["bias"] += 1
    assert audits.checkpoint(make(), state).ok


def test_parameters_that_were_never_trained_are_mentioned():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    state = copy.deepcopy(model.state_dict())
    state["0.weight"] += 1
    report = audits.checkpoint(model, state)
    (finding,) = report.findings
    assert (finding.code, finding.severity) == ("checkpoint-unchanged", "info")
    assert "0.weight" not in finding.evidence["keys"]


def test_integers_without_their_scale_are_an_error_and_half_precision_is_not(model, trained):
    half = {key: value.half() for key, value in trained.items()}
    report = audits.checkpoint(model, half)
    assert report.ok
    assert codes(report) == {"checkpoint-dtype"}
    trained["masker.1.weight"] = (trained["masker.1.weight"] * 100).to(torch.int8)
    report = audits.checkpoint(model, trained)
    assert [finding.code for finding in alarms(report)] == ["checkpoint-dtype"]
    assert "int8" in str(report)


def test_complex_float8_empty_and_odd_tensors_are_read():
    model = nn.ParameterDict(
        {"c": nn.Parameter(torch.randn(3, 3, dtype=torch.complex64)), "e": nn.Parameter(torch.randn(0, 3))}
    )
    state = {"c": torch.full((3, 3), complex("nan"), dtype=torch.complex64), "e": torch.zeros(0, 3)}
    assert codes(audits.checkpoint(model, state)) == {"checkpoint-nonfinite"}
    linear = nn.Linear(4, 4, bias=False)
    report = audits.checkpoint(linear, {"weight": torch.randn(4, 4).to(torch.float8_e4m3fn)})
    assert [finding.severity for finding in report.findings] == ["error"]


def test_a_meta_model_is_compared_by_shape_and_loaded_by_assignment(trained):
    with torch.device("meta"):
        model = Separator()
    report = audits.checkpoint(model, prefixed(trained, "module."), example=torch.zeros(2, 400))
    assert report.suggested_prefix == "module."
    report.load()
    assert torch.equal(model.encoder.weight, trained["encoder.weight"])


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor:UserWarning")  # going away, but files of that kind stay
def test_a_quantised_state_dict_is_examined():
    state = {"weight": torch.quantize_per_tensor(torch.randn(4, 4), 0.1, 0, torch.qint8), "scale": 0.1}
    report = audits.checkpoint(nn.Linear(4, 4, bias=False), state)
    assert "qint8" in str(report)
    assert not report.ok


def test_of_several_networks_in_a_file_the_fitting_one_is_taken(model, trained):
    other = nn.Linear(3, 3).state_dict()
    report = audits.checkpoint(model, {"discriminator": other, "generator": trained, "optimizer": {"state": {}}})
    assert report.ok
    assert report.loaded_fraction == 1.0


# ---------------------------------------------------------------------------------------------------- configuration


def test_other_hyper_parameters_of_equal_shape_are_caught_by_the_record(trained):
    saved = {"state_dict": trained, "stethoscope": audits.describe(Separator(), {"sources": 2})}
    assert audits.checkpoint(Separator(), saved, config={"sources": 2}).ok
    other = Separator(activation=nn.Sigmoid)
    other.load_state_dict(trained)  # strict, and silent
    other.encoder.stride = (2,)
    report = audits.checkpoint(other, saved, config={"sources": 3})
    (finding,) = alarms(report)
    assert finding.code == "checkpoint-config"
    assert "masker.4" in finding.message
    assert "encoder.stride" in finding.message
    assert "sources" in finding.message
    assert ("encoder.stride", [4], [2]) in report.differences


def test_the_record_survives_json_and_safetensors(tmp_path, trained):
    record = audits.describe(Separator(), {"sample_rate": 8000})
    assert json.loads(json.dumps(record)) == record
    path = tmp_path / "model.safetensors"
    save_file(dict(trained), path, metadata={"stethoscope": json.dumps(record)})
    assert audits.checkpoint(Separator(), path).ok
    assert codes(audits.checkpoint(Separator(nn.Tanh), path)) == {"checkpoint-config"}


@pytest.mark.parametrize("where", ["model_args", "hyper_parameters", "config"])
def test_facts_that_toolkits_record_are_compared(model, trained, where):
    saved = {"state_dict": trained, where: {"audio": {"sample_rate": 16000}, "lr": 1e-3, "dropout": 0.3}}
    assert codes(audits.checkpoint(model, saved)) == {"checkpoint-config"}  # model.sample_rate is 8000
    assert audits.checkpoint(model, saved).findings[0].severity == "warning"
    assert audits.checkpoint(model, saved, config={"sample_rate": 8000}).findings[0].severity == "error"
    model.sample_rate, model.lr, model.dropout = 16000, 1e-5, 0.1
    assert audits.checkpoint(model, saved).ok
    assert not audits.checkpoint(model, saved, config={"lr": 1e-5}).ok  # asked for


def test_dropout_and_mode_are_no_difference():
    first = nn.Sequential(nn.Dropout(0.1), nn.Linear(2, 2)).eval()
    second = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    assert audits.describe(first) == audits.describe(second)


# ------------------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("layout", ["bare", "lightning", "asteroid", "namespace"])
def test_files_of_toolkits_are_read(tmp_path, model, trained, legacy, layout):
    content = {
        "bare": trained,
        "lightning": {
            "epoch": 3,
            "global_step": 100,
            "pytorch-lightning_version": "2.6.0",
            "state_dict": prefixed(trained, "model."),
            "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}],
            "hyper_parameters": {"sample_rate": 8000},
        },
        "asteroid": {
            "model_name": "Separator",
            "state_dict": trained,
            "model_args": {"n_src": 2, "sample_rate": 8000},
            "infos": {"software_versions": {"torch_version": torch.__version__}},  # no plain text
        },
        "namespace": {"model": trained, "args": argparse.Namespace(sample_rate=8000), "best": np.float64(3.0)},
    }[layout]
    path = tmp_path / "file.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    report = audits.checkpoint(model, path)
    assert report.fraction_with_prefix == 1.0
    assert codes(report) <= {"checkpoint-prefix"}
    report.load()
    assert torch.equal(model.encoder.weight, trained["encoder.weight"])


@pytest.mark.filterwarnings("ignore")  # Lightning's own, about workers and tree specifications
def test_a_checkpoint_that_lightning_wrote_is_read_without_its_code(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, width=4, sample_rate=8000):
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Linear(width, 1)

        def training_step(self, batch, index):
            return self.net(batch[0]).mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_steps=2, default_root_dir=tmp_path, **quiet)
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(8, 4)), batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert audits.checkpoint(Module(), tmp_path / "last.ckpt").findings == ()
    assert audits.checkpoint(Module().net, tmp_path / "last.ckpt").suggested_prefix == "net."
    assert codes(audits.checkpoint(Module(sample_rate=16000), tmp_path / "last.ckpt")) == {"checkpoint-config"}


def test_a_sharded_folder_is_read_whole(tmp_path, model, trained):
    keys = list(trained)
    files = {"model-00001-of-00002.safetensors": keys[:3], "model-00002-of-00002.safetensors": keys[3:]}
    for name, part in files.items():
        save_file({key: trained[key] for key in part}, tmp_path / name)
    index = {"weight_map": {key: name for name, part in files.items() for key in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps({"sample_rate": 16000}))
    report = audits.checkpoint(model, tmp_path)
    assert report.loaded_fraction == 1.0
    assert codes(report) == {"checkpoint-config"}
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    report = audits.checkpoint(model, tmp_path)
    assert codes(report) == {"checkpoint-unreadable"}
    assert "model-00002" in str(report)


class Mine:
    """Runs a command when unpickled, as any pickle can."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["zip", "legacy", "plain pickle"])
def test_a_pickle_with_code_is_refused_unrun_and_says_how_to_convert(tmp_path, model, trained, writer):
    trap, path = tmp_path / "trap", tmp_path / "bad.pt"
    content = {"state_dict": dict(trained), "extra": Mine(trap)}
    if writer == "plain pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "zip")
    report = audits.checkpoint(model, path)
    assert not trap.exists()
    (finding,) = report.findings
    assert (finding.code, finding.severity) == ("checkpoint-refused", "error")
    assert "mkdir" in finding.message
    assert "safetensors" in finding.advice
    with pytest.raises(RuntimeError, match="Nothing to load"):
        report.load()


def test_damaged_files_are_named_as_such(tmp_path, model, trained):
    whole = tmp_path / "whole.pt"
    torch.save(trained, whole)
    save_file(dict(trained), tmp_path / "whole.safetensors")
    data, safe = whole.read_bytes(), (tmp_path / "whole.safetensors").read_bytes()
    damaged = {
        "half.pt": data[: len(data) // 2],
        "tail.pt": data[:-30],
        "empty.pt": b"",
        "text.pt": b"this is no checkpoint",
        "html.pt": b"<!DOCTYPE html><html>404</html>",
        "half.safetensors": safe[: len(safe) // 2],
        "text.safetensors": b"this is no checkpoint either",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        report = audits.checkpoint(model, tmp_path / name)
        assert codes(report) == {"checkpoint-unreadable"}, name
        assert name in str(report)
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("readme.txt", "no weights")
    assert codes(audits.checkpoint(model, tmp_path / "other.pt")) == {"checkpoint-unreadable"}


def test_a_program_is_refused(tmp_path, model):
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as archive:  # what torch.jit.save writes, in outline
        archive.writestr("script/constants.pkl", pickle.dumps(()))
        archive.writestr("script/data.pkl", pickle.dumps({}))
        archive.writestr("script/version", "3")
        archive.writestr("script/code/__torch__.py", "")
    assert codes(audits.checkpoint(model, path)) <= {"checkpoint-refused", "checkpoint-unreadable"}


def test_what_is_no_checkpoint_says_what_is_legal(tmp_path, model):
    with pytest.raises(FileNotFoundError, match=r"\.safetensors"):
        audits.checkpoint(model, tmp_path / "absent.pt")
    with pytest.raises(TypeError, match="not list"):
        audits.checkpoint(model, [1, 2])
    assert codes(audits.checkpoint(model, {})) == {"checkpoint-unreadable"}
    assert codes(audits.checkpoint(model, {"epoch": 3})) == {"checkpoint-unreadable"}
    assert codes(audits.checkpoint(model, tmp_path)) == {"checkpoint-unreadable"}
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    assert codes(audits.checkpoint(model, tmp_path / "tensor.pt")) == {"checkpoint-unreadable"}


# --------------------------------------------------------------------------------------------------------- healthy

HEALTHY = {
    "linear": lambda: nn.Linear(3, 4),
    "batch norm": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)),
    "layer norm": lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)),
    "lstm": lambda: nn.LSTM(4, 5, num_layers=2, bidirectional=True),
    "gru": lambda: nn.GRU(4, 4),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16),
    "embedding with padding": lambda: nn.Embedding(10, 4, padding_idx=0),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "half precision": lambda: nn.Linear(4, 4).half(),
    "double precision": lambda: nn.Linear(4, 4).double(),
    "complex": lambda: nn.Linear(4, 4, dtype=torch.complex64),
    "no parameters": lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3, affine=False)),
    "frozen": lambda: nn.Linear(4, 4).requires_grad_(requires_grad=False),
    "buffers": lambda: nn.BatchNorm1d(3),
    "parallel": lambda: nn.DataParallel(nn.Linear(4, 4)),
    "bias alone": lambda: nn.ParameterDict({"bias": nn.Parameter(torch.randn(4))}),
    "separator": Separator,
    "bilinear": lambda: nn.Bilinear(3, 3, 2),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy_set_ups_give_no_finding(tmp_path, name):
    torch.manual_seed(5)
    saved = HEALTHY[name]()
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    torch.save({"state_dict": saved.state_dict(), "stethoscope": audits.describe(saved)}, tmp_path / "model.pt")
    report = audits.checkpoint(HEALTHY[name](), tmp_path / "model.pt")
    assert report.findings == (), str(report)
    assert report.loaded_fraction == 1.0


@settings(max_examples=60, deadline=None)
@given(data=st.data(), legacy=st.booleans())
def test_any_damage_to_a_file_is_a_finding_and_no_exception(tmp_path_factory, data, legacy):
    path = tmp_path_factory.mktemp("damaged") / "model.pt"
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, path, _use_new_zipfile_serialization=not legacy)
    content = bytearray(path.read_bytes())
    for at in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=3)):
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    assert isinstance(audits.checkpoint(nn.Linear(2, 2), path), audits.CheckpointReport)


@settings(max_examples=40, deadline=None)
@given(
    kept=st.sets(st.sampled_from(sorted(Separator().state_dict()))),
    prefix=st.text(st.sampled_from("abm._"), max_size=6).filter(lambda text: not text or text.endswith(".")),
)
def test_every_key_is_accounted_for_once(kept, prefix):
    model, state = Separator(), Separator().state_dict()
    if not kept:
        return
    report = audits.checkpoint(model, {prefix + key: state[key] for key in kept})
    assert sorted([*report.loaded, *report.missing, *report.mismatched]) == sorted(state)
    assert 0 <= report.loaded_fraction <= report.fraction_with_prefix <= 1
    assert report.ok == (kept == set(state) and not prefix)


@pytest.mark.parametrize(
    "card", ["hello", None, 3, [1], {"facts": None}, {"facts": [1]}, {"modules": None}, {"modules": {"": None}}]
)
def test_what_is_no_record_of_ours_is_left_alone(tmp_path, model, trained, card):
    assert audits.checkpoint(model, {"state_dict": trained, "stethoscope": card}).ok
    path = tmp_path / "model.safetensors"
    for text in ("no JSON", json.dumps(card)):
        save_file(trained, path, metadata={"stethoscope": text})
        assert audits.checkpoint(model, path).ok


def test_a_pointer_of_git_lfs_is_told_and_nobody_is_sent_to_unsafe_loading(tmp_path, model):
    for name in ("a.pt", "a.safetensors"):
        path = tmp_path / name
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
        (finding,) = audits.checkpoint(model, path).findings
        assert finding.code == "checkpoint-unreadable"
        assert "git lfs pull" in finding.advice
    path = tmp_path / "b.pt"
    path.write_bytes(bytes(range(256)) * 20)
    (finding,) = audits.checkpoint(model, path).findings
    assert finding.code == "checkpoint-unreadable"
    assert "weights_only" not in finding.message + finding.advice


class Width(nn.Module):
    def __init__(self, drop=0.1):
        super().__init__()
        self.width = 4
        self.gradient_checkpointing = drop > 0
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Dropout(drop) if drop else nn.Identity())


def test_a_name_that_the_checkpoint_records_twice_must_differ_from_both():
    source = {"state_dict": Width().state_dict(), "config": {"encoder": {"width": 4}, "decoder": {"width": 512}}}
    assert audits.checkpoint(Width(), source).findings == ()
    source["config"]["encoder"]["width"] = 8
    (difference,) = audits.checkpoint(Width(), source).differences
    assert difference == ("width", [8, 512], 4)


def test_what_only_training_needs_is_no_difference():
    source = {"state_dict": Width(0.1).state_dict(), "stethoscope": audits.describe(Width(0.1))}
    assert audits.checkpoint(Width(0.0), source).findings == ()


def test_an_activation_that_became_an_identity_is_a_difference(model, trained):
    source = {"state_dict": trained, "stethoscope": audits.describe(Separator())}
    (difference,) = audits.checkpoint(Separator(nn.Identity), source).differences
    assert difference == ("masker.4", "ReLU", None)


def test_nested_facts_are_compared_and_those_that_are_not_recorded_are_named(model, trained):
    source = {"state_dict": trained, "hparams": {"sample_rate": 8000}}
    report = audits.checkpoint(model, source, config={"data": {"sample_rate": 16000, "n_src": 2}})
    assert report.differences == (("data.sample_rate", 8000, 16000),)
    assert "not recorded in the checkpoint, so not compared: n_src" in report.summary


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.embedding.weight


def test_a_meta_model_keeps_its_ties_when_loaded():
    state = {"embedding.weight": torch.randn(20, 8)}
    with torch.device("meta"):
        model = Tied()
    audits.checkpoint(model, state).load()
    assert model.out.weight is model.embedding.weight
    assert torch.equal(model.out.weight, state["embedding.weight"])


@pytest.mark.filterwarnings("ignore")  # torch calls both of them deprecated
def test_a_quantised_model_is_not_run_and_says_how_to_load_it(trained):
    plain = nn.Sequential(nn.Linear(4, 4))
    model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(plain), {nn.Linear}, dtype=torch.qint8)
    for state in (plain.state_dict(), model.state_dict()):
        report = audits.checkpoint(model, state, example=torch.randn(2, 4))
        assert report.effect is None
        with pytest.raises(RuntimeError, match=r"Nothing to load|load_state_dict"):
            report.load()


@pytest.mark.filterwarnings("ignore")  # torch calls it deprecated
def test_a_model_with_the_old_weight_norm_that_has_been_run_can_be_weighed():
    model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 4)))
    model(torch.randn(2, 4)).sum().backward()
    before = model[0].weight
    state = {key: value + 0.1 for key, value in model.state_dict().items()}
    assert audits.checkpoint(model, state, example=torch.randn(2, 4)).effect.loaded > 0
    assert model[0].weight is before


def test_a_single_name_may_be_left_out_as_text():
    tuned, state = TwoHeads(), TwoHeads().state_dict()
    del state["head.weight"], state["head.bias"]
    assert audits.checkpoint(tuned, state, partial="head").ok
