"""Scores of any videos by any rewards, kept by content: what is known is not scored again."""

import importlib
import json
import runpy
import shutil
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from PIL import Image

from rewards import load, score_cache
from rewards.cli.files import read_video
from rewards.score_cache import ScoreCache, Scorer, reward_identity, score_conditions
from rlhf.evaluation.paired_sets import read_pairs, read_scores
from rlhf.evaluation.video_set import prompt_from_name, read_set
from rlhf.run.video import write_video

FAULTS = Path(__file__).parents[1] / "data" / "faults"
SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "eval" / "score.py"))
REWARD = "def length(video, prompts, **info):\n    return video.mean((1, 2, 3, 4)) * 0 + {factor} * len(prompts[0])\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three different videos of five frames."""
    folder = tmp_path_factory.mktemp("made")
    generator = torch.Generator().manual_seed(0)
    for i in range(3):
        coarse = torch.randint(0, 255, (3, 5, 2, 2), generator=generator, dtype=torch.uint8)
        write_video(folder / f"{i}.mp4", coarse.repeat_interleave(16, 2).repeat_interleave(16, 3), fps=8)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """The same with a list: what eval/generate.py leaves."""
    target = tmp_path / "videos"
    shutil.copytree(made, target)
    rows = [{"file": f"{i}.mp4", "prompt": f"prompt {i}", "seed": i, "category": "abc"[i]} for i in range(3)]
    (target / "videos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


@pytest.fixture
def run(tmp_path, capsys):
    """Run the script with the test's own cache; return its status, output and errors."""

    def call(*arguments):
        status = SCRIPT["main"]([*map(str, arguments), "--device", "cpu", "--cache", str(tmp_path / "cache")])
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def loads(monkeypatch):
    """Names of the rewards that were loaded."""
    names = []
    load = score_cache.load_rewards
    monkeypatch.setattr(
        score_cache, "load_rewards", lambda specs, kwargs: (names.extend(specs), load(specs, kwargs))[1]
    )
    return names


def scores(folder) -> list[dict]:
    return [json.loads(line)["scores"] for line in (folder / "scores.jsonl").read_text().splitlines()]


def test_scores_are_those_of_the_pixels(folder, run):
    status, told, _ = run(folder, "--reward", "flicker", "--reward", "frame_difference")
    assert status == 0
    for i, row in enumerate(scores(folder)):
        video = read_video(folder / f"{i}.mp4").pixels_BCTHW
        change = video.diff(dim=2).abs().mean().item()
        assert row == {
            "flicker": pytest.approx(1 - change, abs=1e-6),
            "frame_difference": pytest.approx(change, abs=1e-6),
        }
    mean = sum(row["flicker"] for row in scores(folder)) / 3
    assert f"{mean:.5g}" in told
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [(row["file"], row["prompt"], row["seed"], row["category"]) for row in rows] == [
        (f"{i}.mp4", f"prompt {i}", i, "abc"[i]) for i in range(3)
    ]


def test_what_is_known_is_not_scored_again_under_another_name(folder, run, loads, tmp_path):
    run(folder, "--reward", "flicker")
    assert loads == ["flicker"]
    run(folder, "--reward", "flicker")
    other = tmp_path / "renamed"
    other.mkdir()
    for i in range(3):
        shutil.copy(folder / f"{i}.mp4", other / f"prompt {i}-7.mp4")
    run(other, "--reward", "flicker", "--names_are_prompts")
    assert loads == ["flicker"]
    assert scores(other) == scores(folder)


def test_other_content_prompts_settings_and_rewards_are_scored(folder, run, loads, tmp_path):
    reward = tmp_path / "own.py"
    reward.write_text(REWARD.format(factor=1))
    own = f"{reward}:length"
    run(folder, "--reward", own, "--reward", "flicker")
    assert [row["length"] for row in scores(folder)] == [8, 8, 8]
    before = scores(folder)

    manifest = (folder / "videos.jsonl").read_text()
    (folder / "videos.jsonl").write_text(manifest.replace("prompt 1", "another prompt 1"))
    shutil.copy(folder / "0.mp4", folder / "2.mp4")
    reward.write_text(REWARD.format(factor=2))
    loads.clear()
    run(folder, "--reward", own)
    assert [row["length"] for row in scores(folder)] == [16, 32, 16]
    assert loads == [own]
    assert scores(folder)[0]["flicker"] == before[0]["flicker"], "other rewards' scores of the same file stay"
    assert "flicker" not in scores(folder)[1], "its prompt is another"
    assert "flicker" not in scores(folder)[2], "its content is another"

    run(folder, "--reward", "flicker", "--kwargs", '{"flicker": {"frames": 3}}')
    assert scores(folder)[0]["flicker"] != before[0]["flicker"]
    run(folder, "--reward", "flicker", "--max_frames", "2")
    assert scores(folder)[0]["flicker"] != before[0]["flicker"]


@pytest.mark.parametrize(
    ("factor", "flags", "told"),
    [
        (1, [], None),
        (2, [], '"source"'),
        (1, ["--max_frames", "2"], '"max_frames": 2'),
        (1, ["--kwargs", "{length: {added: 2}}"], '"kwargs": {"added": 2}'),
    ],
)
def test_scores_of_other_settings_are_not_compared(folder, run, tmp_path, factor, flags, told):
    other = Path(shutil.copytree(folder, tmp_path / "other"))
    for place, number in ((tmp_path, 1), (tmp_path / "elsewhere", factor)):
        place.mkdir(exist_ok=True)
        (place / "own.py").write_text(REWARD.format(factor=number).replace("prompts,", "prompts, added=0,"))
    run(folder, "--reward", f"{tmp_path}/own.py:length")
    run(other, "--reward", f"{tmp_path}/elsewhere/own.py:length", *flags)
    run(other, "--reward", "flicker")
    if told is None:
        assert read_pairs(folder, other).videos == 3
    else:
        with pytest.raises(ValueError, match=r"got length scored with .*, expected .*; score both folders") as error:
            read_pairs(folder, other)
        assert told in str(error.value)


@pytest.mark.parametrize("nested", [False, True])
def test_rewards_read_the_rows_of_the_list_and_another_row_is_scored_anew(folder, run, tmp_path, nested):
    (tmp_path / "own.py").write_text("def count(video, prompts, rows):\n    return video.new_tensor([rows[0]['n']])\n")
    for number in (3.0, 4.0):
        rows = [{"file": f"{i}.mp4", "prompt": "a", "seed": 5} for i in range(3)]
        rows = [row | ({"row": {"n": number + i}} if nested else {"n": number + i}) for i, row in enumerate(rows)]
        (folder / "videos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert run(folder, "--reward", f"{tmp_path / 'own.py'}:count")[0] == 0
        assert [row["count"] for row in scores(folder)] == [number, number + 1, number + 2]


@pytest.mark.parametrize("spec", ["own_package.judge:length", "shiny"])
def test_a_reward_of_a_package_that_was_changed_is_scored_anew_and_compared_with_none_before(
    folder, run, tmp_path, monkeypatch, spec
):
    """A module or a plug-in of an installed package."""
    plugin = EntryPoint("shiny", "own_package.judge:length", load.ENTRY_POINT_GROUP)
    monkeypatch.setattr(load, "entry_points", lambda group, name=None: [plugin] * (name in (None, "shiny")))
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    found = []
    for factor in (1, 3):
        (tmp_path / "own_package" / "judge.py").write_text(REWARD.format(factor=factor))
        for name in ("own_package", "own_package.judge"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        assert run(folder, "--reward", spec)[0] == 0
        found.append([*map(float, scores(folder)[0].values()), score_conditions(spec, {}, None)])
    assert [score for score, _ in found] == [8, 24]
    assert found[0][1] != found[1][1]


@pytest.mark.parametrize(
    ("reward", "settings", "file"),
    [
        ("aesthetic", {"head": "{}/head.pt"}, "head.pt"),
        ("aesthetic", {"head": "~/head.pt"}, "head.pt"),
        ("clip_score", {"model": "{}/model"}, "model/model.safetensors"),
        ("clip_score", {"model": "local-dir:{}/model"}, "model/model.safetensors"),
        ("clip_score", {"model": "{}/model"}, "model/vision/model.safetensors"),
        (
            "rewards.models.pixels:Flicker",
            {"text": "long " * 1000, "heads": ["absent", {"first": "{}/head.pt"}]},
            "head.pt",
        ),
    ],
)
def test_the_content_of_weights_that_settings_name_counts(reward, settings, file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = json.loads(json.dumps(settings).replace("{}", str(tmp_path)))
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"one")
    first = reward_identity(reward, settings)
    assert first == reward_identity(reward, settings)
    (tmp_path / file).write_bytes(b"other")
    assert first != reward_identity(reward, settings)


def test_two_rewards_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--reward: got 'Mine' twice, expected each name once"):
        Scorer(["a.py:Mine", "b.py:Mine"], {}, ScoreCache(tmp_path), "cpu")


def test_an_interrupted_job_goes_on(folder, tmp_path, monkeypatch):
    """Ended at its third video, it scores only that one when started again."""
    videos = read_set(folder)
    scorer = Scorer(["flicker"], {}, ScoreCache(tmp_path / "cache"), "cpu")
    for video in videos[:2]:
        scorer(video.path, video.prompt)
    seen, score = [], score_cache.score
    monkeypatch.setattr(
        score_cache, "score", lambda rewards, path, *rest: (seen.append(path), score(rewards, path, *rest))[1]
    )
    again = Scorer(["flicker"], {}, ScoreCache(tmp_path / "cache"), "cpu")
    for video in videos:
        again(video.path, video.prompt)
    assert seen == [videos[2].path]


def test_a_damaged_entry_is_scored_anew(folder, run, tmp_path):
    run(folder, "--reward", "flicker")
    before = scores(folder)
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_text('{"sco')
    run(folder, "--reward", "flicker")
    assert scores(folder) == before


def test_samples_of_a_run_and_names_say_the_prompts(made, tmp_path):
    shutil.copytree(made, tmp_path / "step-000080")
    (tmp_path / "step-000080" / "prompts.txt").write_text("0\ta red fox\n2\train, at night\n")
    assert [(v.path.name, v.prompt) for v in read_set(tmp_path / "step-000080")] == [
        ("0.mp4", "a red fox"),
        ("2.mp4", "rain, at night"),
    ]
    assert prompt_from_name(Path("x/a red kite-0.mp4")) == "a red kite"
    assert prompt_from_name(Path("a t-shirt.mp4")) == "a t-shirt"


def test_videos_may_lie_elsewhere(made, run, tmp_path):
    target = tmp_path / "list"
    target.mkdir()
    rows = [{"file": str(made / "0.mp4"), "prompt": "one"}, {"file": "../near/1.mp4", "prompt": "two"}]
    (tmp_path / "near").symlink_to(made)
    (target / "videos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(target, "--reward", "jpeg_size")[0] == 0
    written = [json.loads(line) for line in (target / "scores.jsonl").read_text().splitlines()]
    assert [row["file"] for row in written] == [row["file"] for row in rows]


def test_a_kill_while_scores_are_written_leaves_those_that_were_there(folder, run, monkeypatch):
    assert run(folder, "--reward", "jpeg_size")[0] == 0
    before, write = scores(folder), Path.write_text

    def killed(path, text, **how):
        write(path, text[: len(text) // 2], **how)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        run(folder, "--reward", "jpeg_size")
    assert scores(folder) == before


def test_a_blank_prompt_is_told_to_rewards_that_read_it(folder, run):
    manifest = (folder / "videos.jsonl").read_text()
    (folder / "videos.jsonl").write_text(manifest.replace("prompt 1", " "))
    status, _, error = run(folder, "--reward", "clip_score")
    assert status == 2
    assert f"got no prompt of {folder / '1.mp4'}; expected text" in error
    assert f"Write one into {folder / 'videos.jsonl'}" in error
    assert run(folder, "--reward", "flicker")[0] == 0


def test_one_bad_video_is_named_and_the_others_are_scored(folder, run):
    (folder / "1.mp4").write_bytes(b"not a video")
    status, told, error = run(folder, "--reward", "flicker")
    assert status == 1
    rows = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    good = [rows[i]["scores"]["flicker"] for i in (0, 2)]
    assert told.splitlines()[-1].split() == [str(folder), "2", f"{sum(good) / 2:.5g}"]
    assert (rows[1]["scores"], rows[1]["file"]) == ({}, "1.mp4")
    first, last = error.splitlines()[-2:]
    assert first == f"eval/score.py: {rows[1]['error']}"
    assert "1.mp4: got a file that can't be decoded" in first
    assert last == "eval/score.py: 1 of 3 files were not scored"
    assert len(read_scores(folder / "scores.jsonl")) == 2, "comparisons leave it out"
    status, told, error = run(folder, "--reward", "jpeg_size", "--strict")
    assert (status, told) == (2, "")
    assert "1.mp4: got a file that can't be decoded" in error


def test_what_is_there_of_a_truncated_video_is_scored_and_not_kept(folder, run, tmp_path):
    shutil.copy(FAULTS / "big_cut.mp4", folder / "1.mp4")
    for _ in range(2):
        status, _, error = run(folder, "--reward", "flicker", "--allow_truncated")
        assert status == 0
        assert error.splitlines()[-1] == f"eval/score.py: {folder}/1.mp4: scored 18 of 32 frames"
        row = json.loads((folder / "scores.jsonl").read_text().splitlines()[1])
        assert (row["missing"], list(row["scores"])) == ("18 of 32 frames", ["flicker"])
    assert run(folder, "--reward", "flicker")[0] == 1, "its score is not in the cache"


def test_folders_of_pictures_are_videos_and_hidden_files_are_not(tmp_path, run):
    target = tmp_path / "set"
    for i in range(3):
        (target / "a red kite-0").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (80 * i, 0, 0)).save(target / "a red kite-0" / f"{i}.png")
    (target / "._a red kite-1.mp4").write_bytes(b"of a Mac")
    (target / ".trash").mkdir()
    assert run(target, "--reward", "flicker", "--names_are_prompts", "--fps", "8")[0] == 0
    (row,) = [json.loads(line) for line in (target / "scores.jsonl").read_text().splitlines()]
    assert (row["file"], row["prompt"]) == ("a red kite-0", "a red kite")
    assert row["scores"]["flicker"] == pytest.approx(1 - 80 / 255 / 3, abs=1e-6)
    Image.new("RGB", (16, 16), "red").save(target / "a red kite-0" / "1.png")
    run(target, "--reward", "flicker", "--names_are_prompts", "--fps", "8")
    assert scores(target)[0]["flicker"] != row["scores"]["flicker"], "other pictures, another score"
    status, _, error = run(target, "--reward", "flicker", "--names_are_prompts")
    assert status == 2
    assert "got no videos" in error


@pytest.mark.parametrize("ending", [".gif", ".apng", ".webp", ".WEBP"])
def test_animations_named_by_their_prompts_are_videos(ending, tmp_path):
    frames = [Image.new("RGB", (16, 16), (80 * i, 0, 0)) for i in range(3)]
    path = tmp_path / f"a red kite-1{ending}"
    frames[0].save(path, format="PNG" if ending == ".apng" else None, save_all=True, append_images=frames[1:])
    assert [(video.path, video.prompt) for video in read_set(tmp_path, names_are_prompts=True)] == [
        (path, "a red kite")
    ]
    assert read_video(path).pixels_BCTHW.shape[2] == 3


@pytest.mark.parametrize("prompt", ["plain", "two\u2028lines", "next\u0085line", "form\x0cfeed"])
@pytest.mark.parametrize(("mark", "end"), [("", "\n"), ("\ufeff", "\n"), ("", "\r\n"), ("\ufeff", "\r\n")])
def test_lists_with_a_mark_or_with_separators_inside(prompt, mark, end, tmp_path):
    row = json.dumps({"file": "a.mp4", "prompt": prompt}, ensure_ascii=False)
    (tmp_path / "videos.jsonl").write_bytes(f"{mark}{row}{end}{end}{row}".encode())
    assert [(video.path.name, video.prompt) for video in read_set(tmp_path)] == [("a.mp4", prompt)] * 2
    (tmp_path / "videos.jsonl").unlink()
    (tmp_path / "prompts.txt").write_bytes(f"{mark}00\t{prompt}{end}01\t{prompt}{end}".encode())
    assert [(video.path.name, video.prompt) for video in read_set(tmp_path)] == [
        ("00.mp4", prompt),
        ("01.mp4", prompt),
    ]


@pytest.mark.parametrize(
    ("change", "arguments", "told"),
    [
        (lambda f: (f / "1.mp4").unlink(), [], "got 1 of 3 videos missing, expected all of them"),
        (lambda f: (f / "videos.jsonl").unlink(), [], "got neither videos.jsonl nor prompts.txt"),
        (lambda f: (f / "videos.jsonl").write_text('{"file": "0.mp4"}'), [], "line 1: got"),
        (lambda f: (f / "videos.jsonl").write_text('{"file": "0.mp4", "prompt": null}'), [], "line 1: got"),
        (lambda f: (f / "videos.jsonl").write_text('{"file": "0.mp4", "prompt": "a", "seed": 3.7}'), [], "line 1: got"),
        (lambda f: shutil.rmtree(f), [], "got no folder there, expected one with videos"),
        (lambda f: None, ["--reward", "flickr"], "The nearest name is 'flicker'"),
        (lambda f: (f / "0.mp4").rename(f / "0.mp4.txt"), [], "videos missing"),
    ],
)
def test_mistakes_are_told_before_a_reward_is_loaded(folder, run, change, arguments, told, monkeypatch):
    monkeypatch.setattr("rewards.score_cache.load_rewards", None)
    change(folder)
    status, out, error = run(folder, "--reward", "jpeg_size", *arguments)
    assert (status, out) == (2, "")
    assert error.startswith("eval/score.py: ")
    assert told in error
