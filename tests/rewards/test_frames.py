"""Which frames are scored: each form by hand, invariants, and what is missing or misspelt."""

import pytest
import torch

from rewards import RewardError, RewardMix
from rewards.common.frames import check_num_frames, choose_frames, evenly_spaced_indices, pick_frames
from rewards.contract import leading_info

INFO = {"fps": 24, "seed": 0, "step": 0}


@pytest.mark.parametrize(
    ("total", "count", "chosen"),
    [
        (17, None, list(range(17))),
        (17, 5, [0, 4, 8, 12, 16]),
        (17, 2, [0, 16]),
        (17, 4, [0, 5, 11, 16]),  # 5.33 frames apart
        (17, 1, [0]),
        (3, 8, [0, 1, 2]),
        (1, 1, [0]),
    ],
)
def test_evenly_spaced(total, count, chosen):
    assert evenly_spaced_indices(total, count) == choose_frames("mine", count, total, {}) == chosen


@pytest.mark.parametrize(
    ("form", "fps", "total", "chosen"),
    [
        ("8 fps", 24, 10, [0, 3, 6, 9]),
        ("8 fps", 8, 4, [0, 1, 2, 3]),
        ("8 fps", 16.0, 5, [0, 2, 4]),
        ("2.5 fps", 5, 6, [0, 2, 4]),
        ("8 fps", 30, 9, [0, 4, 8]),  # 3.75 frames apart
        ("2 fps", 24, 6, [0]),
        ("24 fps", 10, 5, [0, 1, 2, 3, 4]),  # the video has no more
        ("0.5 fps", 10, 41, [0, 20, 40]),
        ("every 8 fps", 24, 10, [0, 3, 6, 9]),
        ("every 8 fps", 30, 9, [0, 4, 8]),
        ("every 8 fps", 25, 9, [0, 3, 6]),  # where "8 fps" takes the ninth, too
        ("every 8 fps", 20, 5, [0, 2, 4]),  # round(2.5) is 2
        ("every 8 fps", 3, 3, [0, 1, 2]),
    ],
)
def test_at_a_frame_rate(form, fps, total, chosen):
    assert choose_frames("mine", form, total, {"fps": fps}) == chosen


@pytest.mark.parametrize(
    ("form", "times", "chosen"),
    [
        ("2 fps", [0.0, 0.1, 0.2, 0.5, 0.9, 2.0], [0, 3, 4, 5]),  # nearest to 0, .5, 1, 1.5 and 2 seconds
        ("8 fps", [0.0, 0.75, 0.87, 0.99], [0, 1, 2, 3]),  # the first lasts six ticks, and counts once
        ("1 fps", [5.0, 5.4, 6.1, 7.2], [0, 2, 3]),  # 0 is the first frame
        ("every 8 fps", [0.0, 0.1, 0.9], [0, 1, 2]),
        (2, [0.0, 0.1, 0.9], [0, 2]),
    ],
)
def test_by_the_frames_own_times(form, times, chosen):
    seconds = times[-1] - times[0] + 0.1
    assert choose_frames("mine", form, len(times), {"fps": len(times) / seconds, "times": times}) == chosen


def test_leading_frames_have_their_own_times_and_rate():
    info = {"fps": 2.0, "times": [0.0, 1.0, 1.25, 1.5], "seed": 3}
    assert leading_info(info, 2) == {"fps": 2 / 1.25, "times": [0.0, 1.0], "seed": 3}
    assert leading_info(info, 4) == info
    assert leading_info({"fps": 24}, 2) == {"fps": 24}
    seen = []

    def reward(video, prompts, **info):
        seen.append((video.shape[2], info["times"], info["fps"]))
        return video.mean((1, 2, 3, 4))

    reward.frames = 2
    RewardMix({"mine": reward})(torch.rand(1, 3, 4, 8, 8), ["a"], **info)
    assert seen == [(2, [0.0, 1.0], 1.6)]


@pytest.mark.parametrize(
    "form", [None, 1, 3, 40, "random 1", "random 3", "random 40", "7.5 fps", "50 fps", "every 8 fps"]
)
def test_what_holds_for_every_form(form):
    for total in range(1, 41):
        chosen = choose_frames("mine", form, total, INFO)
        assert chosen == sorted(set(chosen))
        assert 0 <= chosen[0] <= chosen[-1] < total
        if isinstance(form, int) or form is None or "random" in form:
            wanted = total if form is None else int(str(form).removeprefix("random "))
            assert len(chosen) == min(wanted, total)


def test_random_frames_come_from_seed_and_step_alone():
    def draw(name="mine", **changes):
        return tuple(choose_frames(name, "random 4", 33, INFO | changes))

    assert draw() == draw(fps=3, batch="another")
    assert len({draw(step=step) for step in range(20)}) > 15
    assert draw(seed=1) != draw()
    assert draw("another") != draw()
    counts = torch.zeros(33)
    for step in range(800):
        counts[list(draw(step=step))] += 1
    assert 50 < counts.min() <= counts.max() < 150, "each frame is about as likely: 97 of 800 draws"


def test_the_frames_of_a_video_are_picked():
    class Mine:
        name, num_frames = "mine", "8 fps"

    video = torch.arange(10.0).reshape(1, 1, 10, 1, 1)
    assert pick_frames(Mine, video, INFO).flatten().tolist() == [0, 3, 6, 9]
    assert pick_frames(Mine, video, {"fps": 8}) is video
    assert pick_frames(Mine, video[:, :, :1], {}).shape[2] == 1, "one frame is one frame at any rate"


@pytest.mark.parametrize(("form", "missing"), [("8 fps", "fps"), ("random 2", "seed"), ("random 2", "step")])
def test_what_is_not_known_is_asked_for(form, missing):
    info = {key: value for key, value in INFO.items() if key != missing}
    with pytest.raises(RewardError, match=f"'mine': got no {missing}; .* num_frames='{form}' needs"):
        choose_frames("mine", form, 9, info)


@pytest.mark.parametrize("form", ["4", "rand 4", "random", "random -1", "fps 8", "0 fps", "0.0 fps", 2.5, True, [4]])
def test_forms_that_can_not_be_read(form):
    with pytest.raises(RewardError, match="'random 4', '8 fps' or 'every 8 fps'"):
        check_num_frames("mine", "all", form)


@pytest.mark.parametrize(("frames", "form"), [("first", 2), ("first", "random 2"), (4, 5), ("all", 0), (4, "random 0")])
def test_more_than_is_decoded(frames, form):
    with pytest.raises(RewardError, match="set frames to 'all' or to a larger number".capitalize()):
        check_num_frames("mine", frames, form)
    for fine in (None, 1, "random 1", "8 fps"):
        check_num_frames("mine", frames, fine)


@pytest.mark.parametrize("frames", ["half", "4", 0, -1, True, None, [1]])
@pytest.mark.parametrize("form", [None, 4])
def test_what_can_not_be_decoded(frames, form):
    with pytest.raises(RewardError, match="'mine': got frames=.*; expected 'first', 'all' or a number of leading"):
        check_num_frames("mine", frames, form)
