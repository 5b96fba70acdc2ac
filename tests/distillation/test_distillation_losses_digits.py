"""Real data: a student that never sees a label learns the digits from what a loss makes of a trained teacher."""

from functools import cache

import pytest
import torch
from loss_cases import CASES
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_compress.distillation import losses
from lightning_compress.distillation.adapters import Adapters
from lightning_compress.distillation.losses import DistillationLoss


class Net(nn.Module):
    """Two convolutions and a head; returns the score, and both feature maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, padding=1, stride=2)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        one = self.first(images).relu()
        two = self.second(one).relu()
        return self.head(two.amax((2, 3))), one, two


@cache
def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images).float().reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order[:1200]], y[order[:1200]], x[order[1200:]], y[order[1200:]]


def fit(net: nn.Module, extra: list[nn.Parameter], objective: object, steps: int, seed: int) -> None:
    x, y, _, _ = data()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([*net.parameters(), *extra], lr=2e-2)
    for _ in range(steps):
        rows = torch.randint(0, len(x), (64,), generator=generator)
        optimizer.zero_grad()
        objective(x[rows], y[rows]).backward()  # type: ignore[operator]
        optimizer.step()


@cache
def teacher() -> Net:
    torch.manual_seed(0)
    net = Net(16)
    fit(net, [], lambda x, y: nn.functional.cross_entropy(net(x)[0], y), 250, 0)
    return net.eval()


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return float((scores.argmax(1) == labels).double().mean())


def distilled(loss: DistillationLoss, steps: int) -> tuple[Net, float, float]:
    """Return a student trained by the loss alone, and the loss on test data before and after."""
    torch.manual_seed(1)
    student, known = Net(12), teacher()
    features = loss.on == "features"

    def sides(x: Tensor) -> tuple:
        mine = student(x)
        with torch.no_grad():
            theirs = known(x)
        return (mine[1:], theirs[1:]) if features else (mine[0], theirs[0])

    pair = loss.most_pairs == 1 and features
    shapes = [[part.shape for part in (side if features else (side,))] for side in sides(data()[0][:2])]
    shapes = [side[1:] for side in shapes] if pair else shapes
    adapter = loss.adapt(*shapes) or Adapters([None] * len(shapes[0]))

    def value(x: Tensor, y: Tensor) -> Tensor:
        mine, theirs = sides(x)
        return loss(*adapter(*((mine[1], theirs[1]) if pair else (mine, theirs))), y, 4.0)

    def tested() -> float:
        with torch.no_grad():
            return float(value(*(part[:128] for part in data()[2:])))

    loss.eval()
    before = tested()
    loss.train()
    fit(student, list(adapter.parameters()), value, steps, 1)
    loss.eval()
    return student, before, tested()


def slow(*names: str) -> list[object]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize(
    "name", ["kd", *slow("kd_reverse", "kd_js", "logits_mse", "noisy_teacher", "multi_label", "regression")]
)
def test_a_student_without_labels_learns_from_outputs(name: str) -> None:
    student, before, after = distilled(CASES[name].make(), 250)
    _, _, x, y = data()
    with torch.no_grad():
        taught, known = accuracy(student(x)[0], y), accuracy(teacher()(x)[0], y)
    assert known > 0.92
    assert taught > known - (0.04 if name.startswith("kd") else 0.12)
    assert after < before / 2


@pytest.mark.parametrize("name", slow("hint", "at", "sp", "rkd", "pkt", "crd"))
def test_features_approach_the_teachers_on_data_not_trained_on(name: str) -> None:
    loss = losses.ContrastiveRepresentation(16, 64) if name == "crd" else CASES[name].make()
    _, before, after = distilled(loss, 120)
    assert after < 0.85 * before
