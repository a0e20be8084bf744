"""Two models are compared pair by pair: equal ones are no finding, a known shift is one."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from rlhf.evaluation.paired_sets import ALL, Pairs, compare, read_pairs
from rlhf.evaluation.video_set import Video, pair_videos
from rlhf.nano.world import held_out_prompts
from rlhf.types import Prompt

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "eval" / "compare.py"))
CATEGORIES = "abcd"


def draw(seed: int, shift: float = 0.0, only: str = CATEGORIES) -> Pairs:
    """Return three rewards of 48 prompts; tuned is base with new noise, shifted in `only`."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [f"{CATEGORIES[i % 4]} prompt {i}" for i in range(48)]
    shifted = torch.tensor([prompt[0] in only for prompt in prompts]) * shift
    hard = torch.rand(48, generator=generator)
    noise = lambda: torch.randn(48, generator=generator)
    one = {"smooth": 5 * hard + noise(), "heavy": noise() ** 3, "right": (noise() < hard).float()}
    two = {
        "smooth": 5 * hard + noise() + shifted,
        "heavy": noise() ** 3 + 3 * shifted,
        "right": (noise() < hard).float(),
    }
    return Pairs(prompts, one, two, 48, 0)


def test_equal_models_are_found_different_no_more_often_than_five_percent():
    wrong = {"all": 0, "categories": 0}
    for seed in range(100):
        rows = compare(draw(seed), lambda prompt: prompt[0])
        wrong["all"] += any(row["finding"] for row in rows if row["category"] == ALL)
        wrong["categories"] += any(row["finding"] for row in rows if row["category"] != ALL)
    assert max(wrong.values()) <= 10  # binomial(100, 0.05) is above that once in eighty times


def test_one_model_twice_is_not_different():
    pairs = draw(0)
    rows = compare(Pairs(pairs.prompts, pairs.base, pairs.base, 48, 0), lambda prompt: prompt[0])
    assert {row["p_holm"] for row in rows} == {1.0}
    assert all(row["ci95"] == [0.0, 0.0] and row["win_rate"] == 0.5 for row in rows)


def test_differences_without_spread_are_said_to_be_so():
    pairs = draw(0)
    text = SCRIPT["describe"](compare(Pairs(pairs.prompts, pairs.base, pairs.base, 48, 0)))
    assert text.count("no spread") == 4  # three rows and the line that explains it
    assert "[+0" not in text
    assert SCRIPT["describe"](compare(pairs)).count("no spread") == 1


def test_a_known_shift_is_found_where_it_is():
    for seed in range(10):
        rows = {row["reward"]: row for row in compare(draw(seed, shift=1.5))}
        assert rows["smooth"]["finding"]
        assert rows["smooth"]["ci95"][0] > 0
        assert not rows["right"]["finding"]


def test_a_shift_in_one_category_is_found_in_that_one():
    rows = compare(draw(1, shift=3.0, only="c"), lambda prompt: prompt[0])
    found = {(row["reward"], row["category"]) for row in rows if row["finding"] and row["category"] != ALL}
    assert ("smooth", "c") in found
    assert {category for _, category in found} == {"c"}
    assert [row["prompts"] for row in rows if row["category"] != ALL] == [12] * 12


