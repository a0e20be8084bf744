"""Train ContentV by reward gradient: the command train_rlhf.py and, installed, `contentv-rlhf`.

    contentv-rlhf [--config FILE] [--any_key value]
    accelerate launch -m rlhf.train [--config FILE] [--any_key value]     on several devices

Without --config it runs nano.yaml, the main job. Exit status: 2 for settings that cannot work, 1
when training fails and 130 after Ctrl-C or SIGTERM, each with one paragraph that says what to do.
"""

import os
import shlex
import sys
from pathlib import Path

from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.parse import CONFIGS, CommandFlags, parse_command

EXIT_FAILED, EXIT_SETTINGS, EXIT_INTERRUPTED = 1, 2, 130  # the last is what a shell says of Ctrl-C


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status. argv: Default: the words of the process."""
    try:
        args, flags = parse_command(sys.argv[1:] if argv is None else argv, CONFIGS / "nano.yaml")
        from rlhf.checks import check_config
        from rlhf.layout import planned_processes

        processes = planned_processes(args, flags.plan_processes) if flags.dry_run else None
        args = check_config(args, planned_processes=processes)  # before the seconds that importing the trainer takes
        if flags.dry_run:
            return dry_run(args, flags, processes)
    except ConfigError as error:
        return _tell(f"train_rlhf: {error}", EXIT_SETTINGS)
    except OSError as error:  # rights, or a prompt where a path belongs
        cure = "correct the setting that names it, or the rights"
        return _tell(f"train_rlhf: got {error}, expected a path that can be read; {cure}", EXIT_SETTINGS)
    return train(args)


def dry_run(args: RewardGradientConfig, flags: CommandFlags, processes: int) -> int:
    """Print the resolved settings and what a run on these processes needs; return the exit status.

    Raises ConfigError for a device whose rates are not known.
    """
    from rlhf.planner_text import plan_report

    text = plan_report(args, flags.memory_limit_gib, flags.plan_device, processes)
    if os.environ.get("RANK", "0") == "0":  # one of those that were started is enough
        print(text)
    return 0


def train(args: RewardGradientConfig) -> int:
    """Train with checked settings, print errors as a paragraph, and return the exit status."""
    from rewards import RewardError
    from rlhf.setup import open_rewards

    try:
        rewards = open_rewards(args)  # a reward that cannot train should not wait for the trainer either
    except RewardError as error:
        return _tell(f"train_rlhf: {error}", EXIT_FAILED)

    from rlhf.checkpoint import SavingError, last_whole
    from rlhf.failures import TrainingError, out_of_memory
    from rlhf.reading import DamagedFileError
    from rlhf.trainer import RewardGradientTrainer

    try:
        trainer = RewardGradientTrainer(args=args, opened_rewards=rewards)
        trainer.train()
        trainer.accelerator.end_training()
        return 0
    except ConfigError as error:
        return _tell(f"train_rlhf: {error}", EXIT_SETTINGS)
    except (RewardError, TrainingError, SavingError, DamagedFileError) as error:
        return _tell(f"train_rlhf: {error}{_resume_hint(args, last_whole)}", EXIT_FAILED)
    except (RuntimeError, MemoryError) as error:
        if (told := out_of_memory(error)) is None:
            raise
        return _tell(f"train_rlhf: {told}{_resume_hint(args, last_whole)}", EXIT_FAILED)
    except KeyboardInterrupt:
        return _tell(f"train_rlhf: interrupted.{_resume_hint(args, last_whole)}", EXIT_INTERRUPTED)


def _resume_hint(args: RewardGradientConfig, last_whole) -> str:
    if (saved := last_whole(Path(args.output_dir) / "checkpoints")) is None:
        return ""
    # The last flag of a kind counts, so that those given may stay.
    flags = ["--overwrite_output_dir", "false"] * args.overwrite_output_dir + ["--resume_from_checkpoint", "latest"]
    script = ["-m", "rlhf.train"] if Path(sys.argv[0]).resolve() == Path(__file__) else sys.argv[:1]
    command = shlex.join([*script, *sys.argv[1:], *flags])
    return f" The last good state is {saved}; go on with\n  accelerate launch {command}"


def _tell(text: str, code: int) -> int:
    print(text, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
