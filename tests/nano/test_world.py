import pytest
import torch

from rlhf.nano import judges, world


def scenes(count=200, seed=0, held_out=False):
    return world.sample_scenes(count, torch.Generator().manual_seed(seed), held_out=held_out)


def test_the_same_seed_draws_the_same_world():
    first, again, other = (world.render(scenes(4, seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(("height", "width", "frames"), [(64, 64, 17), (96, 64, 5), (80, 96, 1)])
def test_videos_have_the_size_asked_for_and_stay_in_range(height, width, frames):
    video = world.render(scenes(3), height, width, frames)
    assert video.shape == (3, 3, frames, height, width)
    assert video.min() >= 0
    assert video.max() <= 1


@pytest.mark.parametrize(
    ("motion", "axis", "sign"), [("left", -1, -1), ("right", -1, 1), ("up", -2, -1), ("down", -2, 1)]
)
def test_shapes_move_where_the_caption_says(motion, axis, sign):
    drawn = scenes(32, held_out=None)
    drawn["motion"][:] = world.MOTIONS.index(motion)
    video = world.render(drawn)
    mask = ((video - video[..., :1, :1]).abs().amax(1) > 0.1).float()  # (B, T, H, W)
    place = torch.arange(64.0).view([-1 if a == axis % 4 else 1 for a in range(4)])
    center = (mask * place).sum((-1, -2)) / mask.sum((-1, -2))
    assert ((center[:, -1] - center[:, 0]) * sign > 10).all()


def test_still_shapes_stand_and_growing_ones_grow():
    drawn = scenes(16, held_out=None)
    for motion, grows in (("still", False), ("growing", True)):
        drawn["motion"][:] = world.MOTIONS.index(motion)
        video = world.render(drawn)
        area = ((video - video[..., :1, :1]).abs().amax(1) > 0.1).float().sum((-1, -2))
        assert ((area[:, -1] > 1.5 * area[:, 0]) == grows).all()


def test_captions_can_be_read_back_in_every_wording():
    drawn = scenes(100, held_out=None)
    for i in range(100):
        row = {k: int(v[i]) for k, v in drawn.items() if k not in "xy"}
        for sentence in range(len(world.SENTENCES)):
            for phrase in range(2):
                text = world.caption(row, sentence, phrase)
                assert world.read_caption(text) == {k: row[k] for k in world.JUDGED}, text


def test_a_prompt_of_another_world_is_refused_with_a_cure():
    with pytest.raises(ValueError, match=r"names no color.*expected a sentence such as"):
        world.read_caption("a cat on a sofa")


def test_held_out_prompts_share_no_combination_with_training_prompts():
    def combinations(prompts):
        read = map(world.read_caption, prompts)
        return {(r["color"], r["shape"], r["motion"]) for r in read}

    train, held_out = combinations(world.train_prompts(4000)), combinations(world.held_out_prompts(1000))
    assert not train & held_out
    assert len(held_out) > 40  # of the 48 there are
    assert world.held_out_prompts(5) == world.held_out_prompts(5)


def test_another_coverage_deforms_every_object():
    drawn = scenes(8)
    gone = world.render(drawn, coverage=lambda x, y, r, shape, edge: 0 * world.covered(x, y, r, shape, edge))
    assert torch.equal(gone, gone[..., :1, :1].expand_as(gone))
    same = world.render(drawn, coverage=world.covered)
    assert torch.equal(same, world.render(drawn))


def test_every_word_of_the_world_has_an_id():
    ids = judges.word_ids(world.train_prompts(2000))
    assert (ids != 1).all()
    assert judges.word_ids(["a zebra"])[0, :3].tolist() == [judges.WORDS.index("a"), 1, 0]
