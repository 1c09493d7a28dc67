"""Every criterion with every budget, for units and single weights: the legal do what they say, others say why not."""

import itertools

import numpy as np
import pytest
from small import compiled, patterns

from keras_prune import (
    Channels,
    DropPruning,
    FilterPruning,
    PatternPruning,
    WeightPruning,
    budgets,
    criteria,
    dead_units,
    kept_masks,
    plan,
    prune_weights,
    release,
)
from keras_prune.dropping import OF_ENTRIES
from keras_prune.entries import KINDS
from keras_prune.patterns import SCOPES
from keras_prune.surgery import relative_difference
from keras_prune.weights import BUDGETS

X, Y = patterns(96)
WITHOUT_DATA = {"l1", "l2", "linf", "l1_folded", "l2_folded", "fpgm", "fpgm_mix", "bn_scale", "random"}
"""Written down here, so that a criterion which silently does without its data is found."""


def pairs(*several):
    return list(itertools.product(*several))


pytestmark = pytest.mark.filterwarnings("ignore:.*saturated")


@pytest.fixture(scope="module")
def model():
    """Trained a little: the norms have statistics of their own."""
    net = compiled("adam")
    net.fit(X, Y, epochs=3, verbose=0)
    return net


def needs_data(criterion, budget):
    return criterion not in WITHOUT_DATA or budget == "pca"


@pytest.mark.parametrize("criterion, budget", pairs(criteria.CRITERIA, budgets.BUDGETS))
def test_every_criterion_goes_with_every_budget_and_its_cut_equals_its_zeros(model, criterion, budget):
    data = {"data": (X, Y)} if needs_data(criterion, budget) else {}
    decision = plan(model, 0.5, criterion=criterion, budget=budget, round_to=4, seed=0, **data)
    assert decision.reached == pytest.approx(0.5, abs=0.1) and 0 < len(decision.removed)
    assert relative_difference(decision.zero(), decision.cut(), X[:8]) < 1e-5
    assert relative_difference(model, decision.cut(), X[:8]) > 1e-3  # the control: something did leave


@pytest.mark.parametrize("criterion", sorted(set(criteria.CRITERIA) - WITHOUT_DATA))
def test_a_criterion_without_its_data_says_so(model, criterion):
    with pytest.raises(ValueError, match="data"):
        plan(model, 0.5, criterion=criterion)


def test_the_criteria_of_units_are_all_different(model):
    """But for those that agree by their definition on this model."""
    found = {}
    for criterion in criteria.CRITERIA:
        data = {"data": (X, Y)} if needs_data(criterion, "") else {}
        found[criterion] = plan(model, 0.5, criterion=criterion, budget="uniform", round_to=4, seed=0, **data).removed
    same = [(a, b) for a, b in itertools.combinations(found, 2) if np.array_equal(found[a], found[b])]
    assert not same


def legal(kind, budget):
    if budget == "share":
        return kind in ("links", "sipp")
    return budget != "lipschitz" or kind in ("magnitude", "random")


def data_of(kind, budget):
    if kind == "snip":
        return {"data": (X, Y)}
    return {"data": X} if kind in ("links", "sipp") or budget == "lipschitz" else {}


@pytest.mark.parametrize("kind, budget", pairs(KINDS, BUDGETS))
def test_every_order_of_weights_goes_with_every_budget_or_is_refused(model, kind, budget):
    asked = {"lipschitz": {"error": 0.3}, "share": {"share": 0.2}}.get(budget, {"sparsity": 0.5})
    arguments = {**asked, "kind": kind, "budget": budget, "seed": 0, **data_of(kind, budget)}
    if not legal(kind, budget):
        with pytest.raises(ValueError, match="budget"):
            prune_weights(model, **arguments)
        with pytest.raises(ValueError, match="budget"):
            WeightPruning(**arguments)
        return
    masks = kept_masks(prune_weights(model, **arguments))
    gone = 1 - np.concatenate([mask.ravel() for mask in masks.values()]).mean()
    if "sparsity" in asked:
        assert gone == pytest.approx(0.5, abs=0.002)
    else:
        assert 0 < gone < 0.9
    assert all(mask.any() for mask in masks.values())


@pytest.mark.parametrize("kind", [kind for kind in KINDS if data_of(kind, "")])
def test_an_order_of_weights_without_its_data_says_so(kind):
    with pytest.raises(ValueError, match="data"):
        WeightPruning(0.5, kind=kind)


@pytest.mark.parametrize("criterion", sorted(criteria.CRITERIA))
def test_drop_pruning_of_weights_takes_what_scores_single_ones_and_refuses_the_rest(criterion):
    data = {"data": (X, Y)} if needs_data(criterion, "") else {}
    if criterion in OF_ENTRIES:
        DropPruning(0.5, criterion=criterion, **data)
    else:
        with pytest.raises(ValueError, match="criterion"):
            DropPruning(0.5, criterion=criterion, **data)


@pytest.mark.parametrize("pattern, scope, criterion", pairs(("window", "ck", "combined"), SCOPES, ("linf", "l1", "l2")))
def test_every_pattern_goes_with_every_scope_and_score(pattern, scope, criterion):
    net = compiled("adam")
    callback = PatternPruning(0.5, pattern=pattern, scope=scope, criterion=criterion, stop=0)
    net.fit(X[:32], Y[:32], epochs=1, verbose=0, callbacks=[callback])
    kept = kept_masks(net)["inner1"].reshape(9, -1)
    if pattern == "window":
        assert set(kept.sum(axis=0)) == {5}  # 4.5 of 9 taps, rounded
    assert kept.mean() == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("soft", (False, True))
def test_every_criterion_prunes_in_fit(soft):
    """One model for all: compiling a step anew for each would take minutes."""
    net = compiled("adam")
    start = net.get_weights()
    for criterion in criteria.CRITERIA:
        release(net)
        net.set_weights(start)
        data = {"data": (X, Y)} if needs_data(criterion, "") else {}
        callback = FilterPruning(0.5, soft=soft, criterion=criterion, budget="uniform", round_to=4, seed=0, **data)
        logs = net.fit(X[:32], Y[:32], epochs=1, verbose=0, callbacks=[callback]).history
        assert logs["sparsity"][-1] == pytest.approx(0.5, abs=0.1), criterion
        assert len(dead_units(Channels(net), strict=True)) >= 8, criterion
