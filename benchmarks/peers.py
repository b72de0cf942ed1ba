"""One batch normalization, forward and backward: ours against peers in their own frameworks.

Each framework has an environment of its own in `.venv-peers`, made when it is first needed, and a
process of its own there. The processes take turns, a round each, so that a change of the machine's
speed meets all of them; before that they must have given the same outputs and gradients. A figure
is the median of the ratios of one round, with the quartiles.

    python benchmarks/peers.py --output benchmarks/results/peers.json

Where a peer's framework finds a GPU, its kernels are measured there too. That has never run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import select
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from machine import options, write
from syncbn.bench.timing import Quartiles

ROOT = Path(__file__).parents[1]
PLAYERS = Path(__file__).parent / "players"
ENVIRONMENTS = ROOT / ".venv-peers"
SHAPES = ((16, 56, 56, 64), (16, 14, 14, 256), (64, 128), (1024, 512))
BASELINE = "syncbn"
TOLERANCE = 1e-3  # between the outputs and gradients of the players, relative to the largest

_CPU = "-cpu" if platform.machine() in ("x86_64", "AMD64") else ""
# What pip is asked for, in this order. tf_keras would bring the large build of TensorFlow along;
# torch comes as its build for CPUs from the registry in use, or as the larger ordinary one.
PINS: dict[str, tuple[tuple[str, ...], ...]] = {
    "tf_keras": ((f"tensorflow{_CPU}==2.21.0",), ("--no-deps", "tf_keras==2.21.0")),
    "flax": (("jax==0.10.2", "flax==0.12.8"),),
    "torch": (("torch==2.13.0",), ("numpy==2.4.6",)),
}
PROGRAMS = {
    BASELINE: "tensorflow_layers.py",
    "tf_keras": "tensorflow_layers.py",
    "flax": "flax_layers.py",
    "torch": "torch_layers.py",
}


class Group(NamedTuple):
    """Variants that do the same work; which player has each."""

    replicas: int
    players: dict[str, str]  # by variant
    baseline: str = BASELINE


GROUPS = (
    Group(2, {BASELINE: BASELINE, "tf_keras_sync": "tf_keras", "flax_sync": "flax"}),
    Group(
        1,
        {
            BASELINE: BASELINE,
            "tf_keras_local": "tf_keras",
            "flax_local": "flax",
            "torch_contiguous": "torch",
            "torch_channels_last": "torch",
        },
    ),
)
# A copy is one read and one write of a tensor: the yardstick, not a peer. Not on a CPU, whose
# caches hold both tensors of these shapes.
ON_ACCELERATOR = {
    "torch": ("torch_contiguous", "torch_channels_last", "torch_sync", "copy"),
    "flax": ("flax_local",),
}


def environment(peer: str, folder: Path = ENVIRONMENTS) -> Path:
    """The Python of the peer's environment, made unless it has what is pinned.

    Raises:
        RuntimeError: it could not be made.
    """
    home = folder / peer
    python = home / "bin" / "python"
    pins = json.dumps(PINS[peer])
    ready = home / "pins.json"
    if ready.is_file() and ready.read_text(encoding="utf-8") == pins:
        return python
    print(f"making the environment of {peer} (minutes, about 1 GB)", flush=True)
    pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    commands: list[tuple[str, ...]] = [(sys.executable, "-m", "venv", "--clear", str(home))]
    commands += [(*pip, *packages) for packages in PINS[peer]]
    for command in commands:
        if subprocess.run(command, check=False, timeout=1800).returncode != 0:
            raise RuntimeError(
                f"The peer {peer} requires {PINS[peer]} from the package registry. Received: "
                f"`{' '.join(command)}` failed, its output is above. Leave the peer out by naming "
                "the others: --peers NAME ..."
            )
    ready.write_text(pins, encoding="utf-8")
    return python


class Player:
    """A process that takes a turn when it is told to: `players/serve.py` says how."""

    def __init__(self, command: Sequence[str], timeout: float = 300) -> None:
        self._command = command
        self._timeout = timeout
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        self._made = 0
        try:
            self.facts = self._answer()
        except BaseException:
            self.close()
            raise

    def make(self, variant: str, shape: Sequence[int], replicas: int) -> Made:
        """A step of the variant, ready to be taken in turns."""
        answer = self._ask(make=variant, shape=list(shape), replicas=replicas)
        self._made += 1
        return Made(self, self._made - 1, answer["sample"])

    def seconds(self, number: int, steps: int) -> float:
        """Take a turn: seconds of one step of what was made as this number, from several."""
        return float(self._ask(run=number, steps=steps)["seconds"])

    def close(self) -> None:
        """End the process, by force if it does not end by itself."""
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def _ask(self, **request: Any) -> dict[str, Any]:
        if not self._process.stdin:
            raise RuntimeError("a player without an input")
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        output = self._process.stdout
        if not output:
            raise RuntimeError("a player without an output")
        # A player says one line and waits: nothing is left in the buffer while this waits.
        ready, _, _ = select.select([output], [], [], self._timeout)
        line = output.readline() if ready else b""
        if not line:
            received = "none" if not ready else "its end"
            self._process.kill()
            raise RuntimeError(
                f"An answer within {self._timeout:.0f} s is required of "
                f"`{' '.join(self._command)}`. Received: {received}. Look at what it printed above."
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


class Made(NamedTuple):
    """A step of a player."""

    player: Player
    number: int
    sample: list[list[float]]

    def seconds(self, steps: int) -> float:
        """Take a turn."""
        return self.player.seconds(self.number, steps)


def check_same(made: Mapping[str, Made], baseline: str) -> None:
    """Refuse figures of players that did not do the same work.

    Raises:
        RuntimeError: outputs or gradients differ.
    """
    expected = made[baseline].sample
    for name, one in made.items():
        for what, own, other in zip(("y", "dx", "dγ", "dβ"), one.sample, expected, strict=False):
            limit = TOLERANCE * max(map(abs, other))
            difference = max(abs(a - b) for a, b in zip(own, other, strict=True))
            if not difference <= limit:
                raise RuntimeError(
                    f"Equal work requires {what} of {name} within {limit:.1e} of {baseline}'s. "
                    f"Received: a difference of {difference:.1e}. Find what differs first."
                )


def in_turns(made: Mapping[str, Made], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of a step of each variant in each round; who begins changes from round to round."""
    names = list(made)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(made[name].seconds(steps))
    return seconds


