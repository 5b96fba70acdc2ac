"""The journal inside the ``state_dict``: written, replayed, taken back."""

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from lightning_compress import QuantizationAwareTraining
from lightning_compress.core.errors import JournalMismatchError
from lightning_compress.core.hooks import JOURNAL_KEY, forget_undo, install_hooks, journal_of, keep_undo
from lightning_compress.core.journal import Edit
from lightning_compress.core.verbs import apply, compact_ranges, register_kind


class Thin(nn.Module):
    def __init__(self, inputs: int, rank: int, outputs: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(inputs, rank), nn.Linear(rank, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


class Twice(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


@register_kind("replace", "hooks-test-thin")
def build_thin(layer: nn.Module, rank: int) -> nn.Module:
    return Thin(layer.in_features, rank, layer.out_features)


@register_kind("parametrize", "hooks-test-twice")
def build_twice(layer: nn.Module) -> nn.Module:
    return Twice()


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))


def cut(first: int, keep: list[int]) -> list[Edit]:
    """Remove units between the linear layers ``first`` and ``first + 2``."""
    kept, n = compact_ranges(keep), len(keep)
    tensors = {"weight": {"0": kept}, "bias": {"0": kept}}
    return [
        Edit("slice", str(first), config={"tensors": tensors, "attributes": {"out_features": n}}),
        Edit("slice", str(first + 2), config={"tensors": {"weight": {"1": kept}}, "attributes": {"in_features": n}}),
    ]


def edited() -> nn.Sequential:
    net = mlp()
    for edit in (*cut(0, [1, 2, 6]), Edit("replace", "2", "hooks-test-thin", {"rank": 2})):
        apply(net, edit)
    apply(net, Edit("parametrize", "4", "hooks-test-twice", {"tensor": "weight"}))
    return net


def bare(seed: int = 1) -> nn.Sequential:
    net = mlp(seed)
    install_hooks(net)
    return net


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def equal(a: nn.Module, b: nn.Module) -> bool:
    return torch.equal(a(X), b(X)) and journal_of(a) == journal_of(b)


def test_without_edits_the_keys_are_untouched() -> None:
    net = bare()
    keys = list(mlp().state_dict())
    assert list(net.state_dict()) == keys
    install_hooks(net)
    install_hooks(net)
    net.load_state_dict(mlp(5).state_dict())
    assert list(net.state_dict()) == keys


def test_hooks_install_once() -> None:
    net = edited()
    install_hooks(net)
    state = net.state_dict()
    assert [key for key in state if JOURNAL_KEY in key] == [JOURNAL_KEY]
    other = bare()
    install_hooks(other)
    other.load_state_dict(state)
    assert equal(net, other)


@pytest.mark.parametrize("assign", [False, True])
def test_a_bare_model_replays_on_load_and_again(assign: bool) -> None:
    source, target = edited(), bare()
    state = source.state_dict()
    for _ in range(2):
        target.load_state_dict(state, assign=assign)
        assert equal(source, target)
    assert JOURNAL_KEY in state


def test_under_a_prefix_where_only_the_part_was_edited() -> None:
    source = nn.ModuleDict({"net": edited(), "head": nn.Linear(2, 2)})
    target = nn.ModuleDict({"net": mlp(3), "head": nn.Linear(2, 2)})
    install_hooks(target)
    target.load_state_dict(source.state_dict())
    assert equal(source["net"], target["net"])
    assert journal_of(target).edits[0].path == "net.0"


def test_a_part_without_hooks_of_its_own_or_a_missing_part() -> None:
    source = nn.ModuleDict({"net": edited()})
    target = nn.ModuleDict({"other": mlp(3)})
    install_hooks(target)
    with pytest.raises(JournalMismatchError, match="edits for 'net', which ModuleDict does not have"):
        target.load_state_dict(source.state_dict())


def test_edits_of_a_part_and_later_of_the_whole_replay_in_that_order() -> None:
    part = mlp()
    for edit in cut(0, [1, 2]):
        apply(part, edit)
    source = nn.Sequential(part)
    apply(source, Edit("replace", "0.2", "hooks-test-thin", {"rank": 1}))  # its shape depends on the cut
    assert [edit.path for edit in journal_of(source)] == ["0.0", "0.2", "0.2"]
    target = nn.Sequential(mlp(1))
    install_hooks(target)
    target.load_state_dict(source.state_dict())
    assert equal(source, target)
    replayed = nn.Sequential(mlp(1))
    for edit in journal_of(source):
        apply(replayed, edit)
    assert set(replayed.state_dict()) == {key for key in source.state_dict() if key != "0." + JOURNAL_KEY}


def test_under_an_averaged_model_and_its_own_checkpoint() -> None:
    source = edited()
    averaged = AveragedModel(source)
    averaged.update_parameters(source)
    fresh = AveragedModel(bare())
    fresh.load_state_dict(averaged.state_dict())
    assert equal(source, fresh.module)


def through_pickle(net: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)  # a whole module, written two lines above


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copies_keep_journal_and_hooks(copied: Any) -> None:
    target = copied(bare())
    target.load_state_dict(edited().state_dict())
    assert equal(edited(), target)
    net = mlp()
    for edit in cut(0, [0, 3]):
        apply(net, edit)
    twin = copied(net)
    apply(twin, cut(2, [0, 5])[0])
    assert (len(journal_of(net)), len(journal_of(twin))) == (2, 3)
    assert len(twin.state_dict()[JOURNAL_KEY]) > len(net.state_dict()[JOURNAL_KEY])


def test_compiled_roots() -> None:
    source, target = torch.compile(mlp(), backend="eager"), torch.compile(mlp(1), backend="eager")
    for edit in cut(0, [1, 2]):
        apply(source, edit)
    install_hooks(target)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(X), target(X))
    assert len(journal_of(target)) == 2


