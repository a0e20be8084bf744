"""The loop as a whole, on a tiny random pipeline: it learns, sums over batches, and leaves what it
should.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoHaConfig, LoraConfig
from runs import assert_same_training, saved_adapter, train
from tiny import tiny_pipeline
from toy_rewards import PROMPTS, brightness, redness

from rlhf.adapter.lora import disable_adapter
from rlhf.config import ConfigError
from rlhf.config.parse import parse_config
from rlhf.device import generator
from rlhf.generator.text import PromptCache
from rlhf.generator.wan_decoder import decode_video
from rlhf.method.drift import drift_step_weights, velocity_distance
from rlhf.method.plan import gradient_samples, make_plan
from rlhf.method.rollout import rollout, sample_euler
from rlhf.method.velocity import velocity_field
from rlhf.prompts import load_prompts
from rlhf.run.metrics import COST, read_metrics
from rlhf.trainer import RewardGradientTrainer


def test_the_reward_rises_on_prompts_it_was_not_trained_on(make_args):
    args = make_args(max_steps=12, per_device_train_batch_size=4, num_grad_steps=2, learning_rate=3e-2)
    args.num_sample_prompts = 2
    summary = RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS[:4], [f"a {p}" for p in PROMPTS]).train()
    row = summary["trained"]["redness"]
    assert row["ci95"][0] > 0
    assert row["diff"] == pytest.approx(row["tuned"] - row["base"], abs=1e-6)
    rows = read_metrics(Path(args.output_dir))
    assert sum(r["reward"] for r in rows[-3:]) > sum(r["reward"] for r in rows[:3])


@pytest.mark.parametrize("method", ["draft_k", "srpo", "nft"])
def test_the_embeddings_of_a_batch_go_to_the_device_once(make_args, monkeypatch, method):
    options = {"group_size": 2} if method == "nft" else None
    args = make_args(max_steps=2, gradient_accumulation_steps=2, method=method, method_kwargs=options)
    trainer = RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS, None)
    looked_up, find = [], PromptCache.__call__
    monkeypatch.setattr(PromptCache, "__call__", lambda text, *a: looked_up.append(a) or find(text, *a))
    trainer.train()
    assert len(looked_up) == 4, "steps times batches"


def test_what_a_run_leaves(make_args):
    steps = {"max_steps": 4, "save_steps": 2, "save_total_limit": 1, "sample_steps": 1, "eval_steps": 3}
    args = make_args(report_to=["tensorboard"], **steps)
    pipe = tiny_pipeline()
    before = {name: t.clone() for name, t in pipe.transformer.state_dict().items()}
    summary = train(args, [redness, brightness], pipe, evaluate=True)
    folder = Path(args.output_dir)
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert sorted(p.name for p in (folder / "samples").iterdir()) == [f"step-{i:06d}" for i in range(5)]
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-4"]
    assert list(folder.glob("trackers/**/events.out.tfevents*"))
    for name in ("config.yaml", "contact_sheet.png", "adapter", "evaluation"):
        assert (folder / name).exists()
    rows = read_metrics(folder)
    keys = {"step", "epoch", "loss", "reward", "saturated", "grad_norm", "learning_rate", "samples", *COST}
    keys |= {f"rewards/{name}{end}" for name in ("redness", "brightness") for end in ("", "_std")}
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert set(rows[0]) == keys
    evaluated = ("redness", "brightness", "motion", "saturation", "high_frequency", "diversity", "gain_trained")
    assert set(rows[2]) == keys | {f"eval/{name}" for name in evaluated}
    assert rows[3]["samples"] == 8
    assert rows[3]["epoch"] == pytest.approx(8 / 6)
    assert 0.1 < rows[0]["memory_gib"] <= rows[3]["memory_gib"] < 64, "on a CPU the peak of the process so far"
    assert rows[0]["loss"] == pytest.approx(-rows[0]["reward"])
    assert rows[0]["reward"] == pytest.approx(rows[0]["rewards/redness"] + rows[0]["rewards/brightness"], rel=1e-5)
    after = {name.replace(".base_layer", ""): t for name, t in pipe.transformer.state_dict().items()}
    assert all(torch.equal(t, after[name]) for name, t in before.items()), "the base must stay as it was"
    assert all(0 <= row["saturated"] <= 1 for row in rows)
    assert any(t.abs().max() > 0 for name, t in saved_adapter(args).items() if "lora_B" in name)


def test_weights_weigh_the_gradient(make_args, tmp_path):
    """A weight of 0 only logs; a negative one turns the direction round."""
    adapters = []
    for i, weights in enumerate(([1.0, 0.0], [1.0], [-1.0])):
        args = make_args(output_dir=str(tmp_path / str(i)), reward_weights=weights, max_steps=1)
        train(args, [redness, brightness][: len(weights)])
        adapters.append(torch.cat([t.flatten() for n, t in saved_adapter(args).items() if "lora_B" in n]))
    assert torch.equal(adapters[0], adapters[1])
    torch.testing.assert_close(adapters[1], -adapters[2], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("settings", [{"drift_weight": 0.3}, {"anchor_steps": 2}])
def test_a_step_descends_the_mean_over_its_plans_samples_and_the_drift(make_args, monkeypatch, settings):
    """Written out for the second step of an adapter that has learnt something: an anchor's, where
    there are any.
    """
    args = make_args(method="srpo", num_inference_steps=4, max_grad_norm=0.0, warmup_steps=4, **settings)
    trainer, found = RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS), []
    masters, sigmas, transformer = trainer.masters, trainer.sigmas, trainer.pipe.transformer
    noise = torch.randn(masters.vector.shape, generator=torch.Generator().manual_seed(0))
    masters.set(masters.vector + 0.1 * noise)
    batch = trainer.batches.batch(1, 0)
    tuned = velocity_field(transformer, trainer.text(batch.prompts, "cpu"), trainer.args.guidance_scale)
    base = disable_adapter(transformer)(tuned)

    plan = make_plan(args, trainer.options, sigmas, generator("method", args.seed, 1))
    i, loss, rewards = plan.drift_step, 0.0, []
    if not args.anchor_steps:
        states = rollout(tuned, tuned, batch.noise("train"), plan.sigmas, plan.grad_steps)
        for sample in gradient_samples(tuned, states, batch.noise, plan):
            rewards.append(redness(decode_video(trainer.pipe.vae, sample.latents), batch.prompts).mean())
            loss = loss + (rewards[-1] if sample.penalty else -rewards[-1]) / 2
    state = sample_euler(base if args.anchor_steps else tuned, batch.noise("train"), sigmas[: i + 1])[-1]
    drift = drift_step_weights(sigmas).sum() * velocity_distance(tuned, base, state, sigmas[i]).mean()
    (loss + (args.drift_weight or 1.0) * drift).backward()
    masters.collect_grad()
    expected = masters.vector.grad.clone()
    masters.vector.grad.zero_()

    monkeypatch.setattr(trainer.optimizer, "step", lambda: found.append(masters.vector.grad.clone()))
    shared = []
    monkeypatch.setattr(trainer.layout, "average_grad", lambda latents: shared.append(True) or latents)
    row = trainer.step(1)
    assert len(shared) == 2 * len(rewards), "processes that hold a copy agree on the gradients of video and latents"
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    assert trainer.optimizer.param_groups[0]["lr"] == row["learning_rate"] == 0.5 * args.learning_rate
    assert row["drift"] == pytest.approx(drift.item(), rel=1e-5)
    assert not rewards or row["reward"] == pytest.approx(rewards[0].item(), rel=1e-5)


def test_relative_words_weigh_the_reward_as_the_settings_say(make_args):
    args = make_args(max_steps=1, method_kwargs={"relative_words": ["good", "bad"], "relative_strength": 2.0})
    train(args)  # a reward that reads no prompt: (1 + k) R - R
    (row,) = read_metrics(Path(args.output_dir))
    assert row["reward"] == pytest.approx(2 * row["rewards/redness"], rel=1e-5)


def test_only_the_frames_that_rewards_ask_for_are_decoded(make_args, monkeypatch):
    decoded = []

    def record(*args):
        video = decode_video(*args)
        decoded.append(video.shape[2])
        return video

    def first(video, prompts, **info):
        assert video.shape[2] == 1
        return video.mean((1, 2, 3, 4))

    def three(video, prompts, **info):
        assert video.shape[2] == 3
        return video.mean((1, 2, 3, 4))

    first.frames, three.frames = "first", 3
    monkeypatch.setattr("rlhf.method.decode.decode_video", record)
    train(make_args(max_steps=2), first)
    assert decoded == [1, 1]
    train(make_args(max_steps=1, overwrite_output_dir=True), [first, three])
    assert decoded[2:] == [3]


def test_accumulated_batches_equal_one_large_batch(make_args, tmp_path):
    runs = []
    for size in (4, 1):
        batches = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        runs.append(make_args(output_dir=str(tmp_path / str(size)), **batches))
        train(runs[-1])
    assert_same_training(*runs)


def test_no_two_samples_of_a_run_share_their_noise(make_args, monkeypatch):
    noises = []
    monkeypatch.setattr("rlhf.trainer.rollout", lambda *args: noises.extend(args[2]) or rollout(*args))
    train(make_args(max_steps=2, gradient_accumulation_steps=2))
    assert len(noises) == 8
    assert all(not torch.allclose(a, b) for i, a in enumerate(noises) for b in noises[:i])


def test_every_prompt_comes_once_an_epoch(make_args):
    args = make_args(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer = RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS)
    batches = [trainer.batches.batch(step, micro) for step in range(3) for micro in range(2)]
    prompts = [prompt for batch in batches for prompt in batch.prompts]
    assert sorted(prompts[:6]) == sorted(prompts[6:]) == sorted(PROMPTS), "an epoch is every prompt once"


def test_a_bfloat16_base_trains_float32_masters(make_args):
    pipe = tiny_pipeline()
    pipe.transformer.to(torch.bfloat16)
    args = make_args()
    train(args, pipe=pipe)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}
    saved = torch.cat([t.flatten() for t in saved_adapter(args).values()])
    assert saved.dtype == torch.float32
    assert not torch.equal(saved, saved.bfloat16().float())


def test_another_peft_config_and_a_model_by_path_which_go_on(make_args, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    args = make_args(max_steps=1)
    config = LoraConfig(r=2, target_modules=["ff.net.2"])
    RewardGradientTrainer(tmp_path / "model", redness, args, PROMPTS, peft_config=config).train()
    assert {name.split(".ff.")[1] for name in saved_adapter(args)} == {"net.2.lora_A.weight", "net.2.lora_B.weight"}
    told = yaml.safe_load((Path(args.output_dir) / "config.yaml").read_text())
    assert told["model"] == str(tmp_path / "model")
    assert (told["lora_rank"], told["lora_alpha"], told["lora_target_modules"]) == (2, 8, ["ff.net.2"])
    on = make_args(max_steps=2, resume_from_checkpoint="latest")
    scale, shape = (
        "peft_config: got .*, expected .* as the run had",
        "peft_config: .*: got a tensor of shape .*expected",
    )
    for other, told in (  # of which no setting tells
        ({"alpha_pattern": {"ff.net.2": 3}}, scale),
        ({"use_rslora": True}, scale),
        ({"rank_pattern": {"ff.net.2": 3}}, shape),
        ({"use_dora": True}, shape),
    ):
        wrong = dataclasses.replace(config, **other)
        with pytest.raises(ConfigError, match=told):
            RewardGradientTrainer(tmp_path / "model", redness, on, PROMPTS, peft_config=wrong)
    trainer = RewardGradientTrainer(tmp_path / "model", redness, on, PROMPTS, peft_config=config)
    assert trainer.train()["steps"] == 2


def test_what_was_handed_over_is_in_the_folder_and_named_in_the_settings(make_args, tmp_path):
    held_out = ["a red circle", "a blue\nstar", "left out"]
    args = make_args(max_steps=1, num_eval_prompts=2)
    RewardGradientTrainer(tiny_pipeline(), redness, args, PROMPTS, held_out).train()
    path = Path(args.output_dir) / "config.yaml"
    again = parse_config(["--config", str(path), "--output_dir", str(tmp_path / "again")])
    assert load_prompts(again.prompts, again.base_dir, 1) == PROMPTS
    assert load_prompts(again.eval_prompts, again.base_dir, 1) == held_out[:2]


def test_rows_reach_rewards_and_judges_of_a_run_and_of_the_run_that_resumes_it(make_args, tmp_path, capsys):
    seen = {}

    def rows_seen(video, prompts, rows, step):  # without **info
        assert prompts == [row["prompt"] for row in rows]
        seen.setdefault(step, []).extend((row["prompt"], row["n"], row.get("other")) for row in rows)
        return redness(video, prompts)

    data = [
        {"prompt": prompt, "n": [i], "negative_prompt": prompt[::-1], "typo": 0} for i, prompt in enumerate(PROMPTS)
    ]
    runs = {}
    for name, steps in (("whole", [3]), ("parts", [1, 3])):
        for last in steps:
            args = make_args(output_dir=str(tmp_path / name), max_steps=last, save_steps=1, num_eval_prompts=2)
            if last > steps[0]:
                again = ["--config", str(tmp_path / name / "config.yaml"), "--resume_from_checkpoint", "latest"]
                args, given = parse_config([*again, "--max_steps", "3"]), ()
            else:
                given = data, data[3:]
            seen.clear() if last == steps[0] else None
            RewardGradientTrainer(tiny_pipeline(), rows_seen, args, *given).train()
        runs[name] = {step: rows for step, rows in seen.items() if step}
        told = capsys.readouterr().out
        assert told.count("Fields of the prompts' rows that nothing has read: typo.") == 1, told
        assert " held-out prompts are trained on, too" in told, "the last of them are"
        assert set(runs[name]) == {1, 2}
    assert runs["whole"] == runs["parts"]
    assert_same_training(*(make_args(output_dir=str(tmp_path / name)) for name in runs))


def test_a_pipe_with_an_adapter_is_refused_and_trains_on_when_that_is_merged(make_args, tmp_path):
    """Two adapters would be evaluated as one, and the base without either."""
    pipe, args = tiny_pipeline(), make_args(max_steps=1, output_dir=str(tmp_path / "first"))
    first = train(args, pipe=pipe, evaluate=True)
    with pytest.raises(ConfigError, match=r"model: got a pipeline with an adapter already, 'default', expected none"):
        train(make_args(), pipe=pipe)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    second = train(make_args(max_steps=1), pipe=pipe, evaluate=True)
    assert second["trained"]["redness"]["base"] == pytest.approx(first["trained"]["redness"]["tuned"], rel=1e-4)
    assert second["trained"]["redness"]["diff"] != 0


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"args": {"max_steps": 1}}, r"args: got a dict, expected a RewardGradientConfig; rlhf.config has it"),
        ({"model": object()}, r"model: got a object, expected a name, a path or a pipeline"),
        ({"reward_funcs": [redness, RewardGradientTrainer]}, r"got the class .*Trainer, expected an object; pass"),
        ({"reward_funcs": {"red": redness}}, r"got a dict, expected a list; give each object a `name`"),
        ({"peft_config": {"r": 4}}, r"peft_config: got a dict, expected a LoraConfig, whose files diffusers reads"),
        ({"peft_config": LoHaConfig(target_modules=["to_q"])}, r"peft_config: got a LoHaConfig, expected a LoraConfig"),
        (
            {"peft_config": LoraConfig(target_modules=["to_q"], modules_to_save=["proj_out"])},
            r"got modules_to_save=.*expected its default: a run trains LoRA alone",
        ),
        ({"peft_config": LoraConfig(target_modules=["to_q"], init_lora_weights="pissa")}, r"'pissa', expected one"),
        ({"peft_config": LoraConfig(target_modules=["to_q"], bias="all")}, r"got bias='all', expected its default"),
        ({"peft_config": LoraConfig(target_modules=["to_q"], lora_bias=True)}, r"got lora_bias=True, expected its def"),
        (
            {"peft_config": LoraConfig(r=2, target_modules=["to_q"], lora_dropout=0.1)},
            r"got lora_dropout=0.1, expected 0",
        ),
        ({"peft_config": LoraConfig(r=4)}, r"peft_config: got no target_modules, expected names of layers; .*'to_q'"),
    ],
)
def test_objects_that_are_none_of_ours_are_told(make_args, wrong, told):
    right = {"model": "nano", "reward_funcs": redness, "args": make_args(), "train_dataset": PROMPTS}
    with pytest.raises(ConfigError, match=told):
        RewardGradientTrainer(**right | wrong)


def test_settings_that_a_dora_does_not_work_with_are_told_at_once(make_args):
    args = make_args(weight_decay=0.1, initial_adapter="x")
    told = "weight_decay: got 0.1 .* expected 0.*\n.*expected plain LoRA"
    dora = LoraConfig(target_modules=["to_q"], use_dora=True)
    with pytest.raises(ConfigError, match=told):
        RewardGradientTrainer("nano", redness, args, PROMPTS, peft_config=dora)
