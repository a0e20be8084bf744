"""An export's card has the run's numbers, names every licence, and the Hub can read it."""

import ast
import dataclasses
import json
import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from rewards.catalogue import CATALOGUE
from rlhf.config import RewardGradientConfig
from rlhf.evaluation.held_out import Evaluation
from rlhf.evaluation.statistics import summarize
from rlhf.export.model_card import PICTURE, Export, resolve_base, write_card
from rlhf.run.environment import record_start

GAINS = torch.linspace(-1, 2, 12)


@pytest.fixture
def run(tmp_path):
    """A finished run of nano with a reward of the user's own and a built-in judge."""
    folder = tmp_path / "run"
    folder.mkdir()
    args = RewardGradientConfig(
        reward_funcs=["/home/someone/secret/mine.py:redness"],
        eval_reward_funcs=["hps_v2_1"],
        eval_prompts="/home/someone/secret/held_out.txt",
        base_dir="/home/someone/secret",
        output_dir="/home/someone/secret/run",
        reward_kwargs={"hps_v2_1": {"checkpoint": "/home/someone/secret/hps.pt"}},
        method_kwargs={"relative_words": ["good | bad", "bad"]},
        learning_rate=3e-3,
        max_steps=6,
    )
    (folder / "config.yaml").write_text(args.to_yaml())
    record_start(folder, "cpu")
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 6, "reward": 0.5}) + "\n")
    prompts, none = [f"prompt {i}" for i in range(12)], torch.zeros(0)
    names = ("redness", "hps_v2_1", "motion")
    scores = {name: torch.full((12,), 0.25) for name in names} | {"diversity": none}
    tuned = {name: scores[name] + GAINS for name in names} | {"diversity": none}
    base, tuned = Evaluation(prompts, scores, none), Evaluation(prompts, tuned, none)
    base.save(folder / "evaluation" / "base.safetensors")
    tuned.save(folder / "evaluation" / "tuned.safetensors")
    (folder / "summary.json").write_text(json.dumps(summarize(base, tuned, ["redness"], 30.0, 6)))
    Image.new("RGB", (8, 8)).save(folder / "contact_sheet.png")
    (folder / "adapter").mkdir()
    return folder


def card(run, tmp_path, kind="diffusers", **more) -> ModelCard:
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    return ModelCard.load(write_card(Export(run, kind, **more), out))


def rows(text: str) -> dict[str, list[str]]:
    """Cells of all tables by what the first one says."""
    lines = [line.strip("|").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_a_reward_of_weight_0_is_not_called_trained_and_a_named_one_has_its_licence(run, tmp_path):
    path = run / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    settings |= {"reward_funcs": ["mine.py:redness", "logged=clip_score"], "reward_weights": [1.0, 0.0]}
    path.write_text(yaml.safe_dump(settings | {"eval_reward_funcs": ["human=hps_v2_1"]}))
    text = card(run, tmp_path).text
    assert "tuned on redness\n" in text
    table = rows(text)
    assert table["reward `redness`"] == ["not built in: ask its author"]
    assert table["reward `logged`"] == ["MIT, as OpenAI's CLIP code"]
    assert table["reward `human`"] == ["Apache-2.0"]


@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("draft_k", "by reward gradient: the gradient of redness went back through the decoder and the denoiser."),
        ("prfl", "by reward gradient: the gradient of redness went back through the denoiser."),
        ("nft", "by the scores of redness, without their gradient."),
    ],
)
def test_the_card_says_what_trained_the_adapter(run, tmp_path, method, way):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(yaml.safe_dump(yaml.safe_load(text) | {"method": method}))
    assert f"in 6 optimizer steps of contentv-rlhf\n{way}" in card(run, tmp_path).text


