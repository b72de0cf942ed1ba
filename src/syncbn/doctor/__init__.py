"""`syncbn doctor`: is synchronized batch normalization available here?

It stands on the standard library alone and imports no framework: what is asked of one is asked in a
process of its own, under a timeout, so that the answer comes where a framework is missing, broken,
or slow.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping

from syncbn.doctor import verdict
from syncbn.doctor.children import Outcome, run_probe
from syncbn.doctor.cluster import read_cluster
from syncbn.doctor.machine import BACKENDS, look
from syncbn.doctor.peers import call_all
from syncbn.doctor.table import LAST_WITH_KERAS_2, Subject, read, version_of
from syncbn.doctor.trouble import of_devices, of_the_end
from syncbn.doctor.verdict import Report
from syncbn.errors import InputError

__all__ = ["Report", "diagnose", "of_versions"]

PATIENCE_WITH_PEERS = 2.0  # seconds


def of_versions(tensorflow: str, keras: str | None = None, legacy: bool = False) -> Report:
    """The answer for these versions, from the table alone.

    Raises:
        InputError: no such numbers, or ones that do not go together.
    """
    subject = Subject.of_versions(tensorflow, keras, legacy)
    return verdict.by_table(subject, read())


def diagnose(
    timeout: float = 180.0,
    backend: str | None = None,
    peers_timeout: float = PATIENCE_WITH_PEERS,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """The answer for this machine, by trying it.

    Args:
        timeout: seconds that the process which tries a framework may take.
        backend: what Keras is to run on; by default what it does here.
        peers_timeout: seconds that each of the other workers has to answer.
        progress: told what is being done.

    Raises:
        InputError: a timeout that is none.
    """
    for name, seconds in (("--timeout", timeout), ("--peers-timeout", peers_timeout)):
        if not 0 < seconds < float("inf"):
            raise InputError(
                f"{name} requires seconds above 0. Received: {seconds!r}. Give another number."
            )
    variables = dict(os.environ)
    if backend is not None:
        variables["KERAS_BACKEND"] = backend
    tell = progress or _silently
    machine = look(variables)
    legacy = machine.legacy and machine.has("tf_keras") and backend in (None, "tensorflow")
    wanted = "tensorflow" if legacy else machine.backend
    outcome = None
    if wanted in BACKENDS and machine.has(wanted):
        # The legacy Keras runs on TensorFlow whatever Keras 3 is to run on.
        asked = {"KERAS_BACKEND": wanted}
        outcome = run_probe(f"on_{wanted}", sys.executable, timeout, tell, asked)
    tell("call the other workers")
    cluster = read_cluster(variables)
    answers, said = call_all(cluster, peers_timeout)
    findings = [*machine.findings, *cluster.findings, *said]
    if outcome is not None:
        findings += [*of_the_end(outcome, wanted), *of_devices(outcome)]
    subject = _subject(wanted, legacy, machine.versions, outcome)
    return verdict.by_trial(subject, read(), machine, wanted, outcome, answers, findings)


def _silently(_doing: str) -> None:
    """For who does not want to know."""


def _subject(
    backend: str, legacy: bool, versions: Mapping[str, str | None], outcome: Outcome | None
) -> Subject:
    """What the table is to be asked about: as it says itself, or else as it is installed."""
    seen = {} if outcome is None else dict(outcome.every("version"))
    tensorflow = _known(seen.get("tensorflow") or versions.get("tensorflow"))
    keras = _known(seen.get("keras") or versions.get("keras"))
    if backend != "tensorflow":
        return Subject("keras", backend, None, keras)
    if legacy:
        return Subject("tf_keras", "tensorflow", tensorflow)
    if tensorflow is not None and tensorflow <= LAST_WITH_KERAS_2:
        return Subject("tf.keras", "tensorflow", tensorflow)
    return Subject("keras", "tensorflow", tensorflow, keras)


def _known(version: str | None) -> tuple[int, int] | None:
    """The minor version; None where a package says none that can be read."""
    try:
        return None if version is None else version_of(version, "a package")
    except InputError:
        return None
