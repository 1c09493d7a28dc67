"""Sensitivities of every kind of reader: the definition, term by term, computed by Keras itself in double precision."""

import functools
import itertools

import keras
import numpy as np
import pytest
from keras import layers
from zoo import ZOO, example, randomize

from keras_prune import Channels, sensitivity
from keras_prune.program import Program
from keras_prune.sensitivity import sensitivities
from keras_prune.sites import sites_of

pytestmark = pytest.mark.filterwarnings("ignore:In .* groups more than half:UserWarning")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def measured(model, maker, x, **arguments):
    """The sensitivity of the units that a layer makes."""
    channels = Channels(model)
    group = next(g for g in channels.groups if any(m.weight.layer is maker for m in g.producers))
    return sensitivities(channels, x, groups=[group], **arguments).groups[group.index]


# -- one reader ----------------------------------------------------------------------------------------------------


def halves(array):
    return np.maximum(array, 0), np.maximum(-array, 0)


def in_double(layer):
    """(inputs, kernel) -> what the layer computes without its bias, by Keras itself."""
    if getattr(layer, "groups", 1) > 1:  # which Keras runs slowly on a CPU
        halves = [in_double(type(layer)(layer.filters // 2, layer.kernel_size)) for _ in range(layer.groups)]
        return lambda x, kernel: np.concatenate(
            [h(a, k) for h, a, k in zip(halves, np.split(x, 2, axis=-1), np.split(kernel, 2, axis=-1))], axis=-1
        )
    config = {**layer.get_config(), "dtype": "float64", "use_bias": False, "bias_axes": None, "activation": None}
    if isinstance(layer, layers.TimeDistributed):
        config = {"layer": keras.saving.serialize_keras_object(bare(layer.layer)), "dtype": "float64"}
    config = {k: v for k, v in config.items() if k in layer.get_config() and k != "name"}
    twin = type(layer).from_config(config)

    def run(x, kernel):
        twin.build(x.shape) if not twin.built else None
        holder(twin).kernel.assign(kernel)
        return np.array(twin(x))

    return run


def bare(layer):
    return type(layer).from_config({**layer.get_config(), "use_bias": False, "dtype": "float64", "activation": None})


def holder(layer):
    return holder(layer.layer) if isinstance(layer, layers.TimeDistributed) else layer


def slow(run, kernel, x, axis, ids, units, reduction="sum"):
    """(largest, mean) share of each unit; a unit's entries are those where `ids` is it on an axis of the kernel."""
    kernel, x = np.asarray(kernel, np.float64), np.asarray(x, np.float64)
    largest, total, sums = np.zeros(units), np.zeros(units), 0
    places = np.broadcast_to(
        ids.reshape([-1 if k == axis % kernel.ndim else 1 for k in range(kernel.ndim)]), kernel.shape
    )
    for a, w in itertools.product(halves(x), halves(kernel)):
        z = run(a, w)
        sums += (z > 1.19e-7).sum()
        for unit in range(units):
            shares = [share(run(a, w * (places == unit)), z)]
            total[unit] += shares[0].sum()
            if reduction == "max":
                shares = [share(run(a, w * tap), z) for tap in taps_of(places == unit, axis)]
            largest[unit] = max(largest[unit], max(s.max() for s in shares))
    return largest, total / sums


def out_of(axis, kernel):
    """The kernel's axis of outputs, of that of its units: transposed convolutions have them the other way round."""
    return len(kernel.shape) - (2 if axis == -1 else 1)


def share(part, z):
    return np.where(z > 1.19e-7, part / np.where(z > 1.19e-7, z, 1), 0)


def taps_of(mask, axis):
    """Masks of the single entries of a unit: one place on every axis but that of the outputs."""
    out = out_of(axis, mask)
    for place in np.argwhere(np.moveaxis(mask, out, -1)[..., 0]):
        one = np.zeros(mask.shape, bool)
        np.moveaxis(one, out, -1)[tuple(place)] = True
        yield one


def pooled_and_flat(x):
    return layers.Flatten()(layers.MaxPooling2D(2)(x))


KINDS = {
    "dense": ((5,), layers.Dense(6), layers.Dense(4), None, 0, np.arange(6)),
    "dense_behind_relu": ((5,), layers.Dense(6, "relu"), layers.Dense(4), None, 0, np.arange(6)),
    "dense_of_a_sequence": ((4, 5), layers.Dense(6), layers.Dense(3), None, 0, np.arange(6)),
    "conv1d_causal": ((9, 3), layers.Conv1D(5, 3), layers.Conv1D(4, 3, padding="causal", dilation_rate=2), None, -2, 0),
    "conv2d": ((6, 5, 3), layers.Conv2D(5, 3), layers.Conv2D(4, (2, 3)), None, -2, 0),
    "conv2d_same": (
        (6, 5, 3),
        layers.Conv2D(5, 3, activation="relu"),
        layers.Conv2D(4, 3, padding="same"),
        None,
        -2,
        0,
    ),
    "conv2d_strided": ((8, 7, 3), layers.Conv2D(5, 3), layers.Conv2D(4, 3, 2, padding="same"), None, -2, 0),
    "conv2d_dilated": ((8, 8, 3), layers.Conv2D(5, 3), layers.Conv2D(4, 3, dilation_rate=2), None, -2, 0),
    "conv2d_1x1": ((4, 4, 3), layers.Conv2D(5, 3, activation="relu"), layers.Conv2D(4, 1), None, -2, 0),
    "conv2d_grouped": ((5, 5, 3), layers.Conv2D(8, 3), layers.Conv2D(6, (3, 2), groups=2), None, -2, 0),
    "conv3d": ((5, 4, 4, 2), layers.Conv3D(4, 2), layers.Conv3D(3, (2, 1, 2), padding="same"), None, -2, 0),
    "conv1d_transposed": ((5, 3), layers.Conv1D(4, 3), layers.Conv1DTranspose(3, 6, 2, padding="same"), None, -1, 0),
    "conv2d_transposed": (
        (4, 4, 3),
        layers.Conv2D(4, 2),
        layers.Conv2DTranspose(3, (6, 3), (2, 1), padding="same"),
        None,
        -1,
        0,
    ),
    "conv3d_transposed": (
        (3, 3, 3, 2),
        layers.Conv3D(3, 2),
        layers.Conv3DTranspose(2, (3, 2, 1), (1, 2, 1), padding="same"),
        None,
        -1,
        0,
    ),
    "einsum_heads": ((3, 4), layers.Dense(5), layers.EinsumDense("abc,cde->abde", (None, 2, 3)), None, 0, np.arange(5)),
    "einsum_blocks": ((3, 4), layers.Dense(5), layers.EinsumDense("abc,bcd->abd", (3, 2)), None, 1, np.arange(5)),
    "flattened": ((6, 6, 3), layers.Conv2D(5, 3), layers.Dense(4), layers.Flatten(), 0, np.arange(80) % 5),
    "pooled_and_flattened": ((7, 7, 3), layers.Conv2D(4, 2), layers.Dense(4), pooled_and_flat, 0, np.arange(36) % 4),
    "over_time": ((3, 4), layers.Dense(5), layers.TimeDistributed(layers.Dense(3)), None, 0, np.arange(5)),
    "images_over_time": (
        (2, 4, 4, 3),
        layers.TimeDistributed(layers.Conv2D(4, 2)),
        layers.TimeDistributed(layers.Conv2D(3, 2, padding="same")),
        None,
        -2,
        0,
    ),
}
"""Name -> input's shape, maker, reader, what is between, axis of the reader's kernel with the units, and which."""


@functools.cache
def built(name, tame=False):
    """(model, data, maker, slow's arguments).

    Tame: all that makes up a sum is of one sign and far from zero, so that nobody is ever alone; otherwise anything.
    """
    shape, maker, reader, between, axis, ids = KINDS[name]
    maker, reader = (type(layer).from_config(layer.get_config()) for layer in (maker, reader))
    if tame:  # from 0 up, or from 0 down
        negative = list(KINDS).index(name) % 2
        holder(maker).activation = keras.activations.get("log_sigmoid" if negative else "softplus")
    keras.utils.set_random_seed(0)
    inputs = keras.Input(shape)
    seen = maker(inputs)
    seen = between(seen) if between else seen
    model = randomize(keras.Model(inputs, reader(seen)))
    x = normal(3, *shape)
    kernel = holder(reader).kernel
    if tame:
        out = out_of(axis, kernel)
        signs = np.where(np.arange(kernel.shape[out]) % 2, 1, -1).reshape(
            [-1 if k == out else 1 for k in range(len(kernel.shape))]
        )
        kernel.assign(signs * np.random.default_rng(1).uniform(0.1, 1, kernel.shape))
    ids = np.arange(kernel.shape[axis]) if isinstance(ids, int) else ids
    given = np.array(keras.Model(inputs, seen)(x))
    return model, x, maker, (in_double(reader), np.array(kernel), given, axis, ids, ids.max() + 1)


@pytest.mark.parametrize("tame, reduction", [(True, "sum"), (True, "max"), (False, "sum")])
@pytest.mark.parametrize("name", KINDS)
def test_sensitivities_are_those_of_the_definition(name, tame, reduction):
    model, x, maker, others = built(name, tame)
    before = model.get_weights()
    found = measured(model, maker, x, kernel_reduction=reduction)
    largest, mean = slow(*others, reduction)
    assert len(found.scores) == len(largest)
    assert np.abs(found.scores - largest).max() < 1e-6
    assert np.abs(found.mean - mean).max() < 1e-6
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights()))
    if tame:
        assert found.saturated < 0.5 and len(set(found.scores.round(4))) > 1
        taps = others[1].size // (others[1].shape[out_of(others[3], others[1])] * others[-1])
        if taps > 1 and "einsum" not in name:  # those have several axes of outputs
            other = measured(model, maker, x, kernel_reduction="max" if reduction == "sum" else "sum")
            assert np.abs(other.scores - found.scores).max() > 1e-2


@pytest.mark.parametrize("multiplier", (1, 2))
@pytest.mark.parametrize("rank", (1, 2))
def test_of_a_separable_convolution_the_pointwise_kernel_counts(rank, multiplier):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((7, 6)[:rank] + (3,))
    maker = (layers.Conv1D, layers.Conv2D)[rank - 1](4, 2)
    reader = (layers.SeparableConv1D, layers.SeparableConv2D)[rank - 1](
        5, 3, strides=2, padding="same", depth_multiplier=multiplier
    )
    model = randomize(keras.Model(inputs, reader(maker(inputs))))
    x = normal(3, *inputs.shape[1:])
    deep = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)[rank - 1](
        3, strides=2, padding="same", depth_multiplier=multiplier, use_bias=False, dtype="float64"
    )
    seen = maker(x)
    deep.build(seen.shape)
    deep.kernel.assign(reader.depthwise_kernel)
    pointwise = np.array(reader.pointwise_kernel).reshape(4 * multiplier, 5)
    largest, mean = slow(
        lambda a, w: a @ w, pointwise, np.array(deep(seen)), 0, np.arange(4 * multiplier) // multiplier, 4
    )
    found = measured(model, maker, x)
    assert np.abs(found.scores - largest).max() < 1e-6 and np.abs(found.mean - mean).max() < 1e-6


