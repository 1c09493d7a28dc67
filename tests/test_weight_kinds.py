"""Kinds and budgets of single weights beyond the magnitude: worked numbers, loops as oracles, combinations."""

import itertools
import math
import warnings

import keras
import numpy as np
import pytest
from keras import layers

from keras_prune import Channels, IterativePruning, WeightPruning, entry_scores, prune_weights, schedules
from keras_prune.entries import KINDS, Entries, count_of, erk, kernels_of, lowest_of
from keras_prune.entry_scores import MEASURED, PER_NEURON, lamp
from keras_prune.weights import BOUNDED, BUDGETS, PROVABLE

RNG = np.random.default_rng(0)
X = RNG.normal(size=(96, 6, 6, 2)).astype("float32")
Y = (X.mean(axis=(1, 2)) @ np.array([1.0, -1]) > 0).astype("int32")
SPARSITIES = ("uniform", "global", "erk")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(seed=0, optimizer="sgd"):
    """Convolutions (one strided, one grouped), a Dense layer on every position and one on all of them."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((6, 6, 2))
    x = layers.Conv2D(4, 3, 2, padding="same", activation="relu", name="first")(inputs)
    x = layers.Conv2D(6, 2, groups=2, name="grouped")(x)
    x = layers.Flatten()(layers.Dense(5, "relu", name="each")(x))
    model = keras.Model(inputs, layers.Dense(3, name="head")(x))
    model.compile(optimizer, LOSS)
    return model


def matrix_net(matrix, loss=lambda truth, made: keras.ops.mean(made, axis=-1)):
    """One Dense layer without a bias, and the mean of what it makes as a loss: its gradient is the mean input."""
    matrix = np.asarray(matrix, "float32")
    dense = layers.Dense(matrix.shape[1], use_bias=False, name="dense")
    model = keras.Sequential([keras.Input((len(matrix),)), dense])
    dense.kernel.assign(matrix)
    model.compile("sgd", loss)
    return model


def array(variable):
    return np.array(keras.ops.convert_to_numpy(variable))


def kernels(model):
    return {name: array(variable) for name, variable in kernels_of(Channels(model)).items()}


def zeros(model):
    return {name: value == 0 for name, value in kernels(model).items()}


def data_for(kind, x=X, y=Y):
    return {"snip": (x[:32], y[:32]), "sipp": x[:24], "links": x[:24]}.get(kind)


def scores(model, kind, data):
    """{kernel: scores shaped like it}, as they were measured."""
    channels = Channels(model)
    found = entry_scores.measured(kind, channels, entry_scores.taken(kind, channels, data))
    return {name: found[id(variable)] for name, variable in kernels_of(channels).items() if id(variable) in found}


def first_to_leave(model, kind, data=None, count=1):
    """Flat places of the first entries that leave a model of one kernel."""
    (before,) = kernels(model).values()
    (found,) = zeros(prune_weights(model, count / before.size, kind=kind, data=data)).values()
    return sorted(np.flatnonzero(found).tolist())


# -- LAMP ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_lamp_is_the_square_over_those_that_are_at_least_as_large(seed):
    values = np.random.default_rng(seed).normal(size=(7, 5))
    expected = [w**2 / sum(v**2 for v in values.ravel() if abs(v) >= abs(w)) for w in values.ravel()]
    assert np.allclose(lamp(values).ravel(), expected, rtol=1e-12)
    assert np.allclose(lamp(-30 * values), lamp(values))  # the scale of a kernel says nothing


def test_lamp_of_equal_weights_and_of_zeros():
    assert lamp(np.array([2.0, -2, 2])) == pytest.approx([1 / 3, 1 / 2, 1])
    assert lamp(np.array([0.0, 3, 0])).tolist() == [0, 1, 0] and lamp(np.zeros(4)).tolist() == [0] * 4


def test_lamp_leaves_something_of_every_kernel_where_the_magnitude_empties_one():
    model = network()
    model.get_layer("each").kernel.assign(1e-6 * array(model.get_layer("each").kernel))
    found = zeros(prune_weights(model, 0.9, kind="lamp", budget="global"))
    assert all(not z.all() for z in found.values())
    with pytest.warns(UserWarning, match="nothing of the kernel of .*each"):
        prune_weights(model, 0.9, budget="global")
    alone = [zeros(prune_weights(model, 0.4, kind=kind)) for kind in ("lamp", "magnitude")]
    assert all(np.array_equal(alone[0][name], alone[1][name]) for name in alone[0])  # within a kernel the same order


# -- SNIP ------------------------------------------------------------------------------------------------------------

W, G = np.array([1, -2, 0.5, 3]), np.array([0.3, 0.1, -2, 0.05])


def test_the_worked_numbers_of_snip():
    model, data = matrix_net(W[:, None]), (G[None].astype("float32"), np.zeros((1, 1)))
    found = scores(model, "snip", data)["dense"].ravel()
    assert np.allclose(found, (0.3, 0.2, 1, 0.15), atol=1e-6)
    assert np.allclose(found / found.sum(), (0.1818, 0.1212, 0.6061, 0.0909), atol=5e-5)
    assert first_to_leave(model, "snip", data, 2) == [1, 3]  # 2 and 0 stay
    assert first_to_leave(model, "magnitude", None, 2) == [0, 2]  # the control


def test_snip_averages_with_signs_and_takes_the_absolute_value_afterwards():
    x = np.array([[1, 0.2, 0.1, 0.3], [-1, 0.2, 0.1, 0.3]], "float32")
    batches = [(x[:1], np.zeros((1, 1))), (x[1:], np.zeros((1, 1)))]
    model = matrix_net(np.ones((4, 1)))
    assert np.allclose(scores(model, "snip", batches)["dense"].ravel(), (0, 0.2, 0.1, 0.3), atol=1e-6)
    assert first_to_leave(model, "snip", batches) == [0]  # averages of |gradient x weight| would keep it longest
    assert first_to_leave(model, "snip", batches[:1]) == [2]


def test_snip_is_what_a_small_change_of_the_weight_does_to_the_loss():
    model, size = network(), 1e-2
    found, x, y = scores(model, "snip", (X[:32], Y[:32])), X[:32], Y[:32]
    for name in ("first", "head"):
        kernel = model.get_layer(name).kernel
        value = array(kernel)
        for place in ((0,) * value.ndim, tuple(n // 2 for n in value.shape)):
            losses = []
            for sign in (1, -1):
                changed = value.copy()
                changed[place] *= 1 + sign * size
                kernel.assign(changed)
                losses.append(float(LOSS(y, model(x, training=False))))
            kernel.assign(value)
            assert found[name][place] == pytest.approx(abs(losses[0] - losses[1]) / (2 * size), abs=2e-5)
            assert found[name][place] > 1e-4


def test_snip_changes_nothing_in_the_model():
    model = network(optimizer=keras.optimizers.Adam())
    before = [array(v) for v in model.weights]
    prune_weights(model, 0.5, kind="snip", data=(X, Y))
    assert all(np.array_equal(a, array(b)) for a, b in zip(before, model.weights))


# -- SiPP and links --------------------------------------------------------------------------------------------------


def positions(layer, x):
    """Per sample the list of (patch, flat) that one output position of a layer sees, by loops."""
    kind = type(layer).__name__
    if kind == "Dense":
        return [list(sample.reshape(-1, sample.shape[-1])) for sample in x]
    size, stride, found = layer.kernel_size[0], layer.strides[0], []
    n = x.shape[1]
    out = math.ceil(n / stride) if layer.padding == "same" else (n - size) // stride + 1
    total = max((out - 1) * stride + size - n, 0) if layer.padding == "same" else 0
    padded = np.pad(x, [(0, 0), (total // 2, total - total // 2), (total // 2, total - total // 2), (0, 0)])
    for sample in padded:
        found.append(
            [
                sample[i * stride : i * stride + size, j * stride : j * stride + size].ravel()
                for i, j in itertools.product(range(out), repeat=2)
            ]
        )
    return found


def by_loops(layer, x, kind):
    """SiPP or links of a Dense layer or an ordinary convolution, by loops: (links, neurons)."""
    weights = array(layer.kernel).astype(np.float64).reshape(-1, layer.kernel.shape[-1])
    links, neurons = weights.shape
    samples, found = positions(layer, x.astype(np.float64)), np.zeros(weights.shape)
    for i in range(neurons):
        if kind == "links":
            rows = np.array([row for sample in samples for row in sample])
            parts = [abs(weights[j, i]) * np.mean([abs(row[j]) for row in rows]) for j in range(links)]
            found[:, i] = [part / sum(parts) for part in parts]
            continue
        for j, sample, sign in itertools.product(range(links), samples, (1, -1)):
            shares = []
            for row in sample:
                products = [
                    abs(weights[k, i]) * max(sign * row[k], 0)
                    for k in range(links)
                    if (weights[k, i] > 0) == (weights[j, i] > 0)
                ]
                whole = sum(products)
                shares.append(abs(weights[j, i]) * max(sign * row[j], 0) / whole if whole > 1.2e-7 else 0)
            found[j, i] = max(found[j, i], np.mean(shares))
    return found


def single(layer, shape):
    keras.utils.set_random_seed(3)
    return keras.Sequential([keras.Input(shape), layer])


CASES = {
    "dense": (lambda: layers.Dense(4), (9,), 5),
    "dense_on_positions": (lambda: layers.Dense(3), (4, 5), 4),
    "conv": (lambda: layers.Conv2D(3, 2), (4, 4, 2), 3),
    "conv_strided": (lambda: layers.Conv2D(2, 3, 2, padding="same"), (5, 5, 2), 3),
}


@pytest.mark.parametrize("memory", [2**27, 1])
@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("kind", PER_NEURON)
def test_shares_are_those_of_a_plain_loop(kind, case, memory, monkeypatch):
    build, shape, samples = CASES[case]
    monkeypatch.setattr(entry_scores, "MEMORY", memory)  # some positions and outputs at a time
    monkeypatch.setattr(entry_scores, "BATCH_SIZE", 2)
    layer = build()
    model = single(layer, shape)
    x = np.random.default_rng(1).normal(0.2, 1, (samples, *shape)).astype("float32")
    x[x < -1] = 0
    (found,) = scores(model, kind, x).values()
    expected = by_loops(layer, x, kind)
    assert np.abs(found.reshape(expected.shape) - expected).max() < 1e-6
    assert np.ptp(expected) > 0.05  # the control: they differ


def test_a_share_is_that_of_both_signs_of_the_inputs_apart():
    """Of one sample, so that nothing but the split decides."""
    found = scores(matrix_net([[2.0], [2], [-1], [-1]]), "sipp", np.array([[1.0, -3, 1, 3]], "float32"))["dense"]
    assert np.allclose(found.ravel(), (1, 1, 0.25, 0.75))


def test_the_worked_numbers_of_links():
    w, activity = np.array([0.5, -1, 0.1, 0.4]), np.array([2, 0.1, 3, 1])
    model = matrix_net(w[:, None])
    x = (activity * np.array([[1.5], [-0.5]])).astype("float32")  # mean |x| is the activity, not the mean
    assert np.allclose(scores(model, "links", x)["dense"].ravel(), (0.5556, 0.0556, 0.1667, 0.2222), atol=5e-5)
    assert first_to_leave(model, "links", x) == [1]
    assert first_to_leave(model, "magnitude") == [2]  # which would have kept -1.0 longest
    assert zeros(prune_weights(model, kind="links", budget="share", share=0.05, data=x))["dense"].sum() == 0
    for share, gone in ((0.06, [1]), (0.3, [1, 2]), (0.99, [1, 2, 3])):
        found = zeros(prune_weights(model, kind="links", budget="share", share=share, data=x))["dense"]
        assert np.flatnonzero(found).tolist() == gone


@pytest.mark.parametrize("kind", PER_NEURON)
def test_neither_the_scale_of_the_inputs_nor_that_of_a_neuron_matters(kind):
    model = network()
    before = scores(model, kind, X[:16])
    first = {name: found for name, found in scores(model, kind, 30 * X[:16]).items() if name == "first"}
    assert np.allclose(first["first"], before["first"], atol=1e-5)
    head = model.get_layer("head").kernel
    head.assign(array(head) * np.array([37.0, 1, -0.2]))
    after = scores(model, kind, X[:16])
    assert np.allclose(after["head"], before["head"], atol=1e-5)
    head.assign(array(head) * np.linspace(0.5, 2, head.shape[0])[:, None])  # the control: that of a link matters
    assert not np.allclose(scores(model, kind, X[:16])["head"], before["head"], atol=1e-3)


@pytest.mark.parametrize("budget", SPARSITIES)
def test_links_keeps_the_largest_of_every_neuron_and_says_what_that_costs(budget):
    model = network()
    model.get_layer("head").kernel.assign(array(model.get_layer("head").kernel) * np.array([1e-6, 1, 1]))
    with pytest.warns(UserWarning, match="keeps the largest link of every neuron"):
        small = prune_weights(model, 0.99, kind="links", budget=budget, data=X)
    largest = {name: value.reshape(-1, value.shape[-1]).argmax(0) for name, value in scores(model, "links", X).items()}
    for name, value in kernels(small).items():
        matrix = value.reshape(-1, value.shape[-1])
        assert (matrix != 0).any(0).all() and (matrix[largest[name], np.arange(matrix.shape[1])] != 0).all(), name
    emptied = kernels(prune_weights(model, 0.9, kind="magnitude"))["head"]
    assert not (emptied != 0).any(0).all()  # the control


@pytest.mark.parametrize("kind", PER_NEURON)
@pytest.mark.parametrize("share", [0.1, 0.4])
def test_a_share_takes_the_smallest_of_each_neuron_as_far_as_it_reaches(kind, share):
    model = network()
    found, gone = scores(model, kind, X), zeros(prune_weights(model, kind=kind, budget="share", share=share, data=X))
    total = 0
    for name, values in found.items():
        values, left = (a.reshape(-1, a.shape[-1]) for a in (values, gone[name]))
        for neuron, out in zip(values.T, left.T):
            order = np.argsort(neuron, kind="stable")
            count = next((k for k in range(len(order)) if neuron[order[: k + 1]].sum() > share), len(order) - 1)
            assert np.array_equal(np.flatnonzero(out), np.sort(order[:count]))
            total += count
    assert 0 < total < sum(v.size for v in gone.values())


def test_a_share_of_sipp_bounds_what_every_sample_loses_of_each_signed_sum():
    model = network()
    small = prune_weights(model, kind="sipp", budget="share", share=0.2, data=X[:20])
    x = np.array(X[:20].astype(np.float64))
    before, after = (array(m.get_layer("first").kernel).astype(np.float64).reshape(-1, 4) for m in (model, small))
    assert (after == 0).sum() > 4
    worst = 0.0
    for sample in positions(model.get_layer("first"), x):
        for sign_of_weight, sign_of_input in itertools.product((1, -1), repeat=2):
            rows = np.maximum(sign_of_input * np.array(sample), 0)
            whole, left = (rows @ np.maximum(sign_of_weight * w, 0) for w in (before, after))
            lost = np.divide(whole - left, whole, out=np.zeros_like(whole), where=whole > 1e-6).mean(0)
            worst = max(worst, lost.max())
    assert 0.05 < worst <= 0.2 + 1e-6


def test_kernels_that_cannot_be_seen_as_matrices_stay_whole_and_are_named():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((5, 3))
    x = layers.LSTM(4, name="memory")(layers.Dense(6, "relu", name="before")(inputs))
    model = keras.Model(inputs, layers.Dense(2, name="after")(x))
    data = np.random.default_rng(0).normal(size=(20, 5, 3)).astype("float32")
    for kind in PER_NEURON:
        with pytest.warns(UserWarning, match="leaves whole.*memory"):
            found = zeros(prune_weights(model, 0.5, kind=kind, data=data))
        assert found["before"].sum() == 9 and found["after"].sum() == 4
        assert not any(z.any() for name, z in found.items() if "memory" in name)
        with pytest.warns(UserWarning), pytest.raises(ValueError, match="cannot score any kernel"):
            warnings.warn("nothing else warns", stacklevel=1)
            prune_weights(model, 0.5, kind=kind, data=data, protect=["before", "after"])


def test_snip_leaves_frozen_kernels_whole_and_names_them():
    model = network()
    model.get_layer("first").trainable = False
    with pytest.warns(UserWarning, match="not trained: first"):
        found = zeros(prune_weights(model, 0.5, kind="snip", data=(X, Y)))
    assert not found["first"].any() and found["head"].sum() == count_of(0.5, found["head"].size)


def test_attention_and_separable_kernels_can_be_measured():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 2))
    x = layers.Reshape((16, 3))(layers.SeparableConv2D(3, 3, name="apart")(inputs))
    x = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    model = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))
    for kind in PER_NEURON:
        with pytest.warns(UserWarning, match="apart.depthwise_kernel$|apart.depthwise_kernel[.]"):
            found = zeros(prune_weights(model, 0.4, kind=kind, data=X[:8]))
        pruned = {name for name, z in found.items() if z.sum() == count_of(0.4, z.size)}
        assert len(pruned) == len(found) - 1 and sum("attention" in name for name in pruned) == 4


# -- Erdos-Renyi-Kernel ----------------------------------------------------------------------------------------------


def test_the_worked_numbers_of_erk():
    shapes = [(3, 3, 3, 64), (3, 3, 64, 128), (3, 3, 128, 256), (1, 1, 256, 10)]
    assert np.allclose(erk(shapes, 0.1), (1, 0.1507, 0.0742, 1), atol=5e-5)


@pytest.mark.parametrize("density", [1.0, 0.9, 0.5, 0.1, 0.001])
def test_erk_meets_the_density_in_proportion_and_the_rest_stays_whole(density):
    shapes = [(3, 3, 8, 16), (3, 3, 16, 32), (1, 1, 32, 64), (64, 10), (5,)]
    sizes, found = np.array([math.prod(s) for s in shapes]), np.array(erk(shapes, density))
    assert (found * sizes).sum() == pytest.approx(density * sizes.sum()) and (found <= 1).all()
    scale = found * sizes / [sum(s) for s in shapes]
    assert np.ptp(scale[found < 1]) < 1e-9 * scale.max() if (found < 1).any() else density == 1
    assert (scale[found == 1] <= scale[found < 1].max(initial=np.inf) * (1 + 1e-9)).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.77, 0.9])
def test_kernels_give_up_what_erk_says_to_within_an_entry(sparsity):
    found = zeros(prune_weights(network(), sparsity, budget="erk"))
    kept = erk([z.shape for z in found.values()], 1 - sparsity)
    assert all(abs(z.sum() - (1 - share) * z.size) <= 1 for z, share in zip(found.values(), kept))
    assert sum(z.sum() for z in found.values()) == count_of(sparsity, sum(z.size for z in found.values()))
    assert sparsity == 0 or found["first"].mean() > 1.05 * found["head"].mean()  # uniform would not


# -- kinds x budgets -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", SPARSITIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_budget_takes_the_exact_count_of_its_lowest_scores(kind, budget):
    model, sparsity = network(), 0.61
    found = zeros(prune_weights(model, sparsity, kind=kind, budget=budget, data=data_for(kind), seed=0))
    sizes = [z.size for z in found.values()]
    assert sum(z.sum() for z in found.values()) == (
        sum(count_of(sparsity, n) for n in sizes) if budget == "uniform" else count_of(sparsity, sum(sizes))
    )
    entries = Entries(Channels(model), kind, seed=0, data=data_for(kind))
    if kind in MEASURED:
        entries._measure()
    given = {name: entries.scores(name).reshape(z.shape) for name, z in found.items()}
    for name, gone in found.items():
        assert gone.all() or not gone.any() or given[name][gone].max() <= given[name][~gone].min()
    if budget == "global":
        assert max(given[n][z].max() for n, z in found.items() if z.any()) <= min(
            given[n][~z].min() for n, z in found.items() if not z.all()
        )


@pytest.mark.parametrize(
    "kind, budget",
    [*itertools.product(("lamp", "random"), SPARSITIES), ("snip", "erk"), ("sipp", "erk"), ("links", "global")],
)
def test_a_schedule_only_adds_and_stays_exact_while_it_trains(kind, budget):
    model, seen = network(optimizer=keras.optimizers.SGD(0.05, momentum=0.9)), []
    look = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(zeros(model)))
    pruning = WeightPruning({0: 0.2, 1: 0.21, 3: 0.6}, kind=kind, budget=budget, data=data_for(kind), seed=0)
    model.fit(X, Y, epochs=4, verbose=0, callbacks=[pruning, look])
    for sparsity, found in zip((0.2, 0.21, 0.21, 0.6), seen):
        sizes = [z.size for z in found.values()]
        assert sum(z.sum() for z in found.values()) == (
            sum(count_of(sparsity, n) for n in sizes) if budget == "uniform" else count_of(sparsity, sum(sizes))
        )
    assert all((a[k] <= b[k]).all() for a, b in zip(seen, seen[1:]) for k in a)


LEGAL = {(k, b) for k in KINDS for b in SPARSITIES} | {(k, "share") for k in PER_NEURON}
LEGAL |= {(k, "lipschitz") for k in PROVABLE}


@pytest.mark.parametrize("kind, budget", sorted(set(itertools.product(KINDS, BUDGETS)) - LEGAL))
def test_what_does_not_go_together_is_refused_with_what_does(kind, budget):
    given = dict(kind=kind, budget=budget, data=data_for(kind), error=0.1 if budget == "lipschitz" else None)
    known = PER_NEURON if budget == "share" else PROVABLE
    for make in (WeightPruning, lambda **a: prune_weights(network(), **a)):
        with pytest.raises(ValueError, match=f"budget='{budget}' goes with kind='{known[0]}'.*not with kind='{kind}'"):
            make(**given)


@pytest.mark.parametrize("make", [WeightPruning, lambda *a, **k: prune_weights(network(), *a, **k)])
@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(kind="snip"), "pass data=\\(x, y\\)"),
        (dict(kind="sipp"), "pass data=, unlabelled"),
        (dict(kind="links", budget="share"), "pass data=, unlabelled"),
        (dict(kind="lamp", data=X), "looks at no data.*'snip', 'sipp', 'links'"),
        (dict(kind="random", budget="erk", data=X), "leave out data="),
        (dict(kind="links", data=X, budget="share", sparsity=0.3), "takes what share= allows; leave out the sparsity"),
        (dict(kind="links", data=X, budget="share", share=0), "share=0 was passed; expected a number above 0"),
        (dict(kind="links", data=X, budget="share", share=1), "below 1"),
        (dict(kind="links", data=X, share=0.1), "share= goes with budget='share'"),
        (dict(kind="links", data=X, error=0.1), "error= goes with budget='lipschitz'"),
        (dict(kind="obs"), "'lamp', 'snip', 'sipp', 'links'"),
    ],
)
def test_bad_arguments_fail_at_once(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_data_that_does_not_fit_the_kind_is_refused():
    model = network()
    with pytest.raises(ValueError, match="labelled data"):
        prune_weights(model, kind="snip", data=X)
    with pytest.raises(ValueError, match="no batch"):
        prune_weights(model, kind="snip", data=[])
    for kind in PER_NEURON:
        with pytest.raises(ValueError, match="shape"):
            prune_weights(model, kind=kind, data=X[:, :3])
        with pytest.raises(ValueError, match="'first' is given NaN"):
            prune_weights(model, kind=kind, data=np.where(X > 2, np.nan, X).astype("float32"))
    with pytest.raises(ValueError, match="compile"):
        prune_weights(single(layers.Dense(2), (4,)), kind="snip", data=(np.ones((4, 4)), np.ones(4)))


# -- while it trains -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MEASURED)
def test_it_measures_again_on_the_weights_as_they_are_and_only_when_more_is_to_leave(kind, monkeypatch):
    model, seen = network(), []
    real = entry_scores.measured

    def measured(kind, channels, data):
        seen.append(kernels(channels.model)["head"])
        return real(kind, channels, data)

    monkeypatch.setattr("keras_prune.entries.measured", measured)
    data = data_for(kind)
    data = (b for b in [(data[0], data[1])]) if kind == "snip" else (b for b in [data])  # a stream is read once
    pruning = WeightPruning(schedules.steps({1: 0.3, 3: 0.6}), kind=kind, data=data)
    held = []
    look = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: held.append(zeros(model)["head"]))
    model.fit(X, Y, epochs=6, verbose=0, callbacks=[pruning, look])
    assert len(seen) == 2 and (seen[0] != 0).all() and (seen[1] == 0).mean() == pytest.approx(0.3, abs=0.01)
    assert np.array_equal(held[1], seen[1] == 0) and np.array_equal(held[3], held[5])
    assert not np.array_equal(seen[0][~held[1]], seen[1][~held[1]])


def test_a_second_measure_ranks_by_what_the_weights_have_become():
    """A kernel that is changed between two prunings: its new scores decide."""
    model = matrix_net(np.array([[1.0], [2], [3], [4]]))
    entries = Entries(Channels(model), "links", data=np.ones((2, 4), "float32"))
    entries.remove(0.25)
    model.get_layer("dense").kernel.assign([[0.0], [9], [1], [4]])
    entries.remove(0.5)
    assert entries.gone["dense"].tolist() == [True, False, True, False]


@pytest.mark.parametrize("kind", PER_NEURON)
def test_a_share_leaves_once_and_a_restored_run_keeps_it(kind):
    model = network(optimizer=keras.optimizers.Adam(0.01))
    expected = zeros(prune_weights(model, kind=kind, budget="share", share=0.1, data=X))
    pruning = WeightPruning(kind=kind, budget="share", share=0.1, data=X)
    history = model.fit(X, Y, epochs=3, verbose=0, callbacks=[pruning]).history["weight_sparsity"]
    assert all(np.array_equal(z, expected[name]) for name, z in zeros(model).items())
    assert history[0] == history[2] > 0 and pruning.bound is None
    again = WeightPruning(kind=kind, budget="share", share=0.1, data=X)
    model.fit(X, Y, initial_epoch=3, epochs=5, verbose=0, callbacks=[again])
    assert all(np.array_equal(z, expected[name]) for name, z in zeros(model).items())
    model.fit(X, Y, epochs=1, verbose=0, callbacks=[again])  # a new fit: as much once more
    assert sum(z.sum() for z in zeros(model).values()) > sum(z.sum() for z in expected.values())


@pytest.mark.parametrize(
    "kind, budget", [("snip", "global"), ("sipp", "erk"), ("links", "uniform"), ("lamp", "global")]
)
def test_iterative_pruning_hands_kinds_and_data_through(kind, budget):
    model = network()
    pruning = IterativePruning(2, 0.3, kind=kind, budget=budget, data=data_for(kind), weights="rewind_init")
    model.fit(X, Y, epochs=3, verbose=0, callbacks=[pruning])
    found = zeros(model)
    sizes, sparsity = [z.size for z in found.values()], 1 - 0.7**2
    assert sum(z.sum() for z in found.values()) == (
        sum(count_of(sparsity, n) for n in sizes) if budget == "uniform" else count_of(sparsity, sum(sizes))
    )
    assert [e["sparsity"] for e in pruning.curve] == pytest.approx([0, 0.3, 0.51], abs=0.02)


@pytest.mark.parametrize("budget", BOUNDED)
def test_iterative_pruning_refuses_budgets_that_ask_for_no_sparsity(budget):
    with pytest.raises(ValueError, match=f"budget='{budget}' decides by itself"):
        IterativePruning(2, 0.3, kind="links", budget=budget, data=X)


def test_what_scores_infinity_never_leaves():
    found = lowest_of([np.array([np.inf, 1.0]), np.array([np.inf, 0.0])], 0.9)
    assert [f.tolist() for f in found] == [[False, True], [False, True]]


def test_zeros_that_were_there_before_count_in_every_budget():
    model = network()
    head = model.get_layer("head").kernel
    rng = np.random.default_rng(0)
    head.assign(array(head) * (rng.random(head.shape) < 0.5))
    before = zeros(model)["head"]
    for kind, budget in itertools.product(("sipp", "links", "lamp"), ("global", "erk")):
        found = zeros(prune_weights(model, 0.5, kind=kind, budget=budget, data=data_for(kind)))
        assert (found["head"] >= before).all()
        assert sum(z.sum() for z in found.values()) == count_of(0.5, sum(z.size for z in found.values()))


@pytest.mark.parametrize("kind", PER_NEURON)
def test_a_neuron_that_hears_nothing_keeps_a_link_all_the_same(kind):
    model = matrix_net(np.arange(1.0, 9).reshape(4, 2))
    found = zeros(prune_weights(model, kind=kind, budget="share", share=0.1, data=np.zeros((3, 4), "float32")))
    assert found["dense"].sum(0).tolist() == [3, 3]


def test_a_share_of_which_nothing_leaves_is_measured_once(monkeypatch):
    model, calls, real = matrix_net(np.ones((4, 2))), [], entry_scores.measured
    monkeypatch.setattr("keras_prune.entries.measured", lambda *a: calls.append(1) or real(*a))
    pruning = WeightPruning(kind="links", budget="share", data=np.ones((2, 4)))
    model.fit(np.ones((8, 4)), np.ones((8, 2)), epochs=3, verbose=0, callbacks=[pruning])
    assert len(calls) == 1 and not zeros(model)["dense"].any()
