"""Training that is sparse from the first step on: LeNet-300-100 on MNIST with SET, RigL and masks that never move.

All train for the same number of steps, as the dense network does. Connections are spread over layers by
Erdos-Renyi-Kernel. Every figure is the error on the 10,000 test images at the end of training, a mean over seeds.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import _common as common
from benchmarks._mnist import error_on_test, facts, find_mnist, mean_rows, new_classifier, train
from lightning_compress import DynamicSparseTraining, Select
from lightning_compress.data import ImageDataModule

DENSE = "dense"
METHODS: dict[str, dict[str, Any]] = {
    "static random masks": {"fraction": 0.0},
    "SET": {"method": "set"},
    "RigL": {"method": "rigl"},
}
SPARSITIES = (0.9, 0.98)


def case_of(method: str, sparsity: float) -> str:
    """Return how the figures of a method are called."""
    return f"{method}, {sparsity:.0%} zeros"


def run_methods(
    data: ImageDataModule, seed: int, sparsities: tuple[float, ...], epochs: int, batches: int = 0
) -> dict[str, float]:
    """Return the test errors of one seed."""
    errors: dict[str, float] = {}
    module = new_classifier(seed)
    train(module, data, epochs, batches=batches)
    errors[DENSE] = error_on_test(module, data)
    for sparsity in sparsities:
        for method, arguments in METHODS.items():
            module = new_classifier(seed)
            sparse = DynamicSparseTraining(sparsity, select=Select(), **arguments)
            train(module, data, epochs, [sparse], batches)
            errors[case_of(method, sparsity)] = error_on_test(module, data)
    return errors


def main() -> None:
    """Train, print and write the table."""
    given = common.arguments(__doc__)
    torch.set_num_threads(1)
    seeds, epochs = (1, 1) if given.quick else (3, 4)
    sparsities = SPARSITIES[:1] if given.quick else SPARSITIES
    about = facts(given.quick, seeds, epochs)
    errors: dict[str, list[float]] = {}
    for seed in range(seeds):
        data = find_mnist(seed)
        if data is None:
            return
        for case, error in run_methods(data, seed, sparsities, epochs).items():
            errors.setdefault(case, []).append(error)
    against: dict[str, str] = {}
    judged: list[str] = []
    for sparsity in sparsities:
        static, *moving = (case_of(method, sparsity) for method in METHODS)
        against |= {static: DENSE, **dict.fromkeys(moving, static)}
        judged += moving
    common.publish("dynamic_sparse_mnist", mean_rows(errors, against, judged), about, given.out)


if __name__ == "__main__":
    main()
