"""Where gradients flow, that they are right, and that half precision does not spoil them."""

import pytest
import torch
from loss_cases import CASES
from torch import Tensor

from lightning_compress.distillation import losses
from lightning_compress.distillation.adapters import Adapters, as_tuple
from lightning_compress.distillation.losses import DistillationLoss

ADAPTED = ("cwd_features", "hint", "hint_tokens", "crd", "crd_nce")
PLAIN = [name for name in CASES if name not in ADAPTED]
ZERO_AT_EQUALITY = [
    name
    for name, case in CASES.items()
    if case.teacher and name not in ("bounded_regression", "kd_reverse", "crd", "crd_nce")
]


def build(name: str, batch: int = 4, dtype: torch.dtype = torch.float64) -> tuple[DistillationLoss, Adapters, tuple]:
    case = CASES[name]
    loss, inputs = case.make(), case.inputs(batch, dtype)
    shapes = [[tensor.shape for tensor in as_tuple(side)] for side in inputs[:2]]
    adapter = loss.adapt(*shapes)
    same = Adapters([None] * len(shapes[0]), [None] * len(shapes[1]))
    return loss, (same if adapter is None else adapter).to(dtype), inputs


def value(loss: DistillationLoss, adapter: Adapters, inputs: tuple) -> Tensor:
    return loss(*adapter(*inputs[:2]), inputs[2], 2.0)


@pytest.mark.parametrize("name", CASES)
def test_gradient_reaches_the_student_and_nothing_else(name: str) -> None:
    loss, adapter, inputs = build(name)
    ours, theirs = as_tuple(inputs[0]), as_tuple(inputs[1])
    for tensor in (*ours, *theirs):
        tensor.requires_grad_()
    before = [tensor.detach().clone() for tensor in theirs]
    found = value(loss, adapter, inputs)
    assert found.shape == ()
    assert torch.isfinite(found)
    found.backward()
    taught = ours[:-1] if name == "byot" else ours  # the deepest head teaches
    for tensor in taught:
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
        assert tensor.grad.abs().sum() > 0
    assert all(tensor.grad is None for tensor in theirs)
    assert all(torch.equal(now, then) for now, then in zip(theirs, before, strict=True))
    assert all(parameter.grad is not None for parameter in adapter.parameters())
    if name == "byot":
        assert ours[-1].grad is None


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.teacher])
def test_a_teacher_may_answer_in_inference_mode(name: str) -> None:
    loss, adapter, (student, teacher, target) = build(name)
    expected = value(loss.eval(), adapter, (student, teacher, target))
    with torch.inference_mode():
        answer = tuple(tensor * 1 for tensor in as_tuple(teacher))
    for tensor in as_tuple(student):
        tensor.requires_grad_()
    found = value(loss, adapter, (student, answer if isinstance(teacher, tuple) else answer[0], target))
    found.backward()
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    loss, adapter, inputs = build(name, batch=3)
    loss.eval()  # queues stay, no noise
    ours = as_tuple(inputs[0])

    def function(*student: Tensor) -> Tensor:
        side = student[0] if len(student) == 1 else student
        if name in ("byot", "dml"):  # constants in a student's own loss, so only one side may move
            side = (student[0], *(tensor.detach() for tensor in student[1:]))
        if name == "dml":
            return losses.mutual_learning(side, 2.0)[0]
        return value(loss, adapter, (side, *inputs[1:]))

    for tensor in ours[: 1 if name in ("byot", "dml") else None]:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(function, ours)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PLAIN)
def test_half_precision_inputs_give_the_float32_result(name: str, dtype: torch.dtype) -> None:
    """Exactly the value of the widened inputs, also under autocast: only the inputs are rounded."""
    loss, adapter, wide = build(name, dtype=torch.float32)
    assert not list(adapter.parameters())

    def round_to(side: object, to: torch.dtype) -> object:
        if isinstance(side, tuple):
            return tuple(tensor.to(to) for tensor in side)
        return side.to(to) if isinstance(side, Tensor) and side.is_floating_point() else side

    narrow = [round_to(side, dtype) for side in wide]
    rounded = [round_to(side, torch.float32) for side in narrow]
    expected = loss(*rounded, 2.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(*narrow, 2.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ADAPTED)
def test_an_adapter_in_half_precision_gives_a_loss_in_float32(name: str) -> None:
    loss, adapter, inputs = build(name, dtype=torch.float32)
    loss = loss.float().eval()
    expected = value(loss, adapter, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value(loss, adapter, inputs)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=0.05)


@pytest.mark.parametrize("name", CASES)
def test_training_on_a_loss_lowers_it(name: str) -> None:
    """The student's tensors themselves are trained; a bounded or random part may stay."""
    loss, adapter, inputs = build(name, batch=6)
    loss.eval()
    ours = [tensor.requires_grad_() for tensor in as_tuple(inputs[0])]
    optimizer = torch.optim.Adam([*ours, *adapter.parameters()], lr=0.05)
    first = value(loss, adapter, inputs).item()
    for _ in range(40):
        optimizer.zero_grad()
        value(loss, adapter, inputs).backward()
        optimizer.step()
    assert value(loss, adapter, inputs).item() < 0.9 * first


@pytest.mark.parametrize("name", ZERO_AT_EQUALITY)
def test_a_student_that_equals_the_teacher_has_nothing_to_learn(name: str) -> None:
    loss, _, (_, teacher, target) = build(name)
    student = tuple(tensor.clone().requires_grad_() for tensor in as_tuple(teacher))
    found = loss(student if isinstance(teacher, tuple) else student[0], teacher, target, 2.0)
    assert found.item() == pytest.approx(0, abs=1e-12)
    for gradient in torch.autograd.grad(found, student):
        assert gradient.abs().max() < 1e-7
