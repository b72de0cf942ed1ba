"""`verify` on processes of torch: who agrees, and who departs."""

import pytest
from tests.torch import verifying

import syncbn
from syncbn.verification.verdict import Cause, Kind, Outcome


def verified(build, replicas=2, **options):
    # The last batch is of one example: the second process has none of it.
    return syncbn.verify(build, verifying.data(), replicas, steps=3, batch_size=4, **options)


@pytest.mark.multiprocess
def test_uneven_and_empty_parts_agree_by_average_gradients():
    """The function calls it itself, on one device too."""
    verdict = verified(verifying.averaged)
    assert verdict.outcome is Outcome.AGREES, verdict
    assert verdict.settings["batch_sizes"] == [4, 4, 1]
    assert verdict.worst(Kind.GRADIENT).difference > 0
    assert verdict.worst(Kind.METRIC) is not None
    assert verdict.worst(Kind.SPREAD).difference == 0


@pytest.mark.multiprocess
def test_processes_that_each_train_a_model_of_their_own_are_convicted():
    verdict = verified(verifying.build)
    assert verdict.outcome is Outcome.DEPARTS
    assert verdict.findings[0].cause is Cause.NOT_SUMMED
    assert "average_gradients" in verdict.findings[0].remedy


@pytest.mark.multiprocess
@pytest.mark.frameworks
def test_plain_batch_normalization_is_convicted():
    verdict = verified(verifying.plain, repair=True)
    assert verdict.outcome is Outcome.DEPARTS
    assert (verdict.findings[0].cause, verdict.findings[0].layer) == (Cause.LOCAL, "norm")


@pytest.mark.multiprocess
@pytest.mark.frameworks
def test_three_processes_agree_by_repair():
    verdict = verified(verifying.build, replicas=3, repair=True)
    assert verdict.outcome is Outcome.AGREES, verdict


def test_a_function_that_no_process_can_import_is_refused():
    with pytest.raises(syncbn.InputError, match="requires a function that each of them can import"):
        verified(lambda: verifying.build())
