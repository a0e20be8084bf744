"""Every impossible combination is found before a weight is loaded, and all of them together."""

import json

import pytest

from rlhf.checks import TRACKERS, check_config, with_sampling
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.reward_checks import told_by

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


def test_good_settings_pass(problems):
    assert problems() == ""


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_grad_steps": 51}, "num_grad_steps=51 exceeds num_inference_steps=50"),
        ({"num_grad_steps": 5, "num_inference_steps": 4}, "num_grad_steps=5 exceeds num_inference_steps=4"),
        ({"num_grad_steps": 0}, "num_grad_steps: got 0, expected at least 1"),
        ({"num_frames": 16}, "num_frames=16 is not 4k+1"),
        ({"num_frames": 16}, "use 17"),
        ({"height": 431}, "height=431 is not divisible by 16"),
        ({"width": 8}, "width=8 is not divisible by 16 (VAE times patch of ByteDance/ContentV-8B); use 16"),
        ({"model": "no/such/folder"}, "model='no/such/folder' is no folder here"),
        ({"prompts": "absent.txt"}, "prompts 'absent.txt': got no file at"),
        ({"eval_prompts": "absent.txt"}, "prompts 'absent.txt': got no file at"),
        ({"reward_funcs": ["clip_scor"]}, "'clip_score'"),
        ({"eval_reward_funcs": ["nano_verifer"]}, "'nano_verifier'"),
        ({"reward_funcs": []}, "reward_funcs: got none"),
        ({"eval_reward_funcs": ["clip_score"]}, "got 'clip_score' twice"),
        ({"reward_weights": [1, 2]}, "reward_weights: got 2, expected 1"),
        ({"reward_weights": [0]}, "reward_weights: got only zeros"),
        ({"reward_kwargs": {"clip_scor": {}}}, "did you mean 'clip_score'?"),
        (
            {"reward_kwargs": {"clip_score": {"frames": "half"}}},
            "got frames='half'; expected 'first', 'all' or a number",
        ),
        ({"reward_caps": {"clip_scor": 0.3}}, "reward_caps: got 'clip_scor', expected a reward of this run; did you"),
        ({"reward_targets": {"flicker": 1}, "eval_reward_funcs": ["flicker"]}, "reward_targets: got 'flicker', exp"),
        ({"reward_caps": {"clip_score": 1}, "reward_targets": {"clip_score": 1}}, "got 'clip_score' in both"),
        ({"calibrate_rewards": 1}, "calibrate_rewards: got 1, expected 0 or at least 2"),
        ({"calibrate_rewards": 8, "normalise_rewards": False}, "calibrate_rewards: got no normalise_rewards"),
        ({"learning_rate": -1}, "learning_rate: got -1.0, expected at least 0"),
        ({"max_steps": 0}, "max_steps: got 0, expected at least 1"),
        ({"adam_beta2": 1.0}, "adam_beta2: got 1.0"),
        ({"method": "ddpo"}, "method: got 'ddpo', expected one of draft_k, draft_lv"),
        ({"method": "refl", "num_grad_steps": 4}, "num_grad_steps: got 4 with method refl, which has no use for it"),
        (
            {"method_kwargs": {"steps": [1]}},
            "grad_steps: got [1] with method draft_k, which has no use for it; expected None, or",
        ),
        ({"method": "listed"}, "grad_steps: got None with method listed, expected different steps of 0 to 49"),
        ({"method": "listed", "method_kwargs": {"steps": [3, 50]}}, "expected different steps of 0 to 49"),
        ({"method": "alignprop"}, "num_grad_steps: got 1 with method alignprop"),
        ({"method": "refl", "method_kwargs": {"jump_steps": 51}}, "jump_steps=51 exceeds num_inference_steps=50"),
        ({"method": "drtune", "num_grad_steps": 42, "method_kwargs": {"jump_steps": 10}}, "jump to x0 after 41 of"),
        ({"method": "srpo", "align_sigmas": [0.5]}, "align_sigmas=[0.5] with align_delta=0.02"),
        ({"method": "srpo", "align_sigmas": [0.9, 0.99]}, "expected [from, to] with align_delta <= from"),
        ({"relative_words": ["sharp"]}, "relative_words: got ['sharp'], expected two phrases"),
        ({"guidance_gradient": "distill"}, "distill with drift_weight 0"),
        ({"guidance_gradient": "distill", "drift_weight": 1, "guidance_scale": 1}, "no guidance to teach"),
        ({"guidance_gradient": "half"}, "guidance_gradient: got 'half', expected one of full, text, none, distill"),
        ({"anchor_steps": 1}, "anchor_steps: got 1, which leaves no step for the reward"),
        ({"drift_weight": -1}, "drift_weight: got -1.0, expected at least 0"),
        ({"ema_decay": 1.0}, "ema_decay: got 1.0"),
        ({"train_blocks": ["transformer_blocks.38"]}, "expected transformer_blocks.0 to .37"),
        ({"lora_use_dora": True, "weight_decay": 0.1}, "weight_decay: got 0.1 with train_blocks or lora_use_dora"),
        ({"early_stopping_patience": 2}, "early_stopping_patience: got no eval_steps and no eval_reward_funcs"),
        (
            {"load_best_model_at_end": True, "eval_steps": 2, "eval_reward_funcs": ["flicker"], "eval_prompts": None},
            "load_best_model_at_end: got no eval_prompts",
        ),
        ({"dtype": "float16"}, "dtype: got 'float16', expected one of auto, float32, bfloat16"),
        ({"lr_scheduler_type": "cosine"}, "expected one of constant, linear"),
        ({"decode_checkpoint": True}, "decode_checkpoint: got no decode_chunk"),
        ({"device": "gpu"}, "device='gpu', expected one of"),
        ({"device": "cuda:1"}, "device: got 'cuda:1', expected a kind"),
        ({"report_to": ["tensorbord"]}, "report_to: got 'tensorbord'"),
        ({"report_to": ["clearml"]}, "pip install clearml"),
        ({"resume_from_checkpoint": "latest"}, "resume_from_checkpoint='latest': got no checkpoint"),
        ({"resume_from_checkpoint": "absent"}, "resume_from_checkpoint='absent': got no checkpoint there"),
        ({"resume_from_checkpoint": "latest", "overwrite_output_dir": True}, "got both, expected one"),
    ],
)
def test_each_problem_is_told_with_what_was_got_and_the_cure(problems, settings, told):
    assert told in problems(**settings)


