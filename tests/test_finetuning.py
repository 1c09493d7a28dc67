import re
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers
from small import patterns, plain_net

from keras_prune import (
    Channels,
    DropPruning,
    FilterPruning,
    GradualPruning,
    GroupLasso,
    IterativePruning,
    PatternPruning,
    ProvablePruning,
    WeightPruning,
    dead_units,
    distiller,
    finetune,
    prune,
    strip,
)
from keras_prune.distillation import as_found
from keras_prune.pruners import KeepZeros, slots_of
from keras_prune.surgery import relative_difference

ALWAYS = np.ones((4, 2), "float32")
ONE = np.ones(4, "int32")
ENTROPY = keras.losses.SparseCategoricalCrossentropy
QUICK = dict(batch_size=64, verbose=0)


def constant_net(*logits, activation=None, structure=None):
    """A network that always answers these numbers; several of them: several outputs."""
    inputs = keras.Input((2,))
    outs = [
        layers.Dense(
            len(z),
            activation,
            kernel_initializer="zeros",
            bias_initializer=keras.initializers.Constant(z),
            name=f"z{n}",
        )(inputs)
        for n, z in enumerate(logits)
    ]
    return keras.Model(inputs, (structure or (lambda o: o if len(o) > 1 else o[0]))(outs))


def still(student, teacher, x=ALWAYS, y=ONE, **arguments):
    """The logs of an epoch in which nothing is learned."""
    arguments = {"optimizer": keras.optimizers.SGD(0.0), "verbose": 0, **arguments}
    return {name: values[-1] for name, values in finetune(student, teacher, x, y, **arguments).history.items()}


STUDENT, TEACHER = (1.0, 2.0, 0.5), (0.5, 3.0, 0.0)


def softmax(z):
    return np.exp(z) / np.exp(z).sum()


def kl(teacher, student):
    return float(np.sum(teacher * np.log(teacher / student)))


@pytest.mark.parametrize("activation", [None, "softmax"])
def test_the_worked_numbers_whatever_the_output_gives(activation):
    student, teacher = (constant_net(z, activation=activation) for z in (STUDENT, TEACHER))
    logs = still(student, teacher, loss=ENTROPY(from_logits=activation is None))
    assert logs["student_loss"] == pytest.approx(0.4643688, abs=1e-6)
    assert logs["distillation_loss"] == pytest.approx(0.2794816, abs=1e-6)
    assert logs["loss"] == pytest.approx(0.2979704, abs=1e-6)
    right = 16 * kl(softmax(np.array(TEACHER) / 4), softmax(np.array(STUDENT) / 4))
    assert right == pytest.approx(16 * 0.0174676, abs=1e-5) and logs["distillation_loss"] == pytest.approx(
        right, abs=1e-6
    )
    swapped = 16 * kl(softmax(np.array(STUDENT) / 4), softmax(np.array(TEACHER) / 4))
    assert abs(swapped - right) > 1e-3  # the control: the other direction is another number


@pytest.mark.parametrize("alpha, right", [(0.0, 0.4643688), (0.5, 0.5 * (0.4643688 + 0.2794816)), (1.0, 0.2794816)])
def test_alpha_is_the_share_of_the_teacher(alpha, right):
    logs = still(constant_net(STUDENT), constant_net(TEACHER), loss=ENTROPY(from_logits=True), alpha=alpha)
    assert logs["loss"] == pytest.approx(right, abs=1e-6)


def test_temperature_1_is_the_plain_divergence():
    logs = still(constant_net(STUDENT), constant_net(TEACHER), loss=ENTROPY(from_logits=True), temperature=1)
    right = kl(softmax(np.array(TEACHER)), softmax(np.array(STUDENT)))
    assert logs["distillation_loss"] == pytest.approx(right, abs=1e-6)


STRUCTURES = {
    "list": (lambda o: o, [ONE, 0 * ONE]),
    "named": (lambda o: o, {"z1": 0 * ONE, "z0": ONE}),
    "dict": (lambda o: {"b": o[0], "a": o[1]}, {"b": ONE, "a": 0 * ONE}),
}


