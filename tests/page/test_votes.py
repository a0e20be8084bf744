"""Blind votes: sides drawn and hidden, kept on disk, and the win rate."""

import json
import math

import pytest

from rlhf.evaluation.statistics import wilson_interval
from rlhf.io import DamagedFileError
from rlhf.page.votes import Pair, Votes, describe_pair

SETTINGS = {"base": {"scale": 0.0}, "tuned": {"scale": 1.0}}


def pair(prompt="a star", seed=0, settings=SETTINGS) -> Pair:
    return Pair({"prompt": prompt, "seed": seed}, settings, {"base": "base.mp4", "tuned": "tuned.mp4"})


def test_wilson_solves_its_equation():
    """Its ends are the rates p with |rate - p| = z sqrt(p (1 - p) / n)."""
    for rate, count in ((0.7, 10), (0.5, 3), (0.925, 40)):
        for p in wilson_interval(rate, count):
            assert abs(rate - p) == pytest.approx(1.959964 * math.sqrt(p * (1 - p) / count))
    assert wilson_interval(1.0, 5)[1] == 1.0
    assert wilson_interval(0.0, 0) == [0.0, 1.0]


def test_sides_are_drawn_for_each_pair_and_told_after_its_vote(tmp_path):
    draws = iter([0.9, 0.1])
    votes = Votes(tmp_path / "votes.json", lambda: next(draws))
    first, second = pair("a"), pair("b")
    for shown in (first, second, first):  # a pair that is shown again keeps its sides
        votes.add(shown)
    assert votes.file(first.key, "left") == "base.mp4"
    assert votes.file(second.key, "left") == "tuned.mp4"
    assert describe_pair(votes, first) == {"key": first.key, "prompt": "a", "seed": 0, "chosen": None}
    assert not (tmp_path / "votes.json").exists()
    votes.vote(first.key, "right")
    told = describe_pair(votes, first)
    assert (told["sides"], told["chosen"]) == ({"left": "base", "right": "tuned"}, "tuned")
    assert "sides" not in describe_pair(votes, second)


def test_votes_are_kept_with_the_settings_of_both_and_go_on(tmp_path):
    path = tmp_path / "votes.json"
    votes = Votes(path, lambda: 0.9)  # base on the left
    for prompt, choice in (("a", "right"), ("b", "right"), ("c", "left"), ("d", "tie")):
        votes.vote(votes.add(pair(prompt)), choice)
    again = Votes(path, lambda: 0.1)
    again.add(pair("a"))
    assert again.sides[pair("a").key]["left"] == "base", "as it was voted on"
    with pytest.raises(ValueError, match="got a second vote on this pair, expected one"):
        again.vote(pair("a").key, "left")
    half = {"base": {"scale": 0.0}, "tuned": {"scale": 0.5}}
    again.vote(again.add(pair("a", settings=half)), "right")  # tuned on the left now
    first, second = json.loads(path.read_text())["comparisons"]
    assert {model: first[model] for model in SETTINGS} == SETTINGS
    assert (first["tuned_better"], first["equal"], first["base_better"]) == (2, 1, 1)
    assert first["win_rate"] == 2.5 / 4
    assert first["ci95"] == pytest.approx(wilson_interval(2.5 / 4, 4))
    assert [vote["chosen"] for vote in first["votes"]] == ["tuned", "tuned", "base", "tie"]
    assert (second["tuned"], second["win_rate"]) == ({"scale": 0.5}, 0.0)


def test_seeds_of_one_prompt_are_no_independent_votes(tmp_path):
    votes = Votes(tmp_path / "votes.json", lambda: 0.9)
    for seed in range(4):
        votes.vote(votes.add(pair("a", seed)), "right")
    votes.vote(votes.add(pair("b")), "left")
    result = votes.result(SETTINGS)
    assert (result["prompts"], result["win_rate"]) == (2, 0.5)
    assert result["ci95"] == wilson_interval(0.5, 2)


@pytest.mark.parametrize(
    ("content", "message"), [("{}", "KeyError"), ('{"comparisons": [{"base": 1}]}', "TypeError"), ("[", "damaged")]
)
def test_a_damaged_file_of_votes_is_left_alone(tmp_path, content, message):
    (tmp_path / "votes.json").write_text(content)
    with pytest.raises(DamagedFileError, match=message):
        Votes(tmp_path / "votes.json")
    assert (tmp_path / "votes.json").read_text() == content


def test_a_vote_that_is_not_on_disk_is_none(tmp_path):
    votes = Votes(tmp_path / "votes.json")
    key = votes.add(pair())
    (tmp_path / "votes.json").mkdir()  # in the way
    with pytest.raises(ValueError, match="expected to write the vote; make room, then vote again"):
        votes.vote(key, "left")
    assert "sides" not in describe_pair(votes, pair())
    (tmp_path / "votes.json").rmdir()
    votes.vote(key, "left")


def test_a_video_made_twice_is_two_pairs(tmp_path):
    votes = Votes(tmp_path / "votes.json")
    first, second = pair(), Pair(pair().video | {"repeat": 1}, SETTINGS, pair().files)
    votes.vote(votes.add(second), "left")
    assert votes.vote_of(first) is None
    assert votes.vote_of(second)


def test_wrong_votes_say_so(tmp_path):
    votes = Votes(tmp_path / "votes.json")
    key = votes.add(pair())
    with pytest.raises(ValueError, match="choice: got 'both', expected left, right or tie"):
        votes.vote(key, "both")
    with pytest.raises(ValueError, match="pair: got 'x', expected one that was shown"):
        votes.vote("x", "left")
    with pytest.raises(ValueError, match="pair: got \\[\\], expected one that was shown"):
        votes.vote([], "left")
