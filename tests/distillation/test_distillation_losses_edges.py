"""What holds for any shapes, and what losses do with batches of one or none, large numbers and masked classes."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import CASES
from torch import Tensor

from lightning_compress.distillation import losses
from lightning_compress.distillation.adapters import Adapters, as_tuple

FEW = settings(max_examples=15, deadline=None)
SIZES = st.integers(1, 6)
INF = math.inf


def run(name: str, batch: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    """Return the loss of a training step on ``batch`` samples and the gradients it gives the student."""
    case = CASES[name]
    student, teacher, target = case.inputs(batch, dtype)
    loss = case.make().to(dtype).train()
    adapter = loss.adapt(*([part.shape for part in as_tuple(side)] for side in (student, teacher)))
    ours = tuple((part * scale).requires_grad_() for part in as_tuple(student))
    theirs = tuple(part * scale for part in as_tuple(teacher))
    sides = (ours if isinstance(student, tuple) else ours[0], theirs if isinstance(teacher, tuple) else theirs[0])
    sides = sides if adapter is None else adapter.to(dtype)(*sides)
    found = loss(*sides, target, 2.0)
    found.backward()
    return found, [part.grad for part in ours if part.grad is not None]


@pytest.mark.parametrize("name", CASES)
def test_one_sample(name: str) -> None:
    found, gradients = run(name, 1)
    assert torch.isfinite(found)
    assert gradients
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    if name in ("sp", "rkd", "pkt"):
        assert found == 0, "there are no pairs to compare"


@pytest.mark.parametrize("name", CASES)
def test_no_sample_is_zero_and_still_has_a_gradient(name: str) -> None:
    found, gradients = run(name, 0)
    assert found == 0
    assert gradients
    assert all(gradient.shape[0] == 0 for gradient in gradients)


@pytest.mark.parametrize("name", CASES)
def test_large_numbers(name: str) -> None:
    found, gradients = run(name, 4, scale=1e4)
    assert torch.isfinite(found)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("name", CASES)
def test_the_order_of_samples_does_not_matter(name: str) -> None:
    if name == "noisy_teacher":
        return
    case = CASES[name]
    loss = case.make().eval()
    inputs = case.inputs(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    adapter = loss.adapt(*([part.shape for part in as_tuple(side)] for side in inputs[:2])) or Adapters(
        [None] * len(as_tuple(inputs[0])), [None] * len(as_tuple(inputs[1]))
    )

    def moved(side: object) -> object:
        if side is None:
            return None
        return tuple(part[order] for part in side) if isinstance(side, tuple) else side[order]  # type: ignore[index]

    adapter = adapter.double()
    one = loss(*adapter(*inputs[:2]), inputs[2], 2.0)
    other = loss(*adapter(moved(inputs[0]), moved(inputs[1])), moved(inputs[2]), 2.0)
    assert one.item() == pytest.approx(other.item())


@FEW
@given(batch=SIZES, classes=SIZES, positions=st.lists(SIZES, max_size=2), seed=st.integers(0, 99))
def test_divergences(batch: int, classes: int, positions: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    s, t = torch.randn(2, batch, classes, *positions, generator=generator, dtype=torch.float64) * 5
    for direction in ("forward", "reverse", "js"):
        found = losses.class_divergence(s, t, 2.0, direction=direction)
        assert found.shape == (batch, *positions)
        assert (found >= -1e-12).all()
        shifted = losses.class_divergence(s + 7, t - 3, 2.0, direction=direction)
        assert torch.allclose(found, shifted)
    js = losses.class_divergence(s, t, 2.0, direction="js")
    assert (js <= math.log(2)).all()
    assert torch.allclose(js, losses.class_divergence(t, s, 2.0, direction="js"))
    reverse = losses.class_divergence(t, s, 2.0, direction="reverse")
    assert torch.allclose(reverse, losses.class_divergence(s, t, 2.0))


@FEW
@given(batch=st.integers(2, 6), one=SIZES, other=SIZES, factor=st.floats(0.01, 100), seed=st.integers(0, 99))
def test_relations_do_not_see_scale_rotation_and_place(
    batch: int, one: int, other: int, factor: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(batch, one, generator=generator, dtype=torch.float64)
    t = torch.randn(batch, other, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(one, one, generator=generator, dtype=torch.float64))[0]
    shift = torch.randn(one, generator=generator, dtype=torch.float64)
    for function in (losses.relational_distance, losses.relational_angle):
        assert function(factor * s @ turn + shift, t).item() == pytest.approx(function(s, t).item(), abs=1e-9)
    for function in (losses.similarity_preserving, losses.probabilistic_transfer):
        found = function(s, t).item()
        assert function(factor * s @ turn, t).item() == pytest.approx(found, abs=1e-9)
        assert found >= -1e-6
    assert losses.similarity_preserving(s, t) <= 4 / batch + 1e-12
    assert losses.probabilistic_transfer(s, t) <= math.log(1 + 1e7) / batch


@FEW
@given(channels=st.integers(1, 5), size=st.lists(SIZES, min_size=1, max_size=3), seed=st.integers(0, 99))
def test_attention_does_not_see_the_order_of_channels_nor_scale(channels: int, size: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    s = torch.randn(2, channels, *size, generator=generator, dtype=torch.float64)
    t = torch.randn(2, 3, *(n + 1 for n in size), generator=generator, dtype=torch.float64)
    order = torch.randperm(channels, generator=generator)
    found = losses.attention_transfer(s, t).item()
    assert losses.attention_transfer(-3 * s[:, order], t).item() == pytest.approx(found)
    assert 0 <= found <= 2 / math.prod(size) + 1e-12, "unit vectors without negative entries are at most sqrt(2) apart"


@FEW
@given(
    ours=st.tuples(st.integers(1, 5), st.lists(SIZES, min_size=3, max_size=3)),
    theirs=st.tuples(st.integers(1, 5), st.lists(SIZES, min_size=3, max_size=3)),
    dimensions=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_features_of_any_two_shapes_can_be_compared(ours: tuple, theirs: tuple, dimensions: int, seed: int) -> None:
    """Signals, images, volumes and tokens; any channels and sizes on either side."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (
        torch.randn(3, channels, *size[:dimensions], generator=generator) for channels, size in (ours, theirs)
    )
    for loss, moves in (
        (losses.FitNetsHints(), False),
        (losses.FitNetsHints(channel_dim=-1, batch_norm=True), True),
        (losses.ChannelWiseDistillation("features"), False),
        (losses.AttentionTransfer(), False),
        (losses.AttentionTransfer(channel_dim=-1), True),
        (losses.RelationalDistillation(channel_dim=-1), True),
        (losses.SimilarityPreserving(), False),
        (losses.ProbabilisticTransfer(), False),
        (losses.ContrastiveRepresentation(4, 6, channel_dim=-1), True),
    ):
        sides = [side.movedim(1, -1) if moves else side for side in (student, teacher)]
        leaf = sides[0].clone().requires_grad_()
        adapter = loss.adapt(*([side.shape] for side in sides))
        found = loss(*((leaf, sides[1]) if adapter is None else adapter(leaf, sides[1])), None, 2.0)
        assert torch.isfinite(found)
        assert found >= -1e-6
        (gradient,) = torch.autograd.grad(found, leaf)
        assert torch.isfinite(gradient).all()


