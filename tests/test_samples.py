import keras
import numpy as np
import pytest
from keras import layers
from PIL import Image

from keras_prune import samples


def net(shape=(16, 16, 3), front=(), **arguments):
    inputs = keras.Input(shape, name="picture", **arguments)
    x = inputs
    for layer in front:
        x = layer(x)
    return keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))


def picture(path, size=(16, 16), colour=(10, 20, 30), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures of three classes; the red value is the number of the picture."""
    for i in range(12):
        picture(tmp_path / "images" / "cab"[i % 3] / f"{i}.png", colour=(i, 100 + i, 200))
    return tmp_path / "images"


def read(source, model=None, **arguments):
    return samples.read(source, model or net(), **{"preprocess": "none", **arguments})


def test_a_folder_is_read_whole_with_classes_in_the_order_of_their_names(folder):
    found = read(folder, labels="folders")
    assert found.x.shape == (12, 16, 16, 3) and found.x.dtype == np.float32 and len(found) == 12
    numbers = found.x[:, 0, 0, 0].astype(int)
    assert sorted(numbers) == list(range(12)) and np.all(found.x[:, 0, 0, 1] == 100 + numbers)
    assert np.array_equal(found.y, np.array([2, 0, 1])[numbers % 3])  # c, a, b
    assert [int(name.split("/")[1].split(".")[0]) for name in found.names] == list(numbers)
    assert read(folder).y is None


def test_the_choice_is_made_by_the_seed_and_decodes_nothing_else(folder, monkeypatch):
    opened = []
    original = samples.pictures.opened
    monkeypatch.setattr(samples.pictures, "opened", lambda path: opened.append(path) or original(path))
    a, b, c = (read(folder, count=5, seed=seed) for seed in (0, 0, 1))
    assert a.names == b.names != c.names and len(set(a.names)) == 5 and len(opened) == 15


def test_labels_from_a_table_and_from_an_array(folder, tmp_path):
    lines = [f"{'cab'[i % 3]}/{i}.png,{i * 2}" for i in range(12)]
    (tmp_path / "labels.csv").write_text("file,label\n" + "\n".join(lines))
    found = read(folder, labels=str(tmp_path / "labels.csv"))
    assert np.array_equal(found.y, found.x[:, 0, 0, 0] * 2)
    (tmp_path / "labels.csv").write_text("\n".join(f"{i}.png,{'even' if i % 2 == 0 else 'odd'}" for i in range(12)))
    found = read(folder, labels=str(tmp_path / "labels.csv"))  # names alone do, words become numbers
    assert np.array_equal(found.y, found.x[:, 0, 0, 0] % 2) and "even, odd" in found.notes[0]
    (tmp_path / "labels.csv").write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match="no label for 1 of 12 images, such as c/0.png"):
        read(folder, labels=str(tmp_path / "labels.csv"))
    np.save(tmp_path / "y.npy", np.arange(12))  # in the order of the sorted file names
    files = samples.pictures.files_in(folder)
    found = read(folder, labels=str(tmp_path / "y.npy"))
    assert [str(files[n].relative_to(folder)) for n in found.y] == list(found.names)


def test_pictures_beside_the_classes_are_refused(folder):
    picture(folder / "stray.png")
    with pytest.raises(ValueError, match="stray.png is in none"):
        read(folder, labels="folders")


def test_the_middle_of_the_resized_picture_is_taken(tmp_path):
    image = np.zeros((32, 96, 3), "uint8")
    image[:, 32:64] = 255  # the middle third, white
    Image.fromarray(image).save(tmp_path / "wide.png")
    x = read(tmp_path).x
    assert x.shape == (1, 16, 16, 3) and np.all(x[0, :, 2:-2] == 255)
    x = read(tmp_path, net((16, 48, 3))).x
    assert x[0, :, :14].max() == 0 == x[0, :, -14:].max() and x[0, :, 18:30].min() == 255


def test_channels_follow_the_model_whatever_the_file_has(tmp_path):
    picture(tmp_path / "a.png", colour=77, mode="L")
    picture(tmp_path / "b.png", colour=(77, 77, 77, 0), mode="RGBA")
    picture(tmp_path / "c.gif", colour=(77, 77, 77))
    picture(tmp_path / "d.JPG", colour=(77, 77, 77))
    picture(tmp_path / "e.webp", colour=(77, 77, 77))
    for channels in (1, 3):
        x = read(tmp_path, net((16, 16, channels))).x
        assert x.shape == (5, 16, 16, channels) and np.all(np.abs(x - 77) <= 2)


def test_a_model_of_unknown_size_takes_the_pictures_own_if_they_agree(tmp_path):
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, layers.GlobalAveragePooling2D()(inputs))
    picture(tmp_path / "a.png", (20, 10))
    assert read(tmp_path, model).x.shape == (1, 10, 20, 3)
    picture(tmp_path / "b.png", (10, 20))
    with pytest.raises(ValueError, match="several sizes"):
        read(tmp_path, model)


def test_a_few_unreadable_pictures_are_named_and_many_are_an_error(folder):
    (folder / "a" / "broken.png").write_bytes(b"no picture")
    found = read(folder, labels="folders")
    assert len(found) == 12 == len(found.y) and any("1 of 13" in n and "broken.png" in n for n in found.notes)
    assert np.array_equal(found.y, np.array([2, 0, 1])[found.x[:, 0, 0, 0].astype(int) % 3])
    Image.fromarray(np.full((16, 16), 4000, "uint16")).save(folder / "deep.png")  # clipped by a plain convert
    with pytest.raises(ValueError, match="2 of 14 images"):
        read(folder)


@pytest.mark.parametrize(
    "preprocess, oracle",
    [
        ("none", lambda x: x),
        ("unit", lambda x: x / 255),
        ("signed", lambda x: x / 127.5 - 1),
        ("imagenet", lambda x: keras.applications.imagenet_utils.preprocess_input(x.copy(), mode="torch")),
        ("caffe", lambda x: keras.applications.imagenet_utils.preprocess_input(x.copy(), mode="caffe")),
        (lambda x: x * 2, lambda x: x * 2),
    ],
)
def test_preprocessing_is_that_of_keras_applications(folder, preprocess, oracle):
    raw, x = read(folder).x, read(folder, preprocess=preprocess).x
    assert np.abs(x - oracle(raw)).max() < 1e-4 and x.dtype == np.float32


def test_without_a_word_images_are_refused_unless_the_model_scales_them(folder):
    with pytest.raises(ValueError, match="preprocess.*unit.*signed.*imagenet.*caffe"):
        read(folder, preprocess=None)
    with pytest.raises(ValueError, match="--preprocess"):
        read(np.zeros((4, 16, 16, 3), "uint8"), preprocess=None)
    found = read(folder, net(front=[layers.Rescaling(1 / 255)]), preprocess=None)
    assert found.x.max() == 200 and any("scales its input itself" in note for note in found.notes)
    for scaled in (np.random.rand(4, 16, 16, 3), np.random.randn(4, 16, 16, 3) * 50):
        found = read(scaled, preprocess=None)
        assert np.allclose(found.x, scaled[[int(name) for name in found.names]])
    with pytest.raises(ValueError, match="scaled already"):
        read(np.random.rand(4, 16, 16, 3), preprocess="unit")
    features = np.random.rand(4, 7) * 90  # no images
    assert np.isclose(read(features, net((7,)), preprocess=None).x.sum(), features.sum())


def nested(*inner):
    return keras.Sequential([keras.Input((16, 16, 3)), *inner])


@pytest.mark.parametrize(
    "front, expected",
    [
        ([layers.Rescaling(1 / 255)], True),
        ([layers.Normalization(mean=0.5, variance=2.0)], True),
        ([layers.RandomFlip(), layers.Resizing(8, 8), layers.Rescaling(2.0)], True),
        ([lambda x: x / 127.5, lambda x: x - 1.0], True),
        ([lambda x: x[..., ::-1], lambda x: x - np.ones((1, 1, 1, 3), "float32")], True),
        ([nested(layers.RandomFlip()), nested(layers.ZeroPadding2D(), layers.Rescaling(2.0))], True),
        ([], False),
        ([nested(layers.RandomFlip())], False),
        ([layers.Conv2D(3, 3), layers.Rescaling(2.0)], False),
        ([lambda x: x + x], False),
        ([nested(layers.Conv2D(3, 3), layers.Rescaling(2.0))], False),
    ],
)
def test_own_preprocessing_is_found_among_the_first_operations_only(front, expected):
    assert samples.has_own_preprocessing(net(front=front)) is expected


def test_arrays_and_archives(tmp_path):
    x, y = np.random.rand(20, 16, 16, 3), np.arange(20)[:, None]
    x[:, 0, 0, 0] = y[:, 0] / 20
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "xy.npz", x=x, y=y)
    np.savez(tmp_path / "train.npz", x_train=x, y_train=np.eye(20)[y[:, 0]], x_test=x[:3], y_test=y[:3])
    for source, labelled in [("x.npy", False), ("xy.npz", True), ("train.npz", True), ((x, y), True), (x, False)]:
        found = read(str(tmp_path / source) if isinstance(source, str) else source, count=9)
        places = [int(name) for name in found.names]
        assert np.allclose(found.x, x[places]) and len(set(places)) == 9
        assert (found.y is not None) == labelled and (not labelled or list(found.y) == places)
    assert len(read(tmp_path / "train.npz", key="x_test").y) == 3
    np.savez(tmp_path / "two.npz", a=x, b=x)
    with pytest.raises(ValueError, match="holds a, b; expected.*key"):
        read(tmp_path / "two.npz")
    with pytest.raises(ValueError, match="20, 16, 16, 3.*one label"):
        read((x, y[:5]))


def test_grey_images_without_a_channel_axis_and_images_of_another_size():
    grey = np.random.randint(0, 255, (5, 16, 16), "uint8")
    assert np.array_equal(np.sort(read(grey, net((16, 16, 1))).x.sum((1, 2, 3))), np.sort(grey.sum((1, 2))))
    found = read(np.full((5, 32, 32, 3), 9, "uint8"))
    assert found.x.shape == (5, 16, 16, 3) and np.all(found.x == 9) and "resized" in found.notes[0]
    with pytest.raises(ValueError, match="the model takes"):
        read(np.random.rand(5, 32, 32, 3))  # not bytes: cannot be told to be a picture


def test_iterables_batched_or_not_labelled_or_not():
    x, y = np.random.rand(10, 16, 16, 3).astype("float32"), np.arange(10)
    batches = [(x[i : i + 4], y[i : i + 4]) for i in (0, 4, 8)]
    for source, labelled in [
        (batches, True),
        ([b[0] for b in batches], False),
        (iter(zip(x, y)), True),
        (iter(x), False),
        ((b for b in batches), True),
    ]:
        found = read(source, count=7)
        assert np.array_equal(found.x, x[:7]) and (list(found.y) == list(range(7)) if labelled else found.y is None)
    with pytest.raises(ValueError, match="2-dimensional"):
        read([np.zeros((4, 4))])
    with pytest.raises(ValueError, match="yields nothing"):
        read(iter([]))


def test_a_tensorflow_data_set_is_iterated_like_any_other():
    tf = pytest.importorskip("tensorflow")
    x, y = np.random.rand(10, 16, 16, 3).astype("float32"), np.arange(10)
    data = tf.data.Dataset.from_tensor_slices((x, y))
    for source in (data, data.batch(4), data.batch(4).repeat()):
        found = read(source, count=8)
        assert np.array_equal(found.x, x[:8]) and list(found.y) == list(range(8))


def test_several_inputs_come_from_an_archive_by_name(tmp_path):
    a, b = keras.Input((3,), name="a"), keras.Input((4,), name="b", dtype="int32")
    model = keras.Model([a, b], layers.Concatenate()([a, keras.ops.cast(b, "float32")]))
    first, second = np.random.rand(9, 3), np.arange(36).reshape(9, 4)
    np.savez(tmp_path / "in.npz", b=second, a=first, y=np.arange(9))
    found = samples.read(tmp_path / "in.npz", model, count=5)
    assert np.allclose(found.x[0], first[found.y]) and np.array_equal(found.x[1], second[found.y])
    assert (
        found.x[0].dtype == np.float32 and found.x[1].dtype == np.int32 and np.asarray(model(found.x)).shape == (5, 7)
    )
    by_name = keras.Model({"a": a, "b": b}, model.outputs)
    assert np.array_equal(samples.read(tmp_path / "in.npz", by_name, count=5).x["b"], found.x[1])
    np.savez(tmp_path / "in.npz", a=first)
    with pytest.raises(ValueError, match="inputs a, b"):
        samples.read(tmp_path / "in.npz", model)


def test_integer_inputs_stay_integers():
    tokens = np.random.randint(0, 9, (6, 5))
    inputs = keras.Input((5,), dtype="int32")
    model = keras.Model(inputs, layers.Embedding(9, 2)(inputs))
    found = samples.read(tokens, model)
    assert found.x.dtype == np.int32 and np.array_equal(found.x, tokens[[int(n) for n in found.names]])
    with pytest.raises(ValueError, match="alone makes sense"):
        samples.read(tokens, model, preprocess="unit")


def test_a_data_set_by_name_is_read_from_the_users_folder(tmp_path):
    x, y = np.random.randint(0, 255, (30, 16, 16, 3), "uint8"), np.arange(30)
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, x_test=x[:2], y_test=y[:2])
    found = read("tfds:mine", data_dir=str(tmp_path), count=10)
    assert np.array_equal(found.x, x[found.y]) and "mine.npz" in found.source


def test_targets_that_are_no_classes_are_left_out_with_a_note():
    found = read((np.random.rand(4, 16, 16, 3), np.random.rand(4)))
    assert found.y is None and "no class numbers" in found.notes[-1]


@pytest.mark.parametrize(
    "source, arguments, error, message",
    [
        ("nowhere", {}, ValueError, "no such file"),
        (__file__, {}, ValueError, "expected a folder"),
        (7, {}, TypeError, "int"),
        (np.zeros((2, 16, 16, 3)), {"count": 0}, ValueError, "count=0"),
        (np.zeros((2, 16, 16, 3)), {"preprocess": "torch"}, ValueError, "Known: none"),
        (np.array(3.0), {}, ValueError, "single number"),
        (np.zeros((0, 16, 16, 3)), {}, ValueError, "no samples"),
        ((np.ones((2, 16, 16, 3)), np.ones(2)), {"labels": [1, 2]}, ValueError, "labels twice"),
        (iter([]), {"labels": [1, 2]}, ValueError, "yield"),
        (np.full((2, 16, 16, 3), np.nan), {}, ValueError, "finite"),
        (np.zeros((2, 16, 16, 1)) + 2, {"preprocess": "caffe"}, ValueError, "takes|channels"),
        (np.full((2, 16, 16, 3), "a"), {}, ValueError, "expected finite numbers"),
    ],
)
def test_bad_sources_are_told_what_is_expected(source, arguments, error, message):
    with pytest.raises(error, match=message):
        read(source, **arguments)


def test_an_empty_folder_and_a_model_without_pictures_are_named(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        read(tmp_path / "empty")
    with pytest.raises(ValueError, match="Pass arrays"):
        read(folder, net((16, 16, 5)))
