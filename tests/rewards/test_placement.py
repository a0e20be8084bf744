"""`device` of a reward: it computes there, its gradient crosses back, and caches do not mind it."""

import pytest
import torch
from plans import tiny
from reward_checks import make_video
from tiny import tiny_pipeline
from toy_rewards import PROMPTS, rows_without_cost

from rewards import RewardError, RewardMix, check_spec, frames_needed, load_reward, probe, reward_attribute
from rewards.placement import OnDevice
from rewards.score_cache import reward_identity, score_conditions
from rlhf.checks import check_config
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.evaluation.held_out import EVAL_FINGERPRINT, fingerprint
from rlhf.planner.memory import plan_rewards
from rlhf.planner.traced import TracedModel
from rlhf.trainer import RewardGradientTrainer


class Far(torch.nn.Module):
    """Notes where it is asked; scores on `meta` stand for another device, which has no values."""

    frames, mean, std = "first", 0.1, 2.0

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, video, prompts, fps):
        self.asked = video.device, self.weight.device, video.shape[2], fps
        return (video[:, :, 0].mean((2, 3)) * self.weight).mean(1)


def test_a_reward_is_asked_on_its_device_and_its_gradient_crosses_back(monkeypatch):
    video, info = make_video(3, 8, 8).requires_grad_(), {"fps": 8, "seed": 0, "step": 0}
    here, far = Far(), OnDevice("far", Far(), "cpu")
    assert (far.mean, reward_attribute(far, "std"), frames_needed(far, 3)) == (0.1, 2.0, 1)
    assert not far.reward.weight.requires_grad
    assert probe(far, (3, 3, 8, 8)).frames == 1
    totals = [RewardMix({"r": reward}, normalise=False)(video, ["a", "b"], **info)[0] for reward in (here, far)]
    assert torch.equal(*totals)
    assert torch.equal(*(torch.autograd.grad(total.sum(), video)[0] for total in totals))
    assert far.reward.asked == (torch.device("cpu"), torch.device("cpu"), 1, 8)

    monkeypatch.setattr("rewards.placement.pick_device", torch.device)
    away = OnDevice("far", Far(), "meta")
    with pytest.raises(NotImplementedError, match="meta"):  # has no data to copy back
        away(video[:, :, :1], ["a", "b"], fps=8)
    assert away.reward.asked == (torch.device("meta"), torch.device("meta"), 1, 8)


@pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two accelerators")
def test_the_gradient_crosses_between_two_accelerators():
    kind = torch.accelerator.current_accelerator().type
    video = make_video(3, 8, 8).to(f"{kind}:0").requires_grad_()
    scores = OnDevice("far", Far(), f"{kind}:1")(video, ["a", "b"], fps=8)
    assert scores.device == video.device
    (grad,) = torch.autograd.grad(scores.sum(), video)
    torch.testing.assert_close(grad[:, :, 0], torch.full_like(grad[:, :, 0], 1 / (3 * 64)))


def test_it_is_an_argument_beside_the_others(tmp_path, make_args):
    file = tmp_path / "mine.py"
    file.write_text("def mine(video, prompts, scale=1.0, **info):\n    return video.mean((1, 2, 3, 4)) * scale\n")
    placed = load_reward(f"{file}:mine", device="cpu", scale=3.0)
    assert isinstance(placed, OnDevice)
    assert isinstance(load_reward("flicker", device="cpu"), OnDevice)
    assert not isinstance(load_reward("flicker", device=None), OnDevice)
    video = make_video(2, 8, 8)
    assert torch.equal(placed(video, ["a", "b"]), video.mean((1, 2, 3, 4)) * 3)
    file.write_text("class Own:\n    def __init__(self, device='?'):\n        self.given = device\n")
    assert load_reward(f"{file}:Own", device="cpu").given == "cpu"
    file.write_text("def own(video, prompts, device):\n    return device\n")
    assert load_reward(f"{file}:own", device="cpu")(video, ["a", "b"]) == "cpu"
    args = make_args(reward_funcs={"far": {"spec": "flicker", "device": "cpu"}})
    assert args.reward_kwargs == {"far": {"device": "cpu"}}
    assert check_config(args).reward_kwargs == args.reward_kwargs
    assert fingerprint(args, EVAL_FINGERPRINT) == fingerprint(make_args(reward_funcs=["far=flicker"]), EVAL_FINGERPRINT)
    for key in (reward_identity, lambda spec, kwargs: score_conditions(spec, kwargs, None)):
        assert key("flicker", {"frames": 3, "device": "cpu"}) == key("flicker", {"frames": 3})
        assert key("flicker", {"frames": 4}) != key("flicker", {"frames": 3})


def test_a_run_with_a_placed_reward_is_the_same_run(tmp_path, make_args):
    file = tmp_path / "mine.py"
    file.write_text("def mine(video, prompts, **info):\n    return video.mean((1, 2, 3, 4)) * 10\n")
    runs = [make_args(output_dir=str(tmp_path / name), max_steps=2) for name in ("here", "there")]
    for args, kwargs in zip(runs, (None, {"mine": {"device": "cpu"}}), strict=True):
        args.reward_funcs, args.reward_kwargs = [f"{file}:mine"], kwargs
        RewardGradientTrainer(tiny_pipeline(), None, args, PROMPTS).train()
    assert rows_without_cost(runs[0]) == rows_without_cost(runs[1])


@pytest.mark.parametrize("device", ["gpu", "npu:9", 3])
def test_a_device_that_is_not_there_is_refused_before_weights_load(device, make_args):
    words = "expected a device of this machine. Correct the reward's `device`"
    with pytest.raises(RewardError, match=words):
        check_spec("hps_v2_1", kwargs={"device": device})
    with pytest.raises(RewardError, match=words):
        load_reward("hps_v2_1", device=device)
    with pytest.raises(ConfigError, match=words):
        check_config(make_args(reward_funcs={"far": {"spec": "hps_v2_1", "device": device}}))


def test_the_plan_leaves_it_out_of_the_runs_devices():
    def plan(device, kind="cuda", processes=1):
        rewards = {"reward_funcs": ["hps_v2_1"], "eval_reward_funcs": ["mps"]}
        kwargs = {"hps_v2_1": {"device": device}, "mps": {"device": device}}
        _, args, card = tiny(**rewards, reward_kwargs=kwargs)
        return plan_rewards(TracedModel(args, card, processes), args, kind)

    here, away = plan(None), plan("cuda:1")
    assert here.weight_bytes > away.weight_bytes == 0
    assert here.peak_bytes > away.peak_bytes == 0
    assert here.seconds == away.seconds
    assert plan("cuda:0") == plan("cuda") == plan("cuda:1", processes=2) == plan("cpu", kind="cpu") == here
    assert plan("cpu") == plan("cuda", kind="cpu") == plan("cuda:2", processes=2) == away
    assert RewardGradientConfig().reward_kwargs is None
