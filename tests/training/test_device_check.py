"""The check finds what is right to be right, and what is wrong to be wrong."""

import json
import math
from dataclasses import replace

import pytest
import torch

from rlhf.device.__main__ import main
from rlhf.generator.files import NANO_PATH
from rlhf.generator.loading import load_pipeline
from rlhf.training import device_check
from rlhf.training.device_check import Row, Training, distance, table

PHASES = ["forward", "gradient", "repeat", "step", "restore"]


@pytest.fixture
def small(monkeypatch):
    """Nano with short, small videos, sampled in one step."""

    def load(*args):
        pipe = load_pipeline(*args)
        pipe.sampling = replace(pipe.sampling, height=32, width=32, num_frames=5, num_inference_steps=1)
        return pipe

    monkeypatch.setattr(device_check, "load_pipeline", load)


def row(difference, tolerance=1e-3) -> Row:
    return Row("float32", 17, "forward", 0.1, 1.0, difference, tolerance)


def test_distances_are_relative_and_nothing_hides_a_nan():
    assert distance(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert row(1e-4).passed
    assert not row(2e-3).passed
    assert not row(math.nan).passed
    assert "FAILED" in table([row(2e-3)])
    assert row(0.0, 0.0).passed


@pytest.mark.skipif(not NANO_PATH.is_dir(), reason="the nano weights are not in this checkout")
@pytest.mark.usefixtures("small")
def test_on_the_cpu_float32_is_the_reference_itself(tmp_path, capsys):
    output = tmp_path / "results" / "device_check.json"
    assert main(["--check", "--device", "cpu", "--dtype", "float32", "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert written["environment"]["torch"] == torch.__version__
    assert [row["phase"] for row in written["rows"]] == PHASES
    assert all(row["difference"] == 0 and row["passed"] for row in written["rows"])
    assert all(row["seconds"] > 0 and row["peak_gib"] > 0 for row in written["rows"])
    assert "FAILED" not in capsys.readouterr().out


@pytest.mark.skipif(not NANO_PATH.is_dir(), reason="the nano weights are not in this checkout")
@pytest.mark.usefixtures("small")
def test_each_phase_can_fail(monkeypatch, capsys):
    """The second model errs a little in every phase; the first is the reference."""
    made = []

    class Wrong(Training):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)
            self.calls = 0

        def _err(self, x):
            self.calls += len(made) > 1
            return x * (1 + 0.01 * self.calls)

        def latents(self):
            return self._err(super().latents())

        def gradient(self):
            return self._err(super().gradient())

        def step(self, gradient):
            return super().step(self._err(gradient) + self.calls)

    monkeypatch.setattr(device_check, "Training", Wrong)
    assert main(["--check", "--device", "cpu", "--dtype", "float32"]) == 1
    told = capsys.readouterr().out
    assert [line.split()[1] for line in told.splitlines() if line.endswith("FAILED")] == PHASES


def test_without_check_the_device_is_only_named(capsys, monkeypatch):
    monkeypatch.setattr(device_check, "check_device", lambda *_: pytest.fail("checked"))
    assert main(["--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("cpu: ")
    with pytest.raises(SystemExit, match="device='abacus', expected one of"):
        main(["--device", "abacus"])
