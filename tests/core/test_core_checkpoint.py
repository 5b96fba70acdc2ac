from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torchvision
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor, nn

import lightning_compress
from lightning_compress.coding.container import write_container
from lightning_compress.coding.state import pack_state
from lightning_compress.core.checkpoint import (
    inspect_compressed,
    load_compressed,
    save_compressed,
)
from lightning_compress.core.errors import ArtifactError, ConfigurationError, JournalMismatchError
from lightning_compress.core.hooks import install_hooks, journal_of
from lightning_compress.core.journal import Edit, Journal
from lightning_compress.core.lightning_checkpoint import load_from_checkpoint
from lightning_compress.core.verbs import apply, register_kind


@register_kind("replace", "checkpoint-test-resize")
def resize(layer: nn.Module, out_features: int) -> nn.Module:
    assert isinstance(layer, nn.Linear)
    return nn.Linear(layer.in_features, out_features, device=layer.weight.device, dtype=layer.weight.dtype)


RESIZE = Edit("replace", "0", "checkpoint-test-resize", {"out_features": 4})
SLICE = Edit("slice", "0", "", {"tensors": {"weight": {"0": [[0, 1]]}, "bias": {"0": [[0, 1]]}}})


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.BatchNorm1d(6))


def edited() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU())
    apply(model, RESIZE)
    apply(model, SLICE)
    return model


def prune(model: nn.Module, share: float = 0.9) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data[torch.rand(parameter.shape, generator=generator) < share] = 0


