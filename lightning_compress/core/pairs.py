"""Which methods cannot be used together, and in which order they stand: for a Trainer and for ``compress`` alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from lightning_compress.core.chain import check_chain
from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.method import Method, overrides


def check_pairs(method: Method, beside: Sequence[object], argument: str) -> None:
    """Refuse a method beside, before or behind others that it cannot be used with.

    Args:
        method: One of ``beside``. While :func:`~lightning_compress.compress` is given it, nothing trains it.
        beside: All methods, and other callbacks of a Trainer, in their order.
        argument: What holds them, for the error: ``"callbacks"`` of a Trainer or ``"methods"`` of ``compress``.

    Raises:
        ConfigurationError: For the first other one that conflicts, or stands on the wrong side; names both.

    >>> from lightning_compress import IterativePruning
    >>> check_pairs(method := IterativePruning(0.5), [method], "methods")
    """
    in_fit = argument == "callbacks"
    check_chain(beside, argument)
    mine = next(position for position, other in enumerate(beside) if other is method)
    _check_last(method, beside[mine + 1 :], argument, in_fit)
    if in_fit:
        _check_after_fit(method, beside[:mine])
    conflicts = method.conflicts_with + (method.conflicts_after_fit if in_fit else ())
    for position, other in enumerate(beside):
        if other is method:
            continue
        if isinstance(other, conflicts):
            raise ConfigurationError(
                f"{method.state_key} and {type(other).__name__} change the same weights; remove one of them"
            )
        wrong = (isinstance(other, method.runs_after) and position > mine) or (
            isinstance(other, method.runs_before) and position < mine
        )
        if wrong:
            first, second = (other, method) if position > mine else (method, other)
            raise ConfigurationError(
                f"`{argument}` has {type(method).__name__} and {type(other).__name__} in the wrong order: put "
                f"{type(first).__name__} before {type(second).__name__}"
            )


def check_layers(
    method: Method, beside: Sequence[object], selected: Callable[[Method], Collection[str]] | None = None
) -> None:
    """Refuse a method that holds values in a layer in which another one holds others.

    Args:
        method: One of ``beside``.
        beside: All methods, and other callbacks of a Trainer.
        selected: Returns the paths of a method's layers; by default those it has been given.

    Raises:
        ConfigurationError: For the first such other one; names the layers.
    """
    for other in beside:
        if other is method or not isinstance(other, method.conflicts_on_layers) or not isinstance(other, Method):
            continue
        own, others = (each.selected if selected is None else selected(each) for each in (method, other))
        both = [path for path in own if path and path in others]
        if both:
            raise ConfigurationError(
                f"{type(method).__name__} and {type(other).__name__} would both hold the weights of "
                f"{', '.join(map(repr, both[:3]))}{' ...' if len(both) > 3 else ''} at values of their own; give each "
                "layers of its own with `select`, or remove one of them"
            )


def check_places(method: Method, beside: Sequence[object], layers: Mapping[str, Any]) -> None:
    """Refuse a method whose layers a later one has replaced before training, or will make anew after it.

    Args:
        method: One of ``beside``.
        beside: All callbacks of a Trainer, in their order.
        layers: Those of the method by path, as all callbacks have left them.

    Raises:
        ConfigurationError: For the first such other one; names the layers.
    """
    mine = next(position for position, other in enumerate(beside) if other is method)
    holds = overrides(method, "enforce") and not overrides(method, "finalize")
    for position, other in enumerate(beside):
        if other is method or not isinstance(other, Method):
            continue
        both = [path for path in layers if path and path in other.selected]
        here, there = type(method).__name__, type(other).__name__
        named = f"{', '.join(map(repr, both[:3]))}{' ...' if len(both) > 3 else ''}"
        replaced = [path for path in both if method.supported and not isinstance(layers[path], method.supported)]
        if replaced and position > mine and overrides(other, "prepare"):
            raise ConfigurationError(
                f"`callbacks` has {there} after {here}, and replaces {', '.join(map(repr, replaced[:3]))}, which "
                f"{here} had chosen; put {there} before {here}"
            )
        if both and holds and other.remakes_after_fit:
            raise ConfigurationError(
                f"{there} makes new weights of {named} after fit, so that what {here} holds in them while they train "
                f"would be lost; give {there} a fit of its own, before, or each layers of its own with `select`"
            )


def _check_last(method: Method, later: Sequence[object], argument: str, in_fit: bool) -> None:
    """Refuse a method behind one whose result it could not edit; in a fit, one that works before its end can."""
    for other in later if method.comes_last else ():
        if isinstance(other, Method) and (not in_fit or overrides(other, "finalize")):
            raise ConfigurationError(
                f"`{argument}` has {type(other).__name__} behind {type(method).__name__}, which leaves nothing to it; "
                f"put {type(method).__name__} last"
            )


def _check_after_fit(method: Method, earlier: Sequence[object]) -> None:
    """Refuse a method that would prune, after a fit, layers that another one has replaced by then."""
    for other in earlier if method.prunes_after_fit else ():
        if isinstance(other, Method) and other.replaces_after_fit:
            here, there = type(method).__name__, type(other).__name__
            raise ConfigurationError(
                f"`callbacks` has {here} behind {there}, which replaces or quantizes layers after fit that {here} "
                f"found before it; put {here} before {there}, or compress one after the other without a Trainer"
            )
