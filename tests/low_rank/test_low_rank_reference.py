"""Errors against independent references: numpy's optimum, tensorly, and tensors made with a known rank."""

import numpy as np
import pytest
import tensorly as tl
import torch
from tensorly.decomposition import parafac, partial_tucker, tensor_train_matrix
from torch import Tensor, nn

from lightning_compress.low_rank.cp import Sweeper, calm, cp_start, decompose_cp, least_squares, slices_of
from lightning_compress.low_rank.decompose import factorize, full_ranks, second_moment, spectra
from lightning_compress.low_rank.matrix import split_matrix
from lightning_compress.low_rank.tensor import tensor_train, tucker2


def layer_with(weight: Tensor) -> nn.Conv2d:
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


def kernel(*size: int, rank: int = 6, noise: float = 0.3, seed: int = 0) -> Tensor:
    """Return a tensor of low CP rank and noise, as trained kernels are."""
    generator = torch.Generator().manual_seed(seed)
    names = "ncijk"[: len(size)]
    parts = [torch.randn(n, rank, generator=generator) for n in size]
    whole = torch.einsum(",".join(name + "r" for name in names) + "->" + names, *parts)
    return whole / whole.std() + noise * torch.randn(size, generator=generator)


def rest(matrix: np.ndarray, rank: int) -> float:
    """Return the relative error that no approximation of that rank can beat."""
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    return float(np.sqrt((values[rank:] ** 2).sum() / (values**2).sum()))


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (16, 16)])
def test_svd_error_is_numpys_optimum(shape: tuple[int, int]) -> None:
    layer = nn.Linear(shape[1], shape[0])
    for rank in (1, 5, 12):
        assert factorize(layer, "svd", [rank]).error == pytest.approx(
            rest(layer.weight.detach().numpy(), rank), rel=1e-5
        )


def test_channel_and_spatial_svd_errors_are_numpys_optimum() -> None:
    weight = kernel(12, 8, 3, 5)
    layer = layer_with(weight)
    by_channel = weight.reshape(12, -1).numpy()
    by_axis = weight.permute(1, 2, 3, 0).reshape(8 * 3, 5 * 12).numpy()
    for rank in (1, 4, 9):
        assert factorize(layer, "channel_svd", [rank]).error == pytest.approx(rest(by_channel, rank), rel=1e-5)
        assert factorize(layer, "spatial_svd", [rank]).error == pytest.approx(rest(by_axis, rank), rel=1e-5)


def test_groups_share_the_rank_evenly() -> None:
    layer = nn.Conv2d(8, 12, 3, groups=2, bias=False)
    blocks = layer.weight.detach().reshape(2, 6, 4, 3, 3).numpy()
    matrices = [block.transpose(1, 2, 3, 0).reshape(12, 18) for block in blocks]
    values = [np.linalg.svd(matrix, compute_uv=False) for matrix in matrices]
    left = sum((v[3:] ** 2).sum() for v in values) / sum((v**2).sum() for v in values)
    assert factorize(layer, "spatial_svd", [6]).error == pytest.approx(float(np.sqrt(left)), rel=1e-5)


def test_a_steep_spectrum_is_truncated_as_well_as_by_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(64, 64, generator=generator)).Q for _ in range(2))
    values = 10.0 ** -torch.linspace(0, 8, 64, dtype=torch.float64)
    matrix = (left.double() * values) @ right.double().t()
    for dtype, floor in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        given = matrix.to(dtype)
        first, second = split_matrix(given, 30)
        error = float((first @ second - given).double().norm())
        assert error <= 1.01 * float(values[30:].norm()) + floor


