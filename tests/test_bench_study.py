"""The study of methods: baselines proved as numbers, equal device time, choice by the sweep, tables from results."""

import json
import math
import sys
from concurrent.futures import Future

import pytest
import torch
from conftest import PROMPTS, redness
from test_bench_rewards import ROOT
from tiny import tiny_pipeline

sys.path.append(str(ROOT / "bench"))  # where its scripts find each other
import baselines
import study
import study_arms
import study_numbers
import study_report
import study_runs
from baselines import GroupedBatches, Policy, PolicyGradientTrainer, Trajectory

from rlhf.device import generator

SIGMAS = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0], dtype=torch.float64)  # nano's


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------- stochastic sampling


@pytest.mark.parametrize("name", baselines.NOISES)
def test_log_densities_are_those_of_the_normal_distribution(name):
    x, v, fresh = (normal(2, 3, 4, 2, 2, seed=s) for s in range(3))
    mean, std = baselines.NOISES[name](x, v, SIGMAS, 1, 0.7)
    after = mean + std * fresh
    expected = torch.distributions.Normal(mean, std).log_prob(after).flatten(1).mean(1)
    assert torch.allclose(baselines.log_prob(after, mean, std), expected, rtol=1e-12)


def test_an_sde_step_is_the_published_equation():
    x, v = normal(2, 3), normal(2, 3, seed=1)
    for i, denominator in ((0, 0.1), (1, 0.1), (2, 0.25)):  # 1 - sigma; at sigma 1 that of the next level
        t, dt = SIGMAS[i].item(), (SIGMAS[i + 1] - SIGMAS[i]).item()
        s = 0.7 * math.sqrt(t / denominator)
        mean, std = baselines.sde_moments(x, v, SIGMAS, i, 0.7)
        shrunk = x * (1 + s**2 / (2 * t) * dt) + v * (1 + s**2 * (1 - t) / (2 * t)) * dt
        assert torch.allclose(mean, shrunk, rtol=1e-12)
        assert std.item() == pytest.approx(s * math.sqrt(-dt))


def test_a_cps_step_leaves_as_much_noise_as_the_flow_has():
    x0, e = normal(2, 3), normal(2, 3, seed=1)
    t, after = SIGMAS[1], SIGMAS[2]
    mean, std = baselines.cps_moments((1 - t) * x0 + t * e, e - x0, SIGMAS, 1, 0.4)
    assert torch.allclose(mean, (1 - after) * x0 + (after**2 - std**2).sqrt() * e)
    assert 0 < std < after


@pytest.mark.parametrize(("name", "level"), [("sde", 0.5), ("cps", 0.05)])
def test_samples_of_many_stochastic_steps_have_the_datas_distribution(name, level):
    """Data of N(0.5, 0.3^2), whose exact velocity is known: noise must not change what is sampled.

    The noise of "cps" is by step, not by time: of short steps little is the same.
    """
    m, s = 0.5, 0.3

    def velocity(x, t):
        mean_x, var_x = (1 - t) * m, (1 - t) ** 2 * s**2 + t**2
        scaled = (x - mean_x) / var_x
        return (0 + t * scaled) - (m + (1 - t) * s**2 * scaled)  # E[e | x] - E[x0 | x]

    path = baselines.stochastic_rollout(
        velocity,
        lambda purpose: torch.randn(20_000, 1, generator=generator(purpose), dtype=torch.float64),
        torch.linspace(1, 0, 201, dtype=torch.float64),
        Policy(noise=name, noise_level=level),
    )
    assert path.states[-1].mean().item() == pytest.approx(m, abs=0.01)
    assert path.states[-1].std().item() == pytest.approx(s, abs=0.01)
    assert len(path.log_probs) == 199
    assert len(path.states) == 201


# -------------------------------------------------------------------------------------------- policy gradient


def linear(theta):
    """v = a x + b, the same at every level."""
    return lambda x, sigma: theta[0] * x + theta[1]


