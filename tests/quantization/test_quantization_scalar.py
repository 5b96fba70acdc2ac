"""Rates, uniform steps and entropy-constrained clusters against arithmetic and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.quantization.sharing.kmeans import kmeans
from lightning_compress.quantization.sharing.quantizers import EntropyConstrained, KMeans, Uniform, as_quantizer
from lightning_compress.quantization.sharing.rates import entropy_bits, sharing_rate
from lightning_compress.quantization.sharing.scalar import (
    Codebook,
    entropy_constrained,
    entropy_constrained_to_bits,
    uniform_codebook,
    uniform_to_bits,
)

SKEWED = torch.randn(3000, generator=torch.Generator().manual_seed(4), dtype=torch.float64) ** 3


def distortion(values: torch.Tensor, book: Codebook, weights: torch.Tensor | None = None) -> float:
    squares = (values.double() - book.centroids[book.codes.long()]).square()
    return float((squares if weights is None else squares * weights / weights.mean()).mean())


def test_rate_by_hand() -> None:
    # the paper's example: 16 weights, 4 clusters, 32 bits: 512 / (32 + 128) = 3.2
    assert sharing_rate(16, 4) == 3.2
    # 1000 weights of 16 bits, 8 clusters: 16000 / (3000 + 128)
    assert sharing_rate(1000, 8, 16) == 16000 / 3128
    assert sharing_rate(10, 1) == 10.0  # one value for all: no index at all
    for wrong in ((0, 4), (16, 0), (16, 4, 0), (16.0, 4), (True, 4)):
        with pytest.raises(ConfigurationError, match="must be an int >= 1"):
            sharing_rate(*wrong)


Layer = tuple[int, float, float]


def deep_compression_share(layers: dict[str, Layer], biases: int, index: float, book: dict[str, int]) -> float:
    """Return the share of 32-bit weights and biases that is stored, as Deep Compression stores them.

    Each kept weight takes so many bits and an index of a distance below 32; a longer distance takes a filler zero,
    a weight of its own: q^32 / (1 - q^32) of them a kept weight, where q is the share that went.
    """
    bits = 32.0 * biases
    for name, (count, kept, width) in layers.items():
        beyond = (1 - kept) ** 32
        bits += count * kept * (1 + beyond / (1 - beyond)) * (width + index) + 32 * 2 ** book[name]
    return bits / (32 * (biases + sum(count for count, _, _ in layers.values())))


def test_the_papers_arithmetic_for_both_lenets() -> None:
    # Table 2: 8, 9 and 26 % kept, 6-bit weights, 5-bit indices: 3.1 % (32x); Huffman coded 4.4 and 3.7 bits: 2.49 %
    counts = {"ip1": (235_200, 0.08), "ip2": (30_000, 0.09), "ip3": (1_000, 0.26)}
    book = dict.fromkeys(counts, 6)
    fixed = {name: (*layer, 6) for name, layer in counts.items()}
    assert deep_compression_share(fixed, 410, 5, book) == pytest.approx(0.031, rel=0.05)
    coded = {name: (*layer, 4.4) for name, layer in counts.items()}
    assert deep_compression_share(coded, 410, 3.7, book) == pytest.approx(0.0249, rel=0.03)
    # Table 3: conv 8 bits, fully connected 5 bits, indices 5 bits: 3.05 % (33x)
    lenet5 = {"conv1": (500, 0.66, 8), "conv2": (25_000, 0.12, 8), "ip1": (400_000, 0.08, 5), "ip2": (5_000, 0.19, 5)}
    book = {name: int(width) for name, (_, _, width) in lenet5.items()}
    assert deep_compression_share(lenet5, 580, 5, book) == pytest.approx(0.0305, rel=0.05)


def test_entropy_by_hand() -> None:
    assert entropy_bits(torch.tensor([1, 1, 1, 1])) == 2.0
    assert entropy_bits(torch.tensor([3, 1])) == pytest.approx(2 - 0.75 * math.log2(3))
    assert entropy_bits(torch.tensor([5])) == entropy_bits(torch.tensor([0, 0])) == 0.0


def test_uniform_by_hand() -> None:
    # step 2: cells [-3, -1), [-1, 1), [1, 3): members {-1.5, -2}, {0.5}, {1}
    book = uniform_codebook(torch.tensor([0.5, -1.5, 1.0, -2.0]), 2.0)
    assert book.centroids.tolist() == [-1.75, 0.5, 1.0]
    assert book.codes.tolist() == [1, 0, 2, 0]
    weighted = uniform_codebook(torch.tensor([0.5, -1.5, 1.0, -2.0]), 2.0, torch.tensor([1.0, 3.0, 1.0, 1.0]))
    assert weighted.centroids.tolist() == [-1.625, 0.5, 1.0]


def test_uniform_is_near_the_theory_at_high_rate() -> None:
    # Gish & Pierce: at high rate the distortion of step d is d^2/12, and one bit more divides it by four
    gauss = torch.randn(200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    coarse, fine = uniform_to_bits(gauss, 4.0, 4096), uniform_to_bits(gauss, 5.0, 4096)
    assert coarse.bits == pytest.approx(4.0, abs=0.03)
    assert distortion(gauss, coarse) / distortion(gauss, fine) == pytest.approx(4, rel=0.1)
    # h(X) = log2(sqrt(2 pi e)) bits, entropy = h - log2 d
    step = math.sqrt(2 * math.pi * math.e) / 2**coarse.bits
    assert distortion(gauss, coarse) == pytest.approx(step**2 / 12, rel=0.05)


def test_entropy_constrained_by_hand() -> None:
    # from 0, 0.4, 1 with shares 1/2, 1/4, 1/4: 0.3 costs 0.09 + t at 0 and 0.01 + 2t at 0.4, so t > 0.08 moves it
    values, start = torch.tensor([0.0, 0.0, 0.4, 1.0]), torch.tensor([0.0, 0.4, 1.0])
    assert entropy_constrained(values, start, 0.15).codes.tolist() == [0, 0, 1, 2]  # 0.16 + t against 2t
    assert entropy_constrained(values, start, 0.17).codes.tolist() == [0, 0, 0, 1]


def test_entropy_constrained_is_a_fixed_point_of_the_cost() -> None:
    weights = torch.rand(3000, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.05
    h, trade_off = weights / weights.mean(), 0.02
    book = entropy_constrained(SKEWED, kmeans(SKEWED, 24, weights=weights), trade_off, weights, iterations=1000)
    share = torch.bincount(book.codes, minlength=len(book.centroids)) / 3000
    costs = h[:, None] * (SKEWED[:, None] - book.centroids).square() - trade_off * share.log2()
    assert torch.equal(costs.argmin(1), book.codes.long())
    means = torch.zeros_like(book.centroids).index_add_(0, book.codes, h * SKEWED)
    means /= torch.zeros_like(means).index_add_(0, book.codes, h)
    assert torch.allclose(means, book.centroids)


def test_without_a_price_it_is_weighted_kmeans() -> None:
    weights = torch.rand(3000, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    start = kmeans(SKEWED, 12, weights=weights)
    book = entropy_constrained(SKEWED, start, 0.0, weights)
    assert torch.allclose(book.centroids, start)


@pytest.mark.parametrize("weighted", [False, True])
def test_entropy_constrained_beats_kmeans_at_the_same_entropy(weighted: bool) -> None:
    weights = SKEWED.abs() + 0.1 if weighted else None
    for bits in (1.5, 2.5):
        constrained = entropy_constrained_to_bits(SKEWED, kmeans(SKEWED, 64, weights=weights), bits, weights)
        assert 0.9 * bits < constrained.bits <= bits
        rival = None
        for clusters in range(2, 64):
            book = KMeans(clusters=clusters, init="density").codebook(SKEWED, weights)
            if book.bits <= bits:
                rival = book
        assert rival is not None
        assert distortion(SKEWED, constrained, weights) < distortion(SKEWED, rival, weights)


@pytest.mark.parametrize("bits", [0.01, 1.0, 3.0])
def test_entropy_is_kept_to_with_a_cluster_for_each_number(bits: float) -> None:
    """All of them have one size and one price: no trade-off moves a number to another one."""
    values = torch.randn(48, generator=torch.Generator().manual_seed(0))
    assert EntropyConstrained(bits, clusters=64).codebook(values).bits <= bits
    assert EntropyConstrained(bits, clusters=2).codebook(torch.tensor([1.0, 1.0, 2.0, 2.0])).bits <= bits


@pytest.mark.parametrize("quantizer", [KMeans(3), Uniform(3.0), EntropyConstrained(3.0, clusters=32)])
def test_every_quantizer_returns_means_of_its_cells_in_rising_order(quantizer: KMeans) -> None:
    values, weights = SKEWED.float(), SKEWED.abs().float() + 0.01
    for h in (None, weights):
        book = quantizer.codebook(values, h)
        assert book.bits <= 3.0
        assert bool((book.centroids.diff() > 0).all())
        mass = torch.bincount(book.codes, None if h is None else h.double()).double()
        moment = torch.bincount(book.codes, values.double() * (1 if h is None else h.double()))
        assert torch.allclose(moment / mass, book.centroids, atol=1e-9)


@pytest.mark.parametrize("quantizer", [KMeans(2), Uniform(1.0), EntropyConstrained(1.0)])
def test_degenerate_values(quantizer: KMeans) -> None:
    assert quantizer.codebook(torch.tensor([0.5])).centroids.tolist() == [0.5]
    same = quantizer.codebook(torch.full((10,), -0.25))
    assert same.centroids.tolist() == [-0.25]
    assert same.codes.tolist() == [0] * 10
    far = quantizer.codebook(torch.tensor([100.0, 100.5, 101.0, 101.5]))
    assert far.bits <= 2.0


def test_words_for_the_plan() -> None:
    assert [str(q) for q in (KMeans(3), Uniform(2.5), EntropyConstrained(3.0))] == [
        "k-means, 8 clusters, linear",
        "uniform, 2.5 bits",
        "entropy-constrained, 3 bits",
    ]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: KMeans(9), "`bits` must be an int from 1 to 8, got 9"),
        (lambda: KMeans(bits=0), "`bits` must be an int from 1 to 8"),
        (lambda: KMeans(clusters=0), "`clusters` must be an int from 1 to 32768"),
        (lambda: KMeans(init="forgy"), "`init` is 'forgy': expected one of"),
        (lambda: Uniform(0.0), "`bits` must be a number above 0, got 0.0"),
        (lambda: Uniform(clusters=1), "`clusters` must be an int from 2 to 32768"),
        (lambda: EntropyConstrained(-1), "`bits` must be a number above 0"),
        (lambda: EntropyConstrained(init="density plot"), "did you mean 'density'"),
        (lambda: as_quantizer("kmeans"), "`quantizer` must be a number of bits"),
        (lambda: as_quantizer(KMeans), "`quantizer` must be a number of bits"),
        (lambda: as_quantizer(True), "`quantizer` must be a number of bits"),
        (lambda: uniform_codebook(torch.ones(2), 0.0), "`step` must be a number above 0"),
        (lambda: entropy_constrained(torch.ones(2), torch.ones(1), -1.0), "`trade_off` must be a number of at least 0"),
        (lambda: uniform_codebook(torch.ones(2), 1.0, torch.tensor([1.0, -1.0])), "`weights` must be 2 numbers"),
        (lambda: kmeans(torch.tensor(np.array([np.inf])), 1), "NaN or infinity"),
    ],
)
def test_errors(build: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build()
