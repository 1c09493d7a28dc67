import importlib.util
import itertools
import math
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from small import compiled, patterns, residual_net
from zoo import ZOO, randomize

from keras_prune import Channels, psp_model, strip
from keras_prune.conversion import PSPReport
from keras_prune.layers import PLAIN, STRUCTURES, PSPConv2D, PSPDense, decay
from keras_prune.surgery import psp_layers, settle

X, Y = patterns()


def converted(model, *arguments, **options):
    return psp_model(model, *arguments, report=True, say=None, **options)


def skipped(model, *arguments, **options):
    """Name -> why it stayed plain."""
    return dict(converted(model, *arguments, **options)[1].skipped)


def arrays(outputs):
    return [keras.ops.convert_to_numpy(keras.ops.cast(t, "float32")) for t in keras.tree.flatten(outputs)]


def outputs_of(model, x):
    """Inference, which leaves states as they were."""
    states = [(v, keras.ops.convert_to_numpy(v)) for v in model.non_trainable_variables]
    result = arrays(model(x, training=False))
    for variable, value in states:
        variable.assign(value)
    return result


def assert_same_outputs(a, b, x):
    for left, right in zip(outputs_of(a, x), outputs_of(b, x), strict=True):
        np.testing.assert_array_equal(left, right)  # bit for bit


def assert_same_model(a, b):
    """Types, names, flags and weights, at any depth."""
    assert type(a) is type(b)
    assert [(type(x), x.name, x.trainable) for x in a.layers] == [(type(x), x.name, x.trainable) for x in b.layers]
    for left, right in zip(a.variables, b.variables, strict=True):
        if "seed" not in left.name:
            np.testing.assert_array_equal(left, right)


def conv(n, k=3, **options):
    return layers.Conv2D(n, k, padding="same", **options)


def norm_relu(x):
    return layers.ReLU()(layers.BatchNormalization()(x))


# -- the same outputs --------------------------------------------------------------------------------------------


BRANCHED = (
    "add_with_frozen_input",
    "attention_by_hand",
    "concat_twice_the_same",
    "densely_connected",
    "inverted_residual",
    "layer_average",
    "nested_model_twice",
    "op_maximum",
    "resnet_option_a_layers",
    "shared_branch",
    "squeeze_and_excite",
    "vit",
)
PLAINLY = {name for name in ZOO if not name.startswith("psp_")} - {"simple_rnn"}  # that one draws random numbers
SAMPLE = sorted(PLAINLY - set(BRANCHED))[::7]


@pytest.mark.parametrize("structure", list(STRUCTURES))
def test_twins_of_the_zoo_compute_the_same_and_settle_to_the_same_models(structure):
    chains = [name for name in STRUCTURES if name != "layer"]
    kinds = BRANCHED if structure == "layer" else SAMPLE[chains.index(structure) :: len(chains)]
    done = 0
    for name in kinds:
        model, x = ZOO[name]()
        try:
            twin, report = converted(model, structure, skip="none")
        except ValueError as error:  # a chain whose kernels have no taps
            assert structure == "shape" and "nothing leads around it" in str(error), name
            continue
        done += 1
        assert len(psp_layers(twin)) == len(report.converted) > 0 and not psp_layers(model)
        assert_same_outputs(model, twin, x)
        assert_same_model(settle(twin), model)
    assert done >= 10


def test_a_mobilenet_computes_the_same():
    model = randomize(keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3), alpha=0.35, classes=4))
    twin, report = converted(model, "column")
    assert dict(report.skipped) == {"Conv1": "input layer", "predictions": "output layer"}  # no shortcuts with weights
    assert len(report.converted) == 51
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    assert_same_outputs(model, twin, x)
    assert_same_model(settle(twin), model)


def test_outputs_differ_once_an_alpha_does():
    """The control of the tests above."""
    model = residual_net()
    twin = psp_model(model, say=None)
    twin.get_layer("inner0").channel_alpha.assign(np.full((1, 1, 16, 1), 0.5))
    assert not np.array_equal(outputs_of(model, X[:2])[0], outputs_of(twin, X[:2])[0])
    with pytest.raises(AssertionError):
        assert_same_model(settle(twin), model)