# -- several readers ---------------------------------------------------------------------------------------------


def test_of_a_residual_sum_a_concatenation_and_several_readers_the_largest_counts():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 3))
    first, inner, other = (layers.Conv2D(n, 3, padding="same", activation="softplus") for n in (5, 5, 4))
    one, two, three = layers.Conv2D(3, 3), layers.Conv2D(2, 1), layers.Dense(3)
    x = first(inputs)
    stream = layers.Add()([x, inner(x)])
    joined = layers.Concatenate()([other(inputs), stream])
    mean = layers.GlobalAveragePooling2D()(stream)
    model = randomize(keras.Model(inputs, [one(joined), two(stream), three(mean)]))
    for reader in (inner, one, two, three):  # nobody is alone in a sum
        reader.kernel.assign(np.abs(reader.kernel) + 0.1)
    data = normal(4, 6, 6, 3)
    found = measured(model, first, data)
    each = []
    for reader, tensor, units in (
        (inner, x, np.arange(5)),
        (one, joined, np.arange(9) - 4),  # behind the four of `other`
        (two, stream, np.arange(5)),
        (three, mean, np.arange(5)),
    ):
        given, kernel = np.array(keras.Model(inputs, tensor)(data)), np.array(reader.kernel)
        axis = 0 if reader is three else -2
        each.append(slow(in_double(reader), kernel, given, axis, units, 5)[0])
    assert np.abs(found.scores - np.max(each, axis=0)).max() < 1e-6
    assert len({int(k) for k in np.argmax(each, axis=0)}) > 1  # not one of them alone
    second = measured(model, other, data)
    given, kernel = np.array(keras.Model(inputs, joined)(data)), np.array(one.kernel)
    assert np.abs(second.scores - slow(in_double(one), kernel, given, -2, np.arange(9), 4)[0]).max() < 1e-6


