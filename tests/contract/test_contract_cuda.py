"""The contract on a GPU: methods train there in single and half precision, resume there, and move to the processor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from contract_rows import ROWS, Row, Task
from test_contract import fit, outputs, same
from torch import nn

import lightning_compress as lc
from lightning_compress import journal_of
from lightning_compress.core.select import Selection
from lightning_compress.quantization import QuantizerSpec
from lightning_compress.quantization.observers import build_observer, collect
from lightning_compress.quantization.sharing.held import HeldCodes

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
]

rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make kernels give the same sums in every run."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@rows
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_trains_on_the_gpu_and_its_file_loads_on_the_processor(row: Row, precision: str, tmp_path: Path) -> None:
    model, callback, _ = fit(row, tmp_path, accelerator="cuda", precision=precision)
    final = callback.compressed if row.finalized else model
    assert [(edit.verb, edit.path) for edit in journal_of(final)] == [*row.prepared, *row.finalized]
    assert callback.at_target
    lc.save_compressed(final, tmp_path / "file.safetensors")
    bare = lc.load_compressed(Task(row.net), tmp_path / "file.safetensors")
    assert same({name: tensor.cpu() for name, tensor in final.state_dict().items()}, bare.state_dict())
    assert torch.isfinite(outputs(bare)).all()
    assert torch.equal(outputs(bare), outputs(final.cpu()))


@rows
@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
@pytest.mark.filterwarnings("ignore:.*defaults to a non-deterministic algorithm")
def test_resume_on_the_gpu_equals_uninterrupted(row: Row, tmp_path: Path, deterministic: None) -> None:
    model, callback, _ = fit(row, tmp_path / "whole", accelerator="cuda")
    checkpoint = str(tmp_path / "whole" / "step=9.ckpt")
    resumed, again, _ = fit(row, tmp_path / "resumed", 1234, checkpoint, accelerator="cuda")
    assert same(model.state_dict(), resumed.state_dict())
    assert callback.history == again.history


@rows
def test_a_run_moves_from_the_gpu_to_the_processor_and_back(row: Row, tmp_path: Path) -> None:
    fit(row, tmp_path / "gpu", accelerator="cuda", max_epochs=1)
    first = str(tmp_path / "gpu" / "step=6.ckpt")
    on_processor, _, _ = fit(row, tmp_path / "cpu", 1, first)
    on_gpu, callback, _ = fit(row, tmp_path / "back", 2, str(tmp_path / "cpu" / "step=9.ckpt"), accelerator="cuda")
    assert journal_of(on_gpu) == journal_of(on_processor)
    assert callback.updates == 16
    assert all(torch.isfinite(tensor).all() for tensor in on_gpu.state_dict().values() if tensor.is_floating_point())


@pytest.fixture
def impatient() -> Iterator[None]:
    """Make it an error to wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def held_on_the_gpu() -> tuple[dict[str, nn.Linear], HeldCodes]:
    layers = {"0": nn.Linear(8, 4, bias=False).cuda()}
    held = HeldCodes()
    held.find(nn.ModuleDict(layers), Selection(layers, {}))
    held.share(layers, {"0.weight": torch.tensor([0, 1, 2, -1] * 8)}, "0.weight", torch.tensor([1.0, 2.0, 3.0]))
    layers["0"].weight.grad = torch.ones(4, 8).cuda()
    return layers, held


def test_shared_weights_take_a_step_without_waiting(request: pytest.FixtureRequest) -> None:
    layers, held = held_on_the_gpu()
    weight = layers["0"].weight
    request.getfixturevalue("impatient")
    with torch.no_grad():
        held.share_gradients(layers)
        weight -= weight.grad
        held.tie(layers)
    torch.cuda.set_sync_debug_mode("default")
    assert weight.tolist() == [[-7.0, -6.0, -5.0, 0.0] * 2] * 4


@pytest.mark.parametrize("name", ["moving_average", "percentile", "mse", "lsq"])
def test_observers_count_without_waiting_and_as_on_the_processor(name: str, request: pytest.FixtureRequest) -> None:
    spec, x = QuantizerSpec(symmetric=True, range=name), torch.randn(3, 1000) * torch.tensor([[1.0], [9.0], [0.1]])
    there, here = build_observer(spec).cuda(), build_observer(spec)
    for observer, rows in ((here, x), (there, x.cuda())):
        observer.observe(rows[0])
        collect([observer])
        if rows.is_cuda:
            request.getfixturevalue("impatient")
        for row in rows[1:]:
            observer.observe(row)
            collect([observer])
    torch.cuda.set_sync_debug_mode("default")
    for mine, theirs in zip(here.buffers(), there.buffers(), strict=True):
        assert torch.allclose(mine, theirs.cpu())
