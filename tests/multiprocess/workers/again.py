"""Steps that end by the end of the data, at workers that come apart, a collective at hand.

    python -m tests.multiprocess.workers.again MODE ROUNDS

MODE: `repaired`; `early`: the sum does not wait for the data, and a call that fails gives up none
of its numbers, which must come to an error or to workers that wait for ever.
"""

from __future__ import annotations

import faulthandler
import json
import os
import random
import sys
import time
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"

import numpy as np
import tensorflow as tf

import syncbn
from syncbn.multi_worker import share
from syncbn.multi_worker.replicas import SAME_SHAPE
from syncbn.multi_worker.rings import RING, Rings, numbers
from syncbn.multi_worker.share import sharing
from tests.multiprocess.leaving import leave

WORKER = json.loads(os.environ["TF_CONFIG"])["task"]["index"]
SUM = tf.distribute.ReduceOp.SUM
STUCK = 15.0  # seconds without a step
SIZES = (3, 20_000)  # of one round of messages, and of two


def make_step(strategy: tf.distribute.Strategy) -> Any:
    """As a step of fit: who has data is counted, and an error says that it is nobody.

    The number of examples is static. The arguments: whether the data are at their end, and how
    large a vector is summed.
    """
    nothing = iter(tf.data.Dataset.from_tensors(np.ones((1, 2))).skip(1))

    def replica(size: int, data: Any) -> Any:
        context = tf.distribute.get_replica_context()
        with sharing(data) as own, tf.name_scope(SAME_SHAPE):
            total = context.all_reduce(SUM, own.examples * tf.range(size, dtype=tf.float32))
            return context.all_reduce(SUM, total)

    @tf.function
    def step(at_end: Any, size: int) -> Any:
        replicas = strategy.reduce(SUM, tf.ones((1,), tf.int64), axis=None)
        here = at_end & (replicas[0] > 0)
        data = tf.cond(here, nothing.get_next, lambda: tf.ones((1, 2), tf.float64))
        return strategy.run(replica, args=(size, tf.ensure_shape(data, (1, 2))))

    return step


def rounds_of(step: Any, rounds: int) -> int:
    """How many steps gave the right sum."""
    delays = random.Random(WORKER)
    right = 0
    for number in range(rounds):
        size = SIZES[number % 7 == 0]
        for at_end in (False, False, True):
            if delays.random() < 0.3:
                time.sleep(delays.random() * 0.003)
            faulthandler.dump_traceback_later(STUCK, exit=True)
            try:
                with numbers.call():
                    total = step(tf.constant(at_end), size)
            except tf.errors.OutOfRangeError:
                continue
            right += bool((np.array(total) == 4.0 * np.arange(size)).all())
    faulthandler.cancel_dump_traceback_later()
    return right


def main(mode: str, rounds: int) -> None:
    if mode == "early":
        end = Rings.end
        Rings.end = lambda rings, *, failed: end(rings, failed=False)  # type: ignore[method-assign]  # noqa: ARG005
        share._examples_of = lambda batch: tf.constant(float(batch.shape[0]))
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
    with syncbn.enable_multi_worker(), numbers.operation():
        right = rounds_of(make_step(strategy), rounds)
    (state,) = numbers.state()
    print(json.dumps({"right": right, "state": state, "came_again": 3 * rounds > 4 * RING}))
    leave()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
