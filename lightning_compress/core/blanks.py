"""The blanks of a compression method: what a subclass fills in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from lightning_compress.core.journal import Edit
from lightning_compress.core.plan import PlanRow
from lightning_compress.core.run import Layers
from lightning_compress.core.select import Select, Selection


class Blanks(ABC):
    """What a method does where; every blank but ``update`` does nothing unless it is filled in.

    Most of them get the selected layers by path, resolved anew each time.
    """

    supported: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Layer types the method can work on."""
    needs_training: ClassVar[str] = ""
    """Why the method is no way to compress a trained model at once; empty if it is one."""
    link: ClassVar[str] = ""
    """Where the method stands in :data:`~lightning_compress.core.chain.CHAIN`; empty if it may stand anywhere."""

    runs_after: ClassVar[tuple[type[Any], ...]] = ()
    """Callbacks that must stand before this one in the Trainer's list, and methods in that of ``compress``."""
    runs_before: ClassVar[tuple[type[Any], ...]] = ()
    """Callbacks that must stand after this one."""
    conflicts_with: ClassVar[tuple[type[Any], ...]] = ()
    """Callbacks that cannot be used together with this one."""
    conflicts_after_fit: ClassVar[tuple[type[Any], ...]] = ()
    """Callbacks that cannot edit the model after the same fit; ``compress`` can use one after the other."""
    conflicts_on_layers: ClassVar[tuple[type[Any], ...]] = ()
    """Callbacks that cannot be used on the same layers as this one."""
    comes_last: ClassVar[bool] = False
    """Whether no other method can edit what this one leaves."""
    prunes_after_fit: ClassVar[bool] = False
    """Whether :meth:`finalize` prunes, cuts or bakes layers, which must still be those that were trained."""
    replaces_after_fit: bool = False
    """Whether :meth:`finalize` puts other layers in the place of those that were trained, or quantizes them."""
    remakes_after_fit: bool = False
    """Whether :meth:`finalize` makes new weights of all that a layer has, so that zeros and shared values are lost."""

    needs_example: ClassVar[bool] = True
    """Whether :meth:`examine` cannot do without one batch; else it may get ``None``."""

    select: Select

    def choose(self, root: nn.Module) -> Selection:
        """Return the layers to work on; by default what ``select`` means among the supported types."""
        return self.select.resolve(root, self.supported)

    def prepare(self, layers: Layers) -> Iterable[Edit]:
        """Return the edits to make before optimizers exist; none for layers that have them already."""
        return ()

    def examine(self, root: nn.Module, example_inputs: Any) -> Selection:
        """Look at the whole model with one batch, and return the layers to work on; after ``prepare``, before training.

        For methods that must run the model to know it. ``example_inputs`` are those of ``compress``, the module's
        ``example_input_array``, or the first samples of the training data.
        """
        return self.choose(root)

    def anticipate(self, layers: Layers) -> None:
        """Get ready to look at the inputs of a training batch after which :meth:`update` will be called."""

    def release(self) -> None:
        """Let go of what hangs on the model (hooks); called when a fit ends, also by an error."""

    def observe(self, layers: Layers) -> None:
        """Look at gradients, unscaled but not clipped, right before an optimizer step."""

    def before_step(self, layers: Layers, optimizer: Optimizer, scale: float) -> None:
        """Change gradients, not clipped yet, of the layers that ``optimizer`` trains, right before it steps.

        ``scale`` is what they are multiplied with: 1, unless a fused optimizer unscales them itself.
        """

    def after_step(self, layers: Layers, optimizer: Optimizer) -> None:
        """Change values as a part of every optimizer step; called under ``no_grad``, before :meth:`enforce`."""

    @abstractmethod
    def update(self, layers: Layers, amount: float) -> None:
        """Change values to the given amount; called under ``no_grad`` after an optimizer step, when due."""

    def enforce(self, layers: Layers) -> None:
        """Re-impose what holds between updates (zeros); called under ``no_grad`` after every optimizer step."""

    def pending(self, layers: Layers) -> bool:
        """Return whether a layer that could not be changed at the last update (it was frozen) can be changed now."""
        return False

    def enforce_state(self, state_dict: dict[str, Any]) -> None:
        """Re-impose the same on a ``state_dict`` that is about to be saved, which may hold averaged weights."""

    def finalize(self, layers: Layers) -> Iterable[Edit]:
        """Return the edits to make after fit, on a copy of the module; may look at values."""
        return ()

    def metrics(self, layers: Layers) -> Mapping[str, float]:
        """Return what to log as ``compress/<name>``; computed after each update."""
        return {}

    def values(self) -> dict[str, Any]:
        """Return the method's own state for a checkpoint: tensors and builtins only."""
        return {}

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Take back what :meth:`values` returned."""

    def attach_values(self, layers: Layers) -> None:
        """Fit the loaded values to the model, before training starts; raise if they do not fit."""

    def reset_values(self) -> None:
        """Forget the method's own state; called when the callback meets another model."""

    def plan(self, layers: Layers) -> list[PlanRow]:
        """Return what will happen to each layer. Raises for settings that do not fit the model."""
        return [PlanRow("select", path, type(layer).__name__, "compress") for path, layer in layers.items()]
