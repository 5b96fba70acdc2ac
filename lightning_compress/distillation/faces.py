"""A second face of a student: an object of a class of its own that shares everything the student holds.

A wrapper that *contains* a LightningModule has to forward some sixty hooks, ``self.log``, the trainer, optimizers and
every attribute that a callback may look for, and renames all layers. Here the wrapper's class inherits from the
student's and both objects have one ``__dict__``: hooks, names, ``state_dict`` and hyper-parameters are the student's
own because they are the same objects.
"""

from __future__ import annotations

import contextlib
import types
from typing import Any

from torch import nn

from lightning_compress.core.errors import ConfigurationError

_CLASSES: dict[tuple[type, ...], type] = {}


class Fallback:
    """A name that stands for another attribute, where nobody else uses it: not the student, its class or a subclass.

    Args:
        name: The attribute it stands for.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __set_name__(self, owner: type, public: str) -> None:
        self.owner, self.public = owner, public

    def __get__(self, face: Any, cls: type | None = None) -> Any:
        if face is None:
            return self
        held = vars(face)
        if any(self.public in held.get(kind, ()) for kind in ("_modules", "_parameters", "_buffers")):
            raise AttributeError(self.public)  # goes on to the module's own lookup
        with contextlib.suppress(AttributeError):
            return getattr(super(self.owner, face), self.public)
        return getattr(face, self.name)


def joint_class(front: type, *behind: type) -> type:
    """Return the class that inherits from ``front`` and then from the others; the same one each time.

    Raises:
        ConfigurationError: If Python cannot combine them.
    """
    key = (front, *behind)
    if key not in _CLASSES:
        body = {"__module__": front.__module__, "__doc__": front.__doc__}
        name = f"{front.__name__}[{behind[-1].__name__}]"
        try:
            _CLASSES[key] = types.new_class(name, key, {}, lambda namespace: namespace.update(body))
        except TypeError as error:
            raise ConfigurationError(
                f"`student` is a {behind[-1].__name__}, which cannot be combined with {front.__name__} ({error}); use "
                "the Distillation callback instead"
            ) from error
    return _CLASSES[key]


def blank(cls: type) -> Any:
    """Return an object of a class without running its constructor."""
    return object.__new__(cls)


def share(front: Any, behind: nn.Module) -> None:
    """Let two objects hold the same attributes, from now on and for good."""
    object.__setattr__(front, "__dict__", vars(behind))


def lend_defaults(student: nn.Module, donor: nn.Module) -> None:
    """Give a plain module the attributes that ``donor`` has from its constructor and the module lacks."""
    for name, value in vars(donor).items():
        vars(student).setdefault(name, value)


def check_names(student: nn.Module, front: type, allowed: frozenset[str]) -> None:
    """Refuse a plain module whose own methods or attributes would be hidden by those of a training module.

    Raises:
        ConfigurationError: With the first such name.
    """
    public = {name for name in dir(front) if not name.startswith("_")} - set(dir(nn.Module)) - allowed
    own = {name for cls in type(student).__mro__ if cls is not nn.Module and cls is not object for name in vars(cls)}
    clash = sorted(public & (own | set(vars(student)) | {name for name, _ in student.named_children()}))
    if clash:
        raise ConfigurationError(
            f"`student`: {type(student).__name__} has a {clash[0]!r} of its own, which training also uses; put it into "
            "a LightningModule (self.net = student) and give that as the student"
        )