def assert_equal_states(model: nn.Module, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert list(state) == list(expected)
    for key, tensor in expected.items():
        assert state[key].dtype == tensor.dtype, key
        assert state[key].shape == tensor.shape, key
        assert torch.equal(state[key].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), key


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.rnn = nn.LSTM(8, 8, num_layers=2, batch_first=True)
        self.decode = nn.Linear(8, 50)
        self.decode.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decode(self.rnn(self.embed(tokens))[0])


def test_resnet18_with_nine_tenths_zeros(tmp_path: Path):
    model = torchvision.models.resnet18()
    prune(model)
    info = save_compressed(model, tmp_path / "resnet.safetensors", {"recipe": "none"})
    size = (tmp_path / "resnet.safetensors").stat().st_size
    assert info.bytes == size
    assert sum(info.encoded_bits.values()) == 8 * size
    dense = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert dense / size > 7.4  # 32 / (1 + 3.2) = 7.6 without headers and dense parts
    bare = load_compressed(torchvision.models.resnet18().eval(), tmp_path / "resnet.safetensors")
    assert_equal_states(bare, dict(model.state_dict()))
    assert not bare.training
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(bare(images), model.eval()(images))


def test_ties_stay_and_cost_once(tmp_path: Path):
    model = Tied()
    info = save_compressed(model, tmp_path / "tied")
    assert info.tensors["decode.weight"] == {
        "packing": "alias", "dtype": "float32", "shape": [50, 8],
        "bits": {"values": 0, "indices": 0, "codebooks": 0, "other": 0},
    }  # fmt: skip
    stored = info.encoded_bits["values"] + info.encoded_bits["codebooks"]
    assert stored < 0.9 * 32 * sum(parameter.numel() for parameter in model.parameters())
    bare = load_compressed(Tied(), tmp_path / "tied")
    assert bare.decode.weight is bare.embed.weight
    tokens = torch.arange(10).reshape(2, 5)
    assert torch.equal(bare(tokens), model(tokens))


def test_one_tensor_with_two_contents_is_refused(tmp_path: Path):
    model = Tied()
    model.decode.weight = nn.Parameter(torch.randn(50, 8))
    save_compressed(model, tmp_path / "untied")
    with pytest.raises(ArtifactError, match="one tensor in the model, two in the file"):
        load_compressed(Tied(), tmp_path / "untied")
    model.decode.weight = nn.Parameter(model.embed.weight.detach().clone())
    save_compressed(model, tmp_path / "equal")
    assert torch.equal(load_compressed(Tied(), tmp_path / "equal").decode.weight, model.decode.weight)


def test_the_file_decides_on_types_the_model_on_the_rest(tmp_path: Path):
    model = net().to(torch.bfloat16)
    save_compressed(model, tmp_path / "half")
    bare = net().eval()
    bare[0].weight.requires_grad_(False)
    weight, mean = bare[0].weight, bare[2].running_mean
    bare[0].bias.grad = torch.ones(6)
    assert load_compressed(bare, tmp_path / "half") is bare
    assert_equal_states(bare, dict(model.state_dict()))
    assert bare[0].weight is weight
    assert bare[2].running_mean is mean
    assert not weight.requires_grad
    assert bare[0].bias.requires_grad
    assert bare[0].bias.grad is None
    assert not bare.training
    assert bare[2].num_batches_tracked.dtype == torch.int64


def test_expanded_buffers_get_memory_of_their_own(tmp_path: Path):
    def build(first: float) -> nn.Module:
        model = nn.Linear(3, 2)
        model.register_buffer("rows", torch.tensor([[first, 5.0, 7.0]]).expand(4, 3))
        return model

    save_compressed(build(2.0), tmp_path / "m.safetensors")
    loaded = load_compressed(build(0.0), tmp_path / "m.safetensors")
    assert loaded.rows.tolist() == [[2.0, 5.0, 7.0]] * 4


def test_info_and_inspect_agree(tmp_path: Path):
    info = save_compressed(edited(), tmp_path / "file", {"recipe": "digits", "seed": 3})
    assert inspect_compressed(tmp_path / "file") == info
    assert info.provenance == {
        "recipe": "digits",
        "seed": 3,
        "torch": str(torch.__version__),
        "lightning-compress": lightning_compress.__version__,
    }
    assert list(info.journal) == [RESIZE, SLICE]
    assert info.tensors["0.weight"]["shape"] == [2, 3]


def test_the_journal_is_replayed(tmp_path: Path):
    model = edited()
    save_compressed(model, tmp_path / "file")
    x = torch.randn(5, 3)
    partly = nn.Sequential(nn.Linear(3, 6), nn.ReLU())
    apply(partly, RESIZE)
    for start in (nn.Sequential(nn.Linear(3, 6), nn.ReLU()), partly, copy.deepcopy(model)):
        loaded = load_compressed(start, tmp_path / "file")
        assert journal_of(loaded) == Journal((RESIZE, SLICE))
        assert_equal_states(loaded, dict(model.state_dict()))
        assert torch.equal(loaded(x), model(x))


def test_edits_of_a_part_are_replayed_from_the_whole(tmp_path: Path):
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 6), nn.ReLU())

    whole = Whole()
    apply(whole.net, RESIZE)
    save_compressed(whole, tmp_path / "file")
    loaded = load_compressed(Whole(), tmp_path / "file")
    assert torch.equal(loaded.net[0].weight, whole.net[0].weight)
    assert load_compressed(whole, tmp_path / "file") is whole


def test_other_edits_are_a_mismatch(tmp_path: Path):
    save_compressed(edited(), tmp_path / "file")
    other = nn.Sequential(nn.Linear(3, 6), nn.ReLU())
    apply(other, Edit("replace", "0", "checkpoint-test-resize", {"out_features": 5}))
    before = snapshot(other)
    with pytest.raises(JournalMismatchError, match="edit 1 differs"):
        load_compressed(other, tmp_path / "file")
    assert_equal_states(other, before)
    save_compressed(nn.Sequential(nn.Linear(3, 6), nn.ReLU()), tmp_path / "bare")
    with pytest.raises(JournalMismatchError):
        load_compressed(edited(), tmp_path / "bare")


def fails_unchanged(model: nn.Module, path: Path, error: type[Exception], words: str) -> None:
    before, modules = snapshot(model), list(model.modules())
    with pytest.raises(error, match=words):
        load_compressed(model, path)
    assert_equal_states(model, before)
    assert list(model.modules()) == modules
    assert len(journal_of(model)) == 0