def figures(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, dict[str, float]]:
    """Of each variant the median time, and how many times as fast the baseline is."""
    found = {}
    for name, own in seconds.items():
        ratios = [one / base for one, base in zip(own, seconds[baseline], strict=True)]
        low, median, high = Quartiles.of(ratios)
        found[name] = {
            "milliseconds_median": round(1e3 * statistics.median(own), 4),
            f"{baseline}_times_as_fast": round(median, 3),
            "lower_quartile": round(low, 3),
            "upper_quartile": round(high, 3),
        }
    return found


def steps_of(shape: Sequence[int]) -> int:
    """Steps of a round: some tens of milliseconds."""
    return max(2, min(50, round(8e6 / math.prod(shape))))


def measure(
    group: Group, players: Mapping[str, Player], shape: Sequence[int], rounds: int
) -> dict[str, dict[str, float]]:
    """Figures of the variants whose players are there."""
    made = {
        variant: players[player].make(variant, shape, group.replicas)
        for variant, player in group.players.items()
        # Without places there is one layout.
        if player in players and not (variant == "torch_channels_last" and len(shape) != 4)
    }
    check_same(made, group.baseline)
    return figures(in_turns(made, rounds, steps_of(shape)), group.baseline)


@contextlib.contextmanager
def started(peers: Sequence[str], device: str | None = None) -> Iterator[dict[str, Player]]:
    """A process of each; they are ended at the end."""
    with contextlib.ExitStack() as stack:
        players = {}
        for peer in peers:
            python = sys.executable if peer == BASELINE else str(environment(peer))
            command = [python, str(PLAYERS / PROGRAMS[peer]), *([device] if device else [])]
            players[peer] = Player(command)
            stack.callback(players[peer].close)
        yield players


def on_accelerators(found: Mapping[str, str], rounds: int) -> list[dict[str, Any]]:
    """Figures of each peer's variants on the accelerator that its framework has found.

    A peer that fails there has a row that says so: the figures of the CPU do not depend on it.
    """
    results: list[dict[str, Any]] = []
    for peer, device in found.items():
        variants = ON_ACCELERATOR.get(peer, ())
        if not variants:
            continue
        group = Group(1, dict.fromkeys(variants, peer), baseline=variants[0])
        try:
            with started([peer], device) as players:
                for shape in (shape for shape in SHAPES if len(shape) == 4):
                    row = {"device": device, "shape_per_replica": shape}
                    results.append({**row, "variants": measure(group, players, shape, rounds)})
        except RuntimeError as error:
            print(f"{peer} on {device}: {error}", file=sys.stderr)
            results.append({"device": device, "peer": peer, "error": str(error)})
    return results


def show(found: Mapping[str, Mapping[str, float]], baseline: str) -> None:
    """Print a line for each variant."""
    for name, one in found.items():
        print(
            f"  {name:21} {one['milliseconds_median']:9.3f} ms   {baseline} is "
            f"{one[f'{baseline}_times_as_fast']:5.2f} times as fast "
            f"({one['lower_quartile']:.2f} to {one['upper_quartile']:.2f})"
        )


def main() -> int:
    """Measure every shape, print a table, write the JSON."""
    parser = options(__doc__, rounds=30)
    parser.add_argument("--peers", nargs="+", choices=tuple(PINS), default=list(PINS))
    arguments = parser.parse_args()
    results = []
    with started([BASELINE, *arguments.peers]) as players:
        for group in GROUPS:
            for shape in SHAPES:
                found = measure(group, players, shape, arguments.rounds)
                row = {"replicas": group.replicas, "shape_per_replica": shape, "variants": found}
                results.append(row)
                print(f"{list(shape)} × {group.replicas}", flush=True)
                show(found, group.baseline)
        facts = {name: player.facts for name, player in players.items()}
    accelerators = {name: own["accelerator"] for name, own in facts.items() if own["accelerator"]}
    write(
        arguments.output,
        what="forward and backward of one batch normalization, float32, each in its framework",
        rounds=arguments.rounds,
        players=facts,
        results=results,
        on_accelerators=on_accelerators(accelerators, arguments.rounds),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
