"""Each shipped recipe says what it is, what was measured and how to start it, and can be run."""

import functools
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from scripts import script

from rlhf.checks import check_config
from rlhf.config import RewardGradientConfig, field_names
from rlhf.config.parse import parse_config
from rlhf.planner.text import plan_report
from rlhf.prompts import find_prompt_file

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))
FOR_8B = [path for path in RECIPES if path.stem.startswith("contentv_8b_")]
# Settings that neither tokens nor memory depend on.
UNSIZED = ("gradient_accumulation_steps", "output_dir", "base_dir")
SMALL_WAN, LARGE_WAN = ("1,418,996,800", 24), ("14,288,491,584", 80)  # parameters, and GiB of the card
OF_WAN = {f"wan21_t2v_1_3b{end}": SMALL_WAN for end in ("", "_mixed")}
OF_WAN |= {f"wan21_t2v_14b{end}": LARGE_WAN for end in ("", "_mixed")}
FULL_SIZE = FOR_8B + [path for path in RECIPES if path.stem in OF_WAN]
named = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
named_full_size = pytest.mark.parametrize("path", FULL_SIZE, ids=lambda path: path.stem)


@pytest.fixture
def recipes():
    return script("bench/recipes.py")


def head(path: Path) -> str:
    return path.read_text().split("\nmodel:")[0]


def launched(path: Path) -> list[str]:
    """Return the words of the command in the head of a recipe."""
    (line,) = re.findall(r"^#   (accelerate launch .*)$", head(path), re.MULTILINE)
    return shlex.split(line)


@named
def test_keys_are_known_and_prompt_files_exist(path):
    settings = yaml.safe_load(path.read_text())
    assert set(settings) <= set(field_names())
    for name in (settings["prompts"], settings["eval_prompts"]):
        assert name.startswith("nano_") or find_prompt_file(name, path.parent)


@named
def test_the_head_says_what_was_measured(path):
    (told,) = re.findall(r"^# Measured: (.*)$", head(path), re.MULTILINE)
    assert told == "not measured." or re.search(r"\d+ s .*\d+\.\d Gi?B .*on ", told)


@named_full_size
def test_the_head_says_how_it_is_started(path):
    words = launched(path)
    assert words[-2:] == ["--config", f"configs/{path.name}"]
    if "--config_file" in words:
        assert (ROOT / words[words.index("--config_file") + 1]).is_file()
    assert path.stem == Path(yaml.safe_load(path.read_text())["output_dir"]).name


@named_full_size
def test_eight_videos_a_step_whatever_the_number_of_devices(path):
    settings, words = yaml.safe_load(path.read_text()), launched(path)
    devices = 1
    if "--num_processes" in words:
        devices = int(words[words.index("--num_processes") + 1])
        assert f"_{devices}_devices" in path.stem
    elif "--config_file" in words:
        devices = yaml.safe_load((ROOT / words[words.index("--config_file") + 1]).read_text())["num_processes"]
    videos = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    assert videos * devices == 8


def test_recipes_for_several_devices_differ_only_in_their_number():
    settings = [yaml.safe_load(path.read_text()) for path in FOR_8B if path.stem.endswith("_devices")]
    assert len(settings) == 3
    for key in set().union(*settings) - {"output_dir", "gradient_accumulation_steps"}:
        assert len({str(one.get(key)) for one in settings}) == 1, key


@functools.cache
def needs(settings: str, device: str | None) -> str:
    """What the dry run prints."""
    return plan_report(RewardGradientConfig(**json.loads(settings)), device_name=device)


def resolved(path: Path, tmp_path: Path) -> RewardGradientConfig:
    args = parse_config(["--config", str(path), "--output_dir", str(tmp_path / "run")])
    return check_config(args, planned_processes=1)