def test_all_calls_of_a_shared_reader_count():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    maker, reader = layers.Dense(5, "softplus"), layers.Dense(3)
    model = randomize(keras.Model(inputs, [reader(maker(inputs)), reader(maker(inputs * 2 + 1))]))
    reader.kernel.assign(np.abs(reader.kernel) + 0.1)
    x = normal(3, 4)
    kernel, seen = np.array(reader.kernel), np.array(maker(x))
    later = np.array(maker(x * 2 + 1))
    each = [slow(in_double(reader), kernel, given, 0, np.arange(5), 5)[0] for given in (seen, later)]
    found = measured(model, maker, x)
    assert np.abs(found.scores - np.max(each, axis=0)).max() < 1e-6
    assert (each[0] > each[1] + 1e-3).any() and (each[1] > each[0] + 1e-3).any()


ZOO_KINDS = (
    "conv2d_small_groups",
    "squeeze_and_excite_dense",
    "concat_twice_the_same",
    "inverted_residual",
    "split_uneven",
    "attention_cross",
    "vit",
    "einsum_token_mixing",
    "nested_three_deep",
    "two_in_two_out_by_name",
    "time_distributed",
    "gru",
)


@pytest.mark.parametrize("name", [name for name in ZOO_KINDS if name in ZOO])  # some backends cannot run all
def test_every_group_has_sensitivities_or_a_note(name):
    model, _ = ZOO[name]()
    channels = Channels(model)
    found = sensitivities(channels, example(model, 5))
    assert sorted([*found.groups, *found.notes]) == [g.index for g in channels.groups]
    sites = sites_of(channels, Program(model))
    for index, s in found.groups.items():
        assert s.group is channels.groups[index] and s.scores.shape == s.mean.shape == (len(s.group),)
        assert (s.mean >= 0).all() and (s.mean <= s.scores + 1e-6).all() and (s.scores <= 1).all()
        whole = [
            site for site in sites if site.reads(s.group) and sum(map(len, site.columns(s.group)[0])) == site.shape[1]
        ]
        if whole and len(s.group) * site_width(whole[0], s.group) == whole[0].shape[1]:
            assert s.scores.sum() >= 1 - 1e-6  # the shares of one sum add up to 1


