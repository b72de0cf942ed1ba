"""Moving statistics of a layer that is called several times in a step on replicas."""

import numpy as np
import pytest
import tensorflow as tf
from tests import oracle
from tests.harness import assert_close, make_case
from tests.replicas.tensorflow import local_results, make_layer, per_replica, strategy_for


@pytest.mark.parametrize("momentum", [0.9, None])
@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_every_call_of_a_shared_layer_in_one_step_counts_in_order(replicas, mode, momentum):
    """Siamese branches: the second call moves what the first has moved."""
    case = make_case([(4 + r, 3) for r in range(replicas)])._replace(momentum=momentum)
    strategy = strategy_for(replicas)
    layer = make_layer(case, strategy)
    shifts = (0.0, 5.0, -2.0)

    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.add_n(
                [tf.reduce_sum(layer(x * (1 + s) + s, training=True) ** 3) for s in shifts]
            )
        return tape.gradient(loss, x)

    def run(x):
        return strategy.run(step, args=(x,))

    run = tf.function(run, autograph=False) if mode == "graph" else run
    finals = set()
    for _ in range(3):
        start = [case.gamma, case.beta, np.zeros(3), np.ones(3), np.array(0)]
        layer.set_weights(start[: len(layer.weights)])
        run(per_replica(strategy, case.parts))
        copies = local_results(strategy, layer.moving_mean.value)
        assert len({copy.tobytes() for copy in copies}) == 1
        finals.add(copies[0].tobytes() + layer.moving_variance.numpy().tobytes())
    assert len(finals) == 1, "the same step ended at different statistics"
    whole = np.concatenate(case.parts).astype("f8")
    mean, variance = np.zeros(3), np.ones(3)
    for number, shift in enumerate(shifts):
        keep = number / (number + 1) if momentum is None else momentum
        branch = whole * (1 + shift) + shift
        mean, variance = (
            oracle.moved(mean, branch.mean(0), keep),
            oracle.moved(variance, branch.var(0), keep),
        )
    assert_close("moving mean", layer.moving_mean.numpy(), mean, 2e-6)
    assert_close("moving variance", layer.moving_variance.numpy(), variance, 2e-6)
