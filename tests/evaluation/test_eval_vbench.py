"""The folder layout is what VBench's own tool looks for; our values are its formulas."""

import ast
import json
import os
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline

from rewards.cli.files import read_video
from rlhf.run.video import write_video

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "eval" / "vbench.py"))
vbench_videos, read_suites, main = SCRIPT["vbench_videos"], SCRIPT["read_suites"], SCRIPT["main"]

# Dimensions of a prompt in VBench_full_info.json: eleven kinds, each a suite of its own.
KINDS = [
    ["human_action"],
    ["temporal_style"],
    ["overall_consistency", "aesthetic_quality", "imaging_quality"],
    ["appearance_style"],
    ["scene", "background_consistency"],
    ["color"],
    ["spatial_relationship"],
    ["multiple_objects"],
    ["object_class"],
    ["temporal_flickering"],
    ["subject_consistency", "dynamic_degree", "motion_smoothness"],
]
PROMPTS = ["A person's t-shirt, 3D (8-bit)", "façade at dusk. two birds-1", "In a still frame, " + "long " * 35]


@pytest.fixture(scope="module")
def full_info(tmp_path_factory):
    """Three prompts for each kind; the first is the same for all, as some are in the real file."""
    rows = [
        {"prompt_en": PROMPTS[0] if i == 0 else f"{PROMPTS[i]} {kind[0]}", "dimension": kind}
        for kind in KINDS
        for i in range(3)
    ]
    path = tmp_path_factory.mktemp("vbench") / "VBench_full_info.json"
    path.write_text(json.dumps(rows))
    return path


def found_by_vbench(folder: Path, full_info: Path, dimension: str) -> tuple[int, int]:
    """Return videos found and wanted, by VBench's build_full_info_json, mode vbench_standard."""
    names = os.listdir(folder)
    ending = Path(names[0]).suffix
    prompts = [row["prompt_en"] for row in json.loads(full_info.read_text()) if dimension in row["dimension"]]
    wanted = [f"{prompt}-{i}{ending}" for prompt in prompts for i in range(5)]
    return sum(name in names for name in wanted), len(wanted)


def touch(videos) -> None:
    for video in videos:
        video.path.parent.mkdir(parents=True, exist_ok=True)
        video.path.touch()


def commands(root) -> dict[str, Path]:
    """{dimension: folder} of the printed commands of the official tool."""
    lines = [shlex.split(line) for line in SCRIPT["official_commands"](root, None).splitlines()]
    return {line[-1]: Path(line[line.index("--videos_path") + 1]) for line in lines if line[1] == "evaluate"}


def test_every_dimension_finds_all_of_its_videos(full_info, tmp_path):
    touch(vbench_videos(tmp_path, read_suites(full_info, None)))
    told = commands(tmp_path)
    dimensions = {dimension for kind in KINDS for dimension in kind}
    assert set(told) == dimensions
    assert len(dimensions) == 16
    for dimension, folder in told.items():
        if dimension == "temporal_flickering":  # its videos are filtered first
            folder = tmp_path / "temporal_flickering"
        assert found_by_vbench(folder, full_info, dimension) == (15, 15), dimension
        assert {path.suffix for path in folder.iterdir()} == {".mp4"}, "the tool takes the first file's ending for all"


def test_temporal_flickering_has_25_of_a_prompt_and_goes_through_the_filter(full_info, tmp_path):
    videos = vbench_videos(tmp_path, read_suites(full_info, ["temporal_flickering"]))
    assert len(videos) == 75
    assert len({(video.prompt, video.seed) for video in videos}) == 75
    first, second = SCRIPT["official_commands"](tmp_path, ["temporal_flickering"]).splitlines()
    assert first.startswith(f"vbench static_filter --videos_path {tmp_path.resolve()}/temporal_flickering ")
    results = shlex.split(first)[-1]
    assert f"--videos_path {results}/filtered_videos --dimension temporal_flickering" in second


def test_dimensions_of_one_suite_share_its_videos(full_info, tmp_path):
    asked = ["subject_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality"]
    suites = read_suites(full_info, asked)
    assert list(suites) == ["subject_consistency", "overall_consistency"]
    assert len(vbench_videos(tmp_path, suites)) == 2 * 15
    rows = json.loads(full_info.read_text())
    (tmp_path / "twice.json").write_text(json.dumps([*rows, rows[6]]))
    assert read_suites(tmp_path / "twice.json", asked) == suites, "a prompt that is listed twice counts once"


