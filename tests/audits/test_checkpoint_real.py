"""Checkpoints that other libraries wrote. See docs/contributing.md on how to get them."""

import pytest
import torch

from stethoscope import audits

CONFIGURATION = {"n_src": 2, "n_filters": 64, "bn_chan": 32, "hid_size": 32, "chunk_size": 50, "n_repeats": 1}


def codes(report):
    return [finding.code for finding in report.findings]


def shaken(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


@pytest.mark.real
def test_asteroid_half_loaded_dprnn_tasnet(tmp_path):
    models = pytest.importorskip("asteroid.models")
    trained = shaken(models.DPRNNTasNet(**CONFIGURATION, sample_rate=8000))
    state, x = trained.state_dict(), torch.randn(3, 4000)
    assert len(state) == 38
    torch.save(trained.serialize(), tmp_path / "model.pth")
    model = models.DPRNNTasNet(**CONFIGURATION, sample_rate=8000)
    assert audits.checkpoint(model, tmp_path / "model.pth", example=x).findings == ()

    report = audits.checkpoint(model, {f"module.{key}": value for key, value in state.items()})
    assert (len(report.loaded), report.suggested_prefix) == (0, "module.")
    assert codes(report) == ["checkpoint-prefix"]

    report = audits.checkpoint(model, {k: v for k, v in state.items() if not k.startswith("masker")}, example=x)
    assert codes(report) == ["checkpoint-partial"]
    assert report.by_module["masker"][0] == 0

    report = audits.checkpoint(model, {k: v for k, v in state.items() if k.startswith("masker")}, example=x)
    assert len(report.missing) == 2
    assert report.loaded_fraction > 0.9
    assert report.findings[0].severity == "error"
    assert report.effect.missing > 0.5

    other = models.DPRNNTasNet(**CONFIGURATION, sample_rate=16000, mask_act="relu")
    report = audits.checkpoint(other, tmp_path / "model.pth")
    assert codes(report) == ["checkpoint-config"]
    assert {item.where for item in report.differences} == {"sample_rate", "mask_act"}
    report.load()  # passes, and is what happens without an audit


@pytest.mark.slow
def test_transformers_folders(tmp_path):
    transformers = pytest.importorskip("transformers")
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 99,
    }
    config = transformers.BertConfig(**size)
    shaken(transformers.BertForMaskedLM(config)).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert audits.checkpoint(transformers.BertForMaskedLM(config), tmp_path).findings == ()  # tied head
    report = audits.checkpoint(transformers.BertModel(config), tmp_path, partial=["pooler", "cls"])
    assert report.suggested_prefix == "bert."
    heads = transformers.BertConfig(**{**size, "num_attention_heads": 4})
    assert codes(audits.checkpoint(transformers.BertForMaskedLM(heads), tmp_path)) == ["checkpoint-config"]
