import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, least_squares, minimize_scalar

from headway.budget.scale_rl import ComputePerformanceFit, compare_recipes, read_csv, sigmoid_curve
from headway.testing import check_planner

TRUE = {"asymptote": 0.610, "exponent": 1.92, "midpoint": 2542.0, "initial": 0.30}
COMPUTE = np.linspace(1500, 8000, 27)


def observed(compute=COMPUTE, seed=0, noise=0.003, **changes):
    return sigmoid_curve(compute, **{**TRUE, **changes}) + noise * np.random.default_rng(seed).standard_normal(
        len(compute)
    )


def fitted(compute=COMPUTE, initial=0.30, **changes):
    return ComputePerformanceFit(initial=initial).fit(compute, observed(compute, **changes))


def test_contract_of_planners():
    check_planner(
        ComputePerformanceFit,
        fit=(COMPUTE, observed()),
        predict=(np.array([2000.0, 16000.0]),),
        arguments={"initial": 0.30},
    )


PARAMETERS = {
    "asymptote": st.floats(0.4, 1),
    "exponent": st.floats(0.2, 4),
    "midpoint": st.floats(1e-2, 1e6),
    "initial": st.floats(0, 0.3),
}


class TestCurve:
    @given(**PARAMETERS)
    def test_at_the_midpoint_half_of_the_gain_is_made(self, asymptote, exponent, midpoint, initial):
        value = sigmoid_curve(midpoint, asymptote, exponent, midpoint, initial)
        assert value == pytest.approx((initial + asymptote) / 2, rel=1e-12)

    @given(**PARAMETERS)
    def test_it_is_the_formula_increases_and_stays_within_its_limits(self, asymptote, exponent, midpoint, initial):
        compute = midpoint * np.geomspace(1e-3, 1e3, 31)
        values = sigmoid_curve(compute, asymptote, exponent, midpoint, initial)
        formula = initial + (asymptote - initial) / (1 + (midpoint / compute) ** exponent)
        np.testing.assert_allclose(values, formula, rtol=1e-12, atol=1e-15)
        assert (np.diff(values) >= 0).all()
        assert ((initial <= values) & (values <= asymptote + 1e-15)).all()

    def test_the_limits_are_initial_and_asymptote(self):
        assert sigmoid_curve(1e-30, **TRUE) == pytest.approx(0.30, abs=1e-15)
        assert sigmoid_curve(math.inf, **TRUE) == pytest.approx(0.61, abs=1e-15)


