"""``export`` in a recipe: the file, its check and its times in the report; and where that is impossible."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from lightning_compress import load_compressed
from lightning_compress.evaluation import validate_report
from lightning_compress.models import DigitsCNN, ImageClassifier
from lightning_compress.run import exporting
from lightning_compress.run.exporting import export_model, read_export

START = ("--config-dir=conf", "recipes=tiny")


def test_a_recipe_writes_checks_and_times_a_file(tiny: Callable[..., Any]) -> None:
    result = tiny("export=onnx", "report.latency=true")
    assert result.code == 0, result.err
    assert f"exported file: {Path('run/compressed.onnx').absolute()}" in result.out
    report = json.loads(Path("run/report.json").read_text())
    validate_report(report)
    entry = report["export"]
    assert (entry["target"], entry["file"], entry["dynamic_batch"]) == ("onnx", "compressed.onnx", True)
    assert entry["bytes"] == Path("run/compressed.onnx").stat().st_size
    assert entry["baseline_bytes"] > 0
    assert entry["difference"] < 1e-4
    times = entry["latency_ms"]
    assert times["baseline"]["backend"] == times["compressed"]["backend"] == "onnxruntime"
    assert entry["speedup_rate"] == pytest.approx(times["baseline"]["median"] / times["compressed"]["median"])
    for text in (Path("run/report.md").read_text(), Path("run/report.html").read_text(), result.out):
        assert "onnxruntime)" in text
        assert "onnx file, bytes" in text
    module = load_compressed(ImageClassifier(DigitsCNN()), "run/compressed.safetensors").eval()
    x = torch.rand(3, 1, 8, 8)
    session = onnxruntime.InferenceSession("run/compressed.onnx", providers=["CPUExecutionProvider"])
    with torch.no_grad():
        assert np.allclose(session.run(None, {"input": x.numpy()})[0], module(x).numpy(), atol=1e-4)


def test_a_mapping_says_where_and_a_file_can_be_exported_later(tiny: Callable[..., Any]) -> None:
    assert tiny("export={target: torch, path: files/net}").code == 0
    entry = json.loads(Path("run/report.json").read_text())["export"]
    assert Path("run/files/net.pt2").stat().st_size == entry["bytes"]
    assert entry["latency_ms"] == {"baseline": None, "compressed": None}
    later = tiny(
        *("task=evaluate", "model.checkpoint=run/compressed.safetensors", "export=torch", "hydra.run.dir=again"),
        recipe=START,
    )
    assert later.code == 0, later.err
    assert Path("again/compressed.pt2").is_file()
    assert json.loads(Path("again/report.json").read_text())["export"]["baseline_bytes"] is None


def test_what_cannot_be_exported_is_an_error_after_the_report(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DigitsCNN.forward

    def branching(self: DigitsCNN, images: torch.Tensor) -> torch.Tensor:
        logits = original(self, images)
        return logits if bool(logits.mean() > -1e9) else -logits

    monkeypatch.setattr(DigitsCNN, "forward", branching)
    result = tiny("export=torch")
    assert result.code == 2
    assert "`export`: the model cannot be exported" in result.err
    report = json.loads(Path("run/report.json").read_text())
    assert "export" not in report
    assert any(note.startswith("Nothing was exported") for note in report["notes"])
    assert Path("run/compressed.safetensors").is_file()


def test_a_new_run_does_not_leave_an_old_file(tiny: Callable[..., Any]) -> None:
    assert tiny("export=torch").code == 0
    assert tiny().code == 0
    assert not Path("run/compressed.pt2").exists()
    assert Path("run/compressed.safetensors").is_file()


def test_a_network_whose_batch_is_fixed_is_written_but_not_timed(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 4) + 1

    entry, path = export_model(read_export("onnx") or {}, tmp_path, None, Fixed(), torch.randn(1, 4), 1)
    assert path.is_file()
    assert entry["left"][""].startswith("the batch size is fixed")
    assert entry["latency_ms"]["compressed"] is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("onxx", "`export`: `target` is 'onxx'; did you mean 'onnx'"),
        (3, "`export` must be a target such as onnx"),
        ({"path": "x"}, "a mapping with `target`"),
        ({"target": "onnx", "pth": "x"}, "`export.pth` is not known; did you mean 'path'"),
        ({"target": "onnx", "int4": "yes"}, "`export.int4` must be like False"),
        ({"target": "onnx", "path": ""}, "`export.path` must be like 'compressed'"),
        ({"target": "torch", "int4": True}, "`export.int4` is for the target onnx"),
    ],
)
def test_bad_input_is_named_before_training(value: Any, message: str) -> None:
    with pytest.raises(exporting.ConfigurationError, match=message):
        read_export(value)


def test_a_missing_package_is_said_before_training(tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = exporting.check_target

    def lacking(target: str, needs: bool = False) -> None:
        real(target)
        if needs:
            raise exporting.ConfigurationError("this target needs 'onnx'; install it with: pip install 'x[onnx]'")

    monkeypatch.setattr(exporting, "check_target", lacking)
    result = tiny("export=onnx")
    assert result.code == 2
    assert "needs 'onnx'" in result.err
    assert "export=null" in result.err
    assert not Path("run/state.json").exists()
