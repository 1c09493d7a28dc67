"""What units answer: principal components, ranks of maps, zeros; and plans by them."""

import functools
import json
import warnings

import keras
import numpy as np
import pytest
from keras import layers
from small import compiled, patterns, residual_net
from zoo import ZOO, example, randomize

from keras_prune import Channels, FilterPruning, budgets, plan, prune, strip
from keras_prune.budgets import Spectrum, components
from keras_prune.responses import Moments, map_ranks, nonzero, spectra

EIGENVALUES = np.array([6, 2, 1, 0.5, 0.3, 0.2])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def array(x):
    return keras.ops.convert_to_numpy(x)


def group_of(channels, name):
    return next(g for g in channels.groups if any(m.weight.layer.name == name for m in g.producers))


def spectrum_of(model, name, x, **arguments):
    """The spectrum of the units that the layer of this name makes, of this layer."""
    channels = Channels(model)
    group = group_of(channels, name)
    found, reasons = spectra(channels, x, groups=[group], **arguments)
    assert not reasons
    return next(s for s in found[group.index] if s.name == name)


def principal(rows, centred=True):
    """Variances along the components of rows that were really collected, by their singular values."""
    rows = np.asarray(rows, np.float64).reshape(-1, rows.shape[-1])
    rows = rows - rows.mean(0) if centred else rows
    values = np.linalg.svd(rows, compute_uv=False) ** 2 / len(rows)
    return np.concatenate([values, np.zeros(rows.shape[1] - len(values))])


def alike(a, b, tolerance=1e-6):
    return np.abs(a - b).max() <= tolerance * np.abs(b).max()


# -- how many components -----------------------------------------------------------------------------------------


def test_a_worked_example_of_components_with_exact_ties():
    found = {tau: components(EIGENVALUES, tau) for tau in (0.5, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)}
    assert found == {0.5: 1, 0.6: 1, 0.8: 2, 0.9: 3, 0.95: 4, 0.98: 5, 0.99: 6, 1.0: 6}
    tenths = np.full(10, 0.7)  # the tolerance is needed: in floats some of these ties are just missed
    assert [components(tenths, k / 10) for k in range(1, 11)] == list(range(1, 11))
    sums = np.cumsum(tenths)
    assert any(sums[k - 1] / sums[-1] < k / 10 for k in range(1, 11))
    assert components(EIGENVALUES[::-1] * 1e-30, 0.95) == 4
    assert components(np.zeros(3), 0.99) == 0 and components(np.array([1.0, -1e-18, 0.0]), 1.0) == 1


def low_rank(width=10, rank=3, samples=2000, noise=0.05):
    return normal(samples, rank) @ normal(rank, width, seed=1) + noise * normal(samples, width, seed=2)


@pytest.mark.parametrize("explained", (0.95, 0.99, 0.999))
def test_data_of_rank_three_with_noise_have_three_components_unless_noise_is_what_is_asked_for(explained):
    assert components(principal(low_rank(noise=0.01)), explained) == 3
    assert components(principal(low_rank(noise=1.0)), explained) > 3


def test_rank_three_with_noise_of_five_hundredths_in_ten_dimensions():
    moments = Moments(10)
    moments.add(low_rank())
    values = np.linalg.eigvalsh(moments.scatter)
    assert [components(values, tau) for tau in (0.95, 0.99)] == [3, 3]


def test_moments_in_pieces_are_those_of_all_rows_and_keep_their_digits_beside_a_large_mean():
    rows = normal(1000, 6).astype(np.float64) + 1e7
    moments = Moments(6)
    for piece in np.array_split(rows, (1, 3, 400, 401)):
        moments.add(piece)
    assert moments.count == 1000 and np.allclose(moments.mean, rows.mean(0), rtol=1e-14)
    assert alike(moments.scatter / 1000, np.cov(rows.T, bias=True), 1e-9)
    naive = rows.T @ rows / 1000 - np.outer(rows.mean(0), rows.mean(0))
    assert not alike(naive, np.cov(rows.T, bias=True), 1e-9)


def test_units_of_several_channels_are_counted_in_whole_units():
    spectrum = Spectrum("heads", EIGENVALUES, slices=3)
    assert [spectrum.units(tau) for tau in (0.6, 0.9, 0.95, 1)] == [1, 1, 2, 2]
    assert spectrum.share(1) == pytest.approx(0.9) and spectrum.share(2) == 1


