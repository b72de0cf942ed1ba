"""Groups in TensorFlow's own terms: its collectives, its float32 table, gradients of gradients."""

import numpy as np
import pytest
import tensorflow as tf
from tests.derivatives import input_gradient_along
from tests.graphs import traced
from tests.harness import (
    PARTITIONS,
    assert_close,
    assert_equals_one_device,
    grouped_case,
    make_case,
    observe,
)
from tests.replicas.tensorflow import (
    local_results,
    make_layer,
    make_step,
    per_replica,
    strategy_for,
)

from syncbn._backends.tensorflow import collectives
from syncbn.groups import Grouping


@pytest.mark.parametrize(("replicas", "options"), PARTITIONS)
def test_each_group_normalizes_by_itself_by_the_float32_table(replicas, options, monkeypatch):
    monkeypatch.setattr(collectives, "_has_float64", lambda: False)
    case = grouped_case(replicas, **options)
    case = case._replace(parts=[part + 3 * r for r, part in enumerate(case.parts)])
    assert_equals_one_device(case, observe(case), 5e-6)


@pytest.mark.parametrize(("replicas", "options"), PARTITIONS)
def test_one_collective_each_way_and_none_backward_for_replicas_alone(replicas, options):
    case = grouped_case(replicas, **options)
    layer = make_layer(case, strategy_for(replicas))
    assert len(traced(replicas, lambda x, _: layer(x, training=True), case)) == replicas
    groups = Grouping.of(options.get("group_size"), options.get("group_assignment")).over(replicas)
    alone = groups is not None and all(len(group) == 1 for group in groups)
    both = traced(replicas, make_step(layer), case)
    assert len(both) == (1 if alone else 2) * replicas


def test_gradients_of_gradients_stay_in_the_group():
    case = make_case([(4, 2), (3, 2), (5, 2)], dtype="float64")
    case = case._replace(options={"group_assignment": [[0, 2], [1]]})
    strategy = strategy_for(3)
    layer = make_layer(case, strategy, "float64")
    rng = np.random.default_rng(5)
    directions = [rng.normal(size=part.shape) for part in case.parts]

    def step(x, dy, u):
        with tf.GradientTape() as outer:
            outer.watch(dy)
            scalar = input_gradient_along(layer, x, dy, u)
        return outer.gradient(scalar, dy)

    arguments = [per_replica(strategy, a) for a in (case.parts, case.cotangents, directions)]
    observed = tf.function(lambda *a: strategy.run(step, args=a), autograph=False)(*arguments)
    # The map from dy to dx is linear and its own transpose: u pulled back is the dx of u.
    expected = case._replace(cotangents=directions).expected().input_gradients
    for own, its in zip(local_results(strategy, observed), expected, strict=True):
        assert_close("by dy", own, its, 1e-10)


def test_virtual_batches_take_one_collective_for_the_moving_statistics():
    case = grouped_case(2, virtual_batch_size=4)
    layer = make_layer(case, strategy_for(2))
    assert len(traced(2, make_step(layer), case)) == 2
