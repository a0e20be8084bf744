"""Settings from YAML and flags; what is misspelt or of the wrong kind is named with its cure."""

import dataclasses
import inspect
import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml

from rlhf.checks import check_config
from rlhf.config import METHODS, ConfigError, RewardGradientConfig, field_names
from rlhf.config.older import translate_old_settings
from rlhf.config.parse import CONFIGS, parse_command, parse_config
from rlhf.method.options import METHOD_OPTIONS
from rlhf.run.folder import read_settings


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_a_flag_beats_the_file_and_the_file_the_default(yaml_file):
    path = yaml_file("learning_rate: 1e-5\nmax_steps: 7\nreward_funcs: [a, b]\n")
    args = parse_config(["--config", path, "--max_steps", "9", "--reward_weights", "1", "0.5"])
    assert (args.learning_rate, args.max_steps, args.seed) == (1e-5, 9, 0)
    assert args.reward_funcs == ["a", "b"]
    assert args.reward_weights == [1.0, 0.5]
    assert args.gradient_checkpointing is False


@pytest.mark.parametrize(
    ("flags", "options"),
    [([], {"steps": [0, 1]}), (["--method", "listed"], {"steps": [0, 1]}), (["--method", "draft_k"], None)]
    + [(["--method=srpo", "--method_kwargs", "{num_draws: 2}"], {"num_draws": 2})],
)
def test_a_flag_for_another_method_leaves_out_the_options_of_the_files_method(yaml_file, flags, options):
    path = yaml_file("method: listed\nmethod_kwargs: {steps: [0, 1]}")
    assert parse_config(["--config", path, *flags]).method_kwargs == options


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"prfl"}))  # which needs a reward of latents
def test_a_flag_alone_starts_every_method_from_the_shipped_recipe(method):
    needed = {
        "listed": ["--method_kwargs", "{steps: [1]}"],
        "alignprop": ["--num_grad_steps", "2"],
        "nft": ["--per_device_train_batch_size", "32"],
    }
    args = check_config(parse_config(["--method", method, *needed.get(method, [])], CONFIGS / "nano.yaml"))
    assert (args.method, args.drift_weight) == (method, 0)


def test_the_default_file_holds_without_config_and_config_may_have_an_equals_sign(yaml_file):
    path = yaml_file("max_steps: 7")
    assert parse_config(["--seed", "3"], default_config=path).max_steps == 7
    assert parse_config([f"--config={path}"]).max_steps == 7


def test_a_seed_may_be_any_number_of_64_bits(yaml_file):
    """Longer than what a float can hold."""
    for seed in (2**53 + 1, 2**64 - 1, -(2**63)):
        path = yaml_file(f"seed: {seed}\n")
        assert parse_config(["--config", str(path)]).seed == seed == parse_config(["--seed", str(seed)]).seed


def test_paths_are_relative_to_the_config_file(yaml_file, tmp_path, monkeypatch):
    assert parse_config(["--config", yaml_file("seed: 1")]).base_dir == str(tmp_path)
    assert parse_config([]).base_dir is None
    for place in (tmp_path / "base", tmp_path / "elsewhere" / "base"):
        place.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = yaml_file("model: ./base\ninitial_adapter: base\nprompts: ../a.txt\n")
    for given in (parse_config(["--config", path]), parse_config(["--config", path, "--model", "base"])):
        assert (given.model, given.initial_adapter) == (str(tmp_path / "base"),) * 2
        assert given.prompts == "../a.txt"
    (tmp_path / "base").rmdir()
    assert parse_config(["--config", path]).model == str(tmp_path / "elsewhere" / "base"), "as for every other path"


