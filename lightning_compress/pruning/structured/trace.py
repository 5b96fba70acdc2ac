"""Find coupled channels: Torch-Pruning's dependency graph says what belongs together, a trial run if that is right."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from lightning_compress.core.copies import full_copy, tensors_in
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.isolation import call, same_randomness
from lightning_compress.core.paths import clean_path, get_layer, named_layers
from lightning_compress.pruning.structured.bound import Bound
from lightning_compress.pruning.structured.build import GroupBuilder
from lightning_compress.pruning.structured.groups import ChannelGroup, Coupling, halves_joined
from lightning_compress.pruning.structured.heads import ATTENTION, head_groups
from lightning_compress.pruning.structured.obstacles import Obstacles
from lightning_compress.pruning.structured.phantoms import Phantoms, phantom_layers
from lightning_compress.pruning.structured.roles import CUTTABLE, ONE_CHANNEL, SELECTABLE, is_single
from lightning_compress.pruning.structured.seams import Seams
from lightning_compress.pruning.structured.stand_ins import put_stand_ins
from lightning_compress.pruning.structured.trial import try_cuts

_LOST = "its channels cannot be followed through the windows or reshapes that come after it"


def coupled_groups(model: nn.Module, example_inputs: object, ignored: Mapping[str, str] | None = None) -> Coupling:
    """Return the channels of a model that can be removed, with all they are coupled to (DepGraph, Fang et al. 2023).

    Torch-Pruning traces a copy of the model in evaluation mode; what it finds is written down as plain indices. Each
    group then has to stand a trial on a copy with random weights: the sliced copy must compute what the copy with
    zeroed channels does, and must still run in training mode. The model itself is neither changed nor moved.

    Args:
        model: Any module whose forward runs on ``example_inputs``.
        example_inputs: One batch: a tensor, a tuple of positional or a mapping of keyword arguments.
        ignored: Paths of layers whose outputs must stay, with the reason.

    Returns:
        The groups, and why the outputs of other layers stay.

    Raises:
        ConfigurationError: If Torch-Pruning is not installed, or cannot trace the model.

    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
    >>> found = coupled_groups(net, torch.zeros(1, 1, 4, 4))
    >>> [(group.name, group.channels, len(group.touches)) for group in found.groups], dict(found.left)
    ([('0', 4, 3)], {'3': "its outputs are the model's outputs"})
    """
    candidates = {path: layer for path, layer in named_layers(model).items() if isinstance(layer, SELECTABLE)}
    found: list[ChannelGroup] = []
    order = {path: index for index, path in enumerate(candidates)}
    traced, called, seams = _trace(model, example_inputs)
    obstacles = Obstacles(model, ignored or {}, seams)
    heads, left = head_groups(model, called)
    for group, problem in sorted([*traced, *((each, "") for each in heads)], key=lambda item: order[item[0].name]):
        problem = problem or obstacles.of(group)
        if problem:
            left |= {path: obstacles.explain(path, problem) for path in group.producers}
        else:
            found.append(group)
            obstacles.take(group)
    found, failed = _tried(model, found, example_inputs)
    left |= {path: failed[group.name] for group in found if group.name in failed for path in group.producers}
    groups = tuple(group for group in found if group.name not in failed)
    cut = {path for group in groups for path in group.producers}
    for path in candidates:
        if path not in cut:
            left.setdefault(path, _unseen(model, path))
    return Coupling(groups, {path: left[path] for path in candidates if path in left and path not in cut})


def _tried(
    model: nn.Module, groups: list[ChannelGroup], example_inputs: object
) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the groups, with the halves joined of those that need it, and why some fail their trial."""
    failed = try_cuts(model, groups, example_inputs)
    gated = {group.name: joined for group in groups if group.name in failed and (joined := halves_joined(group))}
    if not gated:
        return groups, failed
    changed = [gated.get(group.name, group) for group in groups]
    again = try_cuts(model, [g for g in changed if g.name in gated or g.name not in failed], example_inputs)
    return changed, {name: why for name, why in failed.items() if name not in gated} | again


