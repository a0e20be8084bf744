"""Settings from a YAML file and flags."""

import difflib
from pathlib import Path

import yaml

from rlhf.config import ConfigError, RewardGradientConfig, field_names

CONFIGS = Path(__file__).parent / "configs"  # the shipped ones; in a clone the folder configs/


def parse_config(argv: list[str], default_config: str | Path | None = None) -> RewardGradientConfig:
    """Settings from `--config FILE` (default: default_config) and flags; a flag beats the file, the file the default.

    FILE may be the name of a shipped one, such as contentv_8b_hps, where there is no file of that name. Raises
    ConfigError naming every misspelt key with its nearest neighbour.
    """
    argv = _split_equals(argv)
    if "--config" not in argv and default_config is not None:
        argv = ["--config", str(default_config), *argv]
    path = _config_path(argv)
    if path is not None:
        argv = [str(path) if before == "--config" else word for before, word in zip(["", *argv], argv, strict=False)]
    problems = _unknown_keys(path)
    try:
        args, unknown_flags = _parse(argv, without_config=bool(problems))
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    problems += [_unknown(flag, "flag --") for flag in unknown_flags]
    if problems:
        raise ConfigError(problems)
    if args.base_dir is None and path is not None:
        args.base_dir = str(path.parent.resolve())
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
    return args, [text[2:] for text in rest if text.startswith("--")] or rest


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


def _unknown_keys(path: Path | None) -> list[str]:
    if path is None:
        return []
    try:
        keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError([f"{path} is not YAML: {reason}; correct that line"]) from None
    if not isinstance(keys, dict):
        raise ConfigError(
            [f"{path}: got {type(keys).__name__}, expected lines of the form 'key: value'; correct the file"]
        )
    known = field_names()
    return [_unknown(str(key), f"{path.name}: key ") for key in keys if key not in known and key != "env"]


def _unknown(name: str, where: str) -> str:
    near = difflib.get_close_matches(name.split("=")[0].replace("-", "_"), field_names(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "`train_rlhf.py --help` lists the settings"
    return f"{where}{name}: no such setting; {hint}"
