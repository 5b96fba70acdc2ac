"""What a wrapper relies on: pairs and shapes are checked, seeds decide, state resumes, copies are equal."""

import copy
import inspect
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from loss_cases import CASES
from torch import Tensor

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.distillation import losses
from lightning_compress.distillation.adapters import as_tuple
from lightning_compress.distillation.losses import DistillationLoss

CLASSES = [getattr(losses, name) for name in losses.__all__ if isinstance(getattr(losses, name), type)]
MODULES = [cls for cls in CLASSES if cls is not DistillationLoss]


def shapes(name: str, batch: int = 4) -> list[list[torch.Size]]:
    return [[part.shape for part in as_tuple(side)] for side in CASES[name].inputs(batch)[:2]]


def test_every_loss_has_a_case_and_a_name_of_its_own() -> None:
    assert {type(case.make()) for case in CASES.values()} == set(MODULES)
    assert len({cls.name for cls in MODULES}) == len(MODULES) == 17


@pytest.mark.parametrize("name", CASES)
def test_adapters_depend_on_seed_and_shapes_only(name: str) -> None:
    given = shapes(name)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = CASES[name].make()
    first = one.adapt(*given)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    other = CASES[name].make()
    second = other.adapt(*given)
    assert (first is None) == (second is None)
    for state, again in ((one, other), *([] if first is None or second is None else [(first, second)])):
        for mine, theirs in zip(state.parameters(), again.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        for mine, theirs in zip(state.buffers(), again.buffers(), strict=True):
            assert torch.equal(mine, theirs)
    if first is not None and list(first.parameters()):
        other.seed = 1
        changed = other.adapt(*given)
        assert changed is not None
        assert not torch.equal(next(first.parameters()), next(changed.parameters()))


@pytest.mark.parametrize("name", CASES)
def test_copies_are_equal_and_states_are_tensors(name: str) -> None:
    loss = CASES[name].make()
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    assert set(torch.load(file, weights_only=True)) == set(loss.state_dict())
    student, teacher, target = CASES[name].inputs(4)
    adapter = loss.adapt(*shapes(name))
    sides = (student, teacher) if adapter is None else adapter.double()(student, teacher)
    loss.eval()
    assert torch.equal(loss(*sides, target, 2.0), copy.deepcopy(loss)(*sides, target, 2.0))


@pytest.mark.parametrize("name", ["noisy_teacher", "crd"])
def test_random_and_queued_losses_resume_exactly(name: str) -> None:
    def steps(loss: DistillationLoss, which: range) -> list[Tensor]:
        found = []
        for step in which:
            student, teacher, target = case.inputs(3, seed=step)
            sides = (student, teacher) if adapter is None else adapter(student, teacher)
            found.append(loss(*sides, target, 2.0).detach())
        return found

    case = CASES[name]
    adapter = case.make().adapt(*shapes(name))
    adapter = None if adapter is None else adapter.double()
    whole, half = case.make().train(), case.make().train()
    every = steps(whole, range(6))
    assert len({value.item() for value in every}) == 6
    first = steps(half, range(3))
    resumed = case.make().train()
    resumed.load_state_dict(half.state_dict())
    rest = steps(resumed, range(3, 6))
    assert torch.equal(torch.stack(every), torch.stack(first + rest))
    for mine, theirs in zip(whole.buffers(), resumed.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_evaluation_does_not_move_states() -> None:
    for name in ("noisy_teacher", "crd"):
        case = CASES[name]
        loss = case.make().eval()
        before = copy.deepcopy(loss.state_dict())
        student, teacher, target = case.inputs(3)
        adapter = loss.adapt(*shapes(name))
        sides = (student, teacher) if adapter is None else adapter.double()(student, teacher)
        assert torch.equal(loss(*sides, target, 2.0), loss(*sides, target, 2.0))
        assert all(torch.equal(loss.state_dict()[key], value) for key, value in before.items())


def test_the_queue_holds_the_latest_embeddings() -> None:
    loss = losses.ContrastiveRepresentation(dimension=2, negatives=5)
    first = loss.teacher_queue.clone()
    turns = [torch.tensor([[0.0, float(sign)]]).repeat(3, 1) for sign in (1, -1)]
    loss(turns[0], turns[0], torch.tensor([7, 8, 9]), 1.0)
    assert torch.equal(loss.teacher_queue[:3], turns[0])
    assert torch.equal(loss.teacher_queue[3:], first[3:])
    assert loss.label_queue.tolist() == [7, 8, 9, -1, -1]
    loss(turns[1], turns[0], torch.tensor([1, 2, 3]), 1.0)
    assert loss.label_queue.tolist() == [3, 8, 9, 1, 2]
    assert torch.equal(loss.student_queue[[3, 4, 0]], turns[1])
    many = torch.nn.functional.normalize(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
    loss(many, many, torch.arange(8), 1.0)
    assert sorted(loss.label_queue.tolist()) == [3, 4, 5, 6, 7]


def test_negatives_of_the_own_class_are_left_out() -> None:
    """Twins of the anchor in the queue hurt only if their label is another, or unknown."""
    anchor = torch.tensor([[1.0, 0.0]])
    for objective in ("infonce", "nce"):
        loss = losses.ContrastiveRepresentation(2, 4, objective=objective).eval()
        loss.teacher_queue[:], loss.student_queue[:] = anchor, anchor
        unknown = loss(anchor, anchor, torch.tensor([3]), 1.0)
        loss.label_queue[:] = 3
        same, other = loss(anchor, anchor, torch.tensor([3]), 1.0), loss(anchor, anchor, torch.tensor([2]), 1.0)
        assert torch.equal(unknown, other)
        assert same < 0.1 * other
        for soft in (torch.tensor([0.5]), torch.zeros(1, 3), None):
            assert torch.equal(loss(anchor, anchor, soft, 1.0), other)


def test_arguments_can_be_written_in_yaml() -> None:
    """YAML reads the words on, off, yes, no, y and n as booleans, also as keys."""
    for cls in MODULES:
        for argument in inspect.signature(cls).parameters:
            assert yaml.safe_load(f"{argument}: 1") == {argument: 1}


def errors() -> list[tuple[Any, list[str]]]:
    """Return what must be refused and words of the message."""
    kd, hints = losses.KnowledgeDistillation(), losses.FitNetsHints()
    image, small, flat = (2, 3, 8, 8), (2, 5, 4, 4), (2, 7)
    one, four = torch.zeros(2, 1), torch.zeros(2, 4)
    crd = losses.ContrastiveRepresentation
    return [
        (lambda: kd.adapt([flat], [(2, 9)]), ["`kd`", "pair 0", "(2, 7)", "(2, 9)"]),
        (lambda: kd.adapt([flat, flat], [flat]), ["`kd`", "2", "1", "each side"]),
        (lambda: kd.adapt([image], [small]), ["`kd`", "height"]),
        (lambda: kd.adapt([], []), ["`kd`", "1 or more"]),
        (lambda: losses.KnowledgeDistillation(class_dim=-1).adapt([(2, 4, 7)], [(2, 5, 7)]), ["`kd`", "(2, 4, 7)"]),
        (lambda: losses.LogitsMSE().adapt([flat], [(2, 9)]), ["`logits_mse`"]),
        (lambda: hints.adapt([image], [flat]), ["`hint`", "dimensions"]),
        (lambda: losses.FitNetsHints(regressor="none").adapt([image], [small]), ["3 channels", "5", "pointwise"]),
        (lambda: losses.FitNetsHints(regressor="valid").adapt([small], [image]), ["`kernel`", "pointwise"]),
        (lambda: losses.AttentionTransfer().adapt([flat], [flat]), ["`at`", "3 to 5"]),
        (lambda: losses.FlowDistillation().adapt([image], [image]), ["`fsp`", "2 or more"]),
        (lambda: losses.FlowDistillation().adapt([image] * 2, [image, small]), ["pair 1", "3 channels", "5"]),
        (lambda: losses.SimilarityPreserving().adapt([image], [(3, 3)]), ["`sp`", "batch"]),
        (lambda: crd().adapt([image] * 2, [image] * 2), ["`crd`", "at most 1"]),
        (lambda: crd().adapt([(2,)], [image]), ["`crd`", "channels"]),
        (lambda: losses.ChannelWiseDistillation().adapt([image], [small]), ["`cwd`", "classes"]),
        (lambda: losses.MutualLearning().adapt([flat], []), ["`dml`", "2 or more"]),
        (lambda: losses.KnowledgeDistillation("backward"), ["`direction`", "'forward'"]),
        (lambda: losses.KnowledgeDistillation(smoothing=1.5), ["`smoothing`", "1.5"]),
        (lambda: losses.NoisyTeacher(sigma=-1), ["`sigma`"]),
        (lambda: losses.NoisyTeacher(probability=float("nan")), ["`probability`", "nan"]),
        (lambda: losses.NoisyTeacher(compare="mae"), ["`compare`"]),
        (lambda: losses.DecoupledDistillation(beta=-1), ["`beta`"]),
        (lambda: losses.RegressionDistillation("mae"), ["`kind`"]),
        (lambda: losses.RegressionDistillation(delta=0), ["`delta`", "above 0"]),
        (lambda: losses.BoundedRegression(-1), ["`margin`"]),
        (lambda: losses.ChannelWiseDistillation("maps"), ["`where`"]),
        (lambda: losses.FitNetsHints(channel_dim=2), ["`channel_dim`", "-1"]),
        (lambda: losses.FitNetsHints(regressor="conv"), ["`regressor`"]),
        (lambda: losses.AttentionTransfer(power=0.5), ["`power`", "at least 1"]),
        (lambda: losses.RelationalDistillation(0, 0), ["`distance`", "`angle`"]),
        (lambda: losses.ProbabilisticTransfer(eps=0), ["`eps`"]),
        (lambda: crd(temperature=0), ["`temperature`"]),
        (lambda: crd(negatives=0), ["`negatives`", "at least 1"]),
        (lambda: crd(dimension=2.5), ["`dimension`", "integer", "2.5"]),
        (lambda: crd(seed="one"), ["`seed`", "'one'"]),
        (lambda: losses.KnowledgeDistillation(ignore_index="void"), ["`ignore_index`", "'void'"]),
        (lambda: losses.KnowledgeDistillation(smoothing="much"), ["`smoothing`", "'much'"]),
        (lambda: losses.RelationalDistillation(distance=True), ["`distance`", "True"]),
        (lambda: crd(objective="nt-xent"), ["`objective`"]),
        (lambda: losses.SelfDistillation(hard=-1), ["`hard`"]),
        (lambda: kd(one, four, None, 1.0), ["`student`", "(2, 1)", "(2, 4)"]),
        (lambda: kd(four, four, None, 0.0), ["`temperature`", "0.0"]),
        (lambda: kd(four, four, None, float("inf")), ["`temperature`", "inf"]),
        (lambda: kd(four[:, 0], four[:, 0], None, 1.0), ["`class_dim`", "(2,)"]),
        (lambda: kd((four, four), (four,), None, 1.0), ["`kd`", "2", "1"]),
        (
            lambda: losses.KnowledgeDistillation(ignore_index=0)(four, four, torch.zeros(3), 1.0),
            ["`mask`", "(3,)", "(2,)"],
        ),
        (lambda: losses.DecoupledDistillation()(four, four, None, 1.0), ["`dkd`", "`target`"]),
        (lambda: losses.DecoupledDistillation()(four, four, four, 1.0), ["`target`", "(2,)", "(2, 4)"]),
        (lambda: losses.DecoupledDistillation()(one, one, torch.zeros(2).long(), 1.0), ["`dkd`", "(2, 1)"]),
        (lambda: losses.DecoupledDistillation()(four, four, torch.tensor([0, 4]), 1.0), ["`target`", "0 to 3", "4"]),
        (lambda: losses.BoundedRegression()(four, four, None, 1.0), ["`target`"]),
        (lambda: losses.BoundedRegression()(four, four, one, 1.0), ["`target`", "(2, 1)"]),
        (lambda: losses.ChannelWiseDistillation()(four, four, None, 1.0), ["`cwd`", "maps"]),
        (lambda: hints(one, four, None, 1.0), ["`hint`", "adapter"]),
        (lambda: losses.AttentionTransfer()(four, four, None, 1.0), ["`at`", "(2, 4)"]),
        (lambda: losses.FlowDistillation()(torch.zeros(image), torch.zeros(image), None, 1.0), ["`fsp`", "two"]),
        (lambda: losses.SimilarityPreserving()(four, four[:1], None, 1.0), ["`sp`", "(1, 4)"]),
        (lambda: losses.RelationalDistillation()(four, four[:1], None, 1.0), ["`rkd`"]),
        (lambda: crd()(four, four, None, 1.0), ["`crd`", "128", "loss.adapt"]),
        (lambda: losses.MutualLearning()(four, four, None, 1.0), ["`dml`", "tuple"]),
        (lambda: losses.SelfDistillation(hard=1.0)((four, four), (), None, 1.0), ["`byot`", "`target`"]),
    ]


@pytest.mark.parametrize("index", range(len(errors())))
def test_errors_say_what_where_and_what_next(index: int) -> None:
    action, words = errors()[index]
    with pytest.raises(ConfigurationError) as error:
        action()
    message = str(error.value)
    assert all(word in message for word in words), message
    assert ";" in message or ":" in message


WORKER = """
import sys, torch
from torch import distributed
from lightning_compress.distillation.losses import ContrastiveRepresentation
folder, rank = sys.argv[1], int(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
loss = ContrastiveRepresentation(2, 4)
rows = torch.eye(2).repeat(2, 1)[: 2 - rank] * (1 - 2 * rank)  # two rows here, one there
loss(rows, rows, torch.full((len(rows),), rank), 1.0)
torch.save(loss.state_dict(), f"{folder}/{rank}.pt")
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_the_queue_is_the_same_on_every_process(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    running = [subprocess.Popen([sys.executable, str(script), str(tmp_path), str(rank)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert one["label_queue"].tolist() == [0, 0, 1, -1]
    assert one["teacher_queue"][:3].tolist() == [[1, 0], [0, 1], [-1, 0]]
