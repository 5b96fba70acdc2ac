"""The mixture prior against autograd and arithmetic, and the callback on weights whose clusters are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.distributions import Categorical, Gamma, MixtureSameFamily, Normal
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_compress import ConfigurationError, Schedule, SoftWeightSharing, WeightSharing, compress
from lightning_compress.quantization.binary.functions import loss_aware_scale
from lightning_compress.quantization.soft_sharing.mixture import (
    PRECISION,
    ZERO_PRECISION,
    Mixture,
    adam_step,
    assign,
    initial_mixture,
    merge,
    precision_pull,
    pull,
)


def mixture() -> Mixture:
    sigmas = torch.tensor([0.1, 0.2, 0.3, 0.15], dtype=torch.float64)
    means, logits = torch.tensor([-0.7, 0.4, 1.0]).double(), torch.tensor([0.3, -0.2, 0.1]).double()
    return Mixture(means, sigmas.log(), logits, 0.9)


def prior(learnt: Mixture) -> MixtureSameFamily:
    shares = torch.cat([torch.tensor([learnt.zero], dtype=torch.float64), (1 - learnt.zero) * learnt.logits.softmax(0)])
    centres = torch.cat([torch.zeros(1).double(), learnt.means])
    return MixtureSameFamily(Categorical(shares), Normal(centres, learnt.log_sigmas.exp()))


def test_pull_equals_autograd() -> None:
    learnt = mixture()
    values = torch.randn(500, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    for tensor in (learnt.means, learnt.log_sigmas, learnt.logits):
        tensor.requires_grad_()
    loss = -prior(learnt).log_prob(values).sum()
    expected = torch.autograd.grad(loss, (values, learnt.means, learnt.log_sigmas, learnt.logits))
    found = pull(values.detach(), mixture())
    assert float(found.loss) == pytest.approx(float(loss.detach()), rel=1e-12)
    for one, other in zip(found[1:], expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


def test_pull_of_many_goes_in_pieces() -> None:
    values = torch.randn(600_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole, parts = pull(values, mixture()), [pull(part, mixture()) for part in values.split(200_000)]
    assert float(whole.loss) == pytest.approx(sum(float(part.loss) for part in parts))
    assert torch.allclose(whole.values, torch.cat([part.values for part in parts]))
    assert torch.allclose(whole.means, sum(part.means for part in parts))


class NoReads(TorchDispatchMode):
    """Refuse to read values, for which a GPU would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_each_step_reads_no_value() -> None:
    values, curvature = torch.randn(50).double(), torch.rand(50).double()
    with NoReads():
        found = pull(values, mixture())
        scale = loss_aware_scale(values, curvature)
    assert found.values.shape == values.shape
    assert torch.equal(scale, (curvature * values.abs()).sum() / curvature.sum())


def test_precision_pull_equals_autograd() -> None:
    learnt = mixture()
    learnt.log_sigmas.requires_grad_()
    precision = (-2 * learnt.log_sigmas).exp()
    loss = -Gamma(*(torch.tensor(x).double() for x in ZERO_PRECISION)).log_prob(precision[0])
    loss = loss - Gamma(*(torch.tensor(x).double() for x in PRECISION)).log_prob(precision[1:]).sum()
    (expected,) = torch.autograd.grad(loss, learnt.log_sigmas)
    assert torch.allclose(precision_pull(mixture()), expected)


def test_adam_equals_torch() -> None:
    learnt, moments = mixture(), {}
    parameters = [nn.Parameter(t.clone()) for t in (learnt.means, learnt.log_sigmas, learnt.logits)]
    theirs = torch.optim.Adam(parameters, lr=0.01)
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        gradients = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        theirs.step()
        learnt = adam_step(learnt, gradients, moments, 0.01)
    for one, other in zip((learnt.means, learnt.log_sigmas, learnt.logits), parameters, strict=True):
        assert torch.allclose(one, other.detach(), atol=1e-12)


def test_pull_of_one_component_by_hand() -> None:
    # nearly all of the weight 1.1 is made by N(1, 0.1^2): it is drawn by (1.1 - 1)/0.01 = 10
    learnt = Mixture(torch.tensor([1.0, -1.0]).double(), torch.full((3,), 0.1).double().log(), torch.zeros(2), 0.5)
    assert pull(torch.tensor([1.1]), learnt).values.item() == pytest.approx(10, rel=1e-6)


def test_merge_by_hand() -> None:
    # 0 and 0.1 of variance 1 and shares 1 : 3 become 0.075 with variance 1 + 0.25 * 0.75 * 0.01; divergence 0.005
    learnt = Mixture(torch.tensor([0.1, 0.0, 5.0]), torch.zeros(4), torch.tensor([3.0, 1.0, 4.0]).log(), 0.9)
    assert len(merge(learnt, 0.004).means) == 3
    merged = merge(learnt, 0.006)
    assert merged.means.tolist() == pytest.approx([0.075, 5.0])
    assert (2 * merged.log_sigmas).exp().tolist() == pytest.approx([1, 1.001875, 1])
    assert merged.logits.softmax(0).tolist() == pytest.approx([0.5, 0.5])
    assert len(merge(learnt, 1e9).means) == 1


