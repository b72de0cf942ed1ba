"""Backups on disk: what is whole, what is damaged, what a kill or a full disk leaves."""

import errno
import random
from pathlib import Path

import keras
import numpy as np
import pytest
from keras.src.saving import saving_lib

from syncbn.multi_worker import backup_files, fits
from syncbn.multi_worker.backup_files import DamageError, Files, Pair
from syncbn.multi_worker.h5_sink import Sink


@pytest.fixture
def files(tmp_path):
    latest = tmp_path / "latest.weights.h5", tmp_path / "training_metadata.json"
    previous = (path.with_name(f"{path.name}.bkp") for path in latest)
    return Files(tmp_path, Pair(*latest), Pair(*previous))


def back_up(files, epoch, *, save=None, needed=0, rotate=True):
    def weights(path):
        path.write_text(f"weights of {epoch}")

    backup_files.write(files, save or weights, {"epoch": epoch}, needed=needed, rotate=rotate)


def epochs(files):
    """Of both backups: what the metadata say and what the weights are."""
    found = (backup_files.read(pair) for pair in (files.latest, files.previous))
    return [backup and (backup.content["epoch"], backup.weights.read_text()) for backup in found]


def names(files):
    return {path.name for path in files.folder.iterdir()}


def test_a_backup_is_read_as_it_was_written_and_the_one_before_is_kept(files):
    assert backup_files.read(files.latest) is None
    for epoch in (1, 2, 3):
        back_up(files, epoch)
    assert epochs(files) == [(3, "weights of 3"), (2, "weights of 2")]
    assert len(names(files)) == 4
    back_up(files, 4, rotate=False)
    assert epochs(files) == [(4, "weights of 4"), (2, "weights of 2")]


class Killed(BaseException):
    """Ends a write where it is, as a kill does: nothing is tidied up."""


@pytest.mark.parametrize("moment", range(1, 40))
def test_a_kill_at_any_moment_leaves_the_old_backup_or_the_new_one(files, moment, monkeypatch):
    """Each call that changes the disk, and each look at it, may be the last."""
    back_up(files, 1)
    back_up(files, 2)
    calls = []

    def mortal(original):
        def call(*args, **kwargs):
            calls.append(original)
            if len(calls) >= moment:
                raise Killed
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for name in ("replace", "write_text", "unlink", "touch", "exists", "read_bytes"):
            patched.setattr(Path, name, mortal(getattr(Path, name)))
        patched.setattr(backup_files.os, "link", mortal(backup_files.os.link))
        patched.setattr(backup_files.os, "fsync", mortal(backup_files.os.fsync))
        try:
            back_up(files, 3)
        except Killed:
            killed = True
        else:
            killed = False
    latest, previous = epochs(files)
    assert latest in [(2, "weights of 2"), (3, "weights of 3")]
    assert previous in [(1, "weights of 1"), (2, "weights of 2")]
    assert killed or latest[0] == 3
    back_up(files, 4)
    assert epochs(files)[0] == (4, "weights of 4")
    assert len(names(files)) == 4


def test_a_backup_of_keras_itself_is_read_without_a_checksum(files):
    files.latest.weights.write_text("weights")
    files.latest.metadata.write_text('{"epoch": 3, "batch": 0}')
    assert backup_files.read(files.latest).content["epoch"] == 3


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda f: f.latest.weights.unlink(), "without latest.weights.h5"),
        (lambda f: f.latest.weights.write_text(""), "of 0 bytes, where"),
        (lambda f: f.latest.weights.write_text("weights of 9"), "SHA-256"),
        (lambda f: f.latest.metadata.unlink(), "without training_metadata.json"),
        (lambda f: f.latest.metadata.write_text(""), "0 bytes that are not JSON"),
        (lambda f: f.latest.metadata.write_text("{"), "1 bytes that are not JSON"),
        (lambda f: f.latest.metadata.write_bytes(b"\xff\xfe\x00"), "not JSON"),
        (lambda f: f.latest.metadata.write_text("[3]"), "names no epoch"),
        (lambda f: f.latest.metadata.write_text('{"batch": 0}'), "names no epoch"),
        (lambda f: f.latest.metadata.write_text('{"epoch": "3"}'), "names no epoch"),
        (lambda f: f.latest.metadata.write_text('{"epoch": true}'), "names no epoch"),
    ],
)
def test_damage_is_an_error_that_says_what_was_found(files, damage, found):
    back_up(files, 1)
    damage(files)
    before = names(files)
    with pytest.raises(DamageError, match=found):
        backup_files.read(files.latest)
    assert names(files) == before


@pytest.mark.parametrize("at", ["weights", "metadata", "room"])
def test_a_full_disk_leaves_the_old_backup_and_no_scratch(files, at, monkeypatch):
    back_up(files, 1)

    def full(path, *_):
        Path(path).touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    if at == "metadata":
        monkeypatch.setattr(backup_files, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        back_up(
            files,
            2,
            save=full if at == "weights" else None,
            needed=2**62 if at == "room" else 0,
        )
    assert epochs(files)[0] == (1, "weights of 1")
    assert names(files) == {"latest.weights.h5", "training_metadata.json"}


def test_a_folder_that_cannot_be_one_says_why(tmp_path):
    assert backup_files.check_folder(tmp_path / "a" / "b") is None
    (tmp_path / "file").touch()
    assert "File exists" in backup_files.check_folder(tmp_path / "file")
    assert "Not a directory" in backup_files.check_folder(tmp_path / "file" / "below")


@pytest.fixture
def model():
    model = keras.Sequential([keras.Input((300,)), keras.layers.Dense(200)])
    model.compile("adam")
    model.optimizer.build(model.trainable_variables)
    return model


def test_what_hdf5_writes_into_a_sink_is_a_file_of_weights(model, tmp_path):
    path = tmp_path / "a.weights.h5"
    with Sink(path) as sink:
        saving_lib.save_weights_only(model, sink)
    assert sink.error is None
    before = [variable.numpy() for variable in model.weights]
    for variable in model.weights:
        variable.assign(variable * 0 + 1)
    model.load_weights(path)
    for variable, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(variable.numpy(), value)


def test_hdf5_does_not_meet_the_error_of_a_full_disk(model, tmp_path):
    """It would crash the process when that ends."""
    path = tmp_path / "full.weights.h5"
    path.symlink_to("/dev/full")
    with Sink(path) as sink:
        saving_lib.save_weights_only(model, sink)
    assert sink.error is not None


def test_the_order_of_an_epoch_depends_on_the_seed_and_the_epoch_alone():
    def order(seed, epoch):
        return tuple(fits.generator(seed, epoch).sample(range(100), 100))

    assert order(1, 2) == order(1, 2)
    assert len({order(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


def test_a_fit_has_a_seed_of_its_own_and_the_one_around_it_again_afterwards():
    random.seed(1)
    assert fits.current() is None
    with fits.inside() as outer:
        with fits.inside() as inner:
            assert fits.current() is inner
        assert fits.current() is outer
    assert fits.current() is None
