"""From the steps to the verdict."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import keras
import numpy as np

from syncbn.verification.batches import Batches
from syncbn.verification.causes import Evidence, findings_of
from syncbn.verification.measuring import Measured, Pair, measure
from syncbn.verification.normalizing import Departed, compared
from syncbn.verification.recording import Step, Structure
from syncbn.verification.settings import VerifySettings
from syncbn.verification.steps import OnReplicas, in_words
from syncbn.verification.tolerances import COARSE, TOO_COARSE, Tolerances
from syncbn.verification.verdict import (
    Cause,
    Comparison,
    Finding,
    Kind,
    Layer,
    Outcome,
    Verdict,
)

__all__ = ["Judgement", "cannot_tell"]

_OF_THE_MODEL = frozenset({Cause.NOT_SUMMED, Cause.STATISTICS})


class Judgement:
    """Takes in the steps on replicas, one after another.

    Args:
        structure: of the model on one device.
        tolerances: of its quantities.
        settings: of the verification.
        batches: that were trained on.
        on_replicas: the run.
        hold: whether layers that draw random numbers were in inference.
    """

    def __init__(
        self,
        structure: Structure,
        tolerances: Tolerances,
        settings: VerifySettings,
        batches: Batches,
        on_replicas: OnReplicas,
        hold: bool,
    ) -> None:
        self._structure = structure
        self._tolerances = tolerances
        self._settings = settings
        self._batches = batches
        self._on_replicas = on_replicas
        self._hold = hold
        self._comparisons: list[Comparison] = []
        self._findings: dict[tuple[Cause, str], Finding] = {}
        self._steps = 0
        self._undefined: int | None = None  # the first step whose loss is NaN on one device

    def add(self, number: int, before: Sequence[Any], reference: Step, own: Step) -> None:
        """One step, counted from 1."""
        gradients = {
            variable.path: self._tolerances.of(
                Measured(Kind.GRADIENT, variable.path, variable.layer, 0.0)
            )
            for variable in self._structure.trainable
        }
        pair = Pair(
            self._structure,
            before,
            reference,
            self._on_replicas.structure(),
            own,
            self._on_replicas.sharing,
            gradients,
        )
        comparisons = [
            Comparison(
                one.kind, one.name, one.layer, number, one.difference, self._tolerances.of(one)
            )
            for one in measure(pair)
        ]
        departed: list[Departed] = []
        parts = pair.parts
        if parts.complete:
            for comparison, departure in compared(number, pair, parts, self._tolerances):
                comparisons.append(comparison)
                departed += [] if departure is None else [departure]
        repair = None if self._on_replicas.repaired else self._on_replicas.repair
        for finding in findings_of(Evidence(number, pair, comparisons, departed, repair)):
            # What holds for the whole model is said once.
            layer = "" if finding.cause in _OF_THE_MODEL else finding.layer
            self._findings.setdefault((finding.cause, layer), finding)
        self._comparisons += comparisons
        self._steps = number
        if self._undefined is None and not np.all(np.isfinite(reference.losses.get(0, [0.0]))):
            self._undefined = number

    @property
    def convicts_by_gradients_alone(self) -> bool:
        """Whether gradients depart, and everything else but the weights that follow them agrees."""
        failed = {one.kind for one in self._comparisons if not one.agrees}
        return Kind.GRADIENT in failed and failed <= {Kind.GRADIENT, Kind.WEIGHT}

    def verdict(self) -> Verdict:
        """On all steps."""
        failed = [one for one in self._comparisons if not one.agrees]
        if failed and not self._findings:
            worst = max(failed, key=lambda one: one.excess)
            self._findings[Cause.UNKNOWN, worst.layer] = _unexplained(worst)
        outcome, summary = self._departs() if failed else self._holds()
        return Verdict(
            outcome=outcome,
            summary=summary,
            findings=tuple(self._findings.values()),
            layers=tuple(
                Layer(call.key, call.class_name, depth, call.dtype, call.normalization is not None)
                for depth, call in enumerate(self._structure.calls, start=1)
            ),
            comparisons=tuple(self._comparisons),
            settings=_settings(self._settings, self._batches, self._structure, self._on_replicas),
            tolerances=self._tolerances.in_words(),
            notes=tuple(self._notes()),
        )

    @property
    def _replicas(self) -> str:
        kind = "workers" if self._settings.workers else "replicas"
        return f"{self._settings.replicas_in_sync} {kind}"

    def _departs(self) -> tuple[Outcome, str]:
        first = next(iter(self._findings.values()))
        where = f" at {first.layer}" if first.layer else ""
        return Outcome.DEPARTS, (
            f"{self._structure.name} on {self._replicas} departs from one device in step "
            f"{first.step}{where}: {first.cause.value}."
        )

    def _holds(self) -> tuple[Outcome, str]:
        name, replicas = self._structure.name, self._replicas
        failure = self._on_replicas.failure
        if failure is not None:
            return Outcome.CANNOT_TELL, (
                f"{name} on {replicas} fails in step {self._steps + 1}: {in_words(failure)}"
            )
        if self._undefined is not None:
            return Outcome.CANNOT_TELL, (
                f"The loss of {name} is NaN or infinite on one device in step {self._undefined}, "
                "so that there is nothing to compare with."
            )
        outputs = [one for one in self._comparisons if one.kind is Kind.OUTPUT]
        coarse = max(outputs, key=lambda one: one.tolerance, default=None)
        if coarse is None:
            return Outcome.CANNOT_TELL, f"No layer of {name} was called in a train step."
        if coarse.tolerance > TOO_COARSE:
            return Outcome.CANNOT_TELL, (
                f"Rounding alone may change the outputs of {coarse.layer} by "
                f"{coarse.tolerance:.0%}, more than {TOO_COARSE:.0%}: verify {name} in a finer "
                "dtype, or with smaller weights and inputs."
            )
        steps = f"{self._steps} step{'s' * (self._steps > 1)}"
        return Outcome.AGREES, (
            f"{name} on {replicas} trains as on one device: {len(self._comparisons)} comparisons "
            f"in {steps} agree within rounding."
        )

    def _notes(self) -> list[str]:
        notes = []
        failure = self._on_replicas.failure
        if failure is not None and self._comparisons:
            notes.append(f"Step {self._steps + 1} fails on the replicas: {in_words(failure)}")
        if failure is not None and not self._on_replicas.repaired:
            notes.append(
                f"{self._on_replicas.repair} was not in effect, without which Keras's fit fails or "
                "is wrong on several replicas: try --repair (repair=True)."
            )
        if self._settings.steps > self._batches.steps:
            notes.append(f"The data are enough for {self._batches.steps} steps.")
        coarse = max(
            (one for one in self._comparisons if one.kind in {Kind.OUTPUT, Kind.GRADIENT}),
            key=lambda one: one.tolerance,
            default=None,
        )
        if coarse is not None and coarse.tolerance > COARSE:
            notes.append(
                f"Rounding alone may change the {coarse.kind.value} of {coarse.name} by "
                f"{coarse.tolerance:.0%} of their largest, so that their agreement says little: a "
                "finer dtype, larger batches or smaller inputs say more."
            )
        compared_layers = {one.layer for one in self._comparisons if one.kind is Kind.OUTPUT}
        left = [call.key for call in self._structure.calls if call.key not in compared_layers]
        if left and self._comparisons:
            shown = ", ".join(left[:3]) + ", …" * (len(left) > 3)
            notes.append(f"Outputs that have no row for each example were not compared: {shown}.")
        random = [call.key for call in self._structure.calls if call.random]
        if self._hold and random:
            shown = ", ".join(random[:3]) + ", …" * (len(random) > 3)
            notes.append(f"In inference, as they draw random numbers: {shown}.")
        return notes


def _unexplained(worst: Comparison) -> Finding:
    return Finding(
        Cause.UNKNOWN,
        worst.layer,
        worst.step,
        f"{worst.kind.value} of {worst.name} are off by {worst.difference:.2g} of their largest, "
        f"{worst.excess:.2g} times what rounding explains.",
        "Verify a smaller part of the model to see where it comes from.",
    )


def cannot_tell(
    where: str, error: Exception, settings: VerifySettings, batches: Batches
) -> Verdict:
    """The verdict where a model cannot be trained at all."""
    return Verdict(
        Outcome.CANNOT_TELL,
        f"The model cannot be trained on {where}: {in_words(error)}",
        settings=_settings(settings, batches, None, None),
    )


def _settings(
    settings: VerifySettings,
    batches: Batches,
    structure: Structure | None,
    on_replicas: OnReplicas | None,
) -> dict[str, Any]:
    framework = keras.backend.backend()
    return {
        "model": None if structure is None else structure.name,
        "backend": framework,
        "versions": {
            "python": ".".join(map(str, sys.version_info[:3])),
            "keras": keras.__version__,
            framework: _version(framework),
            "syncbn": _version("syncbn"),
        },
        "replicas": settings.replicas_in_sync,
        "workers": settings.workers,
        "devices": [] if on_replicas is None else list(on_replicas.devices),
        "steps": batches.steps,
        "batch_sizes": batches.sizes,
        "repaired": None if on_replicas is None else on_replicas.repaired,
        "random_layers": "in inference" if settings.hold_random else "as in training",
    }


def _version(framework: str) -> str:
    module = sys.modules.get(framework)
    return str(getattr(module, "__version__", "") or metadata.version(framework))
