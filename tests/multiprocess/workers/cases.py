"""What the workers compute and the test expects, by name: data and features, and the mode."""

from __future__ import annotations

import numpy as np

from tests.harness import Case, make_case


def weighted(case: Case) -> Case:
    """With a mask, that of the second worker all False, and fractional weights."""
    rng = np.random.default_rng(1)
    masks = [rng.random(part.shape[:-1]) > 0.4 for part in case.parts]
    masks[1][:] = False
    weights = [rng.random(len(part)).astype(part.dtype) for part in case.parts]
    return case._replace(masks=masks, weights=weights)


CASES: dict[str, tuple[Case, str]] = {
    "uneven": (make_case([(33, 4), (32, 4)]), "graph"),
    "empty": (make_case([(40, 3, 4), (0, 3, 4)]), "graph"),
    "one against many": (make_case([(64, 4), (1, 4)], dtype="float64"), "graph"),
    "sizes": (make_case([(2, 9, 7, 3), (3, 4, 5, 3)], dtype="float64"), "graph"),
    "eager": (make_case([(9, 4), (4, 4)]), "eager"),
    "weighted": (weighted(make_case([(33, 3, 4), (32, 3, 4)])), "graph"),
    "groups": (
        make_case([(33, 4), (32, 4)])._replace(options={"group_assignment": [[1], [0]]}),
        "graph",
    ),
    "renorm, activation, cumulative, checked": (
        make_case([(33, 4), (32, 4)], dtype="float64")._replace(
            momentum=None, options={"renorm": True, "activation": "relu", "nan_check": True}
        ),
        "graph",
    ),
}

# Collectives of one step on each worker; alone in its group, one has nobody to sum gradients with.
COLLECTIVES = {name: 1 if name == "groups" else 2 for name in CASES}
