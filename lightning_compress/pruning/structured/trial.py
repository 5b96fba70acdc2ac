"""Try cuts on a copy with random weights: the sliced copy must compute what the copy with zeroed channels does."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_compress.core.companions import companions_of
from lightning_compress.core.copies import full_copy, tensors_in
from lightning_compress.core.isolation import call, device_of, map_tensors, same_randomness
from lightning_compress.core.paths import named_layers
from lightning_compress.core.verbs import apply
from lightning_compress.pruning.structured.groups import ChannelGroup, Zeroing, parameter_in, slice_edits

_DOUBLE_UP_TO = 30_000_000
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4}


def try_cuts(model: nn.Module, groups: Sequence[ChannelGroup], example_inputs: object) -> dict[str, str]:
    """Return the groups that cannot be cut, with the reason: found by halving, so that few runs are needed.

    Args:
        model: The model; only copies of it are run.
        groups: What to try.
        example_inputs: One batch.

    Returns:
        ``name of a group -> reason``; empty if all can be cut together.
    """
    if not groups:
        return {}
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"), torch.no_grad():
        warnings.simplefilter("ignore")
        trial = _Trial(model, example_inputs)
        failed = _halve(trial, groups)
        rest = [group for group in groups if group.name not in failed]
        problem = trial.run(rest) if failed and rest else ""
        return failed | ({group.name: f"with other groups, {problem}" for group in rest} if problem else {})


def _halve(trial: _Trial, groups: Sequence[ChannelGroup]) -> dict[str, str]:
    problem = trial.run(groups)
    if not problem:
        return {}
    if len(groups) == 1:
        return {groups[0].name: problem}
    middle = len(groups) // 2
    return _halve(trial, groups[:middle]) | _halve(trial, groups[middle:])


class _Trial:
    """A copy of the model with weights at which every channel matters, and what it does with them."""

    def __init__(self, model: nn.Module, example_inputs: object) -> None:
        device = device_of(model)
        inputs = map_tensors(lambda tensor: tensor.detach().to(device, copy=True), example_inputs)
        attempts = [(True, True), (True, False), (False, False)]
        if sum(parameter.numel() for parameter in model.parameters()) > _DOUBLE_UP_TO:
            attempts = attempts[1:]
        for shake, double in attempts:
            self._start, self._inputs = full_copy(model).eval(), inputs
            self._dtype = torch.float64 if double else torch.float32
            if shake:
                _shake(self._start)
                self._inputs = map_tensors(partial(_noisy, torch.Generator().manual_seed(1)), inputs)
            if double:
                self._start = self._start.double()
                self._inputs = map_tensors(lambda t: t.double() if t.is_floating_point() else t, self._inputs)
            outputs = self._outputs(self._start)
            if isinstance(outputs, list) and all(bool(torch.isfinite(output).all()) for output in outputs):
                break
        self._trains = not isinstance(self._outputs(full_copy(self._start).train()), str)

    def run(self, groups: Sequence[ChannelGroup]) -> str:
        """Return what goes wrong when a third to two thirds of the channels of each group are cut, or an empty text.

        Groups of one width lose different numbers: they may meet where the tracer does not look, in a sum nobody reads.
        """
        cuts = {}
        for index, group in enumerate(groups):
            order = torch.randperm(group.channels, generator=torch.Generator().manual_seed(index))
            least, most = max(1, group.channels // 3), max(1, 2 * group.channels // 3)
            cuts[group.name] = sorted(order[: least + index % (most - least + 1)].tolist())
        copied = full_copy(self._start)
        Zeroing(groups, cuts)(parameter_in({"": copied, **named_layers(copied)}))
        masked = self._outputs(copied)
        try:
            for edit in slice_edits(groups, cuts):
                apply(copied, edit)
        except Exception as error:
            return f"its slices do not fit ({error})"
        sliced = self._outputs(copied)
        if isinstance(sliced, str) or isinstance(masked, str):
            return f"the model does not run without some of its channels ({sliced})"
        if [output.shape for output in sliced] != [output.shape for output in masked]:
            return "its outputs are the model's outputs"
        if not all(self._close(one, other) for one, other in zip(sliced, masked, strict=True)):
            return "cutting it would change other channels (they are padded, shifted, split or normalized together)"
        trained = self._outputs(copied.train()) if self._trains else ""
        if self._trains and isinstance(trained, str):
            return f"a part that runs in training mode only reads it ({trained})"
        return ""

    def _close(self, one: Tensor, other: Tensor) -> bool:
        if not one.is_floating_point():
            return torch.equal(one, other)
        scale = float(other.abs().max()) if other.numel() else 0.0
        return bool(((one - other).abs() <= _TOLERANCE[self._dtype] * scale).all())

    def _outputs(self, model: nn.Module) -> list[Tensor] | str:
        """Return the tensors that a model computes, or what it raises."""
        with same_randomness():
            torch.manual_seed(0)
            try:
                return list(tensors_in(call(model, self._inputs)))
            except Exception as error:  # the model's own code runs here
                return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def _shake(model: nn.Module) -> None:
    """Give a copy random weights and statistics, so that no channel is silent and none is a copy of another."""
    generator = torch.Generator().manual_seed(0)
    beside = [part.get_submodule(each.path) for part in model.modules() for each in companions_of(part)]
    kept = {id(parameter) for module in beside for parameter in module.parameters()}  # random ranges would hide weights
    for parameter in model.parameters():
        if id(parameter) not in kept and parameter.is_floating_point():
            if parameter.dim() > 1:
                drawn = torch.randn(parameter.shape, generator=generator)
                drawn *= (2 * parameter.shape[0] / max(1, parameter.numel())) ** 0.5
            else:
                drawn = 0.5 + torch.rand(parameter.shape, generator=generator)
            parameter.copy_(drawn)
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in ("running_mean", "running_var"):
            buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))


def _noisy(generator: torch.Generator, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor + torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)
