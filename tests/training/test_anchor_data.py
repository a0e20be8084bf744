"""Real videos in the loop: a term of the loss, or the starts of a run that samples nothing."""

import json
import shutil

import pytest
import torch
from real_videos import CAPTIONS, write_videos
from runs import adapter, train
from tiny import tiny_pipeline
from toy_rewards import PROMPTS, redness, rows_without_cost

import rlhf.training.anchor_data
from rewards.cli.files import read_video
from rlhf.checks import check_config
from rlhf.config import ConfigError
from rlhf.config.parse import CONFIGS, parse_config
from rlhf.device import generator
from rlhf.generator.wan_decoder import decode_video
from rlhf.generator.wan_encoder import encode_video
from rlhf.io import write_rows
from rlhf.method.flow_matching import draw_sigmas
from rlhf.method.plan import make_plan
from rlhf.trainer import RewardGradientTrainer

OFFLINE = {"method": "srpo", "method_kwargs": {"offline": True}}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONTENTV_RLHF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latents"


@pytest.fixture
def folder(tmp_path):
    return write_videos(tmp_path / "videos")


def first_gradient(trainer, step=0) -> tuple[torch.Tensor, dict]:
    """The gradient and the metrics of a step at an adapter that has learnt something."""
    noise = torch.randn(trainer.masters.vector.shape, generator=torch.Generator().manual_seed(0))
    trainer.masters.set(0.1 * noise)
    found = []
    trainer._update = lambda step, norm: found.append(trainer.masters.vector.grad.clone())
    row = trainer.step(step)
    trainer.masters.vector.grad.zero_()
    return found[0], row


def assert_same(gradient, expected, rounding=1e-5):
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=rounding * expected.abs().max().item())


@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"method": "nft", "method_kwargs": {"group_size": 2}}, marks=pytest.mark.slow)]
)
def test_every_nth_step_adds_the_loss_of_flow_matching_on_real_videos(make_pipe, make_args, tmp_path, folder, settings):
    args = make_args(output_dir=str(tmp_path / "plain"), gradient_accumulation_steps=2, **settings)
    plain, row = first_gradient(RewardGradientTrainer(make_pipe(), redness, args, PROMPTS), step=1)
    options = settings.get("method_kwargs", {}) | {"anchor_data_steps": 2, "anchor_data_weight": 0.7}
    held = make_args(gradient_accumulation_steps=2, anchor_data=str(folder), **settings | {"method_kwargs": options})
    trainer = RewardGradientTrainer(make_pipe(), redness, held, PROMPTS)
    both, with_data = first_gradient(trainer, step=1)

    total, pipe = 0.0, trainer.pipe
    for micro in range(2):
        batch = trainer.data.batches.batch(0, micro)
        cond, e = trainer.text(batch.prompts, "cpu"), batch.noise("data")
        assert len(set(batch.prompts)) == 2
        sigma = draw_sigmas(batch.noise("data level", (1, 1, 1, 1)), 3.0)
        videos = [read_video(folder / f"{CAPTIONS.index(p)}.mp4").pixels_BCTHW for p in batch.prompts]
        x0 = encode_video(pipe.vae, torch.cat(videos))
        text = cond.prompt_embeds_BLD, cond.pooled_embeds_BP
        v = pipe.transformer((1 - sigma) * x0 + sigma * e, *text, sigma.flatten() * 1000).sample
        total = total + (v - (e - x0)).square().mean() / 2
    (0.7 * total).backward()
    trainer.masters.collect_grad()
    assert_same(both - plain, trainer.masters.vector.grad)
    assert with_data["data_loss"] == pytest.approx(total.item(), rel=1e-4)
    assert with_data["loss"] == pytest.approx(row["loss"] + 0.7 * total.item(), rel=1e-4)
    assert with_data["reward"] == row["reward"]
    trainer.masters.vector.grad.zero_()
    assert "data_loss" not in first_gradient(trainer, step=2)[1]


