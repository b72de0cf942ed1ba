"""Runs the contract on older TensorFlow and Keras, each pair in an environment of its own.

python tests/versions.py            # all pairs, about half an hour
python tests/versions.py 2.16.2     # one
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

# TensorFlow, Keras: the oldest of both, and where Keras changed what the layer stands on.
PAIRS = {
    "2.16.2": "3.0.5",
    "2.18.1": "3.6.0",
    "2.19.0": "3.7.0",
    "2.20.0": "3.11.3",
}
TOOLS = (
    *("editables", "hatchling", "hypothesis", "pytest", "pytest-timeout"),
    *("matplotlib", "rich", "scikit-learn"),
)
# What older versions warn of is theirs.
PYTEST = ("-q", "-o", "filterwarnings=", "-W", "ignore", "-p", "no:cacheprovider", "--tb=short")


def run_pair(tensorflow: str, keras: str, folder: Path) -> bool:
    """Install the pair and run the tests of the layer; whether all passed."""
    python = folder / "bin" / "python"
    pip = (str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    pins = (f"tensorflow-cpu=={tensorflow}", f"keras=={keras}")
    for command in (
        (sys.executable, "-m", "venv", str(folder)),
        (*pip, *pins, *TOOLS),
        (*pip, "--no-build-isolation", "--no-deps", "--editable", str(ROOT)),
        (str(python), "-m", "pytest", *PYTEST, "tests/contract", "tests/tensorflow", "tests/unit"),
    ):
        code = subprocess.run(command, cwd=ROOT, check=False, timeout=1800).returncode
        if code != 0:
            return False
    return True


def main() -> int:
    wanted = sys.argv[1:] or list(PAIRS)
    unknown = sorted(set(wanted) - set(PAIRS))
    if unknown:
        print(f"no such TensorFlow here: {unknown}; choose from {sorted(PAIRS)}", file=sys.stderr)
        return 2
    failed = []
    for tensorflow in wanted:
        print(f"== TensorFlow {tensorflow}, Keras {PAIRS[tensorflow]}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            if not run_pair(tensorflow, PAIRS[tensorflow], Path(folder)):
                failed.append(tensorflow)
    print("failed: " + ", ".join(failed) if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
