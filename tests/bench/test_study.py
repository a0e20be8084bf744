"""The study of methods: settings, equal device time, choice by the sweep, failures."""

import json
import math

import cheaper
import main_job
import methods
import nano_study
import pytest
import study
import study_arms
import study_inputs
import study_runs
import torch
from nano_study import Study
from study_pools import Pools

from rewards.models.latent_reward import HeadFacts, LatentHead, save_head
from rlhf.io import load_yaml


def conditions(tmp_path, **changes):
    return study_runs.Conditions("cpu", tmp_path, 11, **{"eval_prompts": 4, "diversity_videos": 2} | changes)


VARIANTS = [
    study_arms.changed(study_arms.ARMS[arm], one) for arm, found in study_arms.VARIANTS.items() for one in found
]


@pytest.mark.parametrize(
    ("arms", "flags"),
    [
        ([*study_arms.ARMS.values(), *VARIANTS], ()),
        ([*methods.ARMS.values()], ()),
        ([*cheaper.ARMS.values()], cheaper.FLAGS),
        ([study_arms.changed(study_arms.FIRST_STEPS, change) for change, _ in main_job.ARMS.values()], ()),
    ],
)
def test_the_settings_of_every_arm_and_variant_are_accepted(arms, flags, tmp_path, monkeypatch):
    monkeypatch.setattr(study_runs, "ROOT", tmp_path)
    (tmp_path / "configs").symlink_to(study_arms.ROOT / "configs")
    monkeypatch.setenv("CONTENTV_RLHF_CACHE", str(tmp_path / "cache"))
    study_inputs.make_videos(tmp_path / study_arms.VIDEOS)
    monkeypatch.chdir(tmp_path)
    facts = HeadFacts("nano", "", 1, {"nano_preference": 1.0}, 0.0, 1.0, {})
    save_head(tmp_path / study_arms.HEAD, LatentHead(8), facts)
    for settings in {json.dumps(one) for one in arms}:
        run, ddpo = study_runs.split(json.loads(settings))
        args = conditions(tmp_path, flags=flags).args(run, 3, 8)
        assert (args.seed, args.max_steps, args.num_eval_prompts) == (3, 8, 4)
        assert args.num_inference_steps == (12 if flags else 4)
        given = vars(args) | {"anchor_data": args.anchor_data and study_arms.VIDEOS}  # made absolute
        assert all(given[name] == value for name, value in run.items())
        assert ddpo is None or args.method == "draft_k"


def test_the_shipped_recipe_is_an_arm_of_the_sweep():
    given = load_yaml((study_arms.CONFIGS / "nano.yaml").read_text())
    change, steps = main_job.ARMS[main_job.SHIPPED]
    expected = study_arms.changed(study_arms.FIRST_STEPS, change) | {"max_steps": steps}
    assert {name: given[name] for name in expected} == expected
    assert "drift_weight" not in given


def test_the_sweep_chooses_by_the_trained_reward_alone(tmp_path):
    def row(arm, rate, seed, trained, verifier, **more):
        gains = {"trained": {"diff": trained}, "verifier": {"diff": verifier}}
        variant = {"learning_rate": rate}
        about = {"arm": arm, "seed": seed, "variant": variant, "settings": study_arms.ARMS[arm] | variant}
        return about | gains | more

    rows = [row("DDPO", 1e-3, 0, 0.1, 0.9), row("DDPO", 1e-3, 1, 0.2, 0.9)]
    rows += [row("DDPO", 3e-3, 0, 0.3, 0.1), row("DDPO", 3e-3, 1, 0.2, 0.1)]
    rows += [row("DDPO", 1e-2, 0, 9.0, 0.9), row("DDPO", 1e-2, 1, 9.0, 0.9, error="ValueError")]  # one seed less
    rows += [row("DDPO", 1e-4, seed, 9.0, 0.9, settings={"group_size": 1}) for seed in (0, 1)]  # another DDPO
    paths = [tmp_path / "sweep.json", tmp_path / "later.json", tmp_path / "absent.json"]
    paths[0].write_text(json.dumps({"rows": rows}))
    chosen = study_arms.chosen_by_sweeps(paths)
    assert chosen == {"DDPO": {"learning_rate": 3e-3}}
    assert study_arms.settings_of("DDPO" + study_arms.CONTROL, chosen)["learning_rate"] == 3e-3
    assert study_arms.settings_of("DDPO" + study_arms.CONTROL, chosen)["method_kwargs"] == {"kl_weight": 0.04}
    paths[1].write_text(json.dumps({"rows": [row("DDPO", 1e-3, 0, 0.01, 0.0), row("NFT", 1e-3, 0, 0.1, 0.0)]}))
    chosen = study_arms.chosen_by_sweeps(paths)
    assert chosen == {"DDPO": {"learning_rate": 1e-3}, "NFT": {"learning_rate": 1e-3}}


