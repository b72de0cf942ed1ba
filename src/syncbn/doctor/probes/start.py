"""`python start.py PROBE RECORDS PATH SECONDS`: runs one probe, and writes down what it finds.

RECORDS is a file of lines, each a JSON object: {"doing": …} before a piece of work, {"found": …}
behind it. So whoever waits knows what was found, and what was being done when the process ended,
was killed, or took too long. PATH is where syncbn lies; looked at behind all others. After SECONDS
the process ends itself, should nobody be left to end it.
"""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

EPSILON = 1e-3
MOMENTUM = 0.5
CHANNELS = 4
TOLERANCES = {"large mean": 2e-2}
TOLERANCE = 1e-3


class Case(NamedTuple):
    """Data of two replicas; the masks, True where an element counts, or None."""

    name: str
    parts: list[Any]
    masks: list[Any] | None = None


class Probe:
    """What a probe is given: where to write, the data, and the judgement of what came out."""

    def __init__(self, path: str) -> None:
        self._path = path

    def doing(self, what: str) -> None:
        """Say what comes next."""
        self._write({"doing": what})

    def found(self, **values: Any) -> None:
        """Write a finding down."""
        self._write({"found": values})

    def _write(self, record: dict[str, Any]) -> None:
        with Path(self._path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def cases(self, equal_parts: bool = False) -> list[Case]:
        """What each layer is tried with; only parts of one shape where a framework has no others.

        The replicas' means lie 10 apart, so that local statistics are no rounding.
        """
        import numpy as np

        rng = np.random.default_rng(0) if hasattr(np.random, "default_rng") else np.random

        def part(shape: tuple[int, ...], mean: float) -> Any:
            return (rng.normal(size=(*shape, CHANNELS)) + mean).astype(np.float32)

        shapes = [(6, 5), (6, 5)] if equal_parts else [(6, 5), (3, 2)]
        whole = [part((6, 5), 10.0 * replica) for replica in range(2)]
        masks = [np.arange(30).reshape(6, 5) % 3 > 0, np.arange(30).reshape(6, 5) % 5 == 0]
        cases = [Case("equal parts", whole)]
        if not equal_parts:
            unequal = [part(shape, 10.0 * replica) for replica, shape in enumerate(shapes)]
            cases.append(Case("unequal parts", unequal))
        return [
            *cases,
            Case("masked", whole, masks),
            Case("large mean", [part((6, 5), 1e4 + replica) for replica in range(2)]),
        ]

    def measure(self, layer: str, case: Case, run: Callable[[Case], dict[str, Any]]) -> None:
        """Run a layer on a case and write down by which statistics it normalized.

        Args:
            layer: what it is called.
            case: the data.
            run: gives `outputs`, one a replica, and perhaps `copies` of the moving mean, one a
                replica, and what is `read`, which is what would be saved.
        """
        self.doing(f"{layer}, {case.name}")
        try:
            seen = run(case)
        except Exception as error:  # noqa: BLE001 - whatever a framework raises is it
            self.found(measured={"layer": layer, "case": case.name, "failed": one_line(error)})
            return
        self.found(measured={"layer": layer, "case": case.name, **judge(case, seen)})

    def attempt(self, what: str, act: Callable[[], Any]) -> Any:
        """What the function gives; None, and its error written down as `refused`, if it raises."""
        try:
            return act()
        except Exception as error:  # noqa: BLE001 - whatever a framework raises is it
            self.found(refused={"layer": what, "because": one_line(error)})
            return None


def judge(case: Case, seen: dict[str, Any]) -> dict[str, Any]:
    """By which statistics the outputs are normalized, and how far they are from the global ones.

    `by` is the nearest of: "global", "local", the same with "mask ignored", and "neither" where
    they are near to none.
    """
    import numpy as np

    everything = [np.ones(part.shape[:-1], bool) for part in case.parts]
    ways = [("", case.masks or everything)]
    if case.masks is not None:
        ways.append((", mask ignored", everything))
    errors = {}
    for suffix, masks in ways:
        merged = _mean_and_variance(case.parts, masks)
        alone = [
            _mean_and_variance([part], [mask])
            for part, mask in zip(case.parts, masks)  # noqa: B905 - Python 3.7 has no `strict`
        ]
        errors["global" + suffix] = _error(case, seen["outputs"], [merged] * len(case.parts))
        errors["local" + suffix] = _error(case, seen["outputs"], alone)
    tolerance = TOLERANCES.get(case.name, TOLERANCE)
    nearest = min(errors, key=lambda by: errors[by])
    result = {
        "by": nearest if errors[nearest] <= tolerance else "neither",
        "error": _finite(errors["global"]),
        "tolerance": tolerance,
    }
    if "copies" in seen:
        expected = (1 - MOMENTUM) * _mean_and_variance(case.parts, ways[0][1])[0]
        copies = np.array(seen["copies"], np.float64)
        result["moving_spread"] = _finite(np.abs(copies - copies[:1]).max())
        result["moving_read_error"] = _finite(np.abs(np.array(seen["read"]) - expected).max())
    return result


def _mean_and_variance(parts: list[Any], masks: list[Any]) -> Any:
    """In float64, over the elements of all of the parts that their masks let through."""
    import numpy as np

    kept = np.concatenate(
        [
            part.astype(np.float64)[mask]
            for part, mask in zip(parts, masks)  # noqa: B905 - Python 3.7 has no `strict`
        ]
    )
    return kept.mean(axis=0), kept.var(axis=0)


def _error(case: Case, outputs: list[Any], statistics: list[Any]) -> float:
    """The largest distance of an output that counts; infinite where one is NaN."""
    import numpy as np

    worst = 0.0
    masks = case.masks or [np.ones(part.shape[:-1], bool) for part in case.parts]
    for part, mask, output, (mean, variance) in zip(  # noqa: B905 - Python 3.7 has no `strict`
        case.parts, masks, outputs, statistics
    ):
        expected = (part.astype(np.float64) - mean) / np.sqrt(variance + EPSILON)
        distance = np.abs(np.asarray(output, np.float64) - expected)[mask].max()
        worst = max(worst, float(distance) if np.isfinite(distance) else float("inf"))
    return worst


def _finite(value: Any) -> float | None:
    """The number; None, which JSON has, where it is NaN or infinite."""
    value = float(value)
    return value if abs(value) < float("inf") else None


def one_line(error: BaseException) -> str:
    """The type of an error and its first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__


def main(arguments: list[str]) -> None:
    """Load the probe by its path: nothing of this folder is to lie on the path of modules."""
    name, records, syncbn_lies_in, seconds = arguments[:4]
    if hasattr(signal, "alarm"):
        # By its default SIGALRM ends a process in whatever C++ code it hangs.
        signal.alarm(int(float(seconds)) + 5)
    folder = Path(__file__).resolve().parent
    if Path(sys.path[0]).resolve() == folder:
        del sys.path[0]
    if syncbn_lies_in and syncbn_lies_in not in sys.path:
        sys.path.append(syncbn_lies_in)
    specification = importlib.util.spec_from_file_location(
        "doctor_" + name, str(folder / (name + ".py"))
    )
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.main(Probe(records), arguments[4:])


if __name__ == "__main__":
    main(sys.argv[1:])