@pytest.mark.parametrize("name", sorted(STRUCTURES))
def test_of_several_outputs_the_losses_are_summed_each_with_its_weight(name):
    structure, y = STRUCTURES[name]
    student = constant_net(STUDENT, (0.2, 0.1), structure=structure)
    teacher = constant_net(TEACHER, (0.0, 1.5), structure=structure)
    first, second = ("b", "a") if name == "dict" else ("z0", "z1")
    losses = {first: ENTROPY(from_logits=True), second: ENTROPY(from_logits=True)}
    logs = still(student, teacher, y=y, loss=losses, loss_weights={first: 1.0, second: 3.0})
    other = -np.log(softmax(np.array([0.2, 0.1])))[0]
    distance = 16 * kl(softmax(np.array([0.0, 0.375])), softmax(np.array([0.05, 0.025])))
    assert logs["student_loss"] == pytest.approx(0.4643688 + 3 * other, abs=1e-5)
    assert logs["distillation_loss"] == pytest.approx(0.2794816 + distance, abs=1e-5)


@pytest.mark.parametrize("loss", [["mse", "mae"], [keras.losses.MeanSquaredError(), "mae"], "mse"])
def test_losses_by_name_are_the_means_over_the_samples_that_they_are_in_fit(loss):
    nets = [constant_net((1.0, 2.0), (0.5,)) for _ in range(2)]
    y = [np.arange(8.0).reshape(4, 2), np.arange(4.0)[:, None]]
    nets[0].compile("sgd", loss)
    wanted = nets[0].evaluate(ALWAYS, y, verbose=0, return_dict=True)["loss"]
    assert still(*nets, y=y, alpha=0.0, loss=loss)["loss"] == pytest.approx(wanted, rel=1e-6)


def test_labels_find_their_output_for_the_metrics_too():
    student, teacher = constant_net(STUDENT, (0.2, 0.1)), constant_net(TEACHER, (0.0, 1.5))
    student.compile("sgd", ENTROPY(from_logits=True), metrics={"z0": ["accuracy"], "z1": ["accuracy"]})
    logs = still(student, teacher, y={"z1": ONE, "z0": ONE})  # right at the first, wrong at the second
    assert sorted(v for k, v in logs.items() if "accuracy" in k) == [0, 1]
    with pytest.raises(ValueError, match="labels for each"):
        still(student, teacher, y=ONE)


def test_numbers_follow_the_teachers_numbers_in_units_of_their_variance():
    x, y = np.random.default_rng(0).normal(size=(64, 2)).astype("float32"), np.zeros((64, 3), "float32")

    def net(seed):
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((2,))
        return keras.Model(inputs, layers.Dense(3, kernel_initializer="he_normal")(inputs))

    student, teacher = net(0), net(1)
    a, b = (m.predict(x, verbose=0) for m in (student, teacher))
    logs = still(student, teacher, x, y, loss="mse", batch_size=64)
    assert logs["distillation_loss"] == pytest.approx(np.mean((a - b) ** 2) / b.var(), rel=1e-4)
    assert logs["student_loss"] == pytest.approx(np.mean(a**2), rel=1e-4)


def test_penalties_of_the_student_are_in_the_loss_which_keras_leaves_out():
    student = constant_net(STUDENT)
    student.layers[1].kernel.assign(np.full((2, 3), 0.1))
    student.layers[1].bias.assign(np.array(STUDENT) - 0.2)
    student.layers[1].kernel.regularizer = keras.regularizers.L1(1.0)
    logs = still(student, constant_net(TEACHER), loss=ENTROPY(from_logits=True))
    assert logs["loss"] == pytest.approx(0.2979704 + 0.6, abs=1e-5)


# -- training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher_of_all():
    model = plain_net()
    model.compile(keras.optimizers.Adam(0.01), ENTROPY(from_logits=True), metrics=["accuracy"])
    model.fit(*patterns(384), epochs=8, verbose=0)
    return model


@pytest.fixture
def trained(teacher_of_all):
    with as_found(teacher_of_all):  # `distiller` and Keras leave it frozen
        yield teacher_of_all


def accuracy(model, x, y):
    return float(np.mean(model.predict(x, verbose=0).argmax(-1) == y))


def same(weights, model):
    return all(np.array_equal(a, b) for a, b in zip(weights, model.get_weights(), strict=True))


