"""Moving statistics over several steps: cumulative, unbiased, frozen, renormalized."""

import numpy as np
import pytest
from tests import oracle
from tests.harness import Case, assert_close, numbers, observe
from tests.which_keras import SyncBatchNormalization, keras, name_of


def batches(sizes, steps, seed=0):
    rng = np.random.default_rng(seed)
    return [
        [rng.normal(step, 1 + step, (size, 3)).astype("f4") for size in sizes]
        for step in range(steps)
    ]


class Training:
    """Steps of one layer: each starts from the weights that the one before has left."""

    def __init__(self, momentum=0.99, **options):
        self.momentum, self.options, self.state = momentum, options, {}

    def step(self, parts, mode="graph", **arguments):
        case = Case(parts, parts, -1, np.ones(3), np.zeros(3), momentum=self.momentum)
        case = case._replace(options=self.options)
        observed = observe(case, mode=mode, state=self.state, **arguments)
        self.state = observed.state()
        return observed


def assert_moved(state, means, variances, tolerance=2e-6):
    assert_close("moving mean", state["moving_mean"], means, tolerance)
    assert_close("moving variance", state["moving_variance"], variances, tolerance)


@pytest.mark.parametrize("sizes", [(12,), (7, 4), (5, 0, 3)])
def test_momentum_none_is_the_average_of_all_batches(sizes):
    training = Training(momentum=None)
    seen = batches(sizes, 3)
    for number, parts in enumerate(seen, start=1):
        training.step(parts)
        wholes = [np.concatenate(p).astype("f8") for p in seen[:number]]
        assert_moved(
            training.state,
            np.mean([w.mean(0) for w in wholes], 0),
            np.mean([w.var(0) for w in wholes], 0),
        )
    assert int(training.state["num_batches_tracked"]) == 3


def test_the_first_step_of_the_cumulative_average_is_the_batch_exactly():
    """Whatever the moving statistics were before: nothing of them is left, not even a rounding."""
    training = Training(momentum=None)
    training.state = {"moving_mean": np.full(3, 1e9, "f4")}
    parts = [part * np.float32(1e-6) for part in batches((7, 4), 1)[0]]
    training.step(parts)
    whole = np.concatenate(parts).astype("f8")
    assert_moved(training.state, whole.mean(0), whole.var(0))


@pytest.mark.parametrize("momentum", [0.9, None])
def test_frozen_phases_and_empty_batches_count_nothing(momentum):
    training = Training(momentum)
    first, second = batches((7, 4), 2)
    training.step(first)
    before = training.state
    frozen = training.step(second, trainable=False)
    mean, variance = (before[f"moving_{name}"].astype("f8") for name in ("mean", "variance"))
    plain = (second[0] - mean) / np.sqrt(variance + 1e-3)
    assert_close("frozen outputs", frozen.outputs[0], plain, 1e-5)
    training.step(batches((0, 0), 1)[0])
    inference = training.step(second, training=False)
    np.testing.assert_array_equal(inference.outputs[0], frozen.outputs[0])
    assert training.state.keys() == before.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(training.state[name], value, err_msg=name)
    training.step(second)
    mean, variance = np.zeros(3), np.ones(3)
    for number, parts in enumerate((first, second)):
        keep = number / (number + 1) if momentum is None else momentum
        whole = np.concatenate(parts).astype("f8")
        mean = oracle.moved(mean, whole.mean(0), keep)
        variance = oracle.moved(variance, whole.var(0), keep)
    assert_moved(training.state, mean, variance)


@pytest.mark.parametrize("sizes", [(12,), (7, 4), (1,), (1, 1), (1, 0)])
def test_unbiased_moving_variance_is_torch_s(sizes):
    """n / (n − 1) by the global count; of one element, where torch refuses, the biased 0."""
    (parts,) = batches(sizes, 1)
    training = Training(0.9, unbiased_moving_variance=True)
    y = training.step(parts).outputs
    whole = np.concatenate(parts).astype("f8")
    unbiased = whole.var(0, ddof=1) if len(whole) > 1 else np.zeros(3)
    assert_moved(training.state, 0.1 * whole.mean(0), 0.9 + 0.1 * unbiased)
    # Normalization itself is by the biased one, as everywhere.
    normalized = (whole - whole.mean(0)) / np.sqrt(whole.var(0) + 1e-3)
    assert_close("outputs", np.concatenate(y), normalized, 5e-6)


