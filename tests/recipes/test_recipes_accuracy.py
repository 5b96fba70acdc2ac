"""What the default recipe promises, over three seeds."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from lightning_compress.cli import main


@pytest.mark.slow
def test_digits_keep_their_accuracy_at_a_sixth_of_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reports, seconds = [], []
    for seed in range(3):
        started = time.monotonic()
        assert main(["recipes=digits_prune", f"seed={seed}", f"hydra.run.dir={seed}", "trainer=quiet"]) == 0
        seconds.append(time.monotonic() - started)
        reports.append(json.loads(Path(str(seed), "report.json").read_text()))
    for report in reports:
        assert report["baseline"]["metrics"]["accuracy"] >= 0.98
        assert report["compression_rate"] >= 6
        sparsity = [entry["sparsity"] for entry in report["history"]]
        assert sparsity[-1] == pytest.approx(0.9, abs=1e-4)
    lost = [-report["metric_deltas"]["accuracy"] for report in reports]
    assert sum(lost) / len(lost) <= 0.01
    assert min(seconds) < 180
