"""What this process is told about other workers, in the terms of each framework."""

from __future__ import annotations

import ipaddress
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from syncbn.doctor.findings import Finding

__all__ = ["Cluster", "read_cluster"]

_LARGEST_PORT = 65535
_JAX = "KERAS_DISTRIBUTION_"
_TORCH = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")


@dataclass(frozen=True)
class Cluster:
    """The others, and what is wrong with how they are named.

    Attributes:
        peers: "host:port" of the others by what they are called, of TensorFlow.
        own: this task's own address, or None.
        meeting: "host:port" of JAX's coordinator or torch's store, by variable.
        findings: what is wrong.
    """

    peers: dict[str, str]
    own: str | None
    meeting: dict[str, str]
    findings: tuple[Finding, ...]


def read_cluster(environment: Mapping[str, str]) -> Cluster:
    """All of it, from the variables."""
    findings: list[Finding] = []
    peers: dict[str, str] = {}
    own = None
    if environment.get("TF_CONFIG", "").strip() not in ("", "{}"):
        peers, own = _tf_config(environment["TF_CONFIG"], findings)
    meeting = _jax(environment, findings) | _torch(environment, findings)
    return Cluster(peers, own, meeting, tuple(findings))


class _ComplaintError(Exception):
    """TF_CONFIG cannot be used: what was required, what was received, what to do."""


def _tf_config(text: str, findings: list[Finding]) -> tuple[dict[str, str], str | None]:
    try:
        tasks, own = _tasks(text)
    except _ComplaintError as complaint:
        says, do = complaint.args
        findings.append(Finding("error", "TF_CONFIG", says, do))
        return {}, None
    addresses = Counter(tasks.values())
    for address, count in addresses.items():
        if count > 1:
            names = ", ".join(name for name, one in tasks.items() if one == address)
            findings.append(
                Finding(
                    "error",
                    "TF_CONFIG",
                    f"{names} have the same address, {address}.",
                    "Give every task an address of its own.",
                )
            )
    wrong = {address: why for address in addresses if (why := _wrong_address(address))}
    for address, why in wrong.items():
        names = ", ".join(name for name, one in tasks.items() if one == address)
        findings.append(
            Finding("error", "TF_CONFIG", f"{names}: {address!r} {why}.", "Write it as host:port.")
        )
    right = [address for address in addresses if address not in wrong]
    loopback = [address for address in right if _is_loopback(address)]
    if loopback and len(loopback) < len(right):
        findings.append(
            Finding(
                "error",
                "TF_CONFIG",
                f"{', '.join(loopback)} is each machine's own: workers elsewhere cannot reach it.",
                "Write the name or address that the other machines know it by.",
            )
        )
    if any(name.startswith("ps ") for name in tasks):
        findings.append(
            Finding(
                "warning",
                "TF_CONFIG",
                "There are parameter servers: under ParameterServerStrategy replicas never meet, "
                "and no layer can synchronize.",
                "Use MultiWorkerMirroredStrategy, without ps.",
            )
        )
    return {n: a for n, a in tasks.items() if n != own and a not in wrong}, tasks.get(own or "")


def _tasks(text: str) -> tuple[dict[str, str], str | None]:
    """Address of each task by its name, "worker 0", and the name of this one."""
    try:
        config = json.loads(text)
    except ValueError as error:
        raise _ComplaintError(f"It is no JSON: {error}.", "Write it with json.dumps.") from error
    if not isinstance(config, dict):
        raise _ComplaintError(f"It requires an object. Received: {_short(config)}.", _EXAMPLE)
    cluster, task = config.get("cluster"), config.get("task")
    if not isinstance(cluster, dict) or not cluster:
        raise _ComplaintError(f"It requires `cluster`. Received: {_short(cluster)}.", _EXAMPLE)
    tasks: dict[str, str] = {}
    for kind, members in cluster.items():
        # TensorFlow also takes an object of numbers and addresses.
        listed = dict(enumerate(members)) if isinstance(members, list) else members
        if not isinstance(listed, dict) or not listed:
            raise _ComplaintError(
                f"cluster.{kind} requires a list of addresses. Received: {_short(members)}.",
                _EXAMPLE,
            )
        tasks |= {f"{kind} {number}": str(address) for number, address in listed.items()}
    if not isinstance(task, dict) or "type" not in task or "index" not in task:
        raise _ComplaintError(
            f"It requires `task`, with `type` and `index`. Received: {_short(task)}.", _EXAMPLE
        )
    try:
        index = int(task["index"])
    except (TypeError, ValueError):
        raise _ComplaintError(
            f"task.index requires a number. Received: {_short(task['index'])}.", _EXAMPLE
        ) from None
    own = f"{task['type']} {index}"
    if task["type"] == "evaluator":  # it is none of the cluster
        return tasks, None
    if own not in tasks:
        raise _ComplaintError(
            f"This task is {own}, which is not in the cluster: {', '.join(tasks)}.",
            "Correct task.type or task.index.",
        )
    return tasks, own


