import copy
import dataclasses
import io
import json
import math
from fractions import Fraction

import pytest
import torch
import torchvision
from rich.console import Console
from torch import nn

from lightning_compress.core.checkpoint import save_compressed
from lightning_compress.core.copies import structure_copy
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.journal import Edit
from lightning_compress.core.verbs import apply
from lightning_compress.evaluation.environment import describe_environment
from lightning_compress.evaluation.flips import Flips
from lightning_compress.evaluation.latency import Latency
from lightning_compress.evaluation.measurement import LayerCost, Measurement, layer_table, measure
from lightning_compress.evaluation.render import print_report, render_html, render_markdown, summary_rows, write_report
from lightning_compress.evaluation.report import assemble_report, build_report
from lightning_compress.evaluation.schema import to_json, validate_report


def small(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))


def pruned():
    model = small()
    with torch.no_grad():
        model[3].weight[model[3].weight.abs() < model[3].weight.abs().median()] = 0
    return model


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    model = pruned()
    artifact = save_compressed(model, tmp_path_factory.mktemp("artifact") / "model.safetensors")
    return build_report(
        small(),
        model,
        example_inputs=torch.randn(1, 1, 8, 8),
        test_batches=iter([(torch.randn(20, 1, 8, 8), 0)]),
        artifact=artifact,
        history=[{"step": 0, "sparsity": 0.0}, {"step": 10, "sparsity": 0.5, "loss": math.nan}],
        recipe="a|b<i>",
        seed=3,
    )


def layer(parameters, shape=(2, 2), kind="Linear"):
    return LayerCost(kind, list(shape), parameters, parameters, 32, parameters)


def test_the_keys_are_those_of_the_schema(report):
    validate_report(report)
    validate_report(json.loads(json.dumps(report, allow_nan=False)))


def test_figures(report):
    before, after = report["baseline"], report["compressed"]
    assert before["parameters"] == after["parameters"] == 40 + 1450
    assert before["macs"] == after["macs"] == 36 * 4 * 9 + 1440
    assert after["nonzero_parameters"] == 1490 - 719
    assert 0 < report["prediction_flip_rate"] <= 1
    assert after["latency_ms"]["batch_size"] == 1
    assert report["metric_deltas"] is None
    assert report["history"][1]["loss"] is None
    assert any("not a LightningModule" in note for note in report["notes"])


def test_rates_by_hand(tmp_path):
    artifact = save_compressed(nn.Linear(2, 2), tmp_path / "model.safetensors")
    size = artifact.bytes

    def at(median):
        return Latency(median, median, median, 1, 1, "eager", False, 5)

    before = Measurement(dense_bytes=4 * size, metrics={"accuracy": 0.75, "loss": 1.0}, latency=at(3.0))
    after = Measurement(dense_bytes=4 * size, metrics={"accuracy": 0.5, "extra": 1.0}, latency=at(2.0))
    report = assemble_report(before, after, flips=Flips(1, 4), artifact=artifact)
    assert report["compression_rate"] == 4
    assert report["index_space_saving"] == 3
    assert report["space_saving"] == 0.75
    assert report["speedup_rate"] == 1.5
    assert report["metric_deltas"] == {"accuracy": -0.25}
    assert report["prediction_flip_rate"] == 0.25
    assert report["compressed"]["artifact_bytes"] == size == (tmp_path / "model.safetensors").stat().st_size
    assert report["compressed"]["encoded_bits"] == dict(artifact.encoded_bits)
    validate_report(report)


def test_without_a_baseline_everything_about_it_is_unknown():
    report = assemble_report(None, measure(small()), flips=Flips(reason="no model"))
    validate_report(report)
    assert set(report["baseline"].values()) == {None}
    assert report["compression_rate"] is report["speedup_rate"] is report["metric_deltas"] is None
    assert report["layers"][0]["parameters"] == [None, 40]
    assert any("Nothing is known about a baseline" in note for note in report["notes"])


def test_an_earlier_measurement_serves_as_baseline():
    earlier = measure(small(), torch.zeros(1, 1, 8, 8)).with_metrics({"accuracy": 0.5})
    report = build_report(earlier, pruned(), example_inputs=torch.zeros(1, 1, 8, 8))
    assert report["baseline"]["macs"] == report["compressed"]["macs"]
    assert report["baseline"]["metrics"] == {"accuracy": 0.5}
    assert report["baseline"]["latency_ms"] is None
    assert report["compressed"]["latency_ms"] is not None
    assert report["prediction_flip_rate"] is None