def test_offline_srpo_learns_at_real_videos_without_any_rollout(make_pipe, make_args, folder):
    """The gradient by the paper's equations, and no call of the transformer without gradient."""
    args = make_args(anchor_data=str(folder), guidance_scale=3.0, **OFFLINE)
    trainer = RewardGradientTrainer(make_pipe(), redness, args)
    assert sorted(trainer.batches.prompts) == sorted(CAPTIONS[:4])
    calls = []
    trainer.pipe.transformer.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    gradient, row = first_gradient(trainer)
    assert calls == [True] * 4, "two draws, two branches of guidance"

    plan = make_plan(trainer.args, trainer.options, trainer.sigmas, generator("method", 0, 0))
    batch = trainer.batches.batch(0, 0)
    videos = [read_video(folder / f"{CAPTIONS.index(p)}.mp4").pixels_BCTHW for p in batch.prompts]
    x0, e = encode_video(trainer.pipe.vae, torch.cat(videos)), batch.noise("train")
    velocity = trainer.fields.window(trainer.text(batch.prompts, "cpu"))
    scores = []
    for sigma, step in plan.recoveries:
        start = torch.tensor(sigma - step)
        x = (1 - start) * x0 + start * e + step * velocity((1 - start) * x0 + start * e, start)
        scores.append(redness(decode_video(trainer.pipe.vae, (x - sigma * e) / (1 - sigma)), batch.prompts).mean())
    assert plan.recoveries[0][1] < 0 < plan.recoveries[1][1]
    ((scores[1] - scores[0]) / 2).backward()
    trainer.masters.collect_grad()
    assert_same(gradient, trainer.masters.vector.grad, rounding=1e-4)  # recovering divides by 1 - sigma
    assert row["reward"] == pytest.approx(scores[0].item(), rel=1e-4)


