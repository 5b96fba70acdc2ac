"""Taps: what named layers return while a model runs, without touching the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_compress.core.copies import tensors_in
from lightning_compress.core.errors import ConfigurationError, did_you_mean
from lightning_compress.core.isolation import map_tensors
from lightning_compress.core.paths import clean_path

MAIN_KEYS = ("logits", "out", "output", "last_hidden_state")
"""Keys (or attributes) under which a model's output is looked for when it returns a mapping or an object."""


@dataclass(frozen=True)
class Call:
    """One call of a tapped module.

    Args:
        args: Its positional inputs.
        kwargs: Its keyword inputs.
        output: What it returned.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Any


Keep = Callable[[Tensor, str], Tensor]
"""Makes of a tensor in the output of the layer at a path what is recorded."""

Record = dict[str, list[Call]]
"""The calls of each tapped module, by path, in order."""


def split_spec(spec: str) -> tuple[str, str]:
    """Split ``"path:key"`` into the path of a layer and the key of one of its outputs.

    >>> split_spec("encoder.lstm:1.0"), split_spec("layer1")
    (('encoder.lstm', '1.0'), ('layer1', ''))
    """
    path, _, key = spec.partition(":")
    return path, key


def pick(value: Any, key: str = "", where: str = "output") -> Tensor:
    """Return the tensor that an output means.

    Without ``key``: a tensor itself; ``logits``, ``out``, ``output`` or ``last_hidden_state`` of a mapping or object;
    else the first tensor inside. With ``key``: what lies at that dotted place.

    Args:
        value: What a module returned.
        key: ``"hidden"``, ``"1"``, ``"1.0"`` and so on.
        where: Which layer it is, for the error.

    Raises:
        ConfigurationError: If there is no tensor there.

    >>> pick((torch.ones(2), (torch.zeros(3), torch.zeros(4))), "1.0")
    tensor([0., 0., 0.])
    >>> pick({"loss": torch.tensor(1.0), "logits": torch.ones(2)})
    tensor([1., 1.])
    """
    found = value
    for part in key.split(".") if key else ():
        found = _item(found, part, key, where)
    if isinstance(found, Tensor):
        return found
    for name in MAIN_KEYS:
        inner = found.get(name) if isinstance(found, Mapping) else getattr(found, name, None)
        if isinstance(inner, Tensor):
            return inner
    first = next(tensors_in(found), None)
    if first is None:
        raise ConfigurationError(
            f"{where} returned a {type(found).__name__} without a tensor in it; name the part with a colon, as in "
            "'encoder:hidden' or 'lstm:0'"
        )
    return first


def _item(value: Any, part: str, key: str, where: str) -> Any:
    options: Iterable[str] = ()
    if isinstance(value, Mapping):
        if part in value:
            return value[part]
        options = map(str, value)
    elif isinstance(value, tuple | list):
        if part.isdecimal() and int(part) < len(value):
            return value[int(part)]
        options = map(str, range(len(value)))
    elif hasattr(value, part):
        return getattr(value, part)
    raise ConfigurationError(f"{where} has no output {part!r} (from ':{key}'); {did_you_mean(part, options)}")


def defines_forward(module: nn.Module) -> bool:
    """Tell whether calling ``module`` itself does something: not for one whose work is all in ``training_step``.

    >>> defines_forward(nn.Linear(1, 1)), defines_forward(nn.Module())
    (True, False)
    """
    classes = iter(type(module).__mro__)
    for cls in classes:
        forward = vars(cls).get("forward")
        if getattr(forward, "__qualname__", "") == "LightningModule.forward":
            while cls.__name__ != "LightningModule":  # it calls what stands behind that class
                cls = next(classes)
        elif forward is not None:
            return forward is not nn.Module.forward
    return False


class Taps:
    """Records what layers return, by forward hooks that exist only while watching.

    It holds paths, not modules, so it copies and pickles at any time.

    Args:
        paths: Layers by clean path; ``""`` is the root itself.
        inputs_of: The layers whose inputs are recorded too.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    >>> taps = Taps(["0"])
    >>> with taps.watch(net) as seen:
    ...     _ = net(torch.zeros(4, 2))
    >>> seen["0"][0].output.shape
    torch.Size([4, 3])
    """

    def __init__(self, paths: Iterable[str], inputs_of: Iterable[str] = ()) -> None:
        self.paths = tuple(dict.fromkeys(paths))
        self.inputs_of = frozenset(inputs_of)
        self._found: tuple[weakref.ref[nn.Module], dict[str, nn.Module]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the modules of the last model."""
        return {**self.__dict__, "_found": None}

    @contextmanager
    def watch(self, root: nn.Module, with_graph: bool = False, keep: Keep | None = None) -> Iterator[Record]:
        """Record calls inside the block.

        Args:
            root: The model.
            with_graph: Leave out calls under ``no_grad``, which no gradient can reach.
            keep: Called with each tensor of an output and the layer's path; what it returns is recorded. By default
                outputs of layers whose inputs are recorded are kept as they are, and the others are copied, as a later
                in-place operation (``ReLU(inplace=True)``) would change what was seen.
        """
        record: Record = {path: [] for path in self.paths}
        with ExitStack() as stack:
            for path, module in self._modules(root).items():
                for handle in self._tap(module, path, record, with_graph, keep or self._copy):
                    stack.callback(handle.remove)
            yield record

    def forget(self) -> None:
        """Look the layers up again next time; called when the structure of the model may have changed."""
        self._found = None

    def _copy(self, tensor: Tensor, path: str) -> Tensor:
        return tensor if path in self.inputs_of else tensor.clone()

    def _tap(self, module: nn.Module, path: str, record: Record, with_graph: bool, keep: Keep) -> Iterator[Any]:
        """Hook into one module and yield the handles.

        Strategies of several processes call ``training_step`` through the root's own call: a call with another one of
        the same module inside is not a run of the model.
        """
        whole = path in self.inputs_of
        inner: list[bool] = []  # for each call that is going on, whether another one ran inside

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            inner.append(False)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if path == "":
                around = inner.pop() if inner else False
                inner[:] = [True] * len(inner)
                if around:
                    return
            if not with_graph or torch.is_grad_enabled():
                kept = map_tensors(lambda tensor: keep(tensor, path), output)
                record[path].append(Call(args if whole else (), kwargs if whole else {}, kept))

        if path == "":
            yield module.register_forward_pre_hook(before)
        yield module.register_forward_hook(after, with_kwargs=True)

    def _modules(self, root: nn.Module) -> dict[str, nn.Module]:
        if self._found is None or self._found[0]() is not root:
            self._found = (weakref.ref(root), {path: tap_point(root, path) for path in self.paths})
        return self._found[1]


def tap_point(root: nn.Module, path: str) -> nn.Module:
    """Return the module to hook for a clean path: the outermost there, so that a compiled one is hooked from outside.

    Raises:
        ConfigurationError: If there is none; names the nearest paths.
    """
    known = {}
    for real, module in root.named_modules(remove_duplicate=False):
        if clean_path(real) == path:
            return module
        known[clean_path(real)] = module
    raise ConfigurationError(f"no layer {path!r} in {type(root).__name__}; {did_you_mean(path, known)}")
