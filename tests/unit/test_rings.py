"""Numbers of collectives that come again: not those of a call that failed, and alike everywhere."""

import json

import pytest

from syncbn.multi_worker.rings import FIRST, RING, Numbers, Rings


def test_a_ring_comes_round_and_kinds_have_rings_of_their_own():
    rings = Rings()
    first = [rings.next("a") for _ in range(RING)]
    other = [rings.next("b") for _ in range(RING)]
    assert len({*first, *other}) == 2 * RING
    assert [rings.next("a") for _ in range(RING)] == first
    assert [rings.next("b") for _ in range(RING)] == other


def test_devices_that_come_by_the_same_collectives_get_the_same_numbers():
    one, another = Rings(), Rings()
    kinds = [("float64", (3,)), ("float32", (7,)), ("float64", (3,)), ("float64", (5,))]
    assert [one.next(kind) for kind in kinds] == [another.next(kind) for kind in kinds]
    assert one.digest == another.digest


def take(numbers, count, kind="a", device="CPU:0"):
    with numbers.operation(), numbers.call():
        return [numbers.rings(1, device).next(kind) for _ in range(count)]


def fail(numbers, count):
    """The same in a call that ends by an error."""
    taken = []

    def call():
        with numbers.operation(), numbers.call():
            taken.extend(numbers.rings(1, "CPU:0").next("a") for _ in range(count))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        call()
    return taken


def test_what_a_failed_call_took_never_comes_again():
    numbers = Numbers()
    kept = take(numbers, 3)
    given_up = fail(numbers, 5)
    later = take(numbers, 4 * RING)
    assert not {*given_up} & {*later}
    assert {*kept} <= {*later}
    assert len({*later}) == RING


def test_a_call_that_succeeded_gives_up_nothing_when_a_later_one_fails():
    numbers = Numbers()
    kept = take(numbers, 3)
    fail(numbers, 0)
    assert {*kept} <= {*take(numbers, RING)}


def test_rings_made_within_a_failing_call_give_up_too():
    numbers = Numbers()
    given_up = fail(numbers, 2)
    assert not {*given_up} & {*take(numbers, 2 * RING)}


def test_workers_that_fail_alike_go_on_alike():
    one, another = Numbers(), Numbers()
    for numbers in (one, another):
        take(numbers, 3)
        fail(numbers, 5)
    assert one.state() == another.state() != []
    assert take(one, 2 * RING) == take(another, 2 * RING)


def test_workers_of_which_one_failed_start_anew_above_all_that_was_used():
    one, another, idle = Numbers(), Numbers(), Numbers()
    used = {*take(one, 3), *take(another, 3), *fail(one, 5), *take(another, 7, "b")}
    states = [json.loads(json.dumps(numbers.state())) for numbers in (one, another, idle)]
    taken = []
    for numbers in (one, another, idle):
        numbers.agree(states)
        taken.append(take(numbers, 2 * RING))
    assert taken[0] == taken[1] == taken[2]
    assert not used & {*taken[0]}
    assert one.state() == another.state() == idle.state()


def test_workers_that_agree_keep_their_numbers():
    one, another = Numbers(), Numbers()
    assert take(one, 3) == take(another, 3) == [FIRST, FIRST + 1, FIRST + 2]
    one.agree([one.state(), another.state()])
    assert take(one, RING) == take(another, RING)
    assert one.rings(1, "CPU:0").unused == FIRST + RING


def test_devices_of_one_process_have_the_same_state_whatever_their_names():
    one, another = Numbers(), Numbers()
    for numbers, task in ((one, 0), (another, 1)):
        for device in range(2):
            take(numbers, 3, device=f"/job:worker/task:{task}/device:CPU:{device}")
    assert one.state() == another.state()
    assert len(one.state()) == 2


def test_numbers_come_again_only_within_a_call_of_an_operation():
    numbers = Numbers()
    assert not numbers.are_agreed
    with numbers.operation():
        assert not numbers.are_agreed
        with numbers.call():
            assert numbers.are_agreed
    with numbers.call():
        assert not numbers.are_agreed


def test_nothing_is_kept_of_what_is_taken_outside_of_calls():
    """In one process a loop of one's own uses the rings, for ever."""
    rings = Rings()
    for _ in range(3):
        rings.next("a")
    assert rings._taken is None
