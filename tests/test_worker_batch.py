"""The size of calls, against handlers whose cost is a formula."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from gpujobd_worker.batch import CALL_S_MAX, GAIN, PATIENCE_CALLS, PROBE_CALLS, SAMPLES, Sizer

BATCH_MAX = 256


def drive(sizer: Sizer, seconds: Callable[[int], float], calls: int, batch_max: int = BATCH_MAX) -> list[int]:
    """The sizes of `calls` calls that take seconds(size)."""
    sizes = []
    for _ in range(calls):
        size = sizer.size(batch_max)
        assert 1 <= size <= batch_max
        sizer.took(size, seconds(size), batch_max)
        sizes.append(size)
    return sizes


def test_handler_that_does_nothing_is_at_the_top_after_three_calls():
    assert drive(Sizer(), lambda size: size * 1e-7, 5) == [1, 8, 64, 256, 256]


def test_gpu_where_a_batch_costs_what_one_costs_goes_to_the_top():
    sizes = drive(Sizer(), lambda _: 0.050, 30)
    assert sizes[-1] == BATCH_MAX
    assert sizes.index(BATCH_MAX) == 8 * SAMPLES


def test_batch_max_that_is_no_power_of_two_is_reached():
    assert drive(Sizer(), lambda _: 0.050, 40, batch_max=100)[-1] == 100


def test_plateau_keeps_the_smaller_of_equal_sizes():
    """all-MiniLM-L6-v2 on two cores: 85, 210, 201, 190 texts/s at 1, 8, 32, 128."""

    def seconds(size: int) -> float:
        return 0.012 + size / 210 if size < 8 else size / 210

    sizes = drive(Sizer(), seconds, 400)
    assert max(sizes) <= 32
    assert sizes.count(8) > 300


def test_bigger_is_worse_stays_at_one():
    """EfficientNet-Lite0 on two cores: 38 images/s at 1 and 8, 24 at 32."""
    sizes = drive(Sizer(), lambda size: size / (38 if size <= 8 else 24), 400)
    assert sizes.count(1) > 380
    assert max(sizes) == 2


def test_short_single_calls_that_get_worse_in_bulk_come_back_and_stay():
    sizes = drive(Sizer(), lambda size: 0.008 * size**1.5, 300)
    assert sizes.count(1) > 280


def test_settled_size_follows_when_conditions_change():
    sizer = Sizer()
    drive(sizer, lambda size: size * 0.02, 100)
    assert sizer.size(BATCH_MAX) == 1
    drive(sizer, lambda _: 0.02, 10 * PROBE_CALLS)
    assert sizer.size(BATCH_MAX) == BATCH_MAX
    drive(sizer, lambda size: size**2 * 0.002, 20 * PROBE_CALLS)
    assert sizer.size(BATCH_MAX) <= 4


def test_doubling_never_makes_a_call_longer_than_its_limit():
    sizes = drive(Sizer(), lambda size: 0.4 + size * 0.1, 200)
    assert 0.4 + max(sizes) * 0.1 <= CALL_S_MAX


def test_calls_grown_far_too_long_shrink_at_once():
    sizer = Sizer()
    drive(sizer, lambda _: 0.050, 40)
    sizer.took(256, 100.0, BATCH_MAX)
    assert sizer.size(BATCH_MAX) == int(256 * CALL_S_MAX / 100)


def test_calls_cut_short_say_nothing():
    sizer = Sizer()
    drive(sizer, lambda _: 0.050, 40)
    for _ in range(10):
        sizer.took(3, 100.0, BATCH_MAX)
    assert sizer.size(BATCH_MAX) == BATCH_MAX


def short_of_memory(sizer: Sizer, fits: int, calls: int) -> list[int]:
    """Sizes of `calls` calls that fail above `fits`."""
    sizes = []
    for _ in range(calls):
        size = sizer.size(BATCH_MAX)
        sizes.append(size)
        if size > fits:
            sizer.too_big(size)
        else:
            sizer.took(size, 0.050, BATCH_MAX)
    return sizes


def test_size_that_does_not_fit_is_not_tried_again_soon():
    sizer = Sizer()
    short_of_memory(sizer, 40, 40)
    assert sizer.size(BATCH_MAX) == 32
    assert max(short_of_memory(sizer, 40, PATIENCE_CALLS // 2)) <= 32


def test_ceiling_rises_slowly_and_patience_doubles():
    sizes = short_of_memory(Sizer(), 40, 5000)
    failed = [at for at, size in enumerate(sizes) if size > 40]
    assert len(failed) <= 8
    assert failed[-1] - failed[-2] > 4 * PATIENCE_CALLS
    assert max(size for size in sizes if size <= 40) > 32


def test_memory_that_comes_back_is_used_again():
    sizer = Sizer()
    short_of_memory(sizer, 40, 100)
    sizes = short_of_memory(sizer, 1000, 60 * PATIENCE_CALLS)
    assert sizes[-1] * GAIN > BATCH_MAX


@pytest.mark.parametrize("size", [1, 2, 3])
def test_nothing_fits_ends_at_one(size):
    sizer = Sizer()
    sizer.too_big(size)
    assert sizer.size(BATCH_MAX) == 1
