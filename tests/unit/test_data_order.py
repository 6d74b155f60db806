import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_exp.data.order import batch_indices, epoch_of, epoch_order, steps_per_epoch
from dino_exp.errors import ConfigError


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 1000), st.integers(1, 200))
def test_an_epoch_covers_every_image_once(seed: int, epoch: int, num_samples: int) -> None:
    assert sorted(epoch_order(seed, epoch, num_samples)) == list(range(num_samples))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(epoch_order(seed, epoch, 100)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 60))
def test_batches_of_an_epoch_follow_its_order_and_drop_the_rest(num_samples: int, batch_size: int) -> None:
    if batch_size > num_samples:
        return
    per_epoch = steps_per_epoch(num_samples, batch_size)
    for epoch in (0, 3):
        steps = range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)
        assert {epoch_of(step, num_samples, batch_size) for step in steps} == {epoch}
        seen = np.concatenate([batch_indices(7, step, batch_size, num_samples) for step in steps])
        assert np.array_equal(seen, epoch_order(7, epoch, num_samples)[: per_epoch * batch_size])
        assert num_samples - len(seen) < batch_size


@pytest.mark.parametrize("batch_size", [0, 11])
def test_a_batch_that_does_not_fit_is_refused(batch_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"train\.batch_size is {batch_size}.*from 1 to 10"):
        steps_per_epoch(10, batch_size)


def test_the_shared_order_cannot_be_damaged() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(0, 0, 10)[0] = 3
    batch_indices(0, 1, 5, 10)[:] = 0
    assert sorted(epoch_order(0, 0, 10)) == list(range(10))