def _unseen(model: nn.Module, path: str) -> str:
    if is_single(get_layer(model, path)):
        return ONE_CHANNEL
    owner = get_layer(model, path.rpartition(".")[0])
    if isinstance(owner, ATTENTION):
        return "it belongs to attention, whose heads can go, but not the width of its outputs"
    return "the model does not call it when it runs on the example inputs"


class _Forward(nn.Module):
    """Shows a tracer a model's forward and nothing else of it: no trainer, no properties that raise."""

    def __init__(self, model: nn.Module, example_inputs: object) -> None:
        super().__init__()
        self.model = model
        first = next(iter(model.parameters()), torch.zeros(()))
        self.phantoms = phantom_layers(lambda: call(model.eval(), example_inputs)).to(first.device, first.dtype)

    def forward(self, inputs: object) -> list[torch.Tensor]:
        with Phantoms(self.phantoms) if len(self.phantoms) else nullcontext(), Seams() as seams:
            outputs = [tensor for tensor in tensors_in(call(self.model, inputs)) if tensor.requires_grad]
        self.seams = len(seams.ends)
        return [*outputs, *seams.ends]


def _trace(model: nn.Module, example_inputs: object) -> tuple[list[tuple[ChannelGroup, str]], set[str], bool]:
    """Return each group of the graph with what speaks against cutting it, the attention that runs, and if seams do."""
    tp: Any = _torch_pruning()
    with torch.inference_mode(False), torch.enable_grad(), same_randomness(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copied = full_copy(model).requires_grad_(True)
        stand_ins = put_stand_ins(copied)
        originals = {linear: layer for linear, (_, layer) in stand_ins.items()}
        paths: dict[object, str] = {module: path for path, module in named_layers(copied).items()}
        paths |= {linear: path for linear, (path, _) in stand_ins.items()}
        called = _watch(copied)
        paths |= {parameter: clean_path(name) for name, parameter in copied.named_parameters()}
        graph: Any = tp.DependencyGraph()
        try:
            with torch.compiler.set_stance("force_eager"):
                traced = _Forward(copied, example_inputs)
                graph.build_dependency(traced, example_inputs, forward_fn=lambda m, inputs: m(inputs), verbose=False)
                _order_roots(graph, len(traced.phantoms) > 0)
            bound = Bound(graph, copied)
            found = [(group, bound.was_hit()) for group in graph.get_all_groups(root_module_types=CUTTABLE)]
        except Exception as error:  # the model's own code and a tracer run here
            raise ConfigurationError(
                f"`example_inputs`: {type(model).__name__} could not be traced on them by Torch-Pruning "
                f"({type(error).__name__}: {error}); pass one batch that its forward takes. If it takes this one, "
                "the tracer does not know the model: use IterativePruning(granularity='filter'), which needs no trace"
            ) from error
        known = graph.is_out_channel_pruning_fn
        built = [(*GroupBuilder(paths, group, known, originals).build(), lost) for group, lost in found]
        named = [(group, problem or (_LOST if lost else "")) for group, problem, lost in built if group.name]
        return named, called, traced.seams > 0


def _order_roots(graph: Any, narrow_first: bool) -> None:
    """Let no group start at a single channel that others are multiplied with.

    With padded channels groups start at narrow layers: a wide one would join the channels it is added to with those.
    """
    width = {
        module: graph.get_out_channels(module) or 0 for module in graph.module2node if isinstance(module, CUTTABLE)
    }
    ranks = {module: (is_single(module), width.get(module, 0) * narrow_first) for module in graph.module2node}
    graph.module2node = dict(sorted(graph.module2node.items(), key=lambda item: ranks[item[0]]))


def _watch(model: nn.Module) -> set[str]:
    """Return a set that will hold the paths of the attention modules that have run."""
    called: set[str] = set()
    for path, module in named_layers(model).items():
        if isinstance(module, ATTENTION):
            module.register_forward_pre_hook(lambda *_, path=path: called.add(path))
    return called


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise ConfigurationError(
            "structured pruning finds coupled channels with Torch-Pruning, which is not installed; "
            'run `pip install "lightning-compress[structured]"`'
        ) from error
    return torch_pruning
