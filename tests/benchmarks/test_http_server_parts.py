"""The confidence interval of each ratio, and the workers without one of their parts."""

import numpy as np
import pytest

from benchmarks.http_server_parts.__main__ import CLASSES, ratio_interval
from benchmarks.http_server_parts.worker_ends import count_losses


def test_the_interval_contains_the_true_ratio_in_95_percent_of_cases() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        shared = random.lognormal(0, 0.5, 12)  # how busy the machine was during a pair
        noise = random.lognormal(0, 0.1, (2, 12))
        _, low, high = ratio_interval(1.2 * shared * noise[0], shared * noise[1])
        hits += low <= 1.2 <= high
    assert hits / 1000 == pytest.approx(0.95, abs=0.02)


def test_pairs_with_equal_ratios_have_an_interval_of_no_width() -> None:
    assert ratio_interval([2, 4, 6], [1, 2, 3]) == pytest.approx((2, 2, 2))


@pytest.mark.e2e
@pytest.mark.parametrize("name", CLASSES)
def test_a_worker_without_a_part_still_answers_and_ends(name: str) -> None:
    found = count_losses(CLASSES[name], ends=1)
    assert found["answered"] > 0
    assert found["refused"] == 0