def test_similarity_of_points_that_coincide_and_of_zeros() -> None:
    points = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [3.0, 1.0]], requires_grad=True)
    teacher = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    every = (
        losses.relational_distance,
        losses.relational_angle,
        losses.similarity_preserving,
        losses.probabilistic_transfer,
    )
    for function in every:
        for student in (points, torch.zeros(4, 2, requires_grad=True)):
            found = function(student, teacher)
            (gradient,) = torch.autograd.grad(found, student)
            assert torch.isfinite(found)
            assert torch.isfinite(gradient).all()


def test_tokens_are_averaged_over_their_length() -> None:
    s = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    t = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    for make in (losses.RelationalDistillation, losses.ProbabilisticTransfer):
        expected = make()(s.mean(1), t, None, 1.0)
        assert torch.allclose(make(channel_dim=-1)(s, t, None, 1.0), expected)
        assert torch.allclose(make()(s.transpose(1, 2), t, None, 1.0), expected)
    crd = losses.ContrastiveRepresentation(4, 6, channel_dim=-1).eval()
    adapter = crd.adapt([s.shape], [t.shape])
    assert adapter is not None
    flat = adapter(s.mean(1), t)
    assert torch.allclose(crd(*adapter(s, t), None, 1.0), crd(*flat, None, 1.0))


