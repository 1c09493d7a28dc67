import sys
from functools import partial
from pathlib import Path

import keras
import pytest

from keras_prune import Channels, metrics
from keras_prune.layers import PSPConv2D

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from networks import cifar_resnet, densenet, parameters  # noqa: E402


@pytest.mark.parametrize(
    "build, params, macs",
    [
        (partial(cifar_resnet, 20), 269_722, 40_550_400),
        (partial(cifar_resnet, 56), 853_018, 125_485_056),
        (partial(cifar_resnet, 110), 1_727_962, 252_887_040),
        (partial(densenet, 40), 1_019_722, 264_808_448),
    ],
    ids=["resnet20", "resnet56", "resnet110", "densenet40"],
)
def test_parameters_and_macs_of_the_convolutions_are_those_of_the_papers(build, params, macs):
    model = build()
    channels = Channels(model)
    dense = model.get_layer("logits").kernel.shape
    assert parameters(model) == params
    assert metrics.macs(channels) - dense[0] * dense[1] == macs
    assert not channels.fences and not channels.uncounted


def test_shortcuts_of_kind_b_cost_two_convolutions_and_their_norms():
    more = 16 * 32 + 32 * 64 + 2 * (32 + 64)
    assert parameters(cifar_resnet(20, shortcut="B")) == parameters(cifar_resnet(20)) + more


@pytest.mark.parametrize("build, within", [(partial(cifar_resnet, 14), 12), (partial(densenet, 10, 3), 6)])
def test_conv_is_called_within_the_blocks_only(build, within):
    model = build(width=4, conv=partial(PSPConv2D, structure=("layer", "channel")))
    swapped = [layer.name for layer in model.layers if isinstance(layer, PSPConv2D)]
    assert len(swapped) == within and all(name.startswith("stage") for name in swapped)
    assert not Channels(model).fences


@pytest.mark.parametrize(
    "build", [partial(cifar_resnet, 8), partial(cifar_resnet, 8, shortcut="B"), partial(densenet, 7, 2)]
)
def test_weight_decay_is_that_of_every_kernel(build):
    model = build(width=3, weight_decay=1e-4)
    kernels = [v for v in model.trainable_variables if len(v.shape) > 1]
    expected = sum(0.5e-4 * float(keras.ops.sum(keras.ops.square(v))) for v in kernels)
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "call", [partial(cifar_resnet, 21), partial(cifar_resnet, shortcut="C"), partial(densenet, 41)]
)
def test_depths_and_shortcuts_that_do_not_exist(call):
    with pytest.raises(ValueError, match="was passed; expected"):
        call()