def test_tucker_error_is_that_of_tensorly() -> None:
    weight = kernel(14, 10, 3, 3)
    for ranks in ((3, 4), (6, 5), (10, 7)):
        into, core, out = tucker2(weight.flatten(2), ranks, tolerance=1e-7)
        ours = float((weight.flatten(2) - torch.einsum("oij,no,ci->ncj", core, out, into)).norm() / weight.norm())
        (other, factors), _ = partial_tucker(weight.numpy(), rank=[ranks[1], ranks[0]], modes=[0, 1], tol=1e-9)
        theirs = np.linalg.norm(weight.numpy() - tl.tenalg.multi_mode_dot(other, factors, modes=[0, 1]))
        assert ours <= float(theirs / weight.norm()) * (1 + 1e-4)
        assert factorize(layer_with(weight), "tucker", ranks).error == pytest.approx(ours, rel=2e-3)


def test_tensor_train_error_is_that_of_tensorly() -> None:
    weight = kernel(9, 8, 3, 3)
    tensor = weight.permute(1, 2, 3, 0)
    cores = tensor_train(tensor, (4, 6, 5))
    ours = torch.einsum("xar,rbs,sct,tdy->abcd", *cores)
    theirs = tl.tt_to_tensor(tl.decomposition.tensor_train(tensor.numpy(), rank=[1, 4, 6, 5, 1]))
    assert float((ours - tensor).norm()) <= float(np.linalg.norm(theirs - tensor.numpy())) * (1 + 1e-4)
    assert factorize(layer_with(weight), "tt", (4, 6, 5)).error == pytest.approx(
        float((ours - tensor).norm() / tensor.norm()), rel=1e-4
    )


def test_matrix_trains_are_those_of_tensorly() -> None:
    layer = nn.Linear(24, 30, bias=False)
    ranks = [4, 3]
    ours = factorize(layer, "tt", ranks).module.to_dense().weight.detach()
    tensor = layer.weight.detach().numpy().reshape(2, 3, 5, 2, 3, 4)
    theirs = tl.tt_matrix_to_tensor(tensor_train_matrix(tensor, rank=[1, *ranks, 1])).reshape(30, 24)
    weight = layer.weight.detach().numpy()
    assert np.linalg.norm(ours.numpy() - weight) <= np.linalg.norm(theirs - weight) * 1.0001


@pytest.mark.filterwarnings("ignore:Trying to compute SVD")
def test_cp_layers_reach_the_error_of_tensorly() -> None:
    weight = kernel(24, 16, 3, 3, rank=20)
    for rank in (4, 12, 30):
        other = parafac(weight.double().numpy(), rank=rank, init="svd", n_iter_max=100, random_state=0, tol=1e-8)
        theirs = np.linalg.norm(tl.cp_to_tensor(other) - weight.numpy()) / float(weight.norm())
        assert factorize(layer_with(weight), "cp", [rank]).error <= theirs * 1.005


@pytest.mark.parametrize("size", [(16, 12, 3, 3), (8, 8, 3, 3), (12, 20, 5, 3), (12, 10, 4), (10, 9, 3, 2, 3)])
@pytest.mark.parametrize("seed", range(4))
def test_a_kernel_of_rank_8_is_recovered_at_rank_8(size: tuple[int, ...], seed: int) -> None:
    weight = kernel(*size, rank=8, noise=0.0, seed=seed)
    terms = decompose_cp(weight, 8)
    assert float((terms.dense() - slices_of(weight)[0]).norm() / weight.norm()) < 1e-4


def test_cp_is_deterministic_and_leaves_random_states_alone() -> None:
    weight = kernel(8, 6, 3, 3)
    before = torch.random.get_rng_state()
    first, second = decompose_cp(weight, 7), decompose_cp(weight, 7)
    assert torch.equal(first.out, second.out)
    assert torch.equal(torch.random.get_rng_state(), before)


def degenerate() -> Tensor:
    """Return a tensor between ranks, a b b + b a b + b b a: the best terms of rank 2 diverge."""
    a, b = torch.tensor([1.0, 0.2, 0.0]).double(), torch.tensor([0.1, 1.0, 0.3]).double()
    pieces = [(a, b, b), (b, a, b), (b, b, a)]
    generator = torch.Generator().manual_seed(0)
    whole = sum(torch.einsum("n,c,i->nci", *piece) for piece in pieces)
    return whole + 0.05 * torch.randn(3, 3, 3, generator=generator, dtype=torch.float64)


