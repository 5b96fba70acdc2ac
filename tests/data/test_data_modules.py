import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.core.progress import slow
from lightning_compress.data import (
    DigitsDataModule,
    FakeDataModule,
    FewImagesDataModule,
    ImageFolderDataModule,
    MNISTDataModule,
    Normalize,
)
from lightning_compress.data.paths import find_data
from lightning_compress.models import ImageClassifier

SHARED = Path(os.environ.get("LIGHTNING_COMPRESS_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def write_images(folder, splits=("train", "test"), count=10, size=(4, 4)):
    for split in splits:
        for label, value in (("black", 0), ("white", 255)):
            place = folder / split / label
            place.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", size, (value, value, number)).save(place / f"{number}.png")
    return folder


def test_digits_split_is_fixed_disjoint_and_stratified():
    one, other = DigitsDataModule(seed=1).splits, DigitsDataModule(seed=2).splits
    pixels = []
    for name, count in (("train", 1197), ("val", 300), ("test", 300)):
        images, labels = getattr(one, name)
        assert torch.equal(images, getattr(other, name)[0])
        assert images.shape == (count, 1, 8, 8)
        shares = np.bincount(labels.numpy(), minlength=10) / count
        assert np.abs(shares - np.bincount(load_digits().target) / 1797).max() < 0.003
        pixels += [tuple(image.flatten().tolist()) for image in images]
    assert sorted(pixels) == sorted(tuple(row) for row in load_digits().data.astype(int).tolist())


def test_digits_are_normalized():
    data = DigitsDataModule(batch_size=1197)
    images, _ = next(iter(data.train_dataloader()))
    assert abs(float(images.mean())) < 1e-3
    assert abs(float(images.std()) - 1) < 1e-3
    plain, _ = next(iter(DigitsDataModule(batch_size=1197, normalize=None).train_dataloader()))
    assert (float(plain.min()), float(plain.max())) == (0.0, 1.0)
    assert data.num_classes == 10


def test_evaluation_order_is_fixed_and_complete():
    data = DigitsDataModule(batch_size=128)
    for loader, part in ((data.val_dataloader(), data.splits.val), (data.test_dataloader(), data.splits.test)):
        assert torch.equal(torch.cat([labels for _, labels in loader]), part[1])


@pytest.mark.parametrize("archive", [False, True])
def test_image_folder_reads_folders_and_archives(tmp_path, archive):
    source = write_images(tmp_path / "images")
    (source / "train" / "black" / "notes.txt").write_text("not an image")
    if archive:
        with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as file:
            file.add(source, arcname="some/images")
        source = tmp_path / "images.tar.gz"
    splits = ImageFolderDataModule(source).splits
    assert splits.classes == ("black", "white")
    assert [len(part[1]) for part in (splits.train, splits.val, splits.test)] == [18, 2, 20]
    images, labels = splits.test
    assert images[:, 0, 0, 0].tolist() == [255 * label for label in labels.tolist()]
    assert sorted(images[labels == 1][:, 2, 0, 0].tolist()) == list(range(10))


def test_image_folder_uses_a_validation_folder_and_resizes(tmp_path):
    source = write_images(tmp_path / "images", ("train", "val", "test"), count=3, size=(6, 4))
    splits = ImageFolderDataModule(source, image_size=2).splits
    assert splits.train[0].shape == splits.val[0].shape == (6, 3, 2, 2)


def test_image_folder_cache_is_used_and_renewed(tmp_path):
    source, cache = write_images(tmp_path / "images"), tmp_path / "cache"
    first = ImageFolderDataModule(source, cache_dir=cache).splits
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    again = ImageFolderDataModule(source, cache_dir=cache).splits
    assert file.stat().st_mtime_ns == written
    assert again.classes == first.classes
    assert all(torch.equal(a, b) for a, b in zip(again.train, first.train, strict=True))
    file.write_bytes(b"cut short")
    assert torch.equal(ImageFolderDataModule(source, cache_dir=cache).splits.test[0], first.test[0])
    Image.new("RGB", (4, 4)).save(source / "test" / "black" / "more.png")
    assert len(ImageFolderDataModule(source, cache_dir=cache).splits.test[1]) == 21


def test_image_folder_errors(tmp_path):
    with pytest.raises(ConfigurationError, match=r"`root`.*LIGHTNING_COMPRESS_DATA"):
        ImageFolderDataModule(tmp_path / "missing").setup("fit")
    with pytest.raises(ConfigurationError, match=r"`root`.*nowhere\.tar\.gz"):
        ImageFolderDataModule("nowhere.tar.gz").setup("fit")
    (tmp_path / "plain.txt").write_text("text")
    with pytest.raises(ConfigurationError, match="folder or a tar archive"):
        ImageFolderDataModule(tmp_path / "plain.txt").setup("fit")
    (tmp_path / "broken.tar.gz").write_bytes(b"\x1f\x8b broken")
    with pytest.raises(ConfigurationError, match="corrupt or cut short"):
        ImageFolderDataModule(tmp_path / "broken.tar.gz").setup("fit")
    with pytest.raises(ConfigurationError, match=r"found \['train'\]"):
        ImageFolderDataModule(write_images(tmp_path / "half", ("train",))).setup("fit")
    source = write_images(tmp_path / "mixed")
    Image.new("RGB", (5, 5)).save(source / "train" / "white" / "odd.png")
    with pytest.raises(ConfigurationError, match="`image_size` is needed"):
        ImageFolderDataModule(source).setup("fit")
    (source / "train" / "white" / "odd.png").write_bytes(b"no image")
    with pytest.raises(ConfigurationError, match=r"odd\.png is not a readable image"):
        ImageFolderDataModule(source).setup("fit")
    with pytest.raises(ConfigurationError, match="too few"):
        ImageFolderDataModule(write_images(tmp_path / "few", count=2)).setup("fit")
    with pytest.raises(ConfigurationError, match="`image_size`"):
        ImageFolderDataModule(tmp_path, image_size=0)


def test_truncated_archive_is_one_error(tmp_path):
    rng = np.random.default_rng(0)
    with tarfile.open(tmp_path / "images.tar.gz", "w:gz") as file:
        for split in ("train", "test"):
            for number in range(20):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "png")
                member = tarfile.TarInfo(f"{split}/a/{number}.png")
                member.size = buffer.tell()
                buffer.seek(0)
                file.addfile(member, buffer)
    content = (tmp_path / "images.tar.gz").read_bytes()
    assert len(ImageFolderDataModule(tmp_path / "images.tar.gz").splits.test[1]) == 20
    (tmp_path / "images.tar.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigurationError, match="corrupt or cut short"):
        ImageFolderDataModule(tmp_path / "images.tar.gz").setup("fit")


@pytest.mark.parametrize("shape", [(1, 5, 4), (3, 6, 7)])
def test_fake_data_has_the_shape_asked_for(shape):
    data = FakeDataModule(size=8, shape=shape, num_classes=3, batch_size=4)
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, *shape)
    assert int(labels.max()) < 3
    again = FakeDataModule(size=8, shape=shape, num_classes=3, seed=5)
    assert torch.equal(again.splits.train[0], data.splits.train[0])
    assert not torch.equal(data.splits.train[0][:2], data.splits.val[0])


def test_wrong_arguments_are_named():
    for name, value in (("batch_size", 0), ("seed", -1), ("num_workers", -2), ("batch_size", 1.5)):
        with pytest.raises(ConfigurationError, match=f"`{name}` of DigitsDataModule"):
            DigitsDataModule(**{name: value})
    with pytest.raises(ConfigurationError, match="`shape`"):
        FakeDataModule(shape=(2, 4, 4))
    with pytest.raises(ConfigurationError, match="`size`"):
        FakeDataModule(size=0)


def test_missing_mnist_says_what_to_set(tmp_path, monkeypatch):
    with pytest.raises(ConfigurationError, match=r"`root`: no data found.*LIGHTNING_COMPRESS_DATA"):
        MNISTDataModule(root=tmp_path).setup("fit")
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    with pytest.raises(ConfigurationError, match="incomplete or corrupt"):
        MNISTDataModule(root=tmp_path).setup("fit")


def test_data_places_are_tried_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert find_data("made_up_name") == Path("data")
    (tmp_path / "data" / "made_up_name").mkdir()
    assert find_data("made_up_name") == Path("data/made_up_name")
    (tmp_path / "elsewhere" / "made_up_name").mkdir(parents=True)
    monkeypatch.setenv("LIGHTNING_COMPRESS_DATA", str(tmp_path / "elsewhere"))
    assert find_data("made_up_name") == tmp_path / "elsewhere" / "made_up_name"
    assert find_data("made_up_name", root=tmp_path / "data") == tmp_path / "data"


@pytest.mark.skipif(not (SHARED / "mnist").exists(), reason="MNIST is not here")
def test_mnist_has_the_known_sizes_and_statistics():
    splits = MNISTDataModule(root=SHARED / "mnist").splits
    assert [tuple(part[0].shape) for part in (splits.train, splits.val, splits.test)] == [
        (55000, 1, 28, 28),
        (5000, 1, 28, 28),
        (10000, 1, 28, 28),
    ]
    everything = torch.cat([splits.train[0], splits.val[0]]).float() / 255
    assert abs(float(everything.mean()) - 0.1307) < 1e-4
    assert abs(float(everything.std()) - 0.3081) < 1e-4
    assert np.bincount(splits.test[1].numpy()).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_progress_bar_appears_only_for_long_work(capsys):
    assert list(slow(range(3), "Quick")) == [0, 1, 2]
    assert capsys.readouterr().out == ""
    assert list(slow(iter(range(3)), "Slow", delay=0.0)) == [0, 1, 2]
    assert capsys.readouterr().out != ""


def test_a_trainer_fits_tests_predicts_and_overfits(tmp_path):
    data = FakeDataModule(size=32, shape=(1, 4, 4), num_classes=3, batch_size=8, normalize=Normalize([0.5], [0.5]))
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = Trainer(max_epochs=1, **quiet)
    trainer.fit(ImageClassifier(net, num_classes=3), datamodule=data)
    assert trainer.global_step == 4
    predictions = trainer.predict(ImageClassifier(net, num_classes=3), datamodule=data)
    assert torch.cat(predictions).shape == (8, 3)
    trainer = Trainer(max_epochs=1, overfit_batches=2, **quiet)
    with pytest.warns(UserWarning, match="overfit"):
        trainer.fit(ImageClassifier(net, num_classes=3), datamodule=data)
    assert trainer.global_step == 2


def test_few_images_are_fixed_and_balanced():
    whole = DigitsDataModule(batch_size=9, seed=4)
    few = FewImagesDataModule(whole, per_class=3)
    assert (few.batch_size, few.seed, few.normalize) == (9, 4, whole.normalize)
    images, labels = few.splits.train
    assert labels.bincount().tolist() == [3] * 10
    again = FewImagesDataModule(DigitsDataModule(seed=5), per_class=3)
    assert torch.equal(images, again.splits.train[0])
    assert len(few.splits.val[1]) == len(few.splits.test[1]) == 300
    assert all((whole.splits.train[0] == image).all(dim=(1, 2, 3)).any() for image in images)
    with pytest.raises(ConfigurationError, match=r"`per_class` must be in \[1, \d+\].*got 500"):
        FewImagesDataModule(whole, per_class=500).setup("fit")
    with pytest.raises(ConfigurationError, match="`data` must be an ImageDataModule, got str"):
        FewImagesDataModule("digits")
