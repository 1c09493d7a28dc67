import keras
import numpy as np
import pytest
from keras import layers
from small import compiled, patterns

from keras_prune import prune, recalibrate_batchnorm


def norm_net(momentum=0.99):
    inputs = keras.Input((6,))
    return keras.Model(inputs, layers.BatchNormalization(momentum=momentum, name="norm")(inputs))


def test_statistics_are_the_average_over_batches_whatever_they_and_the_momentum_were():
    x = np.random.default_rng(0).normal(3, 2, (96, 6)).astype("float32")
    model = norm_net()
    norm = model.get_layer("norm")
    norm.moving_mean.assign(np.full(6, 100.0))
    assert recalibrate_batchnorm(model, x, batch_size=32) == 1
    batches = x.reshape(3, 32, 6)
    assert np.allclose(np.array(norm.moving_mean), x.mean(0), atol=1e-4)
    assert np.allclose(np.array(norm.moving_variance), batches.var(1).mean(0), rtol=1e-4)
    assert norm.momentum == 0.99


def test_frozen_norms_keep_their_statistics_and_flags():
    model = norm_net()
    model.get_layer("norm").trainable = False
    assert recalibrate_batchnorm(model, np.ones((8, 6), "float32")) == 0
    assert np.array_equal(np.array(model.get_layer("norm").moving_mean), np.zeros(6))


def test_a_pruned_network_that_was_not_tuned_gets_better():
    model = compiled(keras.optimizers.Adam(0.01), widths=(32, 64))
    x, y = patterns(512)
    model.fit(x, y, epochs=12, verbose=0)
    small = prune(model, 0.3)
    before = small.evaluate(x, y, verbose=0)[0]
    kernels = [np.array(v) for v in small.trainable_variables]
    recalibrate_batchnorm(small, x)
    assert small.evaluate(x, y, verbose=0)[0] < before
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(kernels, small.trainable_variables))


def test_batches_of_pairs_and_a_limit_are_taken():
    x = np.random.default_rng(0).normal(size=(4, 16, 6)).astype("float32")
    model = norm_net()
    recalibrate_batchnorm(model, ((batch, None) for batch in x), max_batches=2)
    assert np.allclose(np.array(model.get_layer("norm").moving_mean), x[:2].mean((0, 1)), atol=1e-5)


def test_no_data_is_an_error():
    with pytest.raises(ValueError, match="no batch"):
        recalibrate_batchnorm(norm_net(), iter(()))
