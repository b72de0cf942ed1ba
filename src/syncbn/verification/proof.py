"""The runs of a verification, in their order, and the verdict on them."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

from syncbn.errors import InputError
from syncbn.verification.batches import Batches, make_batches
from syncbn.verification.judging import Judgement, cannot_tell
from syncbn.verification.measuring import Measured, Pair, Sharing, measure
from syncbn.verification.running import Keep, backend, perturbed, run
from syncbn.verification.settings import VerifySettings
from syncbn.verification.steps import OnReplicas, Steps
from syncbn.verification.tolerances import Tolerances
from syncbn.verification.verdict import Cause, Kind, Verdict
from syncbn.verification.workers import run_by_workers

__all__ = ["Proof"]

_SEED = 20150211  # of the roundings


class Proof:
    """One verification.

    Args:
        build_model: the user's.
        data: the user's.
        settings: checked.
        progress: is told what is done now.
    """

    def __init__(
        self,
        build_model: Callable[[], Any],
        data: Any,
        settings: VerifySettings,
        progress: Callable[[str], None],
    ) -> None:
        self._progress = progress
        self._build_model = build_model
        self._settings = settings
        self._by_processes = settings.workers is not None or not backend().HAS_LOCAL_REPLICAS
        if self._by_processes and not backend().HAS_PROCESSES:
            raise InputError(
                "A verification by workers requires Keras on TensorFlow or torch. Received: "
                f"workers={settings.workers} on {keras.backend.backend()}. Leave them out: its "
                "replicas are devices of one process."
            )
        self._batches: Batches = make_batches(
            data, settings.replicas_in_sync, settings.steps, settings.batch_size
        )

    def verdict(self) -> Verdict:
        """Run everything; a second time with random layers in inference, where those depart."""
        with contextlib.ExitStack() as stack:
            if self._settings.repair:
                import syncbn

                stack.enter_context(syncbn.enable_multi_worker())
            here = 1 if self._by_processes else self._settings.replicas
            backend("replicas").prepare(here, "float32")
            found = self._judged(self._settings.hold_random)
            if not any(finding.cause is Cause.RANDOM for finding in found.findings):
                return found
            self._progress("again, with layers that draw random numbers in inference")
            return _together(found, self._judged(hold=True))

    def _judged(self, hold: bool) -> Verdict:
        with tempfile.TemporaryDirectory(prefix="syncbn-verify-") as name:
            folder = Path(name)
            steps = Steps(folder, "one-device")
            one_device = backend("replicas").strategy_over(1, by_processes=False)
            try:
                self._progress(f"{self._batches.steps} steps on one device")
                self._run(self._batches, one_device, None, steps.keep, hold)
                tolerances = Tolerances(steps.structure(), backend().has_short_products())
                self._progress("the same, off by a rounding")
                rounded = self._rounded(one_device, steps, tolerances, hold)
            except InputError:
                raise
            except Exception as error:  # noqa: BLE001 - whatever the user's program raises
                return cannot_tell("one device", error, self._settings, self._batches)
            kind = "workers" if self._by_processes else "replicas"
            self._progress(f"the same on {self._settings.replicas_in_sync} {kind}")
            self._note_amplified(steps, rounded, tolerances)
            on_replicas = self._on_replicas(folder, steps, hold)
            judgement = self._judgement(steps, on_replicas, tolerances, hold)
            if judgement.convicts_by_gradients_alone:
                self._progress("one device again, with examples in another order")
                self._note_order(one_device, steps, tolerances, hold)
                judgement = self._judgement(steps, on_replicas, tolerances, hold)
            return judgement.verdict()

    def _judgement(
        self, steps: Steps, on_replicas: OnReplicas, tolerances: Tolerances, hold: bool
    ) -> Judgement:
        judgement = Judgement(
            steps.structure(), tolerances, self._settings, self._batches, on_replicas, hold
        )
        for number in range(self._batches.steps):
            own = on_replicas.step(number)
            if own is None:
                break
            judgement.add(number + 1, steps.before(number), steps.step(number), own)
        return judgement

    def _rounded(self, strategy: Any, steps: Steps, tolerances: Tolerances, hold: bool) -> Steps:
        """One device again, with weights and inputs that are off by a rounding."""
        epsilon = tolerances.epsilon
        structure = steps.structure()
        batches = self._batches._replace(x=perturbed(self._batches.x, epsilon, _SEED))

        def before(number: int) -> list[Any]:
            state = steps.before(number)
            return [
                perturbed(value, epsilon, _SEED + place) if variable.trainable else value
                for place, (value, variable) in enumerate(
                    zip(state, structure.variables, strict=True)
                )
            ]

        rounded = steps.beside("rounded")
        self._run(batches, strategy, before, rounded.keep, hold)
        return rounded

    def _note_amplified(self, steps: Steps, rounded: Steps, tolerances: Tolerances) -> None:
        """Take in how far the roundings have come."""
        own = rounded.structure()
        for number in range(self._batches.steps):
            reference, step = steps.step(number), rounded.step(number)
            step.data = dict(reference.data)  # the same rows, of other content
            before = steps.before(number)
            pair = Pair(steps.structure(), before, reference, own, step, Sharing(), {})
            for measured in measure(pair):
                tolerances.note(measured)
            rounded.forget(number)

    def _note_order(self, strategy: Any, steps: Steps, tolerances: Tolerances, hold: bool) -> None:
        """Take in what the order of the examples makes of gradients on one device.

        A gradient is a sum over examples whose terms may cancel; its rounding is by the order in
        which they are added, which replicas change. Where the outputs depend on the order too, as
        those of virtual batches or random layers do, it says nothing of rounding.
        """
        shuffled = steps.beside("shuffled")
        self._run(self._batches.shuffled(_SEED), strategy, steps.before, shuffled.keep, hold)
        found: list[Measured] = []
        for number in range(self._batches.steps):
            before, reference = steps.before(number), steps.step(number)
            own = shuffled.step(number)
            pair = Pair(
                steps.structure(), before, reference, shuffled.structure(), own, Sharing(), {}
            )
            found += measure(pair)
            shuffled.forget(number)
        outputs = [one for one in found if one.kind in {Kind.INPUT, Kind.OUTPUT}]
        if all(one.difference <= tolerances.of(one) for one in outputs):
            for one in found:
                if one.kind is Kind.GRADIENT:
                    tolerances.note(one)

    def _run(
        self,
        batches: Batches,
        strategy: Any,
        state_before: Callable[[int], list[Any]] | None,
        keep: Keep,
        hold: bool,
    ) -> None:
        repair = self._settings.repair
        run(self._build_model, batches, strategy, state_before, keep, hold, repair)

    def _on_replicas(self, folder: Path, steps: Steps, hold: bool) -> OnReplicas:
        """Train on the replicas; what they did before they failed is kept."""
        settings = self._settings
        if self._by_processes:
            return run_by_workers(self._build_model, self._batches, settings, folder, hold)
        own = Steps(folder, "replicas")
        strategy = backend("replicas").strategy_over(settings.replicas, by_processes=False)
        failure = None
        try:
            self._run(self._batches, strategy, steps.before, own.keep, hold)
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the user's program raises
            failure = error
        return OnReplicas(
            processes=(own,),
            sharing=Sharing(*backend().sharing(strategy)),
            devices=tuple(backend().devices(strategy)),
            repair=backend().REPAIR,
            repaired=backend().is_repaired() or settings.repair,
            failure=failure,
        )


def _together(found: Verdict, held: Verdict) -> Verdict:
    """What depends on random numbers, and everything else with them held still."""
    random = tuple(one for one in found.findings if one.cause is Cause.RANDOM)
    names = {one.layer for one in random}
    departed = tuple(one for one in found.comparisons if one.layer in names and not one.agrees)
    kept = tuple(one for one in held.comparisons if one.layer not in names)
    rest = (
        "with such layers in inference all else agrees"
        if held.agrees
        else f"with such layers in inference: {held.summary}"
    )
    return dataclasses.replace(
        held,
        outcome=found.outcome,
        summary=f"{found.summary.rstrip('.')}; {rest.rstrip('.')}.",
        findings=(*random, *held.findings),
        comparisons=(*departed, *kept),
    )
