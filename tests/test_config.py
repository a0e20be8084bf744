"""Settings from YAML and flags; what is misspelt or of the wrong kind is named with its cure."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from rlhf.config import ConfigError, RewardGradientConfig, field_names
from rlhf.parse import parse_config


@pytest.fixture
def yaml_file(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_a_flag_beats_the_file_and_the_file_the_default(yaml_file):
    path = yaml_file("learning_rate: 1e-5\nmax_steps: 7\nreward_funcs: [a, b]\n")
    args = parse_config(["--config", path, "--max_steps", "9", "--reward_weights", "1", "0.5", "--dry_run"])
    assert (args.learning_rate, args.max_steps, args.seed) == (1e-5, 9, 0)
    assert args.reward_funcs == ["a", "b"]
    assert args.reward_weights == [1.0, 0.5]
    assert args.dry_run is True
    assert args.gradient_checkpointing is False


def test_the_default_file_holds_without_config_and_config_may_have_an_equals_sign(yaml_file):
    path = yaml_file("max_steps: 7")
    assert parse_config(["--seed", "3"], default_config=path).max_steps == 7
    assert parse_config([f"--config={path}"]).max_steps == 7


def test_a_seed_may_be_any_number_of_64_bits(yaml_file):
    """Longer than what a float can hold."""
    for seed in (2**53 + 1, 2**64 - 1, -(2**63)):
        path = yaml_file(f"seed: {seed}\n")
        assert parse_config(["--config", str(path)]).seed == seed == parse_config(["--seed", str(seed)]).seed


def test_paths_are_relative_to_the_config_file(yaml_file, tmp_path):
    assert parse_config(["--config", yaml_file("seed: 1")]).base_dir == str(tmp_path)
    assert parse_config([]).base_dir is None


def test_reward_kwargs_come_as_a_mapping_or_as_json(yaml_file):
    path = yaml_file("reward_kwargs:\n  clip_score: {model: ViT-B-32, frames: 2}")
    expected = {"clip_score": {"model": "ViT-B-32", "frames": 2}}
    assert parse_config(["--config", path]).reward_kwargs == expected
    assert (
        parse_config(["--reward_kwargs", '{"clip_score": {"model": "ViT-B-32", "frames": 2}}']).reward_kwargs
        == expected
    )


def test_caps_and_targets_come_as_a_mapping_or_as_json(yaml_file):
    path = yaml_file("reward_caps: {aesthetic: 7, clip_score: 3e-1}")
    args = parse_config(["--config", path, "--reward_targets", '{"flicker": 0.9}'])
    assert args.reward_caps == {"aesthetic": 7.0, "clip_score": 0.3}
    assert args.reward_targets == {"flicker": 0.9}
    assert parse_config(["--config", yaml_file(args.to_yaml())]).reward_targets == {"flicker": 0.9}


def test_a_flag_may_be_a_mapping_as_yaml_writes_it():
    assert parse_config(["--reward_caps", "{nano_preference: 0.3}"]).reward_caps == {"nano_preference": 0.3}
    inner = parse_config(["--reward_kwargs", '{"a": {"eps": 1e-5}}']).reward_kwargs["a"]["eps"]
    assert inner == 1e-5, "YAML would take this number for text"


@pytest.fixture
def run(tmp_path):
    """A run's folder as it stands after a start by `--config mine.yaml --overwrite_output_dir`."""
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


def test_misspelt_keys_name_their_nearest_neighbour_all_at_once(yaml_file):
    path = yaml_file("learing_rate: 1\nmax_step: 2")
    with pytest.raises(ConfigError) as caught:
        parse_config(["--config", path, "--lora-rnk", "3", "--height", "64"])
    told = str(caught.value)
    assert len(caught.value.problems) == 3
    for wrong, right in (("learing_rate", "learning_rate"), ("max_step", "max_steps"), ("lora-rnk", "lora_rank")):
        assert f"{wrong}: no such setting; did you mean {right!r}?" in told
    with pytest.raises(ConfigError, match="--help"):
        parse_config(["--zzzz", "1"])


def test_no_setting_may_be_abbreviated():
    with pytest.raises(ConfigError, match="'learning_rate'"):
        parse_config(["--learning", "1"])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max_steps: 2.5", "max_steps: got 2.5, expected a whole number"),
        ("max_steps: many", "settings.yaml: max_steps: got 'many', expected a whole number"),
        ("reward_weights: [1, x]", r"reward_weights: got \[1, 'x'\], expected a list, each a number or none"),
        ("reward_kwargs: {clip_score: 3}", "expected a mapping {name: {argument: value}}"),
        ("reward_caps: {aesthetic: high}", "reward_caps: .* expected a mapping {name: number} or none"),
        ("dry_run: 3", "dry_run: got 3, expected true or false"),
        ("- a list", "expected lines of the form 'key: value'"),
        ("a: [1", "is not YAML"),
        ("# nothing", "got an empty file, expected lines"),
        ("training:\n  seed: 1", "key training: got a section, expected settings without sections"),
        ("seed: 1\nmax_steps: 2\nseed: 3", "key seed: got it in lines 1 and 3, expected it once"),
    ],
)
def test_values_of_the_wrong_kind_are_told(yaml_file, text, told):
    with pytest.raises(ConfigError, match=told):
        parse_config(["--config", yaml_file(text)])


@pytest.mark.parametrize("argv", [["--config"], ["--config", "absent.yaml"]])
def test_an_absent_config_file_is_told(argv):
    with pytest.raises(ConfigError, match="expected a YAML file such as configs/nano.yaml"):
        parse_config(argv)


def test_every_setting_has_a_help_text_that_ends_in_a_full_stop():
    for f in dataclasses.fields(RewardGradientConfig):
        assert f.metadata["help"].endswith((".", "none.")), f.name
    assert len(field_names()) == len(set(field_names()))
