"""What needs no second process: progress and the agreement on the last batch."""

import sys
import threading

import keras
import pytest

from syncbn.multi_worker.board import Board, Worker, agree, exchange
from syncbn.multi_worker.progress import Progress, callback_in, progress
from syncbn.multi_worker.repairs.chief_writes import scratch_beside
from syncbn.multi_worker.stopping import Stops


def test_progress_advances_alike_whichever_callbacks_a_worker_has():
    own = Progress()
    with own.inside("fit"):
        before = own.phase
        with own.callbacks("on_train_batch_begin", "training step", 4):
            assert own.in_callback
            assert own.words().startswith("training step 5")
        assert own.phase == before + 1
        assert not own.in_callback
    assert own.failed is None


def test_an_operation_that_fails_says_so_until_the_next_one():
    own = Progress()
    with pytest.raises(LookupError), own.inside("fit"):
        raise LookupError("no table\nof labels")
    assert own.record()["failed"] == (1, "LookupError: no table")
    with own.inside("fit"):
        assert own.record()["failed"] is None


def test_an_error_within_is_not_the_outermost_operations():
    own = Progress()
    with own.inside("fit"), pytest.raises(LookupError), own.inside("evaluate"):
        raise LookupError
    assert own.failed is None


class Watching(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):  # noqa: ARG002 - Keras's
        return callback_in(sys._getframe())


def test_a_callback_is_found_on_the_stack_with_its_place():
    found = Watching().on_epoch_end(0)
    assert found.startswith("Watching.on_epoch_end (line ")
    assert found.endswith("of test_board.py)")
    assert callback_in(None) is None


def test_one_worker_agrees_with_itself():
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    assert agree(strategy, "a seed", 3) == 3
    assert exchange(strategy, "a word", "yes") == ["yes"]


class MemoryBoard(Board):
    """Two workers' board without a cluster: a dictionary."""

    def __init__(self, index, store):
        super().__init__([Worker(0, "worker", 0, "here"), Worker(1, "worker", 1, "there")], index)
        self.store = store

    def write(self, key, text):
        self.store[key] = text

    def read(self, key, seconds):  # noqa: ARG002 - a real one waits so long
        return self.store.get(key)

    def remove(self, key):
        self.store.pop(key, None)

    def is_alive(self, worker):  # noqa: ARG002
        return True


@pytest.fixture
def batches():
    yield progress
    progress.__init__()


@pytest.mark.parametrize(("theirs", "further"), [(3, 0), (4, 1)])
def test_the_last_batch_is_the_furthest_that_any_worker_has_begun(batches, theirs, further):
    batches.batches = 3
    store = {"syncbn/stop/1/1": f"{theirs} "}
    stops = Stops(MemoryBoard(0, store))
    loop = "on_train_batch_end"
    ended = [stops.after_batch(loop, True)]
    while not ended[-1]:
        ended.append(stops.after_batch(loop, False))
    assert len(ended) == 1 + further
    assert store["syncbn/stop/1/0"] == f"3 {loop}"


def test_an_answer_by_the_thread_ends_the_loop_that_was_asked_to_end(batches):
    batches.batches = 3
    stops = Stops(MemoryBoard(0, {"syncbn/stop/1/1": "2 on_train_batch_end"}))
    thread = threading.Thread(target=stops.answer, args=(1,))
    thread.start()
    thread.join()
    assert not stops.after_batch("on_test_batch_end", False)
    assert stops.after_batch("on_train_batch_end", False)
    assert stops.after_loop("on_train_batch_end")
    assert not stops.after_loop("on_train_batch_end")


def test_a_request_that_the_end_of_the_data_overtook_is_kept_for_the_epochs_end(batches):
    batches.batches = 3
    stops = Stops(MemoryBoard(0, {"syncbn/stop/1/1": "4 "}))
    assert not stops.after_batch("on_train_batch_end", True)
    assert stops.after_loop("on_train_batch_end")


def test_a_scratch_file_keeps_its_ending_and_goes_when_writing_fails(tmp_path):
    target = tmp_path / "a.weights.h5"

    def fail_halfway():
        with scratch_beside(target) as scratch:
            scratch.write_text("half")
            assert scratch.name.endswith(".weights.h5")
            raise LookupError

    with pytest.raises(LookupError):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []
