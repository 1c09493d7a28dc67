"""Provable Filter Pruning of LeNet-5: what would leave and what is proved about it, then prune and retrain in rounds.

python examples/provable_lenet.py                  # minutes; Fashion-MNIST, the subset inside the package
python examples/provable_lenet.py --data-dir DIR   # MNIST
python examples/provable_lenet.py --tiny           # seconds
"""

import argparse

import keras
from keras import layers

from keras_prune import Channels, ProvablePruning, certify, datasets, metrics, plan, provable, reports, strip

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--data-dir", help="a folder that holds mnist.npz or mnist/mnist.npz")
parser.add_argument("--tiny", action="store_true", help="little of everything")
given = parser.parse_args()
keras.utils.set_random_seed(0)
images = datasets.load("mnist", given.data_dir) if given.data_dir else datasets.load()
images = images.part(0.1) if given.tiny else images
x, x_test = (a.astype("float32") / 255 for a in (images.x_train, images.x_test))
filters, epochs = ((8, 16, 64), 6) if given.tiny else ((20, 50, 500), 8)

model = keras.Sequential(
    [
        keras.Input(x.shape[1:]),
        layers.Conv2D(filters[0], 5, activation="relu", name="conv1"),
        layers.MaxPooling2D(2),
        layers.Conv2D(filters[1], 5, activation="relu", name="conv2"),
        layers.MaxPooling2D(2),
        layers.Flatten(),
        layers.Dense(filters[2], activation="relu", name="dense1"),
        layers.Dense(images.classes, name="logits"),
    ],
    name="lenet5",
)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss, metrics=["accuracy"])
model.fit(x, images.y_train, epochs=epochs, batch_size=64, verbose=0)


def measured(network):
    network.compile(loss=loss, metrics=["accuracy"])
    channels = Channels(network)
    accuracy = network.evaluate(x_test, images.y_test, verbose=0)[1]
    return accuracy, metrics.params(channels), metrics.macs(channels)


# Which units stay: those with the largest share in what the next layer computes, on unlabelled samples. How many of
# each layer: as many as give all layers the same error bound. And what is proved about that.
before = measured(model)
decision = plan(model, 0.5, measure="params", criterion="pfp", budget="error_bound", round_to=1, data=x)
print(decision)
print(certify(decision, x[:100]))

# Prune, retrain, prune what is left, ...: here from a half of the parameters to a tenth, the same fraction each time.
retrain, keep = (1, (0.5, 0.2)) if given.tiny else (3, provable.geometric(0.5, 0.1, rounds=4))
test = (x_test, images.y_test)
pruner = ProvablePruning(keep, data=x, retrain=retrain, round_to=1, validation_data=test)
model.compile(keras.optimizers.SGD(0.01, momentum=0.9), loss, metrics=["accuracy"])
epochs = retrain * len(keep)
model.fit(x, images.y_train, epochs=epochs, batch_size=64, verbose=0, validation_data=test, callbacks=[pruner])
small = strip(model, x[:16])

reports.plot_curve(pruner.curve, "provable_lenet.png")
after = measured(small)
titles = (("test accuracy", "percent"), ("params", "count"), ("MACs", "count"))
print(reports.before_after([(title, a, b, kind) for (title, kind), a, b in zip(titles, before, after)]))
