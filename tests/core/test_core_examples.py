"""Example inputs come from the data set, as the loader joins them, and disturb neither its position nor randomness."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightning_compress import ConfigurationError
from lightning_compress.core.examples import example_from
from lightning_compress.data.order import ResumableLoader


class Drawn(Dataset):
    """Random samples in whole batches."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        raise AssertionError("whole batches are asked for")

    def __getitems__(self, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.rand(len(indices), 3), torch.tensor(indices)


class Endless(IterableDataset):
    def __iter__(self):
        yield from [torch.zeros(1)]


def test_two_samples_and_nothing_moves() -> None:
    loader = ResumableLoader(Drawn(), batch_size=2, collate_fn=lambda batch: batch)
    position, randomness = loader.state_dict(), torch.get_rng_state()
    assert example_from(loader).shape == (2, 3)
    assert loader.state_dict() == position
    assert torch.equal(torch.get_rng_state(), randomness)


def test_the_first_loader_with_positions_is_taken() -> None:
    data = TensorDataset(torch.arange(5.0), torch.zeros(5))
    assert example_from({"a": DataLoader(Endless()), "b": [DataLoader(data)]}).tolist() == [0.0, 1.0]


@pytest.mark.parametrize("loaders", [None, DataLoader(Endless()), DataLoader([{"x": 1.0}])])
def test_without_a_tensor_the_error_says_what_to_set(loaders) -> None:
    with pytest.raises(ConfigurationError, match="`example_input_array`"):
        example_from(loaders)
