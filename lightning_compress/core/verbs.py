"""The only code that changes a model's structure: four verbs, a closed registry of kinds, and one function."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from lightning_compress.core.copies import own_class
from lightning_compress.core.errors import CompressionError, ConfigurationError, did_you_mean
from lightning_compress.core.hooks import Undo, append_edit, install_hooks
from lightning_compress.core.journal import Edit
from lightning_compress.core.paths import get_layer, set_layer

Builder = Callable[..., nn.Module]

_KINDS: dict[tuple[str, str], Builder] = {}


def register_kind(verb: str, name: str) -> Callable[[Builder], Builder]:
    """Return a decorator that makes a builder known under ``name``; a saved file can only name what is registered.

    A ``replace`` builder gets the module that stands there now and the edit's config as keywords, and returns the new
    module, or the same one with another class, children or hooks. A ``parametrize`` builder gets the module and the
    config without ``tensor``, and returns the parametrization. Builders must depend on the config and on shapes, dtypes
    and devices only, so that a replay on a bare (even a ``meta``) model gives the same structure.

    Args:
        verb: ``"replace"`` or ``"parametrize"``.
        name: The kind's key; never an import path.

    Raises:
        ConfigurationError: For another verb, or a name that is taken by another builder.
    """
    if verb not in ("replace", "parametrize"):
        raise ConfigurationError(f"`verb` is {verb!r}: kinds belong to 'replace' and 'parametrize' only")

    def add(builder: Builder) -> Builder:
        if _KINDS.setdefault((verb, name), builder) is not builder:
            raise ConfigurationError(f"the {verb} kind {name!r} is registered already; choose another name")
        return builder

    return add


def registered_kinds(verb: str) -> tuple[str, ...]:
    """Return the names registered for ``verb``."""
    return tuple(name for known, name in _KINDS if known == verb)


def apply(root: nn.Module, edit: Edit) -> None:
    """Run one edit on ``root`` and append it to the root's journal.

    Args:
        root: The model whose journal records the edit.
        edit: What to do; ``edit.path`` is relative to ``root``.

    Raises:
        ConfigurationError: If the path or the kind is unknown, or the config does not fit the module there.
            The model is unchanged then.
    """
    layer = get_layer(root, edit.path)
    try:
        undo = _VERBS[edit.verb](root, layer, edit)
    except CompressionError:
        raise
    except Exception as error:
        raise ConfigurationError(
            f"{edit!s} ({type(layer).__name__}) failed: {type(error).__name__}: {error}; config was {dict(edit.config)}"
        ) from error
    install_hooks(root)
    append_edit(root, edit, undo)


def _builder(edit: Edit) -> Builder:
    try:
        return _KINDS[edit.verb, edit.kind]
    except KeyError:
        known = registered_kinds(edit.verb)
        raise ConfigurationError(
            f"unknown {edit.verb} kind {edit.kind!r} at {edit.path!r}: {did_you_mean(edit.kind, known)}; "
            "import the package that registers it before loading"
        ) from None


def _replace(root: nn.Module, layer: nn.Module, edit: Edit) -> Undo:
    put_back = _restorer(layer)
    try:
        new = _builder(edit)(layer, **edit.config)
    except Exception:
        put_back()
        raise
    if new is layer:
        return put_back
    new.train(layer.training)
    return set_layer(root, edit.path, new)


def _restorer(layer: nn.Module) -> Callable[[], None]:
    """Return what undoes any change that a builder makes to the module itself: of class, children, tensors, hooks."""
    kind = type(layer)
    attributes = {name: copy.copy(value) if isinstance(value, dict) else value for name, value in vars(layer).items()}

    def put_back() -> None:
        layer.__class__ = kind
        for name, value in attributes.items():
            if isinstance(value, dict):  # hooks hold on to the mapping itself
                vars(layer)[name].clear()
                vars(layer)[name].update(value)
            else:
                vars(layer)[name] = value
        for name in set(vars(layer)) - set(attributes):
            del vars(layer)[name]

    return put_back


def _parametrize(root: nn.Module, layer: nn.Module, edit: Edit) -> Undo:
    config = dict(edit.config)
    tensor = config.pop("tensor", "weight")
    own_class(layer)
    parametrize.register_parametrization(layer, tensor, _builder(edit)(layer, **config))
    if len(list(layer.get_submodule(f"parametrizations.{tensor}").children())) > 1:
        return None  # removal would drop the earlier parametrizations of this tensor too

    def undo() -> None:
        own_class(layer)
        parametrize.remove_parametrizations(layer, tensor, leave_parametrized=False)

    return undo


def _bake(root: nn.Module, layer: nn.Module, edit: Edit) -> Undo:
    """Merge a parametrization into its tensor, or put what ``layer.to_dense()`` returns in the layer's place."""
    tensor = edit.config.get("tensor")
    if tensor is not None:
        if not parametrize.is_parametrized(layer, tensor):
            raise ConfigurationError(
                f"`tensor` is {tensor!r}: nothing is parametrized under that name at {edit.path!r}"
            )
        own_class(layer)
        parametrize.remove_parametrizations(layer, tensor, leave_parametrized=True)
        return None
    to_dense = getattr(layer, "to_dense", None)
    if to_dense is None:
        raise ConfigurationError(
            f"{type(layer).__name__} at {edit.path!r} has no `to_dense()`, so it cannot be baked; "
            "name a parametrized tensor in `config={'tensor': ...}` instead"
        )
    return set_layer(root, edit.path, to_dense())


