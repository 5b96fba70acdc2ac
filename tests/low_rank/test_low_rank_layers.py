"""The factorized module: journal, files, batch norm between factors, half precision, and factors of factors."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_compress import (
    ConfigurationError,
    Edit,
    apply,
    install_hooks,
    journal_of,
    load_compressed,
    save_compressed,
)
from lightning_compress.low_rank.decompose import cost, factorize, full_ranks, why_not
from lightning_compress.low_rank.kinds import FOLDED_KIND, build_factorized, fold_batch_norm
from lightning_compress.low_rank.layers import Factorized


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(),
        nn.Linear(4 * 36, 10),
    ).eval()


RANKS = {"0": 6, "2": 8, "3": 3, "5": 7}


def compressed() -> nn.Sequential:
    torch.manual_seed(0)
    net = network()
    for path, rank in RANKS.items():
        apply(net, factorize(net.get_submodule(path), ranks=[rank]).edit(path))
    return net


def test_an_edit_puts_the_computed_factors_there() -> None:
    torch.manual_seed(0)
    net, dense = compressed(), network()
    x = torch.randn(2, 3, 6, 6)
    found = factorize(nn.Linear(4, 3), ranks=[2])
    assert found.edit("x").config.keys() == {"method", "ranks", "batch_norm", "error"}
    assert isinstance(net[0], Factorized)
    assert 0 < journal_of(net).edits[0].config["error"] < 1
    assert net(x).shape == dense(x).shape


def test_values_go_only_to_the_layer_they_were_computed_for() -> None:
    first, other = nn.Linear(6, 5), nn.Linear(6, 5)
    edit = factorize(first, ranks=[2]).edit("0")
    net = nn.Sequential(other)
    apply(net, edit)
    assert not torch.allclose(net[0].to_dense().weight, factorize(first, ranks=[2]).module.to_dense().weight)


def test_files_and_bare_models_on_meta_rebuild_it(tmp_path: Path) -> None:
    net = compressed()
    x = torch.randn(2, 3, 6, 6)
    save_compressed(net, tmp_path / "net.safetensors")
    again = load_compressed(network(), tmp_path / "net.safetensors")
    assert torch.equal(again(x), net(x))
    with torch.device("meta"):
        bare = network()
    install_hooks(bare)
    bare.load_state_dict(net.state_dict(), assign=True)
    assert torch.equal(bare(x), net(x))
    assert journal_of(bare) == journal_of(net)


def test_bake_multiplies_out_also_in_a_replay() -> None:
    net = compressed()
    x = torch.randn(2, 3, 6, 6)
    expected = net(x)
    for path in RANKS:
        apply(net, Edit("bake", path))
    assert isinstance(net[0], nn.Conv2d)
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
    bare = network()
    install_hooks(bare)
    bare.load_state_dict(net.state_dict())
    assert torch.equal(bare(x), net(x))


def test_copies_and_pickles() -> None:
    net = compressed()
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))


def trained_norm(module: Factorized) -> Factorized:
    """Give the batch norms values as after training."""
    for norm in module.norms():
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.2, 3.0)
    return module.eval()


NORMED = [
    ("spatial_svd", nn.Conv2d(4, 6, 3, padding=1)),
    ("spatial_svd", nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2), groups=2, bias=False)),
    ("spatial_svd", nn.Conv2d(4, 6, 3, padding="same", dilation=2, padding_mode="reflect")),
    ("spatial_svd", nn.Conv3d(4, 6, 3, padding=1, stride=2)),
    ("channel_svd", nn.Conv1d(4, 6, 3, padding=2)),
    ("svd", nn.Conv2d(4, 6, 1, padding=1)),
]


@pytest.mark.parametrize(("method", "layer"), NORMED)
def test_batch_norm_between_factors_folds_exactly(method: str, layer: nn.Module) -> None:
    torch.manual_seed(0)
    groups = layer.groups
    module = trained_norm(build_factorized(layer, method, [4], batch_norm=True))
    size = (7, 8, 6)[: len(layer.kernel_size)]
    x = torch.randn(2, 4, *size)
    expected = module(x)
    assert expected.shape == layer(x).shape
    torch.testing.assert_close(fold_batch_norm(module)(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(module.to_dense()(x), expected, atol=1e-5, rtol=1e-5)
    assert module.to_dense().groups == groups
    assert sum(p.numel() for p in module.parameters()) == cost(layer, method, [4], size, batch_norm=True).parameters


def test_batch_norm_starts_as_the_identity_of_the_closed_form() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1).eval()
    x = torch.randn(2, 4, 8, 8)
    found = factorize(layer, "spatial_svd", full_ranks(layer), batch_norm=True)
    torch.testing.assert_close(found.module(x), layer(x), atol=1e-5, rtol=1e-5)


def test_batch_norm_trains_folds_and_reloads_from_the_journal() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU())
    apply(net, Edit("replace", "0", "low_rank", {"method": "spatial_svd", "ranks": [4], "batch_norm": True}))
    for _ in range(3):
        net(torch.randn(4, 3, 6, 6))
    net.eval()
    x = torch.randn(2, 3, 6, 6)
    expected = net(x)
    apply(net, Edit("replace", "0", FOLDED_KIND))
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
    bare = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()).eval()
    install_hooks(bare)
    bare.load_state_dict(net.state_dict())
    assert torch.equal(bare(x), net(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_and_gradient_flags_stay(dtype: torch.dtype) -> None:
    layer = nn.Conv2d(4, 6, 3).to(dtype).requires_grad_(False)
    found = factorize(layer, ranks=full_ranks(layer))
    assert all(p.dtype == dtype and not p.requires_grad for p in found.module.parameters())
    assert found.module.layers()[-1].bias is layer.bias
    tolerance = {torch.float16: 5e-3, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(found.module.to_dense().weight, layer.weight, atol=tolerance, rtol=tolerance)


def test_factors_can_be_factorized_again_and_still_multiplied_out() -> None:
    layer = nn.Conv2d(6, 8, 3, padding=1).eval()
    x = torch.randn(2, 6, 7, 7)
    net = nn.Sequential(layer)
    apply(net, factorize(layer, "channel_svd", [8]).edit("0"))
    inner = net[0].factors[0]
    apply(net, factorize(inner, "spatial_svd", full_ranks(inner)).edit("0.factors.0"))
    expected = layer(x)
    torch.testing.assert_close(net(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(net[0].to_dense()(x), expected, atol=1e-5, rtol=1e-5)


def test_a_model_is_compressed_in_stages() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Linear(8, 6)).eval()
    bias = net[0].bias
    first = factorize(net[0], "tucker", [5, 7])
    apply(net, first.edit("0"))
    assert full_ranks(net[0], "tucker") == (6, 8)
    second = factorize(net[0], "tucker", [3, 4])
    apply(net, second.edit("0"))
    apply(net, factorize(net[2], "tt", [2, 4]).edit("2"))
    apply(net, factorize(net[2], "svd", [3]).edit("2"))
    assert net[0].ranks == (3, 4)
    assert net[0].own_bias() is bias
    direct = factorize(first.module.to_dense(), "tucker", [3, 4])
    assert second.error == pytest.approx(direct.error, rel=1e-5)
    x = torch.randn(2, 6, 8, 8)
    bare = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Linear(8, 6)).eval()
    install_hooks(bare)
    bare.load_state_dict(net.state_dict())
    assert torch.equal(bare(x), net(x))


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_embedding_tables(padding_idx: int | None) -> None:
    table = nn.Embedding(12, 8, padding_idx=padding_idx)
    found = factorize(table, "svd", [8])
    index = torch.tensor([[0, 2], [11, 5]])
    torch.testing.assert_close(found.module(index), table(index), atol=1e-5, rtol=1e-5)
    dense = found.module.to_dense()
    assert isinstance(dense, nn.Embedding)
    assert dense.padding_idx == padding_idx
    torch.testing.assert_close(dense.weight, table.weight, atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_says_why() -> None:
    assert "parametrized" in why_not(nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    assert "MultiheadAttention" in why_not(nn.MultiheadAttention(8, 2).out_proj)
    assert "lazy" in why_not(nn.LazyLinear(3))
    assert "max_norm" in why_not(nn.Embedding(4, 3, max_norm=1.0))
    assert "depthwise" in why_not(nn.Conv2d(4, 8, 3, groups=4))
    assert "none of" in why_not(nn.ReLU())
    assert "channel_svd" in why_not(nn.Conv2d(4, 8, 3), "svd")
    assert "svd" in why_not(nn.Linear(4, 8), "spatial_svd")
    assert "even kernel" in why_not(nn.Conv2d(4, 8, 4, padding="same"), "spatial_svd", batch_norm=True)
    with pytest.raises(ConfigurationError, match="did you mean 'spatial_svd'"):
        factorize(nn.Conv2d(4, 8, 3), "spatialsvd", [2])
    with pytest.raises(ConfigurationError, match="multiples of the 2 groups"):
        factorize(nn.Conv2d(4, 8, 3, groups=2), "spatial_svd", [3])
    with pytest.raises(ConfigurationError, match=r"whole numbers up to \[4\]"):
        factorize(nn.Linear(4, 8), "svd", [5])
    with pytest.raises(ConfigurationError, match="are one rank"):
        factorize(nn.Linear(4, 8), "svd", [])
    broken = nn.Linear(4, 8)
    nn.init.constant_(broken.weight, float("nan"))
    with pytest.raises(ConfigurationError, match="infinite or undefined"):
        factorize(broken, "svd", [2])
