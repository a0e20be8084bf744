"""Repetitions are found within and between prompt sets, and the sets that ship have none."""

from itertools import combinations
from pathlib import Path
from random import Random

import pytest

from rlhf.prompts import load_prompts
from rlhf.prompts.__main__ import NEAR, close_pairs, main, words

PROMPTS = Path(__file__).parents[2] / "configs" / "prompts"


@pytest.fixture
def files(tmp_path):
    def write(*texts: str) -> list[str]:
        paths = [tmp_path / f"{number}.txt" for number in range(len(texts))]
        for path, text in zip(paths, texts, strict=True):
            path.write_text(text, encoding="utf-8")
        return [str(path) for path in paths]

    return write


def test_words_leave_out_case_punctuation_and_fillers():
    assert words("The FOX, in the Snow!") == words("a fox; snow") == {"fox", "snow"}
    assert words("ﬁsh") == {"fish"}, "ligatures are two letters"
    assert words("on and on") == {"on", "and"}, "never nothing"


@pytest.mark.parametrize(
    ("first", "second", "close"),
    [
        ("A cat sleeps on a red sofa", "a cat sleeps on the red sofa.", True),
        ("On a red sofa sleeps a cat", "A cat sleeps on a red sofa", True),
        ("A cat sleeps on a red sofa at noon", "A cat sleeps on a red sofa at midnight", True),
        ("A cat runs through the park", "A dog runs through the park", False),
        ("A cat sleeps", "A dog barks", False),
    ],
)
def test_what_is_close(first, second, close):
    assert bool(close_pairs([[first, second]])) == bool(close_pairs([[first], [second]])) == close


@pytest.mark.parametrize("near", [0.35, 0.5, 0.55, NEAR, 0.7, 1.0])
def test_no_pair_escapes_that_a_comparison_of_all_finds(near):
    random = Random(int(near * 100))
    prompts = [" ".join(random.sample("abcdefghijklmnop", random.randint(1, 9))) for _ in range(150)]
    alike = lambda a, b: len(words(a) & words(b)) / len(words(a) | words(b))
    expected = {(a, b) for a, b in combinations(prompts, 2) if alike(a, b) >= near}
    assert expected
    assert {(pair.first, pair.second) for pair in close_pairs([prompts[:70], prompts[70:]], near)} == expected


def test_the_command_names_both_prompts_and_files(files, capsys):
    train, held_out = files("# mine\na red fox\n\nrain on a lake\n", "rain on the lake\n")
    assert main([train, held_out]) == 1
    told = capsys.readouterr().out
    assert f"{train}: 2 prompts" in told
    assert f"{train}: rain on a lake\n  {held_out}: rain on the lake" in told
    assert "1 pairs" in told
    assert main([train, held_out, "--near", "1.1"]) == 0


def test_a_file_that_cannot_be_read_is_told(files, capsys):
    assert main([*files("a\n"), "absent.txt"]) == 2
    assert "got no file at" in capsys.readouterr().err
    assert main(["a prompt in place of a file " * 20]) == 2
    assert "File name too long" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nano_train"], "got the built-in set nano_train, expected files"),
        (["a.txt", "--near", "nan"], "--near: got nan, expected a share above 0"),
        (["a.txt", "--near", "0"], "--near: got 0.0, expected a share above 0"),
    ],
)
def test_what_is_no_file_and_no_share_is_told(words, told, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert told in capsys.readouterr().err


def test_the_shipped_sets_are_large_and_repeat_nothing():
    train, held_out = (load_prompts(f"general_{name}.txt", PROMPTS, 0) for name in ("train", "held_out"))
    assert len(train) >= 400
    assert len(held_out) >= 100
    assert close_pairs([train, held_out], near=0.5) == []


def test_the_training_set_has_every_section_in_strength():
    sections = (PROMPTS / "general_train.txt").read_text(encoding="utf-8").split("\n\n# ")[1:]
    sizes = {title: len(prompts) for title, *prompts in map(str.splitlines, sections)}
    assert set(sizes) == {"People", "Animals", "Places", "Motion", "Styles", "Camera"}
    assert min(sizes.values()) >= 65