class TestFit:
    @settings(max_examples=15, deadline=None)
    @given(asymptote=st.floats(0.5, 0.9), exponent=st.floats(0.8, 3), midpoint=st.floats(1500, 6000))
    def test_noise_free_data_are_recovered(self, asymptote, exponent, midpoint):
        fit = fitted(noise=0, asymptote=asymptote, exponent=exponent, midpoint=midpoint)
        assert fit.asymptote_ == pytest.approx(asymptote, rel=1e-6)
        assert fit.exponent_ == pytest.approx(exponent, rel=1e-6)
        assert fit.midpoint_ == pytest.approx(midpoint, rel=1e-6)

    def test_a_change_of_unit_scales_the_midpoint_and_nothing_else(self):
        hours, seconds = (ComputePerformanceFit(initial=0.3).fit(k * COMPUTE, observed()) for k in (1.0, 3600.0))
        assert seconds.midpoint_ == pytest.approx(3600 * hours.midpoint_, rel=1e-6)
        assert (seconds.asymptote_, seconds.exponent_) == pytest.approx((hours.asymptote_, hours.exponent_), rel=1e-6)
        assert seconds.asymptote_interval()[:2] == pytest.approx(hours.asymptote_interval()[:2], abs=1e-6)

    def test_closed_form_asymptote_equals_numerical_minimisation(self):
        fit = fitted()

        def sse(asymptote):
            curve = sigmoid_curve(COMPUTE, asymptote, fit.exponent_, fit.midpoint_, 0.30)
            return ((observed() - curve) ** 2).sum()

        assert minimize_scalar(sse, bounds=(0.3, 1), method="bounded", options={"xatol": 1e-10}).x == pytest.approx(
            fit.asymptote_, abs=1e-6
        )
        assert sse(fit.asymptote_) == pytest.approx(fit.sse_, rel=1e-12)

    def test_no_neighbour_has_a_smaller_sum_of_squares(self):
        fit = fitted()
        for name in ("asymptote", "exponent", "midpoint"):
            for factor in (0.999, 1.001):
                values = {"asymptote": fit.asymptote_, "exponent": fit.exponent_, "midpoint": fit.midpoint_}
                values[name] *= factor
                assert ((observed() - sigmoid_curve(COMPUTE, initial=0.30, **values)) ** 2).sum() > fit.sse_

    def test_weight_two_equals_the_observation_twice_for_the_curve(self):
        weights = np.ones(27)
        weights[5] = 2
        weighted = ComputePerformanceFit(initial=0.3).fit(COMPUTE, observed(), sample_weight=weights)
        twice = ComputePerformanceFit(initial=0.3).fit(
            np.insert(COMPUTE, 5, COMPUTE[5]), np.insert(observed(), 5, observed()[5])
        )
        assert weighted.predict(16000.0) == pytest.approx(twice.predict(16000.0), abs=1e-8)

    def test_weight_zero_leaves_an_observation_out(self):
        y, weights = observed(), np.ones(27)
        y[3], weights[3] = 0.9, 0.0
        without = ComputePerformanceFit(initial=0.3).fit(np.delete(COMPUTE, 3), np.delete(observed(), 3))
        fit = ComputePerformanceFit(initial=0.3).fit(COMPUTE, y, sample_weight=weights)
        assert fit.predict(16000.0) == without.predict(16000.0)
        assert fit.points_ == 26

    def test_the_start_below_min_compute_does_not_matter_except_as_initial(self):
        compute = np.concatenate([[1.0, 10.0, 100.0], COMPUTE])
        y = np.concatenate([[0.30, 0.45, 0.1], observed()])
        fit = ComputePerformanceFit(min_compute=1500).fit(compute, y)
        assert fit.initial_ == 0.30
        assert fit.predict(16000.0) == fitted().predict(16000.0)


class TestInterval:
    def test_of_the_asymptote_equals_the_profile_by_direct_minimisation(self):
        fit, y = fitted(), observed()

        def profile(asymptote):
            def residual(theta):
                return y - sigmoid_curve(COMPUTE, asymptote, theta[0], math.exp(theta[1]), 0.30)

            start = (fit.exponent_, math.log(fit.midpoint_))
            return 2 * least_squares(residual, start, xtol=1e-12, ftol=1e-12).cost

        # 4.2597 is the 95 % quantile of F(1, 24).
        limit = fit.sse_ * (1 + 4.2597 / 24)
        assert profile(fit.asymptote_) == pytest.approx(fit.sse_, rel=1e-9)
        low, high, identified = fit.asymptote_interval()
        width = high - low
        assert identified
        assert low == pytest.approx(brentq(lambda a: profile(a) - limit, low - width, fit.asymptote_), abs=5e-3 * width)
        assert high == pytest.approx(
            brentq(lambda a: profile(a) - limit, fit.asymptote_, high + width), abs=5e-3 * width
        )

    def test_it_grows_with_the_level_and_with_the_distance_of_the_forecast(self):
        fit = fitted()
        widths = [high - low for low, high in (fit.interval(16000.0, level=level) for level in (0.5, 0.9, 0.99))]
        assert widths == sorted(widths)
        low, high = fit.interval(np.array([4000.0, 16000.0, 1e6]))
        assert (np.diff(high - low) > 0).all()

    def test_four_points_are_covered_as_often_as_many(self):
        compute = np.linspace(1500, 8000, 4)
        intervals = [fitted(compute, seed=seed).asymptote_interval() for seed in range(30)]
        assert sum(low <= 0.61 <= high for low, high, _ in intervals) >= 26

    def test_an_early_window_is_not_identified(self):
        fit = fitted(compute=np.linspace(200, 1271, 41))
        assert not fit.identified_
        assert fit.asymptote_interval()[1] > 0.9

    def test_data_that_keep_rising_touch_the_highest_asymptote(self):
        compute = np.geomspace(1, 100, 20)
        with pytest.warns(UserWarning, match="midpoint ended at the edge of its search range, 1000"):
            fit = ComputePerformanceFit(initial=0.0).fit(compute, 0.1 * np.sqrt(compute / 100))
        low, high, identified = fit.asymptote_interval()
        assert high <= 1
        assert not identified
        assert low <= fit.asymptote_ <= high

    def test_noise_free_data_have_a_point_as_interval(self):
        low, high, identified = fitted(noise=0).asymptote_interval()
        assert high - low < 1e-6
        assert identified

    def test_forecast_warns_beyond_twice_the_range(self):
        fit = fitted()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mean, low, high = fit.forecast(16000.0)
        assert low < mean == fit.predict(16000.0) < high
        with pytest.warns(UserWarning, match="100000 is beyond 16000, twice the fitted range"):
            fit.forecast(np.array([1e4, 1e5]))


