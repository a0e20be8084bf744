"""The demo writes a video that plays, with the prompt and the sampling it was given."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from adapted_model import adapt, save_adapter
from safetensors.torch import save_file
from stored import stored_frames, stored_rate
from tiny import SAMPLING, tiny_pipeline

from rlhf.adapter.lora_file import read_lora
from rlhf.adapter.lora_weights import ADAPTER_FILE
from rlhf.generator.files import NANO_PATH
from rlhf.generator.loading import load_pipeline
from rlhf.generator.registry import CONTENTV_8B
from rlhf.run.video import to_uint8, write_video

DEMO = runpy.run_path(str(Path(__file__).parents[2] / "demo.py"))
main, parse = DEMO["main"], DEMO["parse_demo_args"]


def demo(saved, output, *more) -> torch.Tensor:
    main(["--model_id", str(saved), "--prompt", "a star", "--device", "cpu", "--output", str(output), *more])
    return stored_frames(output)


def test_writes_a_video_of_the_recommended_size(saved, tmp_path, capsys):
    video = demo(saved, tmp_path / "video.mp4")
    assert video.shape == (9, 32, 48, 3)
    assert video.float().std() > 5
    assert "9 frames of 48x32 at 8 fps" in capsys.readouterr().out
    assert stored_rate(tmp_path / "video.mp4") == 8


def test_flags_override_the_checkpoint(saved, tmp_path):
    flags = ["--height", "16", "--width", "32", "--num_frames", "5", "--num_inference_steps", "1", "--fps", "12"]
    video = demo(saved, tmp_path / "video.mp4", *flags)
    assert video.shape == (5, 16, 32, 3)
    assert stored_rate(tmp_path / "video.mp4") == 12


def test_the_seed_decides(saved, tmp_path):
    first, again, other = (demo(saved, tmp_path / f"{i}.mp4", "--seed", seed) for i, seed in enumerate("778"))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_adapter_changes_the_video(saved, tmp_path):
    save_adapter(adapt(tiny_pipeline()), tmp_path / "adapter")
    flags = ["--lora", str(tmp_path / "adapter")]
    (tmp_path / "other").mkdir()
    save_file({"other.lora_A.weight": torch.ones(4, 8)}, tmp_path / "other" / "pytorch_lora_weights.safetensors")
    with pytest.raises(
        SystemExit, match="got layers that this transformer does not have, 1 of them, such as other, expected"
    ):
        demo(saved, tmp_path / "x.mp4", "--lora", str(tmp_path / "other"))
    plain, tuned = demo(saved, tmp_path / "0.mp4"), demo(saved, tmp_path / "1.mp4", *flags)
    assert not torch.equal(plain, tuned)


def test_an_adapter_that_was_taught_guidance_is_sampled_without(saved, tmp_path, monkeypatch):
    seen, run = [], tmp_path / "run"
    pipe = adapt(tiny_pipeline())
    save_adapter(pipe, run / "adapter")
    told = tmp_path / "alone" / "mine.safetensors"
    replace(read_lora(run), distilled=True).save(told)

    def stop(sampler, prompt, seed, sampling, on_step):
        seen.append(sampling.guidance_scale)
        raise ValueError("enough")

    monkeypatch.setattr("rlhf.evaluation.sampler.Sampler.sample", stop)

    def sampled(lora, *more):
        with pytest.raises(SystemExit, match="enough"):
            demo(saved, tmp_path / "video.mp4", "--lora", str(lora), *more)

    for lora in (run / "adapter", told, told.parent):  # the file says so itself, wherever it lies
        sampled(lora)
    (run / "config.yaml").write_text(yaml.safe_dump({"guidance_gradient": "distill"}))
    for lora in (run, run / "adapter", run / "adapter" / ADAPTER_FILE):  # of a run that only its settings tell of
        sampled(lora)
    sampled(told, "--guidance_scale", "2")
    assert seen == [SAMPLING.guidance_scale, *[1.0] * 5, 2.0]


def test_nano_and_contentv_8b_have_prompts_of_their_own():
    nano, large = parse([]), parse(["--model_id", CONTENTV_8B])
    assert (nano.model_id, nano.prompt) == ("nano", "a large red circle moving left on a white background")
    assert large.prompt.startswith("A young musician sits on a rustic wooden stool")
    assert large.negative_prompt.startswith("overexposed, low quality, deformation")
    assert (nano.negative_prompt, nano.seed, nano.output) == (None, 42, Path("video.mp4"))


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("no_such_folder/x.mp4", "got no folder no_such_folder, expected a file in a folder that exists"),
        ("x.foo", "got 'x.foo', expected .mp4 or .mov or .mkv or .avi"),
        ("locked/x.mp4", "got no right to write locked/x.mp4, expected one"),
    ],
)
def test_a_video_that_cannot_be_written_is_told_before_it_is_sampled(output, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "locked")  # root may everything
    with pytest.raises(SystemExit):
        parse(["--output", output])
    assert told in capsys.readouterr().err


def test_an_empty_prompt_is_a_prompt(saved, tmp_path):
    empty, default = (demo(saved, tmp_path / f"{len(flags)}.mp4", *flags) for flags in (["--prompt", ""], []))
    assert not torch.equal(empty, default)
    assert parse(["--prompt", ""]).prompt == ""


def test_the_pipeline_makes_the_same_video(saved, tmp_path):
    """With the noise of the seed: 0.2 grey levels is what compression and rounding leave."""
    made = demo(saved, tmp_path / "demo.mp4", "--seed", "5")
    pipe = load_pipeline(saved)
    video = pipe("a star", generator=torch.Generator().manual_seed(5), output_type="pt", **SAMPLING.call_arguments())
    write_video(tmp_path / "pipe.mp4", to_uint8(video.frames[0].transpose(0, 1)), SAMPLING.fps)
    assert (made - stored_frames(tmp_path / "pipe.mp4")).abs().mean() < 0.2


def test_several_adapters_are_for_the_page(capsys):
    assert parse(["--serve", "--lora", "a", "b"]).lora == ["a", "b"]
    with pytest.raises(SystemExit):
        parse(["--lora", "a", "b"])
    assert "argument --lora: got 2, expected one" in capsys.readouterr().err


def test_another_model_needs_a_prompt(capsys):
    with pytest.raises(SystemExit):
        parse(["--model_id", "some/where"])
    assert "--prompt: got none, expected one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model_id", "./nowhere", "--prompt", "x"], "is no folder here, expected nano"),
        (["--device", "abacus"], "device='abacus', expected one of"),
        (
            ["--device", "cpu", "--model_id", "TINY", "--prompt", "x", "--lora", "./nowhere"],
            "./nowhere: got nothing there, expected an adapter",
        ),
        (["--device", "cpu", "--height", "30", "--model_id", "TINY", "--prompt", "x"], "divisible by 16"),
        (["--device", "cpu", "--fps", "0", "--model_id", "TINY", "--prompt", "x"], "fps: got 0, expected at least 1"),
    ]
    + [
        (["--device", "cpu", "--model_id", "TINY", "--prompt", "x", *flags.split()], told)
        for flags, told in {
            "--num_inference_steps 0": "num_inference_steps: got 0, expected at least 1",
            "--num_frames 6": "num_frames=6 is not 4k+1, as the VAE of",
            "--num_frames -3": "use 1",
            "--num_frames 1000001": "num_frames: got 1000001, expected at least 1, at most 10000",
            "--height 0 --width -16": "height=0 is not divisible by 16 (VAE times patch of",
            "--width 1000000": "width: got 1000000, expected at least 1, at most 16384",
            "--seed 18446744073709551616": "seed: got 18446744073709551616, expected at least -2**63, less than 2**64",
            "--guidance_scale 0": "guidance_scale: got 0.0, expected more than 0",
            "--guidance_scale nan": "guidance_scale: got nan, expected a number",
            "--fps 1000000": "fps: got 1000000, expected at least 1 and at most 1000",
            "--memory_limit_gib 12": "memory_limit_gib: got 12 on a CPU, expected an accelerator",
            "--scale nan": "scale: got nan, expected a finite number",
            "--scale 0.5": "--scale: got 0.5 without --lora, expected an adapter to scale; name one",
            "--serve --port 99999": "--host 127.0.0.1 --port 99999: got",
            "--max_sequence_length 513": "max_sequence_length: got 513, expected at least 1, at most 512",
        }.items()
    ],
)
def test_mistakes_are_one_paragraph_before_weights_load(saved, flags, message, monkeypatch):
    if "--lora" not in flags and "./nowhere" not in flags:
        monkeypatch.setattr("rlhf.evaluation.sampler.load_pipeline", None)
    with pytest.raises(SystemExit) as error:
        main([str(saved) if flag == "TINY" else flag for flag in flags])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(not NANO_PATH.is_dir(), reason="the nano weights are not in this checkout")
def test_nano_by_default(tmp_path):
    main(["--output", str(tmp_path / "video.mp4"), "--num_inference_steps", "2"])
    assert stored_frames(tmp_path / "video.mp4").shape == (17, 64, 64, 3)