# -- through a model ---------------------------------------------------------------------------------------------


def perceptron(width=8, kernel=None, bias=0.0):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    x = layers.Dense(width, "relu", name="maker")(inputs)
    model = keras.Model(inputs, layers.Dense(3)(x))
    if kernel is not None:
        model.get_layer("maker").kernel.assign(kernel)
    model.get_layer("maker").bias.assign(np.full(width, bias))
    return model


def steep(width=8, seed=0):
    """A kernel whose responses have a spectrum that falls quickly, as each neuron answers more weakly."""
    return normal(6, width, seed=seed) * 0.5 ** np.arange(width, dtype="float32")


def counts(model, x, name="maker"):
    values = spectrum_of(model, name, x).eigenvalues
    return [components(values, tau) for tau in (0.9, 0.95, 0.99, 0.999)]


def test_duplicated_scaled_and_rotated_neurons_do_not_change_the_count_but_standardised_ones_do():
    x, kernel = normal(500, 6), steep()
    expected = counts(perceptron(8, kernel), x)
    assert expected[0] < expected[-1] < 8
    rotation, _ = np.linalg.qr(normal(8, 8, seed=5))
    assert counts(perceptron(16, np.hstack([kernel, kernel])), x) == expected
    assert counts(perceptron(8, 1000 * kernel), x) == expected
    assert counts(perceptron(8, kernel @ rotation), x) == expected
    assert counts(perceptron(8, kernel), 1e-3 * x) == expected
    assert counts(perceptron(8, kernel, bias=100.0), x) == expected
    assert counts(perceptron(8, np.hstack([kernel[:, :4], np.zeros((6, 4), "float32")])), x)[-1] <= 4
    assert counts(perceptron(8, kernel / (x @ kernel).std(0)), x) != expected


def test_a_duplicated_neuron_adds_no_component():
    """Of responses of full rank all components are asked for: the copy is none, a new neuron is one."""
    x, kernel = normal(500, 6), normal(6, 4, seed=3)
    full = [
        components(spectrum_of(perceptron(k.shape[1], k), "maker", x).eigenvalues, 1 - 1e-9)
        for k in (kernel, np.hstack([kernel, kernel[:, :1]]), np.hstack([kernel, normal(6, 1, seed=4)]))
    ]
    assert full == [4, 4, 5]


def test_without_centring_there_would_be_one_component_more():
    rows = normal(400, 2) @ normal(2, 6, seed=1) + 3
    model = perceptron(6, np.eye(6))
    assert components(spectrum_of(model, "maker", rows).eigenvalues, 0.9999) == 2
    assert components(principal(rows, centred=False), 0.9999) == 3


def image_net():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((9, 9, 3))
    x = layers.Conv2D(8, 3, 2, padding="same", activation="relu", name="strided")(inputs)
    x = layers.DepthwiseConv2D(3, padding="same", name="depthwise")(x)
    x = layers.BatchNormalization()(x)
    x = layers.ReLU()(x)
    x = layers.Conv2D(12, 1, name="wide")(x)
    x = layers.Conv2D(12, 3, groups=2, padding="same", name="grouped")(layers.ReLU()(x))
    x = layers.Conv2D(6, 1, name="last")(layers.ReLU()(x))
    y = layers.Conv2D(6, 3, padding="same", name="branch")(layers.ReLU()(x))
    x = layers.ReLU()(layers.Add()([x, y]))
    return randomize(keras.Model(inputs, layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(x))), 3)


def maps_of(model, name, x):
    """What a layer of a model makes."""
    return array(keras.Model(model.input, model.get_layer(name).output)(x))


def pre_activations(model, name, x):
    """What a layer makes, its own activation left out."""
    layer = model.get_layer(name)
    given = keras.Model(model.input, layer.input)(x)
    own, layer.activation = layer.activation, keras.activations.linear
    made = array(layer(given))
    layer.activation = own
    return made


@pytest.mark.parametrize("name", ("strided", "depthwise", "wide", "grouped", "last", "branch"))
def test_spectra_are_those_of_responses_that_were_really_collected(name):
    model, x = image_net(), normal(40, 9, 9, 3)
    expected = principal(pre_activations(model, name, x))
    for batch_size in (1, 7, 64):
        found = spectrum_of(model, name, x, batch_size=batch_size)
        assert alike(found.eigenvalues, expected)
    assert not alike(found.eigenvalues, principal(pre_activations(model, name, x), centred=False))
    after = maps_of(model, name, x)
    assert name != "strided" or not alike(found.eigenvalues, principal(after))


