"""Which tensors of a layer are its weights, whose they are, and why one is left alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.paths import clean_path

PRUNABLE: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Bilinear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
"""Layer types with weight matrices or kernels; biases, norms and embeddings are not among them."""

_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Target:
    """A weight tensor whose values can be held in place.

    Args:
        layer: Path of the layer.
        name: Name of the parameter in it.
        tied: Other paths of the same parameter.
    """

    layer: str
    name: str
    tied: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Path of the parameter, as in a ``state_dict``."""
        return f"{self.layer}.{self.name}"

    def weight(self, layers: Mapping[str, nn.Module]) -> nn.Parameter:
        """Return the parameter itself."""
        layer = layers[self.layer]
        parameter = dict(layer.named_parameters(recurse=False)).get(self.name)
        if parameter is None:
            how = "is parametrized" if parametrize.is_parametrized(layer, self.name) else "is no parameter"
            raise ConfigurationError(
                f"{self.key!r} {how} now, as another callback left it after this one had chosen it; put that one "
                "before this one, which then leaves the layer alone, or give each layers of its own with `select`"
            )
        return parameter


def weight_names(layer: nn.Module) -> tuple[str, ...]:
    """Return the names of the layer's own weight matrices or kernels, whether or not they are parameters now.

    >>> weight_names(nn.LSTM(2, 3)), weight_names(nn.Linear(2, 3))
    (('weight_ih_l0', 'weight_hh_l0'), ('weight',))
    """
    if isinstance(layer, nn.MultiheadAttention):
        split = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        return ("in_proj_weight",) if layer.in_proj_weight is not None else split
    if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
        own = [name for name, _ in layer.named_parameters(recurse=False)]
        if parametrize.is_parametrized(layer):
            own += [name for name, _ in layer.get_submodule("parametrizations").named_children()]
        return tuple(name for name in own if name.startswith("weight_"))
    return ("weight",)


def find_targets(
    root: nn.Module, layers: Mapping[str, nn.Module], done: str = "pruned"
) -> tuple[list[Target], dict[str, str]]:
    """Return the weight tensors of the selected layers, and why others of theirs are left alone.

    A tensor that is shared with a module outside the selection (an embedding tied to a decoder) is left alone; one
    shared within it is a target once.

    Args:
        root: The whole model, to see what is shared.
        layers: The selected layers by path.
        done: What will be done to them, for the reasons.

    Returns:
        The targets, and a reason by tensor path.

    Raises:
        ConfigurationError: If a selected layer is lazy and has no shape yet.
    """
    selected = {id(layer) for layer in layers.values()}
    owners: dict[int, list[tuple[str, bool]]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            place = clean_path(f"{path}.{name}")
            owners.setdefault(id(parameter), []).append((place, id(module) in selected))
    targets: dict[int, Target] = {}
    left: dict[str, str] = {}
    for path, layer in layers.items():
        own = dict(layer.named_parameters(recurse=False))
        for name in weight_names(layer):
            key, weight = f"{path}.{name}", own.get(name)
            if weight is None:
                left[key] = "kept: not a plain parameter (parametrized or normalised), so its values could not be held"
                continue
            if is_lazy(weight):
                raise ConfigurationError(
                    f"{key!r} has no shape yet (a lazy layer); run one batch through the model first"
                )
            if id(weight) in targets:
                left[key] = f"{done} as {targets[id(weight)].key}, with which it is tied"
                continue
            others = [other for other, _ in owners[id(weight)] if other != key]
            foreign = [other for other, inside in owners[id(weight)] if not inside]
            if foreign:
                left[key] = f"kept: tied with {', '.join(foreign)}, which is not selected"
                continue
            targets[id(weight)] = Target(path, name, tuple(others))
    return list(targets.values()), left


def why_no_numbers(weight: Tensor) -> str:
    """Return why nothing can be computed with a weight as with a real number; empty if it can.

    >>> why_no_numbers(nn.Linear(2, 4, dtype=torch.complex64).weight)
    'kept: its type is complex64, not a real number of 16 bits or more'
    """
    if weight.dtype not in _REAL:
        return f"kept: its type is {str(weight.dtype).removeprefix('torch.')}, not a real number of 16 bits or more"
    return "" if weight.numel() else "kept: it is empty"


def shape_of(weight: Tensor) -> str:
    """Return a shape as text for a plan.

    >>> shape_of(nn.Linear(2, 4).weight)
    '4x2'
    """
    return "x".join(map(str, weight.shape))


def tied_with(targets: Iterable[Target], key: str) -> str:
    """Return ``", tied with ..."`` for a weight that has other paths, else nothing.

    >>> tied_with([Target("decode", "weight", ("embed.weight",))], "decode.weight")
    ', tied with embed.weight'
    """
    names = next((target.tied for target in targets if target.key == key), ())
    return f", tied with {', '.join(names)}" if names else ""
