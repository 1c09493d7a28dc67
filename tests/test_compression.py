"""compress: the target is met, the answers stay, and the report says what was measured."""

from __future__ import annotations

import json

import keras
import numpy as np
import pytest
from keras import layers
from small import compiled, patterns

from keras_prune import Channels, metrics, prune
from keras_prune.compression import compress
from keras_prune.reports import layer_widths


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def divergence(model, small, x):
    p, q = (softmax(m.predict(x, verbose=0).astype(np.float64)) for m in (model, small))
    return float(np.mean(np.sum(p * np.log(p / q), -1)))


@pytest.fixture(scope="module")
def trained():
    """A network that has learned its task, samples and labels."""
    model = compiled(keras.optimizers.Adam(0.01), widths=(16,))
    x, y = patterns(256)
    model.fit(x, y, epochs=8, verbose=0)
    return model, x, y


def test_it_is_nearer_to_the_original_than_l2_and_noise_is_no_substitute_for_data(trained):
    model, x, y = trained
    weights, fresh = model.get_weights(), patterns(512, seed=9)[0]
    small, report = compress(model, (x, y), sparsity=0.8, round_to=1, report=True)
    plain = prune(model, 0.8, round_to=1)
    noise = np.random.default_rng(0).uniform(0, 255, x.shape).astype("float32")
    blind = compress(model, noise, sparsity=0.8, round_to=1)
    found, of_plain, of_blind = (divergence(model, other, fresh) for other in (small, plain, blind))
    assert found < 0.2 * of_plain and found < 0.5 * of_blind
    assert metrics.macs(Channels(small)) <= 0.2 * metrics.macs(Channels(model))
    # the report, by hand: the samples that were held back
    held = np.random.default_rng(0).permutation(256)[:51]
    p, q = (m.predict(x[held], verbose=0) for m in (model, small))
    assert report.held_back == 51 and report.samples == 205
    assert report.divergence == pytest.approx(divergence(model, small, x[held]), rel=1e-2)
    assert report.agreement == pytest.approx(np.mean(p.argmax(-1) == q.argmax(-1)))
    assert report.accuracy == pytest.approx(tuple(np.mean(a.argmax(-1) == y[held]) for a in (p, q)))
    text = str(report)
    assert "agreement with the original" in text and "accuracy" in text and "205 unlabelled" in text
    content = json.loads(report.to_json())
    assert content["plan"]["totals"]["macs"]["after"] == metrics.macs(Channels(small)) and content["distilled"] is None
    assert all(map(np.array_equal, weights, model.get_weights()))
    small.fit(x, y, verbose=0)  # compiled like the original


def test_distillation_may_follow(trained):
    model, x, _ = trained
    small, report = compress(model, x[:64], sparsity=0.8, round_to=1, distill_minutes=0.01, report=True)
    assert report.distilled.steps > 0 and "distilled" in str(report) and json.loads(report.to_json())["distilled"]
    assert report.accuracy is None and report.distilled.kl_after <= report.distilled.kl_before


# -- small networks without images: quick --------------------------------------------------------------------------


def dense(outputs=4, activation=None, widths=(24, 16), loss=None, seed=0):
    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input((6,))
    for number, width in enumerate(widths):
        x = layers.Dense(width, "relu", kernel_initializer="he_normal", name=f"hidden{number}")(x)
    model = keras.Model(inputs, layers.Dense(outputs, activation, name="head")(x))
    if loss:
        model.compile(loss=loss)
    return model


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


X = numbers(120, 6)


def of(model, measure="macs"):
    return metrics.get(measure)(Channels(model))


@pytest.mark.parametrize("target", [
    {"macs": 0.5}, {"params": 300}, {"macs": 0.7, "params": 200}, {"memory": 0.6, "macs": 500},
])  # fmt: skip
def test_every_target_is_met_and_not_by_far(target):
    model = dense()
    small, report = compress(model, X, target=target, round_to=1, report=True)
    slack = [of(small, k) / (v * of(model, k) if v < 1 else v) for k, v in target.items()]
    assert 0.8 < max(slack) <= 1 and not report.plan.notes


def test_widths_are_rounded_and_protected_layers_keep_theirs():
    small = compress(dense(), X, sparsity=0.4, round_to=4)
    assert {width % 4 for width in layer_widths(small).values()} == {0}
    small = compress(dense(), X, sparsity=0.4, round_to=1, protect=["hidden0"])
    assert layer_widths(small)["hidden0"] == 24 and layer_widths(small)["hidden1"] < 16


