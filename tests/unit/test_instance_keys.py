"""Collectives of every step use numbers that come again; those of any batch's shape do not."""

import tensorflow as tf
from tensorflow.python.distribute.cross_device_utils import CollectiveKeys

import syncbn
from syncbn._backends.tensorflow import collectives
from syncbn._backends.tensorflow.replicas import mirrored_strategy
from syncbn.multi_worker import replicas


def test_the_layer_and_the_repair_mean_the_same_scope():
    """Neither imports the other, so that each can go away alone."""
    assert collectives.SAME_SHAPE == replicas.SAME_SHAPE


def new_numbers(monkeypatch, scope):
    """How many numbers TensorFlow gives out in 5 more steps of an all-reduce in such a scope."""
    given = []
    original = CollectiveKeys.get_instance_key
    counted = lambda keys, *place: given.append(1) or original(keys, *place)  # noqa: E731
    monkeypatch.setattr(CollectiveKeys, "get_instance_key", counted)
    strategy = mirrored_strategy(2)

    def replica(x):
        with tf.name_scope(scope):
            context = tf.distribute.get_replica_context()
            return context.all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(x))

    @tf.function
    def step():
        return strategy.run(replica, args=(tf.ones((3,)),))

    with syncbn.enable_multi_worker():
        step()
        given.clear()
        for _ in range(5):
            total = strategy.experimental_local_results(step())[0]
    assert total.numpy().tolist() == [2.0] * 3
    return len(given)


def test_sums_of_one_shape_take_no_new_numbers_and_others_do(monkeypatch):
    assert new_numbers(monkeypatch, replicas.SAME_SHAPE) == 0
    assert new_numbers(monkeypatch, "of_any_batch") == 5 * 2


def test_a_second_strategy_has_none_of_the_numbers_of_the_first():
    """Their records are the process's: the same number with another shape would be an error."""
    with syncbn.enable_multi_worker():
        numbers = []
        for _ in range(2):
            keys = CollectiveKeys(group_key_start=1 << 20)  # a group of no other test
            group = keys.get_group_key(["CPU:0"])
            numbers += [keys.get_instance_key(group, "CPU:0") for _ in range(3)]
    assert len(set(numbers)) == 6
    assert numbers[3] == numbers[2] + 1
    # The second goes on from there when the repairs are undone.
    assert keys.get_instance_key(group, "CPU:0") == numbers[-1] + 1