def write(folder: Path, rows: list[tuple[str, int, dict]]) -> Path:
    folder.mkdir()
    lines = [json.dumps({"file": "x", "prompt": p, "seed": s, "scores": values}) + "\n" for p, s, values in rows]
    (folder / "scores.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def sets(tmp_path):
    base = write(
        tmp_path / "base", [("x", 0, {"r": 1, "q": 0}), ("x", 1, {"r": 2}), ("y", 0, {"r": 5}), ("z", 0, {"r": 0})]
    )
    tuned = write(tmp_path / "tuned", [("y", 0, {"r": 6}), ("x", 1, {"r": 4}), ("x", 0, {"r": 2}), ("w", 0, {"r": 9})])
    return base, tuned


def test_pairs_are_of_one_prompt_and_seed_and_seeds_of_a_prompt_count_once(sets):
    pairs = read_pairs(*sets)
    assert pairs.prompts == ["x", "y"]
    assert pairs.base["r"].tolist() == [1.5, 5]
    assert pairs.tuned["r"].tolist() == [3, 6]
    assert list(pairs.base) == ["r"]  # q was not asked of all
    assert (pairs.videos, pairs.unpaired) == (3, 2)


def test_videos_of_one_prompt_and_seed_all_count(tmp_path):
    base = write(tmp_path / "base", [("x", 0, {"r": 1}), ("x", 0, {"r": 3}), ("y", 0, {"r": 5})])
    tuned = write(tmp_path / "tuned", [("x", 0, {"r": 2}), ("y", 0, {"r": 6}), ("x", 0, {"r": 6})])
    pairs = read_pairs(base, tuned)
    assert (pairs.videos, pairs.unpaired) == (3, 0)
    assert (pairs.base["r"].tolist(), pairs.tuned["r"].tolist()) == ([2, 5], [4, 6])
    fewer = write(tmp_path / "fewer", [("x", 0, {"r": 6}), ("y", 0, {"r": 6})])  # of which x is not known
    pairs = read_pairs(base, fewer)
    assert (pairs.prompts, pairs.videos, pairs.unpaired) == (["y"], 1, 3)


def test_repeated_prompts_are_paired_by_their_rows(tmp_path):
    """As by eval/vote.py and the report: where rows or their order differ, so may the noise."""
    blue, green = (Prompt("x", {"prompt": "x", "negative_prompt": colour}) for colour in ("blue", "green"))
    videos = lambda *prompts: [Video(tmp_path / f"{i}.mp4", prompt, 0) for i, prompt in enumerate(prompts)]
    assert len(pair_videos(videos(blue, green), videos(blue, green))) == 2
    assert not pair_videos(videos(blue, green), videos(green, blue))
    assert list(pair_videos(videos(blue, green, "y"), videos(green, "y"))) == [("y", 0, 0)]
    assert len(pair_videos(videos(blue), videos(green))) == 1, "two negative prompts may be compared"


def test_a_score_that_is_not_finite_is_no_finding(sets, tmp_path, capsys):
    broken = write(tmp_path / "broken", [("x", 0, {"r": 2}), ("y", 0, {"r": float("nan")})])
    assert SCRIPT["main"]([str(sets[0]), str(broken)]) == 2
    assert "got r=nan for 'y', expected finite scores" in capsys.readouterr().err


def test_the_script_prints_the_table_and_writes_the_rows(sets, tmp_path, capsys):
    (tmp_path / "by.tsv").write_text("x\tanimals\ny\tplaces\n")
    out = tmp_path / "compare.json"
    for folder, height in zip(sets, (64, 128), strict=True):
        (folder / "generate.json").write_text(json.dumps({"model": folder.name, "height": height, "fps": 8}))
    assert SCRIPT["main"]([*map(str, sets), "--by", str(tmp_path / "by.tsv"), "--json", str(out)]) == 0
    told = capsys.readouterr().out
    assert "3 pairs of 2 prompts; 2 videos have no partner and are left out" in told
    assert [line for line in told.splitlines() if "Made with" in line] == ["Made with another height: 64, 128"]
    assert "Left out: q, which some videos have no score by" in told
    assert "Holm's correction for 1 rewards and, apart, 2 rows of categories" in told
    rows = json.loads(out.read_text())["rows"]
    assert [(row["category"], row["diff"]) for row in rows] == [(ALL, 1.25), ("animals", 1.5), ("places", 1.0)]
    cells = next(line for line in told.splitlines() if "animals" in line).split()
    assert cells == ["r", "animals", "1", "1.5000", "3.0000", "+1.5000", "-", "100%", "1.0000"]


def test_categories_of_a_list_may_be_numbers(sets):
    rows = [{"file": "x", "prompt": "x", "category": 0}, {"file": "y", "prompt": "y", "category": "places"}]
    (sets[0] / "videos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare(read_pairs(*sets), SCRIPT["categories"]("category", sets[0], ["x", "y"]))
    assert [row["category"] for row in found] == [ALL, "0", "places"]


def test_prompts_of_nano_have_categories_of_their_own():
    prompts = held_out_prompts(40, 0)
    shapes = SCRIPT["categories"]("shape", None, prompts)
    for prompt in prompts:
        assert shapes(prompt) in prompt.lower()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--by", "nothing"], "--by: got 'nothing', expected category, one of color"),
        (["--by", "{twice}"], "got two categories for 'x', expected one"),
        (["--by", "{by}"], "got no category for 'y' and 0 more"),
        (["{absent}"], "scores.jsonl: got no file there, expected the scores of a folder; run eval/score.py"),
        (["{same}"], "got one folder twice, expected those of two models; correct one"),
        (["{strange}"], "got no prompt and seed in common"),
        (["{unscored}"], "got no reward with a score for every video in common"),
    ],
)
def test_mistakes_are_told(sets, tmp_path, flags, told, capsys):
    (tmp_path / "by.tsv").write_text("x\tanimals\n")
    (tmp_path / "twice.tsv").write_text("x\tanimals\ny\tplaces\nx\tplaces\n")
    write(tmp_path / "strange", [("v", 0, {"r": 1})])
    write(tmp_path / "unscored", [("x", 0, {"s": 1})])
    places = {name: tmp_path / name for name in ("absent", "strange", "unscored")} | {
        name: tmp_path / f"{name}.tsv" for name in ("by", "twice")
    }
    places["same"] = sets[0]
    flags = [flag.format(**places) for flag in flags]
    folders = [sets[0], *([sets[1]] if flags[0] == "--by" else [])]
    assert SCRIPT["main"]([*map(str, folders), *flags]) == 2
    assert told in capsys.readouterr().err


def test_rows_that_find_no_room_on_the_disk_are_an_error_in_a_line(sets, tmp_path, capsys, file_limit):
    with file_limit(10):
        assert SCRIPT["main"]([*map(str, sets), "--json", str(tmp_path / "rows.json")]) == 2
    assert "File too large" in capsys.readouterr().err
