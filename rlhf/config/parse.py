"""Read settings from a YAML file and flags."""

import argparse
import copy
import logging
import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf.config.coerce import coerce_all
from rlhf.config.older import translate_old_settings
from rlhf.config.settings import (
    ConfigError,
    RewardGradientConfig,
    coerce_settings,
    field_names,
    range_problems,
    range_text,
    setting,
    unknown_setting,
)
from rlhf.io import CONTENT_ERRORS, load_yaml, run_of_checkpoint

logger = logging.getLogger(__name__)

CONFIGS = Path(__file__).parent / "recipes"  # in a clone a link to configs/


@dataclass
class CommandFlags:
    """Flags of the train command that are no settings of a run."""

    dry_run: bool = setting(False, "Check and print the settings and what they need; load no weights.")
    memory_limit_gib: float | None = setting(
        None, "Memory in GiB of the accelerator that the dry run plans for. Default: what this machine's has.", above=0
    )
    plan_device: str | None = setting(
        None, "Device that the dry run predicts time for, such as 'NVIDIA H200'. Default: this machine's."
    )
    plan_processes: int | None = setting(
        None, "Processes that the dry run plans for, one a device. Default: those that were started.", least=1
    )

    def __post_init__(self):
        coerce_settings(self)
        if problems := list(range_problems(self)):
            raise ConfigError(problems)


def parse_config(argv: list[str], default_config: str | Path | None = None) -> RewardGradientConfig:
    """Parse arguments as `parse_command` does and return only the settings."""
    return parse_command(argv, default_config)[0]


def parse_command(
    argv: list[str], default_config: str | Path | None = None
) -> tuple[RewardGradientConfig, CommandFlags]:
    """Read `--config FILE` and flags: a flag beats the file, the file the default.

    FILE may be the name of a shipped recipe, such as nano_long, where there is no file of
    that name; without --config it is default_config. With resume_from_checkpoint and no --config,
    the run's own config.yaml is read. The file's method_kwargs are those of its method: a flag for
    another method leaves them out. Settings of an earlier version are translated, and a warning
    says so. Raises ConfigError with every problem; a misspelt key is named with its nearest
    neighbour.
    """
    given, argv = take_flags(argv, "config")
    source, own = given.config, None
    if source is None and default_config is not None:
        own = _config_of_run(argv, Path(default_config))
        source, argv = own or default_config, ["--overwrite_output_dir", "false"] * bool(own) + argv
    path = None if source is None else _find_config(source)
    values, problems = _read_file(path, quiet=own is not None) if path else ({}, [])
    if (method := take_flags(argv, "method")[0].method) and method != values.get("method"):
        values.pop("method_kwargs", None)
    parsed: dict[type, Any] = {}
    try:
        given, unknown = _parse_flags(argv, values)
        problems += map(_unknown_word, unknown)
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if given["base_dir"] is None and path is not None:
        given["base_dir"] = str(path.parent)
    for kind in (RewardGradientConfig, CommandFlags):
        try:
            parsed[kind] = kind(**{name: given[name] for name in typing.get_type_hints(kind)})
        except ConfigError as error:
            problems += error.problems
    args, flags = parsed.get(RewardGradientConfig), parsed.get(CommandFlags)
    if problems:
        raise ConfigError(problems + (list(range_problems(args)) if args else []))
    return args, flags


def _parse_flags(argv: list[str], defaults: dict) -> tuple[dict[str, Any], list[str]]:
    """Parse argv by TRL's parser, on top of the defaults.

    Returns all settings and flags, uncast text where argv has them; and the unknown words.
    """
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message):  # argparse would print the whole usage and exit
            raise ConfigError([f"{message}; correct the flag, `train_rlhf.py --help` says what each takes"])

        @staticmethod
        def _parse_dataclass_field(parser, field):
            field, limits = copy.copy(field), range_text(field)
            field.metadata = {"help": field.metadata["help"] + (f" Range: {limits}." if limits else "")}
            TrlParser._parse_dataclass_field(parser, field)
            action = parser._option_string_actions[f"--{field.name}"]
            if action.choices:
                action.metavar = f"{{{','.join(map(str, action.choices))}}}"
            action.type = action.choices = None  # the dataclass casts, and finds all problems at once

    parser = Parser(
        [RewardGradientConfig, CommandFlags],
        prog="train_rlhf.py",
        usage="%(prog)s [--config FILE_OR_RECIPE] [--SETTING VALUE ...]",
        description="Defaults are those of the file or recipe, without --config those of nano.yaml.",
        allow_abbrev=False,
    )
    parser.set_defaults_with_config(**defaults)
    given, rest = parser.parse_known_args(argv)
    return vars(given), [word for word in rest if word.startswith("--")] or rest  # a value follows its flag


