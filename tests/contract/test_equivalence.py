"""Contract 1: any split of the global batch gives what one device gives on all of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from keras import ops
from tests.harness import (
    RANKS_AND_AXES,
    assert_close,
    assert_equals_one_device,
    assert_statistics,
    make_case,
    numbers,
    observe,
)
from tests.which_keras import SyncBatchNormalization

TOLERANCE = {"float64": 1e-11, "float32": 2e-6}

# Parts of the batch by replica. Every split holds different data on every replica.
SPLITS = {
    "equal": (32, 32),
    "uneven": (33, 32),
    "one against many": (64, 1),
    "one replica empty": (40, 0),
    "first replica empty": (0, 40),
    "four": (7, 0, 20, 1),
    "eight": (5, 4, 3, 2, 1, 0, 9, 8),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_any_split_of_the_batch_gives_what_one_device_gives(split, dtype):
    case = make_case([(size, 6, 5, 4) for size in split], dtype=dtype)
    assert_equals_one_device(case, observe(case), TOLERANCE[dtype])


@pytest.mark.parametrize("split", [(33, 32), (40, 0)], ids=["uneven", "one replica empty"])
def test_without_compilation_the_result_is_the_same(split):
    case = make_case([(size, 6) for size in split])
    assert_equals_one_device(case, observe(case, mode="eager"), TOLERANCE["float32"])


@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_device_alone(dtype, mode):
    case = make_case([(40, 6, 3)], dtype=dtype)
    assert_equals_one_device(case, observe(case, mode=mode), TOLERANCE[dtype])


@pytest.mark.parametrize(("shape", "axis"), RANKS_AND_AXES)
def test_any_rank_and_axis(shape, axis):
    case = make_case([(9, *shape), (4, *shape)], axis=axis)
    assert_equals_one_device(case, observe(case), TOLERANCE["float32"])


def test_spatial_sizes_may_differ_between_replicas():
    case = make_case([(2, 9, 7, 3), (3, 4, 5, 3)])
    assert_equals_one_device(case, observe(case), TOLERANCE["float32"])


def test_channels_that_are_not_last_on_a_replica_without_elements():
    case = make_case([(0, 3, 4, 5), (6, 3, 4, 5)], axis=1)
    assert_equals_one_device(case, observe(case), TOLERANCE["float32"])


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool"])
def test_integers_are_normalized_as_the_numbers_they_are(dtype):
    x = np.array([[1, 0], [0, 1], [1, 1]], dtype)
    layer = SyncBatchNormalization()
    expected = (x.astype("f8") - x.mean(0)) / np.sqrt(x.astype("f8").var(0) + 1e-3)
    assert_close("outputs", numbers(layer(x, training=True)), expected, 2e-6)


@pytest.mark.parametrize(("center", "scale"), [(False, True), (True, False), (False, False)])
def test_without_beta_or_gamma(center, scale):
    case = make_case([(33, 5), (32, 5)])
    case = case._replace(
        beta=case.beta if center else np.zeros(5), gamma=case.gamma if scale else np.ones(5)
    )
    observed = observe(case, center=center, scale=scale)
    expected = case.expected()
    # Without the weight there is no gradient of it to compare.
    if not scale:
        observed = observed._replace(gamma_gradients=[expected.gamma_gradient])
    if not center:
        observed = observed._replace(beta_gradients=[expected.beta_gradient])
    assert_equals_one_device(case, observed, TOLERANCE["float32"])


def test_inputs_of_rank_one_are_one_element_a_channel():
    layer = SyncBatchNormalization(momentum=0.0)
    layer.build((3,))
    y = layer.call(ops.convert_to_tensor([1.0, 2.0, 3.0]), training=True)
    np.testing.assert_array_equal(numbers(y), [0] * 3)
    np.testing.assert_array_equal(numbers(layer.moving_mean), [1.0, 2.0, 3.0])


@pytest.mark.parametrize("split", [(1, 0), (1, 1), (0, 2)])
def test_one_or_two_elements_in_all(split):
    # Two elements normalize to ±1 whatever they are: float64, as dx is a thousandth of its terms.
    case = make_case([(size, 4) for size in split], dtype="float64")
    assert_equals_one_device(case, observe(case), 1e-9)


def test_globally_empty_batch_leaves_the_moving_statistics_untouched():
    case = make_case([(0, 4), (0, 4)])
    assert_equals_one_device(case, observe(case), 0.0)


def test_empty_batch_on_one_device_leaves_the_moving_statistics_untouched():
    case = make_case([(0, 3, 4)])
    assert_equals_one_device(case, observe(case), 0.0)


@st.composite
def cases(draw):
    dtype = draw(st.sampled_from(["float32", "float64", "float16", "bfloat16"]))
    rank = draw(st.integers(2, 5))
    axis = draw(st.integers(1, rank - 1))
    sizes = [draw(st.integers(1, 4)) for _ in range(rank - 1)]
    sizes[axis - 1] = draw(st.integers(3, 8))
    # Enough elements that dx is not all cancellation, and not all of them on one replica.
    counts = draw(st.lists(st.integers(0, 40), min_size=2, max_size=4).filter(enough))
    # In half precision a large mean leaves no digits of the deviations in the input itself.
    offsets = [0.0, 3.0, -1.0] if dtype.endswith("16") else [0.0, 3.0, -1.0, 1e3]
    return make_case(
        [(count, *sizes) for count in counts],
        axis=axis - rank if draw(st.booleans()) else axis,
        dtype=dtype,
        offset=draw(st.sampled_from(offsets)),
        seed=draw(st.integers(0, 2**16)),
    )


def enough(counts):
    return sum(counts) >= 16


@given(cases())
def test_property_replicas_equal_one_device(case):
    dtype = case.parts[0].dtype.name
    if dtype.endswith("16"):
        observed = observe(case, dtype=f"mixed_{dtype}")
        # Rounded to the input's dtype at the end, and nowhere before.
        assert_equals_one_device(case, observed, {"float16": 2e-3, "bfloat16": 1.6e-2}[dtype])
        assert_statistics(case, observed, TOLERANCE["float32"])
        return
    # Whatever the mean is, to float32; in float64 mean² costs the digits that it is larger than 1.
    large = dtype == "float64" and abs(np.concatenate([p.ravel() for p in case.parts]).mean()) > 100
    assert_equals_one_device(case, observe(case), 1e-8 if large else TOLERANCE[dtype])
