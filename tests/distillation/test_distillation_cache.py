"""Teacher outputs on disk: right rows for right samples, and a refusal whenever they would be wrong."""

import copy
import json
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from lightning_compress import ArtifactError, ConfigurationError, Distillation, DistillationModule
from lightning_compress.core.examples import example_from
from lightning_compress.data import CropFlip, ResumableLoader, TensorImages
from lightning_compress.data.tensors import already_batched
from lightning_compress.distillation import Ensemble, LogitsMSE
from lightning_compress.distillation.cache import TeacherCache, cache_teacher, teacher_fingerprint
from lightning_compress.distillation.cached_batch import CachedBatch, take_cached
from lightning_compress.distillation.cached_data import CachedCollate, CachedDataset, cached_loader, input_checksum
from lightning_compress.distillation.teacher import Answer, Question, Teacher

SAMPLES = 37


class Noisy(Dataset):
    """Another input at every read, as random crops would give."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return torch.rand(6), index


class Padded(Dataset):
    """Sequences of varying length in a mapping, which only a ``collate_fn`` of one's own can batch."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return {"tokens": torch.arange(1, 2 + index % 4), "weight": float(index)}


class Doubling(Teacher):
    """A teacher of a user's own."""

    def answer(self, question):
        return Answer(2 * question.args[0])

    def fingerprint(self):
        return "doubling"


def quiet_trainer(epochs, **settings):
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def pad(samples):
    tokens = nn.utils.rnn.pad_sequence([sample["tokens"] for sample in samples], batch_first=True)
    return {"tokens": tokens, "weight": torch.tensor([sample["weight"] for sample in samples])}


def plain_data():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(SAMPLES, 6, generator=generator), torch.arange(SAMPLES))


