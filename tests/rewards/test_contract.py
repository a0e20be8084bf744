"""The reward contract: defaults, error messages, and a probe that catches each breach."""

import functools
import sys

import numpy
import pytest
import torch

from rewards import RewardError, frames_needed, probe
from rewards.contract import call_reward
from rewards.contract_probe import PROBE_PROMPTS

SHAPE = (3, 5, 16, 16)
WEIGHTS_HW = torch.linspace(0, 1, 256).reshape(16, 16)


def good(video, prompts, **info):
    return (video * WEIGHTS_HW).mean(dim=(1, 2, 3, 4)) + torch.tensor([0.01 * len(p) for p in prompts])


def with_attributes(function, **attributes):
    def reward(video, prompts, **info):
        return function(video, prompts, **info)

    reward.__dict__.update(attributes)
    return reward


def failure(function, **attributes):
    with pytest.raises(RewardError) as caught:
        probe(with_attributes(function, **attributes), SHAPE)
    return caught.value


def test_a_good_reward_passes_and_is_reported():
    passed = []
    report = probe(good, SHAPE, on_pass=passed.append)
    assert report.frames == 5
    assert len(report.scores) == len(report.grad_norms) == 2
    assert report.grad_norms == pytest.approx([(WEIGHTS_HW / 15 / 256).norm().item() * 15**0.5] * 2)
    assert len(passed) == 5


class Module(torch.nn.Module):
    def forward(self, video, prompts, fps):
        return (video * WEIGHTS_HW).mean(dim=(1, 2, 3, 4)) * fps


@pytest.mark.parametrize(
    "reward",
    [
        lambda video, prompts: good(video, prompts),
        lambda video, prompts, rows, *, seed: good(video, [row["prompt"] for row in rows]),
        lambda video, prompts, step=None, **info: good(video, [row["prompt"] for row in info["rows"]], **info),
        lambda *given, **info: good(*given, **info),
        functools.partial(lambda scale, video, prompts, rows: good(video, prompts) * scale * len(rows), 2.0),
        Module(),
        torch.no_grad()(with_attributes(good)),
    ],
)
def test_a_reward_is_given_the_keywords_that_it_takes(reward):
    scores = call_reward(reward, torch.rand(2, *SHAPE), ["a", "b"], {"fps": 8, "seed": 0, "step": 1})
    assert scores.shape == (2,)


@pytest.mark.parametrize(
    ("frames", "total", "needed"), [("first", 17, 1), ("all", 17, 17), (8, 17, 8), (8, 5, 5), (1, 1, 1)]
)
def test_frames_needed(frames, total, needed):
    assert frames_needed(with_attributes(good, frames=frames), total) == needed


def test_a_reward_that_states_no_frames_sees_all_of_them():
    assert frames_needed(good, 17) == 17


@pytest.mark.parametrize("frames", ["last", 0, -1, 2.5, True, None])
def test_frames_outside_the_contract(frames):
    with pytest.raises(RewardError, match="frames attribute"):
        frames_needed(with_attributes(good, frames=frames), 17)


def test_the_probe_gives_the_frames_asked_for():
    seen = []

    def reward(video, prompts, **info):
        seen.append(video.shape[2])
        return good(video, prompts)

    probe(with_attributes(reward, frames="first"), SHAPE)
    assert set(seen) == {1}


def test_the_probe_tells_frame_rate_seed_and_step():
    seen = []

    def reward(video, prompts, **info):
        seen.append(info)
        return good(video, prompts)

    probe(reward, SHAPE)
    probe(reward, SHAPE, info={"fps": 8})
    assert seen[0].pop("rows") == [{"prompt": prompt} for prompt in PROBE_PROMPTS[:2]]
    assert seen[0] == {"probe": True, "fps": 24, "seed": 0, "step": 0}
    assert seen[-1]["fps"] == 8


def detached(video, prompts, **info):
    return good(video.detach(), prompts)


def batch_normalised(video, prompts, **info):
    return good(video, prompts) - good(video, prompts).mean()


def kept_by_prompt(video, prompts, scores={}):  # noqa: B006
    """Scores of earlier videos with these prompts."""
    for prompt, score in zip(prompts, good(video, prompts), strict=True):
        scores.setdefault(prompt, score)
    return torch.stack([scores[prompt] for prompt in prompts])


def nothing_but_gradient(x):
    """Zero in value."""
    return x - x.detach()


def backward(scores):
    scores.sum().backward()
    return scores


def no_grad_in_place(video):
    with torch.no_grad():
        return video.clamp_(0.4, 0.6)


