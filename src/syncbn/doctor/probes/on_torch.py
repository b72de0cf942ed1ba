"""torch: its devices, and a step of each batch normalization in two processes of a group."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from syncbn.doctor.probes.start import Case, Probe

CHANNELS = 4
_PATIENCE = datetime.timedelta(seconds=60)


def main(probe: Probe, arguments: list[str]) -> None:
    """All of it; as the first process without arguments, as the second with ["second", STORE]."""
    second = arguments[:1] == ["second"]
    probe.doing("import torch")
    import torch

    probe.found(version=["torch", torch.__version__])
    probe.doing("list devices")
    gpus = torch.cuda.device_count()
    on_gpus = gpus > 1
    backend = "nccl" if on_gpus and torch.distributed.is_nccl_available() else "gloo"
    probe.found(
        devices=[torch.cuda.get_device_name(i) for i in range(gpus)] or ["CPU"],
        gpus=gpus,
        replicas=f"2 processes, {'a GPU each' if on_gpus else 'on the CPU'}",
        collectives=backend.upper() if backend == "nccl" else backend,
        xla="not of torch; Keras's jit_compile=True means torch.compile here",
    )
    store = arguments[1] if second else _start_second()
    if backend == "gloo":
        os.environ["KERAS_TORCH_DEVICE"] = "cpu"
        if sys.platform == "linux":
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    probe.doing("meet the other process")
    torch.distributed.init_process_group(
        backend, init_method=f"file://{store}", rank=int(second), world_size=2, timeout=_PATIENCE
    )
    try:
        if backend == "nccl":
            torch.cuda.set_device(int(second))
        _layers(probe, torch, int(second))
    finally:
        torch.distributed.destroy_process_group()


def _start_second() -> str:
    """Start the other process, of this one's group, and say where they meet."""
    start, name, records, path, seconds = sys.argv[:5]
    store = str(Path(records).resolve()) + ".store"
    command = [sys.executable, start, name, records + ".second", path, seconds, "second", store]
    subprocess.Popen(command, stdin=subprocess.DEVNULL)
    return store


def _layers(probe: Probe, torch: Any, rank: int) -> None:
    probe.doing("import Keras")
    import keras

    backend = keras.backend.backend()
    probe.found(keras="keras", version=["keras", keras.__version__], backend=backend)
    normal = keras.layers.BatchNormalization
    kinds: list[tuple[str, str, Callable[..., Any]]] = [
        ("plain", "BatchNormalization()", normal),
        ("native", "BatchNormalization(synchronized=True)", partial(normal, synchronized=True)),
    ]
    probe.doing("import syncbn")
    ours = probe.attempt("syncbn", _ours)
    if ours is not None:
        kinds.append(("ours", "syncbn.SyncBatchNormalization()", ours))
    for role, name, make in kinds:
        probe.doing(f"make {name}")
        if probe.attempt(name, make) is None:
            continue
        probe.found(layer={"name": name, "role": role})
        for case in probe.cases():
            probe.measure(name, case, partial(_step, torch, keras, make, rank))


def _ours() -> Any:
    import syncbn

    return syncbn.SyncBatchNormalization


def _step(torch: Any, keras: Any, make: Callable[..., Any], rank: int, case: Case) -> Any:
    """Each process with its part; the first learns what came of the second's."""
    everyone: list[Any] = [None, None]
    try:
        own: Any = _of_this_process(keras, make, case, rank)
    except Exception as error:  # noqa: BLE001 - the other, who waits, hears of it
        own = error
    torch.distributed.all_gather_object(everyone, own)
    for one in everyone:
        if isinstance(one, Exception):
            raise one
    outputs, copies = zip(*everyone)  # noqa: B905 - Python 3.7 has no `strict`
    return {"outputs": outputs, "copies": copies, "read": copies[0]}


def _of_this_process(
    keras: Any, make: Callable[..., Any], case: Case, rank: int
) -> tuple[Any, Any]:
    layer = make(momentum=0.5)
    layer.build((None, None, CHANNELS))
    mask = None if case.masks is None else keras.ops.convert_to_tensor(case.masks[rank])
    outputs = layer(keras.ops.convert_to_tensor(case.parts[rank]), training=True, mask=mask)
    return (
        keras.ops.convert_to_numpy(outputs),
        keras.ops.convert_to_numpy(layer.moving_mean).tolist(),
    )