def test_failing_forwards_become_notes():
    report = build_report(small(), small(), example_inputs=torch.zeros(1, 2), test_batches=[torch.zeros(1, 2)])
    validate_report(report)
    assert report["baseline"]["macs"] is report["baseline"]["latency_ms"] is report["prediction_flip_rate"] is None
    assert {"MACs", "latency", "flip"} <= {
        word for note in report["notes"] for word in note.split() if "unknown" in note
    }


def test_edits_are_listed():
    model = small()
    apply(model, Edit("slice", "0", config={"tensors": {"weight": {"0": [0, 2]}, "bias": {"0": [0, 2]}}}))
    report = build_report(small(), model, latency=False)
    assert [(edit["verb"], edit["path"]) for edit in report["edits"]] == [("slice", "0")]
    assert report["layers"][0]["parameters"] == [40, 20]
    validate_report(report)
    assert "| slice | 0 |" in render_markdown(report)


def test_layers_that_were_replaced_stay_in_their_row():
    before = Measurement(macs=1, layers={"": layer(1), "fc": layer(100, (10, 10)), "out": layer(9)})
    after = Measurement(
        macs=1, layers={"": layer(1), "fc.0": layer(20), "fc.1": layer(20), "out": layer(9), "new.x": layer(5)}
    )
    rows = {row["name"]: row for row in layer_table(before, after)}
    assert list(rows) == ["", "fc", "out", "new.x"]
    assert rows["fc"]["parameters"] == [100, 40]
    assert rows["fc"]["shape"] == [10, 10]
    assert rows["new.x"]["parameters"] == [0, 5]
    assert [sum(row["parameters"][side] for row in rows.values()) for side in (0, 1)] == [110, 55]


def test_layers_of_a_removed_module_and_of_a_container_with_parameters():
    before = Measurement(macs=0, layers={"enc": layer(3), "enc.fc": layer(100), "gone": layer(7)})
    after = Measurement(macs=0, layers={"enc": layer(3), "enc.fc.a": layer(10), "enc.more": layer(4)})
    rows = {row["name"]: row["parameters"] for row in layer_table(before, after)}
    assert rows == {"enc": [3, 3], "enc.fc": [100, 10], "gone": [7, 0], "enc.more": [0, 4]}


def test_layer_rows_sum_to_the_totals():
    model = torchvision.models.vit_b_16
    with torch.device("meta"):
        measured = measure(model(num_classes=3), torch.zeros(1, 3, 224, 224))
    rows = layer_table(measured, measured)
    assert sum(row["parameters"][1] for row in rows) == measured.parameters
    assert sum(row["macs"][0] for row in rows) == measured.macs
    assert {row["type"] for row in rows} >= {"Conv2d", "Linear", "LayerNorm", "MultiheadAttention"}


def test_parametrized_layers_keep_their_name_and_type():
    model = nn.Sequential(nn.Linear(3, 2))
    nn.utils.parametrizations.weight_norm(model[0])
    rows = layer_table(None, measure(model, torch.zeros(1, 3)))
    assert [(row["name"], row["type"], row["shape"], row["parameters"][1]) for row in rows] == [
        ("0", "Linear", [2, 3], 10)
    ]


def test_looking_at_a_model_that_trains_does_not_move_its_parametrizations():
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 2))
    before = copy.deepcopy(model.state_dict())
    assert measure(model).layers[""].shape == [2, 3]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    skeleton = structure_copy(model, lambda tensor: torch.empty_like(tensor, device="meta"))
    assert measure(skeleton, torch.zeros(1, 3)).parameters == 8


def test_a_type_that_no_dense_file_holds_costs_its_size_only():
    model = small()
    model.register_buffer("wide", torch.zeros(2, dtype=torch.complex128))
    measured = measure(model, torch.zeros(1, 1, 8, 8))
    assert measured.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert measured.dense_bytes is measured.gzip_bytes is None
    assert "complex128 in 'wide'" in measured.reasons["dense_bytes"]
    assert measured.reasons["gzip_bytes"] == measured.reasons["dense_bytes"]


