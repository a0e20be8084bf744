"""Calibration on base samples, as a run does it; and how mixing reaches the trainer."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from runs import train
from tiny import tiny_pipeline
from toy_rewards import PROMPTS, brightness, redness, rows_without_cost

from rewards import RewardError, RewardMix
from rlhf.config import ConfigError
from rlhf.method.decode import Sampled
from rlhf.trainer import RewardGradientTrainer
from rlhf.training.calibrate import CALIBRATION, base_scores, restore_calibration


def rows(args, rewards):
    train(args, rewards)
    return rows_without_cost(args)


def kept(args):
    """The scores of the base samples, as double precision, by reward."""
    scores = json.loads((Path(args.output_dir) / CALIBRATION).read_text())["scores"]
    return {name: torch.tensor(values).double() for name, values in scores.items()}


def test_processes_share_the_samples_and_each_gets_its_own_noise():
    def make_videos(prompts, noise):
        return Sampled(noise[:, :3].sigmoid())

    class Process:
        device, in_step = torch.device("cpu"), False

        def __init__(self, index, count):
            self.process_index, self.num_processes = index, count

        def reduce(self, tensor, how):
            assert how == "sum"
            self.has_summed = True
            return tensor

    def judge(video, prompts, **info):
        assert [row["prompt"] for row in info.pop("rows")] == prompts
        assert (info, torch.is_grad_enabled()) == ({"fps": 8}, False)
        return redness(video, prompts) + torch.tensor([float(len(prompt)) for prompt in prompts])

    def scores(process, size=2, seed=3):
        mix = RewardMix({"judge": judge})
        found = base_scores(mix, make_videos, PROMPTS[:5], (4, 2, 3, 3), seed, size, process, {"fps": 8})["judge"]
        assert process.has_summed
        return found

    whole = scores(Process(0, 1))
    assert whole.unique().numel() == 5
    torch.testing.assert_close(scores(Process(0, 1), size=5), whole)
    assert not torch.allclose(scores(Process(0, 1), seed=4), whole)
    torch.testing.assert_close(scores(Process(0, 2)) + scores(Process(1, 2)), whole)


def test_a_run_measures_its_base_and_a_resumed_run_reads_that(make_args, tmp_path, monkeypatch):
    rewards = [redness, brightness]
    args = make_args(max_steps=2, save_steps=1, calibrate_rewards=4, reward_weights=[1.0, 0.5])
    args.per_device_train_batch_size = len(PROMPTS)  # each run embeds the same prompts in one go
    whole = rows(args, rewards)
    scores = kept(args)
    assert {name: len(values) for name, values in scores.items()} == {"redness": 4, "brightness": 4}
    for row in whole:
        z = {n: (row[f"rewards/{n}"] - values.mean().item()) / values.std().item() for n, values in scores.items()}
        assert row["reward"] == pytest.approx(z["redness"] + 0.5 * z["brightness"], abs=1e-4)

    parts = dataclasses.replace(args, output_dir=str(tmp_path / "parts"), max_steps=1)
    train(parts, rewards)
    monkeypatch.setattr("rlhf.training.calibrate.base_scores", lambda *_: pytest.fail("measured again"))
    parts = dataclasses.replace(parts, max_steps=2, resume_from_checkpoint="latest")
    assert rows(parts, rewards) == whole


@pytest.mark.parametrize("changed", [{"reward_weights": [1.0]}, {"calibrate_rewards": 3}])
def test_a_run_resumed_with_other_rewards_or_more_videos_measures_anew(make_args, changed):
    args = make_args(max_steps=1, calibrate_rewards=2, reward_weights=[1.0, 0.5])
    train(args, [redness, brightness])
    before = kept(args)
    args = dataclasses.replace(args, max_steps=2, resume_from_checkpoint="latest", **changed)
    train(args, [redness, brightness][: len(args.reward_weights)])
    after = kept(args)
    assert len(after) == len(args.reward_weights)
    assert {len(values) for values in after.values()} == {args.calibrate_rewards}
    torch.testing.assert_close(after["redness"][:2], before["redness"])  # of the base, though the adapter was trained


@pytest.mark.parametrize("changed", [{"reward_kwargs": {"redness": {"of": 2}}}, {"seed": 9}, {"num_frames": 9}])
def test_scores_of_videos_made_or_judged_otherwise_are_not_taken_for_the_run_s(make_args, changed):
    args = make_args(max_steps=1, calibrate_rewards=2)
    trainer = RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS)
    trainer.train()
    prompts = trainer.batches.prompts_at(0, 2)
    assert restore_calibration(trainer.rewards, trainer.args, prompts)
    assert not restore_calibration(trainer.rewards, trainer.args, prompts[::-1])
    assert not restore_calibration(trainer.rewards, dataclasses.replace(trainer.args, **changed), prompts)


def test_caps_targets_and_balance_reach_the_mix_and_a_capped_run_goes_on(make_args):
    args = make_args(
        max_steps=2, reward_caps={"redness": -100.0}, reward_targets={"brightness": 0.9}, balance_reward_gradients=True
    )
    trainer = RewardGradientTrainer(tiny_pipeline(), [redness, brightness], args, PROMPTS)
    assert (trainer.rewards.caps, trainer.rewards.targets) == ({"redness": -100.0}, {"brightness": 0.9})
    assert trainer.rewards.balance
    capped = make_args(max_steps=2, reward_caps={"redness": -100.0}, overwrite_output_dir=True)
    found = rows(capped, redness)
    assert [(row["grad_norm"], row["reward"]) for row in found] == [(0.0, -100.0)] * 2


def test_rewards_are_told_frame_rate_seed_and_step(make_args):
    told = []

    def reward(video, prompts, **info):
        told.append(info)
        return redness(video, prompts)

    args = make_args(max_steps=2, seed=5, eval_seed=7, num_diversity_prompts=0)
    RewardGradientTrainer(tiny_pipeline(), reward, args, PROMPTS, PROMPTS[:1]).train()
    assert {info["fps"] for info in told} == {8}
    assert [(info["seed"], info["step"]) for info in told if "probe" not in info] == [(7, 0), (5, 0), (5, 1), (7, 0)]


def test_a_gradient_that_cannot_be_balanced_is_told_as_its_rewards_not_as_another_process(make_args):
    def edge(video, prompts, **info):
        return redness(video, prompts) if "probe" in info else (redness(video, prompts) * 0).sqrt()

    args = make_args(max_steps=2, balance_reward_gradients=True, max_skipped_steps=1)
    with pytest.raises(RewardError, match="'edge': got a gradient of norm nan at the pixels for prompt"):
        train(args, [edge, brightness])


def test_the_lowest_of_rewards_on_two_scales_is_refused_unless_calibrated(make_args):
    def stated(video, prompts, **info):
        return redness(video, prompts)

    stated.mean, stated.std = 0.0, 0.5
    args = make_args(reward_mix="min", max_steps=1)
    with pytest.raises(ConfigError, match="reward_mix: got min with redness, which states no spread.*set calib"):
        RewardGradientTrainer(tiny_pipeline(), [stated, redness], args, PROMPTS)
    for settings in ({"calibrate_rewards": 2}, {"normalise_rewards": False}):
        RewardGradientTrainer(tiny_pipeline(), [stated, redness], dataclasses.replace(args, **settings), PROMPTS)
