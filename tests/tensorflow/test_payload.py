"""What the benchmark of scaling reads from graphs: the contract's payload, and defects."""

import importlib
from pathlib import Path

import keras
import pytest
import tensorflow as tf
from tests.graphs import traced
from tests.harness import make_case
from tests.replicas.tensorflow import make_step, strategy_for

import syncbn
from syncbn._backends.tensorflow import collectives

ROOT = Path(__file__).parents[2]


@pytest.fixture
def read(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("payload")


class SumsTwice(syncbn.SyncBatchNormalization):
    """A defect: a collective more than the contract has."""

    def call(self, inputs, training=None, mask=None):
        context = tf.distribute.get_replica_context()
        total = context.all_reduce(tf.distribute.ReduceOp.SUM, tf.reduce_sum(inputs, (0, 1, 2)))
        return super().call(inputs, training=training, mask=mask) + 0 * total


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("channels", [3, 16])
def test_the_graph_has_the_payload_of_the_contract(read, channels, replicas):
    found = read.payload(strategy_for(replicas), syncbn.SyncBatchNormalization(), channels)
    expected = read.contract(channels, replicas)
    read.require(found, expected, "the layer")
    if replicas > 1:
        assert [c.size for c in found.forward] == [(2 * channels + 1) * 8]
        assert [c.size for c in found.backward] == [2 * channels * 4]
        assert found.describe() == {
            "forward_collectives": 1,
            "forward_bytes": (2 * channels + 1) * 8,
            "forward_types": ["float64"],
            "backward_collectives": 1,
            "backward_bytes": 2 * channels * 4,
            "backward_types": ["float32"],
        }


def test_the_reader_agrees_with_the_suites_own(read):
    """Two readings of graphs, written apart: as many collectives of the same types."""
    strategy, case = strategy_for(2), make_case([(4, 3, 3, 5), (4, 3, 3, 5)])
    layer = syncbn.SyncBatchNormalization()
    found = read.payload(strategy, layer, 5)
    nodes = traced(2, make_step(layer), case)
    types = sorted(tf.as_dtype(node.attr["T"].type).name for node in nodes)
    assert types == sorted(2 * [c.dtype for c in found.forward + found.backward])


def test_a_second_collective_is_detected(read):
    found = read.payload(strategy_for(2), SumsTwice(), 3)
    assert len(found.forward) == 2
    with pytest.raises(RuntimeError, match="The contract requires of the layer"):
        read.require(found, read.contract(3, 2), "the layer")


def test_a_float32_payload_is_detected(read, monkeypatch):
    monkeypatch.setattr(collectives, "_has_float64", lambda: False)
    found = read.payload(strategy_for(2), syncbn.SyncBatchNormalization(), 3)
    assert {c.dtype for c in found.forward} == {"float32"}
    with pytest.raises(RuntimeError, match="The contract requires"):
        read.require(found, read.contract(3, 2), "the layer")


def test_a_local_layer_is_detected(read):
    found = read.payload(strategy_for(2), keras.layers.BatchNormalization(), 3)
    assert found == read.Payload((), ())
    with pytest.raises(RuntimeError, match="The contract requires"):
        read.require(found, read.contract(3, 2), "the layer")


def test_keras_synchronized_hands_over_five_times_its_channels(read, monkeypatch):
    """What the prediction for thousands of replicas takes for Keras's layer."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    model = importlib.import_module("cost_model")
    layer = keras.layers.BatchNormalization(synchronized=True)
    found = read.payload(strategy_for(2), layer, 16)
    assert len(found.forward) == 3
    assert tuple(c.size for c in found.forward + found.backward) == model.keras_bytes(16)
    ours = read.contract(16, 2)
    assert tuple(c.size for c in ours.forward + ours.backward) == model.contract_bytes(16)
