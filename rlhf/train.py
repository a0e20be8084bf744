"""Train a generator by reward gradient: the command behind train_rlhf.py and `contentv-rlhf`.

    contentv-rlhf [--config FILE] [--any_key value]
    accelerate launch -m rlhf.train [--config FILE] [--any_key value]     on several devices

Without --config it runs nano.yaml, the main job. The exit status is 2 for settings that cannot
work, 1 if training cannot go on and 130 after Ctrl-C or SIGTERM, each with one paragraph that says
what to do.
"""

import dataclasses
import errno
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.config.parse import CONFIGS, CommandFlags, parse_command, take_flags
from rlhf.distributed.launch import end_with_launcher
from rlhf.run.signals import notice_ctrl_c

EXIT_FAILED, EXIT_SETTINGS, EXIT_INTERRUPTED = 1, 2, 130  # 130: a shell's status of Ctrl-C
WRONG_PATH = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK = (*FULL, errno.EIO, errno.EROFS)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status. argv: default: the process's."""
    end_with_launcher()
    try:
        with notice_ctrl_c() as insist:
            return _run(argv, insist)
    except KeyboardInterrupt:
        return _fail("train_rlhf: interrupted before the training began; nothing was lost.", EXIT_INTERRUPTED)


def _run(argv: list[str] | None, insist: Callable[[], None]) -> int:
    """Parse and check the command, then train or print the plan; return the exit status."""
    try:
        args, flags = parse_command(sys.argv[1:] if argv is None else argv, CONFIGS / "nano.yaml")
        from rlhf.checks import check_config
        from rlhf.distributed.layout import planned_processes

        processes = planned_processes(args, flags.plan_processes) if flags.dry_run else None
        if flags.dry_run and args.vae_dtype == "auto":
            from rlhf.planner.text import plans_accelerator

            if plans_accelerator(args, flags.memory_limit_gib, flags.plan_device):
                args = dataclasses.replace(args, vae_dtype="float32")  # as a GPU chooses, whatever this CPU has
        # Before importing the trainer, which takes seconds.
        args = check_config(args, planned_processes=processes)
        if flags.dry_run:
            return dry_run(args, flags, processes)
    except ConfigError as error:
        return _fail(f"train_rlhf: {error}", EXIT_SETTINGS)
    except OSError as error:  # missing rights, or a prompt in place of a path
        return _fail(f"train_rlhf: {_explain_os_error(error)}", EXIT_SETTINGS)
    insist()
    return train(args, insist)


def dry_run(args: RewardGradientConfig, flags: CommandFlags, processes: int) -> int:
    """Print the resolved settings and what a run on these processes needs; return 0."""
    from rlhf.planner.text import plan_report

    text = plan_report(args, flags.memory_limit_gib, flags.plan_device, processes)
    if os.environ.get("RANK", "0") == "0":  # one of those that were started is enough
        print(text)
    return 0


def train(args: RewardGradientConfig, insist: Callable[[], None] = lambda: None) -> int:
    """Train with checked settings, explain an error in a paragraph and return the exit status.

    insist: of `notice_ctrl_c`, called before the training begins.
    """
    from rewards import RewardError
    from rlhf.training.rewards import open_rewards

    try:
        rewards = open_rewards(args)  # before importing the trainer, too
    except ConfigError as error:  # of what method auto became
        return _fail(f"train_rlhf: {error}", EXIT_SETTINGS)
    except RewardError as error:
        return _fail(f"train_rlhf: {error}", EXIT_FAILED)

    from rlhf.io import DamagedFileError
    from rlhf.run.checkpoint import SavingError
    from rlhf.trainer import RewardGradientTrainer
    from rlhf.training.failures import TrainingError, out_of_memory

    try:
        trainer = RewardGradientTrainer(args=args, opened_rewards=rewards)
        insist()
        trainer.train()
        trainer.accelerator.end_training()
        return 0
    except ConfigError as error:
        return _fail(f"train_rlhf: {error}", EXIT_SETTINGS)
    except (RewardError, TrainingError, SavingError, DamagedFileError) as error:
        explained, status = str(error), EXIT_FAILED
    except OSError as error:
        if error.errno in WRONG_PATH or (error.filename is None and error.errno not in DISK):
            raise
        explained, status = _explain_os_error(error), EXIT_FAILED
    except (RuntimeError, MemoryError) as error:
        if not (explained := out_of_memory(error)):
            raise
        status = EXIT_FAILED
    except KeyboardInterrupt:
        explained, status = "interrupted.", EXIT_INTERRUPTED
    return _fail(f"train_rlhf: {explained.removesuffix('.')}.{resume_hint(args)}", status)


def resume_hint(args: RewardGradientConfig) -> str:
    """Return where the run's last good state is, and the command that resumes; "" for none."""
    from rlhf.run.checkpoint import newest_undamaged_checkpoint

    try:
        saved = newest_undamaged_checkpoint(Path(args.output_dir) / "checkpoints")
    except OSError:
        saved = None
    if saved is None:
        return ""
    _, given = take_flags(sys.argv[1:], "overwrite_output_dir", "resume_from_checkpoint")
    flags = ["--overwrite_output_dir", "false"] * args.overwrite_output_dir + ["--resume_from_checkpoint", "latest"]
    script = ["-m", "rlhf.train"] if Path(sys.argv[0]).resolve() == Path(__file__) else sys.argv[:1]
    command = shlex.join([*script, *given, *flags])
    return f" The last good state is {saved}; go on with\n  accelerate launch {command}"


def _explain_os_error(error: OSError) -> str:
    """Return got, expected and cure of a path that is wrong, or of a disk that does not answer."""
    if error.errno in WRONG_PATH:
        return f"got {error}, expected a path that can be read; correct the setting that names it, or the rights"
    if error.errno in FULL:
        return f"got {error}, expected room on the run's disk. Nothing was removed; free some, then go on."
    return f"got {error}, expected a disk that answers. Nothing was removed; see to it, and start the command again"


def _fail(text: str, code: int) -> int:
    """Print an error to stderr, an interruption on the first process only; return the status."""
    if code != EXIT_INTERRUPTED or os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