def _slice(root: nn.Module, layer: nn.Module, edit: Edit) -> Undo:
    """Keep the given indices of each named tensor, and set the integer attributes that describe its size."""
    tensors: Mapping[str, Mapping[str, Any]] = edit.config.get("tensors", {})
    attributes: Mapping[str, Any] = edit.config.get("attributes", {})
    own = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_buffers(recurse=False))}
    for name in tensors:
        if name not in own:
            raise ConfigurationError(f"no tensor {name!r} at {edit.path!r}; {did_you_mean(name, own)}")
    for name, value in attributes.items():
        now = getattr(layer, name, None)
        if type(now) is not int or type(value) is not int:
            raise ConfigurationError(
                f"`attributes` may set integer attributes only: {name!r} of {type(layer).__name__} at {edit.path!r} "
                f"is {now!r} and would become {value!r}"
            )
    kept = {name: _kept(own[name], name, dims) for name, dims in tensors.items()}
    before = {**{name: own[name] for name in tensors}, **{name: getattr(layer, name) for name in attributes}}
    for name, value in kept.items():
        if isinstance(own[name], nn.Parameter):
            kept[name] = nn.Parameter(value, requires_grad=own[name].requires_grad)
    _set_all(layer, {**kept, **attributes})
    return lambda: _set_all(layer, before)


def _set_all(layer: nn.Module, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(layer, name, value)


def _kept(tensor: torch.Tensor, name: str, dims: Mapping[str, Any]) -> torch.Tensor:
    value = tensor.detach()
    for dim, ranges in dims.items():
        size = value.shape[int(dim)]
        pairs = [(item, item) if isinstance(item, int) else tuple(item) for item in ranges]
        ordered = all(0 <= first <= last < size for first, last in pairs) and all(
            before[1] < after[0] for before, after in itertools.pairwise(pairs)
        )
        if not pairs or not ordered:
            raise ConfigurationError(
                f"slice of {name!r}: the kept indices along dimension {dim} must rise and lie in 0..{size - 1}, "
                f"got {str(ranges)[:80]}"
            )
        index = expand_ranges(ranges)
        value = value.index_select(int(dim), torch.tensor(index, device=value.device))
    return value.clone(memory_format=layout_of(tensor))


def layout_of(tensor: torch.Tensor) -> torch.memory_format:
    """Return the memory layout of a tensor, which picking indices would lose: channels last, or plain."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = layouts.get(tensor.dim())
    if last is not None and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous():
        return last
    return torch.contiguous_format


def compact_ranges(indices: Sequence[int]) -> list[int | list[int]]:
    """Return kept indices with each run of neighbours as ``[first, last]``, which keeps a journal short.

    >>> compact_ranges([0, 1, 2, 5, 7, 8])
    [[0, 2], 5, [7, 8]]
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return [first if first == last else [first, last] for first, last in runs]


def expand_ranges(ranges: Sequence[int | Sequence[int]]) -> list[int]:
    """Undo :func:`compact_ranges`.

    >>> expand_ranges([[0, 2], 5])
    [0, 1, 2, 5]
    """
    indices: list[int] = []
    for item in ranges:
        indices.extend([item] if isinstance(item, int) else range(item[0], item[1] + 1))
    return indices


_VERBS: dict[str, Callable[[nn.Module, nn.Module, Edit], Undo]] = {
    "replace": _replace,
    "parametrize": _parametrize,
    "bake": _bake,
    "slice": _slice,
}
