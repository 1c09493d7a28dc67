import json
import zipfile

import keras
import numpy as np
import pytest
from keras import layers
from small import residual_net

from keras_prune import Channels, cli, files, zero
from keras_prune.layers import PSPConv2D
from keras_prune.surgery import model_inputs, relative_difference


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    model = residual_net(widths=(32, 64))
    model.save(folder / "model.keras")
    channels = Channels(model)
    zero(channels, np.concatenate([g.units[: len(g) // 2] for g in channels.groups]))
    model.save(folder / "zeroed.keras")
    return folder


def run(capsys, *arguments):
    code = cli.main([str(a) for a in arguments])
    return code, *capsys.readouterr()


def test_prune_writes_the_small_model_it_announces(saved, tmp_path, capsys):
    code, out, _ = run(
        capsys,
        "prune",
        saved / "model.keras",
        tmp_path / "small.keras",
        "--sparsity",
        0.4,
        "--criterion",
        "fpgm",
        "--budget",
        "uniform",
        "--json",
    )
    facts = json.loads(out)
    small = keras.saving.load_model(tmp_path / "small.keras")
    assert code == 0 and facts["difference"] <= 1e-5
    assert facts["totals"]["params"]["after"] == small.count_params()
    assert "by fpgm, uniform budget" in facts["sentence"] and facts["reached"] == pytest.approx(0.4, abs=0.1)


def test_plan_prints_and_writes_nothing(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "plan", saved / "model.keras", "--sparsity", 0.5, "--protect", "inner1")
    assert code == 0 and "inner1" in out and "protected" in out and "MACs" in out and list(tmp_path.iterdir()) == []


def test_strip_cuts_the_zeros_of_a_file_and_says_how_equal_it_is(saved, tmp_path, capsys):
    code, out, _ = run(capsys, "strip", saved / "zeroed.keras", tmp_path / "small.keras", "--json")
    zeroed, small = (keras.saving.load_model(p) for p in (saved / "zeroed.keras", tmp_path / "small.keras"))
    facts = json.loads(out)
    assert code == 0 and facts["params_after"] == small.count_params() < facts["params_before"] == zeroed.count_params()
    assert relative_difference(zeroed, small, model_inputs(zeroed)) < 1e-5


def test_inspect_and_compare_count(saved, tmp_path, capsys):
    run(capsys, "strip", saved / "zeroed.keras", tmp_path / "small.keras")
    code, out, _ = run(capsys, "inspect", saved / "model.keras", "--json")
    assert code == 0 and sum(g["units"] for g in json.loads(out)["groups"]) == json.loads(out)["totals"]["units"] == 192
    code, out, _ = run(capsys, "compare", saved / "model.keras", tmp_path / "small.keras")
    assert code == 0 and "params" in out and "inner1" in out and "x 0.50" in out
    code, out, _ = run(capsys, "compare", saved / "model.keras", tmp_path / "small.keras", "--json")
    assert code == 0 and len(json.loads(out)) == 2


def test_h5_files_are_read(tmp_path, capsys):
    residual_net(widths=(16, 16)).save(tmp_path / "model.h5")
    assert run(capsys, "prune", tmp_path / "model.h5", tmp_path / "small.keras", "--sparsity", 0.3)[0] == 0
    assert (tmp_path / "small.keras").exists()


def test_code_in_a_file_is_not_run_unless_asked(tmp_path, capsys):
    inputs = keras.Input((8,))
    x = layers.Lambda(lambda t: t + 1)(layers.Dense(16)(inputs))
    keras.Model(inputs, layers.Dense(2)(layers.Dense(16)(x))).save(tmp_path / "model.keras")
    code, _, err = run(capsys, "plan", tmp_path / "model.keras")
    assert code == 2 and "--unsafe" in err and "Traceback" not in err
    assert run(capsys, "plan", tmp_path / "model.keras", "--unsafe", "--round-to", 1)[0] == 0


def test_a_truncated_file_is_named_and_nothing_is_written(saved, tmp_path, capsys):
    content = (saved / "model.keras").read_bytes()
    for keep in (0, 100, len(content) // 2, len(content) - 10):
        (tmp_path / "cut.keras").write_bytes(content[:keep])
        code, _, err = run(capsys, "prune", tmp_path / "cut.keras", tmp_path / "small.keras")
        assert code == 2 and "cut.keras" in err and err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["cut.keras"]


def test_a_custom_loss_does_not_keep_the_network_from_being_pruned(tmp_path, capsys):
    def my_loss(y, p):
        return keras.ops.mean(keras.ops.square(y - p))

    model = residual_net(widths=(16, 16))
    model.compile("adam", my_loss)
    model.save(tmp_path / "model.keras")
    code, _, err = run(capsys, "prune", tmp_path / "model.keras", tmp_path / "small.keras", "--sparsity", 0.3)
    assert code == 0 and "without its loss" in err and (tmp_path / "small.keras").exists()


def test_a_custom_class_is_named(tmp_path, capsys):
    class Odd(layers.Layer):
        def call(self, x):
            return x

    inputs = keras.Input((4,))
    keras.Model(inputs, Odd()(layers.Dense(4)(inputs))).save(tmp_path / "model.keras")
    code, _, err = run(capsys, "plan", tmp_path / "model.keras")
    assert code == 2 and "Odd" in err and "script" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["plan", "missing.keras"], "no such file"),
        (["plan", __file__], ".keras or .h5"),
        (["prune", "{model}", "nowhere/small.keras"], "does not exist"),
        (["prune", "{model}", "small.txt"], "ends so"),
        (["plan", "{model}", "--sparsity", "1.5"], "expected a number in"),
        (["plan", "{model}", "--criterion", "l3"], "Known"),
        (["plan", "{model}", "--protect", "nothing"], "fits no layer"),
        (["demo", "--dataset", "no_such_set"], "--data-dir"),
        (["demo", "--epochs", "1"], "tune_epochs < epochs"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_two(saved, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KERAS_PRUNE_DATA", raising=False)
    code, _, err = run(capsys, *[a.format(model=saved / "model.keras") for a in arguments])
    assert code == 2 and message in err and err.count("\n") == 1
    assert list(tmp_path.glob("*.keras")) == []


def test_an_interrupted_write_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    model = residual_net(widths=(16,))
    target = tmp_path / "small.keras"
    target.write_text("old")

    def fails(path):
        zipfile.ZipFile(path, "w").close()
        raise OSError("disk full")

    monkeypatch.setattr(model, "save", fails)
    with pytest.raises(OSError):
        files.save_model(model, str(target))
    assert [p.name for p in tmp_path.iterdir()] == ["small.keras"] and target.read_text() == "old"


def psp_file(folder):
    """A network one of whose kernels is ragged: half of its columns are pruned."""
    inputs = keras.Input((12, 12, 8))
    x = PSPConv2D(16, 3, padding="same", structure="column", activation="relu", name="psp_conv2d")(inputs)
    model = keras.Model(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)))
    alpha = model.layers[1].alphas["column"]
    alpha.assign(np.random.default_rng(0).choice([0.01, 1.0], alpha.shape))
    model.save(folder / "psp.keras")
    return folder / "psp.keras", model


def test_strip_takes_a_file_with_psp_layers_and_rewires_as_it_is_told(tmp_path, capsys):
    path, model = psp_file(tmp_path)
    macs = {}
    for way in ("never", "always"):
        code, out, _ = run(capsys, "strip", path, tmp_path / f"{way}.keras", "--rewire", way, "--json")
        report = json.loads(out)
        assert code == 0 and report["structures"]["psp_conv2d"]["column"][0] == 72
        macs[way] = report["macs_after"]
        small = keras.saving.load_model(tmp_path / f"{way}.keras")
        assert relative_difference(model, small, model_inputs(model)) < 1e-6
    assert macs["always"] < 0.7 * macs["never"]


def test_strip_measures_in_litert_if_asked(tmp_path, capsys, monkeypatch):
    path, _ = psp_file(tmp_path)
    asked = []
    monkeypatch.setattr(cli, "_litert", lambda model: asked.append(model) or len(model.layers))
    code, out, _ = run(capsys, "strip", path, tmp_path / "small.keras", "--latency", "litert")
    assert code == 0 and len(asked) >= 2 and "not measured faster: psp_conv2d" in out


def test_the_latency_of_litert_is_a_number_of_milliseconds(saved):
    assert 0 < cli._litert(keras.saving.load_model(saved / "model.keras")) < 1000


@pytest.mark.parametrize("command", ["demo", "inspect", "plan", "prune", "strip", "compare"])
def test_every_command_helps_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0 and f"example: keras-prune {command}" in capsys.readouterr().out
