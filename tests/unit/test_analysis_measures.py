"""Numbers about arrays: worked out by hand, or by numpy on the whole array."""

from __future__ import annotations

import numpy as np
import pytest

from dino_exp.analysis import measures
from dino_exp.analysis.measures import Sums, change_sum, dead_rows, plain_sum, spectrum_of, square_sum, sums_of


def test_sums_of_two_small_arrays() -> None:
    found = sums_of(np.array([3.0, 0.0], np.float32), np.array([0.0, 4.0], np.float32))
    assert found == Sums(a=9.0, b=16.0, product=0.0, difference=25.0, largest=4.0)
    assert (found.distance, found.cosine) == (5.0, 0.0)
    assert found.relative == pytest.approx(5 / 3)


def test_sums_over_several_blocks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures, "_BLOCK", 7)
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal((5, 9)).astype(np.float32) for _ in range(2))
    found, exact_a, exact_b = sums_of(a, b), a.astype(float), b.astype(float)
    assert found.distance == pytest.approx(np.linalg.norm(exact_a - exact_b), rel=1e-12)
    assert found.cosine == pytest.approx((exact_a * exact_b).sum() / np.sqrt((exact_a**2).sum() * (exact_b**2).sum()))
    assert square_sum(a) == pytest.approx((exact_a**2).sum(), rel=1e-12)
    assert plain_sum(a) == pytest.approx(exact_a.sum(), rel=1e-9)
    assert change_sum(a, b) == pytest.approx(found.difference, rel=1e-6)
    assert found.largest == np.abs(exact_a - exact_b).max()


def test_nothing_and_zero_have_no_ratio_and_no_angle() -> None:
    empty, zero = np.empty((0, 3), np.float32), np.zeros(4, np.float32)
    assert square_sum(empty) == 0
    for found in (sums_of(empty, empty), sums_of(zero, np.ones(4, np.float32))):
        assert found.relative is None
        assert found.cosine is None


def test_sums_are_as_exact_as_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A million float32 of size 1 and one difference of 1e-4: a sum in float32 would lose it."""
    a = np.ones(1_000_000, np.float32)
    b = a.copy()
    b[500_000] += np.float32(1e-4)
    assert sums_of(a, b).distance == pytest.approx(float(b[500_000]) - 1.0, rel=1e-9)


def test_spectrum_of_known_matrices() -> None:
    equal = spectrum_of(np.eye(4, dtype=np.float32))
    assert equal is not None
    assert equal.effective_rank == pytest.approx(4.0)
    assert equal.spectral_norm == pytest.approx(1.0)
    one = spectrum_of(np.outer([1.0, 2.0, 2.0], [3.0, 4.0]).astype(np.float32))
    assert one is not None
    assert one.effective_rank == pytest.approx(1.0, abs=1e-5)
    assert one.spectral_norm == pytest.approx(15.0)
    tilted = spectrum_of(np.diag([3.0, 1.0]).astype(np.float32))
    assert tilted is not None
    shares = np.array([0.75, 0.25])
    assert tilted.effective_rank == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())))


@pytest.mark.parametrize("weight", [np.zeros((3, 3)), np.array([[np.nan, 1.0]]), np.ones(5), np.empty((0, 2))])
def test_what_has_no_spectrum(weight: np.ndarray) -> None:
    assert spectrum_of(weight) is None


def test_a_wide_and_a_tall_matrix_have_the_same_spectrum() -> None:
    weight = np.random.default_rng(1).standard_normal((3, 50)).astype(np.float32)
    assert spectrum_of(weight) == pytest.approx(spectrum_of(weight.T))
    singular = np.linalg.svd(weight.astype(float), compute_uv=False)
    found = spectrum_of(weight)
    assert found is not None
    assert found.spectral_norm == pytest.approx(singular[0])


@pytest.mark.parametrize("rank", [1, 2, 8, 96])
def test_a_low_rank_is_that_of_an_svd(rank: int) -> None:
    generator = np.random.default_rng(rank)
    weight = (generator.standard_normal((288, rank)) @ generator.standard_normal((rank, 96))).astype(np.float32)
    singular = np.linalg.svd(weight.astype(float), compute_uv=False)
    shares = singular / singular.sum()
    found = spectrum_of(weight)
    assert found is not None
    assert found.effective_rank == pytest.approx(float(np.exp(-(shares * np.log(shares)).sum())), rel=1e-4)


def test_dead_prototypes_are_those_without_gradient() -> None:
    second = np.array([[4.0, 4.0], [1.0, 1.0], [1e-6, 1e-6], [0.0, 0.0]])
    assert dead_rows(second) == 2
    assert dead_rows(np.ones((5, 3))) == 0
    assert dead_rows(np.zeros((5, 3))) == 0  # none has a gradient: nothing is known before the first step
