"""The repairs as data: read without Keras, printed by the documentation and by diagnosis."""

from __future__ import annotations

from syncbn.multi_worker.repair import Repair

__all__ = ["REPAIRS"]

_HERE = "syncbn.multi_worker.repairs"
_NONE_KNOWN = "none known"

REPAIRS: tuple[Repair, ...] = (
    Repair(
        "building",
        "fit and evaluate on several workers crash; generators lose batches",
        "https://github.com/keras-team/keras/issues/20585",
        f"{_HERE}.building",
    ),
    Repair(
        "steps",
        "steps_per_execution > 1 crashes; logs are means of means; train_on_batch trains on "
        "every replica; XLA fails late",
        "https://github.com/keras-team/keras/issues/20585",
        f"{_HERE}.steps",
    ),
    Repair(
        "loss",
        "the loss of parts that are unequal, masked or weighted is a mean of means",
        "https://github.com/keras-team/keras/issues/19891",
        f"{_HERE}.loss",
    ),
    Repair(
        "gradients",
        "clipnorm, global_clipnorm and clipvalue clip each replica's gradients, not their sum",
        "https://github.com/tensorflow/tensorflow/issues/33929",
        f"{_HERE}.gradients",
    ),
    Repair(
        "conditions",
        "gradient_accumulation_steps and ema_overwrite_frequency crash",
        "https://github.com/keras-team/tf-keras/issues/301",
        f"{_HERE}.conditions",
    ),
    Repair(
        "overflow",
        "loss scaling skips a step on some replicas alone: NaN weights, or workers that wait",
        _NONE_KNOWN,
        f"{_HERE}.overflow",
    ),
    Repair(
        "additional-losses",
        "add_loss and activity regularizers of one replica are added to another's loss",
        _NONE_KNOWN,
        f"{_HERE}.additional_losses",
    ),
    Repair(
        "seeds",
        "dropout and augmentation draw the same numbers on every replica",
        _NONE_KNOWN,
        f"{_HERE}.seeds",
    ),
    Repair(
        "instance-keys",
        "memory grows with every collective of every step",
        "https://github.com/tensorflow/tensorflow/issues/42616",
        f"{_HERE}.instance_keys",
    ),
    Repair(
        "named-timeouts",
        "collectives wait for ever for a worker that is gone, and do not say for which",
        _NONE_KNOWN,
        f"{_HERE}.named_timeouts",
    ),
    Repair(
        "in-step",
        "what one worker does alone, or stops alone, leaves the others waiting",
        _NONE_KNOWN,
        f"{_HERE}.in_step",
    ),
    Repair(
        "predictions",
        "predict_on_batch predicts each example on every replica; one number a batch comes often",
        "https://github.com/tensorflow/tensorflow/issues/41773",
        f"{_HERE}.predictions",
    ),
    Repair(
        "scopes",
        "what was compiled or built outside of the scope fails deep within the first step",
        _NONE_KNOWN,
        f"{_HERE}.scopes",
    ),
    Repair(
        "local-statistics",
        "BatchNormalization is local on each replica, and nothing says so",
        _NONE_KNOWN,
        f"{_HERE}.local_statistics",
    ),
    Repair(
        "inputs",
        "datasets of one file fail on workers; unequal shards wait; OFF ends early; arrays that a "
        "PyDataset gives views of are written into",
        _NONE_KNOWN,
        f"{_HERE}.inputs",
    ),
    Repair(
        "shuffling",
        "workers shuffle arrays each by itself: examples are repeated and lost",
        _NONE_KNOWN,
        f"{_HERE}.shuffling",
    ),
    Repair(
        "chief-writes",
        "callbacks write the same files on every worker, and half of them when killed",
        "https://github.com/tensorflow/tensorflow/issues/31070",
        f"{_HERE}.chief_writes",
    ),
    Repair(
        "legacy-files",
        "a model loaded from an .h5 file fails at its first step: Unknown variable",
        _NONE_KNOWN,
        f"{_HERE}.legacy_files",
    ),
)
