"""Nothing that looks like a secret leaves the process; what does not is left as it is."""

import json
import os
import sys
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from stethoscope import Finding, Monitor, audits, sinks
from stethoscope._secrets import redacted, without_secrets


@pytest.mark.parametrize(
    "text",
    [
        "https://me:planted@host/r.git",
        "https://planted@github.com/me/r.git",
        "GET https://h/x?a=1&X-Amz-Signature=planted&b=2",
        "https://h/x?api_token=planted",
        "Authorization: Bearer planted",
        "authorization: off planted",
        "authorization: none\nAuthorization: Basic planted",
        "password=none-planted, secret=on1planted",
        "{'authorization': 'Basic planted'}",
        "sent bearer planted12",
        "train.py --api-key planted --epochs 3",
        "train.py --hf-token=planted123",
        "api_key='planted'",
        '{"password": "planted"}',
        "AWS_SECRET_ACCESS_KEY=planted",
        "token=planted0123456789abcd",
        "wandb.login(key='planted0123456789abcdef')",
        "sk-planted0123456789abcdef",
        "ghp_planted0123456789abcdef",
        "hf_plantedabcdefghijklmnop",
        "-----BEGIN RSA PRIVATE KEY-----\nplanted\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_what_has_the_form_of_a_secret_is_left_out(text):
    assert "planted" not in without_secrets(f"it failed: {text}")
    assert "***" in without_secrets(text)


@pytest.mark.parametrize(
    "text",
    [
        "size mismatch for cls_token: copying a param with shape torch.Size([1, 768])",
        "KeyError: 'encoder.layers.0.weight'",
        "num_tokens=123456789012345678, mask_token=encoder.layers.0.self_attention",
        "--tokenizer facebook/wav2vec2-base",
        "key: encoder_layers_12_self_attn_k_proj_weight",
        "https://host/api?num_tokens=12&key_size=3",
        "--pad-token 0 --num-secret 3",
        "authorization: off",
        "{'authorization': 'off', 'password': None, 'secret': True}, api_key=null; passwd: no",
        "no bearer of news; key: encoder.layers.11.attention",
        "mask-rcnn-0123456789abcdefghij at https://host/a?b=1",
    ],
)
def test_the_words_of_the_trade_are_no_secrets(text):
    assert without_secrets(text) == text


def test_what_a_variable_or_an_option_holds_is_left_out_wherever_it_stands(monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "planted-one")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "innocently")
    monkeypatch.setattr(sys, "argv", ["train.py", "--db-password", "planted-two", "--key=planted-three", "--token"])
    said = without_secrets("planted-one, planted-two and planted-three, innocently in train.py")
    assert said == "***, *** and ***, innocently in train.py"


@settings(deadline=None)
@given(st.text(max_size=300), st.text(max_size=30))
def test_replacing_twice_is_replacing_once_and_texts_of_letters_stay(text, word):
    once = without_secrets(text)
    assert without_secrets(once) == once
    plain = "".join(each for each in word if each.isalpha())
    assert without_secrets(plain) == plain


def test_a_megabyte_of_what_almost_looks_like_one_takes_no_time():
    began = time.process_time()
    for text in ("-", "?token", "token=", "://", "--key-", "authorization: ", "eyJaaaaaaaa."):
        without_secrets(text * (200_000 // len(text)))
    assert time.process_time() - began < 10


def test_a_finding_without_secrets_is_the_same_one():
    finding = Finding("loss-spike", "error", "m", "a", evidence={"at": (float("nan"), torch.ones(3)), "names": ["a"]})
    assert redacted(finding) is finding


def test_evidence_that_holds_itself_ends():
    evidence = {}
    evidence["again"] = evidence
    with Monitor(nn.Linear(2, 2)) as monitor:
        monitor.add(Finding("loss-spike", "error", "m", "a", evidence=evidence))
    assert json.dumps(monitor.findings[0].evidence).count("again") == 20


def test_no_file_log_or_finding_holds_a_secret(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SERVICE_API_KEY", "sk-planted-1")
    monkeypatch.setattr(sys, "argv", ["train.py", "--token", "planted-2-of-argv"])

    class Remote(sinks.Memory):
        def write(self, step, records, findings):
            raise OSError(f"401 at https://me:planted-3@host with {sys.argv[2]}")

    class Unclosed(sinks.Memory):
        def close(self):
            raise OSError(f"no answer to {os.environ['SERVICE_API_KEY']}")

    told = []
    model = nn.Linear(2, 2)
    with Monitor(model, sinks=[Remote(), Unclosed(), tmp_path / "run"], on_finding=told.append) as monitor:
        monitor.step(loss=1.0)
        monitor.add(
            Finding(
                "loss-spike", "warning", "see https://a:planted-4@h", "use sk-planted-1", evidence={"argv": sys.argv}
            )
        )
    assert [f.code for f in told] == ["part-disabled", "loss-spike"]
    assert told[1].message == "see https://***@h"
    everything = [caplog.text, str(told), *(file.read_text() for file in tmp_path.rglob("*") if file.is_file())]
    assert len(everything) == 3
    assert not [text for text in everything if "planted" in text]
    assert "no answer to ***" in caplog.text


def test_a_bundle_holds_no_secret_and_says_that_something_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("SERVICE_API_KEY", "planted-1")

    class Net(nn.Module):
        def forward(self, x, api_key="", where="", text=""):
            return x / 0

    report = audits.nonfinite(
        Net(), torch.ones(2, 3), api_key="planted", where="https://me:planted@h/x.wav", text="a token, a key"
    )
    folder = report.save(tmp_path / "bundle")
    note = (folder / "incident.json").read_text()
    assert "planted" not in note
    assert "a token, a key" in note
    assert "calls.0.kwargs.api_key looks like a secret" in json.loads(note)["left_out"]
    assert not {*os.environ} & {*note.split('"')} - {"_"}
