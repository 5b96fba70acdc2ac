import copy

import pytest
import torch
from torch.utils.data import RandomSampler, SequentialSampler

from lightning_compress.core.errors import ConfigurationError
from lightning_compress.data.order import EpochSampler, KeyedIndex, ResumableLoader, stream_key


class Ranked(EpochSampler):
    """The share of one rank without a process group."""

    def __init__(self, *arguments, place, **options):
        self.place = place
        super().__init__(*arguments, **options)

    def world(self):
        return self.place


def batches(loader, epoch=None):
    if epoch is not None:
        loader.sampler.set_epoch(epoch)
    return [batch.tolist() for batch in loader]


def test_order_depends_on_seed_and_epoch_alone():
    loader = ResumableLoader(range(20), batch_size=6, seed=5)
    first, second = batches(loader, 0), batches(loader, 1)
    torch.manual_seed(1)
    assert batches(ResumableLoader(range(20), batch_size=6, seed=5), 1) == second != first
    assert batches(ResumableLoader(range(20), batch_size=6, seed=6), 0) != first
    assert batches(ResumableLoader(range(20), batch_size=6, seed=1), 0) != batches(
        ResumableLoader(range(20), batch_size=6, seed=0), 1
    )
    assert sorted(index for batch in first for index in batch) == list(range(20))


def test_iterating_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(ResumableLoader(range(20), batch_size=6))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_position_can_be_resumed(workers, drop_last):
    options = {"batch_size": 3, "seed": 2, "num_workers": workers, "drop_last": drop_last}
    whole = batches(ResumableLoader(range(10), **options), 4)
    assert len(whole) == len(ResumableLoader(range(10), **options)) == (3 if drop_last else 4)
    for position in range(len(whole) + 1):
        loader = ResumableLoader(range(10), **options)
        loader.sampler.set_epoch(4)
        iterator = iter(loader)
        for _ in range(position):
            next(iterator)
        state = copy.deepcopy(loader.state_dict())
        again = ResumableLoader(range(10), **{**options, "seed": 0})
        again.load_state_dict(state)
        if position:
            assert again.state_dict() == state
            assert len(again) == len(whole)
            assert batches(again) == whole[position:]
        assert batches(again, 5) == batches(ResumableLoader(range(10), **options), 5)


def test_position_survives_persistent_workers():
    options = {"batch_size": 3, "num_workers": 1, "persistent_workers": True}
    loader = ResumableLoader(range(10), **options)
    reference = [batches(ResumableLoader(range(10), batch_size=3), epoch) for epoch in range(2)]
    assert [batches(loader, 0), batches(loader, 1)] == reference
    loader.load_state_dict({**loader.state_dict(), "epoch": 1, "batch": 2})
    assert batches(loader) == reference[1][2:]


def test_a_second_pass_without_a_new_epoch_starts_over():
    loader = ResumableLoader(range(5), batch_size=2)
    assert batches(loader) == batches(loader)


def test_an_iterator_made_before_the_epoch_is_set_follows_it():
    loader = ResumableLoader(range(9), batch_size=2, num_workers=1)
    iterator = iter(loader)
    loader.sampler.set_epoch(3)
    assert [batch.tolist() for batch in iterator] == batches(ResumableLoader(range(9), batch_size=2), 3)


def test_ranks_share_one_permutation():
    order = [int(index) for index in EpochSampler(range(10), seed=3)]
    shares = [list(Ranked(range(10), seed=3, place=(rank, 4))) for rank in range(4)]
    padded = [*order, order[0], order[1]]
    assert shares == [padded[rank::4] for rank in range(4)]
    shares = [list(Ranked(range(10), seed=3, drop_last=True, place=(rank, 4))) for rank in range(4)]
    assert shares == [order[:8][rank::4] for rank in range(4)]


def test_more_ranks_than_samples_repeat_them():
    assert [list(Ranked(range(2), shuffle=False, place=(rank, 5))) for rank in range(5)] == [[0], [1], [0], [1], [0]]


def test_a_changed_layout_is_refused_only_inside_an_epoch():
    state = {"epoch": 1, "batch": 2, "samples": 10, "batch_size": 2, "processes": 1, "seed": 0}
    loader = ResumableLoader(range(10), batch_size=3)
    with pytest.raises(ConfigurationError, match=r"inside epoch 1 taken with batch_size 2 \(now 3\)"):
        loader.load_state_dict(state)
    loader.load_state_dict({**state, "batch": 5})
    assert len(batches(loader, 2)) == 4


def test_wrong_arguments_are_named():
    with pytest.raises(ConfigurationError, match=r"`sampler`.*RandomSampler"):
        ResumableLoader(range(4), sampler=RandomSampler(range(4)))
    with pytest.raises(ConfigurationError, match="`batch_sampler`"):
        ResumableLoader(range(4), batch_sampler=[[0], [1]])
    with pytest.raises(ConfigurationError, match="`batch_size`"):
        ResumableLoader(range(4), batch_size=0)
    with pytest.raises(ConfigurationError, match="`seed`"):
        ResumableLoader(range(4), seed=-1)


def test_a_sequential_sampler_turns_shuffling_off():
    loader = ResumableLoader(range(4), batch_size=2, sampler=SequentialSampler(range(4)), batch_sampler=None)
    assert batches(loader) == [[0, 1], [2, 3]]


def test_keyed_index_keeps_its_key_in_copies():
    index = copy.deepcopy(KeyedIndex(3, stream_key(1, 2)))
    assert (index, index.key) == (3, stream_key(1, 2))
    assert 0 <= stream_key(0, 0) < 2**63
