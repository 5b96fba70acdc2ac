"""Two of every four: what is exported has the layout that sparse tensor cores take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_compress as lc
from lightning_compress import CompressionCallback, IterativePruning, OptimalBrainCompression, Select

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")
CAPABLE = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
METHODS: dict[str, Callable[[], CompressionCallback]] = {
    "magnitude": lambda: IterativePruning(0.5, Select(), scope="layer", granularity="2:4"),
    "optimal_brain": lambda: OptimalBrainCompression(0.5, images(), Select(), granularity="2:4"),
}


def images() -> Tensor:
    return torch.rand(64, 64, 4, 4, generator=torch.Generator().manual_seed(3))


def network() -> nn.Sequential:
    """A convolution of 32 x (64 * 3 * 3) weights and a Linear layer of 64 x 128: shapes that a GPU takes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(64, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 64))


def matrix(layer: nn.Module) -> Tensor:
    """Return the weight as it multiplies unrolled patches, inputs fastest, as channels-last kernels do."""
    weight = layer.get_parameter("weight").detach()
    return weight if weight.dim() == 2 else weight.movedim(1, -1).flatten(1)


def exported(method: str, folder: Path) -> nn.Sequential:
    lc.save_compressed(lc.compress(network(), METHODS[method]()), folder / "model.safetensors")
    return lc.load_compressed(network(), folder / "model.safetensors").half()


def packed(dense: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what the hardware stores: two values of every four and their 2-bit places, in rising order."""
    groups = dense.reshape(dense.shape[0], -1, 4)
    places = np.sort(np.argsort(groups == 0, axis=2, kind="stable")[..., :2], axis=2)
    return np.take_along_axis(groups, places, 2), places


def unpacked(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    groups = np.zeros((*values.shape[:2], 4), values.dtype)
    np.put_along_axis(groups, places, values, 2)
    return groups.reshape(len(values), -1)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_lost_in_the_layout(method: str, tmp_path: Path) -> None:
    loaded = exported(method, tmp_path)
    for layer in (loaded[0], loaded[3]):
        weight = matrix(layer)
        assert weight.shape[0] % 32 == weight.shape[1] % 64 == 0, "what torch asks of float16"
        values, places = packed(weight.numpy())
        assert values.size == weight.numel() // 2
        assert (places[..., 0] < places[..., 1]).all()
        assert np.array_equal(unpacked(values, places), weight.numpy())
        assert int(weight.count_nonzero()) == weight.numel() // 2


def test_a_dense_weight_does_not_survive_it() -> None:
    weight = matrix(network()[3]).numpy()
    assert not np.array_equal(unpacked(*packed(weight)), weight)


@pytest.mark.skipif(not CAPABLE, reason="torch converts on CUDA devices of compute capability 8.0 or more only")
@pytest.mark.parametrize("method", METHODS)
def test_torch_takes_it(method: str, tmp_path: Path) -> None:
    loaded = exported(method, tmp_path).cuda()
    for layer in (loaded[0], loaded[3]):
        weight = matrix(layer).contiguous()
        sparse = torch.sparse.to_sparse_semi_structured(weight)
        inputs = torch.randn(weight.shape[1], 64, dtype=torch.float16, device="cuda")
        assert torch.equal(sparse.to_dense(), weight)
        torch.testing.assert_close(torch.mm(sparse, inputs), weight @ inputs, rtol=1e-2, atol=1e-2)
