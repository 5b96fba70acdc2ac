import numpy as np
import pytest
import torch

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.data import CropFlip, Normalize, ResumableLoader, TensorImages
from lightning_compress.data.augment import sample_bits, shift_and_flip
from lightning_compress.data.tensors import already_batched


def reference_splitmix(key, index):
    """SplitMix64 with Python's own integers."""
    mask = 2**64 - 1
    state = (key + (index + 1) * 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


def test_bits_follow_splitmix64():
    # The first output of SplitMix64 seeded with 0 is published with the algorithm.
    assert int(sample_bits(0, np.array([0]))[0]) == 0xE220A8397B1DCDAF
    indices = np.array([0, 1, 7, 59999])
    assert sample_bits(2**62 + 5, indices).tolist() == [reference_splitmix(2**62 + 5, int(i)) for i in indices]


def test_shift_and_flip_equals_the_plain_loop():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 5, 4), generator=generator, dtype=torch.uint8)
    down, right = (torch.randint(0, 5, (6,), generator=generator) for _ in range(2))
    flip = torch.tensor([True, False, True, True, False, False])
    moved = shift_and_flip(images, down, right, flip, padding=2)
    for number in range(6):
        canvas = np.zeros((3, 9, 8), dtype=np.uint8)
        canvas[:, 2:7, 2:6] = images[number].numpy()
        window = canvas[:, down[number] : down[number] + 5, right[number] : right[number] + 4]
        expected = window[:, :, ::-1] if flip[number] else window
        assert np.array_equal(moved[number].numpy(), expected)


def test_offsets_and_flips_are_uniform():
    count = 9000
    images = torch.zeros(count, 1, 3, 3, dtype=torch.uint8)
    images[:, 0, 1, 1] = 1
    moved = CropFlip(padding=1, flip=False)(images, key=3, indices=torch.arange(count))
    places = moved.flatten(1).double().mean(0)
    assert torch.allclose(places, torch.full((9,), 1 / 9, dtype=torch.float64), atol=0.012)
    images = torch.tensor([[[[1, 0]]]], dtype=torch.uint8).expand(count, 1, 1, 2)
    flipped = CropFlip(padding=0)(images, key=3, indices=torch.arange(count))[:, 0, 0, 1].double().mean()
    assert abs(float(flipped) - 0.5) < 0.02
    assert torch.equal(CropFlip(padding=0, flip=False)(images, key=3, indices=torch.arange(count)), images)


def batches(dataset, epoch, **options):
    loader = ResumableLoader(dataset, batch_size=4, collate_fn=already_batched, **options)
    loader.sampler.set_epoch(epoch)
    return dict(zip(range(100), loader, strict=False))


@pytest.fixture
def dataset():
    images = torch.randint(0, 256, (10, 1, 6, 6), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return TensorImages(images, torch.arange(10), augment=CropFlip(padding=2))


def test_augmentation_depends_on_seed_epoch_and_index_alone(dataset):
    def by_label(found):
        return {int(y): x for images, labels in found.values() for x, y in zip(images, labels, strict=True)}

    shuffled, ordered = by_label(batches(dataset, 2)), by_label(batches(dataset, 2, shuffle=False))
    assert all(torch.equal(shuffled[label], ordered[label]) for label in range(10))
    workers = by_label(batches(dataset, 2, num_workers=1))
    assert all(torch.equal(shuffled[label], workers[label]) for label in range(10))
    for other in (by_label(batches(dataset, 3)), by_label(batches(dataset, 2, seed=1))):
        assert sum(not torch.equal(shuffled[label], other[label]) for label in range(10)) > 5


def test_plain_indices_are_not_augmented(dataset):
    images, labels = dataset.__getitems__([3, 1])
    assert torch.equal(images, dataset.images[[3, 1]].float() / 255)
    image, label = dataset[3]
    assert torch.equal(image, images[0])
    assert (int(label), labels.tolist()) == (3, [3, 1])


def test_normalize_by_hand_and_its_errors():
    assert Normalize([1.0, 2.0], [2.0, 4.0])(torch.full((1, 2, 1, 1), 3.0)).flatten().tolist() == [1.0, 0.25]
    with pytest.raises(ConfigurationError, match="2 numbers, but the images have 3 channels"):
        Normalize([1.0, 2.0], [2.0, 4.0])(torch.zeros(1, 3, 1, 1))
    with pytest.raises(ConfigurationError, match="`std` must be positive"):
        Normalize([0.0], [0.0])
    with pytest.raises(ConfigurationError, match="`mean` and `std` need"):
        Normalize([0.0], [1.0, 1.0])
    with pytest.raises(ConfigurationError, match="`padding`"):
        CropFlip(padding=-1)
    with pytest.raises(ConfigurationError, match="`images`"):
        TensorImages(torch.zeros(3, 4, 4), torch.zeros(3))