@pytest.mark.skipif(
    "VBENCH" not in os.environ, reason="$VBENCH names no checkout of VBench, whose own code it would run"
)
def test_the_official_code_finds_every_video_of_every_prompt(tmp_path, capsys):
    """The real prompts, and the tool's own method, lifted out of its module."""
    checkout = Path(os.environ["VBENCH"])
    full_info = checkout / "vbench" / "VBench_full_info.json"
    videos = vbench_videos(tmp_path / "videos", read_suites(full_info, None))
    touch(videos)
    tree = ast.parse((checkout / "vbench" / "__init__.py").read_text())
    (own,) = (node for node in ast.walk(tree) if getattr(node, "name", "") == "build_full_info_json")
    names = {"os": os, "Path": Path, "print0": print, "load_json": lambda path: json.loads(Path(path).read_text())}
    names["save_json"] = lambda data, path: Path(path).write_text(json.dumps(data))
    exec(compile(ast.Module([own], []), "vbench", "exec"), names)
    tool = type("Tool", (), {"full_info_dir": full_info, "output_path": tmp_path})()
    counts = {}
    for dimension, suite in SCRIPT["SUITES"].items():
        folder = str(tmp_path / "videos" / suite)
        result = Path(names["build_full_info_json"](tool, folder, dimension, [dimension]))
        rows = json.loads(result.read_text())
        assert all(len(row["video_list"]) == 5 for row in rows)
        counts[dimension] = len(rows)
    assert "WARNING" not in capsys.readouterr().out
    assert sum(counts.values()) == 72 * 3 + 86 * 2 + 75 + 93 * 3 + 79 + 82 + 100 + 85 + 84 + 100 + 90
    folders = json.loads((checkout / "dimension_to_folder.json").read_text())
    assert folders == SCRIPT["SUITES"]


def test_videos_are_made_where_they_are_looked_for_and_go_on(full_info, tmp_path, capsys, monkeypatch):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "few.json").write_text(json.dumps(json.loads(full_info.read_text())[:1]))
    flags = "--full_info few.json --output out --dimension human_action --model model --device cpu --height 16"
    flags += " --width 32 --num_frames 5 --num_inference_steps 1 --batch_size 5"
    arguments = ["make", *flags.split()]
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 0
    folder = tmp_path / "out" / "human_action"
    assert sorted(os.listdir(folder)) == [f"{PROMPTS[0]}-{i}.mp4" for i in range(5)]
    videos = [read_video(path).pixels_BCTHW for path in sorted(folder.iterdir())]
    assert min((videos[0] - other).abs().mean() for other in videos[1:]) > 0.01, "each has noise of its own"
    assert f"vbench evaluate --videos_path {folder} --dimension human_action" in capsys.readouterr().out
    monkeypatch.setattr("rlhf.evaluation.generate.load_pipeline", None)
    assert main(arguments) == 0


def test_our_values_are_the_means_over_the_dimensions_videos(full_info, tmp_path, capsys):
    generator, changes = torch.Generator().manual_seed(0), []
    videos = vbench_videos(tmp_path / "out", read_suites(full_info, ["temporal_flickering"]))
    for video in videos[:3]:
        video.path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 255, (3, 3, 16, 16), generator=generator, dtype=torch.uint8)
        write_video(video.path, pixels, fps=8)
        frames = (read_video(video.path).pixels_BCTHW * 255).double()
        changes.append(((255 - frames.diff(dim=2).abs().mean()) / 255).item())  # VBench's temporal_flickering.py
    for i, video in enumerate(videos):
        if i >= 3:
            os.link(videos[i % 3].path, video.path)
    arguments = ["score", "--full_info", full_info, "--output", tmp_path / "out", "--device", "cpu", "--dimension"]
    arguments += ["temporal_flickering", "color", "--cache", tmp_path / "cache", "--json", tmp_path / "values.json"]
    assert main([str(argument) for argument in arguments]) == 0
    (row,) = json.loads((tmp_path / "values.json").read_text())
    assert (row["dimension"], row["videos"]) == ("temporal_flickering", 75)
    assert row["value"] == pytest.approx(sum(changes) / 3, abs=1e-6)
    assert "VBench leaves out those that move" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ("not json", "got JSONDecodeError, expected VBench_full_info.json"),
        ('[{"prompt": "a"}]', "got KeyError, expected VBench_full_info.json"),
        ('[{"prompt_en": "a", "dimension": ["color"]}]', "got no prompt for scene, expected some"),
        ('[{"prompt_en": "a/b", "dimension": ["scene"]}]', "got one that can't be a file name"),
        ('[{"prompt_en": "' + "ç" * 126 + '", "dimension": ["scene"]}]', "got one that can't be a file name"),
    ],
)
def test_a_file_of_another_kind_is_told_before_anything_is_loaded(tmp_path, rows, told, capsys, monkeypatch):
    monkeypatch.setattr("rlhf.evaluation.generate.load_pipeline", None)
    (tmp_path / "info.json").write_text(rows)
    flags = ["--full_info", str(tmp_path / "info.json"), "--output", str(tmp_path / "out"), "--dimension", "scene"]
    assert main(["make", *flags]) == 2
    assert told in capsys.readouterr().err


def test_missing_videos_are_told_before_a_reward_is_loaded(full_info, tmp_path, capsys):
    flags = ["--full_info", str(full_info), "--output", str(tmp_path), "--dimension", "subject_consistency"]
    assert main(["score", *flags]) == 2
    assert "got 15 of 15 videos missing" in capsys.readouterr().err
