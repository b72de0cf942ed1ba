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

    The model is trained by its own `fit` on one device and on replicas. Each step on the replicas
    starts from the state that one device had before it, and `step(replicas, state_k, batch_k) =
    step(one device, state_k, batch_k)` for every step k: outputs of every layer, loss, gradients,
    weights and moving statistics after the step, metrics, and the bits of these on every replica;
    each batch normalization also against float64 NumPy over its own inputs. Tolerances are by
    dtype, depth and conditioning: `verdict.tolerances`, docs/how-to/verify.md. It runs on
    accelerators where there are enough, else on virtual CPU devices, before anything else makes
    devices.

    Args:
        build_model: returns a new compiled `keras.Model` of the same structure at every call; the
            last time in the scope of the replicas.
        data: x, (x, y) or (x, y, sample_weight): arrays, or structures of arrays, with a row for
            each example, or the path of an .npz file with x (or x_train) and y. The first steps
            take the first rows, the last what an epoch leaves.
        replicas: in one process; at least 2. On torch they are processes.
        steps: of the optimizer, fewer where the data end.
        batch_size: examples of a global batch; by default 32, or all.
        workers: so many processes, each a replica, in place of replicas of this process; then
            build_model must be a function at the top of a module.
        repair: have in the runs what syncbn has for the training: `enable_multi_worker()` on
            TensorFlow, `distribute_dataset` on JAX, `average_gradients` on torch. By default they
            are as this process and build_model are.
        random: False to have dropout, augmentation and the like in inference. By default a second
            verification does so where they depart, and the verdict says both.

    Returns:
        A `Verdict`, to print: `agrees`, `outcome`, `findings` (cause, layer, evidence, remedy).

    Raises:
        InputError: build_model returns no compiled model; data that do not fit it; more replicas
            than examples; too late to make devices.

    References:
        Tolerances grow with the root of the depth, as rounding does: Higham, Mary, "A New Approach
        to Probabilistic Rounding Error Analysis", SIAM J. Sci. Comput. 41(5), 2019.
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