def test_a_pruned_network_recovers_and_all_else_is_as_it_was(trained):
    (x, y), (fresh, truth) = patterns(384), patterns(256, seed=9)
    trained.layers[3].trainable = False
    flags, weights = [layer.trainable for layer in trained.layers], trained.get_weights()
    slots = [v.trainable for v in trained.variables]
    student = prune(trained, 0.8, criterion="random", seed=0, round_to=1)
    frozen = student.get_layer("first")
    frozen.trainable = False
    kernel, before = np.array(frozen.kernel), accuracy(student, fresh, truth)
    optimizer, iterations = student.optimizer, int(student.optimizer.iterations)
    momenta = [layer.momentum for layer in student.layers if isinstance(layer, layers.BatchNormalization)]
    try:
        history = finetune(
            student, trained, x, y, epochs=10, learning_rate=0.02, validation_data=(fresh, truth), **QUICK
        )
        assert same(weights, trained)
        assert [la.trainable for la in trained.layers] == flags and [v.trainable for v in trained.variables] == slots
    finally:
        trained.layers[3].trainable = True
    assert accuracy(student, fresh, truth) > max(before, 0.7)
    assert history.history["val_accuracy"][-1] == pytest.approx(accuracy(student, fresh, truth), abs=1e-3)
    assert history.history["distillation_loss"][-1] < 0.5 * history.history["distillation_loss"][0]
    assert student.optimizer is optimizer and int(optimizer.iterations) == iterations
    assert not frozen.trainable and np.array_equal(kernel, np.array(frozen.kernel))
    assert [la.momentum for la in student.layers if isinstance(la, layers.BatchNormalization)] == momenta
    student.fit(x[:32], y[:32], verbose=0)  # goes on with its own loss


def test_data_sets_are_taken_too(trained):
    import tensorflow as tf

    x, y = patterns(64)
    history = finetune(prune(trained, 0.3), trained, tf.data.Dataset.from_tensor_slices((x, y)).batch(32), verbose=0)
    assert np.isfinite(history.history["loss"]).all()


@pytest.mark.parametrize("callbacks, structure", [(None, list), (keras.callbacks.TerminateOnNaN(), tuple)])
def test_callbacks_and_several_inputs_are_taken_as_fit_takes_them(callbacks, structure):
    def net():
        inputs = [keras.Input((2,)), keras.Input((2,))]
        return keras.Model(inputs, layers.Dense(3)(layers.Concatenate()(inputs)))

    logs = still(net(), net(), structure([ALWAYS, 2 * ALWAYS]), loss=ENTROPY(from_logits=True), callbacks=callbacks)
    assert np.isfinite(logs["loss"])


CALLBACKS = {
    "gradual": lambda: GradualPruning(0.5, stop=1),
    "soft": lambda: FilterPruning(0.5, unit="batch", every=3, soft=True),
    "provable": lambda: ProvablePruning(0.5, data=patterns(64)[0]),
    "weights": lambda: WeightPruning(0.8),
    "dropping filters": lambda: DropPruning(0.5, kind="filters", stop=2, seed=0),
    "patterns": lambda: PatternPruning(pattern="2:4", stop=1),
    "lasso": lambda: GroupLasso(1.9, stop=2, protect=["second"]),
    "rounds": lambda: IterativePruning(2, 0.3, weights="rewind_init", seed=0),
}


def zeros_of(model):
    return [np.array(v) == 0 for v in model.trainable_variables]


@pytest.mark.parametrize("name", sorted(CALLBACKS))
def test_pruning_callbacks_prune_the_student_while_the_teacher_teaches_it(trained, name):
    x, y = patterns()
    teacher_weights = trained.get_weights()
    student = keras.models.clone_model(trained)
    student.set_weights(teacher_weights)
    student.compile(keras.optimizers.SGD(0.05, momentum=0.9), ENTROPY(from_logits=True))
    student.fit(x, y, **QUICK)  # a step function of its own is cached
    both = distiller(student, trained, x)
    both.compile(keras.optimizers.Adam(0.01), ENTROPY(from_logits=True), metrics=["accuracy"])
    pruning = CALLBACKS[name]()
    history = both.fit(x, y, epochs=4, callbacks=[pruning], **QUICK).history
    assert any(key in history for key in ("sparsity", "weight_sparsity", "zero_filters"))
    assert pruning.model is student and pruning.trainer is both
    zeros = zeros_of(student)
    assert sum(z.sum() for z in zeros) > 500 and same(teacher_weights, trained)
    held = [v for v in student.trainable_variables if isinstance(v.constraint, KeepZeros)]
    assert len(slots_of(both.optimizer, held[0])) == 2
    if name == "gradual":  # momenta went with them: those of the optimizer that trains
        for variable in held:
            gone = np.array(variable.constraint.mask) == 0
            assert not any(np.array(slot)[gone].any() for slot in slots_of(both.optimizer, variable))
    if name in ("gradual", "weights", "lasso"):
        student.fit(x, y, **QUICK)  # without the callback, by its own optimizer
        assert all((b >= a).all() for a, b in zip(zeros, zeros_of(student)))
    small, report = strip(student, report=True)
    assert report.difference < 1e-5
    if name not in ("weights", "patterns", "rounds"):
        assert small.count_params() < 0.9 * trained.count_params()


