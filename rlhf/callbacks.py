"""Callbacks of the training loop: transformers' own classes for them, for what they see and for what they decide."""

from collections.abc import Callable

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from rlhf.config import RewardGradientConfig
from rlhf.parallel import any_process

# (event, and what it is told besides args, state, control, model and optimizer) -> None
Tell = Callable[..., None]


class Callbacks:
    """The listeners of a run, on each process, in the order given. docs/watching.md says when each event comes.

    model, optimizer: what every event hands over by these names, besides the settings, `state` and `control`.
    """

    def __init__(
        self,
        listeners: list[TrainerCallback | type[TrainerCallback]] | None,
        args: RewardGradientConfig,
        accelerator,
        model: torch.nn.Module | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ):
        self.listeners = [listener() if isinstance(listener, type) else listener for listener in listeners or []]
        self.args, self.accelerator = args, accelerator
        self.told = {"model": model, "optimizer": optimizer}
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

    def tell(self, event: str, **more) -> None:
        """Call the method `event` of each listener; one that returns a control replaces the one there was."""
        for listener in self.listeners:
            found = getattr(listener, event)(self.args, self.state, self.control, **self.told, **more)
            self.control = found or self.control

    def step_begins(self) -> None:
        """A new optimizer step: what was decided in the last one is done."""
        control = self.control
        control.should_log = control.should_evaluate = control.should_save = False
        self.tell("on_step_begin")

    def step_ends(self, done: int, epoch: float) -> None:
        """Optimizer step number `done`, from 1, is over, at this epoch."""
        self.state.global_step, self.state.epoch = done, epoch
        self.tell("on_step_end")

    def logged(self, metrics: dict) -> None:
        """The metrics of a step went to the log."""
        self.state.log_history.append(metrics)
        self.tell("on_log", logs=dict(metrics))  # listeners of transformers take things out of it

    def asked(self, what: str) -> bool:
        """Whether a listener of any process decided to "evaluate", to "save" or on "training_stop"; all get to know."""
        return any_process(self.accelerator, getattr(self.control, f"should_{what}"))