@named_full_size
def test_settings_pass_every_check_without_weights_or_network(path, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the network"))
    args = resolved(path, tmp_path)
    assert (args.learning_rate, args.lora_rank, args.num_eval_prompts > 0) == (1e-5, 32, True)
    assert not (tmp_path / "run").exists()


def guide_row(path: Path) -> str:
    """Return the row of docs/wan.md about a recipe."""
    (row,) = re.findall(rf"^\| `{path.name}` .*$", (ROOT / "docs" / "wan.md").read_text(), re.MULTILINE)
    return row


@pytest.mark.slow  # CI runs it
@named_full_size
def test_the_dry_run_passes(path, tmp_path):
    settings = {key: value for key, value in vars(resolved(path, tmp_path)).items() if key not in UNSIZED}
    parameters, card = OF_WAN.get(path.stem, ("8,056,627,520", None))
    text = needs(json.dumps(settings, sort_keys=True), "NVIDIA H200" if card else None)
    assert f"{parameters} parameters" in text
    gib = lambda before: float(re.search(rf"{re.escape(before)}\s+([\d.]+) GiB", text)[1])
    peak, host = gib("(the highest)"), gib("Host memory:")
    if card:
        assert peak < card
        assert f"| {card} GiB | {peak:.1f} GiB | {host:.0f} GiB |" in guide_row(path)


def test_heads_and_guide_are_filled_from_what_was_measured(recipes, tmp_path):
    row = {"arm": "24 GiB", "frames": 33, "scored": 33, "phase": "step", "steps": 25, "seconds": 61.4, "peak_gib": 9.04}
    result = {"environment": {"device": "NVIDIA X"}, "rows": [row]}
    (tmp_path / "step.json").write_text(json.dumps(result))
    guide = tmp_path / "guide.md"
    guide.write_text("before\n<!-- costs -->\nold\n<!-- end of costs -->\nafter")
    for name in ("24gib", "hps"):
        path = tmp_path / f"contentv_8b_{name}.yaml"
        path.write_text((ROOT / "configs" / path.name).read_text())
    recipes.main(tmp_path, tmp_path / "step.json", guide)
    told = (tmp_path / "contentv_8b_24gib.yaml").read_text()
    assert "# Measured: 61 s a video and 9.0 GiB on one NVIDIA X, random weights, HPS v2.1.\n" in told
    assert "# Measured: not measured.\n" in (tmp_path / "contentv_8b_hps.yaml").read_text()
    assert "| 33 frames, all scored, on 24 GiB (`contentv_8b_24gib.yaml`) | 61 | 9 | 68 |" in guide.read_text()
    assert guide.read_text().startswith("before\n<!-- costs -->\nOne NVIDIA X")
    for changed in ({"seconds": None}, {"scored": 1}, {"steps": 50}, {"phase": "window"}):
        other = {key: value for key, value in (row | changed).items() if value is not None}
        assert recipes.measured("contentv_8b_24gib", result | {"rows": [other]}) == "not measured."


def test_a_step_is_worked_out_of_its_parts(recipes):
    common = {"arm": "exact", "frames": 125, "scored": 125}
    rows = [common | {"phase": "sampling", "seconds": 2.0, "peak_gib": 5.0}]
    rows.append(common | {"phase": "window", "seconds": 10.0, "peak_gib": 7.0})
    assert recipes.cost({"rows": rows}, "exact", 125, 125, 25) == (58.0, 7.0, " (from its parts)")
    assert recipes.cost({"rows": rows[:1]}, "exact", 125, 125, 25) is None
    assert (recipes.costs_table({}), recipes.layouts_told({})) == ("Not measured yet.\n", "")


def test_a_step_that_serves_several_gradients_is_told_by_one_of_them(recipes):
    arm, *sizes = recipes.ARMS["contentv_8b_fast"]
    row = {"arm": arm, "frames": 33, "scored": 1, "phase": "step", "seconds": 8.5, "peak_gib": 80.06}
    result = {"environment": {"device": "NVIDIA X"}, "rows": [row | {"steps": 25, "seconds_per_gradient": 2.125}]}
    told = recipes.measured("contentv_8b_fast", result)
    assert told == "2.1 s a video and 80.1 GiB on one NVIDIA X, random weights, HPS v2.1."


def test_heads_and_guide_say_what_the_results_say(recipes):
    found = recipes.read(recipes.RESULT)
    for path in FOR_8B:
        line = f"# Measured: {recipes.measured(path.stem, found)}\n"
        assert line in path.read_text(), "run `python bench/recipes.py`"
    told = recipes.costs_table(found) + recipes.layouts_told(recipes.read(recipes.RESULT.with_name("scale.json")))
    assert told in recipes.GUIDE.read_text(), "run `python bench/recipes.py`"


def test_arms_of_the_heads_have_the_recipes_settings(recipes, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from step_arms import SETTINGS

    for name, (arm, frames, scored, steps) in recipes.ARMS.items():
        settings = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
        for key, value in SETTINGS[arm].items():
            if scored > 1 or key not in ("decode_checkpoint", "decode_caches"):
                assert settings.get(key, getattr(RewardGradientConfig(), key)) == value, (name, key)
        assert (settings["num_frames"], settings["num_inference_steps"]) == (frames, steps)
        assert settings["num_grad_steps"] == 1