def test_a_failed_load_changes_nothing(tmp_path: Path):
    save_compressed(net(), tmp_path / "file")
    fails_unchanged(nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.BatchNorm1d(7)), tmp_path / "file", ArtifactError,
                    r"'0.weight' has shape \[6, 3\] in the file, \[7, 3\] in the model")  # fmt: skip
    fails_unchanged(nn.Sequential(nn.Linear(3, 6), nn.ReLU()), tmp_path / "file", ArtifactError,
                    r"the model lacks '2.weight'.*and 2 more")  # fmt: skip
    save_compressed(edited(), tmp_path / "edited")
    fails_unchanged(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(4, 2)), tmp_path / "edited", ArtifactError,
                    "the file lacks '2.weight'")  # fmt: skip
    fails_unchanged(nn.ReLU(), tmp_path / "edited", ConfigurationError, "no module at '0'")


def test_renamed_keys_name_the_nearest(tmp_path: Path):
    save_compressed(nn.ModuleDict({"encoder": nn.Linear(2, 2)}), tmp_path / "file")
    with pytest.raises(ArtifactError, match=r"the file lacks 'encoder_.weight' \(did you mean 'encoder.weight'"):
        load_compressed(nn.ModuleDict({"encoder_": nn.Linear(2, 2)}), tmp_path / "file")


def test_a_damaged_packing_changes_nothing_and_names_the_tensor(tmp_path: Path):
    state = pack_state(net().state_dict())
    state["2.bias"].parts["values"] = torch.ones(2, 3)
    write_container(tmp_path / "file", state, {"journal": json.loads(Journal().to_json()), "provenance": {}})
    fails_unchanged(net(), tmp_path / "file", ArtifactError, r"'2.bias' has shape \[2, 3\]")


@pytest.mark.parametrize(
    ("metadata", "error", "words"),
    [
        ({}, JournalMismatchError, "not a compression journal"),
        ({"journal": [1, 2]}, JournalMismatchError, "not a compression journal"),
        ({"journal": {"version": 99, "edits": []}}, JournalMismatchError, "install a newer"),
        ({"journal": {"version": 1, "edits": [{"verb": "run", "path": ""}]}}, JournalMismatchError, "`verb` is 'run'"),
        ({"journal": {"version": 1, "edits": [{"verb": "replace", "path": "0", "kind": "os.system", "config": {}}]}},
         ConfigurationError, "unknown replace kind 'os.system'"),
        ({"journal": {"version": 1, "edits": [{"verb": "replace", "path": "0", "kind": "checkpoint-test-resize",
                                               "config": {"out_features": 10**12}}]}},
         ArtifactError, "does not fit"),
    ],
)  # fmt: skip
def test_hostile_journals(tmp_path: Path, metadata: dict[str, Any], error: type[Exception], words: str):
    write_container(tmp_path / "file", pack_state(net().state_dict()), {"provenance": {}, **metadata})
    fails_unchanged(net(), tmp_path / "file", error, words)


def test_a_hostile_size_is_refused_before_memory_is_taken(tmp_path: Path):
    state = pack_state(net().state_dict())
    state["0.weight"].parts["values"] = torch.ones(6, 3)
    state["0.weight"].config["shape"] = [10**12]
    write_container(tmp_path / "file", state, {"journal": json.loads(Journal().to_json())})
    fails_unchanged(net(), tmp_path / "file", ArtifactError, r"the largest is '0.weight', 4000000000000 bytes")


def test_integer_weights_do_not_load_into_trained_parameters(tmp_path: Path):
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    save_compressed(model, tmp_path / "file")
    fails_unchanged(nn.Linear(2, 2), tmp_path / "file", ArtifactError, "requires gradients")
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert load_compressed(frozen, tmp_path / "file").weight.dtype == torch.int8