def test_a_dead_layer_has_no_attention_and_a_finite_gradient() -> None:
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    found = losses.attention_transfer(student, torch.randn(2, 5, 4, 4, generator=torch.Generator().manual_seed(0)))
    (gradient,) = torch.autograd.grad(found, student)
    assert found.item() == pytest.approx(1 / 16, rel=1e-5)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def masked(student: list[float], teacher: list[float]) -> tuple[Tensor, Tensor]:
    return torch.tensor([student], requires_grad=True), torch.tensor([teacher])


@pytest.mark.parametrize("direction", ["forward", "reverse", "js"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_classes_are_as_if_they_were_not_there(direction: str, smoothing: float) -> None:
    student, teacher = masked([1.0, -INF, 2.0, -INF], [0.5, -INF, -1.0, -INF])
    options = {"direction": direction, "smoothing": smoothing}
    found = losses.knowledge_distillation(student, teacher, 2.0, **options)
    bare = losses.knowledge_distillation(student[:, [0, 2]], teacher[:, [0, 2]], 2.0, **options)
    assert found.item() == pytest.approx(bare.item())
    (gradient,) = torch.autograd.grad(found, student)
    assert torch.isfinite(gradient).all()
    assert gradient[0, [1, 3]].tolist() == [0, 0]
    assert gradient[0, 0] != 0


def test_what_only_one_side_excludes() -> None:
    student, teacher = masked([1.0, 0.0, 2.0], [0.5, -INF, -1.0])
    found = losses.knowledge_distillation(student, teacher, 1.0)
    assert torch.isfinite(torch.autograd.grad(found, student)[0]).all(), "the teacher may exclude a class"
    assert losses.class_divergence(teacher, student, 1.0).item() == INF, "a student that excludes one is infinitely off"
    assert losses.class_divergence(teacher, student, 1.0, direction="js").item() < math.log(2)


@pytest.mark.parametrize("name", ["logits_mse", "dkd", "multi_label", "noisy_teacher"])
def test_masked_classes_in_other_losses(name: str) -> None:
    student, teacher = masked([1.0, -INF, 2.0, 0.0], [0.5, -INF, -1.0, 3.0])
    keep = [0, 2, 3]
    target = torch.tensor([2])
    loss = CASES[name].make()
    found = loss(student, teacher, target, 2.0)
    assert found.item() == pytest.approx(loss(student[:, keep], teacher[:, keep], torch.tensor([1]), 2.0).item())
    (gradient,) = torch.autograd.grad(found, student)
    assert torch.isfinite(gradient).all()
    assert gradient[0, 1] == 0


def test_decoupled_distillation_with_one_class_left() -> None:
    student, teacher = masked([1.0, -INF, -INF], [0.5, -INF, -INF])
    found = losses.decoupled_distillation(student, teacher, torch.tensor([0]), 2.0)
    assert found == 0
    assert torch.autograd.grad(found, student)[0].tolist() == [[0, 0, 0]]


def test_noise_keeps_masked_classes_masked() -> None:
    logits = torch.tensor([[1.0, -INF]]).repeat(500, 1)
    noisy = losses.noisy_logits(logits, 5.0, 1.0, torch.Generator().manual_seed(0))
    assert (noisy[:, 1] == -INF).all()
    assert torch.isfinite(noisy[:, 0]).all()


def test_two_classes_have_no_other_classes_to_compare() -> None:
    s, t = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 1, 1, 0])
    assert losses.decoupled_distillation(s, t, target, 2.0, alpha=0.0, beta=1.0).item() == pytest.approx(0, abs=1e-6)


def test_score_maps_of_another_size_are_resized_to_the_teachers() -> None:
    s = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    large = torch.nn.functional.interpolate(s, (8, 8), mode="bilinear", align_corners=False)
    for loss in (losses.KnowledgeDistillation(), losses.ChannelWiseDistillation(), losses.RegressionDistillation()):
        assert loss.adapt([s.shape], [t.shape]) is None
        assert torch.equal(loss(s, t, None, 2.0), loss(large, t, None, 2.0))


def test_a_hotter_teacher_is_nearer_to_a_flat_student() -> None:
    t = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = [losses.class_divergence(torch.zeros_like(t), t, heat).sum().item() for heat in (0.5, 1.0, 2.0, 8.0)]
    assert all(one > other for one, other in pairwise(found))
