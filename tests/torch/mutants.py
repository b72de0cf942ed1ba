"""Defects put into the torch backend on purpose, as `tests/mutants.py` into TensorFlow's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _never_synchronizes() -> None:
    """Every process sums over itself alone."""
    from syncbn._backends.torch import collectives

    collectives.sum_over_replicas = lambda vector, _: vector


def _local_backward() -> None:
    """The statistics are global, the gradient treats them as local."""
    from syncbn._backends.torch import collectives

    collectives.sum_over_group = lambda vector, *_: vector


def _equal_weights() -> None:
    """A mean of means: every process counts the same, however many elements it has."""
    import torch

    from syncbn._backends.torch import collectives
    from syncbn.moments import Moments

    def exchange(local: Moments, replicas: Any, *_: Any) -> Any:
        variance = local.m2 / local.count.clamp(min=1)
        packed = torch.stack([local.mean, variance + local.mean**2]) / replicas.size
        if replicas.size > 1:
            packed = collectives.sum_over_replicas(packed, replicas)
        mean, square = packed
        count = local.count * replicas.size
        moments = Moments(count, mean, (square - mean**2) * count)
        return collectives.Exchanged(moments, moments, None)

    collectives.exchange = exchange


def _two_collectives() -> None:
    """Right results, by one collective more than the contract allows."""
    from syncbn._backends.torch import collectives

    packed_sum = collectives.sum_over_replicas
    collectives.sum_over_replicas = lambda vector, replicas: packed_sum(
        packed_sum(vector.clone(), replicas) * 0 + vector, replicas
    )


def _mask_is_a_factor() -> None:
    """What is masked is multiplied by 0, which leaves a NaN a NaN."""
    from syncbn._backends.torch import composed

    composed.where_counted = lambda _, x: x


MUTANTS: dict[str, Callable[[], None]] = {
    "equal_weights": _equal_weights,
    "local_backward": _local_backward,
    "mask_is_a_factor": _mask_is_a_factor,
    "never_synchronizes": _never_synchronizes,
    "two_collectives": _two_collectives,
}

FEATURES = "tests/contract/test_features.py::test_a_feature_gives_what_one_device_gives"
COUNT = (
    "tests/torch/test_process_groups.py"
    "::test_one_collective_forward_and_one_backward_none_in_inference"
)
GROUPS = "tests/torch/test_process_groups.py::test_the_processes_of_a_given_group_are_the_replicas"
GARBAGE = (
    "tests/torch/test_gradients.py::test_what_is_in_a_masked_position_changes_nothing_elsewhere"
)

# A few tests a mutant, of those that must notice it; each of them passes without it.
NOTICED_BY: dict[str, list[str]] = {
    "equal_weights": [f"{FEATURES}[relu-uneven-graph]", GROUPS],
    "local_backward": [f"{FEATURES}[silu-uneven-graph]", GROUPS],
    "mask_is_a_factor": [f"{GARBAGE}[sizes0-nan]", f"{GARBAGE}[sizes1-inf]"],
    "never_synchronizes": [f"{FEATURES}[mask-uneven-graph]", GROUPS],
    "two_collectives": [f"{COUNT}[arguments0-backward0]"],
}