def test_spectra_of_dense_layers_on_vectors_and_on_tokens():
    inputs = keras.Input((5, 6))
    x = layers.Dense(7, "tanh", name="tokens")(inputs)
    model = keras.Model(inputs, layers.Dense(3)(layers.Dense(8, "relu", name="vectors")(layers.Flatten()(x))))
    x = normal(90, 5, 6)
    for name in ("tokens", "vectors"):
        assert alike(spectrum_of(model, name, x).eigenvalues, principal(pre_activations(model, name, x)))


def test_a_layer_that_is_called_twice_answers_at_both_calls():
    inputs = keras.Input((8,))
    shared = layers.Dense(8, name="shared")
    before = layers.Dense(8, name="before")(inputs)
    model = keras.Model(inputs, layers.Dense(3)(layers.ReLU()(shared(layers.ReLU()(shared(before))))))
    x, kernel = normal(100, 8), array(shared.kernel)
    once = maps_of(model, "before", x) @ kernel
    rows = np.concatenate([once, np.maximum(once, 0) @ kernel])
    found = spectrum_of(model, "shared", x).eigenvalues
    assert alike(found, principal(rows)) and not alike(found, principal(once), 1e-2)


def test_positions_that_are_looked_at_do_not_depend_on_the_batch():
    model, x = image_net(), normal(50, 9, 9, 3)
    each = [spectrum_of(model, "strided", x, rows=300, batch_size=n).eigenvalues for n in (1, 16, 50)]
    assert all(alike(e, each[0], 1e-5) for e in each)
    assert alike(each[0], spectrum_of(model, "strided", x, rows=300, memory=1).eigenvalues)
    whole = spectrum_of(model, "strided", x).eigenvalues
    assert not alike(each[0], whole, 1e-3) and alike(each[0], whole, 0.3)
    assert not alike(each[0], spectrum_of(model, "strided", x, rows=300, seed=1).eigenvalues, 1e-3)


def test_the_positions_that_are_drawn_are_those_of_the_collected_responses():
    model, x = image_net(), normal(50, 9, 9, 3)
    made = pre_activations(model, "strided", x).reshape(50, 25, 8)
    rows = [made[s, np.random.default_rng([0, 0, s]).choice(25, 6, replace=False)] for s in range(50)]
    assert alike(spectrum_of(model, "strided", x, rows=300).eigenvalues, principal(np.concatenate(rows)))


def test_of_a_layer_that_is_called_twice_each_call_gives_half_of_the_rows():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((20, 8))
    shared, before = layers.Dense(8, name="shared", use_bias=False), layers.Dense(8, name="before")(inputs)
    model = keras.Model(inputs, layers.Dense(3)(layers.ReLU()(shared(layers.ReLU()(shared(before))))))
    x, kernel = normal(10, 20, 8), array(shared.kernel)
    once = maps_of(model, "before", x) @ kernel
    both = (once, np.maximum(once, 0) @ kernel)
    drawn = [
        made[s, np.random.default_rng([0, call, s]).choice(20, 5, replace=False)]
        for call, made in enumerate(both)
        for s in range(10)
    ]
    assert alike(spectrum_of(model, "shared", x, rows=100).eigenvalues, principal(np.concatenate(drawn)))


def test_a_group_that_only_one_of_its_producers_could_count_stays_whole():
    inputs = keras.Input((5, 6))
    x = layers.Add()([layers.Dense(8, name="dense")(inputs[:, 0]), layers.LSTM(8, name="lstm")(inputs)])
    channels = Channels(keras.Model(inputs, layers.Dense(3)(x)))
    group = group_of(channels, "dense")
    assert group is group_of(channels, "lstm")
    found, reasons = spectra(channels, normal(100, 5, 6))
    assert group.index not in found and reasons[group.index].startswith("made by lstm (LSTM)")


