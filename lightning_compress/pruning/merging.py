"""Fewer neurons without data: merge those that are alike, and cut the model down to what stays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import nn

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.errors import ConfigurationError, SelectionError
from lightning_compress.core.journal import Edit
from lightning_compress.core.paths import get_layer
from lightning_compress.core.plan import PlanRow
from lightning_compress.core.run import Layers
from lightning_compress.core.schedule import Schedule
from lightning_compress.core.select import Select, Selection
from lightning_compress.core.verbs import compact_ranges
from lightning_compress.pruning.data_free import merge_neurons
from lightning_compress.pruning.neuron_pairs import Pair, find_pairs, given_pairs


class NeuronMerging(CompressionCallback):
    r"""Merge neurons that compute nearly the same, without any data (Srinivas & Babu 2015, arXiv:1507.06149).

    In each hidden Linear layer the pair with the least
    :math:`s_{ij} = \langle a_j^2 \rangle \|w_i - w_j\|^2` is merged, neuron j into i, until the amount is reached; the
    outgoing weights of j are added to those of i. Both layers really become smaller: parameters, bytes and time, with
    ``slice`` edits that a bare model replays.

    Only Linear layers whose outputs go, through ReLU-like elementwise functions alone, into one other Linear layer can
    be merged; the plan says of all others why not. Neurons of networks that were trained with weight decay are the
    most alike; of a small network with few redundant ones little is gained over removing the weakest.

    Happens after fit on a copy, ``callback.compressed``; in ``compress(model, ...)`` at once.

    Runs on: any device, ``ddp``.

    Args:
        amount: Share of the neurons of each layer to remove, 0 to below 1; at least one stays.
        select: Which layers lose neurons; default every Linear layer that can.
        pairs: Paths of consecutive layers, ``[["fc1", "fc2"], ...]``, for models that cannot be traced; then what lies
            between them is not checked, and ``select`` must be left out.
        name: Tells two of these callbacks apart.

    Raises:
        ConfigurationError: For an amount outside its range, pairs that do not fit, or a model that cannot be traced.
        SelectionError: If no selected layer can be merged; it says why.

    >>> from lightning_compress import compress
    >>> net = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 2))
    >>> compress(net, NeuronMerging(0.8))
    Sequential(
      (0): Linear(in_features=4, out_features=2, bias=True)
      (1): ReLU()
      (2): Linear(in_features=2, out_features=2, bias=True)
    )
    """

    link: ClassVar[str] = "prune"
    supported: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    prunes_after_fit: ClassVar[bool] = True

    def __init__(
        self,
        amount: float,
        select: Select | None = None,
        pairs: Sequence[Sequence[str]] | None = None,
        name: str | None = None,
    ) -> None:
        if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < 1:
            raise ConfigurationError(f"`amount` must be a number from 0 to below 1, got {amount!r}; 80 % is 0.8")
        if pairs is not None and (select is not None or not list(pairs)):
            raise ConfigurationError("`pairs` must name at least one pair, and `select` must be left out beside it")
        super().__init__(Schedule(final=float(amount), shape="once"), Select() if select is None else select, name)
        self.pairs = pairs
        self._pairs: list[Pair] = []

    def choose(self, root: nn.Module) -> Selection:
        """Find the pairs of consecutive layers, or check those that were given."""
        if self.pairs is not None:
            self._pairs, left = given_pairs(root, self.pairs), {}
        else:
            selection = self.select.resolve(root, self.supported)
            self._pairs, reasons = find_pairs(root, selection.layers)
            left = {**selection.left, **{path: f"kept: {why}" for path, why in reasons.items()}}
        if not self._pairs:
            why = "; ".join(f"{path}: {reason}" for path, reason in list(left.items())[:8])
            raise SelectionError(f"no layer of {type(root).__name__} has neurons that can be merged: {why}")
        paths = [path for pair in self._pairs for path in (pair.first, pair.second)]
        return Selection({path: get_layer(root, path) for path in dict.fromkeys(paths)}, left)

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return a row for each layer that loses neurons."""
        return [
            PlanRow(
                "select" if self.pairs is None else "pairs",
                pair.first,
                str(_linear(layers, pair.first).out_features),
                f"merge {self._count(layers, pair)} neurons into others after fit, on a copy; {pair.second} follows",
            )
            for pair in self._pairs
        ]

    def update(self, layers: Layers, amount: float) -> None:
        """Do nothing: neurons go after fit."""

    def finalize(self, layers: Layers) -> Iterable[Edit]:
        """Move outgoing weights to the neurons that stay, then cut both layers of each pair."""
        edits: list[Edit] = []
        for pair in self._pairs:
            first, second = _linear(layers, pair.first), _linear(layers, pair.second)
            bias = [] if first.bias is None else [first.bias.detach()[:, None]]
            incoming = torch.cat([first.weight.detach(), *bias], 1).double()
            merged = merge_neurons(incoming, second.weight.detach().double(), self._count(layers, pair))
            second.weight.data.copy_(merged.outgoing)
            kept = compact_ranges(merged.kept)
            cut = {name: {"0": kept} for name, _ in first.named_parameters(recurse=False)}
            size = len(merged.kept)
            edits.append(Edit("slice", pair.first, config={"tensors": cut, "attributes": {"out_features": size}}))
            reads = {"tensors": {"weight": {"1": kept}}, "attributes": {"in_features": size}}
            edits.append(Edit("slice", pair.second, config=reads))
        return edits

    def metrics(self, layers: Layers) -> dict[str, float]:
        """Return ``neurons``: how many stay in the layers that lose some."""
        sizes = [_linear(layers, pair.first).out_features - self._count(layers, pair) for pair in self._pairs]
        return {"neurons": float(sum(sizes))}

    def reset_values(self) -> None:
        """Forget the layers of another model."""
        self._pairs = []

    def _count(self, layers: Layers, pair: Pair) -> int:
        size = _linear(layers, pair.first).out_features
        return min(round(self.schedule.final * size), size - 1)


def _linear(layers: Layers, path: str) -> nn.Linear:
    layer = layers[path]
    if not isinstance(layer, nn.Linear):
        raise ConfigurationError(f"{path!r} is {type(layer).__name__} now, expected Linear; something replaced it")
    return layer
