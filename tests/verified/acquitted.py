"""Models of every kind that replicas train as one device does, for `verify` to acquit.

Each case makes a compiled model with `syncbn.SyncBatchNormalization`, or without normalization at
all, and data for it. Small enough that hundreds of verifications of them are minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers

import syncbn
from tests.verified.own_models import NanMasked, OwnStep, Subclassed, Weighted, compiled_two

Data = tuple[Any, ...]
Norm = syncbn.SyncBatchNormalization


class Case(NamedTuple):
    """A model and data for it.

    Attributes:
        build: makes and compiles it.
        data: of so many examples, drawn by the generator.
        needs_repair: Keras's own trainer is wrong or fails on it, also with full batches.
    """

    build: Callable[[], Any]
    data: Callable[[int, np.random.Generator], Data]
    needs_repair: bool = False


def floats(*shape: int) -> Callable[[int, np.random.Generator], Data]:
    """Normal inputs of that shape, and one normal target."""

    def data(n: int, random: np.random.Generator) -> Data:
        return (
            random.normal(size=(n, *shape)).astype("float32"),
            random.normal(size=(n, 1)).astype("float32"),
        )

    return data


def classes(*shape: int, count: int = 3) -> Callable[[int, np.random.Generator], Data]:
    """Normal inputs of that shape, and a class."""

    def data(n: int, random: np.random.Generator) -> Data:
        return (
            random.normal(size=(n, *shape)).astype("float32"),
            random.integers(0, count, size=n).astype("int32"),
        )

    return data


def compiled(model: Any, optimizer: Any = "adam", loss: Any = "mse", **options: Any) -> Any:
    """The model, ready to train."""
    model.compile(optimizer, loss, **options)
    return model


def convolutional(
    *, head: Callable[[], list[Any]] | None = None, norm: Callable[[], Any] = Norm
) -> Any:
    """Two convolutions with normalization behind each."""
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, use_bias=False),
            norm(),
            layers.ReLU(),
            layers.Conv2D(6, 3, use_bias=False),
            norm(),
            layers.ReLU(),
            layers.Flatten(),
            *(head() if head else [layers.Dense(1)]),
        ]
    )


def dense(*, norm: Callable[[], Any] = Norm, outputs: int = 1, activation: Any = None) -> Any:
    """Two dense layers with normalization between."""
    return keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(8),
            norm(),
            layers.ReLU(),
            layers.Dense(outputs, activation=activation),
        ]
    )


def without_normalization() -> Any:
    return compiled(keras.Sequential([keras.Input((5,)), layers.Dense(8, "relu"), layers.Dense(1)]))


def frozen() -> Any:
    model = convolutional()
    model.layers[1].trainable = False
    return compiled(model, metrics=["mae"])


def plain_frozen() -> Any:
    model = convolutional(norm=layers.BatchNormalization)
    for layer in model.layers:
        layer.trainable = not isinstance(layer, layers.BatchNormalization)
    return compiled(model)


def keras_synchronized() -> Any:
    return compiled(convolutional(norm=lambda: layers.BatchNormalization(synchronized=True)))


def several_inputs_and_outputs() -> Any:
    left, right = keras.Input((5,), name="left"), keras.Input((4,), name="right")
    both = layers.Concatenate()([Norm()(layers.Dense(4)(left)), Norm()(layers.Dense(4)(right))])
    near = layers.Dense(1, name="near")(both)
    far = layers.Dense(3, name="far", activation="softmax")(Norm()(layers.Dense(6)(both)))
    return compiled(
        keras.Model([left, right], [near, far]),
        loss=["mse", "sparse_categorical_crossentropy"],
        loss_weights=[0.3, 2.0],
        metrics=[["mae"], ["accuracy"]],
    )


def of_several(n: int, random: np.random.Generator) -> Data:
    left, target = floats(5)(n, random)
    right, label = classes(4)(n, random)
    return [left, right], [target, label]


def dictionaries() -> Any:
    inputs = {"b": keras.Input((5,), name="b"), "a": keras.Input((4,), name="a")}
    both = layers.Concatenate()([inputs["a"], inputs["b"]])
    hidden = Norm()(layers.Dense(6)(both))
    outputs = {"y": layers.Dense(1, name="y")(hidden), "z": layers.Dense(1, name="z")(hidden)}
    return compiled(keras.Model(inputs, outputs), loss={"y": "mse", "z": "mae"})


def of_dictionaries(n: int, random: np.random.Generator) -> Data:
    b, y = floats(5)(n, random)
    a, z = floats(4)(n, random)
    return {"b": b, "a": a}, {"y": y, "z": z}


def shared_layers() -> Any:
    left, right = keras.Input((5,)), keras.Input((5,))
    shared, norm = layers.Dense(4), Norm()
    joined = layers.Concatenate()([norm(shared(left)), norm(shared(right))])
    return compiled(keras.Model([left, right], layers.Dense(1)(joined)))


def of_two(n: int, random: np.random.Generator) -> Data:
    left, target = floats(5)(n, random)
    return [left, floats(5)(n, random)[0]], target


def nested() -> Any:
    def block(width: int) -> Any:
        return keras.Sequential([layers.Dense(width), Norm(), layers.ReLU()])

    inner = keras.Sequential([block(6), block(4)])
    inputs = keras.Input((5,))
    return compiled(keras.Model(inputs, layers.Dense(1)(inner(block(5)(inputs)))))


def masked_sequence() -> Any:
    return compiled(
        keras.Sequential(
            [
                keras.Input((6, 3)),
                layers.Masking(),
                layers.TimeDistributed(layers.Dense(4)),
                Norm(),
                layers.Bidirectional(layers.LSTM(3, return_sequences=True)),
                Norm(),
                layers.LSTM(3),
                layers.Dense(1),
            ]
        )
    )


def padded(n: int, random: np.random.Generator) -> Data:
    x, y = floats(6, 3)(n, random)
    for row, length in zip(x, random.integers(1, 7, size=n), strict=True):
        row[length:] = 0.0
    return x, y


def words() -> Any:
    inputs = keras.Input((7,), dtype="int32")
    embedded = layers.Embedding(20, 8, mask_zero=True)(inputs)
    attended = layers.MultiHeadAttention(2, 4)(embedded, embedded)
    x = Norm()(layers.Add()([embedded, attended]))
    x = layers.Dense(3, activation="softmax")(layers.GlobalAveragePooling1D()(x))
    return compiled(
        keras.Model(inputs, x), loss="sparse_categorical_crossentropy", metrics=["accuracy"]
    )


def of_words(n: int, random: np.random.Generator) -> Data:
    x = random.integers(1, 20, size=(n, 7)).astype("int32")
    for row, length in zip(x, random.integers(1, 8, size=n), strict=True):
        row[length:] = 0
    return x, random.integers(0, 3, size=n).astype("int32")


def penalties() -> Any:
    return compiled(
        keras.Sequential(
            [
                keras.Input((5,)),
                layers.Dense(6, kernel_regularizer="l2", bias_regularizer="l1"),
                Norm(gamma_regularizer="l2"),
                layers.Dense(1, kernel_constraint=keras.constraints.MaxNorm(1.0)),
            ]
        )
    )


def classifier(**options: Any) -> Any:
    return compiled(
        dense(outputs=3, activation="softmax"),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy", "sparse_categorical_crossentropy"],
        **options,
    )


def counters() -> Any:
    return compiled(
        dense(activation="sigmoid"),
        loss="binary_crossentropy",
        metrics=[
            "accuracy",
            keras.metrics.AUC(num_thresholds=20),
            keras.metrics.Precision(),
            keras.metrics.Recall(),
            keras.metrics.F1Score(threshold=0.5),
            keras.metrics.BinaryIoU(),
        ],
        weighted_metrics=["accuracy"],
    )


def of_counters(n: int, random: np.random.Generator) -> Data:
    x, _ = floats(5)(n, random)
    return (
        x,
        random.integers(0, 2, size=(n, 1)).astype("float32"),
        random.uniform(0.5, 2.0, size=n).astype("float32"),
    )


def with_optimizer(make: Callable[[], Any]) -> Callable[[], Any]:
    """The convolutional model with that optimizer."""
    return lambda: compiled(convolutional(), optimizer=make(), metrics=["mae"])


def normalized_by(**options: Any) -> Callable[[], Any]:
    """The convolutional model with these arguments of the normalization."""
    return lambda: compiled(convolutional(norm=lambda: Norm(**options)))


def weighted_sum_of_losses() -> Any:
    """Gradients clipped, averaged over steps, with a schedule and decay."""
    return compiled(
        convolutional(),
        optimizer=keras.optimizers.AdamW(
            keras.optimizers.schedules.ExponentialDecay(1e-2, 2, 0.5),
            gradient_accumulation_steps=2,
            clipnorm=0.5,
            use_ema=True,
            ema_overwrite_frequency=2,
        ),
    )


def rows_folded() -> Any:
    """A layer whose outputs have several rows an example, and one without rows."""
    inputs = keras.Input((4, 5))
    x = layers.Dense(6)(layers.Lambda(lambda t: keras.ops.reshape(t, (-1, 5)))(inputs))
    x = layers.Lambda(lambda t: keras.ops.reshape(t, (-1, 4, 6)))(Norm()(x))
    return compiled(keras.Model(inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(x))))


def far_from_zero(n: int, random: np.random.Generator) -> Data:
    x, y = floats(8, 8, 3)(n, random)
    return x + np.float32(1e4), y


def with_sample_weights(n: int, random: np.random.Generator) -> Data:
    return *floats(5)(n, random), random.uniform(0.0, 2.0, size=n).astype("float32")


def of_images(n: int, random: np.random.Generator) -> Data:
    x = random.integers(0, 256, size=(n, 8, 8, 3)).astype("uint8")
    return x, random.normal(size=(n, 1)).astype("float32")


def rescaled_images() -> Any:
    model = keras.Sequential([keras.Input((8, 8, 3), dtype="uint8"), layers.Rescaling(1 / 255)])
    for layer in convolutional().layers:
        model.add(layer)
    return compiled(model)


def huber_without_reduction() -> Any:
    """Losses of a global batch that the user weights by hand, with an old optimizer."""
    return compiled(dense(), keras.optimizers.SGD(0.05, momentum=0.9, nesterov=True), "huber")


IMAGES = floats(8, 8, 3)
CASES: dict[str, Case] = {
    "convolutional": Case(lambda: compiled(convolutional(), metrics=["mae"]), IMAGES),
    "far from zero": Case(lambda: compiled(convolutional()), far_from_zero),
    "no normalization": Case(without_normalization, floats(5)),
    "frozen": Case(frozen, IMAGES),
    "plain frozen": Case(plain_frozen, IMAGES),
    "keras synchronized": Case(keras_synchronized, IMAGES),
    "several inputs, outputs": Case(several_inputs_and_outputs, of_several),
    "dictionaries": Case(dictionaries, of_dictionaries),
    "shared layers": Case(shared_layers, of_two),
    "nested": Case(nested, floats(5)),
    "subclassed": Case(lambda: compiled(Subclassed()), floats(5)),
    "own step": Case(lambda: compiled(OwnStep()), floats(5)),
    "two optimizers": Case(compiled_two, floats(5)),
    "masked sequence": Case(masked_sequence, padded),
    "words": Case(words, of_words),
    "penalties": Case(penalties, floats(5)),
    "classifier": Case(classifier, classes(5)),
    "counters": Case(counters, of_counters, needs_repair=True),
    "sample weights": Case(lambda: compiled(dense()), with_sample_weights),
    "uint8": Case(rescaled_images, of_images),
    "rows folded": Case(rows_folded, floats(4, 5)),
    "weights": Case(lambda: compiled(Weighted()), floats(5)),
    "nan masked": Case(lambda: compiled(NanMasked()), floats(6, 3)),
    "huber": Case(huber_without_reduction, floats(5)),
    "accumulation, EMA, clipping": Case(weighted_sum_of_losses, IMAGES, needs_repair=True),
    "run eagerly": Case(lambda: compiled(dense(), run_eagerly=True), floats(5)),
    "jit": Case(lambda: compiled(dense(), jit_compile=True), floats(5)),
    "steps per execution": Case(lambda: compiled(dense(), steps_per_execution=4), floats(5)),
    "renorm": Case(normalized_by(renorm=True), IMAGES),
    # Of more than one example, a ragged batch falls into others on replicas than on one device.
    "virtual batches": Case(normalized_by(virtual_batch_size=1), IMAGES),
    "activation": Case(normalized_by(activation="relu"), IMAGES),
    "no gamma, beta": Case(normalized_by(scale=False, center=False), IMAGES),
    **{
        name: Case(with_optimizer(make), IMAGES)
        for name, make in {
            "sgd": lambda: keras.optimizers.SGD(0.05),
            "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
            "adafactor": lambda: keras.optimizers.Adafactor(0.01),
            "lion": lambda: keras.optimizers.Lion(1e-3),
            "muon": lambda: keras.optimizers.Muon(1e-2),
            "rmsprop": lambda: keras.optimizers.RMSprop(1e-3),
            "lamb": lambda: keras.optimizers.Lamb(1e-2),
        }.items()
    },
}