def test_every_model_of_the_zoo_has_spectra_or_a_reason():
    known = 0
    for name in ("lstm", "vit", "attention_cross", "conv2d_large_groups", "conv2d_small_groups", "separable2d",
                 "conv2d_transpose", "nested_model_twice", "time_distributed", "psp_convolutions", "optional_input",
                 "resnet_option_a_layers", "reshape_mixing_batch"):  # fmt: skip
        model, _ = ZOO[name]()
        channels, x = Channels(model), example(model, 40)
        found, reasons = silently(spectra, channels, x)
        assert set(found) | set(reasons) == {g.index for g in channels.groups} and not set(found) & set(reasons)
        for index, each in found.items():
            group = channels.groups[index]
            assert len(each) == len(group.producers)
            for spectrum in each:
                assert len(spectrum.eigenvalues) == len(group) * spectrum.slices
                assert (np.diff(spectrum.eigenvalues) <= 0).all() and spectrum.eigenvalues[0] > 0
        known += len(found)
    assert known > 15


def silently(function, *arguments, **named):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **named)


def test_heads_and_channels_of_every_group_are_units_of_several_channels():
    for name, width in (("attention_cross", 3), ("conv2d_large_groups", 2)):
        model, _ = ZOO[name]()
        found, _ = silently(spectra, Channels(model), example(model, 40))
        assert any(s.slices == width for each in found.values() for s in each)


def test_few_samples_are_warned_of_because_they_have_few_components():
    with pytest.warns(UserWarning, match="less than ten rows for each channel in maker: 50 rows for 6 channels"):
        spectrum_of(perceptron(6), "maker", normal(50, 6))
    with pytest.warns(UserWarning, match="4 rows"):
        found = spectrum_of(perceptron(6), "maker", normal(4, 6))
    assert components(found.eigenvalues, 1) == 3


def test_bad_data_and_arguments_say_what_was_expected():
    model, x = perceptron(), normal(100, 6)
    x[3, 2] = np.nan
    with pytest.raises(ValueError, match="'maker' makes NaN"):
        spectrum_of(model, "maker", x)
    with pytest.raises(ValueError, match="NaN"):
        map_ranks(model, x)
    for function, name in ((spectra, "rows"), (spectra, "memory"), (spectra, "batch_size"), (nonzero, "batch_size")):
        with pytest.raises(ValueError, match=f"{name}=0 was passed to {function.__name__}"):
            function(model, x, **{name: 0})


# -- plans by components -----------------------------------------------------------------------------------------


@functools.cache
def trained():
    """A residual network whose responses are far from full rank: half of the channels are mixtures of the others."""
    model = randomize(residual_net((16, 32)))
    for layer in model.layers:
        if hasattr(layer, "kernel") and layer.name != "head":
            kernel = array(layer.kernel)
            half = kernel.shape[-1] // 2
            mix = normal(half, half, seed=len(layer.name)) * 0.2
            kernel[..., half:] = kernel[..., :half] @ mix
            layer.kernel.assign(kernel)
    return model


X = patterns(128)[0]


def test_one_shot_widths_are_the_components_of_the_producer_that_needs_most():
    model = trained()
    channels = Channels(model)
    decision = plan(model, budget="pca", data=X, explained=0.97, round_to=1)
    found, _ = spectra(channels, X)
    for group, line in zip(channels.groups, decision.groups):
        each = {s.name: components(s.eigenvalues, 0.97) for s in found[group.index]}
        pre = {n: components(principal(pre_activations(model, n, X)), 0.97) for n in each}
        assert each == pre and line.after == max(each.values())
        assert f"{line.after} of {line.before} components" in line.note and "explain 0.97" in line.note
        if len(each) > 1:
            assert f"components of {max(each, key=each.get)} explain" in line.note
    assert any(len(s) > 1 for s in found.values()) and 0 < decision.reached < 1 and not decision.notes
    text = str(decision)
    assert "explain 0.97 of the variance of the responses, by l2, pca budget on 128 samples" in text
    assert all(line.note in text for line in decision.groups) and json.loads(decision.to_json())["groups"][0]["note"]


