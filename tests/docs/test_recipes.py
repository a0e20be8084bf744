"""Each shipped recipe says what it is, what was measured and how to start it, and can be run."""

import functools
import json
import re
import shlex
import subprocess
import sys
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
    assert told.startswith(("not measured.", "not run: it needs ")) or re.search(r"\d+ s .*\d+\.\d Gi?B .*on ", told)


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


ROW = {"recipe": "contentv_8b_24gib", "devices": 1, "limit_gib": 22.5, "host_limit_gb": 0.0, "seconds_a_video": 19.84}
ROW |= {"device_gib": 16.9, "driver_gib": 18.02, "host_gib": 27.1, "host_predicted_gib": 29.4, "start_seconds": 44.4}


def test_heads_and_pages_are_filled_from_what_was_measured(recipes, tmp_path):
    row = {"arm": "24 GiB", "frames": 33, "scored": 33, "phase": "step", "steps": 25, "seconds": 61.4, "peak_gib": 9.04}
    about = {"environment": {"device": "NVIDIA X"}}
    (tmp_path / "step.json").write_text(json.dumps(about | {"rows": [row]}))
    (tmp_path / "recipes.json").write_text(json.dumps(about | {"rows": [ROW]}))
    again = {name: value for name, value in ROW.items() if not name.startswith("host_")} | {"seconds_a_video": 20.12}
    (tmp_path / "recipes_again.json").write_text(json.dumps(about | {"rows": [again | {"host_limit_gb": 0.0}]}))
    pages = [tmp_path / f"{mark}.md" for mark in ("costs", "runs")]
    for page in pages:
        page.write_text(f"before\n<!-- {page.stem} -->\nold\n<!-- end of {page.stem} -->\nafter")
    for name in ("24gib", "hps", "8_devices"):
        path = tmp_path / f"contentv_8b_{name}.yaml"
        path.write_text((ROOT / "configs" / path.name).read_text())
    recipes.write_costs(tmp_path, tmp_path / "step.json", *pages)
    told = (tmp_path / "contentv_8b_24gib.yaml").read_text()
    assert "# Measured: 19.8 s a video, 16.9 GiB allocated, 18.0 by the driver on one NVIDIA X held to 22.5 " in told
    assert "Host memory 27.1 GiB, 29.4 predicted; start-up 44 s.\n" in told
    assert (tmp_path / "contentv_8b_hps.yaml").read_text() == (ROOT / "configs" / "contentv_8b_hps.yaml").read_text()
    assert "# Measured: not run: it needs 8 devices.\n" in (tmp_path / "contentv_8b_8_devices.yaml").read_text()
    costs, runs = (page.read_text() for page in pages)
    assert "| 33 frames, all scored, on 24 GiB (`contentv_8b_24gib.yaml`) | 61 | 9 | 68 |" in costs
    assert "| `contentv_8b_24gib.yaml` held to 22.5 GiB of the device | 19.8 | 16.9 | 18.0 | 27.1 | 29.4 | 44 |" in runs
    assert re.search(r"\nNot run: .*`contentv_8b_npu.yaml`.*\.\n<!-- end", runs)
    assert "24gib.yaml` held to 22.5 GiB of the device, again | 20.1 | 16.9 | 18.0 | - | - | 44 |" in runs
    assert recipes.recipes_table({}, {}) == "No recipe was run as a whole yet.\n"
    assert costs.startswith("before\n<!-- costs -->\nOne NVIDIA X")
    assert runs.endswith("<!-- end of runs -->\nafter")
    for changed in ({"seconds": None}, {"scored": 1}, {"steps": 50}, {"phase": "window"}):
        other = {key: value for key, value in (row | changed).items() if value is not None}
        assert recipes.cost({"rows": [other]}, "24 GiB", 33, 33, 25) is None


def test_a_step_is_worked_out_of_its_parts(recipes):
    common = {"arm": "exact", "frames": 125, "scored": 125}
    rows = [common | {"phase": "sampling", "seconds": 2.0, "peak_gib": 5.0}]
    rows.append(common | {"phase": "window", "seconds": 10.0, "peak_gib": 7.0})
    assert recipes.cost({"rows": rows}, "exact", 125, 125, 25) == (58.0, 7.0, " (from its parts)")
    assert recipes.cost({"rows": rows[:1]}, "exact", 125, 125, 25) is None
    assert (recipes.costs_table({}), recipes.layouts_told({})) == ("Not measured yet.\n", "")


def test_a_step_that_serves_several_gradients_is_told_by_one_of_them(recipes):
    row = {"arm": "fast", "frames": 33, "scored": 1, "phase": "step", "seconds": 8.5, "peak_gib": 80.06}
    found = recipes.cost({"rows": [row | {"steps": 25, "seconds_per_gradient": 2.125}]}, "fast", 33, 1, 25)
    assert found == (2.125, 80.06, "")