def test_a_tilde_is_the_home_folder_in_every_path(yaml_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    names = ("output_dir", "resume_from_checkpoint", "prompts", "eval_prompts", "model", "initial_adapter", "base_dir")
    for name in names:
        (tmp_path / name).mkdir()
    text = "".join(f"{name}: ~/{name}\n" for name in names)
    for args in (parse_config(["--config", yaml_file(text)]), RewardGradientConfig(**yaml.safe_load(text))):
        assert {name: getattr(args, name) for name in names} == {name: str(tmp_path / name) for name in names}
    (tmp_path / "output_dir" / "config.yaml").write_text("seed: 9\n")
    resumed = ["--output_dir=~/output_dir", "--resume_from_checkpoint=latest"]
    assert parse_config(resumed, default_config=yaml_file("seed: 1")).seed == 9
    (tmp_path / "scratch" / "step-1").mkdir(parents=True)
    (tmp_path / "output_dir" / "checkpoints").symlink_to(tmp_path / "scratch")
    (tmp_path / "best").symlink_to(tmp_path / "output_dir" / "other" / "step-2")
    for checkpoint in ("~/output_dir/checkpoints/step-1", "~/best"):
        resumed = [f"--resume_from_checkpoint={checkpoint}"]
        assert parse_config(resumed, default_config=yaml_file("seed: 1")).seed == 9, "whatever links are on the way"


@pytest.mark.parametrize(
    ("name", "text", "flag", "expected"),
    [
        ("reward_kwargs", "{a: {b: x, eps: 2}}", '{"a": {"b": "x", "eps": 2}}', {"a": {"b": "x", "eps": 2}}),
        ("reward_caps", "{aesthetic: 7, clip_score: 3e-1}", "{aesthetic: 7, clip_score: 3e-1}", None),
        ("reward_targets", "{flicker: 0.9}", '{"flicker": 0.9}', {"flicker": 0.9}),
    ],
)
def test_a_mapping_is_taken_from_a_file_and_from_a_flag_as_json_or_yaml(yaml_file, name, text, flag, expected):
    expected = expected or {"aesthetic": 7.0, "clip_score": 0.3}
    args = parse_config(["--config", yaml_file(f"{name}: {text}")])
    assert getattr(args, name) == getattr(parse_config([f"--{name}", flag]), name) == expected
    assert getattr(parse_config(["--config", yaml_file(args.to_yaml())]), name) == expected


def test_rewards_are_named_by_a_mapping_with_their_arguments_or_by_a_text(yaml_file):
    text = """
reward_funcs:
  large: {spec: clip_score, model: org/large}
  own: mine.py:Own
eval_reward_funcs: [steady=flicker]
reward_kwargs: {large: {frames: all, model: org/small}, steady: {num_frames: 4}}
"""
    args = parse_config(["--config", yaml_file(text)])
    assert (args.reward_funcs, args.eval_reward_funcs) == (["large=clip_score", "own=mine.py:Own"], ["steady=flicker"])
    assert args.reward_kwargs == {"large": {"frames": "all", "model": "org/large"}, "steady": {"num_frames": 4}}
    assert parse_config(["--config", yaml_file(args.to_yaml())]).reward_kwargs == args.reward_kwargs
    assert RewardGradientConfig(eval_reward_funcs={"a": "flicker"}).eval_reward_funcs == ["a=flicker"]
    for wrong in ({"a": 3}, {"a": {"model": "x"}}, {"a": ["flicker"]}, {3: "flicker"}):
        with pytest.raises(ConfigError, match="reward_funcs: got .* expected a list, each text"):
            RewardGradientConfig(reward_funcs=wrong)


def test_a_small_number_in_json_is_no_text():
    assert parse_config(["--reward_kwargs", '{"a": {"eps": 1e-5}}']).reward_kwargs["a"]["eps"] == 1e-5
    assert parse_config(["--lora_target_modules", "[to_q, ff.net.2]"]).lora_target_modules == ["to_q", "ff.net.2"]


@pytest.fixture
def run(tmp_path):
    """Make a run's folder as a start by `--config mine.yaml --overwrite_output_dir` leaves it."""
    folder = tmp_path / "runs" / "mine"
    (folder / "checkpoints" / "step-3").mkdir(parents=True)
    args = RewardGradientConfig(
        output_dir=str(folder), learning_rate=5e-4, reward_funcs=["mine.py:Left"], overwrite_output_dir=True
    )
    (folder / "config.yaml").write_text(args.to_yaml())
    return folder


@pytest.mark.parametrize("which", ["latest", "{run}/checkpoints/step-3"])
def test_a_run_goes_on_by_its_own_settings_and_a_flag_changes_them(yaml_file, run, which):
    """Not by those of the default recipe, which would go on training for another reward."""
    default = yaml_file("learning_rate: 1\noutput_dir: runs/other")
    flags = ["--resume_from_checkpoint", which.format(run=run), "--max_steps", "9"]
    args = parse_config([*flags, f"--output-dir={run}"], default)
    assert (args.learning_rate, args.reward_funcs, args.max_steps) == (5e-4, ["mine.py:Left"], 9)
    assert (args.output_dir, args.resume_from_checkpoint) == (str(run), which.format(run=run))
    assert not args.overwrite_output_dir, "it held for the start"


def test_a_checkpoint_alone_names_its_run_and_latest_means_the_default_recipes(yaml_file, run):
    default = yaml_file(f"learning_rate: 1\noutput_dir: {run}")
    for which in ("latest", str(run / "checkpoints" / "step-3")):
        args = parse_config(["--resume_from_checkpoint", which], default)
        assert (args.learning_rate, args.output_dir) == (5e-4, str(run))


@pytest.mark.parametrize("flags", [["--resume_from_checkpoint", "auto"], ["--seed", "1"], ["--config", "{default}"]])
def test_only_what_is_gone_on_with_brings_its_settings(yaml_file, run, flags):
    default = yaml_file("learning_rate: 1")
    flags = [flag.format(default=default) for flag in flags]
    assert parse_config([*flags, "--output_dir", str(run)], default).learning_rate == 1.0


def test_paths_and_numpys_numbers_are_taken_as_text_and_numbers(tmp_path):
    args = RewardGradientConfig(output_dir=tmp_path / "run", prompts=Path("p.txt"), learning_rate=np.float32(0.5))
    assert (args.output_dir, args.prompts, args.learning_rate) == (str(tmp_path / "run"), "p.txt", 0.5)
    assert type(args.learning_rate) is float
    assert RewardGradientConfig(max_steps=np.int64(3)).max_steps == 3


def test_what_is_written_is_what_is_read(yaml_file):
    args = parse_config(
        ["--config", yaml_file("prompts: x.txt\nheight: 64"), "--report_to", "none", "--weight_decay", "3e-2"]
    )
    again = parse_config(["--config", yaml_file(args.to_yaml())])
    assert dataclasses.asdict(again) == dataclasses.asdict(args)
    assert again.report_to == []


def test_the_flag_none_unsets_what_a_file_sets(yaml_file):
    given = {"reward_weights": "[1, 2]", "reward_caps": "{x: 1}", "lora_target_modules": "[to_q]", "height": "64"}
    path = yaml_file("\n".join(f"{name}: {value}" for name, value in given.items()))
    args = parse_config(["--config", path, *(word for name in given for word in (f"--{name}", "none"))])
    assert [getattr(args, name) for name in given] == [None] * 4
    path = yaml_file("eval_reward_funcs: [nano_clip]\nreport_to: [tensorboard]")
    args = parse_config(["--config", path, "--eval_reward_funcs", "none", "--report_to", "none"])
    assert args.eval_reward_funcs == args.report_to == []


def test_wrong_names_types_and_ranges_are_told_together(yaml_file):
    path = yaml_file("max_steps: ten\nlora_rank: 0\nlearing_rate: 1\n")
    with pytest.raises(ConfigError) as error:
        parse_config(
            ["--config", path, "--seed", "x", "--adam_beta1", "3", "--lora-rnk", "2", "--memory_limit_gib", "0"]
        )
    starts = [
        "settings.yaml: key learing_rate",
        "settings.yaml: max_steps: got 'ten'",
        "flag --lora-rnk",
        "seed: got 'x'",
    ]
    starts += ["adam_beta1: got 3.0", "memory_limit_gib: got 0.0"]
    assert len(error.value.problems) == len(starts) + 1, error.value.problems
    for start in [*starts, "lora_rank: got 0"]:
        assert any(problem.startswith(start) for problem in error.value.problems), start
    with pytest.raises(ConfigError, match="2 problems.*\n.*max_steps: got 'x'.*\n.*lora_rank: got 0") as error:
        RewardGradientConfig(max_steps="x", lora_rank=0)
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value), "as from another process"


