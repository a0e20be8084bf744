"""Run `train_rlhf.py` for bench/recipes.py; note when its stages begin and the device's memory."""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path

NOTES, LIMIT = "RECIPE_NOTES", "RECIPE_LIMIT_GIB"  # variables: file that is written; device memory
GIB, PERIOD = 2**30, 0.05  # seconds between two looks at the memory
SAMPLING = "evaluation before"  # the stage that follows the set-up


class RandomWeights:
    """A built-in reward with random weights, in place of its published file."""

    def __new__(cls, reward: str, **settings) -> Callable:
        """Return the reward, built on this process's device."""
        import torch

        from rewards.load import import_built_in
        from rlhf.device import local_device

        with torch.device(local_device()):
            built_in = import_built_in(reward)
            return getattr(built_in, "random_init", built_in)(**settings)


def note_stages() -> None:
    """Have the functions that begin a stage note it."""
    import rlhf.training.rewards
    import rlhf.training.setup as setup

    note_calls(rlhf.training.rewards, "open_rewards", "rewards")
    note_calls(setup, "find_base", "trainer")
    note_calls(setup, "encode", "text encoders")
    note_calls(setup, "load_base", "transformer and VAE")
    note_calls(setup, "prepare_model", "adapter and blocks")
    note_calls(setup, "make_fields", "rest of the set-up")
    from rlhf.trainer import RewardGradientTrainer

    note_calls(RewardGradientTrainer, "train", SAMPLING)
    note_calls(RewardGradientTrainer, "step", "step")
    note_calls(RewardGradientTrainer, "_save", "checkpoint and evaluation after")


def note_calls(owner: object, name: str, stage: str) -> None:
    """Have a function note that its stage begins."""
    function: Callable = getattr(owner, name)

    @wraps(function)
    def noted(*args, **kwargs):
        note(stage)
        return function(*args, **kwargs)

    setattr(owner, name, noted)


def note(stage: str, **more) -> None:
    """Add a line to the file of notes."""
    with Path(os.environ[NOTES]).open("a") as file:
        file.write(json.dumps({"stage": stage, "time": time.time()} | more) + "\n")


def watch_driver(peak: list[int], ended: threading.Event) -> None:
    """Keep the largest bytes in use on the first device, as its driver counts them."""
    import torch

    module = torch.get_device_module()
    while not ended.wait(PERIOD):
        if module.is_initialized():
            free, total = module.mem_get_info(0)
            peak[0] = max(peak[0], total - free)


def main() -> int:
    """Run the command with this process's flags; the first process of a host writes the notes."""
    import torch

    from rlhf import train
    from rlhf.device import local_device, peak_memory, total_memory
    from rlhf.planner.sampling import context_bytes

    has_device, peak = torch.accelerator.is_available(), [0]
    if has_device and (limit := float(os.environ[LIMIT])):
        device = local_device()
        share = (limit * GIB - context_bytes(device)) / total_memory(device)
        torch.get_device_module(device).set_per_process_memory_fraction(share, device.index or 0)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        return train.main()
    note_stages()
    ended = threading.Event()
    watch = threading.Thread(target=watch_driver, args=(peak, ended))
    if has_device:
        watch.start()
    try:
        status = train.main()
    finally:  # a thread inside the driver's library at the interpreter's end aborts the process
        ended.set()
        if has_device:
            watch.join()
    note("end", driver_gib=peak[0] / GIB, allocated_gib=peak_memory(local_device()) / GIB if has_device else 0.0)
    return status


if __name__ == "__main__":
    sys.exit(main())
