"""Where: patterns, types, ends, sizes, shared and compiled modules."""

import pickle

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback
from torch import nn

from lightning_compress.core.errors import ConfigurationError, SelectionError
from lightning_compress.core.paths import clean_path, get_layer, named_layers, names_of, original, set_layer
from lightning_compress.core.select import Select


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.layer1 = nn.Sequential(Block(), Block())
        self.rnn = nn.GRU(4, 4)
        self.fc = nn.Linear(4, 2)


def paths(select: Select, root: nn.Module | None = None, types: tuple[type, ...] = ()) -> list[str]:
    return list(select.resolve(root or Net(), types).layers)


@pytest.mark.parametrize(
    ("include", "expected"),
    [
        ("stem", ["stem"]),
        ("layer1.*.conv1", ["layer1.0.conv1", "layer1.1.conv1"]),
        ("*conv?", ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"]),
        ("layer1.[0]*", ["layer1.0.conv1", "layer1.0.conv2"]),
        ("layer1", ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2"]),
        ("layer1.1", ["layer1.1.conv1", "layer1.1.conv2"]),
        (r"re:layer1\.\d+\.conv2", ["layer1.0.conv2", "layer1.1.conv2"]),
        (["stem", "re:f."], ["stem", "fc"]),
    ],
)
def test_include_patterns(include: str | list[str], expected: list[str]) -> None:
    assert paths(Select(include=include), types=(nn.Conv2d, nn.Linear)) == expected


def test_a_regex_must_match_a_whole_path_or_that_of_an_ancestor() -> None:
    with pytest.raises(SelectionError, match="matches no module"):
        paths(Select(include=("re:conv1",)))


def test_exclude_wins_over_an_exact_include() -> None:
    select = Select(types="Conv2d", include=("layer1.0.conv1", "stem"), exclude=("layer1.0",))
    found = select.resolve(Net())
    assert list(found.layers) == ["stem"]
    assert found.left == {"layer1.0.conv1": "excluded by 'layer1.0'"}


def test_min_params_counts_weights_and_biases() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4))  # 12 and 16
    assert paths(Select(min_params=13), net, (nn.Linear,)) == ["1"]
    assert paths(Select(min_params=12), net, (nn.Linear,)) == ["0", "1"]
    assert Select(min_params=13).resolve(net, (nn.Linear,)).left == {"0": "12 parameters, fewer than min_params=13"}


def test_lazy_layers_are_selected_without_size_and_refused_with_one() -> None:
    net = nn.Sequential(nn.LazyLinear(3))
    assert paths(Select(), net, (nn.Linear,)) == ["0"]
    with pytest.raises(ConfigurationError, match=r"lazy layer.*run one batch"):
        paths(Select(min_params=1), net, (nn.Linear,))


def test_first_and_last_are_those_of_the_right_type_and_an_exact_include_takes_them() -> None:
    kinds = (nn.Conv2d,)
    assert paths(Select(not_first=True, not_last=True), types=kinds) == [
        "layer1.0.conv1",
        "layer1.0.conv2",
        "layer1.1.conv1",
    ]
    assert "stem" in paths(Select(include=("stem", "*"), not_first=True), types=kinds)
    assert list(Select(not_first=True).resolve(Net(), kinds).left) == ["stem"]
    with pytest.raises(SelectionError, match="first layer"):
        paths(Select(include=("st*",), not_first=True), types=kinds)