class TestRefusals:
    @pytest.mark.parametrize(
        ("compute", "performance", "message"),
        [
            ([0, 1, 2, 3, 4], [0.1] * 5, "compute must be > 0, got 0 at position 0"),
            ([1, 2, 5, 3, 4], [0.1] * 5, r"compute must not decrease .*, got 3 after 5 at position 3"),
            ([1, 2, 3], [0.1] * 3, "at least 4 points .* min_compute = 0, got 3"),
            (
                [1, 2, 3, 4],
                [0.1, 0.2, 1.5, 0.3],
                r"performance must be in \[0, max_asymptote = 1\], got 1.5 at position 2",
            ),
            ([1, 2, 3, 4], [0.1, -0.2, 0.5, 0.3], "got -0.2 at position 1"),
            ([1, 2, 3, 4], [0.1, math.nan, 0.5, 0.3], "performance must be finite"),
            ([1, 2, 3, 4], [0.1, 0.2, 0.3], "must be sequences of one length"),
        ],
    )
    def test_bad_data(self, compute, performance, message):
        with pytest.raises(ValueError, match=message):
            ComputePerformanceFit().fit(compute, performance)

    @pytest.mark.parametrize(
        ("weights", "message"),
        [
            ([1, 1, -1, 1], "got -1 at position 2"),
            ([1, 1, 1], "one weight per performance, 4"),
            ([0, 0, 1, 1], "got 2"),
        ],
    )
    def test_bad_weights(self, weights, message):
        with pytest.raises(ValueError, match=message):
            ComputePerformanceFit().fit([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4], sample_weight=weights)

    def test_initial_above_the_highest_asymptote(self):
        with pytest.raises(ValueError, match=r"initial must be < max_asymptote = 1, got 1\.2"):
            ComputePerformanceFit(initial=1.2)
        assert ComputePerformanceFit(initial=30, max_asymptote=100).initial == 30

    def test_no_compute_at_or_below_zero_is_predicted(self):
        with pytest.raises(ValueError, match="compute must be > 0, got 0"):
            fitted().predict(0.0)

    def test_an_initial_above_all_data_is_warned_about(self):
        with pytest.warns(UserWarning, match=r"initial = 0.9 lies above all performances"):
            ComputePerformanceFit(initial=0.9).fit(COMPUTE, observed(asymptote=0.2, initial=0.89, noise=0))

    def test_an_exponent_at_the_edge_is_warned_about(self):
        step = np.where(COMPUTE < 4000, 0.31, 0.6)
        with pytest.warns(UserWarning, match="exponent ended at the edge of its search range, 4"):
            ComputePerformanceFit(initial=0.3).fit(COMPUTE, step)

    def test_a_first_observation_that_comes_late_is_warned_about(self):
        with pytest.warns(UserWarning, match="give the performance before training"):
            fit = ComputePerformanceFit().fit(COMPUTE, observed())
        assert not fit.identified_
        assert fitted().identified_


