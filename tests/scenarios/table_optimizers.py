"""Every optimizer of Keras, and what they all do with gradients before and weights after a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from tests.scenarios.models import compile_model, dense_model, fit, normal, set_weights, targets
from tests.scenarios.scenario import FEW, REPLICAS, scenario
from tests.scenarios.world import World

_O = keras.optimizers

# Those that divide by the root of a square amplify the rounding of gradients that are nearly 0.
ADAPTIVE = 2e-4

OPTIMIZERS: dict[str, tuple[Callable[[], Any], float]] = {
    "sgd": (lambda: _O.SGD(0.05), 2e-5),
    "momentum": (lambda: _O.SGD(0.05, momentum=0.9, nesterov=True), 2e-5),
    "adam": (lambda: _O.Adam(0.01), ADAPTIVE),
    "amsgrad": (lambda: _O.Adam(0.01, amsgrad=True), ADAPTIVE),
    "adamw": (lambda: _O.AdamW(0.01, weight_decay=0.02), ADAPTIVE),
    "adagrad": (lambda: _O.Adagrad(0.01), ADAPTIVE),
    "adadelta": (lambda: _O.Adadelta(0.5), ADAPTIVE),
    "adamax": (lambda: _O.Adamax(0.01), ADAPTIVE),
    "adafactor": (lambda: _O.Adafactor(0.01), ADAPTIVE),
    "rmsprop": (lambda: _O.RMSprop(0.01, momentum=0.5, centered=True), ADAPTIVE),
    "lamb": (lambda: _O.Lamb(0.01), ADAPTIVE),
    "lion": (lambda: _O.Lion(0.01), ADAPTIVE),
    "ftrl": (lambda: _O.Ftrl(0.05), ADAPTIVE),
    "nadam": (lambda: _O.Nadam(0.01), ADAPTIVE),
    "muon": (lambda: _O.Muon(0.01), 2e-3),  # its polynomial runs in bfloat16's precision
    "schedule_free_adamw": (lambda: _O.ScheduleFreeAdamW(0.01), ADAPTIVE),
    "loss_scale": (lambda: _O.LossScaleOptimizer(_O.SGD(0.05), dynamic_growth_steps=2), 2e-5),
    "schedule": (lambda: _O.SGD(_O.schedules.CosineDecay(0.1, 4)), 2e-5),
    "clipnorm": (lambda: _O.SGD(0.05, clipnorm=0.1), 2e-5),
    "global_clipnorm": (lambda: _O.SGD(0.05, global_clipnorm=0.2), 2e-5),
    "clipvalue": (lambda: _O.SGD(0.05, clipvalue=0.05), 2e-5),
    "accumulation_sgd": (lambda: _O.SGD(0.05, gradient_accumulation_steps=3), 2e-5),
    "accumulation_adam": (lambda: _O.Adam(0.01, gradient_accumulation_steps=3), ADAPTIVE),
    "accumulation_clipped": (
        lambda: _O.SGD(0.05, gradient_accumulation_steps=2, global_clipnorm=0.2),
        2e-5,
    ),
    "ema": (lambda: _O.SGD(0.05, use_ema=True, ema_momentum=0.8), 2e-5),
    "ema_overwrite": (
        lambda: _O.SGD(0.05, use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=2),
        2e-5,
    ),
}
CORE = {"global_clipnorm": REPLICAS, "accumulation_adam": REPLICAS}
REPAIRS = {
    "clipnorm": ["gradients"],
    "global_clipnorm": ["gradients"],
    "clipvalue": ["gradients"],
    "accumulation_sgd": ["conditions"],
    "accumulation_adam": ["conditions"],
    "accumulation_clipped": ["conditions", "gradients"],
    "ema_overwrite": ["conditions"],
}


def _trains_with(make: Callable[[], Any]) -> Callable[[World], Any]:
    def run(world: World) -> Any:
        # No layer whose inputs' biases have a gradient of 0, that is, of rounding alone.
        model = dense_model(world, normalized=False, optimizer=make)
        if type(model.optimizer).__name__ == "ScheduleFreeAdamW":
            # Keras 3.15.1 on one device: built within fit it starts from weights of 0.
            with world.scope():
                model.optimizer.build(model.trainable_variables)
        return fit(model, normal(97, 6), targets(97), batch_size=32)

    return run


for _name, (_make, _tolerance) in OPTIMIZERS.items():
    scenario(
        name=f"optimizer[{_name}]",
        covers=[f"optimizer {_name}"],
        repairs=REPAIRS.get(_name, ()),
        tolerance=_tolerance,
        core=CORE.get(_name, ()),
    )(_trains_with(_make))


@scenario(covers=["clipping", "synchronized layers", "ragged last batch"])
def clipped_with_normalization(world: World) -> Any:
    model = dense_model(world, optimizer=lambda: _O.SGD(0.1, global_clipnorm=0.1))
    return fit(model, normal(65, 6), targets(65))


@scenario(covers=["loss scaling, overflow on one replica"], repairs=["overflow"], core=FEW)
def overflow_on_one_replica(world: World) -> Any:
    """One example's gradient overflows: the step is skipped everywhere, the scale halved."""
    x, y = normal(96, 6), targets(96)
    # A gradient of 1e12 times the scale of 1e30 is more than float32 holds; others are far less.
    # In the second half of its batch: what the first replica finds is not enough.
    y[32 + 20, 0] = 1e12

    def optimizer() -> Any:
        return _O.LossScaleOptimizer(_O.SGD(0.05), initial_scale=2.0**100)

    model = dense_model(world, normalized=False, optimizer=optimizer)
    return fit(model, x, y, batch_size=32, epochs=1)


