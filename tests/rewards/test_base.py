"""The reward contract: defaults, error messages, and a probe that catches each way of breaking it."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest
import torch

from rewards import RewardError, frames_needed, probe
from rlhf.plugins import GROUP

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
    assert seen[0] == {"probe": True, "fps": 24, "seed": 0, "step": 0}
    assert seen[-1] == {"probe": True, "fps": 8, "seed": 0, "step": 0}


def per_frame(video, prompts, **info):
    return video.mean(dim=(1, 3, 4))


def scalar(video, prompts, **info):
    return video.mean()


def python_list(video, prompts, **info):
    return video.mean(dim=(1, 2, 3, 4)).tolist()


def half(video, prompts, **info):
    return video.mean(dim=(1, 2, 3, 4)).bfloat16()


def integer(video, prompts, **info):
    return video.sum(dim=(1, 2, 3, 4)).long()


def not_finite(video, prompts, **info):
    return good(video, prompts) / torch.tensor([1.0, 0.0])


def detached(video, prompts, **info):
    return good(video.detach(), prompts)


def rounded(video, prompts, **info):
    return good((video * 255).round() / 255, prompts)


def prompt_only(video, prompts, **info):
    return torch.tensor([float(len(p)) for p in prompts], requires_grad=True)


def nan_gradient(video, prompts, **info):
    return good(video, prompts) + (video - video).abs().sqrt().mean(dim=(1, 2, 3, 4))


def infinite_gradient(video, prompts, **info):
    first_B = video[:, 0, 0, 0, 0]
    return good(video, prompts) + (first_B - first_B.detach()) * 1e30 * 1e30


def batch_normalised(video, prompts, **info):
    scores = good(video, prompts)
    return scores - scores.mean()


def batch_maximum(video, prompts, **info):
    return good(video, prompts) / video.amax()


def leaks_gradient_only(video, prompts, **info):
    other = video.flip(0).mean(dim=(1, 2, 3, 4))
    return good(video, prompts) + other - other.detach()


def first_alone(video, prompts, **info):
    scores = good(video, prompts)
    return torch.cat([scores[:1], scores[1:].detach()])


def random(video, prompts, **info):
    return good(video, prompts) + torch.rand(len(prompts))


def wants_no_info(video, prompts):
    return good(video, prompts)


def in_place(video, prompts, **info):
    return good(video.mul_(2), prompts)


@pytest.mark.parametrize(
    ("reward", "got"),
    [
        (per_frame, r"scores of shape \(2, 5\)"),
        (scalar, r"scores of shape \(\)"),
        (python_list, "a list"),
        (half, "scores of torch.bfloat16"),
        (integer, "scores of torch.int64"),
        (not_finite, "the score inf for prompt 'two dogs run along a beach at sunset'"),
        (detached, "no gradient"),
        (rounded, "a gradient of exactly zero"),
        (first_alone, "a gradient of exactly zero"),
        (prompt_only, "no gradient"),
        (nan_gradient, "a gradient with NaN"),
        (infinite_gradient, "a gradient with NaN or inf"),
        (batch_normalised, "a score that moves"),
        (batch_maximum, "a score that moves"),
        (leaks_gradient_only, "pixels of another video"),
        (random, "two scores for the same batch"),
        (wants_no_info, "TypeError.*probe"),
        (in_place, "RuntimeError"),
    ],
)
def test_each_breach_is_named(reward, got):
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


def test_evaluation_only_rewards_skip_the_gradient_but_nothing_else():
    report = probe(with_attributes(detached, differentiable=False), SHAPE)
    assert report.grad_norms == ()
    assert "neighbours" in failure(batch_normalised, differentiable=False).expected


@pytest.mark.parametrize(
    "attributes",
    [
        {"space": "latents"},
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
        probe(scalar, SHAPE, name="my_reward")


def heavy_modules_after(statement):
    code = f"""import sys
{statement}
print([name for name in ("torch", "torchvision", "open_clip", "transformers") if name in sys.modules])"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(bool(entry_points(group=GROUP)), reason="an accelerator's plug-in brings torch with it")
def test_import_is_light():
    assert heavy_modules_after("import rewards") == "[]"
    assert heavy_modules_after("from rewards import RewardMix, load_reward, probe") == "['torch']"


def test_unknown_names_of_the_package_are_attribute_errors():
    import rewards

    with pytest.raises(AttributeError, match="lod_reward"):
        _ = rewards.lod_reward