def test_assign_by_hand() -> None:
    # 0.5 from N(0, 1) with share 0.9 against N(1, 1) with 0.1: zero; at 4 the other is e^3.5/9 times as likely
    learnt = Mixture(torch.tensor([1.0]), torch.zeros(2), torch.zeros(1), 0.9)
    assert assign(torch.tensor([0.5, 4.0, -1.0]), learnt).tolist() == [-1, 0, -1]


def test_initial_mixture_spans_the_weights() -> None:
    learnt = initial_mixture(torch.tensor([-1.0, 3.0]), 5, 0.99)
    assert learnt.means.tolist() == [-1, 0, 1, 2, 3]
    assert learnt.log_sigmas.exp().tolist() == pytest.approx([0.25] * 6)
    assert initial_mixture(torch.zeros(4), 2, 0.9).means.diff().item() > 0
    with pytest.raises(ConfigurationError, match="NaN or infinite"):
        initial_mixture(torch.tensor([float("nan")]), 5, 0.99)


X = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
TRUE = torch.tensor([[0.5, 0.0, 0.0, -0.5, 0.0, 0.0, 0.5, 0.0], [0.0, 0.0, -0.5, 0.0, 0.5, 0.0, 0.0, -0.5]])


class Regression(LightningModule):
    """Targets made by weights of -0.5, 0 and 0.5; starts near them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2, bias=False)
        noise = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
        self.layer.weight.data = TRUE + 0.05 * noise

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.mse_loss(self.layer(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.005)

    def train_dataloader(self) -> Any:
        noise = 0.3 * torch.randn(96, 2, generator=torch.Generator().manual_seed(3))
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, X @ TRUE.T + noise), batch_size=32)


def fit(model: LightningModule, *callbacks: Any, epochs: int = 30) -> LightningModule:
    seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    Trainer(max_epochs=epochs, callbacks=list(callbacks), enable_progress_bar=False, **quiet).fit(model)
    return model


def test_finds_the_values_that_made_the_targets() -> None:
    callback = SoftWeightSharing(1e-3, components=8, zero=0.7, rate=1e-2, divergence=0.5)
    model = fit(Regression(), callback)
    weight = model.layer.weight.detach()
    assert torch.equal(weight == 0, TRUE == 0)
    assert len(weight.unique()) <= 5
    assert float((weight - TRUE).abs().max()) < 0.15
    assert callback.history[-1]["zeros"] == float((TRUE == 0).float().mean())
    assert callback.history[-1]["clusters"] <= 4


def test_without_strength_only_the_end_changes_weights() -> None:
    plain = fit(Regression(), epochs=5)
    shared = fit(Regression(), SoftWeightSharing(0.0, components=4, schedule=Schedule(1.0, end="100%")), epochs=5)
    assert len(plain.layer.weight.unique()) == 16
    assert len(shared.layer.weight.unique()) <= 5


class Deep(Regression):
    """Two layers, with the optimizers that a test gives it."""

    def __init__(self, *trained: tuple[str, ...]) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
        self.trained = trained
        self.automatic_optimization = len(trained) == 1

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
        return None

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam([self.get_parameter(name) for name in names], lr=0.01) for names in self.trained]


@pytest.mark.parametrize(
    ("trained", "how"),
    [
        ((("layer.0.weight",), ("layer.1.weight",)), "another optimizer than"),
        ((("layer.0.weight",),), "no optimizer, unlike"),
    ],
)
def test_a_mixture_that_cannot_move_as_one_is_refused_before_training(trained: Any, how: str) -> None:
    model = Deep(*trained)
    message = rf"'layer\.1\.weight' is trained by {how} other weights of its codebook 'mixture'.*by `select` or freeze"
    with pytest.raises(ConfigurationError, match=message) as caught:
        fit(model, SoftWeightSharing(1e-4), epochs=2)
    assert model.trainer.global_step == 0
    assert "scope" not in str(caught.value)
    model = Deep(*trained)
    model.layer[1].requires_grad_(False)
    model.automatic_optimization = True
    model.trained = trained[:1]
    assert len(fit(model, SoftWeightSharing(1e-4), epochs=2).layer[0].weight.unique()) <= 17


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SoftWeightSharing(-1.0), "`strength` must be a number of at least 0, got -1.0"),
        (lambda: SoftWeightSharing(1.0, components=1), "`components` must be an int >= 2, got 1"),
        (lambda: SoftWeightSharing(1.0, zero=1.0), "`zero` must be a number between 0 and 1, got 1.0"),
        (lambda: SoftWeightSharing(1.0, rate="fast"), "`rate` must be a number of at least 0, got 'fast'"),
        (lambda: SoftWeightSharing(1.0, divergence=-1), "`divergence` must be a number of at least 0"),
        (lambda: SoftWeightSharing(1.0, schedule=Schedule(1.0, shape="once")), "`schedule` must rise"),
        (lambda: SoftWeightSharing(1.0, schedule=Schedule(0.5)), "`schedule` must rise"),
        (lambda: compress(Regression(), SoftWeightSharing(1.0)), "works only while a model trains"),
        (lambda: fit(Regression(), SoftWeightSharing(1.0), WeightSharing(1)), "change the same weights"),
    ],
)
def test_errors(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build()