@scenario(covers=["mixed precision: float16"], tolerance=5e-3)
def mixed_float16(world: World) -> Any:
    """What is added in float16 is rounded at 1e-3."""
    keras.config.set_dtype_policy("mixed_float16")
    model = dense_model(world, optimizer=lambda: _O.SGD(0.05))
    return fit(model, normal(65, 6), targets(65))


@scenario(covers=["mixed precision: bfloat16"], tolerance=3e-2)
def mixed_bfloat16(world: World) -> Any:
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = dense_model(world, optimizer=lambda: _O.SGD(0.05))
    return fit(model, normal(65, 6), targets(65))


@scenario(covers=["sparse gradients", "constraints"])
def embedding(world: World) -> Any:
    """A token that only one replica sees, and one that all of them see."""
    with world.scope():
        model = keras.Sequential(
            [
                keras.Input((3,), dtype="int32"),
                keras.layers.Embedding(20, 4),
                keras.layers.Flatten(),
                keras.layers.Dense(2, kernel_constraint=keras.constraints.MaxNorm(0.5)),
            ]
        )
        set_weights(model)
        compile_model(model, optimizer=lambda: _O.Adam(0.01))
    return fit(model, np.random.default_rng(0).integers(20, size=(65, 3)), targets(65))


@scenario(covers=["frozen layers", "trainable changed between two trainings"])
def frozen(world: World) -> Any:
    model = dense_model(world)
    model.layers[0].trainable = False
    with world.scope():
        compile_model(model)
    first = fit(model, normal(65, 6), targets(65), observe=False)
    model.layers[0].trainable = True
    with world.scope():
        compile_model(model, optimizer=lambda: _O.SGD(0.05, momentum=0.9))
    second = fit(model, normal(65, 6), targets(65))
    return {**second, **{f"first {name}": value for name, value in first.items()}}


@scenario(covers=["a training loop of one's own", "compute_loss outside of fit"])
def own_loop(world: World) -> Any:
    """`strategy.run` around the loss and apply_gradients, as TensorFlow's guides write it."""
    strategy = world.strategy or tf.distribute.get_strategy()
    model = dense_model(world, optimizer=lambda: _O.SGD(0.1, global_clipnorm=0.3))
    model.optimizer.build(model.trainable_variables)
    loss_object = keras.losses.MeanSquaredError()
    dataset = tf.data.Dataset.from_tensor_slices((normal(97, 6), targets(97))).batch(32)

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_object(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        model.optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    run = tf.function(lambda batch: strategy.reduce("SUM", strategy.run(step, batch), axis=None))
    losses = [run(batch) for batch in strategy.experimental_distribute_dataset(dataset)]
    return {"losses": [float(loss) for loss in losses], "kernel": np.array(model.weights[0])}
