"""Videos for prompts and seeds: noise by the pair, resumed jobs, errors before any work."""

import json
import os
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from adapted_model import adapt, save_adapter
from runs import At
from stored import stored_frames, stored_rate
from tiny import SAMPLING, tiny_pipeline
from toy_rewards import redness

import rlhf.evaluation.generate
from rewards.cli.files import read_video
from rlhf.evaluation.generate import Variant, generate
from rlhf.evaluation.video_set import Video, read_set
from rlhf.generator.files import describe_model
from rlhf.nano.world import held_out_prompts
from rlhf.trainer import RewardGradientTrainer
from rlhf.types import row_of

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "eval" / "generate.py"))
parse = SCRIPT["parse_generate_args"]
PROMPTS = ["a red fox", "rain", "the sea"]
SMALL = ["--height", "16", "--width", "32", "--num_frames", "5", "--num_inference_steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of the tiny model, and that model beside it."""
    folder = tmp_path_factory.mktemp("generate")
    pipe = tiny_pipeline()
    pipe.save_pretrained(folder / "base")
    save_adapter(adapt(pipe), folder / "run" / "adapter")
    (folder / "held_out.txt").write_text("\n".join(PROMPTS))
    settings = {"model": str(folder / "base"), "eval_prompts": "held_out.txt", "base_dir": str(folder)}
    settings |= {"num_eval_prompts": 2, "height": 16, "width": 32, "num_frames": 5, "num_inference_steps": 2}
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run"


def make(output, *more) -> list[Video]:
    assert SCRIPT["main"](["--output", str(output), "--device", "cpu", *map(str, more)]) == 0
    return read_set(output)


def pixels(path) -> torch.Tensor:
    return stored_frames(path)


def test_a_run_names_model_prompts_sampling_and_adapter(run, tmp_path):
    tuned = make(tmp_path / "tuned", "--from_run", run)
    base = make(tmp_path / "base", "--from_run", run, "--base")
    assert [video.prompt for video in tuned] == PROMPTS[:2]
    assert pixels(tuned[0].path).shape == (5, 16, 32, 3)
    assert stored_rate(tuned[0].path) == SAMPLING.fps
    assert (pixels(tuned[0].path) - pixels(base[0].path)).abs().mean() > 2


def test_the_prompts_of_a_run_are_those_that_it_drew(run, tmp_path):
    config = run / "config.yaml"
    settings = yaml.safe_load(config.read_text()) | {"eval_prompts": "nano_held_out", "eval_seed": 11}
    other = tmp_path / "run"
    other.mkdir()
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    made = make(tmp_path / "made", "--from_run", other, "--base")
    assert [video.prompt for video in made] == held_out_prompts(2, seed=11)


def test_an_adapter_that_was_taught_guidance_is_sampled_without(run, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings |= {"guidance_gradient": "distill", "guidance_scale": 4.0}
    (other / "config.yaml").write_text(yaml.safe_dump(settings))
    scales = {}
    for name, flags in (("tuned", []), ("base", ["--base"]), ("asked for", ["--guidance_scale", "2"])):
        scales[name] = parse(["--output", "x", "--from_run", str(other), *flags]).guidance_scale
    assert scales == {"tuned": 1.0, "base": 4.0, "asked for": 2.0}
    alone = {folder: parse(["--output", "x", "--lora", str(folder / "adapter")]) for folder in (run, other)}
    assert [found.guidance_scale for found in alone.values()] == [None, 1.0], "of an adapter without its run, too"


def test_videos_of_a_run_have_the_size_of_its_evaluation(run, tmp_path):
    other = tmp_path / "run"
    shutil.copytree(run, other)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump(settings | {"height": 64, "eval_size": {"width": 48}}))
    for flags, width in (([], 48), (["--width", "32"], 32)):
        given = parse(["--output", "x", "--from_run", str(other), *flags])
        assert (given.height, given.width) == (64, width)


def test_an_interrupted_run_is_sampled_with_its_newest_whole_checkpoint(run, make_args, tmp_path, capsys):
    model = {"model": str(run.parent / "base"), "base_dir": str(run.parent), "prompts": "held_out.txt"}
    args = make_args(**model, max_steps=2, save_steps=1, learning_rate=0.3)
    other = Path(args.output_dir)

    def interrupt(control):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RewardGradientTrainer(None, redness, args, callbacks=[At(2, interrupt)]).train()
    prompts = ["--prompts", run.parent / "held_out.txt", "--num_prompts", 1]
    seen = {}
    for step in ("step-2", "step-1", None):
        whole, newest = other / "checkpoints" / "step-1", other / "checkpoints" / "step-2"
        if step != "step-2":
            (newest if step else whole).joinpath("adapter.safetensors").write_bytes(b"half")
        if step is None:
            break
        capsys.readouterr()
        (video,) = make(tmp_path / step, "--from_run", other, *prompts)
        assert f"sampling with {other / 'checkpoints' / step}, step {step[-1]} of 2\n" in capsys.readouterr().out
        (named,) = make(tmp_path / f"{step} by name", "--from_run", other / "checkpoints" / step, *prompts)
        seen[step] = pixels(video.path)
        assert torch.equal(pixels(named.path), seen[step])
    assert (seen["step-1"] - seen["step-2"]).abs().mean() > 1
    assert SCRIPT["main"](["--output", str(tmp_path / "none"), "--from_run", str(other), "--device", "cpu"]) == 2
    assert "got no file there, nor a whole checkpoint, expected either; train first" in capsys.readouterr().err
    make(tmp_path / "base", "--from_run", other, "--base", *prompts)


def test_a_seed_given_twice_makes_one_video(run, tmp_path, capsys):
    make(tmp_path, "--from_run", run, "--num_prompts", 1, "--seeds", 3, 3)
    assert "1 videos in" in capsys.readouterr().out


def test_merged_is_the_adapter_and_the_scale_goes_from_the_base_to_beyond(run, tmp_path):
    ways = {
        "base": ["--base"],
        "none of it": ["--scale", 0],
        "adapter": [],
        "merged": ["--merge"],
        "twice": ["--scale", 2],
        "merged twice": ["--merge", "--scale", 2],
    }
    seen = {}
    for name, flags in ways.items():
        (video,) = make(tmp_path / name, "--from_run", run, "--num_prompts", 1, *flags)
        seen[name] = pixels(video.path)
    distance = lambda a, b: (seen[a] - seen[b]).abs().mean()
    assert distance("base", "none of it") == 0
    assert distance("adapter", "merged") < 0.5 < 2 < distance("base", "adapter")
    assert distance("twice", "merged twice") < 0.5 < 2 < distance("adapter", "twice")


def test_the_noise_is_that_of_seed_and_prompt_whatever_else_is_made(run, tmp_path):
    model = ["--model", run.parent / "base", *SMALL]
    (tmp_path / "other.txt").write_text("the sea\nrain\nthe sea\n")
    several = make(tmp_path / "a", *model, "--prompts", run.parent / "held_out.txt", "--seeds", 0, 1)
    fewer = make(tmp_path / "b", *model, "--prompts", tmp_path / "other.txt", "--seeds", 1, "--batch_size", 1)
    one = {(v.prompt, v.seed): pixels(v.path) for v in several}
    two = {(v.prompt, v.seed): pixels(v.path) for v in fewer}
    assert list(one) == [(prompt, seed) for prompt in PROMPTS for seed in (0, 1)]
    assert set(two) == {("the sea", 1), ("rain", 1)}
    for key in two:
        assert (one[key] - two[key]).abs().mean() < 0.5  # another batch size rounds otherwise
    assert (one["rain", 0] - one["rain", 1]).abs().mean() > 2


def test_rows_bring_their_negative_prompts_and_go_into_the_list(run, tmp_path):
    rows = "prompt,negative_prompt,target\nrain,dry sun,red\nrain,,red\nrain,dry sun,red\n"
    (tmp_path / "rows.csv").write_text(rows)
    flags = ["--model", run.parent / "base", *SMALL, "--guidance_scale", 9, "--prompts", tmp_path / "rows.csv"]
    made = make(tmp_path / "made", *flags)
    assert [row_of(video.prompt) for video in made] == [
        {"prompt": "rain", "negative_prompt": negative, "target": "red"} for negative in ("dry sun", None)
    ], "the third is the first"
    assert (pixels(made[0].path) - pixels(made[1].path)).abs().mean() > 2
    alone = make(tmp_path / "alone", *flags, "--negative_prompt", "dry sun", "--num_prompts", 2)
    assert torch.equal(pixels(alone[0].path), pixels(alone[1].path)), "the default of rows without one"
    (tmp_path / "rows.csv").write_text(rows.replace("red", "blue"))
    assert row_of(make(tmp_path / "made", *flags)[0].prompt)["target"] == "blue", "no video depends on it"
    (tmp_path / "rows.csv").write_text(rows.replace("sun", "sand"))
    assert SCRIPT["main"](["--output", str(tmp_path / "made"), *map(str, flags)]) == 2


def test_it_goes_on_where_it_ended(run, tmp_path, monkeypatch):
    first = make(tmp_path, "--from_run", run, "--seeds", 0, 1)
    kept, missing = [video.path for video in first if video is not first[2]], pixels(first[2].path)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in kept}
    first[2].path.unlink()
    made, whole = [], rlhf.evaluation.generate.save_video
    monkeypatch.setattr(
        "rlhf.evaluation.generate.save_video", lambda path, *rest: (made.append(path), whole(path, *rest))
    )
    again = make(tmp_path, "--from_run", run, "--seeds", 0, 1, "--num_prompts", 3)
    assert made == [first[2].path, again[4].path, again[5].path]  # what was missing, and the prompt that is new
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in kept}
    assert (pixels(first[2].path) - missing).abs().mean() < 0.5, "of 255: another batch rounds differently"
    monkeypatch.setattr("rlhf.evaluation.generate.load_pipeline", None)
    assert make(tmp_path, "--from_run", run, "--seeds", 0, 1, "--num_prompts", 3) == again, "all is there"