def test_cancelling_terms_are_calmed_within_the_error() -> None:
    slices, sizes = slices_of(degenerate())
    sweeper = Sweeper(slices, sizes, cp_start(slices, sizes, 2))
    error = [sweeper.sweep(least_squares) for _ in range(800)][-1]
    before = float(sweeper.terms.sizes().square().sum()) / sweeper.energy
    after = calm(sweeper, 1.02 * error, 30)
    assert before > 20
    assert after < before / 3
    assert float((sweeper.terms.dense() - slices).norm() / slices.norm()) <= 1.02 * error * (1 + 1e-6)


def test_zero_kernels_are_no_error() -> None:
    layer = layer_with(torch.zeros(6, 4, 3, 3))
    for method in ("channel_svd", "spatial_svd", "tucker", "cp", "tt"):
        found = factorize(layer, method, [1] * len(full_ranks(layer, method)))
        assert found.error == 0
        assert int(found.module.to_dense().weight.count_nonzero()) == 0


def test_activation_aware_svd_is_the_optimum_for_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(20, 20, generator=generator) * torch.logspace(0, -2, 20)
    x = torch.randn(500, 20, generator=generator) @ mix.t()
    for out in (12, 30):
        layer = nn.Linear(20, out)
        found = factorize(layer, "svd", [6], moment=second_moment(layer, x))
        plain = factorize(layer, "svd", [6])
        best = rest((x.double() @ layer.weight.detach().double().t()).numpy(), 6)
        assert found.output_error == pytest.approx(best, rel=1e-3)
        given = (layer(x) - found.module(x)).detach()
        whole = (layer(x) - layer.bias).detach()
        assert float(given.norm() / whole.norm()) == pytest.approx(best, rel=1e-3)
        assert found.error > plain.error


def test_activation_aware_svd_survives_inputs_that_never_vary() -> None:
    layer = nn.Linear(10, 8)
    x = torch.randn(50, 10)
    x[:, 4:] = 0
    found = factorize(layer, "svd", [8], moment=second_moment(layer, x))
    assert found.error < 1e-5
    half = factorize(layer, "svd", [4], moment=second_moment(layer, x))
    assert half.output_error is not None
    assert half.output_error < 1e-3
    nothing = factorize(layer, "svd", [4], moment=torch.zeros(1, 10, 10))
    assert nothing.error == pytest.approx(factorize(layer, "svd", [4]).error, rel=1e-4)


def test_activation_aware_svd_of_grouped_strided_convolutions() -> None:
    layer = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2, padding_mode="reflect").eval()
    x = torch.randn(3, 8, 9, 9) * torch.logspace(0, -2, 8).reshape(-1, 1, 1)
    moment = second_moment(layer, x)
    found = factorize(layer, "channel_svd", [6], moment=moment)
    layer.requires_grad_(False)
    off = float((found.module(x).detach() - layer(x)).norm() / (layer(x) - layer.bias[:, None, None]).norm())
    assert found.output_error == pytest.approx(off, rel=1e-3)
    plain = factorize(layer, "channel_svd", [6]).module
    assert float((plain(x) - layer(x)).norm()) > float((found.module(x).detach() - layer(x)).norm())


def test_spectra_say_what_is_lost() -> None:
    weight = kernel(12, 8, 3, 3)
    layer, size = layer_with(weight), float(weight.norm())
    for method in ("channel_svd", "spatial_svd"):
        values = spectra(layer, method)[0]
        assert factorize(layer, method, [5]).error == pytest.approx(float(values[0, 5:].norm()) / size, rel=1e-4)
    first, second = spectra(layer, "tucker")
    assert first.shape == (1, 8)
    assert second.shape == (1, 12)
    bound = (float(first[0, 4:].norm()) ** 2 + float(second[0, 6:].norm()) ** 2) ** 0.5 / size
    assert factorize(layer, "tucker", [4, 6]).error <= bound
    assert factorize(layer, "cp", [5]).error <= float(spectra(layer, "cp")[0][0, 5:].norm()) / size
