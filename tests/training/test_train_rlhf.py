"""The command: its defaults, its errors as plain paragraphs, and a run that is interrupted and goes
on.
"""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from scripts import script
from tiny import tiny_pipeline

from rlhf.config import RewardGradientConfig
from rlhf.evaluation.held_out import Evaluation
from rlhf.generator.files import NANO_PATH

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "train_rlhf.py"

REWARD = """
def redness(video, prompts, **info):
    return (video[:, 0] - video[:, 2]).mean((1, 2, 3)) * 10
"""


@pytest.fixture(scope="module")
def main():
    return script("train_rlhf.py").main


@pytest.fixture
def project(tmp_path):
    """A user's folder: a model, prompts, a reward of their own and a config that names them."""
    tiny_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "train.txt").write_text("a red fox\nrain\nthe sea\n")
    (tmp_path / "held_out.txt").write_text("a town\na leaf\n")
    (tmp_path / "reward.py").write_text(REWARD)
    settings = {
        "model": str(tmp_path / "model"),
        "prompts": "train.txt",
        "eval_prompts": "held_out.txt",
        "reward_funcs": ["reward.py:redness"],
        "output_dir": str(tmp_path / "run"),
        "max_steps": 3,
        "num_frames": 5,
        "report_to": "none",
        "cpu_threads": 1,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_a_shipped_config_goes_by_its_name_and_its_dry_run_prints_settings_and_needs(
    main, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["--config", "contentv_8b_24gib", "--dry_run"]) == 0
    text = capsys.readouterr().out
    for line in ("learning_rate: 1.0e-05", "lora_rank: 32", "stream_weights: true", "8,056,627,520 parameters"):
        assert line in text
    assert re.search(r"transformer calls of one process, per video +50$", text, re.MULTILINE)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "nano").mkdir()
    assert main(["--config", "nano", "--dry_run"]) == 2, "a folder of that name is no longer the shipped one"
    assert "--config: got nano, which is not a file" in capsys.readouterr().err


def test_a_resume_hint_names_a_command_that_can_be_launched(monkeypatch):
    from rlhf import train

    monkeypatch.setattr("rlhf.run.checkpoint.newest_undamaged_checkpoint", lambda folder: folder / "step-3")
    resume, replace = "--resume_from_checkpoint latest", "--overwrite_output_dir false"
    for started, flags, launched in (
        (train.__file__, "--seed 1", f"-m rlhf.train --seed 1 {resume}"),
        ("train_rlhf.py", f"{resume} --seed 1", f"train_rlhf.py --seed 1 {resume}"),
        ("a.py", "--overwrite-output-dir --seed 1 --resume_from_checkpoint=auto", f"a.py --seed 1 {replace} {resume}"),
    ):
        monkeypatch.setattr(sys, "argv", [started, *flags.split()])
        args = RewardGradientConfig(output_dir="runs/x", overwrite_output_dir="overwrite" in flags)
        assert train.resume_hint(args).endswith(f"accelerate launch {launched}")


@pytest.mark.parametrize(
    ("reward", "flag", "place", "prompt", "told"),
    [
        ("nano_preference", "prompts", 9, "привет", "of which it knows no word"),
        ("nano_preference", "eval_prompts", 0, "a dog on the sofa", "of which it knows no word"),
        ("nano_verifier", "eval_prompts", 9, "a red kite", "which lacks a colour, a shape or a motion"),
    ],
)
def test_a_prompt_that_a_reward_cannot_read_is_named_wherever_it_stands(
    main, tmp_path, capsys, monkeypatch, reward, flag, place, prompt, told
):
    prompts = ["a small red circle moving left"] * 10
    prompts[place] = prompt
    (tmp_path / "p.txt").write_text("\n".join(prompts), encoding="utf-8")
    monkeypatch.setattr("rlhf.training.setup.find_base", None)
    flags = [f"--{flag}", str(tmp_path / "p.txt"), "--output_dir", str(tmp_path / "run"), "--device", "cpu"]
    assert main([*flags, "--eval_reward_funcs", *["nano_verifier"] * (reward == "nano_verifier"), "flicker"]) == 1
    assert (
        f"reward {reward!r}: got the prompt {prompt!r}, {told}; expected a sentence of the nano world"
        in capsys.readouterr().err
    )


