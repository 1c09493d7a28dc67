import itertools
import json

import keras
import numpy as np
import pytest
from keras import layers

from keras_prune import search
from keras_prune.surgery import relative_difference

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6)).astype("float32")


def network(seed=0, widths=(6, 5)):
    keras.utils.set_random_seed(seed)
    stack = [layers.Dense(n, "relu", name=f"hidden{k}") for k, n in enumerate(widths)]
    return keras.Sequential([keras.Input((6,)), *stack, layers.Dense(3, name="logits")])


def gone(model):
    """How many units of each hidden layer are zero."""
    kernels = [np.array(model.get_layer(f"hidden{k}").kernel) for k in (0, 1)]
    return tuple(int((k == 0).all(axis=0).sum()) for k in kernels)


class Toy:
    """An accuracy that falls with the units that are gone: the drops of the layers add up."""

    def __init__(self, *drops):
        self.drops, self.seen = drops, []

    def __call__(self, model):
        self.seen.append(gone(model))
        return 0.9 - sum(d[n] for d, n in zip(self.drops, self.seen[-1]))


def rising(n, rng):
    """Convex drops of 0 to n - 1 units, each unit dearer than the one before."""
    return np.cumsum([0.0, *np.sort(rng.uniform(0, 0.02, n - 1))])


ASKED = dict(measure="units", round_to=1, progress=False)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_drop", (0.0, 0.5, 2.0, 5.0))
def test_the_best_of_all_widths_is_found_where_drops_add_up(seed, max_drop):
    rng = np.random.default_rng(seed)
    drops = rising(6, rng), rising(5, rng)
    found = search(network(), Toy(*drops), max_drop, **ASKED)
    allowed = [
        a + b for a, b in itertools.product(range(6), range(5)) if drops[0][a] + drops[1][b] <= max_drop / 100 + 1e-9
    ]
    assert len(found.plan.removed) == max(allowed)
    assert found.accuracy[0] == 0.9 and found.accuracy[1] >= 0.9 - max_drop / 100 - 1e-9


def test_the_drop_is_kept_also_where_drops_multiply_and_one_step_more_is_too_much():
    def evaluate(model):
        a, b = gone(model)
        return 0.9 - 0.004 * a - 0.003 * b - 0.004 * a * b

    for max_drop in (0.5, 1.0, 2.0, 4.0):
        found = search(network(), evaluate, max_drop, **ASKED)
        small = found.plan.cut()
        left = [small.get_layer(f"hidden{k}").units for k in (0, 1)]
        removed = 6 - left[0], 5 - left[1]
        assert found.accuracy[1] == pytest.approx(
            0.9 - 0.004 * removed[0] - 0.003 * removed[1] - 0.004 * np.prod(removed)
        )
        assert found.accuracy[1] >= 0.9 - max_drop / 100 - 1e-9
        for step in ((1, 0), (0, 1)):
            a, b = np.add(removed, step)
            assert a > 5 or b > 4 or 0.004 * a + 0.003 * b + 0.004 * a * b > max_drop / 100


def test_the_network_stays_as_it_is_and_what_was_evaluated_is_what_is_cut():
    model, outputs = network(), {}
    before = [np.array(v) for v in model.weights]

    def evaluate(copy):
        assert copy is not model
        outputs[gone(copy)] = np.array(copy(X))
        return 0.9 - 0.01 * sum(gone(copy))

    found = search(model, evaluate, 3.0, **ASKED)
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(before, model.weights))
    small = found.plan.cut()
    removed = tuple(n - small.get_layer(f"hidden{k}").units for k, n in enumerate((6, 5)))
    assert sum(removed) == 3 and np.allclose(outputs[removed], np.array(small(X)), atol=1e-6)
    assert relative_difference(found.plan.zero(), small, X) < 1e-6
    assert not np.allclose(outputs[0, 0], np.array(small(X)), atol=1e-2)


class Killed(Exception):
    pass


def test_nothing_is_evaluated_twice_and_a_killed_search_goes_on(tmp_path):
    drops, cache = (rising(6, RNG), rising(5, RNG)), tmp_path / "scan.json"
    toy = Toy(*drops)
    whole = search(network(), toy, 2.0, **ASKED)
    assert len(toy.seen) == len(set(toy.seen)) == whole.evaluations > 10

    left = iter(range(7))

    def dies(model):
        if next(left, None) is None:
            raise Killed
        return Toy(*drops)(model)

    with pytest.raises(Killed):
        search(network(), dies, 2.0, cache=cache, **ASKED)
    assert len(json.loads(cache.read_text())["accuracies"]) == 7
    rest = Toy(*drops)
    again = search(network(), rest, 2.0, cache=cache, **ASKED)
    assert rest.seen == toy.seen[7:] and again.evaluations == whole.evaluations - 7
    assert np.array_equal(again.plan.removed, whole.plan.removed) and again.curves == whole.curves

    def never(model):
        raise Killed

    assert search(network(), never, 2.0, cache=cache, **ASKED).evaluations == 0
    with pytest.raises(ValueError, match="another network"):
        search(network(seed=1), never, 2.0, cache=cache, **ASKED)
    with pytest.raises(ValueError, match="another network, or of another criterion"):
        search(network(), never, 2.0, cache=cache, criterion="random", **ASKED)
    assert not list(tmp_path.glob("*.part"))


def test_the_report_prints_and_draws_itself_and_widths_stay_on_the_grid(tmp_path):
    found = search(
        network(widths=(16, 12)),
        lambda m: 0.9 - 0.001 * sum(gone(m)),
        1.2,
        measure="params",
        round_to=4,
        progress=False,
    )
    small = found.plan.cut()
    assert {small.get_layer(f"hidden{k}").units % 4 for k in (0, 1)} == {0} and len(found.plan.removed) == 12
    assert "-1.20 points, at most -1.2 were allowed" in str(found) and "evaluations" in str(found)
    written = json.loads(found.to_json())
    assert written["accuracy"] == list(found.accuracy) and len(written["curves"]) == 2
    assert all(points[0] == (0.0, 0.9) for points in found.curves.values())
    found.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(max_drop=-1), "max_drop=-1"),
        (dict(sparsities=()), "sparsities="),
        (dict(sparsities=(0.5, 1.0)), "sparsities="),
        (dict(evaluate=lambda m: 91.6), "returned 91.6.*percent"),
        (dict(evaluate=lambda m: float("nan")), "returned nan"),
        (dict(protect="hidden*"), "Nothing can be pruned: protected"),
        (dict(cache="/no/such/folder/scan.json"), "folder"),
        (dict(criterion="l3"), "Known"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    given = {"evaluate": lambda m: 0.5, **ASKED, **arguments}
    with pytest.raises(ValueError, match=message):
        search(network(), **given)
