"""One worker of the selftest: `python -m syncbn.selftest`, on every worker of the cluster."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from typing import Any

from syncbn.errors import InputError, SyncbnError
from syncbn.selftest.checks import Check, Finding, Options, check_steps, lines, selected
from syncbn.selftest.cluster import Cluster

__all__ = ["main"]

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2


def main(arguments: list[str] | None = None) -> None:
    """Run the checks and end the process: 0 only if all passed on all workers."""
    parser = argparse.ArgumentParser(
        prog="python -m syncbn.selftest",
        description="Compare training on this cluster, which TF_CONFIG describes, with NumPy. Run "
        "it on every worker.",
    )
    parser.add_argument("--only", metavar="NAMES", help="checks, by commas; all by default")
    parser.add_argument("--steps", type=int, default=300, metavar="N", help="of the check soak")
    parsed = parser.parse_args(arguments)
    try:
        checks = selected(parsed.only)
        check_steps(parsed.steps)
        cluster = _join()
    except SyncbnError as error:
        sys.stderr.write(f"syncbn selftest: error: {error}\n")
        # Not sys.exit: TensorFlow would wait for those that never came.
        sys.stderr.flush()
        os._exit(EXIT_BAD_INPUT if isinstance(error, InputError) else EXIT_FAILED)
    if cluster.is_chief:
        sys.stdout.write(
            f"syncbn selftest: {cluster.workers} worker(s), {cluster.replicas} replica(s)\n"
        )
    passed = _run_all(cluster, checks, Options(parsed.steps))
    cluster.leave(0 if passed else EXIT_FAILED)


def _join() -> Cluster:
    # Both have to come before anything else of TensorFlow runs.
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import tensorflow as tf

    import syncbn

    tf.get_logger().setLevel("ERROR")  # of functions that are traced anew: each is used once
    syncbn.enable_multi_worker()
    return Cluster()


def _run_all(cluster: Cluster, checks: list[Check], options: Options) -> bool:
    """Whether all passed on all workers. After an error there is no use in going on."""
    passed = True
    for check in checks:
        own = _run(cluster, check, options)
        try:
            everyones = cluster.exchange(f"verdict of {check.name}", own)
        except SyncbnError as error:
            sys.stderr.write(f"worker {cluster.worker}: {check.name}: {error}\n")
            return False
        passed &= _print(cluster, check, everyones)
        if any(verdict["error"] for verdict in everyones):
            return False
    return passed


def _run(cluster: Cluster, check: Check, options: Options) -> dict[str, Any]:
    """This worker's verdict, as JSON."""
    try:
        findings = check.run(cluster, options)
    except Exception as error:  # noqa: BLE001 - whatever it is fails the check, and is shown
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        return {"error": reason, "findings": []}
    for finding in findings:
        if not finding.holds:
            sys.stderr.write(
                f"worker {cluster.worker}: {check.name}: {finding}: not within the bound\n"
            )
    # As text: JSON has no word for a NaN that every reader knows.
    rows = [[f.what, repr(f.figure), f.bound, f.holds] for f in findings]
    return {"error": None, "findings": rows}


def _print(cluster: Cluster, check: Check, everyones: list[dict[str, Any]]) -> bool:
    """The line of one check, by the chief; whether it passed on all workers."""
    rows = [row for verdict in everyones for row in verdict["findings"]]
    passed = bool(rows) and all(row[3] for row in rows)
    passed = passed and not any(verdict["error"] for verdict in everyones)
    if cluster.is_chief:
        cells = []
        for what in dict.fromkeys(row[0] for row in rows):
            same = [row for row in rows if row[0] == what]
            # The worst of the workers: one that fails, or the largest.
            worst = max(same, key=lambda row: (not row[3], float(row[1])))
            cells.append(str(Finding(what, float(worst[1]), worst[2])))
        reasons = [
            f"worker {index}: {verdict['error'][:200]}"
            for index, verdict in enumerate(everyones)
            if verdict["error"]
        ]
        sys.stdout.write(f"{lines(check, cells + reasons, passed)}\n")
        sys.stdout.flush()
    return passed


if __name__ == "__main__":
    main()
