"""Train a network of your own and let half of its multiply-accumulates leave while it trains.

python examples/prune_while_training.py [--tiny]
"""

import argparse

import keras

from keras_prune import GradualPruning, datasets, reports, strip
from keras_prune.demo import small_resnet

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tiny", action="store_true", help="seconds instead of minutes")
given = parser.parse_args()

images = datasets.load().part(0.05 if given.tiny else 1.0)
x, y = images.x_train.astype("float32"), images.y_train
model = small_resnet(images.x_train.shape[1:], images.classes)
model.compile(
    keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"]
)

epochs = 3 if given.tiny else 8
model.fit(
    x,
    y,
    epochs=epochs,
    batch_size=64,
    verbose=2,
    callbacks=[GradualPruning(sparsity=0.5, measure="macs")],
    validation_data=(images.x_test.astype("float32"), images.y_test),
)

small, report = strip(model, x[:16], report=True)
print(report)
print(reports.compare(model, small))
small.fit(x, y, epochs=1, batch_size=64, verbose=2)  # the same optimizer goes on, its momenta sliced along
small.save("small.keras")  # plain Keras layers: loads anywhere, without keras_prune
