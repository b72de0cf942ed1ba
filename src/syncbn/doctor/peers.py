"""Whether the others answer: a TCP connection to each, all at once, for a short time."""

from __future__ import annotations

import socket
import threading
import time

from syncbn.doctor.cluster import Cluster
from syncbn.doctor.findings import Finding

__all__ = ["call", "call_all"]

_FOR_NAMES = 1.0  # seconds more, for looking names up
_UNAUTHENTICATED = (
    "TensorFlow's server runs what anyone sends who can reach it: let a firewall allow these ports "
    "to the workers alone."
)


def call(address: str, seconds: float) -> str:
    """What came of it: "listens", "refused" (nothing listens), or why nobody was reached."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=seconds):
            return "listens"
    except ConnectionRefusedError:
        return "refused"
    except socket.gaierror as error:
        return f"no such host ({error.strerror or error})"
    except TimeoutError:
        return f"no answer within {seconds:g} s"
    except (OSError, UnicodeError) as error:
        return f"cannot be reached ({getattr(error, 'strerror', None) or error})"


def call_all(cluster: Cluster, seconds: float) -> tuple[dict[str, str], list[Finding]]:
    """What came of each address by who is there, and what is to be said of it."""
    targets = dict(cluster.peers)
    if cluster.own is not None:
        targets["this task itself"] = cluster.own
    targets |= cluster.meeting
    if not targets:
        return {}, []
    answers = _answers(targets, seconds)
    findings = []
    for name, answer in answers.items():
        variable = name if name in cluster.meeting else "TF_CONFIG"
        who = "the coordinator" if name in cluster.meeting else name
        findings.append(_said(variable, who, targets[name], answer))
    listening = [
        name
        for name, answer in answers.items()
        if answer == "listens" and name not in cluster.meeting
    ]
    if listening:
        says = f"A server listens: {', '.join(listening)}."
        findings.append(Finding("warning", "TF_CONFIG", says, _UNAUTHENTICATED))
    return {f"{name} ({targets[name]})": answer for name, answer in answers.items()}, findings


def _answers(targets: dict[str, str], seconds: float) -> dict[str, str]:
    """What came of each, all called at once.

    Looking up a name takes no timeout: threads that are still at it are left alone, and end with
    the process.
    """
    answers = dict.fromkeys(targets, f"no answer within {seconds:g} s (its name is not found)")

    def ask(name: str, address: str) -> None:
        answers[name] = call(address, seconds)

    threads = [threading.Thread(target=ask, args=target, daemon=True) for target in targets.items()]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds + _FOR_NAMES
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(answers)


def _said(variable: str, who: str, address: str, answer: str) -> Finding:
    if answer == "listens":
        if who == "this task itself":
            return Finding(
                "warning",
                variable,
                f"Something listens at this task's own address, {address}, already.",
                "If it is no training that runs, end it: the server cannot start there.",
            )
        return Finding("note", variable, f"{who} ({address}) listens.")
    if answer == "refused":
        return Finding(
            "note",
            variable,
            f"{who} ({address}): the machine is there, and nothing listens at that port, as before "
            "training starts.",
        )
    return Finding(
        "error",
        variable,
        f"{who} ({address}): {answer}.",
        "Look at the name, the network and the firewall, from this machine.",
    )
