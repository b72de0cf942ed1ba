"""The measure of peak memory sees what is allocated, in both of its ways."""

import json
from pathlib import Path

import pytest
from tests.processes import python

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")

# 12 tensors of 2²⁴ bytes at a time, twice; then nothing. Their size is one that the allocator has
# chunks of: of others it may lend up to twice as much.
MEASURED = """
import json, sys
sys.path.insert(0, {folder!r})
import tensorflow as tf
import memory
kept = tf.fill([100_000], 1.0)
def hold(): return len([tf.fill([2**22], 1.0) for _ in range(12)])
print(json.dumps([memory.PEAKS[{measure!r}](action) for action in (hold, hold, tf.timestamp)]))
"""


@pytest.fixture
def memory(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import memory

    return memory


@pytest.mark.benchmarks
@pytest.mark.parametrize("measure", ["resident", "allocator"])
def test_the_peak_sees_an_allocation_of_200_megabytes_each_time(memory, measure):
    code = MEASURED.format(folder=BENCHMARKS, measure=measure)
    printed = python(code, **memory.MEASURES[measure])
    first, second, nothing = json.loads(printed.splitlines()[-1])
    assert first == pytest.approx(200e6, rel=0.1)
    assert second == pytest.approx(200e6, rel=0.1)
    assert nothing < 5e6


def test_figures_are_in_megabytes_and_in_units_of_the_fused_kernel(memory):
    tensor = memory.TENSOR
    peaks = {
        "syncbn": {stack: [13 * tensor] * 4 for stack in memory.STACKS},
        "fused_local": {stack: [10 * tensor] * 4 for stack in memory.STACKS},
    }
    found = memory.summary(peaks)
    assert set(found) == set(memory.STACKS)
    assert found["relu_stack"]["syncbn"] == {
        "megabytes_median": 167.0,
        "lower_quartile": 167.0,
        "upper_quartile": 167.0,
        "tensors": 13.0,
        "times_fused_local": 1.3,
    }


def test_a_variant_that_the_layer_does_not_know_is_skipped_with_a_line(memory, monkeypatch, capsys):
    peaks = {stack: [memory.TENSOR, memory.TENSOR] for stack in memory.STACKS}
    monkeypatch.setattr(
        memory,
        "in_a_process",
        lambda variant, measure: None if variant == "syncbn_output" else peaks,  # noqa: ARG005
    )
    found = memory.measure_all(2, "resident")
    assert "syncbn_output: skipped" in capsys.readouterr().out
    assert set(found["deep_stack"]) == set(memory.VARIANTS) - {"syncbn_output"}


def test_the_mode_is_looked_for_in_the_constructor_of_the_layer(memory, monkeypatch):
    import syncbn

    class Knowing(syncbn.SyncBatchNormalization):
        def __init__(self, *, save="input", **kwargs):
            super().__init__(**kwargs)
            self.saved = save

    class Ignorant(syncbn.SyncBatchNormalization):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)

    monkeypatch.setattr(syncbn, "SyncBatchNormalization", Ignorant)
    assert memory.blocks("syncbn_output") is None
    monkeypatch.setattr(syncbn, "SyncBatchNormalization", Knowing)
    assert memory.blocks("syncbn_output")["deep_stack"]().saved == "output"
