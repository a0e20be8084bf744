"""Several processes train as one does: the same gradients, the same adapter, in every layout."""

import json
import os
import time
from types import SimpleNamespace

import many_runs
import pytest
import torch
from processes import start, together
from real_videos import write_videos
from toy_rewards import PROMPTS, ROBUST

from rlhf.checks import check_config
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.distributed.layout import Sizes
from rlhf.run.metrics import COST, read_metrics

RECOMPUTING = {"gradient_checkpointing": True, "keep_attention": True, "stepwise_backward": True}
SHORT = {"max_steps": 2}
# Four videos a step in each of them.
OF_TWO = {
    "data": {"per_device_train_batch_size": 2, "eval": PROMPTS[:3], "sample_steps": 1},
    "guidance": {"per_device_train_batch_size": 4, "guidance_parallel": 2},
    "sequence": {"per_device_train_batch_size": 4, "sequence_parallel": 2, "eval": PROMPTS[:3], **RECOMPUTING},
    "sharded": {"per_device_train_batch_size": 2, "shard_base": True, "eval": PROMPTS[:3], "sample_steps": 1}
    | RECOMPUTING,
}
OF_FOUR = {
    "data of 4": {"per_device_train_batch_size": 1},
    "sequence of 4": {"per_device_train_batch_size": 4, "sequence_parallel": 4},
    "guidance and sequence": {"per_device_train_batch_size": 4, "guidance_parallel": 2, "sequence_parallel": 2},
    "data, sequence, sharded": {"per_device_train_batch_size": 2, "sequence_parallel": 2, "shard_base": True},
}
OMITTING = {
    "latents": {"omit": "sum of latents", **OF_TWO["guidance"], "max_steps": 1},
    "text": {"omit": "sum of text", **OF_TWO["sequence"], "max_steps": 1, "eval": None},
    "adapters": {"omit": "sum of adapters", "per_device_train_batch_size": 2, "max_steps": 1},
}
EVERYTHING = {  # drift, an average, draws of the method, an evaluation on the way
    "method": "uniform",
    "drift_weight": 0.1,
    "ema_decay": 0.5,
    "eval_steps": 2,
    "eval": PROMPTS[:3],
    "max_steps": 2,
}
CHEAPER = {"prefix_steps": 1, "rollout_reuse": 2, "num_grad_steps": 1, "max_steps": 2}
ADJOINT = {"method": "adjoint_matching", "num_grad_steps": 1, "max_steps": 2}
PRFL = {"method": "prfl", "reward": "calm", "num_grad_steps": 1, "max_steps": 2}
ROBUSTLY = ROBUST | {"reward": "both", "max_steps": 2}
LEAPS = {"method": "leap_align", "num_grad_steps": 1, "max_steps": 2}
# A loss on real videos beside rollouts that start at real videos, two batches a step or two branches.
REAL = {"method": "srpo", "num_grad_steps": 1, "max_steps": 2, "prompts": None, "anchor_data": "videos"}
REAL |= {"method_kwargs": {"offline": True, "anchor_data_steps": 1}}
NEGATIVE = {"method_kwargs": {"negative_drift_weight": 1.0}, "num_grad_steps": 1, "max_steps": 2}
OTHERS = {
    "real videos": REAL | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "real videos, guidance": REAL | {"per_device_train_batch_size": 4, "guidance_parallel": 2},
    "leaps": LEAPS | {"per_device_train_batch_size": 2},
    "negative": NEGATIVE | {"per_device_train_batch_size": 2},
    "negative of parts": NEGATIVE | {"per_device_train_batch_size": 4, "guidance_parallel": 2},
    "prfl": PRFL | {"per_device_train_batch_size": 2},
    "prfl of parts": PRFL | {"per_device_train_batch_size": 4, "guidance_parallel": 2},
    "robust": ROBUSTLY | {"per_device_train_batch_size": 2},
    "robust of parts": ROBUSTLY | {"per_device_train_batch_size": 4, "guidance_parallel": 2},
    "adjoint": ADJOINT | {"per_device_train_batch_size": 4, "guidance_parallel": 2},
    "adjoint of parts": ADJOINT | {"per_device_train_batch_size": 4, "sequence_parallel": 2} | RECOMPUTING,
    "cheaper": CHEAPER | {"per_device_train_batch_size": 4, "sequence_parallel": 2},
    "everything": EVERYTHING | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "broken": {"reward": "broken", "per_device_train_batch_size": 2, "max_skipped_steps": 1, "max_steps": 4},
    "one prompt": {"prompts": PROMPTS[:1], "eval": PROMPTS[:1], "max_steps": 1, "per_device_train_batch_size": 1},
    "fewer prompts": {"prompts": (PROMPTS, PROMPTS[:2]), "per_device_train_batch_size": 2},
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The same run in one process."""
    own = {"per_device_train_batch_size": 4, "eval": PROMPTS[:3]}
    return many_runs.run(tmp_path_factory.mktemp("alone") / "run", SHORT | own)


def found(folder, names, processes):
    return {
        name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(processes)]
        for name in names
    }


@pytest.fixture(scope="module")
def of_two(tmp_path_factory):
    """What each process found in each run, and the folder of the runs."""
    folder, runs = tmp_path_factory.mktemp("two"), OF_TWO | OMITTING | OTHERS
    write_videos(folder / "videos", width=48, height=16)
    together(many_runs.runs, folder, {name: SHORT | own for name, own in runs.items()}, processes=2)
    return found(folder, runs, 2) | {"folder": folder}


@pytest.fixture(scope="module")
def of_four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    together(many_runs.runs, folder, {name: SHORT | own for name, own in OF_FOUR.items()}, processes=4)
    return found(folder, OF_FOUR, 4)


def difference(gradient, expected) -> float:
    return ((gradient - expected).abs().max() / expected.abs().max()).item()


def assert_same_training(several, alone):
    for one in several:
        assert len(one["gradients"]) == len(alone["gradients"]) == 2
        assert difference(one["gradients"][0], alone["gradients"][0]) < 1e-5
        for gradient, expected in zip(one["gradients"], alone["gradients"], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(one["weights"], alone["weights"], rtol=0, atol=1e-6)
        assert torch.equal(one["weights"], several[0]["weights"]), "one adapter on all processes"


@pytest.mark.parametrize("name", OF_TWO)
def test_two_processes_train_as_one(of_two, alone, name):
    assert_same_training(of_two[name], alone)


@pytest.mark.parametrize("name", OF_FOUR)
def test_four_processes_train_as_one(of_four, alone, name):
    assert_same_training(of_four[name], alone)


@pytest.mark.parametrize("name", OMITTING)
def test_without_one_of_the_sums_the_gradient_is_another(of_two, alone, name):
    """So the tests above can fail."""
    assert difference(of_two[name][0]["gradients"][0], alone["gradients"][0]) > 1e-3


def test_two_processes_do_everything_as_one_does(of_two, tmp_path):
    own = EVERYTHING | {"per_device_train_batch_size": 4}
    alone, several = many_runs.run(tmp_path / "run", own), of_two["everything"][0]
    torch.testing.assert_close(several["weights"], alone["weights"], rtol=0, atol=1e-6)
    rows, expected = (read_metrics(folder) for folder in (of_two["folder"] / "everything", tmp_path / "run"))
    for row, other in zip(rows, expected, strict=True):
        row |= {name: other[name] for name in COST}
        assert row == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        (["leaps"], LEAPS),
        (["negative", "negative of parts"], NEGATIVE),
        (["adjoint", "adjoint of parts"], ADJOINT),
        (["prfl", "prfl of parts"], PRFL),
        (["robust", "robust of parts"], ROBUSTLY),
    ],
    ids=["leaps", "negative", "adjoint", "prfl", "robust"],
)
def test_methods_with_gradients_of_their_own_train_on_two_processes_as_on_one(of_two, tmp_path, names, settings):
    assert_as_alone(of_two, tmp_path, names, settings)


def test_real_videos_are_learnt_from_on_two_processes_as_on_one(of_two, tmp_path):
    write_videos(tmp_path / "videos", width=48, height=16)
    assert_as_alone(of_two, tmp_path, ["real videos", "real videos, guidance"], REAL)


def assert_as_alone(of_two, tmp_path, names, settings):
    """Runs of two processes did what one does with batches of four."""
    alone = many_runs.run(tmp_path / "run", settings | {"per_device_train_batch_size": 4})
    for name in names:
        for gradient, expected in zip(of_two[name][0]["gradients"], alone["gradients"], strict=True):
            torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(of_two[name][0]["weights"], alone["weights"], rtol=0, atol=1e-6)


def test_a_cheaper_prefix_on_several_processes_is_that_of_one(of_two, tmp_path):
    alone = many_runs.run(tmp_path / "run", CHEAPER | {"per_device_train_batch_size": 4})
    torch.testing.assert_close(of_two["cheaper"][0]["weights"], alone["weights"], rtol=0, atol=1e-6)


def test_layouts_are_those_asked_for(of_two, of_four):
    assert of_two["guidance"][0]["layout"] == "data 1 x guidance 2 x sequence 1"
    assert of_four["guidance and sequence"][0]["layout"] == "data 1 x guidance 2 x sequence 2"
    assert of_four["data, sequence, sharded"][0]["layout"] == "data 2 x guidance 1 x sequence 2"


def test_a_sharded_base_is_divided_over_all_processes(of_two, of_four):
    for several, size in ((of_two["sharded"], 2), (of_four["data, sequence, sharded"], 4)):
        for one in several:
            assert one["whole"] > 30_000
            assert one["held"] == pytest.approx(one["whole"] / size, rel=0.05)
    assert of_two["data"][0]["whole"] == 0


@pytest.mark.parametrize("name", ["data", "sequence", "sharded"])
def test_evaluation_is_shared_and_the_result_the_same(of_two, alone, name):
    for key in ("base", "tuned"):
        expected = alone["summary"]["trained"]["redness"][key]
        assert of_two[name][0]["summary"]["trained"]["redness"][key] == pytest.approx(expected, rel=1e-6)
    for key in ("motion", "diversity"):
        assert of_two[name][0]["summary"][key]["base"] == pytest.approx(alone["summary"][key]["base"], rel=1e-5)


@pytest.mark.parametrize("name", ["data", "sharded"])
def test_samples_are_made_by_all_and_written_by_one(of_two, name):
    for step in (0, 1, 2):
        folder = of_two["folder"] / name / "samples" / f"step-{step:06d}"
        assert sorted(os.listdir(folder)) == ["00.mp4", "01.mp4", "02.mp4", "prompts.txt"]


def test_a_score_that_is_no_number_on_one_process_is_skipped_by_all(of_two):
    for one in of_two["broken"]:
        assert len(one["gradients"]) == 3, "the third of four steps was not taken"
        assert torch.equal(one["weights"], of_two["broken"][0]["weights"])


def test_fewer_prompts_than_processes_are_enough(of_two):
    """Order is an endless sequence of epochs: no process runs out; the noise is another."""
    assert of_two["one prompt"][0]["summary"]["steps"] == 1
    assert torch.equal(of_two["one prompt"][0]["weights"], of_two["one prompt"][1]["weights"])


def test_a_process_with_other_prompts_is_named(of_two):
    for one in of_two["fewer prompts"]:
        assert "prompts: got others on process 1 than on process 0" in one["error"]


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """One process for a step, two for the next, one for the last: as one for all of them."""
    whole = many_runs.run(tmp_path / "whole", {"per_device_train_batch_size": 2, "max_steps": 3})
    one, two = {"per_device_train_batch_size": 2}, {"per_device_train_batch_size": 1, "resume_from_checkpoint": "auto"}
    many_runs.run(tmp_path / "run", one | {"max_steps": 1})
    together(many_runs.runs, tmp_path, {"run": two | {"max_steps": 2}}, processes=2)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-2" / "state.json").read_text())
    assert (state["processes"], state["samples"]) == (2, 4)
    parts = many_runs.run(tmp_path / "run", one | {"max_steps": 3, "resume_from_checkpoint": "latest"})
    torch.testing.assert_close(parts["weights"], whole["weights"], rtol=0, atol=1e-6)
    columns = [[row["reward"] for row in read_metrics(tmp_path / name)] for name in ("run", "whole")]
    assert columns[0] == pytest.approx(columns[1], rel=1e-5)


# ---------------------------------------- a process that is lost


def test_a_killed_process_ends_the_other_one_with_an_error_in_time(tmp_path):
    own = {"max_steps": 1000, "per_device_train_batch_size": 1, "ddp_timeout": 20, "save_steps": 1}
    first, second = start(many_runs.train, tmp_path / "run", own)
    while not list(tmp_path.glob("run/checkpoints/step-?/manifest.json")):
        assert first.process.is_alive(), first.output.read_text()
        time.sleep(0.05)
    second.process.kill()
    first.finish(codes=(1,), timeout=20 + 10)
    assert list(tmp_path.glob("run/checkpoints/step-*")), "the last good state is kept"


@pytest.mark.slow
def test_a_stuck_process_ends_the_other_one_with_an_error_in_time(tmp_path):
    own = {"reward": "stuck", "prompts": PROMPTS, "per_device_train_batch_size": 1, "ddp_timeout": 6}
    first, second = start(many_runs.train, tmp_path / "run", own)
    assert first.finish(codes=(1,), timeout=90), "it says why"
    second.process.kill()


# ---------------------------------------- settings


def test_places_in_a_layout():
    sizes = Sizes(data=2, guidance=2, sequence=3)
    assert [sizes.coordinates(rank) for rank in range(12)] == [
        (d, g, s) for d in (0, 1) for g in (0, 1) for s in (0, 1, 2)
    ]


def test_a_layout_that_does_not_fit_names_those_that_do():
    args = SimpleNamespace(guidance_parallel=2, sequence_parallel=3)
    with pytest.raises(ValueError, match=r"are 6 processes, which do not divide the 4 .* 1 x 1, .* 2 x 2, .* start 6"):
        Sizes.from_settings(args, 4)
    assert str(Sizes.from_settings(args, 12)) == "data 2 x guidance 2 x sequence 3"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"guidance_parallel": 2, "guidance_gradient": "text"}, "guidance_gradient: got text with guidance_parallel 2"),
        ({"guidance_parallel": 2, "guidance_together": True}, "guidance_together: got True with guidance_parallel 2"),
        ({"shard_base": True, "gradient_checkpointing": True, "stream_weights": True}, "got stream_weights=True"),
    ],
)
def test_settings_that_do_not_go_together_are_told_at_the_start(monkeypatch, tmp_path, settings, told):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=told):
        check_config(RewardGradientConfig(output_dir=str(tmp_path / "run"), **settings))