def site_width(site, group):
    return site.columns(group)[0].shape[1]


def test_what_reads_through_something_without_a_matrix_is_named():
    model, _ = ZOO["gru"]()
    found = sensitivities(Channels(model), example(model, 5))
    assert not found.groups and all("(GRU)" in found.notes[k] for k in (0, 1))
    assert found.notes[2].endswith("itself, from one step to the next")  # its cells, which a Dense reads, too
    inputs = keras.Input((6, 6, 3))
    x = layers.DepthwiseConv2D(3)(layers.Conv2D(8, 3)(inputs))[..., :5]
    model = keras.Model(inputs, layers.Dense(2)(layers.GlobalAveragePooling2D()(layers.Conv2D(4, 1)(x))))
    channels = Channels(model)
    notes = sensitivities(channels, normal(4, 6, 6, 3)).notes
    assert {len(channels.groups[k]): r for k, r in notes.items()} == {
        3: "nothing with a kernel that mixes channels reads it"
    }


@pytest.mark.parametrize("policy", ("mixed_float16", "mixed_bfloat16", "float16"))
def test_shares_are_computed_in_single_precision(policy):
    """Half precision would overflow in the sums: 300 x 300 x 20."""
    inputs = keras.Input((6,))
    maker, reader = layers.Dense(20, dtype=policy), layers.Dense(3, dtype=policy)
    model = keras.Model(inputs, reader(maker(inputs)))
    maker.kernel.assign(100 * np.abs(normal(6, 20)))
    reader.kernel.assign(300 * np.abs(normal(20, 3)))
    x = np.abs(normal(4, 6)) + 1
    seen = np.array(keras.ops.cast(maker(x), "float64"))
    kernel = np.array(keras.ops.cast(reader.kernel, "float64"))
    largest, mean = slow(lambda a, w: a @ w, kernel, seen, 0, np.arange(20), 20)
    found = measured(model, maker, x)
    assert (seen @ kernel).max() > 65504
    assert np.abs(found.scores - largest).max() < 1e-6 and np.abs(found.mean - mean).max() < 1e-6
    assert found.scores.dtype == np.float64


def lost(others, keep):
    """Largest share that any sum loses if only these units stay."""
    run, kernel, x, axis, ids, units = others
    kernel, x = kernel.astype(np.float64), x.astype(np.float64)
    mask = np.isin(ids, np.flatnonzero(keep)).reshape(
        [-1 if k == axis % kernel.ndim else 1 for k in range(kernel.ndim)]
    )
    worst = 0.0
    for a, w in itertools.product(halves(x), halves(kernel)):
        z = run(a, w)
        worst = max(worst, share(z - run(a, w * mask), z).max())
    return worst


@pytest.mark.parametrize("name", ("conv2d_same", "conv2d_strided", "conv2d_transposed", "pooled_and_flattened"))
def test_no_sum_loses_more_than_the_sensitivities_of_what_left_add_up_to(name):
    """With "sum". With "max" it does."""
    model, x, maker, others = built(name, tame=True)
    s = {r: measured(model, maker, x, kernel_reduction=r).scores for r in sensitivity.REDUCTIONS}
    assert (s["max"] <= s["sum"] + 1e-6).all()
    violated = 0
    for keep in itertools.product((True, False), repeat=others[-1]):
        gone = ~np.array(keep)
        worst = lost(others, np.array(keep))
        assert worst <= s["sum"][gone].sum() + 1e-6
        violated += worst > s["max"][gone].sum() + 1e-3
    assert violated
