"""Optimal Brain Damage and Surgeon against subsets, least squares, autograd and formed inverses."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_compress import ConfigurationError
from lightning_compress.pruning.second_order import (
    fisher_diagonal,
    gauss_newton_diagonal,
    hutchinson_diagonal,
    obd_saliency,
    obs_prune_exact,
)
from lightning_compress.pruning.woodfisher import (
    FisherInverse,
    fisher_inverse,
    woodfisher_saliency,
    woodfisher_update,
)


def problem(size: int, seed: int, samples: int = 40) -> tuple[Tensor, Tensor]:
    """Return weights and a well-conditioned Hessian with correlations, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    inputs = torch.randn(samples, size, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(size, generator=generator, dtype=torch.float64), 2 * inputs.T @ inputs / samples + torch.eye(
        size, dtype=torch.float64
    )


def constrained(weight: Tensor, hessian: Tensor, gone: tuple[int, ...]) -> tuple[Tensor, float]:
    """Return the minimum of the quadratic with ``gone`` at zero, by Lagrange multipliers, and its value."""
    size, held = len(weight), len(gone)
    rows = torch.eye(size, dtype=weight.dtype)[list(gone)]
    system = torch.zeros(size + held, size + held, dtype=weight.dtype)
    system[:size, :size], system[:size, size:], system[size:, :size] = hessian, rows.T, rows
    right = torch.cat([torch.zeros(size, dtype=weight.dtype), -weight[list(gone)]])
    step = torch.linalg.solve(system, right)[:size]
    return weight + step, float(step @ hessian @ step / 2)


def test_obd_by_hand():
    weight, curvature = torch.tensor([1.0, -2.0, 3.0, 0.5]), torch.tensor([8.0, 1.0, 0.0, -4.0])
    assert obd_saliency(weight, curvature).tolist() == [4.0, 2.0, 0.0, 0.0]


def test_gauss_newton_is_the_expected_square_of_the_gradients():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    images, weights = torch.rand(7, 2, 3), [net[1].weight, net[3].weight]
    wanted = [torch.zeros_like(weight) for weight in weights]
    for image in images:
        logs = net(image[None]).log_softmax(1)[0]
        for log in logs:
            for total, g in zip(wanted, torch.autograd.grad(log, weights, retain_graph=True), strict=True):
                total += log.detach().exp() * g.square() / len(images)
    found = gauss_newton_diagonal(net, {"a": net[1], "b": net[3]}, images.split(4))
    assert torch.allclose(found["a"].float(), wanted[0], rtol=1e-5)
    assert torch.allclose(found["b"].float(), wanted[1], rtol=1e-5)
    assert net.training
    assert weights[0].grad is None
    with pytest.raises(ConfigurationError, match="`batches` is empty"):
        gauss_newton_diagonal(net, {"a": net[1]}, [])
    with pytest.raises(ConfigurationError, match="'x' did not run"):
        gauss_newton_diagonal(net, {"x": nn.Linear(1, 1)}, [images])
    twice = nn.Sequential(nn.Linear(4, 4), net[2], nn.Linear(4, 2))
    with pytest.raises(ConfigurationError, match="'a' must run once"):
        gauss_newton_diagonal(nn.Sequential(twice[0], twice[0], twice[2]), {"a": twice[0]}, [torch.rand(2, 4)])


def test_obs_by_hand_on_four_weights_without_correlation_is_obd():
    weight, curvature = torch.tensor([1.0, 2.0, 3.0, 0.5]).double(), torch.tensor([8.0, 1.0, 0.1, 40.0]).double()
    done = obs_prune_exact(weight, torch.diag(1 / curvature), 2)
    assert done.order == (2, 1)
    assert done.losses == pytest.approx([0.45, 2.0])
    assert done.weight.tolist() == [1.0, 0.0, 0.0, 0.5]


def test_the_first_removal_is_the_best_of_all_and_so_is_its_update():
    for seed in range(20):
        weight, hessian = problem(6, seed)
        done = obs_prune_exact(weight, torch.linalg.inv(hessian), 1)
        options = {q: constrained(weight, hessian, (q,)) for q in range(6)}
        best = min(options, key=lambda q: options[q][1])
        assert done.order == (best,)
        assert torch.allclose(done.weight, options[best][0], atol=1e-10)
        assert done.losses[0] == pytest.approx(options[best][1])


@settings(max_examples=25, deadline=None)
@given(size=st.integers(2, 8), seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_removals_in_turn_reach_the_minimum_of_the_quadratic(size: int, seed: int, share: float):
    weight, hessian = problem(size, seed)
    done = obs_prune_exact(weight, torch.linalg.inv(hessian), round(share * size))
    if done.order:
        wanted, loss = constrained(weight, hessian, done.order)
        assert torch.allclose(done.weight, wanted, atol=1e-8)
        assert sum(done.losses) == pytest.approx(loss, rel=1e-6, abs=1e-10)
    assert int((done.weight == 0).sum()) == len(done.order)
    left = [q for q in range(size) if q not in done.order]
    if left:
        inverse = torch.linalg.inv(hessian[left][:, left])
        assert torch.allclose(done.inverse[left][:, left], inverse, atol=1e-8)


def test_greedy_is_near_the_best_of_all_subsets_and_magnitude_is_not():
    excess, naive = [], []
    for seed in range(30):
        weight, hessian = problem(8, seed)
        losses = {s: constrained(weight, hessian, s)[1] for s in itertools.combinations(range(8), 4)}
        best = min(losses.values())
        done = obs_prune_exact(weight, torch.linalg.inv(hessian), 4)
        assert sum(done.losses) >= best - 1e-9
        excess.append(sum(done.losses) / best)
        smallest = weight.clone()
        smallest[weight.abs().argsort()[:4]] = 0
        naive.append(float((smallest - weight) @ hessian @ (smallest - weight) / 2) / best)
    assert sum(value < 1 + 1e-9 for value in excess) >= 10
    assert sorted(excess)[15] < 1.3
    assert sorted(naive)[15] > 2 > sorted(excess)[15]


@pytest.mark.parametrize(
    ("weight", "inverse", "count", "match"),
    [
        (torch.ones(2), torch.eye(3), 1, "`inverse_hessian`"),
        (torch.ones(2, 2), torch.eye(2), 1, "`weight`"),
        (torch.ones(2), torch.eye(2), 3, r"0\.\.2"),
        (torch.ones(2), -torch.eye(2), 1, "damping"),
        (torch.ones(2), torch.ones(2, 2), 2, "damping"),
    ],
)
def test_obs_refuses(weight: Tensor, inverse: Tensor, count: int, match: str):
    with pytest.raises(ConfigurationError, match=match):
        obs_prune_exact(weight, inverse, count)


def test_obd_and_diagonals_refuse():
    with pytest.raises(ConfigurationError, match="`curvature`"):
        obd_saliency(torch.ones(2), torch.ones(3))
    with pytest.raises(ConfigurationError, match="`gradients` is empty"):
        fisher_diagonal([])
    with pytest.raises(ConfigurationError, match="`samples`"):
        hutchinson_diagonal(lambda: torch.zeros(()), [], samples=0)
    with pytest.raises(ConfigurationError, match="`loss`"):
        hutchinson_diagonal(lambda: torch.zeros(()), [torch.ones(1, requires_grad=True)])


def test_hutchinson_approaches_the_diagonal_of_a_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs, targets = torch.randn(16, 3).double(), torch.randint(0, 2, (16,))

    def loss() -> Tensor:
        return nn.functional.cross_entropy(net(inputs), targets)

    weight = net[0].weight
    full = torch.autograd.functional.hessian(
        lambda w: nn.functional.cross_entropy(torch.func.functional_call(net, {"0.weight": w}, inputs), targets),
        weight.detach(),
    ).reshape(12, 12)
    wanted = full.diagonal().view(4, 3)
    found = hutchinson_diagonal(loss, [weight], samples=4000)[0]
    noise = (full.square().sum(1) - full.diagonal().square()).sqrt().view(4, 3) / 4000**0.5
    assert bool(((found - wanted).abs() < 5 * noise + 1e-12).all())
    assert torch.equal(found, hutchinson_diagonal(loss, [weight], samples=4000)[0])
    linear = torch.ones(2, requires_grad=True)
    assert hutchinson_diagonal(lambda: linear.sum(), [linear])[0].tolist() == [0.0, 0.0]


# --- WoodFisher


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 11), block=st.integers(1, 12), samples=st.integers(1, 9), seed=st.integers(0, 10**6))
def test_rank_one_updates_equal_the_formed_inverse(size: int, block: int, samples: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(samples, size, generator=generator, dtype=torch.float64)
    inverse = fisher_inverse(list(gradients), block, damping=0.3)
    for number, start in enumerate(range(0, size, block)):
        part = gradients[:, start : start + block]
        formed = 0.3 * torch.eye(part.shape[1], dtype=torch.float64) + part.T @ part / samples
        width = part.shape[1]
        assert torch.allclose(inverse.blocks[number][:width, :width], torch.linalg.inv(formed), atol=1e-9)


def test_blocks_of_one_weight_are_optimal_brain_damage():
    torch.manual_seed(0)
    weight, gradients = torch.randn(3, 4).double(), [torch.randn(3, 4).double() for _ in range(20)]
    inverse = fisher_inverse(gradients, block=1, damping=1e-9)
    wanted = obd_saliency(weight, fisher_diagonal(gradients))
    assert torch.allclose(woodfisher_saliency(weight, inverse), wanted, rtol=1e-4)
    keep = torch.rand(3, 4) > 0.5
    assert torch.allclose(woodfisher_update(weight, inverse, keep), weight * keep)


def one_block(hessian: Tensor) -> FisherInverse:
    inverse = FisherInverse(len(hessian), 1, len(hessian), dtype=hessian.dtype)
    inverse.blocks = torch.linalg.inv(hessian).unsqueeze(0)
    return inverse


@pytest.mark.parametrize("gone", [(2,), (0, 3), (1, 2, 4)])
def test_joint_update_is_the_constrained_minimum_and_the_sum_only_for_one(gone: tuple[int, ...]):
    weight, hessian = problem(6, seed=5)
    keep = torch.ones(6, dtype=torch.bool)
    keep[list(gone)] = False
    wanted, _ = constrained(weight, hessian, gone)
    inverse = one_block(hessian)
    assert torch.allclose(woodfisher_update(weight, inverse, keep), wanted, atol=1e-9)
    summed = woodfisher_update(weight, inverse, keep, "sum")
    assert torch.allclose(summed, wanted, atol=1e-9) == (len(gone) == 1)
    columns = inverse.blocks[0] / inverse.blocks[0].diagonal()
    by_formula = weight - sum(columns[:, q] * weight[q] for q in gone)
    assert torch.allclose(summed[keep], by_formula[keep])
    assert torch.equal(woodfisher_update(weight, inverse, keep, "none"), weight * keep)


def test_woodfisher_refuses():
    with pytest.raises(ConfigurationError, match="`gradients` is empty"):
        fisher_inverse([])
    with pytest.raises(ConfigurationError, match="`damping`"):
        FisherInverse(2, 1, damping=0.0)
    with pytest.raises(ConfigurationError, match="`block`"):
        FisherInverse(2, 1, block=0)
    inverse = FisherInverse(2, 1)
    with pytest.raises(ConfigurationError, match="expected 2 numbers"):
        inverse.add(torch.ones(3))
    with pytest.raises(ConfigurationError, match=r"`update`.*'joint'"):
        woodfisher_update(torch.ones(2), inverse, torch.ones(2, dtype=torch.bool), "joints")
