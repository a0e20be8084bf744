"""Callbacks of the training loop, with the classes of transformers: callback, state and control."""

from collections.abc import Callable

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from rlhf.config import RewardGradientConfig
from rlhf.distributed.accelerator import any_process

Notify = Callable[..., None]  # (event, **more): more is added to what all events receive


class Callbacks:
    """The callbacks of a run, on each process, in order. docs/watching.md lists the events.

    Args:
        listeners: callbacks, or classes of callbacks.
        args: the settings, for every event.
        model, optimizer: passed to every event by these names.
    """

    def __init__(
        self,
        listeners: list[TrainerCallback | type[TrainerCallback]] | None,
        args: RewardGradientConfig,
        accelerator,
        model: torch.nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        self.listeners = [new() if isinstance(new, type) else new for new in listeners or []]
        self.args, self.accelerator = args, accelerator
        self.event_kwargs = {"model": model, "optimizer": optimizer}
        self.control = TrainerControl()
        self.state = TrainerState(
            max_steps=args.max_steps,
            logging_steps=1,
            eval_steps=args.eval_steps,
            save_steps=args.save_steps,
            train_batch_size=args.per_device_train_batch_size,
            is_local_process_zero=accelerator.is_local_main_process,
            is_world_process_zero=accelerator.is_main_process,
        )

    def notify(self, event: str, **more) -> None:
        """Call the method `event` of each listener; a returned control replaces `self.control`."""
        for listener in self.listeners:
            method, kwargs = getattr(listener, event), self.event_kwargs | more
            self.control = method(self.args, self.state, self.control, **kwargs) or self.control

    def begin_step(self) -> None:
        """Begin an optimizer step, with the requests of the step before cleared."""
        control = self.control
        control.should_log = control.should_evaluate = control.should_save = False
        self.notify("on_step_begin")

    def end_step(self, done: int, epoch: float) -> None:
        """End optimizer step number `done`, from 1, at this epoch."""
        self.state.global_step, self.state.epoch = done, epoch
        self.notify("on_step_end")

    def log(self, metrics: dict) -> None:
        """Pass on the metrics of a step, which were logged."""
        self.state.log_history.append(metrics)
        self.notify("on_log", logs=dict(metrics))  # a copy: transformers' callbacks remove entries

    def is_requested(self, what: str) -> bool:
        """Return whether any process requested "evaluate", "save" or "training_stop"."""
        return any_process(self.accelerator, getattr(self.control, f"should_{what}"))