@pytest.mark.parametrize("kind", sorted(PLAIN, key=lambda kind: kind.__name__), ids=lambda kind: kind.__name__)
def test_every_twin_takes_each_structure_it_has(kind):
    plain = PLAIN[kind]
    rank = {"Conv1D": 1, "Conv3D": 3, "Dense": 1}.get(plain.__name__, 2)
    settings = {} if plain is layers.Dense else dict(kernel_size=3, padding="same")
    if plain is layers.Dense:
        settings["units"] = 5
    elif plain is not layers.DepthwiseConv2D:
        settings["filters"] = 5
    inputs = x = keras.Input((6,) * rank + (4,))
    x = layers.Concatenate()([x, plain(**settings, activation="tanh", name="it")(x)])
    model = randomize(keras.Model(inputs, x))
    data = np.random.default_rng(0).normal(size=(2, *inputs.shape[1:])).astype("float32")
    for structure in STRUCTURES:
        twin, report = converted(model, (structure,), skip="none")
        layer = twin.get_layer("it")
        assert type(layer) is kind and report.converted == (("it", (math.prod(layer.alphas[structure].shape),)),)
        assert_same_outputs(model, twin, data)


def test_several_structures_and_arguments_reach_the_layers():
    threshold = keras.Variable(0.2, trainable=False)
    twin = psp_model(
        residual_net(),
        ("column", "channel"),
        threshold={"column": 0.05, "channel": threshold},
        alpha_initializer=keras.initializers.RandomNormal(stddev=1.0),
        alpha_regularizer=keras.regularizers.L1(1e-3),
        gradient="paper_eq5",
        say=None,
    )
    first, second = psp_layers(twin)[:2]
    assert first.structures == ("column", "channel") and first.gradient == "paper_eq5"
    assert float(first.thresholds["column"]) == pytest.approx(0.05)
    assert first.thresholds["channel"] is second.thresholds["channel"] is threshold
    assert isinstance(first.alpha_regularizer, keras.regularizers.L1)
    assert not np.array_equal(first.channel_alpha, second.channel_alpha)  # every layer draws its own
    default = psp_layers(psp_model(residual_net(), say=None))[0]
    assert default.alpha_regularizer.get_config() == decay().get_config()


