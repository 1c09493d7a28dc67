import numpy as np
import pytest

from keras_prune import budgets


def scores(seed=0):
    rng = np.random.default_rng(seed)
    return [rng.uniform(0.1, 1, 5), rng.uniform(1, 2, 16), rng.uniform(0, 3, 32)]


@pytest.mark.parametrize("name", sorted(budgets.BUDGETS))
@pytest.mark.parametrize("seed", range(3))
def test_more_amount_never_brings_a_unit_back_and_no_group_is_emptied(name, seed):
    budget, given = budgets.get(name), scores(seed)
    before = [np.zeros(len(s), bool) for s in given]
    for amount in np.linspace(0, 1, 41):
        now = budget(given, amount)
        assert [r.shape for r in now] == [s.shape for s in given]
        assert all((b <= n).all() for b, n in zip(before, now))
        assert not any(r.all() for r in now)
        before = now
    assert sum(r.sum() for r in before) > 0.8 * sum(len(s) for s in given)  # and it does remove


@pytest.mark.parametrize("name", sorted(budgets.BUDGETS))
def test_within_a_group_the_lowest_scores_leave_first(name):
    for removed, s in zip(budgets.get(name)(scores(), 0.5), scores()):
        if removed.any() and not removed.all():
            assert s[removed].max() <= s[~removed].min()


def test_global_takes_from_the_weak_group_and_uniform_from_all():
    given = [np.linspace(0.1, 0.2, 10), np.linspace(1.0, 2.0, 10)]
    assert [r.sum() for r in budgets.global_(given, 0.4)] == [8, 0]
    assert [r.sum() for r in budgets.uniform(given, 0.4)] == [4, 4]


def test_global_spares_a_tenth_of_a_group_while_others_can_give():
    given = [np.full(20, 0.1), np.full(20, 5.0)]
    assert [r.sum() for r in budgets.global_(given, 0.6)] == [18, 6]


def test_equal_scores_leave_evenly_from_all_groups_and_exactly_as_many_as_asked():
    assert [r.sum() for r in budgets.global_([np.ones(10), np.ones(30)], 0.5)] == [5, 15]


def test_unknown_budget_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="budget='fair' is not known. Known: error_bound, global, greedy, pca, uniform"
    ):
        budgets.get("fair")
