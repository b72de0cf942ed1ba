"""Starts a TFJob's pods as processes here, with the TF_CONFIG that the operator would write.

By `genTFConfigJSONStr` of kubeflow/training-operator: the evaluator is told the cluster and is none
of it. In place of services' names there are ports of this machine, in a network of its own.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys


def configurations(specs: dict[str, int], address) -> dict[str, dict]:
    """TF_CONFIG of each pod, by "chief 0", for so many replicas of each kind."""
    cluster = {
        kind.lower(): [address(kind.lower(), index) for index in range(count)]
        for kind, count in specs.items()
        if kind != "Evaluator"
    }
    return {
        f"{kind.lower()} {index}": {
            "cluster": cluster,
            "task": {"type": kind.lower(), "index": index},
            "environment": "cloud",
        }
        for kind, count in specs.items()
        for index in range(count)
    }


def free_port(*_) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def main() -> int:
    from syncbn.launch import isolation

    specs, command = json.loads(sys.argv[1]), sys.argv[2:]
    if isolation.why_not() is None:
        isolation.enter()
    pods = {}
    for name, config in configurations(specs, free_port).items():
        environment = {**os.environ, "TF_CONFIG": json.dumps(config)}
        pods[name] = subprocess.Popen([sys.executable, *command], env=environment)
    try:
        codes = {name: pod.wait(120) for name, pod in pods.items()}
    finally:
        for pod in pods.values():
            pod.kill()
    print("codes", json.dumps(codes))
    return max(codes.values())


if __name__ == "__main__":
    sys.exit(main())
