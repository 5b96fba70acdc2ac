"""The nets that are trained from scratch, dense and as factors, and what is said of them."""

import pytest
import torch
from torch import nn

from benchmarks import low_rank_from_scratch as scratch
from lightning_compress import compress
from lightning_compress.low_rank.layers import Factorized


@pytest.mark.parametrize(("way", "norms"), [(scratch.DENSE, 0), (scratch.NORMED, 3), (scratch.LOW_RANK, 0)])
def test_each_net_classifies_small_images(way, norms):
    net = scratch.build(way).eval()
    assert net(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in net) == norms


def test_factors_take_the_ranks_with_batch_norm_between_them():
    (method,) = scratch.factors_of(scratch.build(scratch.LOW_RANK))
    small = compress(nn.ModuleDict({"net": scratch.build(scratch.LOW_RANK)}), method)
    factors = [layer for layer in small.modules() if isinstance(layer, Factorized)]
    assert [layer.ranks for layer in factors] == [(rank,) for rank in scratch.RANKS]
    assert all(len(layer.norms()) == 1 for layer in factors)


def test_the_claim_is_judged_beside_the_dense_net():
    found = {
        scratch.DENSE: scratch.Found([50.0, 52.0], [2.0, 2.0], 100),
        scratch.LOW_RANK: scratch.Found([48.0, 50.0], [2.5, 2.5], 40),
    }
    rows = {row.case: row for row in scratch.rows_of(found)}
    assert rows[f"test error, {scratch.LOW_RANK}"].met is True
    assert rows[f"processor time of an epoch, {scratch.LOW_RANK}"].met is False
    assert rows[f"parameters, {scratch.LOW_RANK}"].ratio == pytest.approx(0.4)
    assert rows[f"test error, {scratch.LOW_RANK}, seed 2"].value == 50.0
