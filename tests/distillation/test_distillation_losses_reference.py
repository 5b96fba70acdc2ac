"""Every loss against loops in numpy written from the papers, and by hand."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_compress.distillation import losses

N, C, T = 6, 4, 3.0
Array = np.ndarray


def draw(*shape: int, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, *shape, generator=generator, dtype=torch.float64).mul(scale).unbind())  # type: ignore[return-value]


def softmax(row: Array) -> Array:
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def kl(p: Array, q: Array) -> float:
    return sum(float(a) * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def test_knowledge_distillation() -> None:
    s, t = draw(N, C)
    rows = list(zip(s.numpy(), t.numpy(), strict=True))
    forward = [kl(softmax(b / T), softmax(a / T)) for a, b in rows]
    assert losses.class_divergence(s, t, T).tolist() == pytest.approx(forward)
    assert losses.knowledge_distillation(s, t, T).item() == pytest.approx(T * T * np.mean(forward))
    reverse = [kl(softmax(a / T), softmax(b / T)) for a, b in rows]
    assert losses.class_divergence(s, t, T, direction="reverse").tolist() == pytest.approx(reverse)
    pairs = [(softmax(a / T), softmax(b / T)) for a, b in rows]
    js = [(kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2 for p, q in pairs]
    assert losses.class_divergence(s, t, T, direction="js").tolist() == pytest.approx(js)


def test_label_noise_is_mixed_into_the_teacher() -> None:
    s, t = draw(N, C)
    found = losses.class_divergence(s, t, T, smoothing=0.2)
    expected = [kl(0.8 * softmax(b / T) + 0.2 / C, softmax(a / T)) for a, b in zip(s.numpy(), t.numpy(), strict=True)]
    assert found.tolist() == pytest.approx(expected)


def test_pixels_and_tokens_are_samples() -> None:
    s, t = draw(2, C, 3, 5)
    labels = torch.randint(0, 3, (2, 3, 5), generator=torch.Generator().manual_seed(1))
    every, counted = [], []
    for n, i, j in np.ndindex(2, 3, 5):
        value = kl(softmax(t[n, :, i, j].numpy() / T), softmax(s[n, :, i, j].numpy() / T))
        every.append(value)
        if labels[n, i, j] != 2:
            counted.append(value)
    assert 0 < len(counted) < len(every)
    assert losses.KnowledgeDistillation()(s, t, labels, T).item() == pytest.approx(T * T * np.mean(every))
    masked = losses.KnowledgeDistillation(ignore_index=2)
    assert masked(s, t, labels, T).item() == pytest.approx(T * T * np.mean(counted))
    tokens = losses.KnowledgeDistillation(class_dim=-1, ignore_index=2)
    last = [side.flatten(2).transpose(1, 2) for side in (s, t)]
    assert tokens(*last, labels.flatten(1), T).item() == pytest.approx(T * T * np.mean(counted))


@pytest.mark.parametrize("temperature", [1e2, 1e3, 1e4])
def test_hot_distillation_is_half_of_matching_centered_logits(temperature: float) -> None:
    s, t = (side.requires_grad_() for side in draw(N, C))
    hot = losses.knowledge_distillation(s, t, temperature)
    cold = losses.logits_mse(s, t, center=True) / 2
    assert hot.item() == pytest.approx(cold.item(), rel=20 / temperature)
    hot_grad, cold_grad = torch.autograd.grad(hot, s)[0], torch.autograd.grad(cold, s)[0]
    assert torch.allclose(hot_grad, cold_grad, rtol=0, atol=20 / temperature * cold_grad.abs().max())
    by_hand = (s - s.mean(1, keepdim=True) - t + t.mean(1, keepdim=True)) / (N * C)  # Hinton et al., equation 4
    assert torch.allclose(cold_grad, by_hand)


def test_logits_mse() -> None:
    s, t = draw(N, C)
    assert losses.logits_mse(s, t).item() == pytest.approx(np.mean((s.numpy() - t.numpy()) ** 2))
    a, b = (side.numpy() - side.numpy().mean(1, keepdims=True) for side in (s, t))
    assert losses.logits_mse(s, t, center=True).item() == pytest.approx(np.mean((a - b) ** 2))


def test_noisy_teacher_multiplies_chosen_samples() -> None:
    logits = torch.full((2000, 10), 2.0, dtype=torch.float64)
    noisy = losses.noisy_logits(logits, 0.3, 0.25, torch.Generator().manual_seed(0))
    changed = (noisy != logits).any(1)
    assert changed.double().mean().item() == pytest.approx(0.25, abs=0.03)
    factors = noisy[changed] / 2
    assert factors.mean().item() == pytest.approx(1.0, abs=0.02)
    assert factors.std().item() == pytest.approx(0.3, abs=0.02)
    again = losses.noisy_logits(logits, 0.3, 0.25, torch.Generator().manual_seed(0))
    assert torch.equal(noisy, again)


def test_decoupled_distillation() -> None:
    s, t = draw(N, C)
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    total = 0.0
    for a, b, y in zip(s.numpy(), t.numpy(), target.tolist(), strict=True):
        p, q = softmax(b / T), softmax(a / T)
        others = [c for c in range(C) if c != y]
        total += 1.5 * kl(np.array([p[y], 1 - p[y]]), np.array([q[y], 1 - q[y]]))
        total += 0.5 * kl(p[others] / p[others].sum(), q[others] / q[others].sum())
    found = losses.decoupled_distillation(s, t, target, T, alpha=1.5, beta=0.5)
    assert found.item() == pytest.approx(T * T * total / N)


def test_decoupled_parts_add_up_to_soft_targets() -> None:
    """KL = TCKD + (1 - p_y) NCKD, sample by sample."""
    s, t = draw(N, C, seed=3)
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    for n in range(N):
        one = (s[n : n + 1], t[n : n + 1])
        sure = softmax(one[1].numpy()[0] / T)[target[n]]
        parts = losses.decoupled_distillation(*one, target[n : n + 1], T, alpha=1.0, beta=1 - float(sure))
        assert parts.item() == pytest.approx(losses.knowledge_distillation(*one, T).item())


def test_decoupled_distillation_of_pixels_leaves_ignored_ones_out() -> None:
    s, t = draw(2, C, 3)
    target = torch.tensor([[0, 255, 1], [3, 2, 255]])
    keep = target != 255
    rows = [side.transpose(1, 2)[keep] for side in (s, t)]
    found = losses.DecoupledDistillation(ignore_index=255)(s, t, target, T)
    assert found.item() == pytest.approx(losses.decoupled_distillation(*rows, target[keep], T).item())


def test_multi_label_distillation() -> None:
    s, t = draw(N, C)
    p, q = (1 / (1 + np.exp(-side.numpy() / T)) for side in (t, s))
    total = sum(kl(np.array([a, 1 - a]), np.array([b, 1 - b])) for a, b in zip(p.flatten(), q.flatten(), strict=True))
    assert losses.multi_label_distillation(s, t, T).item() == pytest.approx(T * T * total / N)
    two = torch.stack([s[:, 0], torch.zeros(N)], 1), torch.stack([t[:, 0], torch.zeros(N)], 1)
    one = losses.multi_label_distillation(s[:, 0], t[:, 0], T)
    assert one.item() == pytest.approx(losses.knowledge_distillation(*two, T).item())


def test_regression() -> None:
    s, t = draw(N, 2)
    d = s.numpy() - t.numpy()
    huber = np.where(np.abs(d) <= 0.5, d**2 / 2, 0.5 * (np.abs(d) - 0.25))
    for kind, expected in (("mse", d**2), ("l1", np.abs(d)), ("huber", huber)):
        assert losses.regression_distillation(s, t, kind, 0.5).item() == pytest.approx(expected.mean())


def test_bounded_regression_leaves_a_better_student_in_peace() -> None:
    target = torch.zeros(3, 1, dtype=torch.float64)
    student = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.full((3, 1), 2.0, dtype=torch.float64)
    found = losses.bounded_regression(student, teacher, target, margin=0.0)
    assert found.item() == pytest.approx(9 / 3)  # 1 < 4 and 4 = 4 are free, 9 > 4 counts
    found.backward()
    assert student.grad is not None
    assert student.grad.flatten().tolist() == pytest.approx([0, 0, 2])
    assert losses.bounded_regression(student, teacher, target, margin=0.5).item() == pytest.approx((4 + 9) / 3)
    assert losses.bounded_regression(student, teacher, target, margin=3.5).item() == pytest.approx((1 + 4 + 9) / 3)


def test_channel_wise_distillation() -> None:
    s, t = draw(N, C, 3, 2)
    total = 0.0
    for n, c in np.ndindex(N, C):
        total += kl(softmax(t[n, c].numpy().flatten() / T), softmax(s[n, c].numpy().flatten() / T))
    assert losses.channel_wise_distillation(s, t, T).item() == pytest.approx(T * T * total / (N * C))


def test_hint() -> None:
    s, t = draw(N, C, 2, 2)
    assert losses.hint(s, t).item() == pytest.approx(np.mean((s.numpy() - t.numpy()) ** 2))
    large, _ = draw(N, C, 4, 6)
    shrunk = large.numpy().reshape(N, C, 2, 2, 2, 3).mean((3, 5))
    assert losses.hint(large, t).item() == pytest.approx(np.mean((shrunk - t.numpy()) ** 2))


def test_attention_transfer() -> None:
    s, t = draw(N, C, 3, 3)
    t = t[:, :2]
    difference = []
    for n in range(N):
        maps = [np.abs(side[n].numpy() ** 2).mean(0).flatten() for side in (s, t)]
        difference.append((maps[0] / np.linalg.norm(maps[0]) - maps[1] / np.linalg.norm(maps[1])) ** 2)
    assert losses.attention_transfer(s, t).item() == pytest.approx(np.mean(difference))
    tokens = [side.flatten(2).transpose(1, 2) for side in (s, t)]
    assert losses.attention_transfer(*tokens, channel_dim=-1).item() == pytest.approx(np.mean(difference))


def test_attention_transfer_averages_the_larger_map() -> None:
    s, _ = draw(N, C, 4, 4)
    small, _ = draw(N, C, 2, 2, seed=1)
    shrunk = (s.square().mean(1).reshape(N, 2, 2, 2, 2).mean((2, 4))).sqrt().unsqueeze(1)
    assert torch.allclose(losses.attention_transfer(s, small), losses.attention_transfer(shrunk, small))
    assert torch.allclose(losses.attention_transfer(small, s), losses.attention_transfer(small, shrunk))


def test_flow_distillation() -> None:
    (a, x), (b, y), (c, z) = draw(N, 2, 4, 4), draw(N, 3, 2, 2, seed=1), draw(N, 5, 2, 2, seed=2)

    def flow(first: Tensor, second: Tensor) -> Array:
        if first.shape[2:] != second.shape[2:]:
            first = first.reshape(N, -1, 2, 2, 2, 2).mean((3, 5))
        return np.einsum("nihw,njhw->nij", first.numpy(), second.numpy()) / 4

    expected = np.mean((flow(a, b) - flow(x, y)) ** 2) + np.mean((flow(b, c) - flow(y, z)) ** 2)
    assert losses.flow_distillation((a, b, c), (x, y, z)).item() == pytest.approx(expected)


def test_similarity_preserving() -> None:
    s, t = draw(N, C, 2, 2)
    t = t[:, :1]
    grams = []
    for side in (s, t):
        rows = side.numpy().reshape(N, -1)
        gram = rows @ rows.T
        grams.append(gram / np.linalg.norm(gram, axis=1, keepdims=True))
    expected = np.linalg.norm(grams[0] - grams[1]) ** 2 / N**2
    assert losses.similarity_preserving(s, t).item() == pytest.approx(expected)


def smooth(value: float) -> float:
    return value**2 / 2 if abs(value) < 1 else abs(value) - 0.5


def test_relational_distillation() -> None:
    s, t = draw(N, C)
    s = s[:, :2]
    distances, angles = [], []
    for side in (s.numpy(), t.numpy()):
        length = np.array([[np.linalg.norm(a - b) for b in side] for a in side])
        distances.append(length / length[length > 0].mean())
        cosine = np.zeros((N, N, N))
        for i, j, k in np.ndindex(N, N, N):
            if i != j and k != j:
                cosine[i, j, k] = (side[i] - side[j]) @ (side[k] - side[j]) / length[i, j] / length[k, j]
        angles.append(cosine)
    by_distance = np.mean([smooth(d) for d in (distances[0] - distances[1]).flatten()])
    by_angle = np.mean([smooth(d) for d in (angles[0] - angles[1]).flatten()])
    assert losses.relational_distance(s, t).item() == pytest.approx(by_distance)
    assert losses.relational_angle(s, t).item() == pytest.approx(by_angle)
    both = losses.RelationalDistillation(2.0, 3.0)(s, t, None, 1.0)
    assert both.item() == pytest.approx(2 * by_distance + 3 * by_angle)


def test_probabilistic_transfer() -> None:
    s, t = draw(N, C)
    s = s[:, :3]
    kernels = []
    for side in (s.numpy(), t.numpy()):
        unit = side / np.linalg.norm(side, axis=1, keepdims=True)
        kernel = (unit @ unit.T + 1) / 2
        kernels.append(kernel / kernel.sum(1, keepdims=True))
    q, p = kernels
    expected = np.mean(p * np.log((p + 1e-7) / (q + 1e-7)))
    assert losses.probabilistic_transfer(s, t).item() == pytest.approx(expected)


def test_contrast() -> None:
    a, p = (torch.nn.functional.normalize(side) for side in draw(N, C))
    negatives = torch.nn.functional.normalize(draw(5, C, seed=1)[0])
    tau, labels = 0.5, [0, 0, 1, 1, 2, 2]
    theirs = [*labels, -1, 0, 1, 2, -1]
    info, nce = [], []
    noise = 5 / 50
    for i in range(N):
        positive = math.exp(float(a[i] @ p[i]) / tau)
        others = [math.exp(float(a[i] @ b) / tau) for b in [*p, *negatives]]
        counted = [value for k, value in enumerate(others) if k != i and theirs[k] != labels[i]]
        info.append(-math.log(positive / (positive + sum(counted))))
        far = [value for k, value in enumerate(others) if k >= N and theirs[k] != labels[i]]
        nce.append(-math.log(positive / (positive + noise)) - sum(math.log(1 - v / (v + noise)) for v in far))
    allowed = torch.tensor(labels).unsqueeze(1) != torch.tensor(theirs)
    assert losses.info_nce(a, p, negatives, tau, allowed).item() == pytest.approx(np.mean(info))
    found = losses.contrastive_nce(a, p, negatives, tau, 50, allowed[:, N:])
    assert found.item() == pytest.approx(np.mean(nce))


def test_mutual_learning() -> None:
    generator = torch.Generator().manual_seed(0)
    peers = tuple(torch.randn(3, N, C, generator=generator, dtype=torch.float64).unbind())
    found = losses.mutual_learning(peers, 2.0)
    for k, value in enumerate(found):
        each = [
            np.mean([kl(softmax(b / 2), softmax(a / 2)) for a, b in zip(peers[k].numpy(), other.numpy(), strict=True)])
            for place, other in enumerate(peers)
            if place != k
        ]
        assert value.item() == pytest.approx(4 * np.mean(each))
    assert losses.MutualLearning()(peers, (), None, 2.0).item() == pytest.approx(sum(v.item() for v in found))


def test_self_distillation() -> None:
    shallow, deep = draw(N, C)
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    soft = [kl(softmax(b / T), softmax(a / T)) for a, b in zip(shallow.numpy(), deep.numpy(), strict=True)]
    hard = [-math.log(softmax(a)[y]) for a, y in zip(shallow.numpy(), target.tolist(), strict=True)]
    found = losses.self_distillation((shallow, deep), target, T, hard=0.5)
    assert found.item() == pytest.approx(T * T * np.mean(soft) + 0.5 * np.mean(hard))