@pytest.mark.parametrize("field", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_a_typo(field: str) -> None:
    with pytest.raises(SelectionError, match=rf"`{field}`.*'layer1.0.cnov1'.*did you mean 'layer1.0.conv1'"):
        paths(Select(**{field: ("layer1.0.cnov1",)}))


def test_types_by_name_by_base_class_and_by_class() -> None:
    assert paths(Select(types="GRU")) == ["rnn"]
    assert paths(Select(types="RNNBase")) == ["rnn"]
    assert paths(Select(types=(nn.Linear, "GRU"))) == ["rnn", "fc"]
    assert paths(Select(types=("Linear", "Conv2d")), types=(nn.Linear,)) == ["fc"]


def test_an_empty_selection_says_what_there_is() -> None:
    with pytest.raises(SelectionError, match=r"no layer of type Conv3d.*BatchNorm2d.*configure_model"):
        paths(Select(types="Conv3d"))
    with pytest.raises(SelectionError, match=r"no layer that this method.*supported: Bilinear.*no submodules"):
        paths(Select(), nn.Linear(2, 2), (nn.Bilinear,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include": ()}, "`include` is empty"),
        ({"include": 3}, "`include` must be a list"),
        ({"include": {"a": 1}}, "`include` must be a list"),
        ({"include": [nn.Linear]}, "`include` must hold strings|`include` must be"),
        ({"include": [3]}, "`include` must hold strings"),
        ({"types": [3]}, "`types` must hold strings"),
        ({"include": "re:("}, "not a regular expression"),
        ({"exclude": "re:*"}, "not a regular expression"),
        ({"min_params": -1}, "`min_params`"),
        ({"min_params": True}, "`min_params`"),
        ({"min_params": 1.5}, "`min_params`"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Select(**arguments)


def test_select_is_a_value() -> None:
    select = Select(types=["Linear"], include="a*")
    assert select == Select(types=("Linear",), include=("a*",))
    assert hash(select) == hash(pickle.loads(pickle.dumps(select)))


def test_a_shared_module_is_selected_once_and_answers_to_all_its_names() -> None:
    net = Net()
    net.head = net.fc
    net.backbone = net.layer1
    assert names_of(net)["fc"] == ("fc", "head")
    assert paths(Select(include="head"), net, (nn.Linear,)) == ["fc"]
    assert paths(Select(include="backbone.0"), net, (nn.Conv2d,)) == ["layer1.0.conv1", "layer1.0.conv2"]
    assert paths(Select(exclude="head"), net, (nn.Linear, nn.GRU)) == ["rnn"]
    assert paths(Select(include=("head", "rnn"), not_last=True), net, (nn.Linear, nn.GRU)) == ["rnn", "fc"]


def test_compiled_parts_have_clean_paths_and_original_modules() -> None:
    net = Net()
    inner, fc = net.layer1, net.fc
    net.layer1 = torch.compile(net.layer1, backend="eager")
    net.fc = torch.compile(net.fc, backend="eager")
    found = Select(types=("Conv2d", "Linear"), include=("layer1", "fc")).resolve(net)
    assert list(found.layers) == ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2", "fc"]
    assert found.layers["fc"] is fc
    assert get_layer(net, "layer1") is inner
    whole = torch.compile(net, backend="eager")
    assert list(named_layers(whole)) == list(named_layers(net))
    assert original(whole) is net
    assert clean_path("_orig_mod") == ""


def test_the_end_that_is_kept_says_by_which_order() -> None:
    left = Select(not_first=True, not_last=True).resolve(Net(), (nn.Conv2d, nn.Linear)).left
    assert list(left) == ["stem", "fc"]
    assert left["fc"].startswith("the last layer in the order they were registered; to keep another one")


@pytest.mark.parametrize("include", ["layer1.*", ["layer1.*"], ["layer1.0.*", "layer1.1.*"]])
def test_a_config_file_gives_one_pattern_or_a_list(include: str | list[str]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Callback, "callback")
    select = {"include": include, "exclude": "*.norm", "types": "Conv2d"}
    rules = {"stem": {"include": include, "amount": 0.5, "types": ["Conv2d"]}}
    arguments = {"schedule": 0.75, "select": select, "rules": rules}
    config = {"class_path": "lightning_compress.IterativePruning", "init_args": arguments}
    callback = parser.instantiate(parser.parse_object({"callback": config})).callback
    patterns = (include,) if isinstance(include, str) else tuple(include)
    assert callback.select == Select(types=("Conv2d",), include=patterns, exclude=("*.norm",))
    assert callback.rules["stem"].include == patterns


def test_get_and_set_layer_name_the_nearest_path() -> None:
    net = Net()
    with pytest.raises(ConfigurationError, match=r"did you mean 'layer1\.0\.conv1'"):
        get_layer(net, "layer1.0.conv11")
    for root in (net, torch.compile(net, backend="eager")):
        with pytest.raises(ConfigurationError, match="root module cannot be replaced"):
            set_layer(root, "", nn.Linear(1, 1))


def test_set_layer_reaches_every_alias_and_goes_back() -> None:
    net = Net()
    net.head = net.fc
    net.same = torch.compile(net.fc, backend="eager")
    before, wrapper, new = net.fc, net.same, nn.Linear(4, 2)
    put_back = set_layer(net, "head", new)
    assert net.fc is net.head is net.same is new
    put_back()
    assert net.fc is net.head is before
    assert net.same is wrapper
