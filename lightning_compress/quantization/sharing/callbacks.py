"""Weight sharing while a model trains, and on a trained one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast
from zlib import crc32

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lightning_compress.core.callback import CompressionCallback
from lightning_compress.core.errors import ConfigurationError, SelectionError, did_you_mean
from lightning_compress.core.paths import named_layers
from lightning_compress.core.plan import PlanRow
from lightning_compress.core.randomness import common_seed
from lightning_compress.core.rules import build_rules
from lightning_compress.core.run import Layers
from lightning_compress.core.schedule import Schedule, parse_time
from lightning_compress.core.select import Select, Selection
from lightning_compress.core.targets import shape_of, tied_with
from lightning_compress.quantization.optimizers import check_second_moments
from lightning_compress.quantization.sharing.held import GRADIENTS, SHAREABLE, HeldCodes
from lightning_compress.quantization.sharing.importance import Fisher, adam_importance, as_importance, damped
from lightning_compress.quantization.sharing.kmeans import nearest
from lightning_compress.quantization.sharing.quantizers import CodebookQuantizer, as_quantizer
from lightning_compress.quantization.sharing.rules import SharingRule

SCOPES = ("layer", "global")
_ROOT, _SEED, _SQUARES, _EVERYTHING = "", "seed", "squares:", "everything"
_OTHERWISE = ", or use scope='layer'"


class WeightSharing(CompressionCallback):
    r"""Let many weights share few values, and train the values on (Deep Compression, Han et al., arXiv:1510.00149).

    At the schedule's start the weights of each tensor are clustered and every weight is put on its centroid; zeros
    stay zero, count as no cluster, and never come back. From then on each weight gets the gradient of its centroid,
    :math:`\partial L / \partial c_k = \sum_{i \in k} \partial L / \partial w_i`, so that the optimizer, with its
    momentum, weight decay or second moments, moves a cluster as it would move one parameter, and weights of a cluster
    stay equal to the bit. Values stay in place: ``state_dict`` keys, weight averaging, ``torch.compile`` and DDP see an
    ordinary model, and ``save_compressed`` stores codebooks and entropy-coded indices. Assignments live in the
    checkpoint's callback state and survive ``fit(ckpt_path=...)`` from any point.

    Weights of Linear, convolution, recurrent, attention and embedding layers are shared; biases and norms are left
    alone. Frozen weights keep their values, also in a global codebook that other weights train on; once unfrozen they
    take the nearest values of their codebook. Parameters tied to a layer outside the selection are kept, and the plan
    names them all. With pruning: put the pruning callback before this one, and let its schedule end before this one
    starts; on a model that has been pruned, start at 0, where the weights are clustered before the first batch.

    Sums are large: with SGD a cluster of a thousand weights moves as fast as a thousand weights together, so lower
    the learning rate, or take ``gradient="mean"``. (Adam hardly sees the difference.) Clipping by norm counts a
    centroid's gradient once for every weight. It makes the file smaller, and nothing faster.

    Runs on: any device, ``ddp``; refuses sharded strategies. Put it after ``WeightAveraging`` or
    ``StochasticWeightAveraging`` in the Trainer's list.

    Args:
        quantizer: How values become few: a number of bits for k-means (5 is 32 clusters), or
            :class:`~lightning_compress.quantization.sharing.quantizers.KMeans`, ``Uniform`` or ``EntropyConstrained``.
        schedule: When; its ``shape`` is ``"once"``. Default at 50 % of the run.
        select: Which layers; default all whose weights can be shared.
        scope: ``"layer"`` for a codebook a tensor, ``"global"`` for one of all tensors that no rule names.
        rules: Named exceptions with a quantizer of their own; the last that matches a layer wins.
        importance: What each weight counts in its cluster: ``"equal"``; by the diagonal of the Hessian (Choi et al.,
            arXiv:1612.01543) from the squared ``"gradients"`` of training before the start, from ``"adam"``'s second
            moment, or from :class:`~lightning_compress.quantization.sharing.importance.Fisher` on calibration data.
            The mean is added to what each counts. On small networks for digits it made the error of outputs a third
            smaller at best and a fifth larger at worst, and accuracy hardly changed.
        gradient: ``"sum"``, as in the paper, or ``"mean"``: the sum by the number of weights in the cluster.
        name: Tells two of these callbacks apart.

    Raises:
        ConfigurationError: For a value outside its range, or a schedule that shares bit by bit.
        SelectionError: If no layer is selected, or a rule matches none.

    >>> from lightning_compress import compress
    >>> net = nn.Sequential(nn.Linear(50, 40), nn.ReLU(), nn.Linear(40, 2))
    >>> [len(layer.weight.unique()) for layer in compress(net, WeightSharing(3, rules={"last": SharingRule("2", 1)}))
    ...  if isinstance(layer, nn.Linear)]
    [8, 2]
    """

    link: ClassVar[str] = "share"
    supported: ClassVar[tuple[type[nn.Module], ...]] = SHAREABLE
    needs_example: ClassVar[bool] = False
    runs_after: ClassVar[tuple[type[Callback], ...]] = (WeightAveraging, StochasticWeightAveraging)

    def __init__(
        self,
        quantizer: CodebookQuantizer | int = 5,
        schedule: Schedule | None = None,
        select: Select | None = None,
        scope: str = "layer",
        rules: Mapping[str, SharingRule] | None = None,
        importance: Fisher | str = "equal",
        gradient: str = "sum",
        name: str | None = None,
    ) -> None:
        schedule = Schedule(1.0, start="50%", shape="once") if schedule is None else schedule
        super().__init__(schedule, Select() if select is None else select, name)
        for argument, word, words in (("scope", scope, SCOPES), ("gradient", gradient, GRADIENTS)):
            if word not in words:
                raise ConfigurationError(f"`{argument}` is {word!r}: {did_you_mean(str(word), words)}")
        self.quantizer, self.scope, self.gradient = as_quantizer(quantizer), scope, gradient
        self.rules = build_rules(rules, SharingRule, "quantizer")
        self.importance = as_importance(importance)
        self._check_schedule()
        self._held, self._rule_of = HeldCodes(_OTHERWISE), dict[str, str]()
        self._squares: dict[str, Tensor] = {}
        self._seed: int | None = None
        self._error = 0.0

    def choose(self, root: nn.Module) -> Selection:
        """Select the layers, those that only a rule names included, and find their weights."""
        selection = self.select.resolve(root, SHAREABLE)
        layers, left = dict(selection.layers), dict(selection.left)
        rule_of: dict[str, str] = {}
        for name, rule in self.rules.items():
            try:
                ruled = rule.select.resolve(root, SHAREABLE).layers
            except SelectionError as error:
                raise SelectionError(f"rule {name!r}: {error}") from error
            layers |= ruled
            rule_of |= dict.fromkeys(ruled, name)
        alone = {path for path, name in rule_of.items() if self.rules[name].quantizer is None}
        left |= {path: f"kept: rule {rule_of[path]!r} leaves it alone" for path in alone}
        chosen = {path: layer for path, layer in named_layers(root).items() if path in layers and path not in alone}
        found = self._held.find(root, Selection(chosen, {k: v for k, v in left.items() if k not in chosen}))
        self._rule_of = {t.key: rule_of[t.layer] for t in self._held.targets if t.layer in rule_of}
        if self.scope == "global":
            free = {key: w.dtype for key, w in self._held.weights(found.layers).items() if key not in self._rule_of}
            mixed = len(set(free.values())) > 1  # a shared value has one type
            self._held.groups |= {k: f"{_EVERYTHING} {dtype}" if mixed else _EVERYTHING for k, dtype in free.items()}
        whole = {_ROOT: root} if isinstance(self.importance, Fisher) else {}
        return Selection({**whole, **found.layers}, found.left)

    def examine(self, root: nn.Module, example_inputs: Any) -> Selection:
        """Refuse calibration data that the model cannot run on before it is trained."""
        if isinstance(self.importance, Fisher):
            self.importance.check(root, self._held.weights(self.layers(root)))
        return Selection(self.layers(root), dict(self._left))

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return a row for each tensor: which rule, its shape, and how its values become few.

        Raises:
            ConfigurationError: If the optimizers of the fit do not suit ``scope`` or ``importance``.
        """
        optimizers = cast(LightningModule, self.module).trainer.optimizers
        self._held.check_movable(layers, optimizers)
        if self.importance == "adam":
            instead = "use importance='gradients' or Fisher(batches)"
            check_second_moments(self._held.unshared(layers), optimizers, "`importance` 'adam'", instead)
        rows = []
        for key, weight in self._held.weights(layers).items():
            action = f"share: {self._quantizer_of(key)}"
            action += ", one codebook for all" if self._held.groups[key] != key else ""
            action += "" if self.importance == "equal" else f", weighted by {self.importance}"
            action += tied_with(self._held.targets, key)
            action = action if weight.requires_grad else f"kept while frozen, then {action}"
            rows.append(PlanRow(self._rule_of.get(key, "select"), key, shape_of(weight), action))
        return rows

    def before_step(self, layers: Layers, optimizer: Optimizer, scale: float) -> None:
        """Look at the gradients that an optimizer steps by, and give every weight the one of its shared value."""
        self._held.let_go(layers if self._run is None else self._run.layers)
        moved = self._held.moved_by(layers, optimizer)
        if self.importance == "gradients":
            self._collect(moved, scale)
        self._held.share_gradients(moved, self.gradient)

    def update(self, layers: Layers, amount: float) -> None:
        """Cluster what is not shared yet and put it on its centroids."""
        self._share(layers, self._held.unshared(layers, frozen=not self.in_fit))

    def enforce(self, layers: Layers) -> None:
        """Put every weight back on its centroid, exactly."""
        self._held.tie(layers)

    def pending(self, layers: Layers) -> bool:
        """Return whether a weight that is not shared has been unfrozen."""
        return bool(self._held.unshared(layers))

    def enforce_state(self, state_dict: dict[str, Any]) -> None:
        """Put weights that are about to be saved on their centroids."""
        self._held.tie_state(state_dict)

    def metrics(self, layers: Layers) -> dict[str, float]:
        """Return ``clusters``, the mean ``bits`` of an index by its entropy, and the relative squared ``error``."""
        return {**self._held.metrics(), "error": self._error}

    def values(self) -> dict[str, Any]:
        """Return the clusters, and what is needed to find them."""
        squares = {_SQUARES + key: value.clone() for key, value in self._squares.items()}
        seed = {} if self._seed is None else {_SEED: torch.tensor(self._seed)}
        return self._held.state() | squares | seed

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Take the clusters of a checkpoint; they are fitted when the weights are at hand."""
        rest = self._held.load(values)
        self._seed = int(rest[_SEED]) if _SEED in rest else None
        self._squares = {k.removeprefix(_SQUARES): v.clone() for k, v in rest.items() if k.startswith(_SQUARES)}

    def attach_values(self, layers: Layers) -> None:
        """Fit what was loaded to the weights; with a start of 0, share them before the first batch."""
        self._held.attach(layers)
        weights = self._held.weights(layers)
        for key, value in self._squares.items():
            if key not in weights or weights[key].shape != value.shape:
                raise ConfigurationError(
                    f"the checkpoint has squared gradients of {tuple(value.shape)} for {key!r}, which "
                    + (f"is {tuple(weights[key].shape)}" if key in weights else "is not selected now")
                    + "; resume with the model and the `select` it was written with"
                )
            self._squares[key] = value.to(weights[key].device)
        if self._seed is None:
            self._seed = common_seed(next(iter(weights.values())).device)
        if parse_time(self.schedule.start, "start")[1] == 0 and self.updates == 0:
            with torch.no_grad():
                self._share(layers, self._held.unshared(layers))

    def reset_values(self) -> None:
        """Forget the clusters and what they belong to."""
        self._held, self._rule_of, self._squares, self._seed, self._error = HeldCodes(_OTHERWISE), {}, {}, None, 0.0

    def _share(self, layers: Layers, weights: Mapping[str, nn.Parameter]) -> None:
        """Cluster the given weights, those of one codebook together, and remember how far they moved."""
        if not weights:
            return
        importance = self._importances(layers, weights)
        pools: dict[str, list[str]] = {}
        for key in weights:
            pools.setdefault(self._held.groups[key], []).append(key)
        size, distance = 0.0, 0.0
        for group, keys in pools.items():
            before = torch.cat([_flat(weights[key]) for key in keys])
            self._cluster(layers, group, {key: weights[key] for key in keys}, importance)
            after = torch.cat([_flat(weights[key]) for key in keys])
            size += float(before.square().sum())
            distance += float((after - before).square().sum())
        self._error, self._squares = distance / size if size else 0.0, {}

    def _collect(self, layers: Layers, scale: float = 1.0) -> None:
        """Add up squared gradients of weights that are to be shared yet."""
        grads = {k: w.grad for k, w in self._held.unshared(layers).items() if w.grad is not None}
        if not grads:
            return
        device = next(iter(grads.values())).device
        fine = torch.stack([torch.isfinite(grad).all().to(device) for grad in grads.values()]).all()
        for key, grad in grads.items():  # else the gradient scaler skips the step; the device is not asked
            square = torch.where(fine.to(grad.device), (grad.float() / scale).square(), 0.0)
            self._squares[key] = self._squares[key].add_(square) if key in self._squares else square

    def _cluster(
        self, layers: Layers, group: str, weights: Mapping[str, Tensor], importance: Mapping[str, Tensor]
    ) -> None:
        """Put the weights of one codebook on shared values; zeros stay zero."""
        values = torch.cat([_flat(weight) for weight in weights.values()])
        alive = values != 0
        codes, centroids = torch.full(values.shape, -1, dtype=torch.int32), torch.zeros(0, dtype=torch.float64)
        present = self._held.present(layers, group)
        if present is not None:  # weights that were unfrozen later join the others
            centroids = present
            order = centroids.argsort()[: int(centroids.isfinite().sum())]
            codes[alive] = order[nearest(values[alive], centroids[order]).long()].int()
        elif bool(alive.any()):
            h = damped(torch.cat([_flat(importance[key]) for key in weights])[alive]) if importance else None
            try:
                book = self._quantizer_of(next(iter(weights))).codebook(values[alive], h, self._generator(group))
            except ConfigurationError as error:
                raise ConfigurationError(f"{next(iter(weights))!r}: {error}") from error
            centroids, codes[alive] = book
        parts = codes.split([weight.numel() for weight in weights.values()])
        self._held.share(layers, dict(zip(weights, parts, strict=True)), group, centroids)

    def _quantizer_of(self, key: str) -> CodebookQuantizer:
        rule = self.rules.get(self._rule_of.get(key, ""))
        return self.quantizer if rule is None or rule.quantizer is None else as_quantizer(rule.quantizer)

    def _importances(self, layers: Layers, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Return what each weight counts, the same in every process; nothing if all count alike."""
        if isinstance(self.importance, Fisher):
            found = self.importance.diagonal(layers[_ROOT], weights)
            if self._run is not None and distributed.is_available() and distributed.is_initialized():
                for value in found.values():  # processes may have read different batches: the first decides for all
                    distributed.broadcast(value, 0)
            return found
        if self.importance == "equal":
            return {}
        if not self.in_fit or self._run is None:
            raise ConfigurationError(
                f"`importance` {self.importance!r} is learned while a model trains, and `compress` does not train; use "
                "Fisher(batches), or give the callback to a Trainer"
            )
        if self.importance == "adam":
            return adam_importance(weights, self._run.optimizers)
        return {key: self._squares.get(key, torch.zeros_like(weight)) for key, weight in weights.items()}

    def _generator(self, group: str) -> torch.Generator:
        """Return random numbers for one codebook, the same in every process and on resume."""
        seed = common_seed(torch.device("cpu")) if self._seed is None else self._seed
        return torch.Generator().manual_seed((seed + crc32(group.encode())) & (2**63 - 1))

    def _check_schedule(self) -> None:
        schedule = self.schedule
        if schedule.final != 1 or schedule.shape != "once":
            raise ConfigurationError(
                "`schedule` must share all weights at one time, Schedule(1.0, start=..., shape='once'); got shape "
                f"{schedule.shape!r} to {schedule.final:g}"
            )
        if self.importance in ("gradients", "adam") and parse_time(schedule.start, "start")[1] == 0:
            raise ConfigurationError(
                f"`importance` {self.importance!r} is learned while training, but the schedule starts at 0; start "
                "later, or use Fisher(batches)"
            )


WeightSharing.conflicts_on_layers = (WeightSharing,)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).cpu().double()
