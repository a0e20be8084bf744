"""Settings from a YAML file and flags."""

import argparse
import difflib
import typing
from pathlib import Path

import yaml

from rlhf.coerce import coerced
from rlhf.config import ConfigError, RewardGradientConfig, field_names

CONFIGS = Path(__file__).parent / "configs"  # the shipped ones; in a clone the folder configs/


def parse_config(argv: list[str], default_config: str | Path | None = None) -> RewardGradientConfig:
    """Settings from `--config FILE` (default: default_config) and flags; a flag beats the file, the file the default.

    FILE may be the name of a shipped one, such as contentv_8b_hps, where there is no file of that name. Flags that go
    on with a run (resume_from_checkpoint) have its own config.yaml for the default. Raises ConfigError naming every
    misspelt key with its nearest neighbour.
    """
    argv = _split_equals(argv)
    if "--config" not in argv and default_config is not None:
        own = _config_of_run(argv, Path(default_config))
        argv = ["--config", str(default_config), *argv] if own is None else [*own, *argv]
    path = _config_path(argv)
    if path is not None:
        argv = [str(path) if before == "--config" else word for before, word in zip(["", *argv], argv, strict=False)]
    problems = _file_problems(path)
    try:
        args, unknown = _parse(argv, without_config=bool(problems))
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    problems += [_unknown_word(word) for word in unknown]
    if problems:
        raise ConfigError(problems)
    if args.base_dir is None and path is not None:
        args.base_dir = str(path.parent)
    args.base_dir = args.base_dir and str(Path(args.base_dir).resolve())  # config.yaml is read elsewhere, too
    return args


def _parse(argv: list[str], without_config: bool) -> tuple[RewardGradientConfig, list[str]]:
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message):  # argparse would print the whole usage and exit
            raise ConfigError([f"{message}; correct the flag, `train_rlhf.py --help` says what each takes"])

    if without_config:  # its unknown keys are told already; look at the flags alone
        at = argv.index("--config")
        argv = argv[:at] + argv[at + 2 :]
    parser = Parser(RewardGradientConfig, prog="train_rlhf.py", allow_abbrev=False)
    args, rest = parser.parse_args_and_config(argv, return_remaining_strings=True)
    return args, [word for word in rest if word.startswith("--")] or rest  # a value follows its flag


def _config_of_run(argv: list[str], default_config: Path) -> list[str] | None:
    """The flags that name the config.yaml of the run that argv goes on with; None if it goes on with none."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("output_dir", "resume_from_checkpoint"):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", nargs="?")
    given, _ = parser.parse_known_args(argv)
    checkpoint = given.resume_from_checkpoint
    if checkpoint in (None, "none", "auto"):  # auto is for commands that are to start a run, too
        return None
    if checkpoint == "latest":
        run = Path(given.output_dir or yaml.safe_load(default_config.read_text(encoding="utf-8"))["output_dir"])
    else:
        run = Path(checkpoint).resolve().parent.parent
    path = run / "config.yaml"
    return ["--config", str(path), "--overwrite_output_dir", "false"] if path.is_file() else None


def _split_equals(argv: list[str]) -> list[str]:
    """--config=FILE as two words, the only form that TrlParser knows."""
    return [word for text in argv for word in (text.split("=", 1) if text.startswith("--config=") else [text])]


def _config_path(argv: list[str]) -> Path | None:
    if "--config" not in argv:
        return None
    at = argv.index("--config")
    path = Path(argv[at + 1]) if at + 1 < len(argv) else None
    if path is not None and not path.exists() and (shipped := CONFIGS / f"{path}.yaml").is_file():
        return shipped
    if path is None or not path.is_file():
        got = "no path" if path is None else f"{path}, which is not a file"
        expected = "expected a YAML file such as configs/nano.yaml, or the name of a shipped one"
        raise ConfigError([f"--config: got {got}; {expected}; correct the path"])
    return path


def _file_problems(path: Path | None) -> list[str]:
    """What is wrong with the keys and values of a config file, each by itself."""
    if path is None:
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: got {error.reason}, expected UTF-8; save it as UTF-8"]) from None
    try:
        values, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError([f"{path} is not YAML: {reason}; correct that line"]) from None
    if not isinstance(values, dict):
        got = "an empty file" if values is None else type(values).__name__
        raise ConfigError([f"{path}: got {got}, expected lines of the form 'key: value'; correct the file"])
    known = {key: value for key, value in values.items() if key in field_names()}
    problems = [_unknown_key(key, value, path) for key, value in values.items() if key not in {*known, "env"}]
    problems += [
        f"{path.name}: {problem}" for problem in coerced(known, typing.get_type_hints(RewardGradientConfig))[1]
    ]
    return problems + _twice(path, tree)


def _unknown_key(key, value, path: Path) -> str:
    if isinstance(value, dict):
        cure = "write what is in it at the left margin"
        return f"{path.name}: key {key}: got a section, expected settings without sections; {cure}"
    return _unknown(str(key), f"{path.name}: key ")


def _twice(path: Path, tree: yaml.MappingNode) -> list[str]:
    """Keys that a file has more than once, of which YAML would silently take the last."""
    lines = {}
    for key, _ in tree.value:
        lines.setdefault(key.value, []).append(str(key.start_mark.line + 1))
    places = {key: " and ".join(at) for key, at in lines.items() if len(at) > 1}
    return [
        f"{path.name}: key {key}: got it in lines {at}, expected it once; leave one out" for key, at in places.items()
    ]


def _unknown_word(word: str) -> str:
    if word.startswith("--"):
        return _unknown(word[2:], "flag --")
    cure = f"did you mean --config {word}?" if word.endswith((".yaml", ".yml")) else "name the setting before its value"
    return f"got {word!r} without a flag, expected --KEY VALUE; {cure}"


def _unknown(name: str, where: str) -> str:
    near = difflib.get_close_matches(name.split("=")[0].replace("-", "_"), field_names(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "`train_rlhf.py --help` lists the settings"
    return f"{where}{name}: no such setting; {hint}"
