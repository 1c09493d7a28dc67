"""Swap, train, strip, export: a ResNet whose convolutions learn which channels they need.

python examples/psp_resnet.py          # some minutes
python examples/psp_resnet.py --tiny   # seconds
"""

import sys

import keras
from networks import cifar_resnet

import tflite_export
from keras_prune import Channels, SparsityTarget, datasets, metrics, psp_model, reports, schedules, strip

tiny = "--tiny" in sys.argv
keras.utils.set_random_seed(0)
images = datasets.load().part(0.05 if tiny else 1.0)
x, x_test = (a.astype("float32") / 255 for a in (images.x_train, images.x_test))
depth, width, epochs = (8, 8, 4) if tiny else (20, 16, 12)
plain = cifar_resnet(depth, images.classes, width=width, shape=x.shape[1:])


def train(model, *callbacks):
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(x, images.y_train, epochs=epochs, batch_size=64, verbose=0, callbacks=list(callbacks))
    return model


# Swap: the layers between the first and the last one learn the shape of their kernels. The choice is printed.
twin = psp_model(plain, "channel", alpha_regularizer=keras.regularizers.L2(1e-3))
# Train as usual. Half of what the layers cost is to be gone after half of the epochs; the rest is recovery.
half = schedules.polynomial(0.0, 0.5, begin=0, stop=epochs // 2)
train(twin, SparsityTarget(half, measure="macs", hold=True, plot="alphas.png"))
train(plain)

# Strip: plain layers, really smaller, with the same outputs.
small, report = strip(twin, x[:16], report=True)
print(report)

# Export, and what it brought: the same schedule with plain layers against the stripped network.
both = {"plain": plain, "small": small}
files = [tflite_export.export(model, f"{name}.tflite", data=x[:200]) for name, model in both.items()]
rows = [
    ("test accuracy", *(m.evaluate(x_test, images.y_test, verbose=0)[1] for m in both.values()), "percent"),
    ("params", *(m.count_params() for m in both.values()), "count"),
    ("MACs", *(metrics.macs(Channels(m)) for m in both.values()), "count"),
    ("KiB, .tflite", *(file.bytes / 1024 for file in files), "size"),
    ("ms, .tflite", *(file.latency.median for file in files), "time"),
]
print(reports.before_after(rows))