def test_one_shot_widths_are_rounded_up_to_the_grid_and_grow_with_what_is_explained():
    def widths(tau, grid):
        return [g.after for g in plan(trained(), budget="pca", data=X, explained=tau, round_to=grid).groups]

    before, remainders = [0] * 4, set()
    for tau in (0.7, 0.8, 0.9, 0.97, 1.0):
        fine = widths(tau, 1)
        assert widths(tau, 4) == [-(-n // 4) * 4 for n in fine]
        assert all(a <= b for a, b in zip(before, fine)) and before != fine
        before, remainders = fine, remainders | {n % 4 for n in fine}
    assert fine == [8, 8, 16, 16]  # half of the channels are mixtures of the others
    assert remainders == {0, 1, 2, 3}


@pytest.mark.parametrize("sparsity", (0.1, 0.3, 0.5, 0.8))
def test_with_a_sparsity_every_group_explains_about_the_same(sparsity):
    decision = plan(residual_net(), sparsity, budget="pca", data=X, round_to=1)
    assert decision.reached == pytest.approx(sparsity, abs=0.03)
    channels = Channels(residual_net())
    found, _ = spectra(channels, X)
    kept = [
        (min(s.share(g.after) for s in found[k]), min(s.share(g.after - 1) for s in found[k]), g.after < g.before)
        for k, g in enumerate(decision.groups)
    ]
    explained = min(share for share, _, _ in kept)
    assert all(less <= explained + 0.02 for _, less, _ in kept)
    assert all(f"explains {100 * kept[k][0]:.6g}% of the variance" in g.note for k, g in enumerate(decision.groups))


def test_the_amount_resolves_tails_and_keeps_the_lowest_scores_out():
    scores = [np.random.default_rng(0).uniform(size=32) for _ in range(2)]
    long = [[Spectrum("a", 0.5 ** np.arange(32))], [Spectrum("b", 0.4 ** np.arange(32))]]
    function = functools.partial(budgets.pca, spectra=long)
    kept = [[int((~r).sum()) for r in function(scores, a)] for a in np.linspace(0, 1, 400)]
    assert kept[0] == [32, 32] and kept[-1] == [1, 1]
    assert all(a >= b for before, now in zip(kept, kept[1:]) for a, b in zip(before, now))
    assert {n for n, _ in kept} == set(range(1, 33))
    for r, s in zip(function(scores, 0.5), scores):
        assert s[r].max() < s[~r].min()


def test_which_units_leave_is_the_criterion_and_the_reader_is_refitted():
    model, x = trained(), X
    for criterion in ("l1", "random", "fpgm"):
        a = plan(model, budget="pca", data=x, explained=0.99, criterion=criterion, round_to=1, seed=0)
        b = plan(model, budget="pca", data=x, explained=0.99, criterion="l2", round_to=1)
        assert [g.after for g in a.groups] == [g.after for g in b.groups]
    assert set(a.removed) != set(b.removed)
    plain, fitted = (
        plan(model, budget="pca", data=x, explained=0.99, criterion="l2", round_to=1, reconstruct=r) for r in (0, 1)
    )
    errors = [np.abs(array(model(x)) - array(p.cut()(x))).mean() for p in (plain, fitted)]
    assert errors[1] < 0.5 * errors[0] and "refitted on 128 samples" in fitted.sentence
    assert [g.after for g in plain.groups] == [g.after for g in fitted.groups]


def test_units_that_are_gone_count_for_nothing():
    model = perceptron(8, normal(6, 8), bias=0.1)
    channels = Channels(model)
    gone = group_of(channels, "maker").units[:5]
    made = plan(model, budget="pca", data=normal(300, 6), explained=1.0, round_to=1, already=gone)
    assert made.groups[0].after == 3 and "3 of 3 components" in made.groups[0].note
    assert plan(model, budget="pca", data=normal(300, 6), explained=1.0, round_to=1).groups[0].after == 6


def test_groups_without_a_kernel_as_a_matrix_stay_whole_and_say_why():
    model, _ = ZOO["lstm"]()
    decision = silently(plan, model, budget="pca", data=example(model, 40), explained=0.9, round_to=1)
    notes = {g.layers[0]: (g.after == g.before, g.note) for g in decision.groups}
    cells = [(whole, note) for name, (whole, note) in notes.items() if name.startswith("lstm")]
    assert cells and all(whole and "(LSTM), whose responses are no product" in note for whole, note in cells)
    assert any("components" in note for _, note in notes.values())
    model, _ = ZOO["attention_masked"]()
    note = silently(plan, model, 0.3, budget="pca", data=example(model, 40), round_to=1).groups[0].note
    assert note.startswith("made by") and "(Embedding)" in note


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (dict(explained=0.9), "explained=0.9 was passed to plan with budget=None: it belongs to budget='pca'"),
        (dict(explained=0.9, budget="global", data=X), "with budget='global'"),
        (dict(explained=0.9, budget="pca"), "pass data="),
        (dict(sparsity=0.5, budget="pca"), "pass data="),
        (dict(explained=0.9, sparsity=0.5, budget="pca", data=X), "explained=0.9 and sparsity=0.5"),
        (dict(explained=0.9, target={"macs": 0.5}, budget="pca", data=X), "explained=0.9 and target="),
        (dict(explained=0, budget="pca", data=X), "above 0 and up to 1"),
        (dict(explained=1.01, budget="pca", data=X), "above 0 and up to 1"),
        (dict(explained=True, budget="pca", data=X), "above 0 and up to 1"),
        (dict(explained="99%", budget="pca", data=X), "above 0 and up to 1"),
        (dict(explained=float("nan"), budget="pca", data=X), "above 0 and up to 1"),
        (dict(explained=0.9, budget="pca", data=X[:, :4]), "has shape"),
    ),
)
def test_what_does_not_go_together_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(residual_net(), **arguments)