def take_flags(argv: list[str], *names: str) -> tuple[argparse.Namespace, list[str]]:
    """Return the values of these flags, "" for a flag without one; and the other words of argv."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?", const="")
    return parser.parse_known_args(argv)


def _config_of_run(argv: list[str], default_config: Path) -> Path | None:
    """Return the config.yaml of the run that argv resumes; None if it resumes none."""
    given, _ = take_flags(argv, "output_dir", "resume_from_checkpoint")
    checkpoint = given.resume_from_checkpoint
    if not checkpoint or checkpoint in ("none", "auto"):  # auto is for commands that may start a run, too
        return None
    if checkpoint == "latest":
        run = given.output_dir or yaml.safe_load(default_config.read_text(encoding="utf-8"))["output_dir"]
        run = Path(run).expanduser()
    else:
        run = run_of_checkpoint(checkpoint)
    return run / "config.yaml" if (run / "config.yaml").is_file() else None


def _find_config(source: str | Path) -> Path:
    """Return the path of a config file, or of the shipped recipe of this name."""
    path, shipped = Path(source), CONFIGS / f"{source}.yaml"
    if source and not path.exists() and shipped.is_file():
        return shipped
    if not path.is_file():
        got = f"{path}, which is not a file" if source else "no path"
        expected = "expected a YAML file such as configs/nano.yaml, or the name of a shipped one"
        raise ConfigError([f"--config: got {got}; {expected}; correct the path"])
    return path


def _read_file(path: Path, quiet: bool) -> tuple[dict, list[str]]:
    """Return the values of a config file, in today's form, and what is wrong with them.

    quiet: do not warn of settings of an earlier version, for the resumed run will name them.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: got {error.reason}, expected UTF-8; save it as UTF-8"]) from None
    try:
        values, tree = load_yaml(text), yaml.compose(text, yaml.SafeLoader)
    except CONTENT_ERRORS as error:  # such as ValueError, of a date that does not exist
        reason = " ".join(str(error).split())[:300]
        raise ConfigError([f"{path} is not YAML: {reason}; correct that line"]) from None
    if not isinstance(values, dict):
        got = "an empty file" if values is None else type(values).__name__
        raise ConfigError([f"{path}: got {got}, expected lines of the form 'key: value'; correct the file"])
    values, moved, gone = translate_old_settings(values)
    if moved and not gone and not quiet and os.environ.get("RANK", "0") == "0":
        logger.warning(f"{path}: {moved}")
    known = {key: value for key, value in values.items() if key in field_names()}
    right, wrong = coerce_all(known, typing.get_type_hints(RewardGradientConfig))
    problems = [_unknown_key(key, value, path) for key, value in values.items() if key not in known]
    problems += [f"{path.name}: {problem}" for problem in gone or wrong]
    return right, problems + _repeated_keys(path, tree)


def _unknown_key(key, value, path: Path) -> str:
    """Return the problem of a config file's key: a section, or an unknown setting."""
    if key == "env":  # of TRL's files; a resumed run would not have it
        cure = "set environment variables where the command starts"
        return f"{path.name}: key env: got {value!r}, expected settings alone; {cure}"
    if isinstance(value, dict):
        cure = "write what is in it at the left margin"
        return f"{path.name}: key {key}: got a section, expected settings without sections; {cure}"
    return unknown_setting(str(key), f"{path.name}: key ")


def _repeated_keys(path: Path, node: yaml.Node, section: str = "") -> list[str]:
    """Return a problem for each key that is given twice, at any depth. YAML would keep the last."""
    problems, lines = [], {}
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        name = f"{section}{key.value}"
        lines.setdefault(name, []).append(str(key.start_mark.line + 1))
        problems += _repeated_keys(path, value, f"{name}.")
    for name, at in lines.items():
        if len(at) > 1:
            got = f"got it in lines {' and '.join(at)}"
            problems.append(f"{path.name}: key {name}: {got}, expected it once; leave one out")
    return problems


def _unknown_word(word: str) -> str:
    """Return the problem of a word of the command line: an unknown flag, or a value without one."""
    if word.startswith("--"):
        return unknown_setting(word[2:], "flag --")
    cure = f"did you mean --config {word}?" if word.endswith((".yaml", ".yml")) else "name the setting before its value"
    return f"got {word!r} without a flag, expected --KEY VALUE; {cure}"
