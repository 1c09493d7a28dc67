import numpy as np
import pytest

from keras_prune import criteria

FILTERS = np.array([(3, 0), (0, 1), (2, 2), (2.2, 1.8), (-0.3, 0.2)], np.float32)


def test_norms_have_their_worked_values():
    assert np.allclose(criteria.l1(FILTERS), (3, 1, 4, 4, 0.5))
    assert np.allclose(criteria.l2(FILTERS), (3, 1, 2.8284, 2.8425, 0.3606), atol=1e-4)
    assert np.allclose(criteria.linf(FILTERS), (3, 1, 2, 2.2, 0.3))


def test_fpgm_has_its_worked_values_and_another_order_than_l2():
    scores = criteria.fpgm(FILTERS)
    assert np.allclose(scores, (10.6742, 8.5937, 7.6756, 7.5617, 10.0492), atol=1e-4)
    assert np.argsort(scores).tolist() == [3, 2, 1, 4, 0]
    assert np.argsort(criteria.l2(FILTERS)).tolist() == [4, 1, 2, 3, 0]


def test_fpgm_does_not_see_a_translation_but_norms_do():
    moved = FILTERS + 5
    assert np.allclose(criteria.fpgm(moved), criteria.fpgm(FILTERS), atol=1e-4)
    assert np.argsort(criteria.l2(moved)).tolist() != np.argsort(criteria.l2(FILTERS)).tolist()


def test_fpgm_equals_a_slow_loop_also_over_many_feature_blocks():
    rows = np.random.default_rng(0).normal(size=(6, 9001)).astype("float32")
    slow = [sum(np.linalg.norm((a - b).astype("float64")) for b in rows) for a in rows]
    assert np.allclose(criteria.fpgm(rows), slow, rtol=1e-6)


def test_taylor_averages_squares_per_batch_and_not_the_other_way_round():
    rows = np.array([[1.0, -1.0], [0.5, 0.5]])  # sums of gradient x weight of two batches
    assert np.allclose(criteria.taylor(rows), (1.0, 0.25))  # the square of the mean would be (0, 0.25)


def test_bn_scale_is_the_absolute_gamma():
    assert np.allclose(criteria.bn_scale(np.array([[-2.0], [0.5]])), (2.0, 0.5))


@pytest.mark.parametrize("name", sorted(k for k, f in criteria.CRITERIA.items() if f or k == "random"))
def test_every_criterion_gives_one_finite_score_per_unit_and_follows_a_permutation(name):
    rows = np.random.default_rng(1).normal(size=(7, 12)).astype("float32")
    scores = criteria.get(name, seed=3)(rows)
    assert scores.shape == (7,) and np.isfinite(scores).all()
    if name != "random":
        order = np.random.default_rng(2).permutation(7)
        assert np.allclose(criteria.get(name)(rows[order]), scores[order], rtol=1e-6)


def test_random_scores_repeat_with_the_seed_and_differ_without():
    rows = np.zeros((5, 1))
    assert np.array_equal(criteria.get("random", seed=1)(rows), criteria.get("random", seed=1)(rows))
    assert not np.array_equal(criteria.get("random", seed=1)(rows), criteria.get("random", seed=2)(rows))


def test_unknown_criterion_lists_the_known_ones():
    with pytest.raises(ValueError, match="criterion='l3' is not known. Known: .*bn_scale, fpgm, fpgm_mix,.* l1,"):
        criteria.get("l3")