def expected_reward(theta, last, moments, level) -> float:
    """Of -(x - 1)^2 at the end, exactly: a linear flow keeps states normal. `last` steps without noise."""
    mean, variance = torch.zeros(1, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for i in range(len(SIGMAS) - 2):
        offset, std = moments(mean, linear(theta)(mean, None), SIGMAS, i, level)
        one, _ = moments(mean + 1, linear(theta)(mean + 1, None), SIGMAS, i, level)
        mean, variance = offset, (one - offset) ** 2 * variance + std**2
    step = SIGMAS[-1] - SIGMAS[-2]
    mean, variance = mean + step * linear(last)(mean, None), (1 + step * last[0]) ** 2 * variance
    return (-((mean - 1) ** 2) - variance).item()


@pytest.mark.parametrize("name", baselines.NOISES)
def test_the_policy_gradient_is_that_of_the_expected_reward(name):
    """Against finite differences; the last step, which has no noise, learns nothing and is held fixed in them."""
    policy, theta = Policy(noise=name, noise_level=0.6), torch.tensor([0.3, -0.4], dtype=torch.float64)
    count, trained = 400_000, theta.clone().requires_grad_()

    def noise(purpose):
        half = torch.randn(count // 2, 1, generator=generator(purpose), dtype=torch.float64)
        return torch.cat([half, -half])  # antithetic: half of the error

    path = baselines.stochastic_rollout(linear(theta), noise, SIGMAS, policy)
    scores = -((path.states[-1][:, 0] - 1) ** 2)
    steps = baselines.step_losses(linear(trained), linear(theta), path, scores - scores.mean(), SIGMAS, policy)
    (-len(path.log_probs) * sum(steps)).backward()  # their mean over steps; ascended
    h, expected = 1e-5, []
    for way in torch.eye(2, dtype=torch.float64) * h:
        up, down = (expected_reward(theta + sign * way, theta, baselines.NOISES[name], 0.6) for sign in (1, -1))
        expected.append((up - down) / (2 * h))
    assert trained.grad.tolist() == pytest.approx(expected, rel=0.03)


def test_the_clipped_surrogate_has_the_gradient_of_finite_differences():
    old, advantage = normal(6), normal(6, seed=1)
    new = (old + torch.tensor([0.0, 0.001, -0.001, 0.05, -0.05, 0.3])).requires_grad_()
    loss = lambda at: baselines.clipped_loss(at, old, advantage, 0.02)
    assert torch.autograd.gradcheck(loss, new)
    (gradient,) = torch.autograd.grad(loss(new), new)
    beyond = ((new - old).exp() > 1.02) & (advantage > 0) | ((new - old).exp() < 0.98) & (advantage < 0)
    assert 0 < beyond.sum() < 6
    assert torch.equal(gradient == 0, beyond)
    (at_old,) = torch.autograd.grad(loss(at := old.clone().requires_grad_()), at)
    assert torch.allclose(at_old, -advantage / 6)


def test_the_kl_term_is_the_divergence_of_the_steps_normals():
    theta, base = torch.tensor([0.3, -0.4], dtype=torch.float64), torch.tensor([0.1, 0.0], dtype=torch.float64)
    policy = Policy(kl_weight=2.0)
    path = baselines.stochastic_rollout(linear(theta), lambda purpose: normal(5, 1), SIGMAS, policy)
    losses = list(baselines.step_losses(linear(theta), linear(base), path, torch.zeros(5), SIGMAS, policy))
    for i, loss in enumerate(losses):
        ours, theirs = (
            torch.distributions.Normal(
                *baselines.cps_moments(path.states[i], linear(t)(path.states[i], 0), SIGMAS, i, 0.7)
            )
            for t in (theta, base)
        )
        divergence = torch.distributions.kl_divergence(ours, theirs).mean()
        assert (loss * len(losses)).item() == pytest.approx(2 * divergence.item())


def test_advantages_are_relative_to_the_group_or_to_the_batch():
    scores = torch.tensor([1.0, 3.0, 10.0, 30.0])
    assert baselines.advantages(scores, 2).tolist() == pytest.approx([-1, 1, -1, 1], rel=1e-3)
    of_batch = baselines.advantages(scores, 1)
    assert of_batch.tolist() == pytest.approx(((scores - 11) / scores.std(correction=0)).tolist(), rel=1e-3)
    assert baselines.advantages(torch.ones(4), 2).tolist() == [0, 0, 0, 0]


def policy_trainer(make_args, policy, **changes):
    args = make_args(**changes)
    trainer = PolicyGradientTrainer(policy, args, model=tiny_pipeline(), reward_funcs=redness, train_dataset=PROMPTS)
    trainer._begin()
    return trainer


def test_a_group_is_one_prompt_with_different_noise(make_args):
    trainer = policy_trainer(make_args, Policy(group_size=2), per_device_train_batch_size=4)
    first, second = (trainer.batches.batch(step, 0) for step in (0, 1))
    assert first.prompts[0] == first.prompts[1] != first.prompts[2] == first.prompts[3]
    assert len({*first.prompts, *second.prompts}) == 4
    assert len(first.noise("train").unique(dim=0)) == 4
    assert {*first.prompts, *second.prompts} <= {*trainer.batches.from_step(0)}
    assert isinstance(trainer.batches, GroupedBatches)
    with pytest.raises(ValueError, match="expected a multiple of group_size=3"):
        policy_trainer(make_args, Policy(group_size=3), per_device_train_batch_size=4, overwrite_output_dir=True)


def test_policy_gradients_raise_the_reward(make_args):
    policy = Policy(group_size=8, updates=1, noise_level=0.7)
    trainer = policy_trainer(
        make_args, policy, per_device_train_batch_size=32, max_steps=20, learning_rate=3e-2, lora_rank=8
    )
    rewards = [trainer.step(step)["reward"] for step in range(20)]
    assert sum(rewards[-4:]) / 4 > sum(rewards[:4]) / 4 + 0.05


def test_a_first_update_is_the_plain_policy_gradient(make_args):
    """With nothing reused the ratio is 1: the adapter's gradient is that of the advantage-weighted log-density."""
    trainer = policy_trainer(make_args, Policy(group_size=2, updates=1), per_device_train_batch_size=4)
    with torch.no_grad():
        trainer.masters.vector += 0.1 * torch.randn(trainer.masters.vector.shape, generator=generator("B"))
    trainer.masters.write()
    batch = trainer.batches.batch(0, 0)
    field = trainer.fields.tuned(trainer.text(batch.prompts, trainer.device))
    path = baselines.stochastic_rollout(field, batch.noise, trainer.sigmas, trainer.policy)
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5])
    for i, x in enumerate(path.states[:-2]):
        mean, std = baselines.cps_moments(x, field(x, trainer.sigmas[i]), trainer.sigmas, i, 0.7)
        density = torch.distributions.Normal(mean, std).log_prob(path.states[i + 1]).flatten(1).mean(1)
        (-(advantage * density).mean() / 2).backward()
    trainer.masters.collect_grad()
    expected = trainer.masters.vector.grad.clone()
    trainer.masters.vector.grad.zero_()
    for loss in baselines.step_losses(field, field, path, advantage, trainer.sigmas, trainer.policy):
        trainer._back_propagate(loss)
    assert expected.norm() > 0
    assert (trainer.masters.vector.grad - expected).norm() < 1e-3 * expected.norm()