def test_a_target_and_labelled_batches_work_too():
    x, y = patterns(64)
    decision = plan(residual_net(), target={"macs": 0.5}, budget="pca", data=iter([(x[:32], y[:32]), (x[32:], y[32:])]))
    assert decision.totals["macs"][1] <= 0.5 * decision.totals["macs"][0] and "64 samples" in decision.sentence
    assert prune(residual_net(), 0.5, budget="pca", data=(x, y)).count_params() < residual_net().count_params()


def test_filter_pruning_in_training_takes_the_budget():
    model, (x, y) = compiled("adam"), patterns(128)
    pruning = FilterPruning({0: 0.2, 1: 0.5}, budget="pca", data=x, round_to=1)
    history = model.fit(x, y, epochs=2, verbose=0, callbacks=[pruning]).history
    assert history["sparsity"][-1] == pytest.approx(0.5, abs=0.05)
    assert strip(model).count_params() == history["params"][-1]


# -- ranks and zeros ---------------------------------------------------------------------------------------------


def vgg():
    keras.utils.set_random_seed(2)
    inputs = keras.Input((10, 10, 3))
    x = layers.Conv2D(6, 3, padding="same", activation="relu", name="first")(inputs)
    x = layers.MaxPooling2D()(x)
    x = layers.Conv2D(5, 3, padding="same", name="second")(x)
    x = layers.ReLU(name="relu")(layers.BatchNormalization()(x))
    x = layers.Dense(7, "relu", name="hidden")(layers.Flatten()(x))
    model = randomize(keras.Model(inputs, layers.Dense(3)(x)), 5)
    model.get_layer("first").bias.assign(-np.linspace(0.5, 2.5, 6))  # else all of its maps have full rank
    return model


def given_to_readers(model, x):
    """Name of a producer -> what its readers are given, maps where there are maps, by hand."""
    pooled = model.layers[2]
    return {"first": maps_of(model, pooled.name, x), "second": maps_of(model, "relu", x),
            "hidden": maps_of(model, "hidden", x)}  # fmt: skip


def brute_ranks(maps):
    found = np.zeros(maps.shape[-1])
    for image in maps:
        for unit in range(maps.shape[-1]):
            values = image[..., unit] if image.ndim > 1 else image[unit : unit + 1, None]
            singular = np.linalg.svd(values, compute_uv=False)
            noise = singular.max() * max(values.shape) * np.finfo("float32").eps
            found[unit] += sum(s > noise for s in singular) / min(values.shape)
    return found / len(maps)


def brute_nonzero(maps):
    return np.array([sum(v != 0 for v in maps[..., u].ravel()) / maps[..., u].size for u in range(maps.shape[-1])])


@pytest.mark.parametrize(("measure", "brute"), ((map_ranks, brute_ranks), (nonzero, brute_nonzero)))
def test_ranks_and_zeros_are_those_of_what_the_readers_are_given(measure, brute):
    model, x = vgg(), normal(24, 10, 10, 3)
    channels = Channels(model)
    found, reasons = measure(channels, x)
    assert not reasons and len(found) == 3
    for name, maps in given_to_readers(model, x).items():
        scores = found[group_of(channels, name).index]
        assert np.allclose(scores, brute(maps), atol=1e-12) and np.ptp(scores) > 0
        assert np.allclose(measure(channels, x, batch_size=5)[0][group_of(channels, name).index], scores, atol=1e-12)
    wrong = brute(maps_of(model, "first", x))  # before the pooling
    assert not np.allclose(found[group_of(channels, "first").index], wrong)


