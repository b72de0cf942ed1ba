"""Verdicts that nobody measured, for the tests of reports."""

from __future__ import annotations

import math
import random

from syncbn.verification.verdict import (
    Cause,
    Comparison,
    Finding,
    Kind,
    Layer,
    Outcome,
    Verdict,
)

# What a name may hold, since Keras takes anything but "/"; each must be shown, and do nothing.
STRANGE_NAMES = (
    "<script>window.harm = 1</script>",
    '"><img src=http://example.invalid/x onerror="window.harm=2">',
    "</svg></table><b>bold</b>",
    "a & b &amp; c",
    "[bold red]markup[/] [/nothing]",
    "$x_1$ and $ \\alpha",
    "\x1b[31mred\x1b[0m\x07",
    "line\nbreak\ttab\x00null",
    "层归一化 🙂 ñ",
    "right\u202eleft \ud800 half",
    "a_very_long_name_" * 12,
    "{format} %s %(x)d",
)
_CLASSES = ("keras.Conv2D", "keras.BatchNormalization", "keras.ReLU")


def layers_of(count, names=None):
    """As of a convolutional network."""
    names = names or [
        f"stage{number // 12 + 1}_block{number // 3 % 4 + 1}_{('conv', 'bn', 'relu')[number % 3]}"
        for number in range(count)
    ]
    return tuple(
        Layer(name, _CLASSES[number % 3], number + 1, "float32", number % 3 == 1)
        for number, name in enumerate(names)
    )


def comparisons_of(layers, steps, departs_at=None, nan_from=None, seed=0):
    """All kinds; from the layer of that place on the outputs depart, from another they are NaN."""
    chance = random.Random(seed)
    for step in range(1, steps + 1):
        yield Comparison(Kind.INPUT, "batch", "", step, 0.0, 0.0)
        for place, layer in enumerate(layers):
            tolerance = 9.5e-7 * math.sqrt(place + 1)
            rounding = tolerance * 10 ** chance.uniform(-3, -0.5)
            gone = departs_at is not None and place >= departs_at
            size = 10 ** chance.uniform(-2.5, -0.3)
            nan = nan_from is not None and place >= nan_from and step > 1
            output = math.nan if nan else size if gone else rounding
            yield Comparison(Kind.OUTPUT, layer.path, layer.path, step, output, tolerance)
            yield from _of_variables(layer, step, departs_at is not None, tolerance, output)
        loss = 2e-8 if departs_at is None else 0.02
        yield Comparison(Kind.LOSS, "loss", "", step, loss, 1e-6)
        yield Comparison(Kind.METRIC, "accuracy", "", step, 0.0, 1e-6)


def _of_variables(layer, step, departs, tolerance, output):
    """Of convolutions a kernel, of normalizations two weights and two moving statistics."""
    if layer.class_name == "keras.ReLU":
        return
    if layer.normalizes:
        yield Comparison(Kind.NORMALIZATION, layer.path, layer.path, step, output, 2 * tolerance)
        for name in ("moving_mean", "moving_variance"):
            path = f"{layer.path}/{name}"
            yield Comparison(Kind.STATISTIC, path, layer.path, step, output / 3, tolerance)
            spread = 0.1 if departs else 0.0
            yield Comparison(Kind.SPREAD, path, layer.path, step, spread, 0.0)
    for name in ("gamma", "beta") if layer.normalizes else ("kernel",):
        path, size = f"{layer.path}/{name}", 0.3 if departs else tolerance / 9
        yield Comparison(Kind.GRADIENT, path, layer.path, step, size, 2 * tolerance)
        yield Comparison(Kind.WEIGHT, path, layer.path, step, size / 10, 2 * tolerance)


SETTINGS = {
    "model": "resnet",
    "backend": "tensorflow",
    "versions": {"keras": "3.15.1", "tensorflow": "2.21.0"},
    "replicas": 2,
    "batch sizes": [32, 32, 7],
    "precision": "float32",
    "repair": False,
}
TOLERANCES = "Differences are relative to the largest value on one device; 8 · (ε · √depth + …)."


def agreeing(count=8, steps=5):
    layers = layers_of(count)
    return Verdict(
        Outcome.AGREES,
        f"resnet on 2 replicas trains as on one device: all agree in {steps} steps.",
        layers=layers,
        comparisons=tuple(comparisons_of(layers, steps)),
        settings=SETTINGS,
        tolerances=TOLERANCES,
    )


def departing(count=8, at=4, steps=5, nan_from=None, names=None):
    """Departs from the layer of that place on, counted from 0."""
    layers = layers_of(count, names)
    path = layers[at].path
    return Verdict(
        Outcome.DEPARTS,
        f"resnet on 2 replicas departs from one device in step 1 at {path}: local normalization.",
        (
            Finding(
                Cause.LOCAL,
                path,
                1,
                "Its inputs agree, and its outputs are those of a normalization of each replica "
                "by itself, within 8.1e-07; by the global batch they are off by 0.41.",
                "Take syncbn.SyncBatchNormalization, or syncbn.convert(model).",
            ),
            Finding(
                Cause.STATISTICS,
                path,
                1,
                "After the step 2 moving statistics are not the same on all replicas.",
                "",
            ),
        ),
        layers,
        tuple(comparisons_of(layers, steps, at, nan_from)),
        SETTINGS,
        TOLERANCES,
        ("2 layers were called inside another and are compared with it.",),
    )


def telling_nothing():
    """No comparison could be made."""
    return Verdict(
        Outcome.CANNOT_TELL,
        "no telling: rounding alone may amount to a tenth of the outputs.",
        settings=SETTINGS,
        notes=("The model has no layer that was called.",),
    )


def strange():
    """The names are what somebody wrote who wants a report to do something."""
    return departing(len(STRANGE_NAMES), at=1, names=list(STRANGE_NAMES), nan_from=6, steps=2)