def test_what_is_out_of_reach_is_said():
    small, report = compress(dense(), X, target={"macs": 0.01}, round_to=8, search_minutes=0.01, report=True)
    assert "out of reach" in str(report) and list(layer_widths(small).values()) == [8, 8, 4]
    small, report = compress(dense(), X, sparsity=0.5, round_to=64, search_minutes=0.01, report=True)
    assert "out of reach" in str(report) and of(small) == of(dense())


def test_a_measure_of_ones_own():
    def weighted(channels, removed):
        return metrics.params(channels, removed) + 2 * metrics.macs(channels, removed)

    small, report = compress(dense(), X, sparsity=0.5, measure=weighted, round_to=1, report=True)
    assert weighted(Channels(small), ()) <= 0.5 * weighted(Channels(dense()), ()) and "weighted" in str(report)


def test_labels_change_nothing_but_the_printed_accuracy():
    y = np.random.default_rng(0).integers(0, 4, 120)
    found = [compress(dense(), X, sparsity=0.5, labels=labels, report=True) for labels in (None, y[:, None])]
    weights = [small.get_weights() for small, _ in found]
    assert all(map(np.array_equal, *weights)) and found[0][1].accuracy is None and found[1][1].accuracy != (0.0, 0.0)


def test_the_same_seed_gives_the_same_network():
    a, b, c = (compress(dense(), X, sparsity=0.5, round_to=1, seed=s).get_weights() for s in (0, 0, 1))
    assert all(map(np.array_equal, a, b)) and not all(p.shape == q.shape and np.allclose(p, q) for p, q in zip(a, c))


@pytest.mark.parametrize("samples", [8, 16])
def test_few_samples_do_something(samples):
    small, report = compress(dense(), X[:samples], sparsity=0.5, report=True)
    assert all(np.isfinite(w).all() for w in small.get_weights()) and np.isfinite(report.divergence)
    assert report.samples + report.held_back == samples and report.held_back >= 2


@pytest.mark.parametrize("form", ["batches", "pairs", "labelled"])
def test_data_comes_in_many_forms(form):
    y = np.zeros(120, "int64")
    data = {
        "batches": [X[:50], X[50:]],
        "pairs": [(X[:50], y[:50]), (X[50:], y[50:])],
        "labelled": (X, y.astype("float32")),  # no classes: no accuracy
    }[form]
    small, report = compress(dense(), iter(data) if form != "labelled" else data, sparsity=0.5, report=True)
    expected = compress(dense(), X, sparsity=0.5)
    assert all(map(np.array_equal, small.get_weights(), expected.get_weights())) and report.accuracy is None


def test_inputs_by_name_are_not_taken_by_the_order_of_their_names():
    keras.utils.set_random_seed(0)
    later, earlier = keras.Input((6,), name="later"), keras.Input((6,), name="earlier")
    x = layers.Concatenate()([layers.Dense(16, "relu")(later), layers.Dense(16, "relu")(earlier)])
    model = keras.Model([later, earlier], layers.Dense(3)(x))
    a, b = X, 5 * numbers(120, 6, seed=1)
    listed, named = (compress(model, d, sparsity=0.4) for d in ([a, b], {"later": a, "earlier": b}))
    assert all(map(np.array_equal, listed.get_weights(), named.get_weights()))
    wrong = compress(model, [b, a], sparsity=0.4)
    assert not all(map(np.array_equal, listed.get_weights(), wrong.get_weights()))


@pytest.mark.parametrize("activation, loss, outputs, kind", [
    ("sigmoid", None, 1, "switch"), (None, "binary", 1, "switch"), ("softmax", None, 4, "class"),
    (None, "mse", 1, None), ("sigmoid", None, 3, None),
])  # fmt: skip
def test_accuracy_of_decisions_and_of_nothing_else(activation, loss, outputs, kind):
    loss = keras.losses.BinaryCrossentropy(from_logits=True) if loss == "binary" else loss
    model = dense(outputs, activation, loss=loss)
    made = model.predict(X, verbose=0)
    edge = 0.0 if activation is None else 0.5
    y = made.argmax(-1) if kind == "class" else (made[:, 0] > edge).astype(int)
    _, report = compress(model, X, sparsity=0.4, labels=y, report=True)
    if kind is None:
        assert report.accuracy is None and "no accuracy" in str(report)
    else:
        assert report.accuracy[0] == 1.0 and report.accuracy[1] == pytest.approx(report.agreement)