def images(augment=None):
    pixels = torch.randint(0, 256, (SAMPLES, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return TensorImages(pixels, torch.arange(SAMPLES), augment=augment)


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


@pytest.fixture
def loader():
    return DataLoader(plain_data(), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(("dtype", "error", "size"), [("float32", 0.0, 4), ("float16", 1e-3, 2)])
def test_rows_are_the_teachers_outputs_in_evaluation_mode(teacher, loader, tmp_path, dtype, error, size):
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    teacher.train()
    cache = cache_teacher(teacher, loader, tmp_path / "cache", dtype)
    assert teacher.training
    assert all(module.training for module in teacher.modules())
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    with torch.no_grad():
        expected = teacher.eval()(loader.dataset.tensors[0])
    assert cache.rows(range(SAMPLES)).dtype == torch.float32
    torch.testing.assert_close(cache.rows(range(SAMPLES)), expected, rtol=error, atol=1e-6 + error)
    torch.testing.assert_close(cache.rows([30, 2]), expected[[30, 2]], rtol=error, atol=1e-6 + error)
    assert (tmp_path / "cache" / "outputs.npy").stat().st_size == 128 + SAMPLES * 3 * size
    assert isinstance(cache.outputs, np.memmap)


def test_batches_bring_the_outputs_of_their_own_samples(teacher, loader, tmp_path):
    cache = cache_teacher(teacher, loader, tmp_path, "float32")
    expected = cache.rows(range(SAMPLES))
    order = [labels for _, labels in DataLoader(plain_data(), 5, True, generator=torch.Generator().manual_seed(7))]
    seen = []
    for batch in cached_loader(loader, cache):
        (inputs, labels), outputs = take_cached(batch)
        assert torch.equal(inputs, loader.dataset.tensors[0][labels])
        assert torch.equal(outputs, expected[labels])
        seen.append(labels)
    assert torch.equal(torch.cat(seen), torch.cat(order))  # writing and probing left the loader's own order alone
    assert take_cached("anything else") == ("anything else", None)
    assert isinstance(loader.dataset, TensorDataset)  # the loader that was given stays what it was


def test_data_sets_that_make_whole_batches_also_through_a_subset(tmp_path):
    chosen = Subset(images(), [3, 1, 20, 8, 30])
    loader = ResumableLoader(chosen, batch_size=2, collate_fn=already_batched)
    cache = cache_teacher(nn.Flatten(), loader, tmp_path, "float32", name="pixels")
    for (pixels, labels), outputs in cached_loader(loader, cache):
        assert torch.equal(outputs, pixels.flatten(1))
        assert torch.equal(pixels, images().__getitems__(labels.tolist())[0])


def test_a_loader_keeps_its_place(tmp_path):
    loader = ResumableLoader(images(), batch_size=4, seed=5, collate_fn=already_batched)
    loader.load_state_dict({"epoch": 2, "batch": 3, "samples": SAMPLES, "batch_size": 4, "processes": 1, "seed": 5})
    cached = cached_loader(loader, cache_teacher(nn.Flatten(), loader, tmp_path, name="pixels"))
    assert cached.state_dict() == loader.state_dict()
    assert len(list(cached)) == len(loader) - 3


def test_own_collate_functions_and_teachers_that_take_more_than_a_tensor(tmp_path):
    loader = DataLoader(Padded(), batch_size=4, collate_fn=pad, num_workers=1)

    def total(tokens, weight):
        return (tokens.sum(1) * weight)[:, None]

    cache = cache_teacher(total, loader, tmp_path, "float32", name="total")
    single = [[sum(range(1, 2 + index % 4)) * float(index)] for index in range(SAMPLES)]
    assert cache.rows(range(SAMPLES)).tolist() == single
    batches = list(cached_loader(loader, cache))
    assert torch.cat([outputs for _, outputs in batches]).tolist() == single


def test_a_data_set_of_ones_own_with_the_default_collate(teacher, loader, tmp_path):
    cache = cache_teacher(teacher, loader, tmp_path)
    batch = next(iter(DataLoader(CachedDataset(loader.dataset, cache), batch_size=3)))
    assert isinstance(batch, CachedBatch)
    assert torch.equal(batch.outputs, cache.rows([0, 1, 2]))
    assert torch.equal(batch.training_batch[1], torch.arange(3))
    found = example_from(nn.Flatten(), cached_loader(loader, cache))  # as other callbacks look at training data
    assert found.shape == (2, 6)


def test_a_cache_is_a_teacher_for_batches_that_bring_its_outputs(loader, tmp_path):
    cache = cache_teacher(Doubling(), loader, tmp_path, "float32")
    batch, outputs = cache.split(next(iter(cached_loader(loader, cache))))
    assert torch.equal(cache.answer(Question((), {}, batch, extra=outputs)).output, 2 * batch[0])
    assert cache.answer(Question((), {}, batch, training=False)) is None
    assert not cache.has_validation
    assert cache.fingerprint() == "doubling"
    with pytest.raises(ConfigurationError, match=r"bring no stored outputs; train on `cached_loader\(loader, cache\)`"):
        cache.answer(Question((), {}, batch))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_training_on_stored_outputs_equals_training_with_the_teacher(teacher, tmp_path):
    def trained(cached):
        torch.manual_seed(1)
        student = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
        data = TensorDataset(plain_data().tensors[0], torch.arange(SAMPLES) % 3)
        loader = ResumableLoader(data, batch_size=8, seed=2)
        cache = cache_teacher(teacher, loader, tmp_path, "float32") if cached else None
        module = DistillationModule(student, cache or copy.deepcopy(teacher), task_weight=0.1)
        quiet_trainer(2).fit(module, cached_loader(loader, cache) if cached else loader)
        return torch.cat([parameter.flatten() for parameter in student.parameters()])

    torch.testing.assert_close(trained(cached=True), trained(cached=False))


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_module_without_stored_outputs_in_its_batches_says_what_to_do(teacher, loader, tmp_path):
    module = DistillationModule(nn.Linear(6, 3), cache_teacher(teacher, loader, tmp_path))
    module.example_input_array = torch.zeros(2, 6)
    with pytest.raises(ConfigurationError, match="the training batches bring no stored outputs"):
        quiet_trainer(1).fit(module, DataLoader(TensorDataset(torch.zeros(4, 6), torch.zeros(4, dtype=torch.long))))


def test_workers_map_the_file_rather_than_copy_it(teacher, loader, tmp_path):
    cache = cache_teacher(teacher, loader, tmp_path)
    content = pickle.dumps(cache)
    assert len(content) < 500
    assert torch.equal(pickle.loads(content).rows([4]), cache.rows([4]))
    workers = cached_loader(DataLoader(loader.dataset, batch_size=8, num_workers=1), cache)
    assert torch.equal(torch.cat([outputs for _, outputs in workers]), cache.rows(range(SAMPLES)))


# ---------------------------------------------------------------------- written once, resumed


def count_calls(teacher):
    seen = []
    teacher.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    return seen


def test_a_complete_cache_is_only_checked(teacher, loader, tmp_path):
    cache_teacher(teacher, loader, tmp_path)
    seen = count_calls(teacher)
    cache_teacher(teacher, loader, tmp_path)
    assert sum(seen) == 5  # one sample for the shape, four to compare


def test_an_interrupted_writer_goes_on_where_it_stopped(teacher, loader, tmp_path):
    def interrupt(module, args):
        if interrupt.armed and len(args[0]) == 5:
            interrupt.batches += 1
            if interrupt.batches == 4:
                raise KeyboardInterrupt

    interrupt.armed, interrupt.batches = True, 0
    teacher.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache_teacher(teacher, loader, tmp_path, "float32")
    assert json.loads((tmp_path / "cache.json").read_text())["done"] == 15
    with pytest.raises(ArtifactError, match=r"15 of 37 outputs are written; call `cache_teacher` again"):
        TeacherCache(tmp_path)
    interrupt.armed = False
    seen = count_calls(teacher)
    cache = cache_teacher(teacher, loader, tmp_path, "float32")
    assert sum(seen) == 5 + SAMPLES - 15
    with torch.no_grad():
        torch.testing.assert_close(cache.rows(range(SAMPLES)), teacher.eval()(loader.dataset.tensors[0]))


def test_another_process_waits_for_the_first(teacher, loader, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    found = []
    waiting = threading.Thread(target=lambda: found.append(cache_teacher(teacher, loader, tmp_path / "cache")))
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    assert not (tmp_path / "cache").exists()
    monkeypatch.delenv("LOCAL_RANK")
    written = cache_teacher(teacher, loader, tmp_path / "cache")
    waiting.join(20)
    assert torch.equal(found[0].rows(range(SAMPLES)), written.rows(range(SAMPLES)))


# ---------------------------------------------------------------------- refused


def test_augmented_data_are_refused_before_anything_is_written(teacher, tmp_path):
    with pytest.raises(ConfigurationError, match=r"differs between two reads.*augmented at random"):
        cache_teacher(teacher, DataLoader(Noisy(), 4), tmp_path / "cache")
    keyed = ResumableLoader(images(CropFlip(1)), batch_size=4, collate_fn=already_batched)
    with pytest.raises(ConfigurationError, match=r"augmented at random.*`data\.augment=null`"):
        cache_teacher(nn.Flatten(), keyed, tmp_path / "cache", name="pixels")
    assert not (tmp_path / "cache").exists()


def test_augmentation_that_is_turned_on_later_is_refused(tmp_path):
    loader = ResumableLoader(images(), batch_size=4, collate_fn=already_batched)
    cache = cache_teacher(nn.Flatten(), loader, tmp_path, name="pixels")
    augmented = ResumableLoader(images(CropFlip(1)), batch_size=4, collate_fn=already_batched)
    with pytest.raises(ConfigurationError, match="is not what the teacher saw"):
        cached_loader(augmented, cache)
    running = cached_loader(loader, cache)
    loader.dataset.augment = CropFlip(2, flip=False)
    with pytest.raises(ConfigurationError, match=r"sample \d+ of the training data is not what the teacher saw"):
        list(running)


def test_a_collate_function_that_mixes_samples_is_refused(teacher, loader, tmp_path):
    def mixup(samples):
        inputs, labels = torch.utils.data.default_collate(samples)
        return 0.7 * inputs + 0.3 * inputs.flip(0), labels

    cache = cache_teacher(teacher, loader, tmp_path)
    mixed = DataLoader(CachedDataset(loader.dataset, cache), 4, collate_fn=CachedCollate(mixup))
    with pytest.raises(ConfigurationError, match="`collate_fn` changes the inputs"):
        next(iter(mixed))


def test_another_teacher_is_refused(teacher, loader, tmp_path):
    cache_teacher(teacher, loader, tmp_path)
    with torch.no_grad():
        teacher[0].weight[0, 0] += 1e-6
    with pytest.raises(ConfigurationError, match="holds a cache of another teacher"):
        cache_teacher(teacher, loader, tmp_path)


def test_a_teacher_without_tensors_is_known_by_name_and_by_what_it_says(loader, tmp_path):
    with pytest.raises(ConfigurationError, match="`name` is needed"):
        cache_teacher(torch.sin, loader, tmp_path)
    cache_teacher(torch.sin, loader, tmp_path, name="wave")
    with pytest.raises(ConfigurationError, match="gives other outputs for sample 0 than are stored"):
        cache_teacher(torch.cos, loader, tmp_path, name="wave")
    with pytest.raises(ConfigurationError, match="another teacher"):
        cache_teacher(torch.cos, loader, tmp_path, name="cosine")


def test_other_data_are_refused(teacher, loader, tmp_path):
    cache = cache_teacher(teacher, loader, tmp_path)
    longer = TensorDataset(torch.zeros(SAMPLES + 1, 6), torch.zeros(SAMPLES + 1))
    with pytest.raises(ConfigurationError, match=r"data of another length.*samples 37, now 38"):
        cache_teacher(teacher, DataLoader(longer), tmp_path)
    with pytest.raises(ConfigurationError, match="outputs of 37 samples, the data set has 38"):
        CachedDataset(longer, cache)
    changed = TensorDataset(plain_data().tensors[0] + 1e-6, torch.arange(SAMPLES))
    with pytest.raises(ConfigurationError, match="sample 0 of the data set is not what the teacher saw"):
        cache_teacher(teacher, DataLoader(changed), tmp_path)
    with pytest.raises(ConfigurationError, match="another `dtype`"):
        cache_teacher(teacher, loader, tmp_path, "float32")


def test_damaged_files_are_refused(teacher, loader, tmp_path):
    cache_teacher(teacher, loader, tmp_path)
    whole = (tmp_path / "outputs.npy").read_bytes()
    for content in (whole[:-10], whole[:40], b""):
        (tmp_path / "outputs.npy").write_bytes(content)
        with pytest.raises(ArtifactError, match=r"damaged or truncated.*delete the folder"):
            TeacherCache(tmp_path)
        with pytest.raises(ArtifactError, match="damaged or truncated"):
            cache_teacher(teacher, loader, tmp_path)
    (tmp_path / "outputs.npy").write_bytes(whole)
    assert len(TeacherCache(tmp_path)) == SAMPLES
    facts = json.loads((tmp_path / "cache.json").read_text())
    for content, words in (
        ({**facts, "version": 9}, "version 9"),
        ({**facts, "shape": [4]}, "has shape"),
        ({}, "read"),
    ):
        (tmp_path / "cache.json").write_text(json.dumps(content))
        with pytest.raises(ArtifactError, match=words):
            TeacherCache(tmp_path)


def test_what_cannot_be_cached_is_refused(teacher, loader, tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(plain_data())

    data = plain_data()
    for wrong, words in (
        (data, "must be a torch DataLoader"),
        (DataLoader(Stream()), "have no numbers"),
        (DataLoader(data, batch_size=None), "`batch_size=None`"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            cache_teacher(teacher, wrong, tmp_path)
    for function, words in (
        (lambda x: (x, x), "must return one tensor"),
        (lambda x: x[:1], r"returned \(1, 6\) for a batch of 5"),
        (lambda x: x * 1e6, "beyond what float16 holds"),
        (lambda x: x / 0, "not finite"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            cache_teacher(function, loader, tmp_path / words[:4], name="wrong")
    with pytest.raises(ConfigurationError, match="did you mean 'float16'"):
        cache_teacher(teacher, loader, tmp_path, "float61")
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigurationError, match="holds other files"):
        cache_teacher(teacher, loader, tmp_path)
    with pytest.raises(ArtifactError, match="holds no teacher cache"):
        TeacherCache(tmp_path)


# ---------------------------------------------------------------------- checksums


def test_checksums_see_every_bit_and_any_kind_of_input():
    value = torch.tensor([0.0, 1.0])
    assert input_checksum((value, 1)) == input_checksum([value, 2]) == input_checksum(value)
    assert input_checksum(value) != input_checksum(-value)  # -0.0 is another input, bit for bit
    assert input_checksum({"a": value, "b": [3]}) != input_checksum({"a": value, "b": [4]})
    half = torch.ones(3, dtype=torch.bfloat16)
    assert input_checksum(half) == input_checksum(half.clone()) != input_checksum(half.float())
    assert input_checksum(np.arange(4)) == input_checksum(torch.arange(4))
    assert input_checksum(torch.arange(6).view(2, 3).t()) == input_checksum(torch.arange(6).view(2, 3).t().contiguous())
    with pytest.raises(ConfigurationError, match="inputs with a object in them"):
        input_checksum(object())


def test_fingerprints_see_values_names_and_types():
    linear = nn.Linear(2, 2)
    prints = {teacher_fingerprint(linear), teacher_fingerprint(nn.Sequential(linear)), teacher_fingerprint(linear, "a")}
    prints.add(teacher_fingerprint(linear.double()))
    assert len(prints) == 4


class Student(LightningModule):
    """Builds its loader in a hook, scales its inputs on their way, and notes what its hooks get."""

    def __init__(self, cache):
        super().__init__()
        self.net, self.cache, self.seen = nn.Linear(6, 3), cache, set()

    def forward(self, x):
        return self.net(x)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        inputs, numbers = batch
        return 2 * inputs, numbers

    def on_train_batch_start(self, batch, batch_idx):
        self.seen.add(("start", type(batch)))

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.add(("end", type(batch)))

    def training_step(self, batch, batch_idx):
        inputs, numbers = batch
        self.seen.add(("step", type(batch)))
        assert torch.equal(inputs, 2 * plain_data().tensors[0][numbers])
        return self(inputs).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def train_dataloader(self):
        return cached_loader(DataLoader(plain_data(), batch_size=5, shuffle=True), self.cache)


class Matching(LogitsMSE):
    """Checks that outputs belong to the numbers of their samples."""

    def forward(self, student, teacher, target, temperature):
        assert torch.equal(teacher, self.outputs[target])
        return super().forward(student, teacher, target, temperature)


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled train dataloader shuffling")
@pytest.mark.parametrize("settings", [{}, {"overfit_batches": 3}], ids=["plain", "sampler_replaced"])
def test_a_loader_from_a_hook_may_get_another_sampler_and_hooks_see_plain_batches(teacher, tmp_path, settings):
    cache = cache_teacher(teacher, DataLoader(plain_data(), batch_size=5), tmp_path / "cache")
    student, loss = Student(cache), Matching()
    loss.outputs = cache.rows(range(SAMPLES))
    trainer = quiet_trainer(2, **settings)
    trainer.fit(DistillationModule(student, cache, loss))
    assert trainer.callback_metrics["distill/logits_mse"] > 0
    assert student.seen <= {(hook, kind) for hook in ("start", "step", "end") for kind in (list, tuple)}
    assert len(student.seen) == 3


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_stored_outputs_where_nobody_can_take_them_off(teacher, loader, tmp_path):
    cache = cache_teacher(teacher, loader, tmp_path / "cache")
    for given in (cache, [teacher, cache], Ensemble([cache, teacher])):
        with pytest.raises(ConfigurationError, match="use DistillationModule"):
            Distillation(given)
    both = CombinedLoader({"a": cached_loader(loader, cache), "b": loader})
    with pytest.raises(ConfigurationError, match="inside other batches; give the Trainer the loader"):
        quiet_trainer(1).fit(DistillationModule(Student(cache), cache, LogitsMSE()), both)
    student = nn.Linear(6, 3)
    module = DistillationModule(student, teacher)
    with pytest.raises(ConfigurationError, match="the callback cannot take a batch apart"):
        quiet_trainer(1, callbacks=[Distillation(teacher)]).fit(module, cached_loader(loader, cache))


TWO_PROCESSES = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from torch import distributed
from torch.utils.data import DataLoader, DistributedSampler
from test_distillation_cache import CachedDataset, Matching, Student, plain_data
from lightning_compress import DistillationModule
from lightning_compress.distillation import TeacherCache
cache = TeacherCache(sys.argv[2])
loss = Matching()
loss.outputs = cache.rows(range(len(cache)))
off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, **off)
trainer.fit(DistillationModule(Student(cache), cache, loss))
loader = trainer.train_dataloader
assert isinstance(loader.sampler, DistributedSampler) and isinstance(loader.dataset, CachedDataset)
assert trainer.callback_metrics["distill/logits_mse"] > 0
distributed.barrier()  # a rank that leaves while another still talks to it makes that one abort
distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_share_a_cache(teacher, tmp_path):
    cache_teacher(teacher, DataLoader(plain_data(), batch_size=5), tmp_path / "cache")
    script = tmp_path / "worker.py"
    script.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    here = str(Path(__file__).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, here, str(tmp_path / "cache")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
