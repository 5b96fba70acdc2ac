"""Clustering weights to shared values: how long it takes, assignment of every weight included.

Normal weights to 32 centroids from evenly spaced starts, to the fixed point of Lloyd's algorithm; beside scikit-learn's
k-means from the same starts, which stops after 300 steps.
"""

from __future__ import annotations

import statistics
import time

import torch
from sklearn.cluster import KMeans as SklearnKMeans
from torch import Tensor

from benchmarks import _common as common
from benchmarks._common import Row
from lightning_compress.quantization.sharing.kmeans import Line, initial_centroids, kmeans, nearest

CLUSTERS = 32


def weights(count: int) -> Tensor:
    """Return normal numbers, the same each time."""
    return 0.02 * torch.randn(count, generator=torch.Generator().manual_seed(0))


def ours(values: Tensor) -> tuple[float, float]:
    """Return seconds and squared error."""
    started = time.perf_counter()
    centroids = kmeans(values, CLUSTERS)
    codes = nearest(values, centroids)
    seconds = time.perf_counter() - started
    return seconds, float((values.double() - centroids[codes.long()]).square().sum())


def theirs(values: Tensor) -> tuple[float, float]:
    """Return the same of scikit-learn, for numbers in float32 as they are."""
    start = initial_centroids(Line.of(values), CLUSTERS, "linear")[:, None]
    started = time.perf_counter()
    found = SklearnKMeans(CLUSTERS, init=start, n_init=1, tol=0).fit(values[:, None].numpy())
    return time.perf_counter() - started, float(found.inertia_)


def main() -> None:
    """Measure, print and write the table."""
    given = common.arguments(__doc__)
    many, few, repeats = (1_000_000, 20_000, 2) if given.quick else (10_000_000, 1_000_000, 5)
    about = common.environment(quick=given.quick, clusters=CLUSTERS, repeats=repeats, weights=[few, many])
    torch.set_num_threads(1)
    values = weights(many)
    all_of_it = statistics.median(ours(values)[0] for _ in range(repeats))
    values = weights(few)
    mine = [ours(values) for _ in range(repeats)]
    other = theirs(values)
    seconds = statistics.median(one[0] for one in mine)
    error = f"scikit-learn, the same starts: {other[1]:.5g}"
    rows = [
        Row(f"{many:,} weights", round(all_of_it, 3), "s", None, None, None if given.quick else 3.0),
        Row(f"{few:,} weights", round(seconds, 4), "s", f"scikit-learn: {other[0]:.3g} s", seconds / other[0]),
        Row(f"{few:,} weights: squared error", mine[0][1], "sum", error, mine[0][1] / other[1]),
    ]
    common.publish("clustering", rows, about, given.out)


if __name__ == "__main__":
    main()
