"""What the golden vectors are of: inputs by a fixed seed, expected values by the oracle alone.

Inputs, cotangents, weights, gamma and beta are float32 numbers, so that float32 and float64 are
asked the same thing. Where an input is masked it is garbage in the file; what comes out there is
not claimed, and is NaN among the expected outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from tests.harness import Case, expected_statistics, make_case

SEED = 20160


class Vectors(NamedTuple):
    """A step, and everything that it must give."""

    case: Case
    outputs: list[np.ndarray]  # one a replica
    input_gradients: list[np.ndarray]  # one a replica
    gamma_gradient: np.ndarray  # (C,), the sum over replicas, as the next
    beta_gradient: np.ndarray  # (C,)
    mean: np.ndarray  # (C,), of the batch: the union of all replicas
    variance: np.ndarray  # (C,), biased
    moving_mean: np.ndarray  # (C,), of a new layer after the step
    moving_variance: np.ndarray  # (C,)


def cases() -> dict[str, Case]:
    """By name, in the order of the file."""
    rng = np.random.default_rng(SEED)

    def of(*sizes: int, shape: tuple[int, ...] = (4, 5), **arguments: Any) -> Case:
        seed = int(rng.integers(2**31))
        return make_case([(size, *shape) for size in sizes], seed=seed, **arguments)

    large = of(24, 9, offset=1e3)
    masked = of(6, 7, shape=(4, 5, 3))
    masks = [rng.random(part.shape[:-1]) > 0.4 for part in masked.parts]
    weighted = of(6, 8, shape=(3, 5))
    weights = [
        (rng.random(part.shape[:-1]) * rng.choice([0, 1, 4], part.shape[:-1])).astype("f4")
        for part in weighted.parts
    ]
    clipping = {"rmin": 0.9, "rmax": 1.02, "dmax": 0.05}
    return {
        "uneven": of(7, 4, shape=(3, 4, 5)),
        "empty replica": of(9, 0, 4),
        "large mean": large._replace(parts=[part + 3 * r for r, part in enumerate(large.parts)]),
        "mask over garbage": masked._replace(masks=masks),
        "fractional weights": weighted._replace(weights=weights),
        "groups": of(5, 4, 6, 3)._replace(options={"group_assignment": [[0, 3], [2, 1]]}),
        "renorm clipped": of(8, 5)._replace(options={"renorm": True, "renorm_clipping": clipping}),
        "virtual batches": of(9, 6)._replace(options={"virtual_batch_size": 4}),
        "axis 1": of(5, 3, shape=(5, 4, 3), axis=1),
        "unbiased and cumulative": of(6, 5)._replace(
            momentum=None, options={"unbiased_moving_variance": True}
        ),
        "silu inside": of(6, 5)._replace(options={"activation": "silu"}),
        "half precision": _in_few_digits(of(7, 6)),
    }


def _in_few_digits(case: Case) -> Case:
    """In 7 bits and a sign: bfloat16 has 8, so that it is asked what float64 is asked."""

    def few(arrays: list[np.ndarray]) -> list[np.ndarray]:
        return [np.clip(np.round(array * 16), -127, 127) / 16 for array in arrays]

    return case._replace(parts=few(case.parts), cotangents=few(case.cotangents))


def vectors_of(case: Case) -> Vectors:
    """What the oracle says of the case, with garbage put in what is masked afterwards."""
    expected = case.expected()
    statistics = expected_statistics(case)
    outputs = expected.outputs
    if case.masks is not None:
        kept = [mask[..., None] for mask in case.masks]
        garbage = np.array([np.nan, np.inf], "f4")
        parts = [
            np.where(own, part, garbage[replica % 2])
            for replica, (own, part) in enumerate(zip(kept, case.parts, strict=True))
        ]
        case = case._replace(parts=parts)
        outputs = [np.where(own, y, np.nan) for own, y in zip(kept, outputs, strict=True)]
    return Vectors(
        case,
        outputs,
        expected.input_gradients,
        expected.gamma_gradient,
        expected.beta_gradient,
        expected.mean,
        expected.variance,
        *statistics,
    )