def test_compiled_parts() -> None:
    def build(seed: int) -> nn.ModuleDict:
        return nn.ModuleDict({"net": torch.compile(mlp(seed), backend="eager")})

    source, target = build(0), build(1)
    for edit in cut(0, [1, 2]):
        apply(source, edit.at("net"))
    install_hooks(target)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source["net"](X), target["net"](X))


def test_mismatches_name_the_first_differing_edit() -> None:
    net = mlp()
    for edit in cut(0, [0, 1, 2]):
        apply(net, edit)
    with pytest.raises(JournalMismatchError, match=r"edit 1 differs: the model has slice at '0'"):
        net.load_state_dict(edited().state_dict())


def test_a_state_dict_from_before_the_edits() -> None:
    net = edited()
    with pytest.raises(JournalMismatchError, match=r"saved before 4 structure edits.*slice at '0'"):
        net.load_state_dict(mlp().state_dict())
    with pytest.raises(JournalMismatchError, match="saved before"):
        net.load_state_dict(mlp().state_dict(), strict=False)
    subset = {"4.bias": torch.tensor([5.0, 6.0])}
    net.load_state_dict(subset, strict=False)
    assert net[4].bias.tolist() == [5.0, 6.0]
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict(subset)
    with pytest.raises(JournalMismatchError, match="saved before"):
        net.load_state_dict({"0.bias": torch.zeros(8)}, strict=False)


def test_strict_false_replays_as_well() -> None:
    target = bare()
    target.load_state_dict(edited().state_dict(), strict=False)
    assert equal(edited(), target)


EDITS = [
    Edit("replace", "2", "hooks-test-thin", {"rank": 3}),
    cut(2, [0, 1, 7])[0],
    Edit("parametrize", "2", "hooks-test-twice", {"tensor": "weight"}),
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.verb)
def test_the_checkpoint_wins_over_edits_that_can_be_taken_back(edit: Edit) -> None:
    target = bare()
    keep_undo(target)
    apply(target, edit)
    target.load_state_dict(edited().state_dict())
    forget_undo(target)
    assert equal(edited(), target)


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.verb)
def test_taking_back_restores_the_very_parameter(edit: Edit) -> None:
    target, source = bare(), mlp()
    for first in cut(0, [0, 1, 2]):
        apply(source, first)
    parameter = target[4].weight
    keep_undo(target)
    apply(target, Edit(edit.verb, "4", edit.kind, edit.config if edit.kind else {"tensors": {"weight": {"0": [0]}}}))
    assert dict(target.named_parameters()).get("4.weight") is not parameter
    target.load_state_dict(source.state_dict())
    forget_undo(target)
    assert target[4].weight is parameter
    assert torch.equal(source(X), target(X))


def test_without_keep_undo_nothing_is_taken_back() -> None:
    target = bare()
    apply(target, EDITS[0])
    with pytest.raises(JournalMismatchError, match="edit 1 differs"):
        target.load_state_dict(edited().state_dict())


def test_bakes_of_a_tensor_cannot_be_taken_back() -> None:
    target = bare()
    keep_undo(target)
    apply(target, EDITS[2])
    apply(target, Edit("bake", "2", config={"tensor": "weight"}))
    with pytest.raises(JournalMismatchError, match="edit 1 differs"):
        target.load_state_dict(edited().state_dict())
    forget_undo(target)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 2]), st.sets(st.integers(0, 7), min_size=1)), max_size=4))
def test_random_slices_reload_on_a_bare_model(cuts: list[tuple[int, set[int]]]) -> None:
    source, target = mlp(), bare()
    for first, chosen in cuts:
        size = source[first].out_features
        for edit in cut(first, sorted({index % size for index in chosen})):
            apply(source, edit)
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(X), target(X))
    assert journal_of(source) == journal_of(target)


def test_fit_refuses_to_resume_from_the_float_model(tmp_path) -> None:
    """All its keys fit a fake-quantized model, and only those of quantizers are missing."""

    def trainer(epochs: int, *callbacks: QuantizationAwareTraining) -> Trainer:
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        limits = {"max_epochs": epochs, "limit_train_batches": 2, "limit_val_batches": 0}
        return Trainer(callbacks=list(callbacks), accelerator="cpu", **limits, **quiet)

    before = trainer(1)
    before.fit(BoringModel())
    before.save_checkpoint(tmp_path / "float.ckpt")
    with pytest.raises(JournalMismatchError, match=r"saved before .*quantized.*`load_from_checkpoint` and fit without"):
        trainer(2, QuantizationAwareTraining()).fit(BoringModel(), ckpt_path=tmp_path / "float.ckpt")
    module = BoringModel.load_from_checkpoint(tmp_path / "float.ckpt")
    trainer(2, QuantizationAwareTraining()).fit(module)
