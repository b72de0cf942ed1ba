"""Processes that take turns: what they are told, what they must agree on, and how they end."""

import contextlib
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Sleeps as long as its argument says, and gives its other argument.
FAKE = f"""
    import sys, time
    sys.path.insert(0, {str(BENCHMARKS / "players")!r})
    import numpy as np
    from serve import Made, serve
    seconds, value = map(float, sys.argv[1:])

    def make(variant, shape, replicas):
        print("a framework greets", variant)
        one = np.full(shape, value * replicas)
        return Made(lambda: time.sleep(seconds), lambda: [one, one])

    serve(make, versions={{"fake": "1"}}, threads=1, accelerator=None)
"""


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import peers

    return peers


@pytest.fixture
def player(peers, tmp_path):
    """Starts fake players; at the end none of their processes is left."""
    started = []

    def start(seconds, value=1.0, code=FAKE, timeout=60.0):
        file = tmp_path / f"player{len(started)}.py"
        file.write_text(textwrap.dedent(code))
        command = [sys.executable, str(file), str(seconds), str(value)]
        started.append(peers.Player(command, timeout))
        return started[-1]

    yield start
    for one in started:
        one.close()
    assert all(one._process.poll() is not None for one in started)


def test_a_process_that_sleeps_twice_as_long_is_half_as_fast(peers, player):
    players = {"ours": player(0.02), "theirs": player(0.04)}
    group = peers.Group(2, {"syncbn": "ours", "fake": "theirs"})
    found = peers.measure(group, players, [2000, 2000], rounds=5)
    assert found["fake"]["syncbn_times_as_fast"] == pytest.approx(2, rel=0.1)
    assert found["fake"]["milliseconds_median"] == pytest.approx(40, rel=0.1)
    assert found["syncbn"]["syncbn_times_as_fast"] == 1
    assert players["ours"].facts["versions"] == {"fake": "1"}


def test_variants_take_turns_and_another_begins_in_each_round(peers):
    calls = []
    made = {
        name: SimpleNamespace(seconds=lambda steps, name=name: calls.append((name, steps)) or 1.0)
        for name in "ab"
    }
    assert peers.in_turns(made, 2, 7) == {"a": [1, 1], "b": [1, 1]}
    assert calls == [("a", 7), ("b", 7), ("b", 7), ("a", 7)]


@pytest.mark.parametrize("value", [1.01, float("nan")])
def test_players_that_give_other_values_are_refused(peers, player, value):
    made = {
        "syncbn": player(0, 1.0).make("syncbn", [4], 1),
        "fake": player(0, value).make("fake", [4], 1),
    }
    with pytest.raises(RuntimeError, match="Equal work requires y of fake"):
        peers.check_same(made, "syncbn")


def test_a_player_that_ends_or_hangs_is_an_error_that_names_it(player):
    with pytest.raises(RuntimeError, match=r"player0\.py 0 1\.0`\. Received: its end"):
        player(0, code="raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="within 1 s"):
        player(0, code="import time; time.sleep(60)", timeout=1)


@pytest.mark.benchmarks
def test_our_player_gives_batch_normalization_of_the_whole_batch(peers, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS / "players")
    import serve

    shape = [4, 3, 3, 2]
    with peers.started([peers.BASELINE]) as players:
        made = players[peers.BASELINE].make("syncbn", shape, 2)
        assert made.seconds(2) > 0
    x, dy = (array.astype(np.float64) for array in serve.arrays(shape, 2))
    axes = (0, 1, 2)
    inverse = 1 / np.sqrt(x.var(axes) + 1e-3)
    normal = (x - x.mean(axes)) * inverse
    dgamma, dbeta = (dy * normal).sum(axes), dy.sum(axes)
    dx = inverse * (dy - (dbeta + normal * dgamma) / (x.size / 2))
    expected = serve.sample([normal, dx, dgamma, dbeta])
    np.testing.assert_allclose(made.sample, expected, rtol=1e-4, atol=1e-4)


def test_an_environment_is_made_once_and_again_when_the_pins_change(peers, tmp_path, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command)
        Path(tmp_path / "torch").mkdir(exist_ok=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(peers.subprocess, "run", run)
    python = peers.environment("torch", tmp_path)
    assert [command[-1] for command in commands[1:]] == ["torch==2.13.0", "numpy==2.4.6"]
    made = len(commands)
    assert peers.environment("torch", tmp_path) == python
    assert len(commands) == made
    monkeypatch.setitem(peers.PINS, "torch", (("torch==0",),))
    peers.environment("torch", tmp_path)
    assert len(commands) > made


def test_an_environment_that_cannot_be_made_is_one_error_with_the_way_out(
    peers, tmp_path, monkeypatch
):
    failed = subprocess.CompletedProcess((), 1)
    monkeypatch.setattr(peers.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"The peer flax requires .* --peers NAME"):
        peers.environment("flax", tmp_path)
    assert not (tmp_path / "flax" / "pins.json").exists()


def test_a_peer_that_fails_on_an_accelerator_leaves_the_other_figures(
    peers, player, monkeypatch, capsys
):
    def started(names, device):
        assert device == "cuda"
        return contextlib.nullcontext({names[0]: player(0, code=codes[names[0]])})

    codes = {"torch": FAKE, "flax": "raise SystemExit(3)"}
    monkeypatch.setattr(peers, "started", started)
    monkeypatch.setattr(peers, "SHAPES", ((2, 1, 1, 3), (4, 3)))
    found = peers.on_accelerators({"torch": "cuda", "flax": "cuda"}, 2)
    assert [row.get("shape_per_replica") for row in found] == [(2, 1, 1, 3), None]
    assert set(found[0]["variants"]) == set(peers.ON_ACCELERATOR["torch"])
    assert (found[1]["peer"], found[1]["device"]) == ("flax", "cuda")
    assert "flax on cuda: An answer" in capsys.readouterr().err


def test_every_variant_has_a_player_and_every_peer_has_pins(peers):
    for group in peers.GROUPS:
        assert group.baseline in group.players
        assert set(group.players.values()) <= set(peers.PROGRAMS)
    assert set(peers.PROGRAMS) == {*peers.PINS, peers.BASELINE}
    assert set(peers.ON_ACCELERATOR) <= set(peers.PINS)
    pinned = [name for step in peers.PINS.values() for names in step for name in names]
    assert all("==" in name or name == "--no-deps" for name in pinned)


def test_tf_keras_comes_with_the_tensorflow_that_is_locked(peers):
    lock = (BENCHMARKS.parent / "requirements.lock").read_text()
    tensorflow, tf_keras = peers.PINS["tf_keras"][0][0], peers.PINS["tf_keras"][1][-1]
    assert tensorflow in lock
    assert tf_keras.split("==")[1] == tensorflow.split("==")[1]