def test_options_of_a_method_are_changed_one_by_one():
    settings = study_arms.settings_of("Flow-GRPO + drift control", {"Flow-GRPO": {"method_kwargs": {"noise": "sde"}}})
    assert settings["method_kwargs"] == {"group_size": 8, "kl_weight": 0.04, "noise": "sde"}
    real = study_arms.settings_of("DRaFT-K + real videos", {"DRaFT-K": {"learning_rate": 3e-3}})
    assert real["learning_rate"] == 3e-3
    assert real["method_kwargs"]["anchor_data_steps"] == 1


@pytest.fixture
def fake_runs(monkeypatch, tmp_path):
    """Steps of known cost, and runs that take no time; DRTune fails, ReFL can't be timed."""
    calls = {"trained": [], "timed": 0, "broken": True, "machine": 1.0, "base": 0.5}
    gain = {"base": 0.5, "tuned": 0.6, "diff": 0.1}
    judged = dict.fromkeys(("trained", "verifier", "clip", "motion", "diversity"), gain)

    def seconds(settings, timed, conditions):
        if settings.get("method") == "refl":
            raise RuntimeError("no")
        calls["timed"] += 1
        slow = calls["timed"] == 1  # the first time is
        return (2.0 if settings.get("num_grad_steps") == 4 else 0.5) * calls["machine"] + slow

    def train(settings, seed, steps, conditions):
        if settings.get("method") == "drtune" and calls["broken"]:
            raise ValueError("too large")
        calls["trained"].append((settings.get("method"), seed, steps))
        curve = {"curve": [{"steps": steps // 2}, {"steps": steps}]} if conditions.curve else {}
        return [judged | {"queries": 16 * steps} | curve]

    def best_of_n(seed, count, report_at, cost, conditions):
        return [judged | {"arm": f"best-of-{n}", "settings": {"n": n}, "steps": 0, "queries": n} for n in (4, "n")]

    monkeypatch.setattr(study_runs, "evaluate_base", lambda conditions: {"nano_preference": calls["base"]})
    monkeypatch.setattr(study_runs, "seconds_per_step", seconds)
    monkeypatch.setattr(study_runs, "seconds_per_sample", lambda timed, conditions: 0.25)
    monkeypatch.setattr(study_runs, "train", train)
    monkeypatch.setattr(study_runs, "best_of_n", best_of_n)
    return calls


def run_study(tmp_path, arms, steps=10, file="study.json", curve=(), **limits):
    default, made_under = study_arms.settings_of(study_arms.DEFAULT, {}), conditions(tmp_path, curve=curve)
    made = Study(tmp_path / file, made_under, steps, 3, Pools(), default, **limits)
    made.run(study.train_tasks(made, arms, [0, 1], {}))
    return json.loads((tmp_path / file).read_text())


def test_arms_get_the_same_time_and_failures_are_told_and_made_again(fake_runs, tmp_path):
    arms = ["DRaFT-K", "DRaFT-1", "DRTune", "ReFL", "best-of-n"]
    result = run_study(tmp_path, arms)
    rows = {(row["arm"], row["seed"]): row for row in result["rows"]}
    assert result["environment"]["budget_seconds"] == 20
    assert {rows[arm, 1]["steps"] for arm in ("DRaFT-K", "DRaFT-1")} == {10, 40}
    assert {rows[arm, 1]["device_seconds"] for arm in ("DRaFT-K", "DRaFT-1")} == {20.0}
    assert rows["best-of-n", 0]["settings"] == {"n": "n"}
    assert rows["DRTune", 0]["error"] == "ValueError: too large"
    assert "could not be timed" in rows["ReFL", 0]["error"]
    fake_runs["trained"].clear()
    fake_runs["broken"] = False
    again = run_study(tmp_path, [*arms[:3]])
    assert again["environment"]["wall_seconds"] > result["environment"]["wall_seconds"] > 0
    assert fake_runs["trained"] == [("drtune", 0, 10), ("drtune", 1, 10)]
    assert not any("error" in row for row in again["rows"] if row["arm"] == "DRTune")
    assert len(again["rows"]) == len(result["rows"])


def test_settings_with_the_same_time_a_step_have_one_key():
    plain, scaled = ({"method": "adjoint_matching"} | more for more in ({}, {"method_kwargs": {"reward_scale": 3.0}}))
    assert study_arms.cost_key(plain) == study_arms.cost_key(scaled)
    assert study_arms.cost_key(plain) == study_arms.cost_key(plain | {"lr_scheduler_type": "cosine"})
    assert study_arms.cost_key(plain) != study_arms.cost_key({"method_kwargs": {"adjoint_steps": 2}} | plain)
    of_drift = [study_arms.cost_key(plain | study_arms.options(negative_drift_weight=w)) for w in (0.0, 0.5, 2.0)]
    assert of_drift[0] != of_drift[1] == of_drift[2], "any weight takes the same time, none takes less"


def test_other_conditions_do_not_go_into_the_same_file(fake_runs, tmp_path):
    run_study(tmp_path, ["DRaFT-K"])
    with pytest.raises(SystemExit, match="made with other steps"):
        run_study(tmp_path, ["DRaFT-K"], steps=11)
    fake_runs["base"] = 0.6
    with pytest.raises(SystemExit, match="rows are of other judges"):
        run_study(tmp_path, ["DRaFT-1"])
    path = tmp_path / "study.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"environment": {"device": "another"}}))
    with pytest.raises(SystemExit, match="made with other .*device another"):
        run_study(tmp_path, ["DRaFT-K"])


def test_times_of_another_machine_are_scaled_to_those_of_the_first(fake_runs, tmp_path):
    first = run_study(tmp_path, ["DRaFT-K"])["environment"]
    fake_runs["machine"] = 3.0  # times slower
    result = run_study(tmp_path, ["DRaFT-K", "DRaFT-1"])
    assert result["environment"]["budget_seconds"] == first["budget_seconds"] == 20
    assert {row["steps"] for row in result["rows"] if row["arm"] == "DRaFT-1"} == {40}
    (later,) = result["environment"]["timed_later"]
    assert later["scale"] == pytest.approx(1 / 3)
    timed = fake_runs["timed"]
    longer = run_study(tmp_path, ["DRaFT-1"], 100, "long.json", costs_of=tmp_path / "study.json")
    assert fake_runs["timed"] == timed
    assert longer["environment"]["budget_seconds"] == 200


def test_no_run_begins_that_would_not_end_within_the_limit(fake_runs, tmp_path):
    fake_runs["broken"] = False
    run_study(tmp_path, ["DRaFT-K"])  # timed
    needed = nano_study.START_SECONDS + 20
    assert len(run_study(tmp_path, ["DRaFT-1"], limit=needed - 1)["rows"]) == 2
    result = run_study(tmp_path, ["DRaFT-1"], limit=needed + 5)
    assert [(row["arm"], row["seed"]) for row in result["rows"][2:]] == [("DRaFT-1", 0), ("DRaFT-1", 1)]


def test_points_along_the_way_have_their_share_of_the_seconds(fake_runs, tmp_path):
    (row, _) = run_study(tmp_path, ["DRaFT-1"], curve=(0.5,))["rows"]
    assert [(point["steps"], point["device_seconds"]) for point in row["curve"]] == [(20, 10.0), (40, 20.0)]


@pytest.mark.slow  # CI runs it
def test_one_run_of_each_kind(tmp_path):
    """Nano itself, small and for two steps: what a row holds, and how often the reward is asked."""
    flags = ("--height", "32", "--width", "32", "--num_frames", "5", "--per_device_train_batch_size", "4")
    small = conditions(tmp_path, eval_batch=4, threads=1, flags=flags, curve=(0.5,))
    assert study_runs.evaluate_base(small)["nano_verifier"] >= 0
    queries = {}
    for arm in ("DRaFT-LV", "DDPO" + study_arms.CONTROL):
        (row,) = study_runs.train(study_arms.settings_of(arm, {}) | {"learning_rate": 1e-2}, 0, 2, small)
        queries[arm] = row["queries"]
        assert row["trained"]["diff"] != 0
        assert math.isfinite(row["verifier"]["tuned"])
        assert {"clip", "motion", "diversity"} <= set(row)
        assert [point["steps"] for point in row["curve"]] == [1, 2]
        for name in ("trained", "verifier", "clip", "diversity"):
            assert row["curve"][-1][name] == pytest.approx(row[name]["tuned"])
        assert row["hacking_gap"] == pytest.approx(row["gain_trained"] - row["gain_held_out"])
    assert [*queries.values()] == [2 * 4 * 3, 2 * 4]  # DRaFT-LV scores its rollout and two draws
    rows = study_runs.best_of_n(0, 3, [1, 8], 0.5, small)
    assert [(row["arm"], row["device_seconds"]) for row in rows] == [("best-of-1", 2.0), ("best-of-n", 6.0)]
    assert rows[1]["trained"]["tuned"] > rows[0]["trained"]["tuned"]  # chosen by it
    assert study_runs.seconds_per_step(study_arms.settings_of("DRaFT-1", {}), 1, small) > 0
    ((prompts, made),) = study_runs.several(study_runs.start_base(0, small), 3, 4)
    pairs = [study_runs.distance(made[i], made[k]) for i, k in ((0, 1), (0, 2), (1, 2))]
    torch.testing.assert_close(study_runs.pair_distance(made), sum(pairs) / 3)
    assert len(prompts) == len(made[0]) == 4


def test_a_run_that_diverged_is_an_error(tmp_path, monkeypatch):
    base = study_runs.Evaluation(["a"], {"nano_clip": torch.ones(1)}, torch.zeros(0))
    monkeypatch.setattr(study_runs.Evaluation, "load", lambda path: base)
    with pytest.raises(ValueError, match="nano_clip not finite"):
        study_runs.judged({"nano_clip": torch.tensor([math.nan])}, conditions(tmp_path))
