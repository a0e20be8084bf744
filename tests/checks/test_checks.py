"""Settings are checked all together; tests/helpers/config_mistakes.py has a row for each one."""

import pytest

from rlhf.checks import TRACKERS, check_config
from rlhf.checks.rewards import problems_raised_by
from rlhf.config import ConfigError, RewardGradientConfig, with_sampling

MODEL = {  # as ContentV-8B's; needs neither weights nor network
    "model": "ByteDance/ContentV-8B",
    "prompts": "nano_train",
    "reward_funcs": ["clip_score"],
}


@pytest.fixture
def problems(tmp_path):
    def find(**settings) -> str:
        settings = MODEL | {"output_dir": str(tmp_path / "run")} | settings
        try:
            check_config(RewardGradientConfig(**settings))
        except ConfigError as error:
            return str(error)
        return ""

    return find


def test_all_problems_are_told_at_once(problems):
    told = problems(num_frames=16, height=431, num_grad_steps=99, reward_funcs=["x"], prompts="absent.txt")
    assert told.startswith("The settings have 5 problems:")


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints/step-1/state.json"])
def test_a_folder_with_a_run_is_refused_unless_it_may_be_overwritten(problems, tmp_path, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.touch()
    assert "holds a run already" in problems()
    assert problems(overwrite_output_dir=True) == ""


def test_a_folder_with_other_files_is_fine(problems, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    assert problems() == ""


def test_sampling_settings_default_to_the_models_own():
    defaults = {"height": 1, "width": 2, "num_frames": 3, "num_inference_steps": 4, "guidance_scale": 5.0}
    defaults |= {"negative_prompt": "bad", "max_sequence_length": 6, "fps": 7}
    args = with_sampling(RewardGradientConfig(width=64, guidance_scale=0.0), defaults)
    assert (args.height, args.width, args.guidance_scale, args.negative_prompt) == (1, 64, 0.0, "bad")


@pytest.mark.parametrize(
    ("flags", "chosen"), [("avx512f avx512_bf16", "bfloat16"), ("amx_bf16", "bfloat16"), ("avx2 avx512f", "float32")]
)
def test_an_automatic_vae_is_in_bfloat16_on_a_cpu_that_multiplies_it(tmp_path, monkeypatch, flags, chosen):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : fpu {flags}\n")
    monkeypatch.setattr("rlhf.device.CPU_INFO", tmp_path / "cpuinfo")
    settings = MODEL | {"output_dir": str(tmp_path / "run"), "device": "cpu"}
    assert check_config(RewardGradientConfig(**settings, vae_dtype="auto")).vae_dtype == chosen
    assert check_config(RewardGradientConfig(**settings)).vae_dtype == "float32"


def test_the_trackers_are_those_of_accelerate():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert sorted(LOGGER_TYPE_TO_CLASS) == list(TRACKERS)


@pytest.mark.parametrize(("rank", "told"), [("0", 1), ("1", 0)])
def test_the_first_process_has_to_be_able_to_write(tmp_path, monkeypatch, rank, told):
    monkeypatch.setattr("rlhf.checks.os.access", lambda *_: False)
    for name, value in {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, value)
    settings = {"output_dir": str(tmp_path / "new"), "report_to": []}
    found = problems_raised_by(check_config, RewardGradientConfig(**settings))
    assert len(found) == sum(f"got no right to write in {tmp_path}" in problem for problem in found) == told
    assert check_config(RewardGradientConfig(**settings), planned_processes=1), "a dry run writes nothing"
