"""The data of the main job: real digits, files in Keras's layout, and every way a file is wrong."""

import pathlib
import zipfile

import numpy as np
import pytest

import syncbn
from syncbn.training import data


def arrays(**changes):
    rng = np.random.default_rng(0)
    result = {
        "x_train": rng.integers(0, 256, (20, 5, 4), dtype=np.uint8),
        "y_train": np.arange(20, dtype=np.uint8) % 3,
        "x_test": rng.integers(0, 256, (6, 5, 4), dtype=np.uint8),
        "y_test": np.arange(6, dtype=np.uint8) % 3,
    }
    result.update(changes)
    return {name: value for name, value in result.items() if value is not None}


def saved(folder, **changes):
    path = folder / "data.npz"
    np.savez(path, **arrays(**changes))
    return str(path)


def test_digits_are_the_1797_real_ones():
    digits = data.load("digits")
    assert len(digits.x_train) + len(digits.x_test) == 1797
    assert digits.x_train.shape[1:] == (8, 8, 1)
    assert digits.classes == 10
    assert 0 <= digits.x_train.min() < digits.x_train.max() == 1.0
    assert set(digits.y_test) == set(range(10))


def test_digits_are_split_without_overlap():
    digits = data.load("digits")
    train = {image.tobytes() for image in digits.x_train}
    test = [image.tobytes() for image in digits.x_test]
    assert sum(image in train for image in test) <= 2  # the set itself holds a few equal images


def test_sizes_and_classes_come_from_the_file(tmp_path):
    loaded = data.load(saved(tmp_path))
    assert loaded.x_train.shape == (20, 5, 4, 1)
    assert loaded.classes == 3
    assert loaded.x_train.dtype == np.float32
    assert loaded.x_train.max() == 1.0


def test_images_with_channels_and_floats_are_taken_as_they_are(tmp_path):
    x = np.random.default_rng(0).normal(size=(20, 5, 4, 3)).astype("f4")
    loaded = data.load(saved(tmp_path, x_train=x, x_test=x[:6]))
    np.testing.assert_array_equal(loaded.x_train, x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "Add or rename: y_test"),
        ({"x_train": np.zeros((20, 5))}, "x_train must hold images"),
        ({"x_train": np.zeros((0, 5, 4)), "y_train": np.zeros(0, int)}, "x_train must hold images"),
        ({"x_train": np.full((20, 5, 4), "a")}, "x_train must hold numbers"),
        ({"x_train": np.full((20, 5, 4), np.nan)}, "400 NaN, infinite or larger values"),
        ({"x_train": np.full((20, 5, 4), 1e300)}, "400 NaN, infinite or larger values"),
        ({"x_test": np.zeros((6, 5, 5), np.uint8)}, "must be of one size"),
        ({"x_test": np.zeros((6, 5, 4), np.float32)}, "both be integers or both be floats"),
        ({"y_train": np.zeros(19, int)}, "one integer an image, shape \\(20,\\)"),
        ({"y_train": np.zeros((20, 3), int)}, "not one-hot rows"),
        ({"y_train": np.zeros(20)}, "dtype float64"),
        ({"y_train": np.arange(20) % 3 - 1}, "from -1 to 1, out of range"),
        (
            {"y_train": np.arange(20) % 3 * 100},
            "3 distinct label\\(s\\) from 0 to 200, out of range",
        ),
        ({"y_train": np.zeros(20, int)}, "at least two"),
        ({"y_test": np.arange(6)}, "from 0 to 5, out of range"),
        ({"y_test": np.array([object()] * 6)}, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_with_the_remedy(tmp_path, changes, message):
    with pytest.raises(syncbn.InputError, match=message) as raised:
        data.load(saved(tmp_path, **changes))
    assert "Received: " in str(raised.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(syncbn.InputError, match=r"is not a file\. Check the path"):
        data.load(str(tmp_path / "none.npz"))


@pytest.mark.parametrize("content", [b"", b"no zip at all", b"PK\x03\x04 torn"])
def test_a_broken_file_is_refused(tmp_path, content):
    path = tmp_path / "broken.npz"
    path.write_bytes(content)
    with pytest.raises(syncbn.InputError, match="cannot be read as one"):
        data.load(str(path))


def test_a_torn_file_is_refused(tmp_path):
    path = saved(tmp_path)
    with pathlib.Path(path).open("r+b") as file:
        file.truncate(700)
    with pytest.raises(syncbn.InputError, match="cannot be read as one"):
        data.load(path)


def test_a_file_with_damaged_contents_is_refused(tmp_path):
    path = tmp_path / "damaged.npz"
    np.savez_compressed(path, **arrays())
    content = bytearray(path.read_bytes())
    content[150:250] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(syncbn.InputError, match="cannot be read as one"):
        data.load(str(path))


def test_a_member_that_is_no_array_is_refused(tmp_path):
    path = saved(tmp_path, y_test=None)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("y_test", b"text")
    with pytest.raises(syncbn.InputError, match="y_test is not an array"):
        data.load(path)


def test_a_single_array_is_refused(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(syncbn.InputError, match="a single array"):
        data.load(str(tmp_path / "x.npy"))


def test_mnist_without_a_network_says_so_in_one_line(monkeypatch):
    import keras

    def no_network():
        raise Exception("URL fetch failure on http://example.invalid: None -- no route\nmore")

    monkeypatch.setattr(keras.datasets.mnist, "load_data", no_network)
    with pytest.raises(syncbn.InputError, match="requires a network") as raised:
        data.load("mnist")
    assert "\n" not in str(raised.value)


def test_mnist_in_the_cache_is_loaded(monkeypatch):
    import keras

    a = arrays()
    monkeypatch.setattr(
        keras.datasets.mnist,
        "load_data",
        lambda: ((a["x_train"], a["y_train"]), (a["x_test"], a["y_test"])),
    )
    assert data.load("mnist").classes == 3
