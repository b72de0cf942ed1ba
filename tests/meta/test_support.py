"""The README's table of support: each cell has tests behind it, which exist and run there."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
README = (TESTS.parent / "README.md").read_text(encoding="utf-8")
COLUMNS = ("tensorflow", "jax", "torch")

# By the row's first words the tests of its cells, as file::test; of one for all cells the file is
# of tests/contract, which every backend runs, or of a folder that runs all three by processes.
EVERYWHERE = {
    "one device": "contract/test_equivalence.py::test_one_device_alone",
    "masks, `weights`": "contract/test_features.py::test_a_feature_gives_what_one_device_gives",
    "float64, float32": "contract/test_equivalence.py::test_property_replicas_equal_one_device",
    "a `.keras` file": (
        "meta/test_travel.py::test_a_model_goes_on_on_another_backend_to_the_same_weights"
    ),
    "`convert`, `revert`": (
        "contract/test_conversion.py"
        "::test_every_layer_is_converted_and_reverted_and_keeps_all_that_it_has"
    ),
    "`load_weights`": "contract/test_checkpoints.py::test_old_files_restore_the_model",
    "`fold`": ("contract/test_folding.py::test_every_kind_of_layer_takes_its_normalizations_in"),
}
CELLS = {
    "devices of one": (
        "tensorflow/test_strategies.py::test_mirrored_strategy_with_one_to_eight_replicas",
        "jax/test_contexts.py::test_a_feature_gives_what_one_device_gives_in_every_context",
        "torch/test_process_groups.py::test_the_processes_of_a_given_group_are_the_replicas",
    ),
    "several processes": (
        "multiprocess/test_multi_worker.py::test_two_workers_give_what_one_device_gives",
        "jax/test_fit.py::test_processes_train_as_one_device_and_hold_the_same_bits",
        "contract/test_equivalence.py::test_any_split_of_the_batch_gives_what_one_device_gives",
    ),
    "collectives of a layer": (
        "tensorflow/test_collectives.py"
        "::test_one_collective_forward_and_one_backward_on_each_replica",
        "jax/test_collectives.py::test_two_collectives_a_layer_in_the_train_step_of_keras",
        "torch/test_process_groups.py"
        "::test_one_collective_forward_and_one_backward_none_in_inference",
    ),
    "parts of different": (
        "contract/test_equivalence.py::test_any_split_of_the_batch_gives_what_one_device_gives",
        "jax/test_ragged.py",
        "torch/test_training.py::test_distributed_data_parallel_trains_to_what_one_process_gives",
    ),
    "Keras's `fit`": (
        "tensorflow/test_scenarios.py::test_training_on_replicas_gives_what_one_device_gives",
        "jax/test_fit.py::test_fit_under_a_distribution_equals_one_device",
        "torch/test_average_gradients.py"
        "::test_two_uneven_processes_end_at_the_weights_and_logs_of_one",
    ),
    "compiled": (
        "tensorflow/test_precision.py::test_compiled_by_xla_the_variance_is_as_right",
        "contract/test_equivalence.py::test_any_split_of_the_batch_gives_what_one_device_gives",
        "torch/test_training.py"
        "::test_torch_compile_makes_one_graph_that_gives_what_one_device_gives",
    ),
    "`nan_check`": (
        "tensorflow/test_nan_check.py::test_xla_which_would_leave_it_out_is_refused",
        "jax/test_refusals.py::test_what_needs_values_is_refused_where_xla_compiles",
        "torch/test_training.py::test_what_must_be_able_to_stop_is_refused_where_torch_compiles",
    ),
    "gradients of gradients": (
        "tensorflow/test_gradients.py::test_gradients_of_gradients_are_those_of_the_whole_batch",
        "jax/test_derivatives.py::test_gradients_of_gradients",
        "torch/test_gradients.py::test_gradients_of_gradients_are_those_of_the_whole_batch",
    ),
    "`recalibrate`": (
        "tensorflow/test_recalibration.py",
        "jax/test_recalibration.py",
        "torch/test_recalibration.py",
    ),
    "exported": (
        "tensorflow/test_export.py::test_a_model_trained_on_replicas_is_exported_as_keras_s_own",
        "jax/test_export.py::test_the_exported_program_is_keras_s_own",
        "torch/test_export.py::test_the_exported_program_is_keras_s_own",
    ),
    "`verify`": (
        "tensorflow/test_verify.py::test_it_convicts_by_the_right_cause",
        "jax/test_verify.py",
        "torch/test_verify.py",
    ),
    "`SyncMonitor`": (
        "tensorflow/test_monitor.py::test_distances_are_those_of_numpy_by_elements",
        "jax/test_monitor.py",
        "torch/test_monitor.py",
    ),
    "`syncbn train`": (
        "cli/test_train.py",
        "cli/test_train_backends.py",
        "cli/test_train_backends.py",
    ),
}


def rows():
    table = README.split("<!-- support -->\n")[1].split("\n<!-- /support -->")[0].splitlines()
    head, _, *rest = ([cell.strip() for cell in line.strip("|").split("|")] for line in table)
    assert [name.lower() for name in head[1:]] == list(COLUMNS)
    return rest


def behind(words):
    """The tests of a row's cells."""
    (name,) = [name for name in {**CELLS, **EVERYWHERE} if words.startswith(name)]
    return CELLS.get(name) or (EVERYWHERE[name],) * len(COLUMNS)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:30])
def test_each_cell_has_a_test_that_runs_there(row):
    words, *cells = row
    tests = behind(words)
    assert len(cells) == len(tests)
    for column, test in zip(COLUMNS, tests, strict=True):
        path, _, name = test.partition("::")
        folder = path.split("/")[0]
        assert folder in {"contract", column, "meta", "cli", "multiprocess"}, test
        assert column == "tensorflow" or folder != "multiprocess", test
        tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        found = name in functions if name else any(f.startswith("test_") for f in functions)
        assert found, test


def test_no_row_is_named_that_the_table_does_not_have():
    starts = [row[0] for row in rows()]
    for name in {**CELLS, **EVERYWHERE}:
        assert any(words.startswith(name) for words in starts), name


def test_a_cell_without_its_test_would_be_noticed(monkeypatch):
    monkeypatch.setitem(EVERYWHERE, "one device", "contract/test_equivalence.py::test_nonsense")
    with pytest.raises(AssertionError, match="test_nonsense"):
        test_each_cell_has_a_test_that_runs_there(rows()[0])


def test_the_versions_of_the_readme_are_those_that_are_installed():
    lock = (TESTS.parent / "requirements.lock").read_text(encoding="utf-8")
    sentence = re.search(r"Developed on (.*?), on CPU\.", README, re.DOTALL)[1]
    found = dict(re.findall(r"(\w+) (\d+\.\d+\.\d+)", sentence))
    assert found.keys() == {"Keras", "TensorFlow", "JAX", "torch"}
    for name, version in found.items():
        assert re.search(rf"^{name.lower()}=={re.escape(version)}\b", lock, re.MULTILINE), name