_EXAMPLE = (
    'Write it as {"cluster": {"worker": ["10.0.0.1:4000", "10.0.0.2:4000"]}, '
    '"task": {"type": "worker", "index": 0}}; `syncbn launch` does.'
)


def _wrong_address(address: str) -> str:
    """What is wrong with a host:port, or nothing."""
    host, colon, port = address.rpartition(":")
    if "://" in address:
        return "is a URL, not host:port"
    if not colon or not host.strip("[]"):
        return "has no port" if not colon else "has no host"
    if ":" in host and not (host[0] == "[" and host[-1] == "]"):
        return "is an IPv6 address without brackets, as [fe80::1]:4000"
    if not (port.isascii() and port.isdigit() and 1 <= int(port) <= _LARGEST_PORT):
        return f"has no port from 1 to {_LARGEST_PORT}"
    return ""


def _is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _jax(environment: Mapping[str, str], findings: list[Finding]) -> dict[str, str]:
    """Keras's own variables, as keras.distribution.initialize() reads them."""
    keys = ("JOB_ADDRESSES", "NUM_PROCESSES", "PROCESS_ID")
    values = {key: environment.get(_JAX + key) for key in keys}
    given = {key for key, value in values.items() if value}
    if not given:
        return {}
    for key in keys:
        if key not in given:
            findings.append(
                Finding(
                    "error",
                    _JAX + key,
                    f"It is not set, while {', '.join(_JAX + one for one in sorted(given))} is.",
                    "Set all three, as `syncbn launch` does.",
                )
            )
    _check_place(
        *(_JAX + "PROCESS_ID", values["PROCESS_ID"], _JAX + "NUM_PROCESSES"),
        *(values["NUM_PROCESSES"], findings),
    )
    # Of several addresses the first is the coordinator's.
    address = (values["JOB_ADDRESSES"] or "").split(",")[0].strip()
    return _meeting(_JAX + "JOB_ADDRESSES", address, findings) if address else {}


def _torch(environment: Mapping[str, str], findings: list[Finding]) -> dict[str, str]:
    """The variables of torch.distributed's env://."""
    values = {key: environment.get(key) for key in _TORCH}
    given = [key for key, value in values.items() if value]
    # RANK and WORLD_SIZE alone are other programs' too.
    if not values["MASTER_ADDR"] and not values["MASTER_PORT"]:
        return {}
    for key in _TORCH:
        if key not in given:
            findings.append(
                Finding(
                    "error",
                    key,
                    f"It is not set, while {', '.join(given)} is.",
                    "Set MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE, as `syncbn launch` does.",
                )
            )
    _check_place("RANK", values["RANK"], "WORLD_SIZE", values["WORLD_SIZE"], findings)
    if not values["MASTER_ADDR"] or not values["MASTER_PORT"]:
        return {}
    host = values["MASTER_ADDR"]
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return _meeting("MASTER_ADDR", f"{host}:{values['MASTER_PORT']}", findings)


def _meeting(variable: str, address: str, findings: list[Finding]) -> dict[str, str]:
    if why := _wrong_address(address):
        says = f"{address!r} {why}."
        findings.append(Finding("error", variable, says, "Give a host and a port."))
        return {}
    return {variable: address}


def _check_place(
    rank_name: str,
    rank: str | None,
    size_name: str,
    size: str | None,
    findings: list[Finding],
) -> None:
    """A process's number has to be below that of the processes."""
    numbers = []
    for name, value in ((rank_name, rank), (size_name, size)):
        if not value:
            return
        if not (value.isascii() and value.isdigit()):
            says = f"It requires a number. Received: {value!r}."
            findings.append(Finding("error", name, says, "Set it to a number."))
            return
        numbers.append(int(value))
    if not numbers[0] < numbers[1]:
        findings.append(
            Finding(
                "error",
                rank_name,
                f"It is {numbers[0]}, of {numbers[1]} processes ({size_name}).",
                f"Number the processes from 0 to {numbers[1] - 1}.",
            )
        )


def _short(value: Any) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
