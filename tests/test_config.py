"""Settings from YAML and flags; what is misspelt or of the wrong kind is named with its cure."""

import dataclasses

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
        ("max_steps: 2.5", "max_steps: got 2.5, expected int"),
        ("max_steps: many", "invalid int value: 'many'"),
        ("reward_weights: [1, x]", r"reward_weights: got \[1, 'x'\], expected list\[float\] or none"),
        ("reward_kwargs: {clip_score: 3}", "expected a mapping {name: {argument: value}}"),
        ("reward_caps: {aesthetic: high}", "reward_caps: .* expected a mapping {name: number} or none"),
        ("dry_run: 3", "dry_run: got 3, expected bool"),
        ("- a list", "expected lines of the form 'key: value'"),
        ("a: [1", "is not YAML"),
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