def test_a_users_own_model_prompts_and_reward_and_a_resolved_config_that_repeats_the_run(
    main, project, capsys, monkeypatch
):
    assert main(["--config", str(project / "config.yaml"), "--max_steps", "2"]) == 0
    first = json.loads((project / "run" / "summary.json").read_text())
    assert (first["steps"], set(first["trained"])) == (2, {"redness"})
    assert "2 held-out prompts" in capsys.readouterr().out
    assert main(["--config", str(project / "config.yaml")]) == 2
    assert "holds a run already" in capsys.readouterr().err

    resolved = project / "run" / "config.yaml"
    assert yaml.safe_load(resolved.read_text())["height"] == 32, "the model's own size"
    monkeypatch.chdir("/")
    assert main(["--config", str(resolved), "--output_dir", str(project / "again")]) == 0
    assert json.loads((project / "again" / "summary.json").read_text())["trained"] == first["trained"]


@pytest.mark.parametrize(
    ("flag", "value", "told"),
    [
        ("learing_rate", "1", "did you mean 'learning_rate'?"),
        ("reward_funcs", "reward.py:blueness", "no 'blueness' in"),
    ],
)
def test_errors_are_one_paragraph_and_exit_2(main, project, capsys, flag, value, told, monkeypatch):
    monkeypatch.setattr("rlhf.training.setup.find_base", lambda *_, **__: pytest.fail("loaded weights"))
    assert main(["--config", str(project / "config.yaml"), f"--{flag}", value]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("train_rlhf: The settings have 1 problem:")
    assert told in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert not (project / "run").exists()


def test_text_where_a_path_belongs_and_a_damaged_file_and_a_full_disk_are_told(
    main, project, capsys, caplog, file_limit
):
    """Which the system refuses in words of its own, and which a resumed run finds after it has been
    loaded. A damaged evaluation of the base is made anew.
    """
    config = ["--config", str(project / "config.yaml")]
    assert main([*config, "--prompts", "a red fox in the snow, " * 20]) == 2
    assert "expected a path that can be read; correct the setting" in capsys.readouterr().err
    assert main([*config, "--max_steps", "1"]) == 0
    kept = {path: path.read_bytes() for path in (project / "run").iterdir() if path.is_file()}
    with file_limit(len(kept[project / "run" / "config.yaml"]) - 1):
        assert main([*config, "--max_steps", "2", "--resume_from_checkpoint", "latest"]) == 1
    told = capsys.readouterr().err
    assert "got [Errno 27] File too large, expected room on the run's disk. Nothing was removed" in told
    assert "Traceback" not in told
    assert {path: path.read_bytes() for path in (project / "run").iterdir() if path.is_file()} == kept
    (project / "run" / "evaluation" / "base.safetensors").write_bytes(b"half")
    assert main([*config, "--max_steps", "2", "--resume_from_checkpoint", "latest"]) == 0
    assert "base.safetensors: got a damaged file; evaluating the base anew" in caplog.text
    Evaluation.load(project / "run" / "evaluation" / "base.safetensors")


@pytest.mark.parametrize("where", ["rlhf.checks.check_config", "rlhf.training.rewards.open_rewards"])
def test_ctrl_c_before_the_training_is_one_line(main, project, capsys, monkeypatch, where):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    assert main(["--config", str(project / "config.yaml")]) == 130
    assert capsys.readouterr().err == "train_rlhf: interrupted before the training began; nothing was lost.\n"


@pytest.mark.parametrize("where", ["rlhf.checks.check_config", "rlhf.trainer.RewardGradientTrainer"])
def test_a_ctrl_c_that_a_library_swallows_still_ends_the_command(main, project, capsys, monkeypatch, where):
    def swallow(*settings, **_):
        with suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        return settings[0] if settings else SimpleNamespace(train=lambda: pytest.fail("trained"))

    monkeypatch.setattr(where, swallow)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background ignore it
    assert main(["--config", str(project / "config.yaml")]) == 130
    assert "train_rlhf: interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("late", [False, True])
def test_a_disk_that_does_not_answer_is_told(main, project, capsys, monkeypatch, late):
    def fail(*_, **__):
        raise OSError(errno.ESTALE, "Stale file handle", "/net/run/state.json")

    monkeypatch.setattr("rlhf.trainer.RewardGradientTrainer" if late else "rlhf.checks.check_config", fail)
    assert main(["--config", str(project / "config.yaml")]) == (1 if late else 2)
    told = "Stale file handle: '/net/run/state.json', expected a disk that answers. Nothing was removed; see to it"
    assert told in capsys.readouterr().err


def test_a_reward_that_breaks_ends_with_1_and_its_name(main, project, capsys):
    (project / "reward.py").write_text(REWARD.replace("* 10", "* float('nan')"))
    assert main(["--config", str(project / "config.yaml")]) == 1
    assert "train_rlhf: reward 'redness': got the score nan" in capsys.readouterr().err


def test_a_misspelt_key_and_a_reward_that_cannot_train_are_told_before_seconds_of_imports(project):
    (project / "reward.py").write_text(REWARD.replace("redness", "blind").replace("return ", "return 0 *"))
    flags = ["--learing_rate", "1"], ["--reward_funcs", "reward.py:blind"]
    argvs = [["--config", str(project / "config.yaml"), *mistake] for mistake in flags]
    code = f"import sys; from rlhf.train import main; codes = [main(argv) for argv in {argvs}]"
    code += "; print(*codes, 'diffusers' in sys.modules, 'peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["2", "1", "False", "False"], done.stderr
    assert done.stderr.count("train_rlhf: ") == 2


def test_ctrl_c_saves_and_a_second_run_goes_on(main, project):
    config = str(project / "config.yaml")
    command = [sys.executable, str(SCRIPT), "--config", config, "--max_steps", "100000", "--eval_prompts", "none"]
    command.append("--overwrite_output_dir")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    wait_for(project / "run" / "metrics.jsonl", process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    saved = sorted((project / "run" / "checkpoints").iterdir())
    assert len(saved) == 1
    done = int(saved[0].name.removeprefix("step-"))
    assert f"{saved[0]}; go on with" in errors
    told = errors.rstrip().splitlines()[-1].split()
    assert told[:3] == ["accelerate", "launch", str(SCRIPT)]
    assert main([*told[3:], "--max_steps", str(done + 2)]) == 0  # with --overwrite_output_dir still among the flags
    steps = [json.loads(line)["step"] for line in (project / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, done + 3))


def wait_for(path: Path, process, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.read_text().count("\n") >= 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_plan_for_a_gpu_takes_no_number_format_from_this_cpu(main, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("rlhf.checks.multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda **how: None)
    flags = ["--vae_dtype", "auto", "--dry_run", "--output_dir", str(tmp_path / "run")]
    on_the_cpu, limit = ["--device", "cpu"], ["--memory_limit_gib", "24"]
    for further, chosen, device in (
        ([], "bfloat16", "A process on a CPU needs more"),
        ([*on_the_cpu, *limit], "bfloat16", "A process on a CPU needs more"),
        ([*on_the_cpu, "--plan_device", "NVIDIA H200"], "float32", "Time on NVIDIA H200"),
        (limit, "float32", "Planned for an accelerator of the memory given, for this machine has none."),
    ):
        assert main([*flags, *further]) == 0
        text = capsys.readouterr().out
        assert f"vae_dtype: {chosen}\n" in text
        assert device in text


@pytest.mark.skipif(not NANO_PATH.exists(), reason="the weights of nano are not trained yet")
def test_the_main_job_in_small(main, tmp_path):
    flags = ["--max_steps", "1", "--warmup_steps", "0", "--num_eval_prompts", "2", "--per_device_train_batch_size", "1"]
    flags += ["--num_diversity_prompts", "0", "--num_sample_prompts", "2", "--output_dir", str(tmp_path / "run")]
    assert main(flags) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 <= summary["held_out"]["verifier"]["base"] <= 1
