"""Verifies the models of `acquitted` over and over: seeds, dtypes, replicas; how near is conviction?

python -m tests.verified.matrix --seeds 5 --dtypes float32 mixed_bfloat16 --replicas 2 3 4
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np

import syncbn
from syncbn._backends.tensorflow.replicas import make_virtual_devices
from syncbn.verification.verdict import Kind
from tests.verified.acquitted import CASES, Case


def verified(
    case: Case, seed: int, replicas: int = 2, dtype: str = "float32", repair: bool = True
) -> Any:
    """The verdict: with a ragged last batch where Keras is repaired, else with full batches."""
    keras.config.set_dtype_policy(dtype)
    keras.config.set_floatx("float64" if dtype == "float64" else "float32")
    size = {2: 8, 3: 9, 4: 8}[replicas]
    # The last batch: one example, so that replicas are empty, or an uneven number.
    examples = 3 * size + ((1, 5, size - 1)[seed % 3] if repair else 0)
    try:
        keras.utils.set_random_seed(seed)
        return syncbn.verify(
            case.build,
            case.data(examples, np.random.default_rng(seed)),
            replicas,
            batch_size=size,
            repair=repair,
        )
    finally:
        keras.config.set_dtype_policy("float32")
        keras.config.set_floatx("float32")


def margins(verdict: Any) -> Iterator[str]:
    """For each kind the comparison that is nearest to conviction, or furthest beyond it."""
    for kind in Kind:
        worst = verdict.worst(kind)
        if worst is not None and worst.excess > 0:
            yield (
                f"{kind.name.lower()} {worst.excess:.2g} ({worst.difference:.1e}/"
                f"{worst.tolerance:.1e} {worst.name} {worst.step})"
            )


def main() -> int:
    """All that is asked for; 1 if a verdict was not "agrees"."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--replicas", type=int, nargs="+", default=[2])
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--without", nargs="+", default=())
    parser.add_argument("--plain", action="store_true", help="without the repair, full batches")
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    make_virtual_devices(4)
    wrong = 0
    largest: dict[str, float] = {}
    runs = 0
    for name, case in CASES.items():
        if (arguments.only and name not in arguments.only) or name in arguments.without:
            continue
        if arguments.plain and case.needs_repair:
            continue
        for dtype in arguments.dtypes:
            for replicas in arguments.replicas:
                for seed in arguments.seeds:
                    start = time.perf_counter()
                    runs += 1
                    label = f"{name} {dtype} {replicas} {seed}"
                    try:
                        verdict = verified(case, seed, replicas, dtype, not arguments.plain)
                    except Exception as error:  # noqa: BLE001 - the rest is to run
                        wrong += 1
                        print(f"FAIL {label}: {type(error).__name__} {str(error)[:600]}")
                        continue
                    seconds = time.perf_counter() - start
                    good = verdict.agrees
                    wrong += not good
                    said = "ok  " if good else "BAD "
                    if not good or arguments.verbose:
                        print(said, label, f"{seconds:.1f} s", verdict.summary)
                        print("      ", "; ".join(margins(verdict)))
                        for finding in verdict.findings:
                            print("      ", finding.cause.value, finding.layer, finding.evidence)
                        for note in verdict.notes:
                            print("       note:", note)
                    for one in verdict.comparisons:
                        key = f"{dtype} {one.kind.name.lower()}"
                        if np.isfinite(one.excess):
                            largest[key] = max(largest.get(key, 0.0), one.excess)
                    sys.stdout.flush()
    print(f"{runs} verifications, {wrong} not acquitted")
    for key, excess in sorted(largest.items()):
        print(f"  {key:40} {excess:.3g}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