def test_rows_of_a_trajectory_stay_together():
    path = Trajectory([normal(4, 2), normal(4, 2, seed=1)], [normal(4, seed=2)])
    part = path.rows(torch.tensor([3, 1]))
    assert torch.equal(part.states[1], path.states[1][[3, 1]])
    assert torch.equal(part.log_probs[0], path.log_probs[0][[3, 1]])


def test_the_best_of_n_is_the_best_of_the_first_n():
    scores = torch.tensor([[1.0, 5.0], [3.0, 2.0], [2.0, 9.0]])  # of sample and prompt
    video_of = lambda number: (scores[number] * 10).view(2, 1, 1, 1, 1)
    kept = dict(baselines.best_of(3, video_of, lambda video: video.flatten() / 10, [1, 2, 3]))
    assert {n: best.flatten().tolist() for n, best in kept.items()} == {1: [10, 50], 2: [30, 50], 3: [30, 90]}


# --------------------------------------------------------------------------------------------------- the study


def conditions(tmp_path, **changes):
    return study_runs.Conditions("cpu", tmp_path, 11, **{"eval_prompts": 4, "diversity_prompts": 2} | changes)


def test_the_settings_of_every_arm_and_variant_are_accepted(tmp_path):
    every = [*study_arms.ARMS.values()]
    every += [study_arms.ARMS[arm] | variant for arm, variants in study_arms.VARIANTS.items() for variant in variants]
    for settings in {json.dumps(one) for one in every}:
        run, policy = study_arms.split(json.loads(settings))
        args = conditions(tmp_path).args(run, 3, 8)
        assert (args.seed, args.max_steps, args.num_eval_prompts) == (3, 8, 4)
        assert all(getattr(args, name) == value for name, value in run.items())
        assert policy is None or args.per_device_train_batch_size % (policy.group_size * policy.updates) == 0


def test_the_sweep_chooses_by_the_trained_reward_alone(tmp_path):
    def row(arm, rate, seed, trained, verifier, **more):
        gains = {"trained": {"diff": trained}, "verifier": {"diff": verifier}}
        return {"arm": arm, "seed": seed, "variant": {"learning_rate": rate}} | gains | more

    rows = [row("DDPO", 1e-3, 0, 0.1, 0.9), row("DDPO", 1e-3, 1, 0.2, 0.9)]
    rows += [row("DDPO", 3e-3, 0, 0.3, 0.1), row("DDPO", 3e-3, 1, 0.2, 0.1)]
    rows += [row("DDPO", 1e-2, 0, 9.0, 0.9), row("DDPO", 1e-2, 1, 9.0, 0.9, error="ValueError")]  # one seed less
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps({"rows": rows}))
    chosen = study_arms.chosen_by_sweep(path)
    assert chosen == {"DDPO": {"learning_rate": 3e-3}}
    assert study_arms.settings_of("DDPO" + study_arms.CONTROL, chosen)["learning_rate"] == 3e-3
    assert study_arms.settings_of("DDPO" + study_arms.CONTROL, chosen)["kl_weight"] > 0
    assert study_arms.chosen_by_sweep(tmp_path / "absent.json") == {}