def test_an_interrupted_video_is_absent(tmp_path, monkeypatch):
    def interrupted(path, *_):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf.evaluation.generate.write_video", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rlhf.evaluation.generate.save_video(tmp_path / "a.mp4", torch.zeros(1, 3, 16, 16, dtype=torch.uint8), 8)
    assert not (tmp_path / "a.mp4").exists()


def test_processes_share_the_work_and_make_the_same(run, tmp_path):
    variant = Variant(str(run.parent / "base"))
    made = {}
    for processes in (1, 2):
        videos = SCRIPT["planned_videos"](tmp_path / str(processes), PROMPTS, [0])
        for index in range(processes):
            accelerator = SimpleNamespace(
                process_index=index,
                num_processes=processes,
                is_main_process=index == 0,
                device=torch.device("cpu"),
                wait_for_everyone=lambda: None,
            )
            count = generate(variant, videos, SAMPLING, accelerator, batch_size=1)
            assert count == ([3] if processes == 1 else [2, 1])[index]
        made[processes] = [read_video(video.path).pixels_BCTHW for video in videos]
    for alone, shared in zip(made[1], made[2], strict=True):  # sums round by where their numbers lie in memory
        assert (alone - shared).abs().mean() < 1e-3
    assert (made[1][0] - made[1][1]).abs().mean() > 1e-2, "other prompts are other videos"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--from_run", "nowhere"], "got no file there, expected the folder of a training run, or a checkpoint within"),
        (["--num_prompts", "0"], "--num_prompts: got 0, expected at least 1"),
        (["--base"], "got no --from_run, expected the run whose adapter is left out"),
        (["--model", "{base}", "--prompts", "absent.txt"], "got no file at"),
        (["--model", "{base}", "--height", "20"], "height=20 is not divisible by 16"),
        (["--model", "{base}", "--num_frames", "6"], "num_frames=6 is not 4k+1"),
        (["--model", "{base}", "--fps", "-1"], "fps: got -1, expected at least 1 and at most 1000"),
        (["--model", "{base}", "--lora", "absent"], "absent: got nothing there, expected an adapter"),
        (["--model", "{base}", "--merge"], "got no adapter, expected one to apply it to"),
        (["--model", "{base}", "--guidance_scale", "nan"], "guidance_scale: got nan, expected a number"),
        (["--model", "{base}", "--num_prompts", str(10**9)], "num_eval_prompts: got 1000000000, expected at least 1"),
        (["--model", "{base}", "--scale", "2"], "got no adapter, expected one to apply it to"),
        (["--model", "absent/absent/absent"], "is no folder here"),
    ],
)
def test_mistakes_are_told_before_anything_is_loaded(run, tmp_path, flags, told, capsys, monkeypatch):
    monkeypatch.setattr("rlhf.evaluation.generate.load_pipeline", None)
    monkeypatch.chdir(tmp_path)
    flags = [flag.format(base=run.parent / "base") for flag in flags]
    assert SCRIPT["main"](["--output", "out", "--device", "cpu", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("eval/generate.py: ")
    assert told in error
    assert not (tmp_path / "out").exists()


def test_videos_of_a_model_whose_files_changed_are_not_continued(run, tmp_path, capsys):
    model = Path(shutil.copytree(run.parent / "base", tmp_path / "model"))
    (tmp_path / "one.txt").write_text(PROMPTS[0])
    flags = ["--model", str(model), "--prompts", str(tmp_path / "one.txt"), *SMALL]
    make(tmp_path / "out", *flags)
    make(tmp_path / "out", *flags)
    saved, settings = tmp_path / "out" / "generate.json", json.loads((tmp_path / "out" / "generate.json").read_text())
    for older in ("15 files, 9 bytes, newest 2033-05-18T03:33:20+00:00", None):
        saved.write_text(json.dumps(settings | {"model_files": older}))
        make(tmp_path / "out", *flags)
    (weights,) = (model / "transformer").glob("*.safetensors")
    before, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))  # of equal size and time, as a copy may be
    assert SCRIPT["main"](["--output", str(tmp_path / "out"), *flags]) == 2
    assert f"expected '{describe_model(model)}' to continue; choose another" in capsys.readouterr().err


def test_videos_of_two_kinds_do_not_share_a_folder(run, tmp_path, capsys):
    make(tmp_path, "--from_run", run)
    for flags, told in (
        (["--scale", "0.5"], "got videos made with scale=1.0, expected 0.5"),
        (["--num_inference_steps", "3"], "got videos made with num_inference_steps=2, expected 3"),
        (["--prompts", "other.txt"], "got the prompt 'a red fox' for 0000-seed0.mp4, expected 'the moon'"),
    ):
        (run.parent / "other.txt").write_text("the moon")
        flags = [flag.replace("other.txt", str(run.parent / "other.txt")) for flag in flags]
        assert SCRIPT["main"](["--from_run", str(run), "--output", str(tmp_path), "--device", "cpu", *flags]) == 2
        assert told in capsys.readouterr().err
    assert json.loads((tmp_path / "generate.json").read_text())["scale"] == 1.0
    (tmp_path / "generate.json").unlink()  # as of videos that something else made
    assert SCRIPT["main"](["--from_run", str(run), "--output", str(tmp_path), "--device", "cpu", "--scale", "0.5"]) == 2
    assert "generate.json: got no file that says how 0000-seed0.mp4 was made, expected it" in capsys.readouterr().err