class TestComputeFor:
    @given(performance=st.floats(0.31, 0.59))
    def test_it_inverts_predict(self, performance):
        assert FIT.predict(FIT.compute_for(performance)) == pytest.approx(performance, abs=1e-9)

    def test_outside_the_curve(self):
        assert FIT.compute_for(0.7) == math.inf
        assert FIT.compute_for(0.2) == 0


FIT = fitted()


class TestComparison:
    compute = np.geomspace(500, 20000, 60)

    def test_a_higher_ceiling(self):
        low, high = (fitted(self.compute, asymptote=a, seed=s) for s, a in enumerate((0.52, 0.61)))
        report = compare_recipes(low, high)
        assert (report.verdict, report.better, report.identified) == ("asymptote", "b", True)
        assert report.asymptote_difference == pytest.approx(-0.09, abs=0.01)
        assert compare_recipes(high, low).better == "a"

    def test_the_same_ceiling_with_less_compute(self):
        fast, slow = (fitted(self.compute, midpoint=m, seed=s) for s, m in enumerate((2000.0, 3000.0)))
        report = compare_recipes(fast, slow)
        assert (report.verdict, report.better) == ("efficiency", "a")
        assert report.compute_ratio == pytest.approx(2 / 3, rel=0.05)

    def test_two_noise_seeds_of_one_recipe(self):
        report = compare_recipes(*(fitted(self.compute, seed=s) for s in (0, 1)))
        assert (report.verdict, report.better) == ("indistinguishable", None)

    def test_ceilings_that_are_not_identified_are_not_compared(self):
        early = [fitted(np.linspace(200, 1271, 41), asymptote=a) for a in (0.58, 0.61)]
        report = compare_recipes(*early)
        assert report.verdict != "asymptote"
        assert not report.identified

    def test_a_difference_within_the_margin_is_no_difference_of_ceilings(self):
        close = [fitted(self.compute, asymptote=a, noise=1e-5) for a in (0.60, 0.61)]
        assert compare_recipes(*close).verdict != "asymptote"
        assert compare_recipes(*close, margin=0.005).verdict == "asymptote"
        with pytest.raises(ValueError, match="margin must be >= 0"):
            compare_recipes(*close, margin=-1)


def test_plain_values_hold_options_and_data():
    fit = ComputePerformanceFit(initial=0.3, min_compute=2000).fit(COMPUTE, observed())
    again = ComputePerformanceFit.from_dict(json.loads(json.dumps(fit.to_dict())))
    assert again.interval(16000.0) == fit.interval(16000.0)
    assert again.to_dict() == fit.to_dict()


class TestReadCsv:
    def write(self, tmp_path, text):
        path = tmp_path / "runs.csv"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    def test_two_columns_among_others_by_name(self, tmp_path):
        path = self.write(tmp_path, '\ufeffrun,hours,rate\n"a,b",1e2,0.25\nc,200,0.5\n')
        assert read_csv(path, "hours", "rate") == ([100.0, 200.0], [0.25, 0.5])

    def test_rows_without_an_evaluation_are_left_out(self, tmp_path):
        assert read_csv(self.write(tmp_path, "c,p\n1,\n2,0.5\n3\n"), "c", "p") == ([2.0], [0.5])

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("hours,rate\n1,0.5\n", r"runs.csv has no column 'hour' \(did you mean 'hours'\?\)"),
            ("", r"has no column 'hour' \(the file is empty\)"),
            ("hour,rate\n1,0.5\nx,0.6\n", "runs.csv, line 3: hour must be a number, got 'x'"),
            ("hour,rate\n,0.5\n", "runs.csv, line 2: hour must be a number, got ''"),
            ("hour,rate\n1,\n", "has no row with a value of 'rate'"),
            (b"hour,rate\n\xff\xfe,1\n", "is no CSV file in UTF-8"),
        ],
        ids=["column", "empty", "word", "blank", "no rows", "bytes"],
    )
    def test_errors_name_the_place(self, tmp_path, text, message):
        with pytest.raises(ValueError, match=message):
            read_csv(self.write(tmp_path, text), "hour", "rate")