def test_all_problems_are_told_at_once(problems):
    told = problems(num_frames=16, height=431, num_grad_steps=99, reward_funcs=["x"], prompts="absent.txt")
    assert told.startswith("The settings have 5 problems:")


def test_an_empty_prompt_file_is_told(problems, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    assert "got no prompts, expected one a line" in problems(prompts=str(tmp_path / "empty.txt"))


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "checkpoints"])
def test_a_folder_with_a_run_is_refused_unless_it_may_be_overwritten(problems, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    assert "holds a run already" in problems()
    assert problems(overwrite_output_dir=True) == ""


def test_a_folder_with_other_files_is_fine_and_a_file_is_not(problems, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    assert problems() == ""
    assert "is a file, expected a folder" in problems(output_dir=str(tmp_path / "run" / "notes.txt"))


def test_a_resumed_run_keeps_the_shape_of_its_adapter(problems, tmp_path):
    folder = tmp_path / "run" / "checkpoints" / "step-3"
    folder.mkdir(parents=True)
    settings = vars(RewardGradientConfig(**MODEL))
    (folder / "state.json").write_text(json.dumps({"step": 3, "settings": settings}))
    (folder / "manifest.json").write_text('{"files": {}}')
    assert problems(resume_from_checkpoint="latest", learning_rate=1e-6) == ""
    told = problems(resume_from_checkpoint="latest", lora_rank=7)
    assert "lora_rank: got 7, expected 16 as in" in told


def test_sampling_settings_default_to_the_models_own():
    defaults = {"height": 1, "width": 2, "num_frames": 3, "num_inference_steps": 4, "guidance_scale": 5.0}
    defaults |= {"negative_prompt": "bad", "max_sequence_length": 6, "fps": 7}
    args = with_sampling(RewardGradientConfig(width=64, guidance_scale=0.0), defaults)
    assert (args.height, args.width, args.guidance_scale, args.negative_prompt) == (1, 64, 0.0, "bad")


def test_the_trackers_are_those_of_accelerate():
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert sorted(LOGGER_TYPE_TO_CLASS) == list(TRACKERS)


@pytest.mark.parametrize(("rank", "told"), [("0", 1), ("1", 0)])
def test_the_first_process_has_to_be_able_to_write(tmp_path, monkeypatch, rank, told):
    monkeypatch.setattr("rlhf.checks.os.access", lambda *_: False)
    monkeypatch.setenv("RANK", rank)
    settings = {"output_dir": str(tmp_path / "new"), "report_to": []}
    told_problems = told_by(check_config, RewardGradientConfig(**settings))
    assert [p.partition(": ")[2] for p in told_problems] == [
        f"got no right to write in {tmp_path}, expected one; choose another"
    ] * told
    assert told_by(check_config, RewardGradientConfig(**settings, dry_run=True)) == []