def test_early_stopping_and_backups_see_the_distiller_and_a_killed_run_goes_on(trained, tmp_path):
    x, y = patterns()

    class Killer(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 3:
                raise InterruptedError

    def run(*more):
        student = plain_net(seed=3)
        both = distiller(student, trained, x)
        both.compile(keras.optimizers.Adam(0.01), ENTROPY(from_logits=True))
        pruning = GradualPruning(0.5, stop=2)
        stopping = keras.callbacks.EarlyStopping("loss", patience=9)
        backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
        epochs = []
        look = keras.callbacks.LambdaCallback(on_epoch_end=lambda e, logs: epochs.append((e, sorted(pruning.removed))))
        try:
            both.fit(x, y, epochs=5, callbacks=[pruning, stopping, backup, look, *more], **QUICK)
        except InterruptedError:
            pass
        return student, pruning, epochs

    _, _, before = run(Killer())
    student, pruning, after = run()
    assert [e for e, _ in before] == [0, 1, 2] and [e for e, _ in after] == [3, 4]
    assert before[-1][1] == after[0][1] == after[-1][1] and len(after[-1][1]) >= 8
    assert set(dead_units(Channels(student), strict=True)) == set(pruning.removed.tolist())


def test_in_half_precision(trained):
    x, y = patterns(128)
    keras.config.set_dtype_policy("mixed_float16")
    try:
        student, teacher = plain_net(seed=1), plain_net()
    finally:
        keras.config.set_dtype_policy("float32")
    teacher.set_weights(trained.get_weights())
    both = distiller(student, teacher, x)
    both.compile(keras.optimizers.Adam(0.01), ENTROPY(from_logits=True))
    assert isinstance(both.optimizer, keras.optimizers.LossScaleOptimizer)
    pruning = FilterPruning(0.5)
    assert np.isfinite(both.fit(x, y, epochs=3, callbacks=[pruning], **QUICK).history["loss"]).all()
    assert set(dead_units(Channels(student), strict=True)) == set(pruning.removed.tolist())


def test_a_checkpoint_of_both_gives_the_student_back(trained, tmp_path):
    x, y = patterns(64)
    student = prune(trained, 0.3)
    path = tmp_path / "both.keras"
    finetune(student, trained, x, y, callbacks=[keras.callbacks.ModelCheckpoint(path)], **QUICK)
    loaded = keras.saving.load_model(path, compile=False)
    assert relative_difference(student, loaded.student, x[:8]) < 1e-6


def test_the_lines_of_plain_keras_in_the_docs_work_as_they_are(trained):
    text = (Path(__file__).parent.parent / "docs" / "distillation.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    plain = next(block for block in blocks if "keras.distillation.Distiller(" in block)
    x, y = patterns(64)
    student = keras.models.clone_model(trained)
    names = dict(keras=keras, teacher=trained, student=student, x=x, y=y, GradualPruning=GradualPruning)
    exec(plain, names)
    assert len(dead_units(Channels(student), strict=True)) >= 8
    both = names["both"]
    fixed = keras.distillation.Distiller(
        constant_net(TEACHER),
        constant_net(STUDENT),
        both.distillation_losses[0],
        student_loss_weight=both.student_loss_weight,
    )
    fixed.compile("sgd", ENTROPY(from_logits=True))
    assert float(fixed.compute_loss(ALWAYS, ONE)) == pytest.approx(0.2979704, abs=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(alpha=1.5), "alpha=1.5"),
        (dict(temperature=0), "temperature=0"),
        (dict(y=None), "keras_prune.distill"),
        (dict(loss=None), "Pass loss="),
        (dict(learning_rate=0.1), "learning_rate="),
        (dict(teacher=constant_net((1.0, 2.0))), "expected the same"),
        (dict(x=iter([(ALWAYS, ONE)]), y=None), "only once"),
        (dict(loss={"other": "mse"}), "no outputs"),
        (dict(sample_weight=np.ones(4)), "no sample weights.*no class_weight"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    arguments = {"loss": ENTROPY(from_logits=True), "teacher": constant_net(TEACHER), **arguments}
    with pytest.raises(ValueError, match=message):
        still(constant_net(STUDENT), arguments.pop("teacher"), **arguments)


def test_a_student_that_is_its_own_teacher_is_refused():
    model = constant_net(STUDENT)
    with pytest.raises(ValueError, match="share weights"):
        finetune(model, model, ALWAYS, ONE, loss="mse")
