import pytest
import torch

from service.training.sampler import BatchSampler, permutation


def _global_batches(num_images: int, per_rank: int, world_size: int, steps: range, seed: int = 5) -> list[list[int]]:
    ranks = [BatchSampler(num_images, per_rank, rank, world_size, seed) for rank in range(world_size)]
    return [torch.cat([rank.indices(step) for rank in ranks]).tolist() for step in steps]


def test_an_epoch_shows_each_image_at_most_once_and_drops_less_than_a_batch() -> None:
    batches = _global_batches(23, per_rank=2, world_size=3, steps=range(1, 4))
    seen = [image for batch in batches for image in batch]
    assert len(seen) == len(set(seen)) == 18
    assert BatchSampler(23, 2, 0, 3, seed=5).steps_per_epoch == 3


def test_the_global_batch_does_not_depend_on_the_number_of_ranks() -> None:
    assert _global_batches(50, 6, 1, range(1, 20)) == _global_batches(50, 2, 3, range(1, 20))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [permutation(100, seed, epoch).tolist() for seed in (0, 1) for epoch in (1, 2)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_any_step_can_be_the_first() -> None:
    straight = BatchSampler(23, 2, 1, 3, seed=9)
    expected = [straight.indices(step).tolist() for step in range(1, 12)]
    for first in range(1, 12):
        assert BatchSampler(23, 2, 1, 3, seed=9).indices(first).tolist() == expected[first - 1]


def test_steps_and_epochs_count_from_one() -> None:
    sampler = BatchSampler(23, 2, 0, 3, seed=0)
    assert [sampler.epoch(step) for step in range(1, 8)] == [1, 1, 1, 2, 2, 2, 3]


def test_fewer_images_than_a_global_batch_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"has 5 images.*batch of 6 \(3 workers x 2\); lower batch_size_per_worker"):
        BatchSampler(5, 2, 0, 3, seed=0)