def test_a_measurement_survives_its_state(tmp_path):
    times = Latency(1.0, 0.5, 2.0, 1, 1, "eager", False, 5)
    measured = measure(small(), torch.zeros(1, 1, 8, 8)).with_metrics({"a": 1.0}).with_latency(times)
    torch.save(measured.to_state(), tmp_path / "state.pt")
    assert Measurement.from_state(torch.load(tmp_path / "state.pt", weights_only=True)) == measured


def test_reasons_come_and_go():
    measured = measure(small(), gzip=False)
    assert measured.reasons.keys() == {"metrics", "latency", "macs", "gzip_bytes"}
    assert "metrics" not in measured.with_metrics({"a": 1.0}).reasons
    assert measured.with_metrics({}, "none logged").reasons["metrics"] == "none logged"


def test_files_are_strict_json_and_replace_older_ones(report, tmp_path):
    broken = report | {"compression_rate": math.inf}
    (tmp_path / "report.json").write_text("old")
    paths = write_report(broken, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]

    def refuse(constant):
        raise AssertionError(constant)

    read = json.loads(paths["report.json"].read_text(encoding="utf-8"), parse_constant=refuse)
    assert read["compression_rate"] is None
    validate_report(read)
    assert paths["report.json"].stat().st_mode & 0o444


def test_a_folder_that_is_a_file_is_named(report, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="`folder`"):
        write_report(report, tmp_path / "file")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(report, tmp_path, monkeypatch):
    (tmp_path / "report.json").write_text("old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(ConfigurationError, match="No space left"):
        write_report(report, tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_pages_show_every_row_and_escape_text(report):
    page, text = render_html(report), render_markdown(report)
    assert "<i>" not in page
    assert "a|b&lt;i&gt;" in page
    for label, *_ in summary_rows(report):
        assert f"<td>{label}</td>" in page
        assert f"| {label} |" in text
    assert "http" not in page.replace("http-equiv", "")
    assert page.count("<table") == page.count("</table>") == 4
    assert text.count("| 3 | Linear | 10 × 144 | 1,450 → 1,450 |") == 1


def test_markdown_tables_are_rectangular(report):
    rows = [line for line in render_markdown(report).splitlines() if line.startswith("|")]
    widths = [line.replace("\\|", "").count("|") for line in rows]
    assert set(widths) == {5, 8, 4}


def test_the_terminal_shows_table_and_notes(report):
    console = Console(record=True, width=140, file=io.StringIO())
    print_report(report, console)
    shown = console.export_text()
    assert "non-zero parameters" in shown
    assert "1.93x less" in shown
    assert all(note[:40] in shown for note in report["notes"])


def test_environment():
    environment = describe_environment()
    assert environment["torch"] == str(torch.__version__)
    assert environment["threads"] == torch.get_num_threads()
    assert environment["cpu"]


def test_to_json_of_odd_values():
    given = {1: (Fraction(1, 2), torch.tensor([1, 2])), "b": {-math.inf}, "c": True}
    assert to_json(given) == {"1": ["1/2", [1, 2]], "b": [None], "c": True}


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("seed",), "x", "'seed' has an invalid value"),
        (("baseline", "macs"), 1.5, "'baseline.macs'"),
        (("compressed", "latency_ms", "p10"), None, "'compressed.latency_ms.p10'"),
        (("layers", 0, "bits"), [1, 2, 3], r"'layers\[0\].bits'"),
        (("compressed", "encoded_bits", "values"), 0.5, "encoded_bits.values"),
        (("schema",), 2, "'schema'"),
        (("compression_rate",), math.nan, "'compression_rate'"),
        (("speedup",), 1, "did you mean 'speedup_rate'"),
    ],
)
def test_validation_names_the_key(report, path, value, match):
    changed = json.loads(json.dumps(report))
    part = changed
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(ConfigurationError, match=match):
        validate_report(changed)


def test_validation_wants_every_key(report):
    for key in report:
        with pytest.raises(ConfigurationError, match=key):
            validate_report({name: value for name, value in report.items() if name != key})


def test_fields_of_the_dataclass_and_the_report_agree(report):
    names = {field.name for field in dataclasses.fields(Measurement)} - {"layers", "reasons", "latency"} | {
        "latency_ms"
    }
    assert names == report["baseline"].keys()
