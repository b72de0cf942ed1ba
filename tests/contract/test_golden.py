"""The golden vectors: one file of numbers, which every backend gives, and so all the same."""

import functools

import numpy as np
import pytest
from tests.golden.file import FILE, arrays, read
from tests.harness import assert_close, dtype_of, observe

VECTORS = read()

TOLERANCE = {"float64": 1e-11, "float32": 2e-6}
# Without float64, on JAX, a mean of 1000 leaves fewer digits; one that is rounded leaves 3e-5.
AT_A_LARGE_MEAN = 2e-5


@functools.cache
def observed(name, dtype):
    case = VECTORS[name].case
    cast = {
        field: values and [value.astype(dtype) for value in values]
        for field, values in case._asdict().items()
        if field in ("parts", "cotangents", "weights")
    }
    return observe(case._replace(**cast))


def assert_golden(vectors, found, tolerance):
    """Every number of the file but those that are NaN in it: what is masked has no output."""

    def joined(replicas):
        return np.concatenate([np.asarray(array, np.float64).ravel() for array in replicas])

    claimed = ~np.isnan(joined(vectors.outputs))
    its = joined(vectors.outputs)[claimed]
    assert_close("outputs", joined(found.outputs)[claimed], its, tolerance)
    its = joined(vectors.input_gradients)
    assert_close("input gradients", joined(found.input_gradients), its, tolerance)
    for name in ("gamma", "beta"):
        summed = np.sum(np.asarray(getattr(found, f"{name}_gradients"), np.float64), axis=0)
        assert_close(name, summed, getattr(vectors, f"{name}_gradient"), tolerance)
    for name in ("mean", "variance"):
        copies = getattr(found, f"moving_{name}s")
        assert len({copy.tobytes() for copy in copies}) == 1, f"{name} differs between replicas"
        assert_close(name, copies[0], getattr(vectors, f"moving_{name}"), tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", VECTORS)
def test_this_backend_gives_the_golden_vectors(name, dtype):
    large = name == "large mean" and dtype == "float32"
    tolerance = AT_A_LARGE_MEAN if large else TOLERANCE[dtype]
    assert_golden(VECTORS[name], observed(name, dtype), tolerance)


# Outputs and input gradients are rounded to it at the end, and nothing is before.
HALF = {"float16": 2e-3, "bfloat16": 1.6e-2}


@pytest.mark.parametrize("dtype", HALF)
def test_this_backend_gives_the_golden_vectors_in_half_precision(dtype):
    vectors = VECTORS["half precision"]
    parts, cotangents = (
        [array.astype(dtype_of(dtype)) for array in arrays]
        for arrays in (vectors.case.parts, vectors.case.cotangents)
    )
    for narrow, wide in zip(parts, vectors.case.parts, strict=True):
        np.testing.assert_array_equal(narrow.astype(np.float64), wide)
    case = vectors.case._replace(parts=parts, cotangents=cotangents)
    found = observe(case, dtype=f"mixed_{dtype}")
    assert_golden(vectors, found, HALF[dtype])
    # The weights of a mixed policy are float32, and all that becomes of them.
    exact = {name: getattr(vectors, name) for name in ("outputs", "input_gradients")}
    assert_golden(vectors, found._replace(**exact), TOLERANCE["float32"])


PERTURBED = [f for f in type(VECTORS["uneven"])._fields if f not in ("case", "mean", "variance")]


@pytest.mark.parametrize("field", PERTURBED)
@pytest.mark.parametrize("name", ["uneven", "mask over garbage"])
def test_a_golden_number_that_is_a_little_off_is_noticed(name, field):
    value = getattr(VECTORS[name], field)
    array = (value[-1] if isinstance(value, list) else value).copy()
    array[tuple(np.argwhere(~np.isnan(array))[0])] += 1e-9
    off = [*value[:-1], array] if isinstance(value, list) else array
    with pytest.raises(AssertionError, match="off by"):
        assert_golden(
            VECTORS[name]._replace(**{field: off}), observed(name, "float64"), TOLERANCE["float64"]
        )


def test_the_file_is_what_the_script_writes():
    now = arrays()
    assert FILE.stat().st_size < 300_000
    with np.load(FILE) as stored:
        assert stored.files == list(now)
        for name, array in now.items():
            assert stored[name].dtype == array.dtype
            # NumPy may add in another order on another processor.
            if array.dtype.kind == "f":
                np.testing.assert_allclose(stored[name], array, rtol=1e-12, atol=1e-13)
            else:
                np.testing.assert_array_equal(stored[name], array)
