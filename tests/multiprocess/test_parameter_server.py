"""ParameterServerStrategy cannot synchronize: a clear error, from a real cluster."""

import subprocess
import sys

import pytest

from tests.multiprocess.cluster import ROOT

pytestmark = pytest.mark.multiprocess


def test_parameter_server_strategy_is_refused_with_the_remedy():
    result = subprocess.run(
        [sys.executable, "-m", "tests.multiprocess.workers.parameter_server"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "REFUSED:" in result.stdout
    assert "Received: ParameterServerStrategy" in result.stdout
    assert "Train under one of those, or use keras.layers.BatchNormalization" in result.stdout
