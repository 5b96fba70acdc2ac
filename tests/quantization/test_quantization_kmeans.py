"""K-means on a line against scikit-learn, the optimum by brute force, and numbers worked out by hand."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as SklearnKMeans

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.quantization.sharing.kmeans import INITS, Line, initial_centroids, kmeans, nearest


def cost(values: torch.Tensor, centroids: torch.Tensor, weights: torch.Tensor | None = None) -> float:
    squares = (values.double()[:, None] - centroids.double()).square().amin(1)
    return float((squares if weights is None else squares * weights).sum())


def optimum(values: list[float], clusters: int, weights: list[float]) -> float:
    """Try every way to cut the sorted numbers into runs."""
    order = np.argsort(values)
    points, mass = np.array(values)[order], np.array(weights)[order]
    best = float("inf")
    for inner in itertools.combinations(range(1, len(points)), clusters - 1):
        total = 0.0
        for first, last in itertools.pairwise((0, *inner, len(points))):
            part, h = points[first:last], mass[first:last]
            total += float((h * (part - (h * part).sum() / h.sum()) ** 2).sum())
        best = min(best, total)
    return best


def test_two_steps_by_hand() -> None:
    # 0 and 10 take {0, 1, 4} and {10}; their means 5/3 and 10 keep them: the fixed point
    assert kmeans(torch.tensor([4.0, 0.0, 10.0, 1.0]), 2).tolist() == pytest.approx([5 / 3, 10])
    # weights (1, 1, 4, 1): 5/3 becomes (0 + 1 + 16)/6, and 4 stays nearer to it than to 10
    weighted = kmeans(torch.tensor([4.0, 0.0, 10.0, 1.0]), 2, weights=torch.tensor([4.0, 1.0, 1.0, 1.0]))
    assert weighted.tolist() == pytest.approx([17 / 6, 10])


@pytest.mark.parametrize("init", ["linear", "density"])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_scikit_learn_from_the_same_start(init: str, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    for clusters in (2, 5, 16):
        values = torch.randn(400, generator=generator, dtype=torch.float64) ** 3
        weights = torch.rand(400, generator=generator, dtype=torch.float64) + 0.01 if weighted else None
        start = initial_centroids(Line.of(values, weights), clusters, init)
        if len(torch.unique(nearest(values, torch.from_numpy(start)))) < clusters:
            continue  # scikit-learn moves an empty cluster elsewhere
        theirs = SklearnKMeans(clusters, init=start[:, None], n_init=1, max_iter=1000, tol=0, algorithm="lloyd")
        theirs.fit(values[:, None].numpy(), sample_weight=None if weights is None else weights.numpy())
        ours = kmeans(values, clusters, init, weights)
        assert cost(values, ours, weights) == pytest.approx(theirs.inertia_, rel=1e-9)
        if len(ours) == clusters:
            np.testing.assert_allclose(ours.numpy(), np.sort(theirs.cluster_centers_[:, 0]), rtol=1e-9, atol=1e-12)


def test_best_of_several_starts_is_the_optimum_of_tiny_sets() -> None:
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        values = torch.randn(9, generator=generator, dtype=torch.float64)
        weights = torch.rand(9, generator=generator, dtype=torch.float64) + 0.1
        best = optimum(values.tolist(), 3, weights.tolist())
        found = [cost(values, kmeans(values, 3, init, weights), weights) for init in ("linear", "density")]
        draws = [kmeans(values, 3, "k-means++", weights, generator) for _ in range(20)]
        found += [cost(values, centroids, weights) for centroids in draws]
        assert min(found) == pytest.approx(best, rel=1e-9)
        assert all(value >= best - 1e-12 for value in found)


@pytest.mark.parametrize("init", sorted(INITS))
def test_result_is_a_fixed_point(init: str) -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(2))
    centroids = kmeans(values, 16, init)
    codes = nearest(values, centroids).long()
    assert len(centroids) == 16
    means = torch.zeros(16, dtype=torch.float64).index_add_(0, codes, values.double()) / torch.bincount(codes)
    assert torch.allclose(means, centroids, rtol=0, atol=1e-12)
    brute = (values.double()[:, None] - centroids).abs().argmin(1)
    assert torch.equal(codes, brute)


def test_initial_centroids_by_hand() -> None:
    line = Line.of(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 100.0]))
    assert initial_centroids(line, 3, "linear").tolist() == [0, 50, 100]
    assert initial_centroids(line, 2, "density").tolist() == [1, 5]  # the 2nd and the 6th of 8
    assert initial_centroids(line, 1, "linear").tolist() == [50]
    for init in ("random", "k-means++"):
        first, again = (initial_centroids(line, 4, init, torch.Generator().manual_seed(5)) for _ in range(2))
        assert first.tolist() == again.tolist() == sorted(first.tolist())
        assert set(first.tolist()) <= set(line.points.tolist())
    drawn = [initial_centroids(line, 2, "k-means++", torch.Generator().manual_seed(s)) for s in range(50)]
    assert sum(100.0 in pair for pair in drawn) > 45  # the squared distance decides


def test_a_centroid_without_numbers_splits_the_worst_cluster() -> None:
    # 0..100 in five places: three of them are empty at first, and every number has a cluster in the end
    assert kmeans(torch.tensor([0.0, 1.0, 2.0, 3.0, 100.0]), 5).tolist() == [0, 1, 2, 3, 100]
    # 0, 50, 100: the middle is empty; {0, 1, 4} has an error of 8.7, {98, 100} of 2: it splits at its mean
    assert kmeans(torch.tensor([0.0, 1.0, 4.0, 98.0, 100.0]), 3).tolist() == [0.5, 4, 99]


@pytest.mark.parametrize("count", [300, 3000, 30_000])
def test_is_no_worse_than_scikit_learn_where_clusters_are_empty_at_first(count: int) -> None:
    values = torch.randn(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = initial_centroids(Line.of(values), 32, "linear")
    theirs = SklearnKMeans(32, init=start[:, None], n_init=1, max_iter=1000, tol=0).fit(values[:, None].numpy())
    assert cost(values, kmeans(values, 32)) <= 1.02 * theirs.inertia_


def test_never_more_centroids_than_numbers() -> None:
    assert kmeans(torch.tensor([2.0, 2.0, -1.0]), 8).tolist() == [-1, 2]
    assert kmeans(torch.full((50,), 0.3), 8, "random").tolist() == pytest.approx([0.3])
    assert kmeans(torch.tensor([1.0]), 1).tolist() == [1]


def test_numbers_that_count_nothing_still_have_a_cluster() -> None:
    values, weights = torch.tensor([0.0, 1.0, 8.0, 9.0]), torch.tensor([1.0, 3.0, 0.0, 0.0])
    assert kmeans(values, 2, weights=weights).tolist() == pytest.approx([0.75, 8.5])
    assert kmeans(values, 2, weights=torch.zeros(4)).tolist() == [0.5, 8.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_float_type(dtype: torch.dtype) -> None:
    values = torch.tensor([1.0, 2.0, 9.0, 12.0], dtype=dtype)
    assert kmeans(values, 2).tolist() == [1.5, 10.5]
    assert nearest(values, torch.tensor([1.5, 10.5])).tolist() == [0, 0, 1, 1]


def test_nearest_keeps_the_shape() -> None:
    assert nearest(torch.zeros(2, 0, 3), torch.tensor([1.0])).shape == (2, 0, 3)
    assert nearest(torch.tensor([[0.0, 7.0]]), torch.tensor([3.0])).tolist() == [[0, 0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor([]), 2), "`values` is empty"),
        ((torch.tensor([1.0, float("nan")]), 2), "NaN or infinity"),
        ((torch.tensor([1.0]), 0), "`clusters` must be an int >= 1, got 0"),
        ((torch.tensor([1.0]), True), "`clusters` must be an int"),
        ((torch.tensor([1.0]), 1, "liner"), "did you mean 'linear'"),
        ((torch.tensor([1.0]), 1, "linear", torch.tensor([-1.0])), "`weights` must be 1 numbers of at least 0"),
        ((torch.tensor([1.0]), 1, "linear", torch.ones(2)), "`weights` must be 1 numbers"),
    ],
)
def test_errors(arguments: tuple, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        kmeans(*arguments)


@pytest.mark.slow
def test_ten_million_weights_in_under_three_seconds() -> None:
    values = torch.randn(10_000_000, generator=torch.Generator().manual_seed(0)) * 0.02
    started = time.process_time()
    centroids = kmeans(values, 32)
    codes = nearest(values, centroids)
    assert time.process_time() - started < 3.0  # of one core, whatever else the machine does
    assert len(centroids) == 32
    assert codes.shape == values.shape