MEANS = (1, 2, 3, 4)
CHANGED = "got a video that the reward changed in place"
BREACHES = {  # what is wrong: the reward, and what is said of it
    "a score a frame": (lambda v, p, **_: v.mean((1, 3, 4)), r"scores of shape \(2, 5\)"),
    "a scalar": (lambda v, p, **_: v.mean(), r"scores of shape \(\)"),
    "a list": (lambda v, p, **_: v.mean(MEANS).tolist(), "a list"),
    "half precision": (lambda v, p, **_: v.mean(MEANS).bfloat16(), "scores of torch.bfloat16"),
    "integers": (lambda v, p, **_: v.sum(MEANS).long(), "scores of torch.int64"),
    "not finite": (
        lambda v, p, **_: good(v, p) / torch.tensor([1.0, 0.0]),
        "the score inf for prompt 'two dogs run along a beach at sunset'",
    ),
    "detached": (detached, "no gradient"),
    "rounded": (lambda v, p, **_: good((v * 255).round() / 255, p), "a gradient of exactly zero"),
    "the batch's size": (lambda v, p, **_: good(v, p) * len(p), r"in a batch of two, and [\d.]+ alone"),
    "the first prompt for all": (lambda v, p, **_: good(v, p) + len(p[0]), "when the rest of the batch changes"),
    "the first score for all": (lambda v, p, **_: good(v, p)[:1].expand(len(p)) + 0 * good(v, p), "when the rest"),
    "no batch of one": (lambda v, p, **_: good(v, p).squeeze(), r"scores of shape \(\)"),
    "kept by prompt": (lambda v, p, **_: kept_by_prompt(v, p), "no gradient"),
    "the first alone": (
        lambda v, p, **_: torch.cat([good(v, p)[:1], good(v, p)[1:].detach()]),
        "a gradient of exactly zero",
    ),
    "the prompt alone": (
        lambda v, p, **_: torch.tensor([float(len(x)) for x in p], requires_grad=True),
        "no gradient",
    ),
    "a root at zero": (lambda v, p, **_: good(v, p) + (v - v).abs().sqrt().mean(MEANS), "a gradient with NaN"),
    "an infinite gradient": (
        lambda v, p, **_: good(v, p) + nothing_but_gradient(v[:, 0, 0, 0, 0]) * 1e30 * 1e30,
        "a gradient with NaN or inf",
    ),
    "batch statistics": (batch_normalised, "a score that moves"),
    "a maximum over the batch": (lambda v, p, **_: good(v, p) / v.amax(), "a score that moves"),
    "a gradient at the neighbour": (
        lambda v, p, **_: good(v, p) + nothing_but_gradient(v.flip(0).mean(MEANS)),
        "pixels of another video",
    ),
    "chance": (lambda v, p, **_: good(v, p) + torch.rand(len(p)), "two scores for the same batch"),
    "no prompts": (lambda v: good(v, ["a", "b"]), "TypeError.*positional"),
    "no field": (
        lambda v, p, rows: good(v, [row["size"] for row in rows]),
        "no field .size. in the row .*, only prompt.*test_contract",
    ),
    "numpy's chance": (lambda v, p, **_: good(v, p) + float(numpy.random.rand()), "two scores for the same batch"),
    "in place": (lambda v, p, **_: good(v.mul_(2), p), CHANGED),
    "in place without gradient": (lambda v, p, **_: good(no_grad_in_place(v), p), CHANGED),
    "in place through data": (lambda v, p, **_: good(v.data.mul_(0.1), p) + good(v, p), CHANGED),
    "one pixel": (lambda v, p, **_: good(v, p) + 0 * v.data[0, 1, 2, 7, 9].mul_(2), CHANGED),
    "a backward pass": (lambda v, p, **_: backward(good(v, p)), "got a backward pass inside the reward"),
    "an exit": (lambda v, p, **_: sys.exit("bye"), "SystemExit: bye for a video"),
}


@pytest.mark.parametrize("wrong", BREACHES)
def test_each_breach_is_named(wrong):
    reward, got = BREACHES[wrong]
    with pytest.raises(RewardError, match=got) as caught:
        probe(reward, SHAPE)
    message = str(caught.value)
    assert reward.__name__ in message
    assert "expected" in message
    assert "\n" not in message
    assert message.endswith(".")


def test_memory_that_ends_has_cures_of_its_own():
    def hungry(video, prompts, **info):
        raise torch.OutOfMemoryError("as an accelerator says it")

    with pytest.raises(torch.OutOfMemoryError):
        probe(hungry, SHAPE)


@pytest.mark.parametrize("wrong", ["batch statistics", "in place", "in place through data", "an exit", "chance"])
def test_a_judge_is_probed_without_gradient(wrong):
    probe(detached, SHAPE, gradient=False)
    reward, got = BREACHES[wrong]
    with pytest.raises(RewardError, match=got):
        probe(reward, SHAPE, gradient=False)


def test_evaluation_only_rewards_skip_the_gradient_but_nothing_else():
    report = probe(with_attributes(detached, differentiable=False), SHAPE)
    assert report.grad_norms == ()
    assert "neighbours" in failure(batch_normalised, differentiable=False).expected


@pytest.mark.parametrize(
    "attributes",
    [
        {"space": "noise"},
        {"std": 0.0},
        {"std": -1.0},
        {"std": True},
        {"std": "1e-2"},  # YAML's reading of a number without a dot
        {"std": float("inf")},
        {"std": [1.0]},
        {"mean": float("nan"), "std": 1.0},
        {"mean": "0.5", "std": 1.0},
    ],
)
def test_attributes_outside_the_contract(attributes):
    assert next(iter(attributes)) in failure(good, **attributes).got


def test_the_name_in_the_message_can_be_given():
    with pytest.raises(RewardError, match="my_reward"):
        probe(detached, SHAPE, name="my_reward")


def test_unknown_names_of_the_package_are_attribute_errors():
    import rewards

    with pytest.raises(AttributeError, match="lod_reward"):
        _ = rewards.lod_reward
