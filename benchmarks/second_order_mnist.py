"""Pruning without retraining: LeNet-300-100 on MNIST by magnitude, Optimal Brain Damage, WoodFisher and Surgeon.

And its hidden units merged without data, beside removing the weakest or random ones. Every figure is the error on the
10,000 test images, or by how much the loss over the 55,000 training images rises, which is what Damage and Surgeon keep
small and where half of the weights already tell them apart; a mean over networks trained from different seeds.

Optimal Brain Damage takes the exact diagonal of the Gauss-Newton matrix over the training images, plus a hundredth of
its mean in each layer: what the Surgeon adds to its Hessians too, a rule that no test error chose. It replaced
the empirical Fisher information of 10,000 images, with a damping chosen by test error, after a look at networks of
seeds 100 and 101 (at 60 % zeros 2.8 % error instead of 3.0 %), which are not among those measured. WoodFisher's damping
was chosen on a network of seed 0.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import _common as common
from benchmarks._common import Row
from lightning_compress import ConfigurationError, IterativePruning, NeuronMerging, Select, compress
from lightning_compress.core.hessians import collect_hessians
from lightning_compress.data import MNISTDataModule
from lightning_compress.models import LeNet300100
from lightning_compress.pruning.allocation import choose_masks
from lightning_compress.pruning.layerwise import damp, obc_masks, obc_trace, reconstruct
from lightning_compress.pruning.second_order import gauss_newton_diagonal, obd_saliency
from lightning_compress.pruning.woodfisher import FisherInverse, woodfisher_saliency, woodfisher_update

Images = tuple[Tensor, Tensor]
Errors = dict[tuple[str, float], list[float]]

SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
REMOVED = (0.2, 0.4, 0.6, 0.8)
LAYERS = ("fc1", "fc2", "fc3")
DAMPING = 0.01  # of the mean curvature of a layer
BLOCK_DAMPING = 1e-5
FLOOR = 0.005
_CHUNK, _BATCH = 50, 2000


def train(images: Images, epochs: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = LeNet300100()
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(images[1])).split(128):
            optimizer.zero_grad()
            F.cross_entropy(net(images[0][index]), images[1][index]).backward()
            optimizer.step()
    return net.eval()


def test_error(net: nn.Module, images: Images) -> float:
    with torch.no_grad():
        return 100 * float((net(images[0]).argmax(1) != images[1]).double().mean())


def mean_loss(net: nn.Module, images: Images) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(net(images[0]), images[1]).double())


def gradients(net: nn.Module, images: Images) -> Iterator[Tensor]:
    """Yield the gradient of each image's loss by all weights, flat."""
    weights = {f"{name}.weight": net.get_parameter(f"{name}.weight").detach() for name in LAYERS}

    def loss(own: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(net, own, (image[None],)), label[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    for x, y in zip(images[0].split(_CHUNK), images[1].split(_CHUNK), strict=True):
        yield from torch.cat([part.flatten(1) for part in each(weights, x, y).values()], 1)


def layer_weights(net: nn.Module) -> dict[str, Tensor]:
    return {name: net.get_parameter(f"{name}.weight").detach() for name in LAYERS}


def with_weights(net: nn.Module, weights: dict[str, Tensor], biases: dict[str, Tensor] | None = None) -> nn.Module:
    new = copy.deepcopy(net)
    for kind, values in (("weight", weights), ("bias", biases or {})):
        for name, value in values.items():
            new.get_parameter(f"{name}.{kind}").data.copy_(value)
    return new


def fisher_pruned(
    net: nn.Module, train_set: Images, diagonal: int, full: int
) -> dict[str, Callable[[float], nn.Module]]:
    """Return pruning by Optimal Brain Damage and by WoodFisher, with the curvature worked out once."""
    weights = layer_weights(net)
    sizes = [weight.numel() for weight in weights.values()]

    def split(flat: Tensor) -> dict[str, Tensor]:
        return {name: part.view_as(weights[name]) for name, part in zip(LAYERS, flat.split(sizes), strict=True)}

    layers = {name: net.get_submodule(name) for name in LAYERS}
    curvature = gauss_newton_diagonal(net, layers, train_set[0][:diagonal].split(_BATCH))
    damaged = {name: obd_saliency(weights[name], h + DAMPING * h.mean()) for name, h in curvature.items()}
    inverses = {name: FisherInverse(weights[name].numel(), full, damping=BLOCK_DAMPING) for name in LAYERS}
    for gradient in gradients(net, (train_set[0][:full], train_set[1][:full])):
        for name, part in split(gradient).items():
            inverses[name].add(part)
    fisher = {name: woodfisher_saliency(weights[name], inverses[name]) for name in LAYERS}

    def obd(amount: float) -> nn.Module:
        masks = choose_masks(damaged, amount, "global", FLOOR)
        return with_weights(net, {name: weights[name] * (masks[name] != 0) for name in LAYERS})

    def woodfisher(amount: float) -> nn.Module:
        masks = choose_masks(fisher, amount, "global", FLOOR)
        return with_weights(
            net, {name: woodfisher_update(weights[name], inverses[name], masks[name] != 0) for name in LAYERS}
        )

    return {"OBD": obd, "WoodFisher": woodfisher}


def obs_pruned(net: nn.Module, images: Tensor) -> Callable[[float], nn.Module]:
    """Return pruning by layer-wise Optimal Brain Surgeon, with the order of removals worked out once."""
    layers = {name: net.get_submodule(name) for name in LAYERS}
    hessians = {name: damp(found[0], DAMPING) for name, found in collect_hessians(net, layers, [images]).items()}
    flat = {name: torch.cat([layer.weight, layer.bias[:, None]], 1).detach() for name, layer in layers.items()}
    traces = {name: obc_trace(flat[name], hessians[name], prunable=flat[name].shape[1] - 1) for name in LAYERS}

    def surgeon(amount: float) -> nn.Module:
        new = {}
        for name, rows in flat.items():
            keep = obc_masks(traces[name], tuple(rows.shape), round(amount * layers[name].weight.numel()))
            new[name] = reconstruct(rows, hessians[name], keep).float()
        return with_weights(
            net,
            {name: value[:, :-1] for name, value in new.items()},
            {name: value[:, -1] for name, value in new.items()},
        )

    return surgeon


def without_neurons(net: nn.Module, amount: float, order: Callable[[Tensor, int], Tensor]) -> nn.Module:
    """Silence the share of each hidden layer's units that comes first in an order."""
    weights = {name: value.clone() for name, value in layer_weights(net).items()}
    for first, second in (("fc1", "fc2"), ("fc2", "fc3")):
        incoming = torch.cat([weights[first], net.get_parameter(f"{first}.bias").detach()[:, None]], 1)
        weights[second][:, order(incoming, len(incoming))[: round(amount * len(incoming))]] = 0
    return with_weights(net, weights)


def one_seed(train_set: Images, test_set: Images, seed: int, quick: bool, errors: Errors, rises: Errors) -> None:
    """Add the errors of one network to ``errors``, and what its training loss gained to ``rises``."""
    net = train(train_set, 1 if quick else 3, seed)
    loss = mean_loss(net, train_set)
    errors.setdefault(("dense", 0.0), []).append(test_error(net, test_set))
    diagonal, full, calibration = (5000, 250, 500) if quick else (len(train_set[0]), 1000, 1000)
    methods: dict[str, Callable[[float], nn.Module]] = {
        "magnitude": lambda amount: compress(net, IterativePruning(amount, Select(), floor=FLOOR)),
        **fisher_pruned(net, train_set, diagonal, full),
        "OBS": obs_pruned(net, train_set[0][:calibration]),
    }
    for amount in SPARSITIES[3:5] if quick else SPARSITIES:
        for name, method in methods.items():
            pruned = method(amount)
            errors.setdefault((name, amount), []).append(test_error(pruned, test_set))
            rises.setdefault((name, amount), []).append(mean_loss(pruned, train_set) - loss)
    generator = torch.Generator().manual_seed(seed)
    neurons: dict[str, Callable[[float], nn.Module]] = {
        "random units": lambda a: without_neurons(net, a, lambda w, n: torch.randperm(n, generator=generator)),
        "weakest units": lambda a: without_neurons(net, a, lambda w, n: w.norm(dim=1).argsort()),
        "merged units": lambda amount: compress(net, NeuronMerging(amount)),
    }
    for amount in REMOVED[1::2] if quick else REMOVED:
        for name, method in neurons.items():
            errors.setdefault((name, amount), []).append(test_error(method(amount), test_set))


AGAINST = {"OBD": "magnitude", "WoodFisher": "OBD", "OBS": "OBD", "merged units": "weakest units"}
JUDGED = ("OBD", "OBS", "merged units")


def rows_of(found: Errors, what: str = "test error", unit: str = "%", spread: str = "points") -> list[Row]:
    """Return a row of the mean for each method and amount; a goal is the mean of what it must beat."""
    means = {key: statistics.mean(values) for key, values in found.items()}
    rows = []
    for (name, amount), mean in means.items():
        gone = "hidden units removed" if "units" in name else "zeros"
        case = f"{what}, dense" if name == "dense" else f"{what}, {name}, {amount:.0%} {gone}"
        other = means.get((AGAINST.get(name, ""), amount))
        against = None if other is None else f"{AGAINST[name]}, the same networks and share"
        ratio = mean / other if other else None
        goal = None if other is None or name not in JUDGED else _figure(other)
        rows.append(Row(case, _figure(mean), unit, against, ratio, goal))
        if len(found[name, amount]) > 1:
            rows.append(Row(f"{case}: spread of seeds", _figure(statistics.stdev(found[name, amount])), spread))
    return rows


def _figure(value: float) -> float:
    return float(f"{value:.4g}")


def main() -> None:
    """Train, prune, print and write the table."""
    given = common.arguments(__doc__)
    torch.set_num_threads(1)
    try:
        splits = MNISTDataModule().splits
    except ConfigurationError as error:
        print(f"skipped, there is no MNIST: {error}")
        return
    train_set, test_set = ((images.float() / 255, labels) for images, labels in (splits.train, splits.test))
    seeds = 1 if given.quick else 5
    facts = common.environment(quick=given.quick, seeds=seeds, epochs=1 if given.quick else 3, pixels="0 to 1")
    errors, rises = Errors(), Errors()
    for seed in range(1, seeds + 1):
        one_seed(train_set, test_set, seed, given.quick, errors, rises)
    rows = rows_of(errors) + rows_of(rises, "rise of the training loss", "nats", "nats")
    common.publish("second_order_mnist", rows, facts, given.out)


if __name__ == "__main__":
    main()