def test_the_table_is_that_of_the_run(run, tmp_path):
    text = card(run, tmp_path).text
    summary = json.loads((run / "summary.json").read_text())
    table, gain = rows(text), summary["trained"]["redness"]
    assert table["redness"][:4] == ["trained on", "0.2500", f"{gain['tuned']:.4f}", f"{gain['diff']:+.4f}"]
    low, high = gain["ci95"]
    assert table["redness"][4] == f"[{low:+.4f}, {high:+.4f}]"
    assert table["hps_v2_1"][0] == "held out"
    assert table["motion"][0] == "measured"
    assert "Means over 12 held-out prompts" in text
    assert "in 6 optimizer steps" in text
    assert "30 s on " in text


def test_every_licence_is_named(run, tmp_path):
    loaded = card(run, tmp_path)
    table = rows(loaded.text)
    assert table["base model, nano"] == ["apache-2.0"]
    assert table["reward `redness`"] == ["not built in: ask its author"]
    assert table["reward `hps_v2_1`"] == [CATALOGUE["hps_v2_1"].licence]
    assert loaded.data.license == "apache-2.0"


def test_what_differs_from_the_defaults_is_told_and_nothing_of_the_machine(run, tmp_path):
    text = card(run, tmp_path).content
    table = rows(text)
    assert table["learning_rate"] == ["0.003"]
    assert table["method"] == ["draft_k"]
    assert r"good \| bad" in text
    assert "`held_out.txt` held out" in text
    assert "secret" not in text


@pytest.mark.parametrize(("kind", "relation"), [("merged", "finetune"), ("diffusers", "adapter")])
def test_the_hub_can_read_it(run, tmp_path, kind, relation):
    loaded = card(run, tmp_path, kind, model="ByteDance/ContentV-8B")
    data = loaded.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("ByteDance/ContentV-8B", relation)
    assert (data["pipeline_tag"], data["library_name"]) == ("text-to-video", "contentv-rlhf"), "no snippet of diffusers"
    assert (data["license"], data["license_name"]) == ("other", "stabilityai-ai-community")
    assert ("lora" in data["tags"]) == (kind != "merged")
    assert "base_model" not in card(run, tmp_path, kind).data.to_dict(), "nano is not on the Hub"


def test_the_picture_comes_along(run, tmp_path):
    assert f"]({PICTURE})" in card(run, tmp_path).text
    assert Image.open(tmp_path / "out" / PICTURE).size == (8, 8)


def test_another_scale_is_not_credited_with_the_figures(run, tmp_path):
    assert "scaled by 0.5 here. The results below are those of the run" in card(run, tmp_path, scale=0.5).text
    assert "times here" not in card(run, tmp_path).text


def test_how_to_use_each_kind(run, tmp_path):
    assert "load_lora_weights" not in card(run, tmp_path, "merged").text
    assert "load_lora_weights" in (text := card(run, tmp_path).text)
    assert "`rlhf` is a package of contentv-rlhf" in text
    assert "ComfyUI itself has no\nclass for ContentV's transformer" in card(run, tmp_path, "comfyui").text


@pytest.mark.parametrize("prompt", ["a \U0001f98a in the snow", 'two "lines",\nand a \\ in them', "it's"])
def test_the_prompt_of_the_example_is_the_one_that_was_evaluated(run, tmp_path, prompt):
    for name in ("base", "tuned"):
        path = run / "evaluation" / f"{name}.safetensors"
        dataclasses.replace(Evaluation.load(path), prompts=[prompt] * 12).save(path)
    (text,) = re.findall(r"frames = pipe\((.*), \*\*pipe", card(run, tmp_path).text)
    assert ast.literal_eval(text) == prompt


def test_a_run_that_ended_early_has_a_card(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump({"model": str(tmp_path / "mine"), "seed": 0}))
    loaded = card(run, tmp_path)
    assert "The run has no evaluation before and after" in loaded.text
    assert rows(loaded.text)["base model, mine"] == ["unknown: see the base model's own page"]
    assert str(tmp_path) not in loaded.content


def test_a_base_that_was_exported_keeps_its_licence(run, tmp_path):
    card(run, tmp_path, "merged", model="ByteDance/ContentV-8B")
    again = resolve_base(str(tmp_path / "out"))
    assert again.header["license_name"] == "stabilityai-ai-community"
    assert again.licence == "stabilityai-ai-community, https://stability.ai/community-license-agreement"
