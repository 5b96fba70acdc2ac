"""What a score has to remember while a model trains: collected gradients, norms of inputs, a seed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import get_total_norm

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.pruning import scores
from lightning_compress.pruning.granularity import Granularity, Layout, group_scores, to_units
from lightning_compress.pruning.scores import Score
from lightning_compress.pruning.second_order import obd_saliency

_TERMS = {
    "gradient": scores.gradient,
    "movement": scores.movement,
    "snip": scores.gradient,
    "obd": lambda weight, grad: grad.float().square(),
}


class Scorer:
    """Collects what a :class:`Score` needs, in float32 and the same way in every process, and computes it.

    Args:
        score: The criterion.

    >>> scorer = Scorer(scores.find_score("obd"))
    >>> weight = nn.Parameter(torch.tensor([1.0, -3.0]))
    >>> weight.grad = torch.tensor([2.0, 1.0])
    >>> scorer.observe({"w": weight})
    >>> scorer.rate({"w": weight}, {}, step=0, shared=False)["w"]
    tensor([2.0000, 4.5000])
    """

    def __init__(self, score: Score) -> None:
        self.score = score
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._seed: int | None = None
        self._watching = ExitStack()

    def observe(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Collect gradients, unless one is infinite or no number: the gradient scaler will skip that step."""
        grads = {key: weight.grad for key, weight in weights.items() if weight.grad is not None}
        if self.score.span == "first":
            grads = {key: grad for key, grad in grads.items() if key not in self._sums}
        if not grads or not bool(torch.isfinite(get_total_norm(list(grads.values()), float("inf")))):
            return
        for key, grad in grads.items():
            self._add(key, _TERMS[self.score.name](weights[key].detach(), grad))

    def watch(self, layers: Mapping[str, nn.Module], layouts: Mapping[str, Layout]) -> None:
        """Collect squares of inputs in every forward pass until :meth:`unwatch`; nothing runs compiled until then."""
        self.unwatch()
        self._watching.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code would not see the hooks
        for key, layer in layers.items():
            hook = partial(self._see, key, layouts[key])
            self._watching.enter_context(layer.register_forward_hook(hook, with_kwargs=True))

    def unwatch(self) -> None:
        """Stop looking at inputs."""
        self._watching.close()

    def rate(
        self, weights: Mapping[str, Tensor], layouts: Mapping[str, Layout], step: int, shared: bool
    ) -> dict[str, Tensor]:
        """Return one score a weight, in its shape.

        Args:
            weights: By path.
            layouts: Of their layers, by path.
            step: Number of the optimizer update, for random scores.
            shared: Whether other processes hold copies of the model and call this at the same time.

        Raises:
            ConfigurationError: If inputs are needed and a layer saw none; names it.
        """
        name = self.score.name
        if name == "random":
            self._draw_seed(next(iter(weights.values())), shared)
            return {key: scores.random(weight, self._seed or 0, step, key) for key, weight in weights.items()}
        if self.score.needs == "weights":
            return {key: scores.magnitude(weight) for key, weight in weights.items()}
        means = self._means(weights, layouts, shared)
        if name == "obd":
            return {key: obd_saliency(weight.detach().float(), means[key]) for key, weight in weights.items()}
        if name == "wanda":
            return {key: scores.wanda(weight, means[key].sqrt(), layouts[key]) for key, weight in weights.items()}
        if name == "snip":
            total = torch.stack([mean.sum(dtype=torch.float64).cpu() for mean in means.values()]).sum().item()
            return {key: scores.snip(mean, total) for key, mean in means.items()}
        return means

    def rate_groups(
        self,
        weights: Mapping[str, Tensor],
        layouts: Mapping[str, Layout],
        granularity: Granularity,
        norms: Mapping[str, Tensor],
        step: int,
        shared: bool,
    ) -> dict[str, Tensor]:
        """Return one score a group of weights.

        Args:
            weights: By path.
            layouts: Of their layers, by path.
            granularity: Which weights are one group.
            norms: Weights of the batch norms behind the layers, where the score needs them.
            step: As in :meth:`rate`.
            shared: As in :meth:`rate`.
        """
        if self.score.needs == "norms":
            return {key: scores.bn_scale(norms[key], layouts[key]) for key in weights}
        if self.score.name == "geometric_median":
            return {key: scores.geometric_median(w, granularity, layouts[key]) for key, w in weights.items()}
        rated = self.rate(weights, layouts, step, shared)
        return {key: group_scores(rated[key], granularity, layouts[key], self.score.how) for key in weights}

    def updated(self) -> None:
        """Begin anew after an update, where the score is about the time since the last one."""
        self.unwatch()
        if self.score.span == "update":
            self._sums, self._counts = {}, {}

    def state(self) -> dict[str, Tensor]:
        """Return what was collected, as tensors, for a checkpoint."""
        name = self.score.name
        state = {f"{name}.sum:{key}": value.clone() for key, value in self._sums.items()}
        state |= {f"{name}.count:{key}": torch.tensor(count) for key, count in self._counts.items()}
        return state if self._seed is None else {**state, f"{name}.seed:": torch.tensor(self._seed)}

    def load(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take back what :meth:`state` returned; return the entries that are none of it.

        Raises:
            ConfigurationError: If it was collected for another score.
        """
        others: dict[str, Tensor] = {}
        self._sums, self._counts, self._seed = {}, {}, None
        for entry, value in state.items():
            kind, separator, key = entry.partition(":")
            name, _, part = kind.rpartition(".")
            if not separator or name not in scores.SCORES:
                others[entry] = value
            elif name != self.score.name:
                raise ConfigurationError(
                    f"the checkpoint was written with `score` {name!r}, the run has {self.score.name!r}; resume with "
                    f"{name!r}, or load the weights and start a new fit"
                )
            elif part == "sum":
                self._sums[key] = value.clone()
            elif part == "count":
                self._counts[key] = int(value)
            else:
                self._seed = int(value)
        return others

    def attach(self, weights: Mapping[str, Tensor], layouts: Mapping[str, Layout], shared: bool) -> None:
        """Move what was loaded to the devices of the weights; draw the seed of random scores, if it was not loaded.

        Raises:
            ConfigurationError: If it belongs to weights that are not there, or to other shapes.
        """
        for key, value in self._sums.items():
            expected = self._empty(weights[key], layouts[key]) if key in weights else None
            if expected is None or expected.shape != value.shape:
                raise ConfigurationError(
                    f"the checkpoint has {self.score.name} scores of shape {tuple(value.shape)} for {key!r}, which "
                    + (f"needs {tuple(expected.shape)}" if expected is not None else "is not selected now")
                    + "; resume with the model and the `select` it was written with"
                )
            self._sums[key] = expected.copy_(value)
        if self.score.name == "random":
            self._draw_seed(next(iter(weights.values())), shared)

    def _add(self, key: str, term: Tensor, count: int = 1) -> None:
        if key in self._sums:
            self._sums[key].add_(term)
        else:
            self._sums[key] = term.clone()
        self._counts[key] = self._counts.get(key, 0) + count

    def _see(
        self, key: str, layout: Layout, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        inputs = (args[0] if args else kwargs["input"]).detach().float()
        channel = inputs.dim() - 1 - layout.kernel
        others = [dim for dim in range(inputs.dim()) if dim != channel]
        squares = inputs.square().sum(others) if others else inputs.square()
        self._add(key, squares, inputs.numel() // inputs.shape[channel])

    def _empty(self, weight: Tensor, layout: Layout) -> Tensor:
        if self.score.needs == "gradients":
            return torch.zeros_like(weight, dtype=torch.float32, requires_grad=False)
        units = to_units(weight, layout)
        return weight.new_zeros(units.shape[0] * units.shape[2], dtype=torch.float32)

    def _means(self, weights: Mapping[str, Tensor], layouts: Mapping[str, Layout], shared: bool) -> dict[str, Tensor]:
        """Return what was collected per observation (or in all, over a run), over all processes."""
        means = {}
        for key, weight in weights.items():
            total = self._sums[key] if key in self._sums else self._empty(weight, layouts[key])
            count = torch.tensor(self._counts.get(key, 0), device=weight.device)
            ranks = 1
            if shared:
                total, ranks = total.clone(), distributed.get_world_size()
                distributed.all_reduce(total)
                distributed.all_reduce(count)
            if self.score.needs == "inputs" and not count:
                raise ConfigurationError(
                    f"`score` {self.score.name!r} needs the inputs of {key!r}, but the batches before this update did "
                    "not run through it (its weight is used without calling it); put it into "
                    "`exclude` of the selection"
                )
            means[key] = total / (ranks if self.score.span == "run" else max(1.0, float(count)))
        return means

    def _draw_seed(self, like: Tensor, shared: bool) -> None:
        if self._seed is None:
            drawn = torch.tensor(torch.initial_seed() & (2**63 - 1), device=like.device)
            if shared:
                distributed.broadcast(drawn, 0)
            self._seed = int(drawn)
