"""`verify` on the devices of one process under keras.distribution: who agrees, and who departs."""

import functools

import jax
import keras
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import syncbn
from syncbn.verification.verdict import Cause, Kind, Outcome

DEVICES = 3


class CentredByDevice(keras.layers.Layer):
    """Takes off the mean over the examples of each device by itself."""

    def compute_output_shape(self, input_shape):
        return input_shape

    def call(self, inputs):
        def centred(x):
            return x - x.mean(axis=0)

        distribution = keras.distribution.distribution()
        if distribution is None:
            return centred(inputs)
        parts = PartitionSpec(distribution.batch_dim_name)
        mesh = distribution.device_mesh.backend_mesh
        return jax.shard_map(centred, mesh=mesh, in_specs=parts, out_specs=parts)(inputs)


def build(*normalizations, masked=True):
    layers = [keras.Input((6, 4)), *[keras.layers.Masking()] * masked, keras.layers.Dense(5)]
    for normalization in normalizations:
        layers += [normalization(), keras.layers.Dense(3)]
    model = keras.Sequential([*layers, keras.layers.GlobalAveragePooling1D()], name="net")
    model.compile("adam", "mse", metrics=["mae"])
    return model


def data(examples):
    random = np.random.default_rng(examples)
    x = random.normal(2.0, 3.0, size=(examples, 6, 4)).astype("float32")
    x[::2, 4:] = 0.0  # masked
    return x, random.normal(size=(examples, 3)).astype("float32")


def verified(*normalizations, examples=18, masked=True, **options):
    return syncbn.verify(
        lambda: build(*normalizations, masked=masked),
        data(examples),
        DEVICES,
        steps=3,
        batch_size=6,
        **options,
    )


@pytest.mark.parametrize(
    "normalization",
    [
        syncbn.SyncBatchNormalization,
        pytest.param(keras.layers.BatchNormalization, marks=pytest.mark.frameworks),
    ],
)
def test_layers_that_are_global_under_a_distribution_agree_masks_too(normalization):
    verdict = verified(normalization, normalization)
    assert verdict.outcome is Outcome.AGREES, verdict
    assert len(verdict.worst(Kind.NORMALIZATION).layer)
    # What was seen is what was computed: not nothing on both sides.
    assert verdict.worst(Kind.GRADIENT).difference > 0


@pytest.mark.frameworks
def test_a_ragged_batch_agrees_by_distribute_dataset_and_is_named_without():
    verdict = verified(syncbn.SyncBatchNormalization, examples=16, repair=True)
    assert verdict.outcome is Outcome.AGREES, verdict
    assert verdict.settings["batch_sizes"] == [6, 6, 4]
    verdict = verified(syncbn.SyncBatchNormalization, examples=16)
    assert verdict.outcome is Outcome.CANNOT_TELL
    assert "IndivisibleError" in verdict.summary
    assert "distribute_dataset" in " ".join(verdict.notes)


def test_local_normalization_is_convicted_behind_another_too():
    local = functools.partial(syncbn.SyncBatchNormalization, group_size=1, name="own")
    verdict = verified(syncbn.SyncBatchNormalization, local)
    assert verdict.outcome is Outcome.DEPARTS
    (finding, *_) = verdict.findings
    assert (finding.cause, finding.layer) == (Cause.LOCAL_MASKED, "own")
    assert "group_size=1" in finding.remedy


def test_a_layer_that_looks_at_its_devices_part_alone_is_convicted():
    verdict = verified(syncbn.SyncBatchNormalization, CentredByDevice, masked=False)
    (finding, *_) = verdict.findings
    assert (finding.cause, finding.layer) == (Cause.BATCH_DEPENDENT, "centred_by_device")


def test_workers_are_refused():
    with pytest.raises(syncbn.InputError, match="requires Keras on TensorFlow or torch"):
        verified(syncbn.SyncBatchNormalization, workers=2)