class Pool:
    """Runs at once, in this process; keeps what was asked for."""

    def __init__(self):
        self.trained = []

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


@pytest.fixture
def fake_runs(monkeypatch, tmp_path):
    """Steps of known cost, and runs that take no time; DRTune fails as long as it is told to, ReFL can't be timed."""
    monkeypatch.setattr(study, "SWEEP", tmp_path / "no_sweep.json")
    calls = {"trained": [], "broken": True}
    gain = {"base": 0.5, "tuned": 0.6, "diff": 0.1}
    judged = dict.fromkeys(("trained", "verifier", "clip", "motion", "diversity"), gain)

    def seconds(settings, timed, conditions):
        if settings.get("method") == "refl":
            raise RuntimeError("no")
        return 2.0 if settings.get("num_grad_steps") == 4 else 0.5

    def train(settings, seed, steps, conditions):
        if settings.get("method") == "drtune" and calls["broken"]:
            raise ValueError("too large")
        calls["trained"].append((settings.get("method"), seed, steps))
        return [judged | {"queries": 16 * steps}]

    def best_of_n(seed, count, report_at, cost, conditions):
        return [judged | {"arm": f"best-of-{n}", "settings": {"n": n}, "steps": 0, "queries": n} for n in (4, "n")]

    monkeypatch.setattr(study_runs, "evaluate_base", lambda conditions: {"nano_preference": 0.5, "nano_verifier": 0.6})
    monkeypatch.setattr(study_runs, "seconds_per_step", seconds)
    monkeypatch.setattr(study_runs, "seconds_per_sample", lambda timed, conditions: 0.25)
    monkeypatch.setattr(study_runs, "train", train)
    monkeypatch.setattr(study_runs, "best_of_n", best_of_n)
    return calls


def run_study(tmp_path, arms, steps=10):
    made = study.Study(tmp_path / "study.json", conditions(tmp_path), steps, 3, Pool())
    made.run(study.train_tasks(made, arms, [0, 1], {}))
    return json.loads((tmp_path / "study.json").read_text())


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


def test_other_conditions_do_not_go_into_the_same_file(fake_runs, tmp_path):
    run_study(tmp_path, ["DRaFT-K"])
    with pytest.raises(SystemExit, match="made with other steps"):
        run_study(tmp_path, ["DRaFT-K"], steps=11)


def test_one_run_of_each_kind(tmp_path):
    """Nano itself, small and for two steps: what a row holds, and how often the reward is asked."""
    flags = ("--height", "32", "--width", "32", "--num_frames", "5", "--per_device_train_batch_size", "2")
    small = conditions(tmp_path, eval_batch=4, threads=1, flags=flags)
    assert study_runs.evaluate_base(small)["nano_verifier"] >= 0
    queries = {}
    for arm in ("DRaFT-LV", "DDPO" + study_arms.CONTROL):
        (row,) = study_runs.train(study_arms.settings_of(arm, {}) | {"learning_rate": 1e-2}, 0, 2, small)
        queries[arm] = row["queries"]
        assert row["trained"]["diff"] != 0
        assert math.isfinite(row["verifier"]["tuned"])
        assert {"clip", "motion", "diversity"} <= set(row)
    assert [*queries.values()] == [2 * 2 * 3, 2 * 2]  # DRaFT-LV scores its rollout and two draws
    rows = study_runs.best_of_n(0, 3, [1, 8], 0.5, small)
    assert [(row["arm"], row["device_seconds"]) for row in rows] == [("best-of-1", 2.0), ("best-of-n", 6.0)]
    assert rows[1]["trained"]["tuned"] > rows[0]["trained"]["tuned"]  # chosen by it
    assert study_runs.seconds_per_step(study_arms.settings_of("DRaFT-1", {}), 1, small) > 0


