"""The study's baselines: DDPO and best of n."""

import baselines
import torch
from tiny import tiny_pipeline
from toy_rewards import PROMPTS, redness

from rlhf.method.flow_grpo import FlowGRPO
from rlhf.method.options import FlowGRPOOptions


def ddpo_trainer(make_args, size, **changes):
    args = make_args(per_device_train_batch_size=size, **changes)
    inputs = {"model": tiny_pipeline(), "reward_funcs": redness, "train_dataset": PROMPTS}
    return baselines.DDPOTrainer(FlowGRPOOptions(), args, **inputs)


def test_ddpo_compares_all_videos_of_a_batch_each_of_another_prompt(make_args, monkeypatch):
    trainer, seen, losses = ddpo_trainer(make_args, 4), [], FlowGRPO.losses
    monkeypatch.setattr(
        FlowGRPO, "losses", lambda method, rollout: seen.append((method, rollout)) or losses(method, rollout)
    )
    before = trainer.masters.vector.detach().clone()
    trainer.step(0)
    ((method, rollout),) = seen
    assert len({*trainer.batches.batch(0, 0).prompts}) == method.group_size == len(rollout.scores_B) == 4
    assert rollout.gradient is None  # of the reward: it is not asked for
    assert not torch.equal(trainer.masters.vector, before)


def test_ddpo_raises_the_reward(make_args):
    trainer = ddpo_trainer(make_args, 16, max_steps=14, learning_rate=5e-2, lora_rank=8)
    rewards = [trainer.step(step)["reward"] for step in range(14)]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.05


def test_the_best_of_n_is_the_best_of_the_first_n():
    scores = torch.tensor([[1.0, 5.0], [3.0, 2.0], [2.0, 9.0]])  # of sample and prompt
    video_of = lambda number: (scores[number] * 10).view(2, 1, 1, 1, 1)
    kept = dict(baselines.best_of(3, video_of, lambda video: video.flatten() / 10, [1, 2, 3]))
    assert {n: best.flatten().tolist() for n, best in kept.items()} == {1: [10, 50], 2: [30, 50], 3: [30, 90]}