def test_no_setting_may_be_abbreviated():
    with pytest.raises(ConfigError, match="'learning_rate'"):
        parse_config(["--learning", "1"])


def test_a_setting_that_is_unknown_or_gone_is_explained_in_python_as_on_the_command_line():
    names = {"eval_width": "it moved to eval_size", "optim": "it is gone; leave it out", "lora_rnk": "'lora_rank'"}
    names |= {"rollout_uses": "it is now 'rollout_reuse'", "dry_run": "a flag of the train command"}
    with pytest.raises(ConfigError) as error:
        RewardGradientConfig(max_steps=3, **dict.fromkeys(names, 1))
    for name, problem in zip(names, error.value.problems, strict=True):
        assert problem.startswith(f"{name}: ")
        assert names[name] in problem
    assert list(inspect.signature(RewardGradientConfig).parameters) == field_names()


def test_every_setting_has_a_help_text_that_ends_in_a_full_stop():
    for f in [f for kind in (RewardGradientConfig, *METHOD_OPTIONS.values()) for f in dataclasses.fields(kind)]:
        assert f.metadata["help"].endswith((".", "none.")), f.name
    assert len(field_names()) == len(set(field_names())) <= 95


def test_help_gives_choices_and_ranges(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert f"{{{','.join(METHODS)},auto}}" in text
    assert "Range: at least 0, less than 1." in text
    assert "--memory_limit_gib" in text, "a flag of the command"
    assert text.startswith("usage: train_rlhf.py [--config FILE_OR_RECIPE] [--SETTING VALUE ...] Defaults are those of")


def test_flags_of_the_command_are_no_settings(yaml_file):
    args, flags = parse_command(["--config", yaml_file("seed: 1"), "--dry_run", "--plan_processes", "4"])
    assert (flags.dry_run, flags.plan_processes, flags.memory_limit_gib) == (True, 4, None)
    assert not vars(flags).keys() & vars(args).keys()


# --------------------------------------------------------------------- settings of earlier versions

OLD = """
method: srpo
rollout_uses: 2
grad_steps: null
num_draws: 4
align_sigmas: [0.75, 0.96]
relative_words: [sharp, dull]
eval_width: 64
eval_num_frames: null
guidance_gradient: distill
drift_weighting: even
optim: adamw_torch_fused
train_blocks: null
decode_channels_last: true
dry_run: false
memory_limit_gib: null
"""


def test_a_file_of_an_earlier_version_is_translated_and_one_paragraph_says_how(yaml_file, caplog):
    args = parse_config(["--config", yaml_file(OLD)])
    assert (args.method, args.rollout_reuse) == ("srpo", 2)
    assert args.method_kwargs == {"num_draws": 4, "relative_words": ["sharp", "dull"]}
    assert args.eval_size == {"width": 64}
    (record,) = caplog.records
    for words in (
        "settings.yaml: These settings are of an earlier version. rollout_uses is now rollout_reuse; grad_steps, ",
        "num_draws, align_sigmas, relative_words: now in method_kwargs, here {'num_draws': 4, 'relative_words': [",
        "eval_width, eval_num_frames: now in eval_size, here {'width': 64}; ",
        "dry_run, memory_limit_gib: now only flags of the train command; ",
        "optim, train_blocks, drift_weighting, decode_channels_last: gone, without effect here.",
    ):
        assert words in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"rollout_uses": 2}, True),
        ({"rollout_uses": 2, "drift_weighting": "even"}, False),
        ({"rollout_reuse": 2}, False),
    ],
)
def test_an_old_recipe_that_distils_is_told_that_the_weights_of_steps_changed(more, told):
    """One that has nothing else of an earlier version cannot be known from one of today."""
    _, paragraph, problems = translate_old_settings({"guidance_gradient": "distill"} | more)
    assert ("now weighs all steps alike, where drift_weighting was kl by default" in paragraph) == told
    assert problems == []


