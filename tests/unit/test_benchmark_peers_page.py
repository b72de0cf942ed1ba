"""The page says what the figures say, also where they are against us."""

import copy
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STEMS = ("peers", "memory", "resnet")


@pytest.fixture
def section(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import peers_page

    return lambda results: "\n".join(peers_page.section(results, tmp_path / "images"))


def spread(key, low, median, high, **more):
    return {key: median, "lower_quartile": low, "upper_quartile": high, **more}


def peers_document():
    def ratio(low, median, high, milliseconds):
        return spread("syncbn_times_as_fast", low, median, high, milliseconds_median=milliseconds)

    return {
        "rounds": 20,
        "players": {"flax": {"versions": {"jax": "0.1", "flax": "0.2"}}},
        "results": [
            {
                "replicas": 2,
                "shape_per_replica": [16, 8, 8, 4],
                "variants": {
                    "syncbn": ratio(1, 1, 1, 10.0),
                    "tf_keras_sync": ratio(1.8, 2.0, 2.2, 20.0),
                    "flax_sync": ratio(0.9, 1.0, 1.1, 10.0),
                },
            },
            {
                "replicas": 1,
                "shape_per_replica": [64, 128],
                "variants": {
                    "syncbn": ratio(1, 1, 1, 10.0),
                    "flax_local": ratio(0.2, 0.25, 0.3, 2.5),
                },
            },
        ],
        "on_accelerators": [],
    }


def memory_document(times=1.02, output=None):
    def figure(megabytes):
        return spread(
            "times_fused_local",
            megabytes - 1,
            megabytes / 100,
            megabytes + 1,
            megabytes_median=megabytes,
            tensors=megabytes / 12.8,
        )

    variants = {"syncbn": figure(100 * times), "fused_local": figure(100.0)}
    if output is not None:
        variants["syncbn_output"] = figure(100 * times * output)
    stacks = {"relu_stack": variants, "deep_stack": variants}
    return {
        "rounds": 3,
        "layers": 12,
        "shape": [16, 56, 56, 64],
        "bytes_a_tensor": 12845056,
        "results": {"resident": stacks, "allocator": copy.deepcopy(stacks)},
    }


def resnet_document(ratio):
    def figure(times, milliseconds):
        more = {"first_step_seconds": 3.0, "peak_megabytes_of_allocator": 100.0}
        return spread(
            "times_as_fast_as_keras_sync",
            times - 0.1,
            times,
            times + 0.1,
            milliseconds_median=milliseconds,
            **more,
        )

    variants = {
        "syncbn": figure(ratio, 100 / ratio),
        "keras_sync": figure(1.0, 100.0),
        "keras_local": figure(0.9, 110.0),
        "fused_local": figure(2.0, 50.0),
    }
    return {
        "variants": variants,
        "replicas": 2,
        "rounds": 12,
        "pixels": 64,
        "batch_per_replica": 8,
        "layers_converted": 53,
    }


def test_what_was_not_measured_is_said_and_linked_to_nothing(section):
    text = section({"layer": {}})
    for stem in STEMS:
        assert f"Not measured here: `python benchmarks/{stem}.py` does." in text
    assert "](../images/" not in text


def test_where_a_peer_wins_the_page_says_so(section):
    text = section({"peers": peers_document()})
    assert "- flax, local wins on [64, 128] (4.0 times as fast)." in text
    assert "- Not to be told apart from ours: flax, `axis_name` on [16, 8, 8, 4]." in text
    assert "- Ours is faster in 1 of the comparisons." in text
    assert "No GPU was at hand" in text


def test_kernels_on_a_gpu_are_held_against_the_speed_of_a_copy(section):
    document = peers_document()
    variants = {name: {"milliseconds_median": ms} for name, ms in (("torch_sync", 10), ("copy", 1))}
    row = {"device": "cuda", "shape_per_replica": [16, 8, 8, 4], "variants": variants}
    failed = {"device": "gpu", "peer": "flax", "error": "it ended"}
    text = section({"peers": {**document, "on_accelerators": [row, failed]}})
    assert "Not measured on gpu: flax failed there." in text
    # A copy of 1 ms is 2 of 8 passes: 10 ms are 40 % of its speed.
    assert "| cuda | [16, 8, 8, 4] | torch `SyncBatchNorm` | 10 | 40% |" in text
    assert "No GPU was at hand" not in text


def test_a_peer_that_never_wins_is_not_said_to_win(section):
    document = peers_document()
    del document["results"][1]["variants"]["flax_local"]
    document["results"][0]["variants"].pop("flax_sync")
    text = section({"peers": document})
    assert "wins" not in text.replace("the peer wins", "").replace("No peer wins", "")
    assert "- No peer wins." in text


@pytest.mark.parametrize(("times", "words"), [(1.02, "within"), (1.2, "above")])
def test_the_limit_of_memory_is_judged_by_the_figures(section, times, words):
    text = section({"memory": memory_document(times)})
    assert f"{times:.2f} times what the local fused kernel needs: {words} the limit" in text
    assert '`save="output"` was not measured' in text
    assert ("Less than ours needs: fused kernel, local." in text) is (times > 1.1)


@pytest.mark.parametrize(("output", "words"), [(0.6, "is reached"), (0.9, "is not reached")])
def test_the_memory_mode_is_judged_by_the_figures(section, output, words):
    text = section({"memory": memory_document(output=output)})
    assert f"needs {1 - output:.0%} less than the same layer" in text
    assert f"the goal of 25% {words}." in text


@pytest.mark.parametrize(("ratio", "words"), [(1.5, "is reached"), (1.1, "is not reached")])
def test_the_goal_of_resnet_is_judged_by_the_figures(section, ratio, words):
    text = section({"resnet": resnet_document(ratio)})
    assert f"a step is {ratio:.2f} times as fast" in text
    assert f"the goal of 1.3 {words}." in text
    assert "Faster than ours, without synchronizing: fused kernel, local." in text


def test_stored_figures_make_a_page_whose_plots_are_the_same_each_time(section, tmp_path):
    files = {stem: BENCHMARKS / "results" / f"{stem}.json" for stem in STEMS}
    results = {stem: json.loads(file.read_text()) for stem, file in files.items()}
    text = section(results)
    assert "nan" not in text.lower().replace("name", "")
    plots = {path: path.read_bytes() for path in sorted((tmp_path / "images").iterdir())}
    assert [path.name for path in plots] == ["memory.png", "peers.png", "resnet.png"]
    for path in plots:
        assert f"](../images/{path.name})" in text
    assert section(results) == text
    assert {path: path.read_bytes() for path in plots} == plots
