import io

from rich.console import Console

from stethoscope import Finding, Record
from stethoscope._protocols import Run
from stethoscope.cli._layers import Layers


def shown(layers, **options):
    console = Console(file=io.StringIO(), width=100)
    console.print(layers.table(**options))
    return console.file.getvalue()


def layers(records, modules=(), findings=()):
    sink = Layers()
    sink.open(Run("a", "", modules=modules))
    sink.write(0, records, findings)
    sink.close()
    return sink


def rms(*names):
    return [Record("activation/rms", 0.5, 0, module=name) for name in names]


def test_a_row_holds_the_last_numbers_of_a_layer_and_of_its_parameters():
    records = rms("", "enc", "enc.0")
    records += [Record("gradient/norm", value, 0, module=f"enc.0.{name}") for name, value in (("w", 3.0), ("b", 4.0))]
    records += [
        Record("parameter/update_ratio", value, 0, module=f"enc.0.{name}") for name, value in (("w", 0.1), ("b", 0.2))
    ]
    records += [Record("activation/zero_fraction", 0.25, 0, module="enc.0")]
    sink = layers(records, modules=(("", "Net"), ("enc", "Sequential"), ("enc.0", "Conv1d")))
    sink.write(1, [Record("activation/rms", 0.75, 1, module="enc.0")], [])
    rows = [line for line in shown(sink).splitlines() if "enc" in line]
    assert len(rows) == 1
    assert rows[0].replace("│", " ").split() == ["enc.0", "Conv1d", "0.75", "25%", "5", "0.2"]


def test_parameters_of_a_part_that_is_never_called_count_for_what_holds_it():
    records = [*rms("", "encoder"), Record("gradient/norm", 7.0, 0, module="encoder.filterbank.filters")]
    assert " 7 " in shown(layers(records))


def test_a_model_that_is_one_module_has_a_row():
    assert "(model)" in shown(layers(rms(""), modules=(("", "Linear"),)))


def test_of_many_layers_those_with_findings_are_shown():
    found = Finding("nonfinite-activation", "error", "m", "a", step=0, module="layer37")
    text = shown(layers(rms(*(f"layer{i}" for i in range(100))), findings=[found]), most=10)
    assert "10 of 100" in text
    assert [name in text for name in ("layer0 ", "layer37 ", "layer99 ")] == [True, True, True]
    assert text.count("layer") == 10 + 1  # and the heading


def test_names_are_shown_as_they_are_and_validation_is_not():
    records = [*rms("[red]x[/red]"), Record("activation/rms", 0.5, 0, module="val_only", phase="val")]
    text = shown(layers(records))
    assert "[red]x[/red]" in text
    assert "val_only" not in text


def test_nothing_measured_is_an_empty_table():
    assert "layer" in shown(layers([]))
