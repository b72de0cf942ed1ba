"""Kinds of models, of inputs and of batches."""

from __future__ import annotations

from typing import Any

import keras

from tests.scenarios.models import dense_model, fit, normal, targets
from tests.scenarios.scenario import scenario
from tests.scenarios.world import World


@scenario(covers=["fit of arrays"], core=True)
def arrays(world: World) -> Any:
    model = dense_model(world, metrics=lambda: ["mae", keras.metrics.RootMeanSquaredError()])
    return fit(
        model,
        normal(128, 6),
        targets(128),
        validation_data=(normal(32, 6, seed=3), targets(32, seed=4)),
        predict=normal(37, 6, seed=5),
    )


@scenario(covers=["an empty replica", "ragged last batch"], core=True)
def last_batch_of_one(world: World) -> Any:
    return fit(dense_model(world, metrics=lambda: ["mae"]), normal(65, 6), targets(65))


@scenario(covers=["ragged last batch"], core=True)
def batches_of_65(world: World) -> Any:
    return fit(dense_model(world), normal(130, 6), targets(130), batch_size=65)


@scenario(covers=["ragged last batch"])
def batches_of_seven(world: World) -> Any:
    return fit(dense_model(world), normal(30, 6), targets(30), batch_size=7)