def test_state_that_is_no_tensor_is_named(tmp_path: Path):
    class Extra(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"calls": 3}

        def set_extra_state(self, state: Any) -> None:
            pass

    with pytest.raises(ConfigurationError, match=r"entry '0\._extra_state' is dict, not a tensor"):
        save_compressed(nn.Sequential(Extra(2, 2)), tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_tensors_as_extra_state_travel(tmp_path: Path):
    class Counter(nn.Module):
        calls = 3

        def get_extra_state(self) -> Tensor:
            return torch.tensor(self.calls)

        def set_extra_state(self, state: Tensor) -> None:
            self.calls = int(state)

    model = Counter()
    model.calls = 7
    save_compressed(model, tmp_path / "file")
    assert load_compressed(Counter(), tmp_path / "file").calls == 7


class Versioned(nn.Linear):
    """Asks for the version it was saved with, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *more: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError(f"version {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *more)


def test_modules_that_ask_for_their_version_get_it(tmp_path: Path):
    net = nn.Sequential(Versioned(2, 2))
    save_compressed(net, tmp_path / "m")
    assert torch.equal(load_compressed(nn.Sequential(Versioned(2, 2)), tmp_path / "m")[0].weight, net[0].weight)


def test_models_without_memory(tmp_path: Path):
    save_compressed(net(), tmp_path / "file")
    with pytest.raises(ConfigurationError, match=r"has no memory for '0\.weight'"):
        load_compressed(net().to("meta"), tmp_path / "file")
    with pytest.raises(ConfigurationError, match=r"entry '0.weight'.*meta"):
        save_compressed(net().to("meta"), tmp_path / "meta")
    with pytest.raises(ConfigurationError, match=r"has no memory for 'weight'"):
        load_compressed(nn.LazyLinear(3), tmp_path / "file")


def test_compiled_and_plain_models_share_files(tmp_path: Path):
    model = net()
    save_compressed(torch.compile(model), tmp_path / "compiled")  # nothing is compiled before the first call
    assert_equal_states(load_compressed(net(), tmp_path / "compiled"), dict(model.state_dict()))
    loaded = net()
    load_compressed(torch.compile(loaded), tmp_path / "compiled")
    assert_equal_states(loaded, dict(model.state_dict()))


def test_the_copy_takes_no_memory_and_shares_what_it_need_not_copy(tmp_path: Path):
    model = edited()
    save_compressed(model, tmp_path / "file")
    bare = nn.Sequential(nn.Linear(3, 6), nn.ReLU())
    bare.stream = (tmp_path / "file").open("rb")  # cannot be copied
    bare.scratch = torch.randn(3, requires_grad=True) * 2  # nor can this
    load_compressed(bare, tmp_path / "file")
    bare.stream.close()
    assert torch.equal(bare[0].weight, model[0].weight)


def test_a_model_that_cannot_be_copied_is_named(tmp_path: Path):
    save_compressed(edited(), tmp_path / "file")
    bare = nn.Sequential(nn.Linear(3, 6), nn.ReLU())
    with (tmp_path / "file").open("rb") as stream:
        bare.streams = [stream]
        fails_unchanged(bare, tmp_path / "file", ConfigurationError, "`model` cannot be copied")


class Module(BoringModel):
    def __init__(self, width: int = 2, name: str = "x") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(32, width)
        self.seen: list[str] = []

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seen.append("module")
        checkpoint["state_dict"].pop("stale", None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"]["stale"] = torch.zeros(1)


def checkpoint_of(model: lightning.LightningModule, path: Path) -> Path:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = lightning.Trainer(max_steps=1, accelerator="cpu", default_root_dir=path.parent, **quiet)
    trainer.fit(model)
    trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Module(width=3, name="y")
    install_hooks(model)
    apply(model, Edit("slice", "layer", "", {"tensors": {"weight": {"0": [0, 2]}, "bias": {"0": [0, 2]}}}))
    return checkpoint_of(model, tmp_path_factory.mktemp("checkpoint") / "last.ckpt")


def test_lightning_checkpoints_with_edits(checkpoint: Path):
    with pytest.raises(RuntimeError):
        Module.load_from_checkpoint(checkpoint, weights_only=True)
    model = load_from_checkpoint(Module, checkpoint, map_location="cpu")
    assert type(model) is Module
    assert dict(model.hparams) == {"width": 3, "name": "y"}
    assert model.seen == ["module"]
    assert model.layer.weight.shape == (2, 32)
    assert len(journal_of(model)) == 1
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert torch.equal(model.layer.weight, saved["layer.weight"])
    assert load_from_checkpoint(Module, checkpoint, name="z").hparams["name"] == "z"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Lightning's use of jsonargparse
def test_a_checkpoint_that_names_its_class(checkpoint: Path, tmp_path: Path):
    """LightningCLI in subclass mode writes the class and asks for its own instantiator."""
    content = torch.load(checkpoint, weights_only=True)
    names = {"_class_path": f"{__name__}.Module", "_instantiator": "lightning.pytorch.cli.instantiate_module"}
    content["hyper_parameters"].update(names)
    torch.save(content, tmp_path / "cli.ckpt")
    assert load_from_checkpoint(Module, tmp_path / "cli.ckpt").layer.weight.shape == (2, 32)


def test_the_class_is_as_before_after_loading(checkpoint: Path, tmp_path: Path):
    class Plain(Module):
        pass

    own = Module.on_load_checkpoint
    load_from_checkpoint(Plain, checkpoint)
    assert "on_load_checkpoint" not in vars(Plain)
    with pytest.raises(FileNotFoundError):
        load_from_checkpoint(Module, tmp_path / "missing.ckpt")
    assert Module.on_load_checkpoint is own


def test_lightning_checkpoints_without_edits(tmp_path: Path):
    model = Module()
    path = checkpoint_of(model, tmp_path / "last.ckpt")
    assert torch.equal(load_from_checkpoint(Module, path).layer.weight, model.layer.weight)


def test_a_compressed_file_of_a_lightning_module(tmp_path: Path, checkpoint: Path):
    model = load_from_checkpoint(Module, checkpoint)
    save_compressed(model, tmp_path / "file")
    loaded = load_compressed(Module(width=3), tmp_path / "file")
    assert torch.equal(loaded.layer.weight, model.layer.weight)


def test_only_lightning_classes_have_checkpoints(checkpoint: Path):
    for given in (nn.Linear, Module()):
        with pytest.raises(ConfigurationError, match="must be a LightningModule class"):
            load_from_checkpoint(given, checkpoint)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: save_compressed("x", nn.Linear(1, 1)), "`model` must be a torch.nn.Module, got 'x'"),
        (lambda: save_compressed(nn.Linear(1, 1), None), "`path` must be the name of a file, got None"),
        (lambda: save_compressed(nn.Linear(1, 1), "x", "ans"), "`provenance` must be a mapping .*, got 'ans'"),
        (lambda: load_compressed(nn.Linear, "x"), r"the class Linear; build it: Linear\(...\)"),
        (lambda: load_compressed(nn.Linear(1, 1), 3), "`path` must be the name of a file, got 3"),
    ],
)
def test_arguments_of_another_kind_are_named(call: Any, words: str):
    with pytest.raises(ConfigurationError, match=words):
        call()


def test_the_result_of_saving_is_readable(tmp_path: Path):
    info = save_compressed(torchvision.models.resnet18(), tmp_path / "file")
    assert len(info.tensors) == 122
    assert len(repr(info)) < 500, "an interactive session prints it"


class Late(BoringModel):
    """Builds its layer when it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = None

    def configure_model(self) -> None:
        if self.layer is None:
            self.layer = nn.Linear(32, 2)


def test_layers_of_configure_model_are_built_first(tmp_path: Path):
    model = Late()
    model.configure_model()
    save_compressed(model, tmp_path / "model.safetensors")
    assert torch.equal(load_compressed(Late(), tmp_path / "model.safetensors").layer.weight, model.layer.weight)


def test_edits_of_another_network_name_the_file(tmp_path: Path):
    model = nn.Sequential(nn.Linear(4, 2))
    apply(model, Edit("slice", "0", "weight", {"tensors": {"weight": {"0": [0]}}, "attributes": {"out_features": 1}}))
    save_compressed(model, tmp_path / "model.safetensors")
    with pytest.raises(ConfigurationError, match=r"model.safetensors' was written for another network than this ReLU"):
        load_compressed(nn.ReLU(), tmp_path / "model.safetensors")
