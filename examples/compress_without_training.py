"""A trained network made smaller with 512 unlabelled images: no labels, no training.

python examples/compress_without_training.py          # a minute or two
python examples/compress_without_training.py --tiny   # seconds
"""

import sys

import keras

from keras_prune import compress, datasets, prune
from keras_prune.demo import small_resnet

tiny = "--tiny" in sys.argv
keras.utils.set_random_seed(0)
images = datasets.load().part(0.1 if tiny else 1.0)
x, x_test = (a.astype("float32") for a in (images.x_train, images.x_test))

model = small_resnet(x.shape[1:], images.classes, widths=(16, 32) if tiny else (32, 64, 128))
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.Adam(2e-3), loss, metrics=["accuracy"])
model.fit(x, images.y_train, epochs=3 if tiny else 4, batch_size=64, verbose=0)

small, report = compress(model, x[: 256 if tiny else 512], target={"macs": 0.5}, round_to=4, report=True)
print(report)

rivals = {"original": model, "compress": small, "l2, no training": prune(model, 0.5, round_to=4)}
for name, network in rivals.items():
    network.compile(loss=loss, metrics=["accuracy"])
    print(f"{name:<16} test accuracy {network.evaluate(x_test, images.y_test, verbose=0)[1]:.1%}")