def test_layers_that_start_dead_are_warned_of():
    with pytest.warns(UserWarning, match="every channel starts pruned"):
        psp_model(residual_net(), alpha_initializer="zeros", say=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        psp_model(residual_net(), say=None)


# -- what the paper leaves alone ---------------------------------------------------------------------------------


def resnet():
    """Post-activation blocks, bottleneck blocks, and projections in the second of each."""
    inputs = keras.Input((16, 16, 3))
    x = norm_relu(conv(4, name="stem")(inputs))
    for block, (n, stride) in enumerate(((4, 1), (8, 2))):
        y = norm_relu(conv(n, strides=stride, name=f"basic{block}_1")(x))
        y = layers.BatchNormalization()(conv(n, name=f"basic{block}_2")(y))
        if stride == 2:
            x = layers.BatchNormalization()(conv(n, 1, strides=2, name=f"basic{block}_projection")(x))
        x = layers.ReLU()(layers.Add()([y, x]))
    for block, n in enumerate((8, 16)):
        a = norm_relu(x)  # activation before the branches part
        y = norm_relu(conv(4, 1, name=f"bottleneck{block}_1")(a))
        y = norm_relu(conv(4, name=f"bottleneck{block}_2")(y))
        y = conv(n, 1, name=f"bottleneck{block}_3")(y)
        x = (x if n == 8 else conv(n, 1, name=f"bottleneck{block}_projection")(a)) + y
    return keras.Model(inputs, layers.Dense(3, name="head")(layers.GlobalAveragePooling2D()(x)), name="resnet")


def test_a_resnet_keeps_its_stem_its_projections_and_its_head():
    model = resnet()
    twin, report = converted(model)
    assert dict(report.skipped) == {
        "stem": "input layer",
        "basic1_projection": "shortcut",
        "bottleneck1_projection": "shortcut",
        "head": "output layer",
    }
    assert dict(report.converted) == {
        "basic0_1": (4,),
        "basic0_2": (4,),
        "basic1_1": (4,),
        "basic1_2": (8,),
        **{f"bottleneck{b}_{n}": (k,) for b in (0, 1) for n, k in ((1, 8), (2, 4), (3, 4))},
    }
    assert {layer.name for layer in psp_layers(twin)} == set(dict(report.converted))
    assert {layer.name for layer in twin.layers} == {layer.name for layer in model.layers}


def one_block(order=1):
    inputs = keras.Input((8, 8, 3))
    x = conv(4, name="stem")(inputs)
    long = conv(4, name="long2")(conv(4, name="long1")(x))
    x = layers.Add()([conv(4, 1, name="short")(x), long][::order])
    return keras.Model(inputs, conv(2, name="end")(x), name="one_block")


@pytest.mark.parametrize("order", [1, -1])
def test_which_branch_comes_first_in_the_sum_does_not_matter(order):
    assert skipped(one_block(order)) == {"stem": "input layer", "short": "shortcut", "end": "output layer"}


def test_what_only_looks_like_a_shortcut_is_converted():
    inputs = keras.Input((8, 8, 3))
    x = conv(4, name="stem")(inputs)
    x = conv(4, name="wide")(x) + conv(4, 1, name="narrow")(x) + conv(4, 5, name="wider")(x)  # parallel, all one deep
    x = layers.Concatenate()([conv(4, 1, name="inception1")(x), conv(4, name="i2")(conv(4, 1, name="i1")(x))])
    y = layers.GlobalAveragePooling2D(keepdims=True)(x)
    x = layers.Multiply()([x, conv(8, 1, activation="sigmoid", name="gate")(y)])  # a gate is not a sum
    y = conv(8, name="in_both")(x)
    x = layers.Add()([x, y, conv(8, name="only_in_one")(y)])
    x = layers.Add()([x, conv(8, name="residual")(x)])
    assert skipped(keras.Model(inputs, conv(2, name="end")(x))) == {"stem": "input layer", "end": "output layer"}


def densenet(pool=None, between=None):
    inputs = keras.Input((16, 16, 3))
    x = conv(4, name="stem")(inputs)
    for stage in (0, 1):
        for step in (0, 1):
            y = norm_relu(conv(8, 1, name=f"dense{stage}{step}_bottleneck")(norm_relu(x)))
            x = layers.Concatenate()([x, conv(4, name=f"dense{stage}{step}")(y)])
        if stage == 0:
            x = conv(6, 1, name="transition")(norm_relu(x))
            x = between(x) if between else x
            x = (pool or layers.AveragePooling2D(2))(x)
    x = layers.GlobalAveragePooling2D()(norm_relu(x))
    return keras.Model(inputs, layers.Dense(3, name="head")(x), name="densenet")


@pytest.mark.parametrize(
    "pool, between",
    [
        (layers.AveragePooling2D(2), None),
        (layers.MaxPooling2D(3, 2), layers.Dropout(0.2)),
        (lambda x: keras.ops.average_pool(x, 2), None),
    ],
)
def test_a_densenet_keeps_its_stem_its_transition_and_its_head(pool, between):
    assert skipped(densenet(pool, between)) == {
        "stem": "input layer",
        "transition": "transition",
        "head": "output layer",
    }


@pytest.mark.parametrize("pool, between", [(layers.AveragePooling2D(2, 1), None), (None, norm_relu)])
def test_what_only_looks_like_a_transition_is_converted(pool, between):
    assert skipped(densenet(pool, between)) == {"stem": "input layer", "head": "output layer"}


def vgg():
    sizes = [("a", 4, 3), ("b", 4, 3), ("c", 6, 3), ("point", 6, 1)]
    blocks = [[conv(n, k, activation="relu", name=name), layers.MaxPooling2D(2)] for name, n, k in sizes]
    tops = [layers.Flatten(), layers.Dense(5, activation="relu", name="hidden"), layers.Dense(3, name="head")]
    return keras.Sequential([keras.Input((16, 16, 3)), *itertools.chain(*blocks), *tops], name="vgg")


def test_a_chain_of_convolutions_becomes_a_sequential_twin():
    model = randomize(vgg())
    assert skipped(model) == {"a": "input layer", "point": "transition", "head": "output layer"}
    twin = psp_model(model, "filter", say=None)
    assert type(twin) is keras.Sequential and type(twin.get_layer("hidden")) is PSPDense
    assert_same_outputs(model, twin, np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype("float32"))


def test_nobody_can_switch_off_a_layer_that_nothing_leads_around():
    model = vgg()
    with pytest.raises(ValueError, match="b: its only layer alpha would switch it off, and nothing leads around it"):
        psp_model(model, "layer", say=None)
    twin, report = converted(model, "shape", skip="none")  # 3x3 kernels have nine taps, the others one
    assert dict(report.converted) == {"a": (9,), "b": (9,), "c": (9,)}
    assert set(dict(report.skipped)) == {"point", "hidden", "head"}
    assert set(dict(report.skipped).values()) == {
        "its only shape alpha would switch it off, and nothing leads around it"
    }
    kept = dict(converted(resnet(), ("layer", "channel"))[1].converted)
    assert len(kept) == 10 and kept["basic1_2"] == (1, 8)  # everything within the blocks; projections lead around
    assert not {"stem", "head"} & set(dict(converted(resnet(), "layer", skip="none")[1].converted))


def test_every_output_needs_its_own_way_around():
    inputs = keras.Input((8, 8, 3))
    x = conv(4, name="stem")(inputs)
    y = conv(4, name="branch")(x)
    outputs = [conv(2, name="end")(x + y), layers.Flatten(name="flat")(y)]
    assert "branch" not in skipped(keras.Model(inputs, conv(2, name="end")(x + y)), "layer")
    with pytest.raises(ValueError, match="branch: its only layer alpha"):
        psp_model(keras.Model(inputs, outputs), "layer", skip=["stem", "end"], say=None)


def test_a_shared_layer_is_the_first_wherever_it_is_called_first():
    inputs = keras.Input((8, 8, 4))
    shared = conv(4, name="shared")
    x = conv(4, name="next")(shared(shared(inputs)))
    model = keras.Model(inputs, layers.Dense(2, name="head")(layers.Flatten()(x)))
    assert skipped(model) == {"shared": "input layer", "head": "output layer"}
    twin = psp_model(model, skip="none", say=None)
    assert len([layer for layer in twin.layers if layer.name == "shared"]) == 1
    assert_same_outputs(model, randomized_alphas(twin, 1.0), np.ones((1, 8, 8, 4), "float32"))


def randomized_alphas(twin, value):
    for layer in psp_layers(twin):
        for alpha in layer.alphas.values():
            alpha.assign(np.full(alpha.shape, value))
    return twin


def siamese():
    """A backbone within a model within a model, called twice, with a layer shared across the depths."""
    shared = conv(4, name="shared")
    inner_in = keras.Input((8, 8, 4))
    inner = keras.Model(inner_in, conv(4, name="inner_conv")(shared(inner_in)), name="inner")
    image = keras.Input((8, 8, 3))
    x = shared(inner(conv(4, name="stem")(image)))
    backbone = keras.Model(image, layers.GlobalAveragePooling2D()(x), name="backbone")
    left, right = keras.Input((8, 8, 3), name="left"), keras.Input((8, 8, 3), name="right")
    x = layers.Concatenate()([backbone(left), backbone(right)])
    head = keras.Sequential(
        [keras.Input((8,)), layers.Dense(5, name="hidden"), layers.Dense(2, name="end")], name="head"
    )
    return randomize(keras.Model([left, right], head(x), name="siamese"))


def test_nested_models_are_looked_into_and_shared_layers_stay_shared():
    model = siamese()
    twin, report = converted(model)
    assert report.skipped == (("stem", "input layer"), ("end", "output layer"))
    assert [name for name, _ in report.converted] == ["shared", "inner_conv", "hidden"]
    assert twin.get_layer("backbone").get_layer("shared") is twin.get_layer("backbone").get_layer("inner").get_layer(
        "shared"
    )
    assert type(twin.get_layer("head").get_layer("hidden")) is PSPDense
    x = list(np.random.default_rng(0).normal(size=(2, 3, 8, 8, 3)).astype("float32"))
    assert_same_outputs(model, twin, x)
    assert_same_model(settle(twin), model)
    half = randomized_alphas(twin, 0.5)
    assert not np.array_equal(outputs_of(half, x)[0], outputs_of(model, x)[0])


def test_a_backbone_inside_a_model_computes_the_same():
    backbone = keras.applications.MobileNetV2(
        weights=None, include_top=False, input_shape=(32, 32, 3), alpha=0.35, pooling="avg"
    )
    backbone.trainable = False
    model = keras.Sequential([keras.Input((32, 32, 3)), backbone, layers.Dense(2, name="head")])
    twin, report = converted(model, ("channel", "shape"))
    assert dict(report.skipped)["Conv1"] == "input layer" and dict(report.skipped)["head"] == "output layer"
    inner = twin.layers[0]
    assert not inner.trainable and len(psp_layers(inner)) == len(report.converted) > 15
    assert twin.trainable_variables == twin.get_layer("head").trainable_variables  # alphas of frozen layers are frozen
    assert_same_outputs(model, twin, np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32"))


# -- what the user leaves alone ----------------------------------------------------------------------------------


def test_skip_takes_none_names_patterns_layers_models_and_functions():
    model = one_block()
    for nothing in ("none", (), None):
        assert skipped(model, skip=nothing) == {}
    assert skipped(model, skip="long*") == {n: "skip holds 'long*'" for n in ("long1", "long2")}
    given = skipped(model, skip=["stem", "*2", model.get_layer("end")])
    assert set(given) == {"stem", "long2", "end"} and given["end"] == "skip holds the layer 'end'"
    assert set(skipped(model, skip=model.get_layer("end"))) == {"end"}
    assert skipped(model, skip=lambda layer: layer.kernel_size == (1, 1)) == {"short": "skip says so"}
    assert set(skipped(siamese(), skip=["backbone"])) == {"stem", "shared", "inner_conv"}


class Own(layers.Conv2D):
    pass


def test_layers_of_other_kinds_are_left_alone_and_named():
    inputs = keras.Input((8, 8, 4))
    x = conv(4, name="good")(inputs)
    x = Own(4, 3, padding="same", name="own")(x)
    x = PSPConv2D(4, 3, padding="same", name="ready")(x)
    x = layers.SpectralNormalization(conv(4), name="wrapped")(x)
    x = layers.Reshape((64, 4))(x)
    x = layers.Conv1DTranspose(4, 3, padding="same", name="transposed")(x)
    x = layers.LayerNormalization()(layers.PReLU()(x))  # matrices, but no kernels
    x = layers.LSTM(4, name="lstm")(x)
    x = layers.Dense(6, name="adapted")(x)
    x = layers.Dense(6, name="quantized")(x)
    model = keras.Model(inputs, layers.Dense(2, name="head")(x))
    model.get_layer("adapted").enable_lora(2)
    model.get_layer("quantized").quantize("int8")
    twin, report = converted(model, skip="none")
    assert [name for name, _ in report.converted] == ["good", "head"]
    assert dict(report.skipped) == {
        "own": "Own is a subclass of Conv2D",
        "ready": "is a PSPConv2D already",
        "wrapped": "there is no PSP SpectralNormalization",
        "transposed": "there is no PSP Conv1DTranspose",
        "lstm": "there is no PSP LSTM",
        "adapted": "has LoRA weights",
        "quantized": "is quantized (int8)",
    }
    assert type(twin.get_layer("own")) is Own and type(twin.get_layer("quantized")) is layers.Dense
    assert_same_outputs(model, twin, np.random.default_rng(0).normal(size=(2, 8, 8, 4)).astype("float32"))


def double_tanh(x):
    return 2 * keras.ops.tanh(x)


def test_a_users_own_activations_initializers_and_constraints_come_along():
    class Rate(keras.regularizers.Regularizer):
        def __call__(self, x):
            return 0.5 * keras.ops.sum(keras.ops.abs(x))

        def get_config(self):
            return {}

    prelu = layers.PReLU(shared_axes=[1, 2])
    inputs = keras.Input((8, 8, 3))
    x = conv(4, activation=double_tanh, kernel_regularizer=Rate(), name="function")(inputs)
    x = conv(4, activation=prelu, kernel_constraint=keras.constraints.MaxNorm(1.0), name="layer")(x)
    model = keras.Model(inputs, conv(2)(x))
    data = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
    model(data)
    prelu.alpha.assign(np.full(prelu.alpha.shape, 0.3))
    twin = psp_model(model, skip="none", alpha_regularizer=None, say=None)
    assert_same_outputs(model, twin, data)
    layer = twin.get_layer("layer")
    assert type(layer) is PSPConv2D and layer.activation is not prelu and layer.kernel_constraint.max_value == 1.0
    assert float(sum(twin.losses)) == pytest.approx(float(sum(model.losses))) and model.losses


# -- training and files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [False, True])
def test_it_is_compiled_like_the_original_and_trains(trained):
    model = compiled(keras.optimizers.SGD(0.03, momentum=0.9))
    if trained:  # the optimizer has slots, but none for alphas
        model.fit(X, Y, epochs=1, batch_size=64, verbose=0)
    before = [v.numpy() for v in model.variables]
    twin = psp_model(model, threshold=0.05, say=None)
    assert float(twin.optimizer.learning_rate) == pytest.approx(0.03) and twin.optimizer is not model.optimizer
    assert int(twin.optimizer.iterations) == 0
    first = twin.evaluate(X, Y, verbose=0, return_dict=True)
    decays = float(sum(twin.losses))
    same = model.evaluate(X, Y, verbose=0, return_dict=True)
    assert first["accuracy"] == same["accuracy"] and first["loss"] == pytest.approx(same["loss"] + decays, rel=1e-5)
    history = twin.fit(X, Y, epochs=3, batch_size=64, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert any(np.ptp(layer.channel_alpha.numpy()) > 0 for layer in psp_layers(twin))  # alphas learn, too
    for variable, value in zip(model.variables, before):
        np.testing.assert_array_equal(variable, value)


def test_what_a_twin_learned_away_is_stripped():
    twin = psp_model(randomize(resnet()), "filter", say=None)
    alpha = twin.get_layer("bottleneck0_2").filter_alpha
    alpha.assign(np.array([1, 0, 0.01, 1]).reshape(alpha.shape))
    small = strip(settle(twin))
    assert small.get_layer("bottleneck0_2").filters == 2 and twin.get_layer("bottleneck0_2").filters == 4
    assert Channels(small).groups


def test_a_twin_can_be_saved_and_loaded(tmp_path):
    model = keras.Sequential([keras.Input((16, 16, 3)), resnet(), layers.Dense(2)])
    twin = randomized_alphas(psp_model(model, ("channel", "filter"), threshold=0.3, say=None), 0.7)
    twin.save(tmp_path / "twin.keras")
    loaded = keras.saving.load_model(tmp_path / "twin.keras")
    assert_same_outputs(twin, loaded, np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype("float32"))
    assert [x.name for x in psp_layers(loaded)] == [x.name for x in psp_layers(twin)]


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16", "bfloat16"])
def test_precision_stays_and_outputs_are_the_same(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = randomize(residual_net())
    finally:
        keras.config.set_dtype_policy("float32")
    twin = psp_model(model, say=None)
    assert twin.get_layer("inner0").dtype_policy.name == policy
    assert_same_outputs(model, twin, X[:4])
    assert_same_model(settle(twin), model)


# -- report and errors -------------------------------------------------------------------------------------------


def test_the_choice_is_printed(capsys):
    twin = psp_model(densenet(), ("layer", "channel"))
    text = capsys.readouterr().out
    assert text.splitlines() == [
        "PSP in densenet: 8 layers, 3 left plain",
        "  dense00_bottleneck  layer 1  channel 4",
        "  dense00             layer 1  channel 8",
        "  dense01_bottleneck  layer 1  channel 8",
        "  dense01             layer 1  channel 8",
        "  dense10_bottleneck  layer 1  channel 6",
        "  dense10             layer 1  channel 8",
        "  dense11_bottleneck  layer 1  channel 10",
        "  dense11             layer 1  channel 8",
        "  stem                plain: input layer",
        "  transition          plain: transition",
        "  head                plain: output layer",
    ]
    heard = []
    again, report = psp_model(densenet(), ("layer", "channel"), report=True, say=heard.append)
    assert isinstance(report, PSPReport) and heard == [str(report)] == [text.rstrip("\n")]
    assert report.structures == ("layer", "channel") and isinstance(again, keras.Model) is isinstance(twin, keras.Model)
    psp_model(densenet(), say=None)
    assert capsys.readouterr().out == ""
    with pytest.raises(AttributeError):
        report.model = "another"


def small_chain():
    return keras.Sequential([keras.Input((4,)), layers.Dense(3, name="one"), layers.Dense(2, name="two")])


@pytest.mark.parametrize(
    "arguments, error, says",
    [
        (dict(), ValueError, "one: input layer; two: output layer"),
        (dict(structure="rows"), ValueError, "structure='rows'"),
        (dict(structure=()), ValueError, "expected one of column, channel"),
        (dict(threshold=-1), ValueError, "threshold=-1"),
        (dict(gradient="wrong"), ValueError, "gradient='wrong'"),
        (dict(treshold=0.1), TypeError, "was passed treshold; it knows threshold, alpha_initializer"),
        (dict(name="x"), TypeError, "was passed name"),
        (
            dict(skip="papper"),
            ValueError,
            "skip='papper' fits no layer .* nor is it 'paper' or 'none'. Layers: one, two",
        ),
        (dict(skip=["one", "three"]), ValueError, "skip='three' fits no layer"),
        (dict(skip=[3]), TypeError, "skip holds 3"),
        (dict(skip="*"), ValueError, r"one: skip holds '\*'; two: skip holds"),
        (dict(skip="none", structure="shape"), ValueError, "one: its only shape alpha would switch it off"),
    ],
)
def test_errors_say_what_is_wrong(arguments, error, says):
    with pytest.raises(error, match=says):
        psp_model(small_chain(), say=None, **arguments)


def test_models_without_a_graph_or_a_kernel_are_refused():
    class Subclassed(keras.Model):
        def call(self, x):
            return x

    with pytest.raises(ValueError, match="no graph of layers"):
        psp_model(Subclassed())
    with pytest.raises(ValueError, match="is not built"):
        psp_model(keras.Sequential([layers.Dense(3)]))
    with pytest.raises(TypeError, match="Expected a keras.Model"):
        psp_model("model.keras")
    inputs = keras.Input((4,))
    with pytest.raises(ValueError, match="It has no kernels"):
        psp_model(keras.Model(inputs, layers.ReLU()(inputs)))


# -- the networks of the examples --------------------------------------------------------------------------------


def networks():
    path = Path(__file__).parent.parent / "examples" / "networks.py"
    spec = importlib.util.spec_from_file_location("example_networks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_the_papers_choice_on_its_resnet(shortcut):
    model = networks().cifar_resnet(14, shortcut=shortcut, width=4, shape=(16, 16, 3))
    twin, report = converted(model)
    projections = {f"stage{n}_block1_shortcut": "shortcut" for n in (2, 3)} if shortcut == "B" else {}
    assert dict(report.skipped) == {"stem": "input layer", "logits": "output layer", **projections}
    assert {name for name, _ in report.converted} == {
        f"stage{stage}_block{block}_conv{n}" for stage in (1, 2, 3) for block in (1, 2) for n in (1, 2)
    }
    assert_same_outputs(model, twin, np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype("float32"))


def test_the_papers_choice_on_its_densenet():
    model = networks().densenet(10, growth=4, width=4, shape=(16, 16, 3))
    twin, report = converted(model, "layer")
    transitions = {f"transition{n}": "transition" for n in (1, 2)}
    assert dict(report.skipped) == {"stem": "input layer", "logits": "output layer", **transitions}
    assert dict(report.converted) == {f"stage{s}_layer{n}_conv": (1,) for s in (1, 2, 3) for n in (1, 2)}
    assert_same_outputs(model, twin, np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype("float32"))
