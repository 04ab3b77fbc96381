import pytest
from hypothesis import given
from hypothesis import strategies as st

from stethoscope.watches._metric_names import bookkeeping, loss, nearest, phase, rate, split


@pytest.mark.parametrize(
    ("name", "bare", "says"),
    [
        ("loss", "loss", ""),
        ("train_loss", "loss", "train"),
        ("val_loss", "loss", "val"),
        ("valid/loss", "loss", "val"),
        ("dev_cer", "cer", "val"),
        ("cv_loss", "loss", "val"),
        ("eval_loss", "loss", "val"),
        ("test/acc", "acc", "test"),
        ("train_loss_step", "loss", "train"),
        ("train_loss_epoch", "loss", "train"),
        ("val_loss/dataloader_idx_0", "loss", "val"),
        ("val/acc_epoch/dataloader_idx_12", "acc", "val"),
        ("Loss/train", "Loss", "train"),
        ("training_batch_wer", "wer", "train"),
        ("valid/er/ctc", "er/ctc", "val"),
        ("epoch", "epoch", ""),
        ("global_step", "global_step", ""),
        ("val", "val", ""),
        ("evaluate", "evaluate", ""),
        ("_step", "_step", ""),
        ("devil_loss", "devil_loss", ""),
    ],
)
def test_affixes_are_taken_off(name, bare, says):
    assert split(name) == (bare, says)


@given(st.text())
def test_any_text_has_a_bare_name(name):
    bare, says = split(name)
    assert bare in name
    assert bool(bare) == bool(name)
    assert says in {"", "train", "val", "test"}


def test_phases_have_one_spelling():
    assert [phase(given) for given in ("cv", "dev", "Valid", "eval", "training", "probing")] == [
        "val",
        "val",
        "val",
        "val",
        "train",
        "probing",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "lr",
        "lr/1",
        "lr-AdamW",
        "learning_rate",
        "learningRate",
        "grad_norm",
        "epoch",
        "eval_runtime",
        "train_samples_per_second",
        "total_flos",
        "gpu_mem_gb",
        "batch_size",
        "weight",
        "val_wer_num",
        "val_wer_denom",
        "num_utts",
        "train_step_timing in s",
        "step",
        "global_step",
    ],
)
def test_bookkeeping_is_told_from_results(name):
    assert bookkeeping(name)


@pytest.mark.parametrize(
    "name", ["loss", "th_accuracy", "wer", "cer_ctc", "one_step_error", "weighted_f1", "si_sdr_db"]
)
def test_results_are_no_bookkeeping(name):
    assert not bookkeeping(name)


def test_kinds_of_results():
    assert all(map(rate, ("acc", "th_accuracy", "val_acc", "rewards/accuracies", "macro_f1")))
    assert not any(map(rate, ("loss", "grad_acc", "wer", "accumulated")))
    assert all(map(loss, ("loss", "loss_ctc", "train_nll", "ctcLoss")))
    assert not any(map(loss, ("acc", "lossless")))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("th_acuracy", "th_accuracy"),
        ("acc", "th_accuracy"),
        ("val_acc", "th_accuracy"),
        ("ctc_loss", "loss_ctc"),
        ("LossCTC", "loss_ctc"),
        ("wer", None),
    ],
)
def test_the_nearest_name_is_found(name, meant):
    assert nearest(name, ["loss", "loss_ctc", "th_accuracy", "epoch"]) == meant


def test_a_name_is_not_its_own_neighbour():
    assert nearest("loss", ["loss"]) is None


@pytest.mark.parametrize(
    ("one", "other"), [("g_loss", "d_loss"), ("g_loss", "mel_loss"), ("loss_stage1", "loss_stage2"), ("top1", "top5")]
)
def test_names_that_share_a_word_or_differ_in_a_number_are_two_things(one, other):
    assert nearest(one, [other]) is None


def test_a_slip_in_one_word_of_a_name_is_found():
    for slip, meant in (("vall_loss", "val_loss"), ("ctcloss", "ctc_loss"), ("val_th_acuracy", "th_accuracy")):
        assert nearest(slip, ["lr", "pesq", meant]) == meant
