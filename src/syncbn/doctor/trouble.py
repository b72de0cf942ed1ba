"""What to do about a framework that did not get through its trial, and about devices it missed."""

from __future__ import annotations

import signal
from pathlib import Path

from syncbn.doctor.children import Outcome
from syncbn.doctor.findings import Finding

__all__ = ["of_devices", "of_the_end"]

_NVIDIA = Path("/proc/driver/nvidia/version")  # there where the driver runs
_PACKAGES = {"tensorflow": "tensorflow", "jax": "jax jaxlib", "torch": "torch"}


def of_the_end(outcome: Outcome, backend: str) -> list[Finding]:
    """What to do where the trial came to no end; nothing where it did."""
    if outcome.ended == "well":
        return []
    if outcome.ended == "timeout":
        do = (
            "Give it longer by --timeout: a package on a slow or remote disk takes its time. A GPU "
            "whose driver does not answer, or a collective that waits for ever, will not end."
        )
    elif outcome.ended == "signal" and outcome.status == signal.SIGILL:
        do = "This build is for a newer CPU than this one: install another build."
    elif outcome.ended == "signal" and outcome.status == signal.SIGKILL:
        do = "As the kernel does where memory runs out: look into its log, and free some memory."
    else:
        do = (
            "Install it anew, best in an environment of its own: pip install --force-reinstall "
            f"{_PACKAGES[backend]}."
        )
    says = outcome.trouble()
    found = [Finding("error", backend, f"{says[0].upper()}{says[1:]}.", do)]
    if len(outcome.complaint) > 1:
        found.append(Finding("note", backend, "Its last words: " + " | ".join(outcome.complaint)))
    return found


def of_devices(outcome: Outcome) -> list[Finding]:
    """GPUs that are there and that it does not see, or only one."""
    gpus = outcome.first("gpus")
    if gpus == 1:
        says = "There is one GPU: the two replicas of the trial were on the CPU."
        return [Finding("note", "devices", says)]
    if gpus == 0 and _NVIDIA.exists():
        says = "The driver of NVIDIA's GPUs runs here, and the framework sees none."
        do = (
            "Install a build for GPUs (tensorflow[and-cuda] in place of tensorflow-cpu, "
            "jax[cuda12], torch of a CUDA index), and look at CUDA_VISIBLE_DEVICES."
        )
        return [Finding("warning", "devices", says, do)]
    return []
