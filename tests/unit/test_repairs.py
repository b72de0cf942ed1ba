"""The switch of the repairs: once, undone, nothing guessed."""

from concurrent.futures import ThreadPoolExecutor

import keras
import pytest
from tests.processes import python

import syncbn
from syncbn.multi_worker import REPAIRS, switch
from syncbn.multi_worker import repair as repair_module
from syncbn.multi_worker.repair import Patch, Repair, source_probe

pytestmark = pytest.mark.skipif(
    tuple(map(int, keras.__version__.split(".")[:2])) < (3, 11), reason="repairs Keras 3.11 on"
)
NAMES = [repair.name for repair in REPAIRS]


@pytest.fixture(autouse=True)
def undone():
    yield
    if switch.active() is not None:
        switch.active().undo()


def snapshot():
    """What every repair would replace, as it is now."""
    return {
        (patch.owner.__name__, patch.attribute): vars(patch.owner).get(patch.attribute)
        for repair in REPAIRS
        for patch in repair.patches()
    }


def test_every_repair_is_put_in_and_taken_out_again():
    before = snapshot()
    enabled = syncbn.enable_multi_worker()
    assert enabled.applied == tuple(NAMES)
    during = snapshot()
    assert all(during[key] is not before[key] for key in before)
    enabled.undo()
    enabled.undo()
    assert snapshot() == before
    assert enabled.applied == ()


def test_enabling_twice_is_enabling_once():
    enabled = syncbn.enable_multi_worker()
    during = snapshot()
    assert syncbn.enable_multi_worker() is enabled
    assert snapshot() == during


def test_a_context_undoes_also_after_an_error():
    before = snapshot()

    def train():
        with syncbn.enable_multi_worker():
            assert switch.active() is not None
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert snapshot() == before
    assert switch.active() is None


def test_a_context_within_another_leaves_it_in_effect():
    before = snapshot()
    with syncbn.enable_multi_worker() as outer:
        with syncbn.enable_multi_worker() as inner:
            assert inner is outer
        assert outer.applied
        assert switch.active() is outer
    assert snapshot() == before
    syncbn.enable_multi_worker()
    with syncbn.enable_multi_worker():
        pass
    assert switch.active() is not None


def test_undoing_below_somebody_else_s_patch_undoes_nothing():
    enabled = syncbn.enable_multi_worker()
    names, first = enabled.applied, REPAIRS[0].patches()[0]
    ours = vars(first.owner)[first.attribute]
    setattr(first.owner, first.attribute, "theirs")
    with pytest.raises(syncbn.RepairError, match="another patch on top"):
        enabled.undo()
    assert enabled.applied == names
    assert switch.active() is enabled
    setattr(first.owner, first.attribute, ours)
    enabled.undo()
    assert switch.active() is None


def test_threads_that_enable_at_once_get_the_same():
    with ThreadPoolExecutor(4) as pool:
        found = {id(one) for one in pool.map(lambda _: syncbn.enable_multi_worker(), range(8))}
    assert len(found) == 1


def test_repairs_can_be_left_out_by_name():
    before = snapshot()
    enabled = syncbn.enable_multi_worker(without=["seeds"])
    assert "seeds" not in enabled.applied
    key = ("SeedGenerator", "next")
    assert snapshot()[key] is before[key]


def test_other_arguments_than_those_in_effect_are_refused():
    syncbn.enable_multi_worker(timeout=60)
    with pytest.raises(syncbn.InputError, match=r"without=\[\] and timeout=60.*timeout=30"):
        syncbn.enable_multi_worker(timeout=30)


def test_unknown_repairs_and_timeouts_are_refused():
    with pytest.raises(syncbn.InputError, match=r"Received: \['seed'\]. There are: .*'seeds'"):
        syncbn.enable_multi_worker(without=["seed"])
    for timeout in (0, -1, float("nan")):
        with pytest.raises(syncbn.InputError, match="more than 0"):
            syncbn.enable_multi_worker(timeout=timeout)


def test_a_keras_that_reads_otherwise_is_named_and_left_as_it_was(monkeypatch):
    before = snapshot()
    monkeypatch.setattr(repair_module.inspect, "getsource", lambda _: "def rewritten(): pass")
    message = r"repair 'building': .*reads otherwise, in Keras"
    with pytest.raises(syncbn.RepairError, match=message):
        syncbn.enable_multi_worker()
    assert switch.active() is None
    assert snapshot() == before


def test_a_keras_that_is_mended_is_left_alone(monkeypatch):
    monkeypatch.setattr(repair_module.inspect, "getsource", lambda _: "x = the_mended_way()")
    assert source_probe("keras.Model.fit", broken="old", mended="the_mended_way") is False
    assert source_probe("keras.Model.fit", broken="x = the_mended_way", mended="new") is True


def test_a_probe_of_what_is_not_there_cannot_tell():
    for name in ("keras.src.nothing.there", "keras.Model.no_such_method", "no_such_module.x"):
        with pytest.raises(syncbn.RepairError, match=f"requires a {name} that is known"):
            source_probe(name, broken="x")
    absent = Repair("absent", "", "", "syncbn.multi_worker.repairs.absent")
    with pytest.raises(syncbn.RepairError, match="repair 'absent'"):
        absent.is_needed()


def test_what_somebody_else_has_patched_since_is_not_taken_away(monkeypatch):
    applied = Patch(keras.Model, "some_attribute", lambda _: "ours").apply()
    monkeypatch.setattr(keras.Model, "some_attribute", "theirs")
    with pytest.raises(syncbn.RepairError, match=r"Model.some_attribute.*another patch on top"):
        applied.undo()
    assert keras.Model.some_attribute == "theirs"
    keras.Model.some_attribute = "ours"
    applied.undo()
    assert not hasattr(keras.Model, "some_attribute")


def test_the_catalogue_can_be_read_without_a_framework():
    code = (
        "import sys; from syncbn.multi_worker import REPAIRS; "
        "print([r.name for r in REPAIRS], {'keras', 'tensorflow'} & {*sys.modules})"
    )
    assert python(code).strip() == f"{NAMES} set()"


def test_on_another_backend_there_is_nothing_to_repair(monkeypatch):
    before = snapshot()
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    enabled = syncbn.enable_multi_worker()
    assert (enabled.applied, enabled.not_needed) == ((), tuple(NAMES))
    assert snapshot() == before
