"""Streamed sums, ridge fits and the removal of units, each against a slow and obvious computation."""

import itertools

import numpy as np
import pytest

from keras_prune.least_squares import EXACT, Normal, Reader, eliminate, refit, refit_wide

TINY = 1e-10


def problem(seed, units=5, width=1, outputs=3, rows=80, noise=0.3):
    """(rows, weights, columns of each unit): correlated columns, as activations are; units' columns are scattered."""
    rng = np.random.default_rng(seed)
    size = units * width
    mix = rng.normal(size=(max(2, size // 2), size))
    x = rng.normal(size=(rows, len(mix))) @ mix + noise * rng.normal(size=(rows, size))
    return x, rng.normal(size=(size, outputs)), rng.permutation(size).reshape(units, width)


def reader(x, weights, columns, importance=1.0, ridge=TINY):
    size = ridge * np.square(x).sum() / x.shape[1]
    inverse = np.linalg.inv(x.T @ x + size * np.eye(x.shape[1]))
    return Reader(inverse, weights.copy(), columns, importance, size)


def best_without(x, weights, columns, gone):
    """The weights that make x @ weights best without the columns of some units, and the squared error left."""
    kept = np.setdiff1d(np.arange(x.shape[1]), columns[list(gone)].ravel())
    found = np.zeros_like(weights)
    found[kept] = np.linalg.lstsq(x[:, kept], x @ weights, rcond=None)[0]
    return found, np.square(x @ (weights - found)).sum()


# -- optimal brain surgeon ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", (1, 9))
@pytest.mark.parametrize("outputs", (1, 4))
def test_the_cost_of_a_unit_is_the_error_of_the_best_fit_without_it(width, outputs):
    for seed in range(5):
        x, w, columns = problem(seed, 5, width, outputs)
        expected = [best_without(x, w, columns, [unit])[1] for unit in range(5)]
        costs = reader(x, w, columns).costs(np.arange(5))
        assert np.allclose(costs, expected, rtol=1e-5)
        alone = [np.square(x[:, j] @ w[j]).sum() for j in columns]
        assert not np.allclose(costs, alone, rtol=0.1)  # not merely what it contributes
        assert np.allclose(reader(x, w, columns, importance=3.0).costs(np.arange(5)), 3 * costs)


@pytest.mark.parametrize("width", (1, 9))
def test_weights_and_costs_along_any_sequence_are_those_of_the_best_fits(width):
    for seed in range(5):
        x, w, columns = problem(seed, 6, width)
        one, gone, before = reader(x, w, columns), [], 0.0
        for unit in np.random.default_rng(seed).permutation(6)[:5]:
            cost = one.costs(np.array([unit]))[0]
            one.remove(int(unit))
            gone.append(unit)
            expected, error = best_without(x, w, columns, gone)
            assert np.allclose(one.weights, expected, atol=1e-5)
            assert np.isclose(cost, error - before, rtol=1e-4, atol=1e-6)
            assert not one.weights[columns[gone]].any()
            before = error
        cut = w.copy()
        cut[columns[gone].ravel()] = 0
        assert np.abs(one.weights - cut).max() > 1e-2  # zeros alone are something else


@pytest.mark.parametrize("width", (1, 9))
def test_eliminate_takes_the_cheapest_for_all_readers_together(width):
    """The oracle fits every reader anew for every unit that is left."""
    parts = [problem(seed, 6, width, outputs=seed + 1) for seed in range(3)]
    importances, fixed = (1.0, 0.2, 5.0), np.array([0.0, 300.0, 0.0, 20.0, 0.0, 4.0]) * width
    gone, total, rows = [], [0.0], []
    for _ in range(5):
        totals = {
            unit: sum(i * best_without(*p, [*gone, unit])[1] for p, i in zip(parts, importances))
            + fixed[[*gone, unit]].sum()
            for unit in set(range(6)) - set(gone)
        }
        gone.append(min(totals, key=totals.get))
        total.append(totals[gone[-1]])
        rows.append([best_without(*p, gone)[0] for p in parts])
    done = eliminate([reader(*p, i) for p, i in zip(parts, importances)], fixed, looks=(1, 4, 5))
    assert list(done.order) == gone
    assert np.allclose(done.costs, np.diff(total), rtol=1e-4) and np.allclose(done.errors, total[1:], rtol=1e-4)
    assert sorted(done.weights) == [1, 4, 5]
    for n, weights in done.weights.items():
        assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(weights, rows[n - 1]))
    lonely = eliminate([reader(*parts[0])])
    assert list(lonely.order) != gone  # the others have a say


@pytest.mark.parametrize("width", (1, 9))
def test_a_unit_that_is_a_combination_of_others_leaves_without_a_trace(width):
    for seed in range(5):
        x, w, columns = problem(seed, 5, width, noise=1.0, rows=200)
        mixing = np.random.default_rng(seed).normal(size=(2 * width, width))
        x[:, columns[2]] = x[:, columns[[0, 4]].ravel()] @ mixing
        done = eliminate([reader(x, w, columns)], looks=(1, 2))
        energy = np.square(x @ w).sum()
        assert done.order[0] in (0, 2, 4)  # any of the three makes the others
        assert np.abs(x @ (done.weights[1][0] - w)).max() < 1e-6 * np.abs(x @ w).max()
        assert done.costs[0] < 1e-9 * energy
        assert np.abs(x @ (done.weights[2][0] - w)).max() > 1e-2 and done.costs[1] > 1e-4 * energy  # the next one does


def test_greedy_is_never_below_the_best_of_all_subsets_and_within_a_factor_of_five_of_it():
    """Of 200 problems with 6 to 8 units, all numbers of removals: the worst is 4.6 times as dear, the mean 1.06."""
    ratios = []
    for seed in range(200):
        units, width = 6 + seed % 3, 1 + seed % 2
        x, w, columns = problem(seed, units, width, rows=60, noise=(0.3, 1.0)[seed % 5 > 2])
        done = eliminate([reader(x, w, columns)])
        gram = x.T @ x
        for n in {1, 2, units // 2, units - 2, units - 1}:
            best = min(_error(gram, w, columns, gone) for gone in itertools.combinations(range(units), n))
            ratios.append(done.errors[n - 1] / best)
    assert min(ratios) > 1 - 1e-6
    assert max(ratios) < 5 and np.mean(ratios) < 1.1
    assert max(ratios) > 1.05  # it is not the optimum either


def _error(gram, w, columns, gone):
    """Squared error of the best fit, by the Schur complement: fast enough for all subsets."""
    out = columns[list(gone)].ravel()
    kept = np.setdiff1d(np.arange(len(w)), out)
    rest = gram[np.ix_(out, out)] - gram[np.ix_(out, kept)] @ np.linalg.solve(
        gram[np.ix_(kept, kept)], gram[np.ix_(kept, out)]
    )
    return (w[out] * (rest @ w[out])).sum()


def test_the_oracle_of_all_subsets_is_the_best_fit():
    x, w, columns = problem(0, 6, 2)
    for gone in ((0,), (1, 4), (0, 2, 3, 5)):
        assert np.isclose(_error(x.T @ x, w, columns, gone), best_without(x, w, columns, gone)[1])


def test_errors_do_not_hold_what_the_pull_to_the_original_weights_costs():
    """With fewer rows than columns the costs are many times the energy of what the kernel makes."""
    x, w, columns = problem(0, 10, 8, rows=12)
    done = eliminate([reader(x, w, columns, ridge=80 / 12)], looks=range(1, 10))
    energy = np.square(x @ w).sum()
    errors = [np.square(x @ (done.weights[n][0] - w)).sum() for n in range(1, 10)]
    assert np.allclose(done.errors, np.maximum.accumulate(errors), rtol=1e-6)
    assert done.costs.sum() > 3 * energy and done.errors[4] < energy


def test_of_many_units_several_leave_at_once_but_never_both_of_a_pair():
    """300 units, 150 pairs of equals: as two leave at a time, the second half of a pair must wait."""
    rng = np.random.default_rng(0)
    half = rng.normal(size=(400, 150))
    x, w = np.repeat(half, 2, axis=1), rng.normal(size=(300, 2))
    done = eliminate([reader(x, w, np.arange(300)[:, None], ridge=1e-8)], looks=(150,))
    assert len(set(done.order[:150] // 2)) == 150
    assert np.abs(x @ (done.weights[150][0] - w)).max() < 1e-4
    assert done.costs[:150].max() < 1e-4 < done.costs[150:].min()
    assert sorted([*done.order, *(set(range(300)) - set(done.order))]) == list(range(300)) and len(done.order) == 299


def test_the_other_half_of_a_pair_waits_even_if_it_was_second_in_line():
    """Of 300 units two leave at a time; the pair costs nothing, but one of the two is worth more than all others."""
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(400, 300)), rng.normal(size=(300, 2))
    x[:, 0] *= 10
    x[:, 299] = x[:, 0]
    one = reader(x, w, np.arange(300)[:, None], ridge=1e-9)
    assert set(one.costs(np.arange(300)).argsort()[:2]) == {0, 299}
    order = list(eliminate([one]).order)
    assert order[0] in (0, 299) and not {0, 299} <= set(order)


def test_at_once_changes_little_and_only_above_that_many():
    x, w, columns = problem(3, 40, rows=200)
    one, two = (eliminate([reader(x, w, columns)], at_once=n, looks=(20,)) for n in (40, 8))
    assert not np.array_equal(one.order, two.order)
    assert one.errors[-5] < two.errors[-5] * 1.2 and two.errors[-5] < one.errors[-5] * 1.2
    assert np.allclose(two.weights[20][0], best_without(x, w, columns, two.order[:20])[0], atol=1e-4)
    assert np.array_equal(eliminate([reader(x, w, columns)]).order, one.order)


def test_one_unit_two_units_none_that_read_and_readers_without_importance():
    x, w, columns = problem(0, 2)
    assert eliminate([reader(x[:, :1], w[:1], columns[:1] * 0)]).order.size == 0
    assert len(eliminate([reader(x, w, columns)]).order) == 1
    done = eliminate([], np.array([3.0, 1.0, 2.0]))
    assert list(done.order) == [1, 2] and list(done.costs) == [1, 2] and list(done.errors) == [1, 3]
    assert not eliminate([reader(x, w, columns, importance=0.0)]).costs.any()
    dark = eliminate([Reader(np.eye(2) / 3, w, columns, ridge=3.0)])  # inputs that are always 0
    assert dark.costs > 0 and dark.errors == 0


# -- sums and fits -----------------------------------------------------------------------------------------------


def data(seed=0, blocks=2, rows=50, columns=6, outputs=3):
    """(x, y, prior) with means far from 0."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(blocks, rows, columns)) + rng.normal(2, 1, (blocks, 1, columns))
    y = x @ rng.normal(size=(blocks, columns, outputs)) + rng.normal(size=(blocks, rows, outputs)) + 5
    return x, y, rng.normal(size=(blocks, columns, outputs))


def summed(x, y, cuts=()):
    normal = Normal(*x.shape[::2], y.shape[2])
    for a, b in itertools.pairwise([0, *cuts, x.shape[1]]):
        normal.add(x[:, a:b], y[:, a:b])
    return normal


def test_sums_are_those_of_all_rows_whatever_the_portions():
    x, y, prior = data()
    whole = summed(x, y)
    assert np.allclose(whole.gram, np.einsum("bri,brj->bij", x, x))
    assert np.allclose(whole.cross, np.einsum("bri,bro->bio", x, y))
    for cuts in ((25,), (1, 2, 3, 49), range(1, 50)):
        parts = summed(x, y, cuts)
        assert parts.count == whole.count == 50
        for name in ("gram", "cross", "sum_x", "sum_y", "square"):
            assert np.allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12), name
        assert np.allclose(refit(parts, prior, 0.1), refit(whole, prior, 0.1), rtol=1e-10)
    missing = summed(x[:, :-1], y[:, :-1])
    assert not np.allclose(refit(missing, prior, 0.1), refit(whole, prior, 0.1), rtol=1e-4)


def test_wide_sums_are_taken_in_single_precision_and_added_in_double():
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(1, 30, n)).astype("float32") for n in (EXACT + 1, 2))
    normal = summed(x, y, (7, 20))
    exact = x.astype(np.float64)[0].T @ x.astype(np.float64)[0]
    assert normal.gram.dtype == np.float64
    assert 0 < np.abs(normal.gram[0] - exact).max() < 1e-4
    narrow = summed(x[:, :, :9], y)
    assert np.abs(narrow.gram[0] - exact[:9, :9]).max() < 1e-12


@pytest.mark.parametrize("strength", (1e-9, 0.1, 10.0, None))
def test_refit_is_the_minimum_of_error_and_pull(strength):
    """The oracle appends the pull to the rows and takes numpy's least squares."""
    x, y, prior = data()
    found = refit(summed(x, y), prior, strength)
    for block in range(2):
        used = max(1e-3, 6 / 50) if strength is None else strength
        root = np.sqrt(used * np.mean(np.square(x[block]).sum(0)))
        rows, wanted = np.vstack([x[block], root * np.eye(6)]), np.vstack([y[block], root * prior[block]])
        expected = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        assert np.allclose(found[block], expected, atol=1e-8)
        assert np.allclose(refit_wide(x[block], y[block], prior[block], strength), expected, atol=1e-6)
        assert not np.allclose(found[block], np.linalg.lstsq(x[block], y[block], rcond=None)[0], atol=1e-3) or (
            used == 1e-9
        )


def test_refit_wide_is_refit_for_more_columns_than_rows():
    x, y, prior = data(rows=8, columns=30)
    for strength in (1e-4, 1.0, None):
        narrow = refit(summed(x, y), prior, strength)
        for block in range(2):
            wide = refit_wide(x[block], y[block], prior[block], strength)
            assert np.allclose(wide, narrow[block], atol=1e-6)
            assert not np.allclose(wide, prior[block], atol=1e-2)
    exact = refit_wide(x[0], y[0], prior[0], 1e-9)
    assert np.abs(x[0] @ exact - y[0]).max() < 1e-5  # eight rows can be met


def test_centred_sums_fit_with_a_free_intercept():
    x, y, prior = data()
    normal = summed(x, y, (10,))
    found = refit(normal.centred(), prior, 1e-12)
    for block in range(2):
        design = np.hstack([x[block], np.ones((50, 1))])
        expected = np.linalg.lstsq(design, y[block], rcond=None)[0]
        assert np.allclose(found[block], expected[:-1], atol=1e-6)
        intercept = (normal.sum_y[block] - normal.sum_x[block] @ found[block]) / normal.count
        assert np.allclose(intercept, expected[-1], atol=1e-6)
        residual = np.square(y[block] - design @ expected).sum(0)
        assert np.allclose(normal.centred().error(found)[block], residual, rtol=1e-6)
    assert not np.allclose(refit(normal, prior, 1e-12), found, atol=1e-2)


def test_error_is_the_squared_residual():
    x, y, prior = data()
    normal = summed(x, y, (3, 30))
    assert np.allclose(normal.error(prior), np.square(y - x @ prior).sum(1), rtol=1e-9)
    assert (normal.error(refit(normal, prior, 1e-9)) < normal.error(prior)).all()
    perfect = summed(x, x @ prior)
    assert (perfect.error(prior) >= 0).all() and perfect.error(prior).max() < 1e-8


def test_ridge_is_stronger_the_fewer_rows_there_are():
    for rows, strength in ((6, 1.0), (60, 0.1), (60000, 1e-3)):
        normal = Normal(1, 6, 1)
        normal.count, normal.gram = rows, 4.0 * np.eye(6)[None]
        assert normal.ridge().shape == (1, 1, 1) and np.isclose(normal.ridge()[0, 0, 0], 4 * strength)
        assert np.isclose(normal.ridge(0.5)[0, 0, 0], 2.0)


def test_inputs_that_are_all_zero_leave_the_prior():
    x, y, prior = data()
    assert np.allclose(refit(summed(x * 0, y), prior), prior)
    assert np.allclose(refit_wide(x[0] * 0, y[0], prior[0]), prior[0])
    assert np.allclose(refit(Normal(2, 6, 3), prior), prior) and np.allclose(
        refit(Normal(2, 6, 3).centred(), prior), prior
    )
