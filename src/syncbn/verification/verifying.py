"""`verify`: the public function, and what it takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from syncbn.errors import InputError
from syncbn.verification.proof import Proof
from syncbn.verification.settings import VerifySettings
from syncbn.verification.verdict import Verdict

__all__ = ["verified", "verify"]


def verify(
    build_model: Callable[[], Any],
    data: Any,
    replicas: int = 2,
    steps: int = 5,
    *,
    batch_size: int | None = None,
    workers: int | None = None,
    repair: bool = False,
    random: bool = True,
) -> Verdict:
    """Whether replicas train your model as one device does, and if not, where and why.

    The model is trained by its own `fit` (its `train_step`, loss, metrics, optimizer) on one device
    and on replicas, on the same global batches. Each step on the replicas starts from the state
    that one device had before that step, so that

        for every step k:  step(replicas, state_k, batch_k) = step(one device, state_k, batch_k)

    is compared, and holds for all steps in a row if it holds for each. Compared are the outputs of
    every layer (all replicas' together), the loss, the gradients that the optimizer applies, the
    weights and moving statistics after the step, whether these are the same bits on every replica,
    and the metrics. Every batch normalization is compared with float64 NumPy over its own inputs as
    well, which says by what statistics it normalized.

    Tolerances: `8 · (ε · √depth + amplified)` relative to the largest value, see
    `verdict.tolerances`. It runs on accelerators where there are as many as replicas, else on
    virtual CPU devices, which must not have been made otherwise before.

    Args:
        build_model: returns a new compiled `keras.Model`, of the same structure at every call.
            Called once on one device and once for the replicas, in their strategy's scope.
        data: x, (x, y) or (x, y, sample_weight): arrays or structures of arrays with a row for each
            example, or the path of an .npz file with x (or x_train) and y. The first steps take
            the first rows, the last takes the last rows, as many as an epoch leaves.
        replicas: in one process; at least 2.
        steps: of the optimizer, fewer where the data end.
        batch_size: examples of a global batch; by default 32, or all.
        workers: so many processes, each a replica, in place of replicas of this process; then
            build_model must be a function at the top of a module. On torch replicas are always
            processes.
        repair: have in the runs what syncbn has for the training: `enable_multi_worker()` on
            TensorFlow, `distribute_dataset` on JAX, `average_gradients` on torch. By default they
            are as this process and build_model are.
        random: train with dropout, augmentation and the like, which no replica draws as one device
            does: where they depart, a second verification has them in inference, and the verdict
            says both. False for the second one alone.

    Returns:
        A `Verdict`: `agrees`, `outcome`, `findings` (cause, layer, evidence, remedy), and all
        comparisons; `print` it.

    Raises:
        InputError: build_model fails or returns no compiled model; data that do not fit it; more
            replicas than examples; too late to make devices.

    References:
        Higham, "Accuracy and Stability of Numerical Algorithms", 2nd edition, SIAM 2002 (rounding
        errors that add up as √depth; conditioning by perturbation).
    """
    settings = VerifySettings(replicas, steps, batch_size, workers, repair, not random)
    return verified(build_model, data, settings, lambda _: None)


def verified(
    build_model: Callable[[], Any],
    data: Any,
    settings: VerifySettings,
    progress: Callable[[str], None],
) -> Verdict:
    """The same by settings, which says what it does now."""
    settings.check()
    if not callable(build_model):
        raise InputError(
            "A model to verify requires a function that returns it. Received: "
            f"{type(build_model).__module__}.{type(build_model).__qualname__}. Give the function "
            "itself, not its result."
        )
    return Proof(build_model, data, settings, progress).verdict()