def test_a_run_that_diverged_is_an_error(tmp_path, monkeypatch):
    base = study_runs.Evaluation(["a"], {"nano_clip": torch.ones(1)}, torch.zeros(0))
    monkeypatch.setattr(study_runs.Evaluation, "load", lambda path: base)
    with pytest.raises(ValueError, match="nano_clip not finite"):
        study_runs.judged({"nano_clip": torch.tensor([math.nan])}, conditions(tmp_path))


# --------------------------------------------------------------------------------------------------- the report


def result_of(gains: dict[str, list[float]]) -> dict:
    about = {"device": "a chip", "cores": 2, "torch": "2.15", "budget_seconds": 12.0, "steps": 80, "eval_prompts": 128}
    about |= {"base": {"nano_preference": 0.8, "nano_verifier": 0.6}, "wall_seconds": 1230.0}
    rows = []
    for arm, values in gains.items():
        for seed, gain in enumerate(values):
            row = {"base": 0.5, "tuned": 0.5 + gain, "diff": gain}
            names = dict.fromkeys(("trained", "verifier", "clip", "motion", "diversity"), row)
            spent = {"steps": 80, "device_seconds": 30.0, "queries": 2000}
            rows.append({"arm": arm, "seed": seed, "settings": {"learning_rate": 1e-3}} | names | spent)
    return {"environment": about, "rows": rows}


RESULT = result_of(
    {"DRaFT-K": [0.1, 0.2, 0.3], "DDPO": [0.3, 0.4, 0.51], "SRPO": [0.0, 0.05, 0.1], "ReFL": [0.3, 0.1, 0.2]}
)


def test_intervals_are_students_over_seeds():
    mean, half = study_numbers.mean_interval([0.1, 0.2, 0.3])
    assert (mean, half) == (pytest.approx(0.2), pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4))
    assert math.isnan(study_numbers.mean_interval([0.1])[1])


def test_differences_to_the_default_are_of_the_same_seeds():
    arms = study_numbers.by_arm(RESULT)
    one_more = arms["SRPO"] + [arms["SRPO"][0] | {"seed": 7}]
    expected = study_numbers.mean_interval([-10.0, -15.0, -20.0])
    assert study_numbers.against_default(arms | {"SRPO": one_more}, "SRPO", "verifier") == pytest.approx(expected)
    assert study_numbers.against_default(arms | {"SRPO": one_more[-1:]}, "SRPO", "verifier") is None


def test_what_is_found_is_told_also_where_a_baseline_wins():
    told = study_report.findings(RESULT)
    assert "Highest verifier, points: DDPO, +40.3" in told
    assert "higher: DDPO; lower: SRPO; not told apart from it: ReFL" in told
    table = study_report.gains_table(RESULT)
    assert table.splitlines()[2].startswith("| DDPO | 3 | 80 | +0.403 ± 0.261 | +40.3 ± 26.1 | ")
    assert "| **DRaFT-K** | 3 | 80 | +0.200 ± 0.248 | +20.0 ± 24.8 | +0.200 ± 0.248 | +40.0 ± 49.7 |" in table
    assert "| DDPO | 30.0 | 2,000 | +0.807 ± 0.522 | +80.7 ± 52.2 | +0.202 ± 0.130 | +20.2 ± 13.0 |" in (
        study_report.cost_table(RESULT)
    )
    failed = RESULT["rows"] + [{"arm": "ReFL", "seed": 3, "error": "ValueError: nan"}]
    told = study_report.conditions(RESULT | {"rows": failed})
    assert "All of it took 20 minutes. Runs that failed: ReFL, seed 3 (ValueError: nan)." in told


def test_the_guide_says_what_is_not_measured_and_is_filled_when_it_is(tmp_path):
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    places = study_report.PLACE.findall(text)
    assert {name for _, name, _ in places} == set(study_report.PARTS) - {"readme"}
    empty = study_report.fill(text, None, None)
    assert empty.count(study_report.NOTHING) == len(places)
    filled = study_report.fill(empty, RESULT, None)
    assert filled.count(study_report.NOTHING) == 1  # the sweep
    assert study_report.fill(filled, None, None) == empty
    for name, draw in study_report.PLOTS.items():
        draw(RESULT, tmp_path / name)
        assert 5_000 < (tmp_path / name).stat().st_size < 200_000


def test_the_sweeps_table_shows_every_variant():
    rows = [row | {"variant": {"learning_rate": rate}} for rate in (1, 2) for row in RESULT["rows"]]
    rows += [{"arm": "DDPO", "variant": {"learning_rate": 3}, "seed": 0, "error": "ValueError"}]
    table = study_report.sweep_table({"rows": rows})
    assert "| DDPO | learning_rate 1 | 3 | +0.403 | +40.3 |" in table
    assert "| DDPO | learning_rate 3 | 1 | failed | failed |" in table
