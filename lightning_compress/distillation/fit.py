"""What a running fit must be told about parameters that are not the student's: examples, optimizers, processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.examples import example_from, own_example
from lightning_compress.core.isolation import same_randomness
from lightning_compress.distillation.answers import broken_rows
from lightning_compress.distillation.losses.numeric import mean_or_zero


def example_of(module: nn.Module, called: nn.Module, loaders: Sequence[Callable[[], Any]]) -> Any:
    """Return inputs to run the student with: its ``example_input_array``, or samples of its training data.

    Args:
        module: The student.
        called: It, or the part of it that is run.
        loaders: Each makes the training loader, or raises where there is none; tried in order.

    Raises:
        ConfigurationError: If there are none.
    """
    own = own_example(module)
    if own is not None:
        return own
    for make in loaders:
        with same_randomness():
            return example_from(called, make())
    raise ConfigurationError(
        "`example_input_array` is None, and the shapes of layers must be known before training: a loader that is "
        "passed to `fit` cannot be looked at so early. Set `module.example_input_array = batch[0]`, or give the data "
        "as a LightningDataModule"
    )


def join_optimizer(optimizers: Sequence[Optimizer], parameters: Iterable[nn.Parameter]) -> None:
    """Let the first optimizer train what is learnt beside the student, in its first group, with that one's settings.

    Called after optimizers exist and before their state is restored; parameters they have already are left alone.

    Raises:
        ConfigurationError: If there is something to train and no optimizer.
    """
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [parameter for parameter in parameters if id(parameter) not in held]
    if missing and not optimizers:
        raise ConfigurationError(
            "`losses` need adapters to be trained, but `configure_optimizers` of the student returns no optimizer"
        )
    if missing:
        optimizers[0].param_groups[0]["params"].extend(missing)


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """Return the type of the first floating-point parameter."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), None)


def world_size() -> int:
    """Return the number of processes that train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def share_values(modules: Mapping[str, nn.Module]) -> None:
    """Give every process the values that the first one has; the student's own are shared by the strategy."""
    if world_size() > 1:
        for module in modules.values():
            for tensor in (*module.parameters(), *module.buffers()):
                distributed.broadcast(tensor.detach(), src=0)


def reduce_gradients(optimizer: Optimizer, learnt: Callable[[], Sequence[nn.Parameter]]) -> None:
    """Average the gradients of what is learnt beside the student over processes, right before its optimizer steps."""
    parameters = learnt() if world_size() > 1 else ()
    if not parameters:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for parameter in parameters:
        if id(parameter) in held:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            distributed.all_reduce(gradient)
            parameter.grad = gradient.div_(world_size())


def load_learnt(modules: Mapping[str, nn.Module], state: Mapping[str, Any]) -> None:
    """Load what was learnt beside the student, from the state of a checkpoint.

    Raises:
        ConfigurationError: For a state of another version, or of other losses or layers.
    """
    if state.get("version") != 1:
        raise ConfigurationError(
            f"the checkpoint's distillation state has version {state.get('version')!r}, this release reads version 1; "
            "install the lightning-compress that wrote it"
        )
    learnt = state["learnt"]
    if modules.keys() != learnt.keys():
        raise ConfigurationError(
            f"the checkpoint was written with {', '.join(learnt) or 'no adapters'}, this run has "
            f"{', '.join(modules) or 'none'}; resume with the `losses` it was written with"
        )
    for name, module in modules.items():
        try:
            module.load_state_dict(learnt[name])
        except RuntimeError as error:
            raise ConfigurationError(f"`losses`: {name} does not fit the checkpoint: {error}") from error


def lacking(name: str) -> str:
    """Return the message for a checkpoint without the state of distillation."""
    return (
        f"the checkpoint was written without distillation by {name} and lacks its position and adapters; load its "
        "weights into the student first, and start a new fit"
    )


def comparison(output: Tensor, teacher: Tensor, target: Tensor | None, class_dim: int = 1) -> dict[str, Tensor]:
    """Return how student and teacher compare on one batch, and how good the teacher is.

    Args:
        output: The student's, (batch, classes, ...) or values.
        teacher: The teacher's, of the same shape.
        target: Labels (batch, ...) or values.
        class_dim: Where the classes lie: 1, or -1 for tokens.

    Returns:
        ``agreement`` (share of equal classes; a row that is not finite never agrees) for scores over classes, else
        ``distance`` (mean squared difference);
        where the target allows it the teacher's ``accuracy`` or ``mse``. Both shares leave out positions whose label
        is no class (255, -100).

    >>> scores = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    >>> comparison(scores, scores.flip(0), torch.tensor([0, 1]))
    {'agreement': tensor(0.), 'accuracy': tensor(0.)}
    """
    if output.shape != teacher.shape:
        return {}
    scores = output.dim() >= 2 and -output.dim() <= class_dim < output.dim()
    ours, theirs = (side.movedim(class_dim, 1) if scores else side for side in (output, teacher))
    labels = target is not None and not target.is_floating_point() and target.shape == _without_classes(ours)
    if scores and ours.shape[1] > 1 and (labels or target is None):
        chosen = theirs.argmax(1)
        label = chosen if target is None else target.to(chosen.device)
        counts = (label >= 0) & (label < ours.shape[1])
        equal = (ours.argmax(1) == chosen) & ~(broken_rows(ours) | broken_rows(theirs))
        found = {"agreement": mean_or_zero(equal.float(), counts)}
        return found if target is None else {**found, "accuracy": mean_or_zero((chosen == label).float(), counts)}
    found = {"distance": (output.float() - teacher.float()).square().mean()}
    if target is not None and target.shape == teacher.shape:
        found["mse"] = (teacher.float() - target.to(teacher.device).float()).square().mean()
    return found


def _without_classes(output: Tensor) -> torch.Size:
    return torch.Size([*output.shape[:1], *output.shape[2:]])