def test_of_several_readers_the_mean_counts():
    model, x = residual_net(), X[:24]
    channels = Channels(model)
    group = group_of(channels, "down0")
    relus = [layer.name for layer in model.layers if isinstance(layer, layers.ReLU)]
    for measure, brute in ((map_ranks, brute_ranks), (nonzero, brute_nonzero)):
        scores = measure(channels, x, groups=[group])[0][group.index]
        each = [brute(maps_of(model, name, x)) for name in (relus[0], relus[2])]  # given to inner0 and to down1
        assert np.allclose(scores, np.mean(each, axis=0)) and not np.allclose(scores, each[0])


def test_maps_of_both_axis_orders_and_units_of_several_channels():
    model, _ = ZOO["flatten_channels_first"]()
    x = example(model, 10)
    channels = Channels(model)
    found, _ = silently(nonzero, channels, x)
    assert set(found) == {g.index for g in channels.groups}
    inputs = keras.Input((6, 6, 4))
    y = layers.Conv2D(6, 3, padding="same", name="maker", activation="relu")(inputs)
    y = layers.Conv2D(6, 3, padding="same", groups=2, name="few")(y)  # unit: the same channel of both groups
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalMaxPooling2D()(layers.ReLU(name="out")(y))))
    x, channels = normal(12, 6, 6, 4), Channels(model)
    for measure, brute in ((map_ranks, brute_ranks), (nonzero, brute_nonzero)):
        found, _ = measure(channels, x)
        for name, maps in (("maker", "maker"), ("few", "out")):
            single = brute(maps_of(model, maps, x))
            assert np.allclose(found[group_of(channels, name).index], single.reshape(2, 3).mean(0))


def test_vectors_have_rank_one_or_none():
    model, x = perceptron(8, normal(6, 8), bias=-1.0), normal(50, 6)
    [group] = Channels(model).groups
    fired = (maps_of(model, "maker", x) != 0).mean(0)
    assert np.allclose(map_ranks(model, x)[0][group.index], fired) and 0 < fired.min() < fired.max() < 1
    assert np.allclose(nonzero(model, x)[0][group.index], fired)


def test_scores_that_say_nothing_are_warned_of():
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(3)(layers.Dense(8, "tanh", name="smooth")(inputs)))
    for measure in (map_ranks, nonzero):
        with pytest.warns(UserWarning, match=f"{measure.__name__}: in 1 of 1 groups all units have the same.*smooth"):
            assert (measure(model, normal(20, 6))[0][0] == 1).all()


def test_plans_by_rank_and_by_zeros_keep_the_highest():
    model, x = vgg(), normal(24, 10, 10, 3)
    channels = Channels(model)
    for criterion, measure in (("hrank", map_ranks), ("apoz", nonzero)):
        decision = plan(model, 0.5, measure="units", criterion=criterion, budget="uniform", data=x, round_to=1)
        assert f"by {criterion} on 24 samples" in decision.sentence
        found, _ = measure(channels, x)
        for k, scores in found.items():
            leaves = np.isin(channels.groups[k].units, decision.removed)
            assert leaves.any() and scores[leaves].max() <= scores[~leaves].min()
        with pytest.raises(ValueError, match="needs data"):
            plan(model, 0.5, criterion=criterion)


def test_ranks_take_as_many_samples_as_in_the_paper_and_zeros_all():
    model, x = perceptron(8, normal(6, 8), bias=-1.0), normal(700, 6)
    assert "by hrank on 640 samples" in plan(model, 0.5, criterion="hrank", data=x, round_to=1).sentence
    assert "by apoz on 700 samples" in plan(model, 0.5, criterion="apoz", data=x, round_to=1).sentence


def test_groups_that_nobody_is_given_as_they_are_stay_whole_and_say_why():
    model, _ = ZOO["attention_self"]()
    channels = Channels(model)
    _, reasons = silently(map_ranks, channels, example(model, 10))
    decision = silently(plan, model, 0.3, criterion="hrank", data=example(model, 10), round_to=1)
    assert reasons and all(decision.groups[k].note == why and decision.groups[k].after == decision.groups[k].before
                           for k, why in reasons.items())  # fmt: skip