def test_heads_and_pages_say_what_the_results_say(recipes):
    costs, runs = recipes.read(recipes.RESULT), recipes.read(recipes.ROWS)
    for row in {row["recipe"]: row for row in runs.get("rows", [])}.values():
        line = f"# Measured: {recipes.told(row, runs['environment'])}\n"
        assert line in (ROOT / "configs" / f"{row['recipe']}.yaml").read_text(), "run `python bench/recipes.py`"
    told = recipes.costs_table(costs) + recipes.layouts_told(recipes.read(recipes.RESULT.with_name("scale.json")))
    assert told in recipes.GUIDE.read_text(), "run `python bench/recipes.py`"
    runs_told = recipes.recipes_table(runs, recipes.read(recipes.AGAIN))
    assert runs_told in recipes.PAGE.read_text(), "run `python bench/recipes.py`"


def test_a_measured_run_is_the_recipe_but_for_what_its_row_names(recipes, tmp_path):
    args = recipes.parse_measure_args(["--folder", str(tmp_path)])
    settings = {path.stem: yaml.safe_load(path.read_text()) for path in FULL_SIZE}
    assert set(args.recipes) == set(settings)
    changed = {name: recipes.changed_settings(recipe, args) for name, recipe in settings.items()}
    assert changed["contentv_8b_24gib"] == recipes.SHORT_RUN | {"max_steps": 3}
    assert changed["contentv_8b_fast"]["max_steps"] == 5, "a first step, and a new rollout in one of four"
    assert changed["contentv_8b_mps"]["eval_size"] == {"num_frames": 33}
    assert changed["contentv_8b_mixed"]["calibrate_rewards"] == 2
    needed = {
        name: recipes.devices_needed(name) for name in ("contentv_8b_npu", "contentv_8b_4_devices", "wan21_t2v_14b")
    }
    assert [*needed.values()] == [8, 4, 1]
    given = recipes.with_random_rewards(settings["wan21_t2v_1_3b_mixed"], tmp_path)
    assert given["reward_funcs"][0] == "hps_v2_1"
    assert given["reward_funcs"][1].startswith("video_align=")
    assert given["reward_kwargs"]["hps_v2_1"]["num_frames"] == "random 4"
    assert given["reward_kwargs"]["video_align"] == {"dimension": "overall", "reward": "video_align"}


def test_stages_have_the_peaks_of_their_own_samples(recipes):
    begins = [{"stage": name, "time": time} for name, time in (("a", 0.0), ("step", 2.0), ("step", 4.0), ("b", 6.0))]
    samples = [
        (time, *(2**30 * n for n in gib)) for time, gib in ((1.0, (1, 5)), (3.0, (2, 3)), (5.0, (4, 4)), (6.5, (1, 1)))
    ]
    found = recipes.by_stage(begins, samples)
    assert [(row["stage"], row["anonymous_gib"], row["total_gib"]) for row in found] == [
        ("a", 1, 5),
        ("step", 4, 4),
        ("b", 1, 1),
    ]
    assert found[1]["seconds"] == 4.0


def test_a_limit_of_host_memory_holds(recipes):
    code = "import numpy; print(int(numpy.ones(600_000_000, 'u1').sum()))"
    for gb, holds in ((0.4, True), (4.0, False)):
        command, held_by = recipes.limit_host([sys.executable, "-c", code], gb)
        run = subprocess.run(command, capture_output=True, text=True)
        assert held_by
        assert (run.returncode != 0) == holds
        assert ("600000000" in run.stdout) != holds
    assert recipes.limit_host(["true"], 0) == (["true"], None)


@pytest.mark.slow
def test_a_tiny_run_is_measured_once(recipes, tmp_path):
    flags = ["--folder", str(tmp_path), "--size", "tiny", "--device", "cpu", "--output", str(tmp_path / "o.json")]
    flags += ["--recipes", "contentv_8b_24gib", "contentv_8b_npu"]
    assert recipes.main(["measure", *flags, "--limit", "1"]) == 0
    assert not (tmp_path / "o.json").exists(), "no run begins that would not end"
    assert recipes.main(["measure", *flags]) == 0
    (row,) = first = json.loads((tmp_path / "o.json").read_text())["rows"]
    assert row["recipe"] == "contentv_8b_24gib"
    assert len(row["seconds_a_step"]) == 3
    assert {"launch and imports", "rewards", "transformer and VAE", "step", "export"} <= {
        s["stage"] for s in row["stages"]
    }
    assert 0.5 < row["host_anonymous_gib"] < row["host_gib"] < 4
    assert recipes.main(["measure", *flags]) == 0
    assert json.loads((tmp_path / "o.json").read_text())["rows"] == first
