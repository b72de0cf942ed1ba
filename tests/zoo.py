"""Models with batch normalization in every place that Keras lets a layer be in."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

# Where `places` has a layer, as `plan_conversion` names them.
PATHS = [
    "first",
    "time_distributed/inner",
    "both_ways/there",
    "both_ways/back",
    "shared",
    "block/in_list",
    "block/in_tuple",
    "block/in_dict",
    "block/nested/deep",
    "inside/of_sequential",
    "frozen",
]


@keras.saving.register_keras_serializable("tests")
class BothWays(keras.layers.Layer):
    """A wrapper of two layers, as `Bidirectional` is."""

    def __init__(self, there: Any, back: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.there, self.back = there, back

    def build(self, shape: Any) -> None:
        self.there.build(shape)
        self.back.build(shape)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        turned = keras.ops.flip(inputs, axis=1)
        return self.there(inputs, training=training) + self.back(turned, training=training)

    def get_config(self) -> Any:
        layers = {"there": self.there, "back": self.back}
        serialized = {k: keras.saving.serialize_keras_object(v) for k, v in layers.items()}
        return {**super().get_config(), **serialized}

    @classmethod
    def from_config(cls, config: Any) -> Any:
        there, back = map(
            keras.saving.deserialize_keras_object, (config.pop("there"), config.pop("back"))
        )
        return cls(there, back, **config)


@keras.saving.register_keras_serializable("tests")
class Block(keras.layers.Layer):
    """A layer with others in a list, a tuple, a dictionary and a layer within."""

    def __init__(self, make: Any = None, deep: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        make = make or keras.layers.BatchNormalization
        if not deep:
            self.deep = make(name="deep")
            return
        self.steps = [keras.layers.Dense(4), make(name="in_list")]
        self.pair = (make(name="in_tuple"), keras.layers.Activation("tanh"))
        self.named = {"norm": make(name="in_dict")}
        self.nested = Block(make, deep=False, name="nested")

    def _in_order(self) -> list[Any]:
        if hasattr(self, "deep"):
            return [self.deep]
        return [*self.steps, *self.pair, self.named["norm"], self.nested]

    def build(self, shape: Any) -> None:
        for layer in self._in_order():
            layer.build(shape)
            shape = layer.compute_output_shape(shape)

    def compute_output_shape(self, shape: Any) -> Any:
        return shape if hasattr(self, "deep") else (*shape[:-1], 4)

    def call(self, x: Any, training: bool | None = None) -> Any:
        for layer in self._in_order():
            takes = isinstance(layer, (keras.layers.BatchNormalization, Block))
            x = layer(x, training=training) if takes else layer(x)
        return x


def places(make: Any = keras.layers.BatchNormalization) -> keras.Model:
    """A functional model with a layer in each of PATHS; `make(**arguments)` makes the layers."""
    layers = keras.layers
    shared = make(name="shared")
    inputs = keras.Input((4, 5))
    x = make(
        name="first",
        axis=1,
        momentum=0.8,
        epsilon=1e-4,
        beta_initializer="ones",
        gamma_regularizer=keras.regularizers.L2(0.01),
        beta_constraint=keras.constraints.NonNeg(),
    )(inputs)
    x = layers.TimeDistributed(make(name="inner", center=False), name="time_distributed")(x)
    x = BothWays(make(name="there"), make(name="back", scale=False), name="both_ways")(x)
    x = layers.Dense(4)(shared(x))
    x = Block(make, name="block")(x)
    within = [keras.Input((4, 4)), make(name="of_sequential"), layers.Dense(5)]
    x = keras.Sequential(within, name="inside")(x)
    x = make(name="frozen", trainable=False)(shared(x))
    return keras.Model(inputs, layers.Dense(1)(layers.Flatten()(x)), name="places")


class Subclassed(keras.Model):
    """Of which Keras knows no graph."""

    def __init__(self, make: Any = keras.layers.BatchNormalization) -> None:
        super().__init__(name="subclassed")
        self.blocks = [keras.layers.Dense(6), make(name="norm"), Block(make, name="block")]
        self.head = keras.layers.Dense(1)

    def build(self, shape: Any) -> None:
        for layer in (*self.blocks, self.head):
            layer.build(shape)
            shape = layer.compute_output_shape(shape)

    def call(self, x: Any, training: bool | None = None) -> Any:
        x = self.blocks[1](self.blocks[0](x), training=training)
        return self.head(self.blocks[2](x, training=training))


def randomized(model: Any, seed: int = 0) -> Any:
    """The model with weights as of some training: variances positive, none as it began."""
    rng = np.random.default_rng(seed)
    model.set_weights([rng.uniform(0.5, 1.5, w.shape).astype(w.dtype) for w in model.get_weights()])
    return model
