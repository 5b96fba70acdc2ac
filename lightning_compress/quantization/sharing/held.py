"""Shared values held in place: weights of one cluster stay equal, move by one gradient, and pruned ones stay zero."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lightning_compress.core.errors import ConfigurationError, SelectionError, did_you_mean
from lightning_compress.core.paths import clean_path
from lightning_compress.core.run import Layers
from lightning_compress.core.select import Selection
from lightning_compress.core.targets import PRUNABLE, Target, find_targets, why_no_numbers
from lightning_compress.quantization.optimizers import holders
from lightning_compress.quantization.sharing.members import Members, sum_gradients, tie_values
from lightning_compress.quantization.sharing.rates import entropy_bits

SHAREABLE: tuple[type[nn.Module], ...] = (*PRUNABLE, nn.Embedding, nn.EmbeddingBag)
"""Layer types with weights that can be shared; biases and norms are left alone."""

GRADIENTS = ("sum", "mean")
_CODES, _SIZE = "codes:", "clusters:"


class HeldCodes:
    """The clusters of one callback, by path of the weight; what has none is trained as ever.

    Args:
        otherwise: What errors advise besides one optimizer for all weights of a codebook.

    Attributes:
        targets: The weights that may be shared.
        groups: Name of the codebook of each, by path.
        members: Which of their values belong to which cluster, once they are shared.
        sizes: Number of clusters of each codebook.

    >>> held = HeldCodes()
    >>> net = nn.Sequential(nn.Linear(4, 1, bias=False))
    >>> layers = held.find(net, Selection({"0": net[0]})).layers
    >>> net[0].weight.data = torch.tensor([[1.0, 3.0, 0.0, 5.0]])
    >>> held.share(layers, {"0.weight": torch.tensor([0, 0, -1, 1])}, "0.weight", torch.tensor([2.0, 5.0]))
    >>> net[0].weight.tolist()
    [[2.0, 2.0, 0.0, 5.0]]
    >>> net[0].weight.grad = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    >>> held.share_gradients(layers)
    >>> net[0].weight.grad.tolist()
    [[3.0, 3.0, 0.0, 8.0]]
    """

    def __init__(self, otherwise: str = "") -> None:
        self.otherwise = otherwise
        self.targets: list[Target] = []
        self.groups: dict[str, str] = {}
        self.members: dict[str, Members] = {}
        self.sizes: dict[str, int] = {}
        self._loaded: dict[str, Tensor] = {}

    def find(self, root: nn.Module, selection: Selection) -> Selection:
        """Find the weights of the selected layers, each with a codebook of its own, and name what is left alone.

        Raises:
            SelectionError: If none of them can be shared.
        """
        targets, reasons = find_targets(root, selection.layers, "shared")
        sparse = {t.key for t in targets if getattr(selection.layers[t.layer], "sparse", False)}
        reasons |= dict.fromkeys(sparse, "kept: its gradients are sparse, so a cluster could not move as one")
        unfit = {t.key: why for t in targets if (why := why_no_numbers(t.weight(selection.layers)))}
        reasons |= unfit
        self.targets = [target for target in targets if target.key not in sparse | unfit.keys()]
        if not self.targets:
            why = "; ".join(f"{key}: {reason}" for key, reason in reasons.items())
            raise SelectionError(f"no tensor of the selected layers can be shared: {why}")
        self.groups = {target.key: target.key for target in self.targets}
        return Selection(selection.layers, {**selection.left, **reasons})

    def weights(self, layers: Layers) -> dict[str, nn.Parameter]:
        """Return the weights by path, those of the given layers only."""
        return {target.key: target.weight(layers) for target in self.targets if target.layer in layers}

    def unshared(self, layers: Layers, frozen: bool = False) -> dict[str, nn.Parameter]:
        """Return the weights that are not shared yet and train; with ``frozen``, those that do not train too."""
        weights = self.weights(layers)
        return {k: w for k, w in weights.items() if k not in self.members and (frozen or w.requires_grad)}

    def share(self, layers: Layers, codes: Mapping[str, Tensor], group: str, centroids: Tensor) -> None:
        """Put weights on the centroids of one codebook.

        Args:
            layers: The selected layers.
            codes: By path, the number of the cluster of each weight in row-major order; -1 where it is zero.
            group: Name of the codebook.
            centroids: (k,).
        """
        weights = self.weights(layers)
        self.sizes[group] = len(centroids)
        for key, given in codes.items():
            members = self.members[key] = Members.of(given.to(weights[key].device))
            members.put(weights[key], centroids.to(weights[key]))

    def present(self, layers: Layers, group: str) -> Tensor | None:
        """Return the shared values of a codebook as they are now, (k,), NaN for a cluster without weights.

        ``None`` if nothing shares them yet.
        """
        pool = self._pools(layers).get(group)
        if pool is None or not any(bool(members.codes.any()) for _, members in pool):
            return None
        table = torch.full((self.sizes[group] + 1,), torch.nan, dtype=torch.float64)
        for weight, members in pool:
            table[members.codes.cpu()] = members.take(weight).cpu().double()
        return table[1:]

    def moved_by(self, layers: Layers, optimizer: Optimizer) -> Layers:
        """Return the layers whose weights an optimizer holds; one that holds their biases alone moves none of them."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        mine = {t.layer for t in self.targets if t.layer in layers and id(t.weight(layers)) in held}
        return {path: layer for path, layer in layers.items() if path in mine}

    def let_go(self, layers: Layers) -> None:
        """Let go of frozen weights in codebooks that others train, before these step, so that they keep their values.

        Such a weight is as one that was never shared: once it is unfrozen, it can join its codebook again.
        """
        for key in self._resting(layers):
            del self.members[key]

    def _resting(self, layers: Layers) -> list[str]:
        """Return the paths of frozen weights in codebooks that others train."""
        held = {key: weight.requires_grad for key, weight in self.weights(layers).items() if key in self.members}
        moving = {self.groups[key] for key, trains in held.items() if trains}
        return [key for key, trains in held.items() if not trains and self.groups[key] in moving]

    def share_gradients(self, layers: Layers, how: str = "sum") -> None:
        r"""Give every weight of a cluster the gradient of the shared value, and pruned weights none.

        .. math:: \frac{\partial L}{\partial c_k} = \sum_{i \in k} \frac{\partial L}{\partial w_i}

        Equal weights with equal gradients take equal steps, so any optimizer moves them as it would move the one
        parameter :math:`c_k`. Processes take the sums of the first one, because sums on an accelerator may differ in
        their last bits.

        Args:
            layers: Those whose gradients are final.
            how: ``"sum"``, or ``"mean"``: the sum by the number of weights in the cluster.
        """
        self._check_whole(layers)
        pools = {group: [(w, m) for w, m in pool if w.grad is not None] for group, pool in self._pools(layers).items()}
        pools = {group: pool for group, pool in pools.items() if pool}
        if not pools:
            return
        sums = [sum_gradients(self.sizes[group], pool, how) for group, pool in pools.items()]
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            together = torch.cat(sums)
            distributed.broadcast(together, 0)
            sums = list(together.split([len(one) for one in sums]))
        for pool, table in zip(pools.values(), sums, strict=True):
            for weight, members in pool:
                if weight.grad is not None:
                    members.put(weight.grad, table.to(weight.grad))

    def tie(self, layers: Layers) -> None:
        """Make the weights of each cluster equal, and pruned ones zero.

        Equal ones stay as they are, to the bit. Where they differ (rounding, averaged weights) all take their mean. A
        weight that something else has set to zero since is pruned, and stays so. Frozen weights in codebooks that
        others train keep their values; whether they are frozen when those step is not known yet.
        """
        for group, pool in self._pools(layers, self._resting(layers)).items():
            tie_values(self.sizes[group], pool)

    def tie_state(self, state_dict: Mapping[str, Any]) -> None:
        """Do the same to weights that are about to be saved."""
        tensors = {clean_path(key): value for key, value in state_dict.items() if isinstance(value, Tensor)}
        pools: dict[str, list[tuple[Tensor, Members]]] = {}
        for key, members in self.members.items():
            if key in tensors:
                here = members.to(tensors[key].device).alive(tensors[key])
                pools.setdefault(self.groups[key], []).append((tensors[key], here))
        for group, pool in pools.items():
            tie_values(self.sizes[group], pool)

    def counts(self) -> dict[str, Tensor]:
        """Return how many weights each cluster has, by codebook."""
        found: dict[str, Tensor] = {}
        for key, members in self.members.items():
            count = torch.bincount(members.codes.cpu(), minlength=self.sizes[self.groups[key]] + 1)[1:]
            found[self.groups[key]] = found.get(self.groups[key], 0) + count
        return found

    def metrics(self) -> dict[str, float]:
        """Return ``clusters``, all that are in use, and ``bits``: the mean entropy of an index that is not zero."""
        counts = list(self.counts().values())
        total = sum(int(count.sum()) for count in counts)
        bits = sum(entropy_bits(count) * int(count.sum()) for count in counts)
        clusters = sum(int(torch.count_nonzero(count)) for count in counts)
        return {"clusters": float(clusters), "bits": bits / total if total else 0.0}

    def state(self) -> dict[str, Tensor]:
        """Return the clusters as small integers, 0 for zero, for a checkpoint."""
        saved = {_SIZE + group: torch.tensor(size) for group, size in self.sizes.items()}
        for key, members in self.members.items():
            small = self.sizes[self.groups[key]] < 256
            saved[_CODES + key] = members.packed(torch.uint8 if small else torch.int16)
        return saved | self._loaded

    def load(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take clusters from a checkpoint, to be fitted when the weights are at hand; return the other entries."""
        self.members, self.sizes = {}, {}
        self._loaded = {key: value for key, value in values.items() if key.startswith((_CODES, _SIZE))}
        return {key: value for key, value in values.items() if key not in self._loaded}

    def attach(self, layers: Layers) -> None:
        """Fit loaded clusters to the weights they belong to.

        Raises:
            ConfigurationError: If they belong to no selected weight, to one of another size, or to another codebook.
        """
        weights = self.weights(layers)
        for entry, value in self._loaded.items():
            if entry.startswith(_SIZE):
                self.sizes[entry.removeprefix(_SIZE)] = int(value)
        for entry, value in self._loaded.items():
            key = entry.removeprefix(_CODES)
            if key == entry:
                continue
            if key not in weights:
                raise ConfigurationError(
                    f"the checkpoint has clusters for {key!r}, which is not selected now; {did_you_mean(key, weights)} "
                    "Resume with the `select` it was written with"
                )
            size = self.sizes.get(self.groups[key])
            if size is None or int(value.max()) > size or value.numel() != weights[key].numel():
                raise ConfigurationError(
                    f"the checkpoint has {value.numel()} codes for {key!r}, which has {weights[key].numel()} weights"
                    + ("" if size is not None else f" and the codebook {self.groups[key]!r}, of which it has none")
                    + "; resume with the model, `scope` and `rules` it was written with"
                )
            self.members[key] = Members.of(value.long() - 1).to(weights[key].device)
        self._loaded = {}

    def _pools(self, layers: Layers, without: Collection[str] = ()) -> dict[str, list[tuple[nn.Parameter, Members]]]:
        """Return shared weights and their clusters, those of one codebook together, on the weights' devices.

        What is zero by now has been pruned by something else, and is dropped.
        """
        pools: dict[str, list[tuple[nn.Parameter, Members]]] = {}
        for key, weight in self.weights(layers).items():
            if key in self.members and key not in without:
                members = self.members[key] = self.members[key].to(weight.device)
                members.drop(weight)
                pools.setdefault(self.groups[key], []).append((weight, members))
        return pools

    def check_movable(self, layers: Layers, optimizers: Iterable[Optimizer]) -> None:
        """Refuse, before training, a codebook whose weights no single optimizer would move.

        Frozen weights are passed over: they keep their values until they are unfrozen.

        Raises:
            ConfigurationError: Names the first weight that would not move with the others.
        """
        held = holders(optimizers)
        moved: dict[str, tuple[str, set[int]]] = {}
        weights = {key: weight for key, weight in self.weights(layers).items() if weight.requires_grad}
        for key, weight in sorted(weights.items(), key=lambda item: id(item[1]) not in held):  # those that move first
            mine = {id(optimizer) for optimizer in held.get(id(weight), ())}
            _, others = moved.setdefault(self.groups[key], (key, mine))
            if mine != others:
                raise self._cannot_move(key, "another optimizer than" if mine else "no optimizer, unlike")

    def _check_whole(self, layers: Layers) -> None:
        """Refuse to move a part of a codebook."""
        by_key = {target.key: target.layer in layers for target in self.targets if target.key in self.members}
        inside = {self.groups[key] for key, here in by_key.items() if here}
        for key, here in by_key.items():
            if not here and self.groups[key] in inside:
                raise self._cannot_move(key, "another optimizer, or by none, unlike")

    def _cannot_move(self, key: str, how: str) -> ConfigurationError:
        return ConfigurationError(
            f"{key!r} is trained by {how} other weights of its codebook {self.groups[key]!r}, so they cannot move as "
            f"one; let one optimizer of `configure_optimizers` train all of them{self.otherwise}"
        )