def test_unbiased_by_a_sum_of_weights_of_about_one_does_not_explode():
    """n − 1 of normalized weights is a rounding; Bessel's correction is for counts."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(32, 3)).astype("f4")
    weights = rng.random(32).astype("f4")
    layer = SyncBatchNormalization(momentum=0.0, unbiased_moving_variance=True)
    layer(x, training=True, weights=weights / weights.sum())
    mean = np.average(x.astype("f8"), axis=0, weights=weights)
    biased = np.average((x - mean) ** 2, axis=0, weights=weights)
    assert_close("moving variance", numbers(layer.moving_variance), biased, 2e-6)


def test_without_the_argument_the_moving_variance_is_biased_as_keras_s():
    layers = [SyncBatchNormalization(), keras.layers.BatchNormalization()]
    for layer in layers:
        layer(batches((5,), 1)[0][0], training=True)
    own, its = ({name_of(w): numbers(w) for w in layer.weights} for layer in layers)
    assert_moved(own, its["moving_mean"], its["moving_variance"])


@pytest.mark.parametrize("momentum", [0.9, None])
def test_every_call_of_a_shared_layer_counts_in_order(momentum):
    """Siamese branches: the second call moves what the first has moved."""
    layer = SyncBatchNormalization(momentum=momentum)
    ((part,),) = batches((9,), 1)
    for shift in (0.0, 5.0, -2.0):
        layer(part * np.float32(1 + shift) + np.float32(shift), training=True)
    mean, variance = np.zeros(3), np.ones(3)
    for number, shift in enumerate((0.0, 5.0, -2.0)):
        keep = number / (number + 1) if momentum is None else momentum
        branch = part.astype("f8") * (1 + shift) + shift
        mean = oracle.moved(mean, branch.mean(0), keep)
        variance = oracle.moved(variance, branch.var(0), keep)
    assert_moved({name_of(w): numbers(w) for w in layer.weights}, mean, variance)


@pytest.mark.parametrize("momentum", [0.9, None])
def test_renormalization_over_steps_on_replicas_is_that_of_one_device(momentum):
    """Its corrections come from its own moving statistics, which the steps before have moved."""
    clipping = {"rmax": 1.5, "rmin": 0.6, "dmax": 0.8}
    options = {"renorm": True, "renorm_clipping": clipping, "renorm_momentum": 0.7}
    training, expected = Training(momentum, **options), Renormalized(momentum, clipping)
    for parts in batches((7, 0, 4), 3):
        outputs = training.step(parts).outputs
        its = expected.step(np.concatenate(parts).astype("f8"), renorm_momentum=0.7)
        assert_close("outputs", np.concatenate(outputs), its, 5e-6)
    assert_close("renorm mean", training.state["renorm_mean"], expected.mean, 2e-6)
    assert_close("renorm deviation", training.state["renorm_stddev"], expected.stddev, 2e-6)
    assert_close("deviation", training.state["moving_stddev"], expected.moving_stddev, 2e-6)
    assert_moved(training.state, expected.moving_mean, expected.moving_stddev**2 - 1e-3)


class Renormalized:
    """Batch renormalization over several steps on one device, in float64."""

    def __init__(self, momentum, clipping):
        self.momentum, self.clipping, self.steps = momentum, clipping, 0
        self.mean, self.stddev = np.zeros(3), np.ones(3)
        self.moving_mean, self.moving_stddev = np.zeros(3), np.ones(3)

    def step(self, x, renorm_momentum):
        renorm = oracle.Renorm(self.mean, self.stddev, **self.clipping)
        ones, zeros = np.ones(3), np.zeros(3)
        result = oracle.batch_normalization([x], [x], -1, ones, zeros, 1e-3, renorm=renorm)
        stddev = np.sqrt(result.variance + 1e-3)
        keep = self.steps / (self.steps + 1) if self.momentum is None else self.momentum
        self.steps += 1
        self.mean = oracle.moved(self.mean, result.mean, renorm_momentum)
        self.stddev = oracle.moved(self.stddev, stddev, renorm_momentum)
        self.moving_mean = oracle.moved(self.moving_mean, result.mean, keep)
        self.moving_stddev = oracle.moved(self.moving_stddev, stddev, keep)
        return result.outputs[0]


def test_batches_are_counted_beyond_what_a_float_could_count():
    training = Training(momentum=None)
    training.state = {"num_batches_tracked": np.array(2**24)}
    training.step(batches((4,), 1)[0])
    assert int(training.state["num_batches_tracked"]) == 2**24 + 1