def test_a_resumed_run_is_the_whole_run_to_the_bit_and_encodes_nothing_again(
    make_pipe, make_args, tmp_path, folder, monkeypatch
):
    """Resumed at step 2 of 4, after two of the steps' batches and one of the loss's."""
    settings = {"anchor_data": str(folder), "max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 3}
    options = {"offline": True, "anchor_data_steps": 2}
    settings |= {"method": "srpo", "method_kwargs": options}
    whole = make_args(output_dir=str(tmp_path / "whole"), **settings)

    def run(args):
        trainer = RewardGradientTrainer(None, redness, args)
        trainer.train()
        return trainer

    settings["model"] = whole.model = str(_saved(make_pipe(), tmp_path / "model"))
    first = run(whole)
    monkeypatch.setattr(rlhf.training.anchor_data, "encode_video", None)
    again = f"{whole.output_dir}/checkpoints/step-2"
    rest = make_args(output_dir=str(tmp_path / "rest"), resume_from_checkpoint=again, **settings)
    second = run(rest)
    assert torch.equal(adapter(rest), adapter(whole))
    assert rows_without_cost(rest) == rows_without_cost(whole)[2:]
    state = json.loads((tmp_path / "whole" / "checkpoints" / "step-2" / "state.json").read_text())
    assert state["anchor_data"]["place"] == 3, "one step's videos"
    assert state["place"] == 6
    order = [trainer.data.batches.batch(1, 0).prompts for trainer in (first, second)]
    assert order[0] == order[1]


def test_a_run_that_leaves_offline_trains_on_its_prompts_and_not_on_captions(make_args, tmp_path, folder):
    (tmp_path / "mine.txt").write_text("\n".join(PROMPTS))
    args = make_args(anchor_data=str(folder), prompts=str(tmp_path / "mine.txt"), max_steps=1, **OFFLINE)
    RewardGradientTrainer(tiny_pipeline(), redness, args).train()
    changes = ["--method", "draft_k", "--anchor_data", "none", "--resume_from_checkpoint", "latest"]
    online = parse_config(["--output_dir", args.output_dir, *changes, "--max_steps", "2"], CONFIGS / "nano.yaml")
    assert online.method_kwargs is None
    trainer = RewardGradientTrainer(tiny_pipeline(), redness, online)
    assert sorted(trainer.batches.prompts) == sorted(PROMPTS)


def _saved(pipe, folder):
    """A tiny model on disk, so that text encoders are loaded, and released, as in a command."""
    pipe.save_pretrained(folder)
    return folder


def test_an_interrupted_cache_goes_on_and_another_vae_has_its_own(make_pipe, make_args, folder, cache, monkeypatch):
    args, encoded = make_args(anchor_data=str(folder), **OFFLINE), []

    def counted(vae, video):
        if len(encoded) == 2 and len({*cache.rglob("*.safetensors")}) == 2:
            raise KeyboardInterrupt
        encoded.append(video)
        return encode_video(vae, video)

    monkeypatch.setattr(rlhf.training.anchor_data, "encode_video", counted)
    with pytest.raises(KeyboardInterrupt):
        RewardGradientTrainer(make_pipe(), redness, args)
    monkeypatch.setattr(rlhf.training.anchor_data, "encode_video", lambda *a: encoded.append(0) or encode_video(*a))
    trainer = RewardGradientTrainer(make_pipe(), redness, args)
    assert len(encoded) == 4
    assert not [*cache.rglob(".unfinished*")]
    video = read_video(folder / "2.mp4").pixels_BCTHW
    assert torch.equal(trainer.data.latents(trainer.data.captions[2:3]), encode_video(trainer.pipe.vae, video))
    pipe = make_pipe()
    pipe.vae.encoder.conv_in.weight.mul_(1.1)
    RewardGradientTrainer(pipe, redness, args)
    assert len(encoded) == 8


# ---------------------------------------- what cannot be learnt from


def _blank_caption(folder):
    write_rows(folder / "videos.jsonl", [{"file": "0.mp4", "prompt": " "}])


def _cut(folder):
    path = folder / "1.mp4"
    path.write_bytes(path.read_bytes()[:300])


def _in_place_of_one(**sizes):
    def change(folder):
        other = write_videos(folder.parent / "other", count=1, **sizes)
        shutil.copy(other / "0.mp4", folder / "2.mp4")

    return change


MISTAKES = {
    "no folder": (shutil.rmtree, "got no folder there, expected one with videos; correct the path"),
    "no captions": (lambda f: (f / "videos.jsonl").unlink(), "got neither videos.jsonl nor prompts.txt, expected one"),
    "an empty list": (lambda f: (f / "videos.jsonl").write_text(""), "got no videos, expected one or more"),
    "a blank caption": (_blank_caption, "0.mp4: got ' ', expected visible text; write a prompt"),
    "an absent video": (lambda f: (f / "3.mp4").unlink(), "3.mp4: got 1 of 4 videos missing, expected all of them"),
    "a bad file": (_cut, r"1.mp4: got .* can't be decoded .*\(1 of 4 videos do not fit\)"),
    "another size": (
        _in_place_of_one(width=48),
        r"2.mp4: got 48x16 pixels \(1 of 4 videos do not fit\), expected 32x16 pixels, at least 5 frames, 8 a second; "
        "ffmpeg -i IN -vf fps=8,scale=32:16 OUT.mp4 converts one",
    ),
    "too short": (_in_place_of_one(frames=4), r"2.mp4: got 4 frames \(1 of 4"),
    "another rate": (_in_place_of_one(fps=12), r"2.mp4: got 12 frames a second \(1 of 4"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_folder_that_does_not_fit_is_one_paragraph_before_any_weight(make_args, tiny_pipe, tmp_path, folder, mistake):
    change, message = MISTAKES[mistake]
    change(folder)
    model = _saved(tiny_pipe, tmp_path / "model")
    for weights in model.rglob("*.safetensors"):
        weights.unlink()
    args = make_args(model=str(model), anchor_data=str(folder), **OFFLINE)
    with pytest.raises(ConfigError, match=message) as caught:
        check_config(args)
    assert len(caught.value.problems) == 1


def test_longer_videos_are_cut_and_prompts_of_an_offline_run_are_refused(make_args, tmp_path):
    folder = write_videos(tmp_path / "longer", frames=9)
    args = make_args(anchor_data=str(folder), **OFFLINE)
    check_config(args)
    with pytest.raises(ConfigError, match="train_dataset: got prompts of a run that is offline, expected none"):
        train(args)
