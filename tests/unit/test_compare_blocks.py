"""Bootstrap and permutation over blocks, against scipy's on the same samples, and benchstat's test."""

from __future__ import annotations

import numpy as np
import pytest
from pairs_made import recorded, side
from scipy import stats
from simulated import FUNCTION, one_call_a_block, plain

from stallscope.tracer.analysis.compare import blocks
from stallscope.tracer.analysis.compare.blocks import PerSecond, Quantile, Weighted
from stallscope.tracer.analysis.compare.sides import Side


def both(scale: float, seed: int = 1) -> tuple[Side, Side]:
    rng = np.random.default_rng(seed)
    return plain(rng.lognormal(10, 0.5, 4000), 60), plain(scale * rng.lognormal(10, 0.5, 4000), 60)


class TestCuts:
    def test_every_call_is_in_one_block(self) -> None:
        before, after = both(1.0)
        for cut, level in zip(blocks.cuts(before, after, FUNCTION), blocks.LEVELS, strict=True):
            for made in (cut.before, cut.after):
                assert len(made) == level
                assert made.count.sum() == made.bins.sum() == 4000
                assert made.exposure_s.sum() == pytest.approx(60)
                assert made.total_ns.sum() == pytest.approx(made.self_ns.sum())

    def test_blocks_are_as_long_on_both_sides(self) -> None:
        rng = np.random.default_rng(1)
        cut = blocks.cuts(plain(rng.lognormal(10, 1, 500), 24), plain(rng.lognormal(10, 1, 500), 72), FUNCTION)[0]
        assert (len(cut.before), len(cut.after)) == (24, 72)

    def test_of_a_recording_that_is_too_short_there_are_none(self) -> None:
        short = plain(np.full(20, 1e6), 2)
        assert blocks.cuts(short, short, FUNCTION) == []

    def test_bins_are_exact_in_the_tail_and_close_elsewhere(self) -> None:
        before, after = both(1.0)
        cut = blocks.cuts(before, after, FUNCTION)[0]
        lengths = np.sort(before.runs[0].spans[FUNCTION].duration_ns)
        once = Weighted(cut.before, np.ones((1, len(cut.before))))
        for share in (0.5, 0.99, 0.999, 1.0):
            found = Quantile(share).of(once, cut.length_ns)[0]
            exact = lengths[int(np.ceil(share * len(lengths))) - 1]
            # of the calls of both sides
            assert found == pytest.approx(exact, rel=0.02 if share < 0.999 else 1e-9)

    def test_what_was_only_counted_is_below_everything(self, tmp_path: object) -> None:
        one = plain(np.full(10, 2e6), 60, short_calls=990, min_duration_ns=1_000_000)
        cut = blocks.cuts(one, one, FUNCTION)[0]
        once = Weighted(cut.before, np.ones((1, len(cut.before))))
        assert Quantile(0.5).of(once, cut.length_ns)[0] == 1_000_000
        assert Quantile(0.995).of(once, cut.length_ns)[0] == 2_000_000


class TestAgainstScipy:
    @pytest.mark.parametrize("scale", [1.0, 1.3, 3.0])
    def test_permutations_of_blocks_of_one_call_each_are_scipys(self, scale: float) -> None:
        rng = np.random.default_rng(3)
        one, two = rng.lognormal(10, 0.5, 24), scale * rng.lognormal(10, 0.5, 24)
        cut = blocks.cuts(one_call_a_block(one), one_call_a_block(two), FUNCTION)[0]
        ours = blocks.change([cut], PerSecond("total_ns"), 0.95).p_value

        def change(x: np.ndarray, y: np.ndarray, axis: int) -> np.ndarray:
            return np.abs(np.log(y.mean(axis) / x.mean(axis)))

        theirs = stats.permutation_test(
            (one, two), change, vectorized=True, n_resamples=4000, alternative="greater", random_state=1
        ).pvalue
        assert ours == pytest.approx(theirs, abs=0.06)

    def test_the_bootstraps_error_is_scipys(self) -> None:
        rng = np.random.default_rng(4)
        sample = rng.lognormal(10, 0.5, 24)
        cut = blocks.cuts(one_call_a_block(sample), one_call_a_block(sample), FUNCTION)[0]
        found = blocks.change([cut], PerSecond("total_ns"), 0.95)
        theirs = stats.bootstrap((sample,), lambda x, axis: np.log(x.mean(axis)), random_state=1).standard_error
        # both sides together, and grown for the mean being taken from the same blocks
        assert found.variance == pytest.approx(2 * theirs**2 * 24 / 23, rel=0.2)

    @pytest.mark.parametrize(("scale", "seed"), [(1.0, 1), (1.0, 2), (1.5, 3), (2.0, 4), (0.6, 5)])
    def test_a_median_changes_where_benchstats_test_says_so(self, scale: float, seed: int) -> None:
        rng = np.random.default_rng(seed)
        one, two = rng.lognormal(10, 0.2, 24), scale * rng.lognormal(10, 0.2, 24)
        cut = blocks.cuts(one_call_a_block(one), one_call_a_block(two), FUNCTION)[0]
        ours = blocks.change([cut], Quantile(0.5), 0.95).p_value
        assert (ours < 0.05) == (stats.mannwhitneyu(one, two).pvalue < 0.05)


def test_one_block_can_never_be_evidence() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.lognormal(10, 0.1, 2400)
    storm = lengths.copy()
    storm[:90] *= 1000
    cut = blocks.cuts(plain(lengths, 60, ordered=True), plain(storm, 60, ordered=True), FUNCTION)[0]
    assert blocks.change([cut], PerSecond("total_ns"), 0.95).p_value > 0.3
    assert blocks.change([cut], Quantile(1.0), 0.95).p_value > 0.3


def test_recordings_tell_how_much_they_differ() -> None:
    rng = np.random.default_rng(2)
    runs = [plain(level * rng.lognormal(10, 0.1, 2000), 60).runs[0] for level in (1.0, 2.0, 0.5, 1.5)]
    cuts = blocks.cuts(Side(tuple(runs)), Side(tuple(runs)), FUNCTION)
    variance, freedom = blocks.change(cuts, Quantile(0.5), 0.95).runs
    assert freedom == 6
    assert variance == pytest.approx(np.var(np.log([1.0, 2.0, 0.5, 1.5]), ddof=1), rel=0.1)


def test_real_recordings_are_cut_too(tmp_path: object) -> None:
    from pathlib import Path

    assert isinstance(tmp_path, Path)
    one = side(recorded(tmp_path / "a.stall", [10.0, 20.0]))
    cut = blocks.cuts(one, one, "serverCron")[0]
    assert cut.before.count.sum() == 600
    assert cut.before.total_ns.sum() == pytest.approx(one.runs[0].spans["serverCron"].total_ns.sum())