@pytest.mark.parametrize(
    ("settings", "cure"),
    [
        ({"train_blocks": ["transformer_blocks.2"]}, "adapt more layers by lora_target_modules"),
        ({"second_order_prefix": True}, "prefix_steps alone"),
        ({"guidance_every": 2}, "prefix_steps saves more"),
        ({"optim": "adamw_bnb_8bit"}, "moments are float32"),
        ({"early_stopping_threshold": 0.1}, "any rise counts"),
        ({"num_train_prompts": 64}, "into a file"),
        ({"drift_weighting": "even"}, "distill alone weighs evenly"),
        ({"lora_use_dora": True}, "peft_config=LoraConfig(use_dora=True, ...)"),
        ({"lora_rank_pattern": {"to_q": 2}}, "peft_config=LoraConfig(rank_pattern=..., ...)"),
        ({"base_bits": 8}, "choose 4"),
        ({"sampling_weights": "float8"}, "prefix_steps and rollout_reuse"),
        ({"decode_caches": "recompute"}, "choose host"),
    ],
)
def test_what_was_in_use_and_is_gone_is_refused_with_its_cure(settings, cure):
    kept, _, (problem,) = translate_old_settings(settings)
    ((name, value),) = settings.items()
    assert problem.startswith(f"{name}: got {value!r}, which this version no longer has")
    assert cure in problem