def test_several_outputs_maps_and_unknown_sizes():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((None, None, 3))
    x = layers.Conv2D(16, 3, padding="same", activation="relu")(inputs)
    x = layers.Conv2D(16, 3, padding="same", activation="relu")(x)
    outputs = {"map": layers.Conv2D(3, 1, name="map")(x), "all": layers.Dense(2)(layers.GlobalAveragePooling2D()(x))}
    model, x = keras.Model(inputs, outputs), numbers(20, 8, 7, 3)
    small, report = compress(model, x, sparsity=0.5, labels=np.zeros(20, int), search_minutes=0.01, report=True)
    assert of(small) <= 0.5 * of(model) and np.isfinite(report.divergence) and set(small(x)) == {"map", "all"}
    json.loads(report.to_json())


def test_the_search_never_makes_it_worse_on_its_own_measure():
    _, report = compress(dense(), X, sparsity=0.5, round_to=1, search_minutes=0.03, report=True)
    note = next(n for n in report.plan.notes if n.startswith("search"))
    first, best = (float(t) for t in note.partition("fits ")[2].split(" -> "))
    assert best <= first and " of 0 moves" not in note and report.plan.reached >= 0.5


def test_units_that_are_zero_already_leave_first():
    model = dense()
    kernel, bias = (np.array(v) for v in model.get_layer("hidden0").weights)
    kernel[:, ::2], bias[::2] = 0, 0
    model.get_layer("hidden0").set_weights([kernel, bias])
    reader = model.get_layer("hidden1")
    reader.kernel.assign(np.where(np.arange(24)[:, None] % 2, np.array(reader.kernel), 0))
    small = compress(model, X, target={"macs": 0.56}, round_to=1)
    assert list(layer_widths(small).values()) == [12, 16, 4] and np.allclose(model(X), small(X), atol=1e-3)


@pytest.mark.parametrize("arguments, message", [
    (dict(), "either sparsity"), (dict(sparsity=0.5, target={"macs": 0.5}), "either sparsity"),
    (dict(sparsity=1.0), "expected a number"), (dict(target={}), "expected for example"),
    (dict(target={"macs": 0}), "expected a fraction"), (dict(target={"speed": 0.5}), "not known"),
    (dict(sparsity=0.5, data=X[:7]), "7 samples"), (dict(sparsity=0.5, data=None), "needs data"),
    (dict(sparsity=0.5, data=numbers(20, 5)), "has shape"), (dict(sparsity=0.5, protect=["nobody"]), "fits no layer"),
    (dict(sparsity=0.5, data=np.full((20, 6), np.nan, "float32")), "finite"),
    (dict(sparsity=0.5, protect=["hidden*"]), "Nothing can be cut"), (dict(sparsity=0.5, labels=[1, 2]), r"\(2,\)"),
    (dict(sparsity=0.5, labels=np.eye(4)[np.zeros(120, int)]), r"\(120, 4\)"),
    (dict(sparsity=0.5, labels=np.zeros(200, int)), r"\(200,\)"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_a_reason(arguments, message):
    with pytest.raises(ValueError, match=message):
        compress(dense(), **{"data": X, **arguments})


def test_a_model_without_channels_says_so():
    inputs = keras.Input((6,))
    with pytest.raises(ValueError, match="Nothing can be cut"):
        compress(keras.Model(inputs, layers.Dense(3)(inputs)), X, sparsity=0.5)


def test_a_function_is_a_limit_as_it_stands(trained):
    """A latency in ms below 1 is no fraction; it falls in stairs of eight channels, so single units save nothing."""
    model = trained[0]

    def latency(channels, removed):
        widths = (len(np.setdiff1d(g.units, removed)) for g in channels.groups)
        return 0.01 * sum(-(-w // 8) for w in widths)

    whole = latency(Channels(model), ())
    small, report = compress(model, trained[1], target={latency: 0.8 * whole}, round_to=1, report=True)
    assert whole < 1 and latency(Channels(small), ()) <= 0.8 * whole
    assert report.plan.totals["latency"] == (whole, latency(Channels(small), ()))
