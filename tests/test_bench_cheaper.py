"""The studies on nano: their settings are accepted, arms get the same time, results are collected."""

import json

import nano_runs
import pytest
import torch
from scripts import ROOT, script

from rlhf.checks import check_config
from rlhf.parse import parse_config

cheaper, methods, tables = script("bench/cheaper.py"), script("bench/methods.py"), script("bench/tables.py")


@pytest.mark.parametrize("module", [cheaper, methods])
def test_the_settings_of_every_arm_are_accepted(module, tmp_path):
    study = nano_runs.Study("study", module.ARMS)
    for arm in module.ARMS:
        _, train, *flags = study.command(arm, tmp_path / "run", 3, "cpu", ["--max_steps", "8"])
        assert train == str(ROOT / "train_rlhf.py")
        args = check_config(parse_config(flags))
        assert (args.seed, args.max_steps, args.output_dir) == (3, 8, str(tmp_path / "run"))
        assert all(getattr(args, name) == value for name, value in module.ARMS[arm].items())


def fake_run(seconds):
    """In place of a training run: writes what one would leave, with the step's time of its arm."""

    def run(command, folder):
        steps = int(command[command.index("--max_steps") + 1])
        uses = int(command[command.index("--rollout_uses") + 1]) if "--rollout_uses" in command else 1
        each = [30.0] + [seconds / uses] * (steps - 1)
        (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": 1, "seconds": s}) + "\n" for s in each))
        row = {"base": 0.5, "tuned": 0.6, "diff": 0.1}
        summary = {
            "steps": steps,
            "seconds": sum(each),
            "trained": {"r": row},
            "held_out": {"verifier": row, "clip": row},
        }
        summary |= {name: row for name in ("motion", "diversity", "high_frequency", "saturation")}
        summary |= dict.fromkeys(("gain_trained", "gain_held_out", "hacking_gap"), 0.2)
        (folder / "summary.json").write_text(json.dumps(summary))
        return True

    return run


def test_arms_train_for_the_same_time(monkeypatch, tmp_path):
    monkeypatch.setattr(nano_runs, "ROOT", tmp_path)
    monkeypatch.setattr(nano_runs, "_run", fake_run(2.0))
    cheaper.main(["--arms", "plain", "rollouts used 4 times", "--seeds", "0", "1", "--steps", "10", "--device", "cpu"])
    result = json.loads((tmp_path / "bench" / "results" / "cheaper.json").read_text())
    assert result["environment"]["training_seconds"] == pytest.approx(20)
    steps = {(row["arm"], row["seed"]): row["steps"] for row in result["rows"]}
    assert steps == {("plain", 0): 10, ("plain", 1): 10} | {("rollouts used 4 times", seed): 40 for seed in (0, 1)}
    table = tables.TABLES["cheaper.json"](result)
    assert "20 s of training each." in table
    assert "| `rollouts used 4 times` | 2 | +0.100 (+0.100 to +0.100) | +10.0 (+10.0 to +10.0) |" in table
    assert table.splitlines()[-1].endswith("| 40 |")


def test_a_run_that_is_done_is_not_made_again(monkeypatch, tmp_path):
    monkeypatch.setattr(nano_runs, "ROOT", tmp_path)
    made = []
    monkeypatch.setattr(
        nano_runs, "_run", lambda command, folder: made.append(folder) or fake_run(1.0)(command, folder)
    )
    study = nano_runs.Study("study", {"plain": {}})
    for _ in range(2):
        study.train_all(["plain"], [0], 1, torch.device("cpu"), lambda _: ["--max_steps", "4"], {})
    assert made == [tmp_path / "bench" / "runs" / "study" / "plain-0"]