def test_what_had_no_effect_beside_the_others_is_dropped():
    for settings in ({"prompts": "p.txt", "num_train_prompts": 9}, {"guidance_gradient": "distill"}):
        old = {"drift_weighting": "even" if "guidance_gradient" in settings else "kl"} | settings
        kept, told, problems = translate_old_settings(old)
        assert (kept.keys() & {"num_train_prompts", "drift_weighting"}, problems) == (set(), [])
        assert told.endswith("gone, without effect here.")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"grad_steps": [1], "method_kwargs": "{num_draws: 3}"}, {"method_kwargs": {"steps": [1], "num_draws": 3}}),
        ({"grad_steps": [1], "method_kwargs": "none"}, {"method_kwargs": {"steps": [1]}}),
        ({"eval_height": 32, "eval_width": "none", "eval_size": [1]}, {"eval_size": [1]}),  # coercion refuses a list
        ({"lora_rank_pattern": {}, "lora_alpha_pattern": None, "lora_use_dora": False}, {}),
    ],
)
def test_values_of_earlier_versions_may_be_text_or_empty(given, expected):
    kept, _, problems = translate_old_settings(given)
    assert (kept, problems) == (expected, [])


def test_settings_of_today_are_left_as_they_are():
    now = dataclasses.asdict(RewardGradientConfig(method="draft_lv", method_kwargs={"num_draws": 3}))
    assert translate_old_settings(now) == (now, "", [])


def test_a_run_of_an_earlier_version_is_read_with_todays_names(run):
    text = (run / "config.yaml").read_text().replace("rollout_reuse: 1", "rollout_uses: 3\nnum_draws: 2")
    (run / "config.yaml").write_text(text)
    assert read_settings(run)["rollout_reuse"] == 3
    assert not {"rollout_uses", "num_draws"} & read_settings(run).keys()
    assert parse_config(["--resume_from_checkpoint", str(run / "checkpoints" / "step-3")], run).rollout_reuse == 3
