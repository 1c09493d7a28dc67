"""Sensitivities of random small networks, against the definition written out in loops, and against another tracker."""

import itertools
import math

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers
from zoo import randomize

from keras_prune import Channels
from keras_prune.sensitivity import deviations, sensitivities

pytestmark = pytest.mark.filterwarnings("ignore:In .* groups more than half:UserWarning")

EPSILON = 1.1920929e-07
SETTINGS = settings(
    deadline=None, derandomize=True, max_examples=40, database=None, suppress_health_check=list(HealthCheck)
)


# -- the definition, in loops: patches of a layer's input, one row per position and sample ---------------------------


def pads(layer, lengths):
    """(zeros in front, output length) per spatial axis."""
    found = []
    for n, k, s, d in zip(lengths, layer.kernel_size, layer.strides, layer.dilation_rate):
        reach = d * (k - 1) + 1
        if layer.padding == "causal":
            found.append((reach - 1, math.ceil(n / s)))
        elif layer.padding == "same":
            out = math.ceil(n / s)
            found.append((max((out - 1) * s + reach - n, 0) // 2, out))
        else:
            found.append((0, (n - reach) // s + 1))
    return found


def patches(layer, x):
    """(samples x positions, taps, channels): what each output position sees, by looking."""
    lengths, rows = x.shape[1:-1], []
    geometry = pads(layer, lengths)
    for image in x:
        for place in itertools.product(*(range(out) for _, out in geometry)):
            row = []
            for tap in itertools.product(*map(range, layer.kernel_size)):
                at = [
                    p * s + t * d - before
                    for p, s, t, d, (before, _) in zip(place, layer.strides, tap, layer.dilation_rate, geometry)
                ]
                inside = all(0 <= i < n for i, n in zip(at, lengths))
                row.append(image[tuple(at)] if inside else np.zeros(x.shape[-1]))
            rows.append(row)
    return np.array(rows)


def patches_back(layer, x):
    """The same of a transposed convolution: input i goes to output i * stride + tap - pad."""
    lengths, rows = x.shape[1:-1], []
    geometry = []
    for n, k, s in zip(lengths, layer.kernel_size, layer.strides):
        same = layer.padding == "same"
        geometry.append((max(k - s, 0) // 2, n * s) if same else (0, (n - 1) * s + max(k, s)))
    for image in x:
        for place in itertools.product(*(range(out) for _, out in geometry)):
            row = []
            for tap in itertools.product(*map(range, layer.kernel_size)):
                at = [p + before - t for p, t, (before, _) in zip(place, tap, geometry)]
                hits = all(i % s == 0 and 0 <= i // s < n for i, s, n in zip(at, layer.strides, lengths))
                row.append(image[tuple(i // s for i, s in zip(at, layer.strides))] if hits else np.zeros(x.shape[-1]))
            rows.append(row)
    return np.array(rows)


def spread(layer, x, kernel):
    """What the depthwise kernel of a separable convolution makes: (rows, channels x multiplier)."""
    seen = patches(layer, x)
    made = np.zeros((len(seen), seen.shape[2], kernel.shape[-1]))
    flat = kernel.reshape(-1, *kernel.shape[-2:])
    for tap in range(seen.shape[1]):
        for channel in range(seen.shape[2]):
            made[:, channel] += seen[:, tap, channel, None] * flat[tap, channel]
    return made.reshape(len(seen), -1)


def blocks_of(layer, x, unit_of):
    """[(rows, columns), (columns, outputs), unit of each column]: all that a layer multiplies, one entry per block."""
    x, kind = np.asarray(x, np.float64), type(layer).__name__
    if kind == "Dense":
        return [(x.reshape(-1, x.shape[-1]), np.array(layer.kernel, np.float64), unit_of)]
    if "Separable" in kind:
        deep, flat = (np.array(k, np.float64) for k in (layer.depthwise_kernel, layer.pointwise_kernel))
        rows = spread(layer, x, deep)
        return [(rows, flat.reshape(rows.shape[1], -1), np.repeat(unit_of, deep.shape[-1]))]
    kernel = np.array(layer.kernel, np.float64)
    taps = math.prod(layer.kernel_size)
    kernel = kernel.reshape(taps, *kernel.shape[-2:])
    if "Transpose" in kind:
        rows = patches_back(layer, x)
        return [
            (
                rows.reshape(len(rows), -1),
                kernel.transpose(0, 2, 1).reshape(-1, kernel.shape[1]),
                np.tile(unit_of, taps),
            )
        ]
    rows, found = patches(layer, x), []
    width, makes = x.shape[-1] // layer.groups, kernel.shape[-1] // layer.groups
    for g in range(layer.groups):
        mine = slice(g * width, (g + 1) * width)
        part = kernel[:, :, g * makes : (g + 1) * makes].reshape(-1, makes)
        found.append((rows[:, :, mine].reshape(len(rows), -1), part, np.tile(unit_of[mine], taps)))
    return found


def by_hand(blocks, units, reduction="sum", split=True):
    """(largest share, mean share) of each unit over quadrants, rows and outputs. Unit -1 is somebody else's.

    Args:
        split: by signs. Without, it is no sensitivity.
    """
    largest, total, sums = np.zeros(units), np.zeros(units), 0
    quadrants = list(itertools.product((1, -1), (1, -1))) if split else [(0, 0)]
    for (rows, matrix, unit_of), (a, w) in itertools.product(blocks, quadrants):
        seen, weights = (np.maximum(s * v, 0) if s else v for s, v in ((a, rows), (w, matrix)))
        terms = seen[:, :, None] * weights[None]
        made = terms.sum(1)
        counts = np.abs(made) > EPSILON
        sums += counts.sum()
        for unit in range(units):
            shares = terms[:, unit_of == unit] / np.where(counts, made, np.inf)[:, None]
            if shares.size:
                whole = shares.sum(1)
                total[unit] += whole.sum()
                largest[unit] = max(largest[unit], (whole if reduction == "sum" else shares).max())
    return largest, total / max(sums, 1)


def check_oracle(layer, x, blocks):
    """What the loops say the layer multiplies is what it computes."""
    made = np.concatenate([rows @ matrix for rows, matrix, _ in blocks], axis=1)
    bias = 0 if layer.bias is None else np.array(layer.bias)
    assert np.allclose(np.array(layer.activation(made + bias)), np.array(layer(x)).reshape(made.shape), atol=1e-4)


# -- random networks -----------------------------------------------------------------------------------------------

ACTIVATIONS = (None, "relu", "softplus", "tanh", "leaky_relu")
CONVOLUTIONS = {1: layers.Conv1D, 2: layers.Conv2D, 3: layers.Conv3D}
TRANSPOSED = {1: layers.Conv1DTranspose, 2: layers.Conv2DTranspose, 3: layers.Conv3DTranspose}
SEPARABLE = {1: layers.SeparableConv1D, 2: layers.SeparableConv2D}
DEPTHWISE = {1: layers.DepthwiseConv1D, 2: layers.DepthwiseConv2D}


WIRINGS = ("plain", "add", "concat", "two readers", "twice")


@st.composite
def convolutions(draw, rank, filters, channels):
    kind = draw(st.sampled_from(("plain", "plain", "plain", "grouped", "separable", "transposed", "dense")))
    top = 2 if rank == 3 else 3
    arguments = dict(
        kernel_size=draw(st.tuples(*[st.integers(1, top)] * rank)),
        padding=draw(st.sampled_from(("valid", "same") + (("causal",) if rank == 1 and kind == "plain" else ()))),
        use_bias=draw(st.booleans()),
    )
    if kind == "dense":
        return layers.Dense(filters, use_bias=arguments["use_bias"])
    if kind == "transposed":
        return TRANSPOSED[rank](filters, strides=draw(st.tuples(*[st.integers(1, 2)] * rank)), **arguments)
    if kind == "separable" and rank < 3:
        stride = draw(st.integers(1, 2))
        return SEPARABLE[rank](filters, strides=stride, depth_multiplier=draw(st.integers(1, 2)), **arguments)
    if draw(st.booleans()):
        arguments["strides"] = draw(st.tuples(*[st.integers(1, 2)] * rank))
    elif draw(st.booleans()):
        arguments["dilation_rate"] = (2,) * rank
    if kind == "grouped" and rank == 2 and channels in (4, 6):
        arguments["groups"] = 2
        filters = 2 * filters
    return CONVOLUTIONS[rank](filters, **arguments)


@st.composite
def networks(draw, wiring=None):
    """What `built` makes a network of."""
    rank = draw(st.sampled_from((2, 1, 0, 3)))
    width = draw(st.integers(2, 4 if rank == 3 else 6))
    shape = tuple(draw(st.integers(5, 6)) for _ in range(rank)) + (draw(st.integers(1, 3)),)
    shape = shape if rank < 3 else (5, 5, 5, shape[-1])
    wiring = wiring or draw(st.sampled_from(WIRINGS))
    between = (
        draw(st.sampled_from(("nothing", "nothing", "norm", "flatten", "depthwise", "pool"))) if rank else "nothing"
    )
    between = "nothing" if wiring != "plain" and between == "flatten" else between
    flat = rank == 0 or between == "flatten"
    channels = width + 3 if wiring == "concat" else width
    count = 1 + (wiring == "two readers")
    readers = [
        layers.Dense(draw(st.integers(1, 4))) if flat else draw(convolutions(rank, draw(st.integers(1, 3)), channels))
        for _ in range(count)
    ]
    grouped = any(getattr(r, "groups", 1) > 1 for r in readers)
    return dict(
        seed=draw(st.integers(0, 10**6)),
        rank=rank,
        shape=shape,
        width=width,
        wiring="plain" if grouped else wiring,
        between=between,
        activation=draw(st.sampled_from(ACTIVATIONS)),
        readers=[(type(r), r.get_config()) for r in readers][: 1 if grouped else None],
    )


def made(rank, filters, activation, size=2):
    """A layer that makes units and keeps the place of everything."""
    if not rank:
        return layers.Dense(filters, activation=activation)
    return CONVOLUTIONS[rank](filters, size, padding="same", activation=activation)


def built(net):
    """(model, maker, data, [(reader, tensor that it is given, unit of each of its channels)])."""
    keras.utils.set_random_seed(net["seed"])
    readers = [kind.from_config({**config, "name": None}) for kind, config in net["readers"]]
    rank, width = net["rank"], net["width"]
    inputs, maker = keras.Input(net["shape"]), made(rank, width, net["activation"])
    x, units, calls = maker(inputs), np.arange(width), []
    if net["between"] == "norm":
        x = layers.BatchNormalization()(x)
    elif net["between"] == "depthwise" and rank < 3:
        x = DEPTHWISE[rank](2, padding="same", depth_multiplier=2)(x)
        units = np.repeat(units, 2)
    elif net["between"] == "pool" and rank == 2:
        x = layers.AveragePooling2D(2, 1)(x)
    if net["wiring"] == "add":  # the block reads the stream, too
        inner = made(rank, len(units), net["activation"])
        calls.append((inner, x, units))
        if len(units) > width:
            calls, units = [], np.arange(len(units))
            x = inner(x)
            maker = inner
        else:
            x = layers.Add()([x, inner(x)])
    elif net["wiring"] == "concat":
        x = layers.Concatenate()([made(rank, 3, "tanh")(inputs), x])
        units = np.concatenate([[-1] * 3, units])
    if net["between"] == "flatten":
        units = np.tile(units, math.prod(x.shape[1:-1]))
        x = layers.Flatten()(x)
    if getattr(readers[0], "groups", 1) > 1:  # the j-th channels of all groups are one unit
        units = np.arange(len(units)) % (len(units) // 2)
    calls += [(reader, x, units) for reader in readers]
    outputs = [reader(x) for reader in readers]
    if net["wiring"] == "twice":
        other = keras.layers.Rescaling(-1.5, 0.3)(x)
        outputs.append(readers[0](other))
        calls.append((readers[0], other, units))
    model = randomize(keras.Model(inputs, outputs), net["seed"])
    data = np.random.default_rng(net["seed"]).normal(size=(2, *net["shape"])).astype("float32")
    return model, maker, data, calls


def fits(net):
    """Whether Keras itself can run it: windows that are no larger than their inputs."""
    try:
        return built(net)
    except (ValueError, NotImplementedError):
        return None


def measured(model, maker, x, **arguments):
    channels = Channels(model)
    group = next(g for g in channels.groups if any(m.weight.layer is maker for m in g.producers))
    return channels, group, sensitivities(channels, x, groups=[group], **arguments).groups[group.index]


SEEN = []


def check(net, reduction):
    network = fits(net)
    if network is None:
        return
    model, maker, x, calls = network
    channels, group, found = measured(model, maker, x, kernel_reduction=reduction)
    blocks = []
    for reader, tensor, units in calls:
        read = np.array(keras.Model(model.inputs, tensor)(x))
        some = blocks_of(reader, read, units)
        check_oracle(reader, read, some)
        blocks += some
    largest, mean = by_hand(blocks, len(group), reduction)
    assert np.abs(found.scores - largest).max() < 1e-6
    assert np.abs(found.mean - mean).max() < 1e-6
    other = by_hand(blocks, len(group), "max" if reduction == "sum" else "sum")[0]
    unsplit = by_hand(blocks, len(group), reduction, split=False)[0]
    kinds = {type(reader).__name__ for reader, _, _ in calls} | {net["wiring"], net["between"]}
    SEEN.append((kinds, np.abs(other - largest).max() > 1e-3, np.abs(unsplit - largest).max() > 1e-3))


@pytest.mark.parametrize("wiring", WIRINGS)
def test_sensitivities_of_random_networks_are_those_of_the_definition_in_loops(wiring):
    many = 16 if wiring == "plain" else 9

    @settings(SETTINGS, max_examples=many)
    @given(networks(wiring), st.sampled_from(("sum", "sum", "max")))
    def run(net, reduction):
        check(net, reduction)

    SEEN.clear()
    run()
    assert len(SEEN) >= many // 2
    # The controls: without the split by signs, or with the other reduction, many would be wrong.
    assert sum(unsplit for _, _, unsplit in SEEN) >= 3 and (wiring != "plain" or any(other for _, other, _ in SEEN))


@settings(SETTINGS, max_examples=25)
@given(networks(), st.lists(st.sampled_from((0.0, 1.0, 0.5, 2.5)), min_size=12, max_size=12))
def test_what_reweighed_sums_of_random_networks_lose_is_what_the_loops_say(net, factors):
    """And never more than the sensitivities, times |multiplier - 1|, add up to."""
    network = fits(net)
    if network is None:
        return
    model, maker, x, calls = network
    channels, group, found = measured(model, maker, x)
    change = np.resize(factors, len(group)) - 1
    multipliers = np.ones(channels.unit_count)
    multipliers[group.units] += change
    lost = {}
    for reader, tensor, units in calls:
        read, worst = np.array(keras.Model(model.inputs, tensor)(x)), 0.0
        for rows, matrix, unit_of in blocks_of(reader, read, units):
            moved = np.where(unit_of >= 0, change[unit_of], 0)
            for a, w in itertools.product((1, -1), (1, -1)):
                seen, weights = np.maximum(a * rows, 0), np.maximum(w * matrix, 0)
                made = seen @ weights
                off = np.abs((seen * moved) @ weights)
                worst = max(worst, np.where(made > EPSILON, off / np.where(made > EPSILON, made, 1), 0).max())
        lost[reader.name] = max(worst, lost.get(reader.name, 0.0))
    names = {id(w): w.layer.name for w in channels.weights}
    told = {names[key]: value for key, value in deviations(channels, multipliers, x).items()}
    if not change.any():
        assert told == {}
        return
    assert told.keys() == lost.keys()
    for name, value in told.items():
        assert value == pytest.approx(lost[name], abs=2e-6)
        assert value <= (np.abs(change) * found.scores).sum() + 2e-6


# -- another tracker -------------------------------------------------------------------------------------------------


def unfold(x, size, stride, dilation):
    """(samples, channels x taps, positions) of (samples, channels, height, width), as torch.nn.functional.unfold."""
    n, channels, height, width = x.shape
    out = [(s - d * (k - 1) - 1) // t + 1 for s, k, t, d in zip((height, width), size, stride, dilation)]
    found = np.zeros((n, channels, *size, *out))
    for r, c in itertools.product(*map(range, size)):
        rows = slice(r * dilation[0], r * dilation[0] + (out[0] - 1) * stride[0] + 1, stride[0])
        columns = slice(c * dilation[1], c * dilation[1] + (out[1] - 1) * stride[1] + 1, stride[1])
        found[:, :, r, c] = x[:, :, rows, columns]
    return found.reshape(n, channels * size[0] * size[1], out[0] * out[1])


def tracked(weight, samples, size, stride, dilation):
    """The sensitivities of torchprune's tracker: weight (out, in, rows, columns), samples (n, in, height, width)."""
    found = np.zeros((weight.shape[1], size[0] * size[1]))
    flat = weight.reshape(len(weight), -1)
    for sample in samples:  # a batch holds one
        batch = sample[None]
        if (batch < 0).any():
            batch = np.concatenate([np.maximum(batch, 0), np.maximum(-batch, 0)])
        for signed in (np.maximum(flat, 0), np.maximum(-flat, 0)):
            for seen in unfold(batch, size, stride, dilation):
                for row in signed:
                    made = row @ seen
                    shares = np.where(made > EPSILON, row[:, None] * seen / np.where(made > EPSILON, made, 1), 0)
                    found = np.maximum(found, shares.max(1).reshape(found.shape))
    return found.max(1)


@settings(SETTINGS, max_examples=20)
@given(
    st.integers(0, 10**6),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.sampled_from((((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 1), (2, 2)), ((1, 2), (1, 1)))),
    st.sampled_from(("valid", "same")),
    st.sampled_from(("relu", None, "softplus")),
    st.booleans(),
)
def test_with_max_sensitivities_are_those_of_the_authors_tracker(seed, size, steps, padding, activation, dense):
    keras.utils.set_random_seed(seed)
    stride, dilation = steps
    if dense:
        inputs, maker, reader = keras.Input((5,)), layers.Dense(6, activation), layers.Dense(3)
    else:
        inputs, maker = keras.Input((7, 6, 2)), layers.Conv2D(4, 2, activation=activation)
        reader = layers.Conv2D(3, size, strides=stride, dilation_rate=dilation, padding=padding)
    tensor = maker(inputs)
    model = randomize(keras.Model(inputs, reader(tensor)), seed)
    x = np.random.default_rng(seed).normal(size=(3, *inputs.shape[1:])).astype("float32")
    read = np.array(keras.Model(inputs, tensor)(x), np.float64)
    kernel = np.array(reader.kernel, np.float64)
    if dense:
        other = tracked(kernel.T[:, :, None, None], read[:, :, None, None], (1, 1), (1, 1), (1, 1))
    else:
        if padding == "same":
            zeros = []
            for n, (before, out), k, s, d in zip(
                read.shape[1:3], pads(reader, read.shape[1:3]), size, stride, dilation
            ):
                zeros.append((before, max((out - 1) * s + d * (k - 1) + 1 - n - before, 0)))
            read = np.pad(read, [(0, 0), *zeros, (0, 0)])
        other = tracked(kernel.transpose(3, 2, 0, 1), read.transpose(0, 3, 1, 2), size, stride, dilation)
    _, _, found = measured(model, maker, x, kernel_reduction="max")
    assert np.abs(found.scores - other).max() < 1e-6
    _, _, whole = measured(model, maker, x)
    if dense or size == (1, 1):
        assert np.abs(whole.scores - other).max() < 1e-6
    else:
        assert (whole.scores >= other - 1e-6).all()
