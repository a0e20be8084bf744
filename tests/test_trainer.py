"""The loop as a whole, on a tiny random pipeline: it learns, resumes to the bit, sums over processes, fails clearly."""

import dataclasses
import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, brightness, redness, rows_without_cost
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import tiny_pipeline
from transformers import TrainerCallback

from rewards import RewardError
from rlhf.checkpoint import TrainingInterrupted
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.contentv.wan_decoder import decode_video
from rlhf.failures import TrainingError
from rlhf.optimizer import learning_rate
from rlhf.sampler import rollout
from rlhf.tracking import COST, read_metrics
from rlhf.trainer import RewardGradientTrainer


def train(args, rewards=redness, pipe=None, evaluate=False, **kwargs) -> dict:
    evaluated = PROMPTS if evaluate else None
    return RewardGradientTrainer(pipe or tiny_pipeline(), rewards, args, PROMPTS, evaluated, **kwargs).train()


def adapter(args) -> dict[str, torch.Tensor]:
    return load_file(Path(args.output_dir) / "adapter" / "pytorch_lora_weights.safetensors")


class At(TrainerCallback):
    """Does something after one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action(control)


# ---------------------------------------------------------------------------------------------- it learns


def test_the_reward_rises_on_prompts_it_was_not_trained_on(make_args):
    args = make_args(max_steps=12, per_device_train_batch_size=4, num_grad_steps=2, learning_rate=3e-2)
    args.num_sample_prompts = 2
    summary = RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS[:4], [f"a {p}" for p in PROMPTS]).train()
    row = summary["trained"]["redness"]
    assert row["ci95"][0] > 0
    assert row["diff"] == pytest.approx(row["tuned"] - row["base"], abs=1e-6)
    rows = read_metrics(Path(args.output_dir))
    assert sum(r["reward"] for r in rows[-3:]) > sum(r["reward"] for r in rows[:3])


def test_what_a_run_leaves(make_args):
    args = make_args(
        max_steps=4, save_steps=2, save_total_limit=1, sample_steps=1, eval_steps=3, report_to=["tensorboard"]
    )
    pipe = tiny_pipeline()
    before = {name: t.clone() for name, t in pipe.transformer.state_dict().items()}
    summary = train(args, [redness, brightness], pipe, evaluate=True)
    folder = Path(args.output_dir)
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert sorted(p.name for p in (folder / "samples").iterdir()) == [f"step-{i:06d}" for i in range(5)]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-4"]
    assert list(folder.glob("trackers/**/events.out.tfevents*"))
    for name in ("config.yaml", "curves.png", "contact_sheet.png", "adapter", "evaluation"):
        assert (folder / name).exists()
    rows = read_metrics(folder)
    keys = {"step", "epoch", "loss", "reward", "saturated", "grad_norm", "learning_rate", "samples", *COST}
    keys |= {f"rewards/{name}{end}" for name in ("redness", "brightness") for end in ("", "_std")}
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert set(rows[0]) == keys
    evaluated = ("redness", "brightness", "motion", "saturation", "high_frequency", "diversity", "gain_trained")
    assert set(rows[2]) == keys | {f"eval/{name}" for name in evaluated}
    assert rows[3]["samples"] == 8
    assert rows[3]["epoch"] == pytest.approx(8 / 6)
    assert 0.1 < rows[0]["memory_gib"] <= rows[3]["memory_gib"] < 64, "on a CPU the peak of the process so far"
    assert rows[0]["loss"] == pytest.approx(-rows[0]["reward"])
    assert rows[0]["reward"] == pytest.approx(rows[0]["rewards/redness"] + rows[0]["rewards/brightness"], rel=1e-5)
    after = {name.replace(".base_layer", ""): t for name, t in pipe.transformer.state_dict().items()}
    assert all(torch.equal(t, after[name]) for name, t in before.items()), "the base must stay as it was"
    assert any(t.abs().max() > 0 for name, t in adapter(args).items() if "lora_B" in name)


def test_weights_weigh_the_gradient(make_args, tmp_path):
    """A weight of 0 only logs; a negative one turns the direction round."""
    adapters = []
    for i, weights in enumerate(([1.0, 0.0], [1.0], [-1.0])):
        args = make_args(output_dir=str(tmp_path / str(i)), reward_weights=weights, max_steps=1)
        train(args, [redness, brightness][: len(weights)])
        adapters.append(torch.cat([t.flatten() for n, t in adapter(args).items() if "lora_B" in n]))
    assert torch.equal(adapters[0], adapters[1])
    torch.testing.assert_close(adapters[1], -adapters[2], rtol=1e-3, atol=1e-5)


def test_only_the_frames_that_rewards_ask_for_are_decoded(make_args, monkeypatch):
    decoded = []

    def record(*args):
        video = decode_video(*args)
        decoded.append(video.shape[2])
        return video

    def first(video, prompts, **info):
        assert video.shape[2] == 1
        return video.mean((1, 2, 3, 4))

    def three(video, prompts, **info):
        assert video.shape[2] == 3
        return video.mean((1, 2, 3, 4))

    first.frames, three.frames = "first", 3
    monkeypatch.setattr("rlhf.decoding.decode_video", record)
    train(make_args(max_steps=2), first)
    assert decoded == [1, 1]
    train(make_args(max_steps=1, overwrite_output_dir=True), [first, three])
    assert decoded[2:] == [3]


def test_accumulated_batches_equal_one_large_batch(make_args, tmp_path):
    runs = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        runs.append(
            make_args(
                output_dir=str(tmp_path / str(size)),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
            )
        )
        train(runs[-1])
    assert_same_training(runs[0], runs[1])
    assert_same_training(runs[0], runs[2])


def assert_same_training(a, b):
    for row, other in zip(rows_without_cost(a), rows_without_cost(b), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)  # a gain is a small difference
    for name, tensor in adapter(a).items():
        torch.testing.assert_close(tensor, adapter(b)[name], rtol=1e-3, atol=2e-5)


def test_no_two_samples_of_a_run_share_their_noise(make_args, monkeypatch):
    noises = []
    monkeypatch.setattr("rlhf.methods.rollout", lambda *args: noises.extend(args[1]) or rollout(*args))
    train(make_args(max_steps=2, gradient_accumulation_steps=2))
    assert len(noises) == 8
    assert all(not torch.allclose(a, b) for i, a in enumerate(noises) for b in noises[:i])


def test_every_prompt_comes_once_an_epoch(make_args):
    args = make_args(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer = RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS)
    prompts = [
        prompt for step in range(3) for micro in range(2) for prompt in trainer.batches.batch(step, micro).prompts
    ]
    assert sorted(prompts[:6]) == sorted(prompts[6:]) == sorted(PROMPTS), "an epoch is every prompt once"


def test_settings_of_memory_change_nothing_else(make_args, tmp_path):
    plain = make_args(output_dir=str(tmp_path / "a"), num_grad_steps=2)
    thrifty = dataclasses.replace(
        plain, output_dir=str(tmp_path / "b"), gradient_checkpointing=True, decode_chunk=1, decode_checkpoint=True
    )
    train(plain)
    train(thrifty)
    assert_same_training(plain, thrifty)


def test_a_bfloat16_base_trains_float32_masters(make_args):
    pipe = tiny_pipeline()
    pipe.transformer.to(torch.bfloat16)
    args = make_args()
    train(args, pipe=pipe)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}
    saved = torch.cat([t.flatten() for t in adapter(args).values()])
    assert saved.dtype == torch.float32
    assert not torch.equal(saved, saved.bfloat16().float())


def test_another_peft_config_and_a_model_by_path(make_args, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    args = make_args(max_steps=1)
    config = LoraConfig(r=2, target_modules=["ff.net.2"])
    RewardGradientTrainer(str(tmp_path / "model"), redness, args, PROMPTS, peft_config=config).train()
    assert {name.split(".ff.")[1] for name in adapter(args)} == {"net.2.lora_A.weight", "net.2.lora_B.weight"}
    assert f"model: {tmp_path / 'model'}" in (Path(args.output_dir) / "config.yaml").read_text()


# ------------------------------------------------------------------------------------------- it goes on


def test_interrupted_and_resumed_equals_uninterrupted_to_the_bit(make_args, tmp_path):
    whole = make_args(output_dir=str(tmp_path / "whole"), max_steps=5, gradient_accumulation_steps=2)
    expected = train(whole, evaluate=True)

    args = dataclasses.replace(whole, output_dir=str(tmp_path / "parts"))
    with pytest.raises(TrainingInterrupted) as caught:
        train(args, evaluate=True, callbacks=[At(2, lambda _: os.kill(os.getpid(), signal.SIGINT))])
    assert caught.value.checkpoint == tmp_path / "parts" / "checkpoints" / "step-2"
    assert caught.value.checkpoint.is_dir()
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward": 99}\n')  # of a step after the checkpoint
    (tmp_path / "parts" / "evaluation" / "base.safetensors").unlink()  # to be made again, without the adapter
    summary = train(dataclasses.replace(args, resume_from_checkpoint="latest"), evaluate=True)

    assert summary["trained"] == expected["trained"]
    assert rows_without_cost(args) == rows_without_cost(whole)
    for name, tensor in adapter(whole).items():
        assert torch.equal(tensor, adapter(args)[name]), name


@pytest.mark.parametrize("evaluate", [True, False])
def test_resuming_a_finished_run_only_finishes_it(make_args, evaluate):
    args = make_args(max_steps=2)
    first = train(args, evaluate=evaluate)
    again = train(dataclasses.replace(args, resume_from_checkpoint="latest"), evaluate=evaluate)
    assert again["steps"] == first["steps"] == 2
    assert again.get("trained") == first.get("trained")


def test_a_callback_stops_the_training_and_hears_of_everything(make_args):
    told = []

    class Listener(TrainerCallback):
        def __getattribute__(self, name):
            if name.startswith("on_"):
                told.append(name)
            return super().__getattribute__(name)

    def stop(control):
        control.should_training_stop = control.should_evaluate = control.should_save = True

    args = make_args(max_steps=9)
    summary = train(args, evaluate=True, callbacks=[Listener(), At(2, stop)])
    assert summary["steps"] == 2
    assert [row["step"] for row in read_metrics(Path(args.output_dir))] == [1, 2]
    assert "eval/redness" in read_metrics(Path(args.output_dir))[1]
    step = ["on_step_begin", "on_step_end"]
    events = ["on_init_end", "on_train_begin", "on_evaluate", *step, "on_log", *step, "on_evaluate", "on_log"]
    assert told == [*events, "on_save", "on_save", "on_evaluate", "on_train_end"]


# ---------------------------------------------------------------------------------------- it fails clearly


def after(step: int, bad):
    """A reward that is good until it has been trained on for `step` steps. The probe asks it twice before."""
    calls = []

    def reward(video, prompts, **info):
        calls.append("probe" not in info)
        return bad(video) if sum(calls) > step else redness(video, prompts)

    reward.name = "turncoat"
    return reward


@pytest.mark.parametrize(
    ("bad", "error", "told"),
    [
        (lambda v: redness(v, 0) * math.nan, RewardError, "reward 'turncoat': got the score nan for prompt"),
        (lambda v: redness(v, 0).sum(), RewardError, r"reward 'turncoat': got scores of shape \(\)"),
        (lambda v: (redness(v, 0) - redness(v, 0)).sqrt(), TrainingError, "comes from the reward turncoat"),
        (lambda v: redness(v, 0) * 0, TrainingError, "The gradient at the adapter is exactly zero"),
    ],
)
def test_a_reward_that_breaks_is_named_and_the_last_good_step_saved(make_args, bad, error, told):
    args = make_args(max_steps=5)
    with pytest.raises(error, match=told):
        train(args, [after(2, bad), brightness] if "zero" not in told else after(2, bad))
    assert [p.name for p in (Path(args.output_dir) / "checkpoints").iterdir()] == ["step-2"]
    assert len(read_metrics(Path(args.output_dir))) == 2


def test_a_reward_that_cannot_train_is_refused_before_weights_load(make_args, monkeypatch):
    monkeypatch.setattr("rlhf.setup.load_pipeline", lambda *_, **__: pytest.fail("loaded weights"))
    args = make_args(model="nano")
    with pytest.raises(RewardError, match="got no gradient at the pixels"):
        RewardGradientTrainer(reward_funcs=lambda video, prompts, **_: redness(video.detach(), prompts), args=args)
    assert not Path(args.output_dir).exists()


def test_wrong_settings_are_told_before_weights_load(make_args, monkeypatch):
    monkeypatch.setattr("rlhf.setup.load_pipeline", lambda *_, **__: pytest.fail("loaded weights"))
    with pytest.raises(ConfigError, match="3 problems"):
        RewardGradientTrainer("no/where/model", "no_reward", make_args(max_steps=0), PROMPTS)
    with pytest.raises(ConfigError, match="got no rows"):
        RewardGradientTrainer(tiny_pipeline(), redness, make_args(), [])
    with pytest.raises(ConfigError, match="num_grad_steps=4 exceeds num_inference_steps=3"):
        RewardGradientTrainer(tiny_pipeline(), redness, make_args(num_grad_steps=4), PROMPTS)
    with pytest.raises(ConfigError, match="num_frames=6 is not 4k"):
        RewardGradientTrainer(tiny_pipeline(), redness, make_args(num_frames=6), PROMPTS)


def test_settings_of_the_optimizer_reach_it(make_args):
    args = make_args(weight_decay=0.3, adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=1e-3)
    (group,) = RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS).optimizer.param_groups
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.3, (0.5, 0.6), 1e-3)


def test_a_long_gradient_is_scaled_down_to_the_limit(make_args, tmp_path):
    """By AdamW with a large epsilon, the first step is close to proportional to the gradient."""
    moved = []
    for limit in (0.0, 1e-3):
        args = make_args(output_dir=str(tmp_path / str(limit)), max_grad_norm=limit, adam_epsilon=1.0, max_steps=1)
        train(args)
        moved.append(torch.cat([t.flatten() for name, t in adapter(args).items() if "lora_B" in name]).norm().item())
        norm = read_metrics(Path(args.output_dir))[0]["grad_norm"]
    assert norm > 2e-3, "the norm is logged as it was before clipping"
    assert moved[0] / moved[1] == pytest.approx(norm / 1e-3, rel=0.1)


def test_learning_rate_warms_up_then_stays_or_falls():
    args = RewardGradientConfig(learning_rate=1.0, warmup_steps=4, max_steps=10)
    assert [learning_rate(step, args) for step in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1.0, 1.0, 1.0]
    args.lr_scheduler_type = "linear"
    assert [learning_rate(step, args) for step in (0, 3, 4, 7, 9)] == pytest.approx([0.25, 1.0, 1.0, 0.5, 1 / 6])
    args.warmup_steps = 0
    assert learning_rate(0, args) == 1.0
