"""The adapter that a run has trained: its result, or a checkpoint of one that was interrupted."""

from dataclasses import dataclass
from pathlib import Path

from rlhf.adapter.lora_file import refuse_trained_blocks
from rlhf.adapter.lora_weights import ADAPTER_FILE
from rlhf.io import run_of_checkpoint
from rlhf.report.data import Run
from rlhf.run.checkpoint import damage, newest_undamaged_checkpoint, read_state


@dataclass(frozen=True)
class Trained:
    """A trained adapter and its run. step: of a checkpoint; None for a finished run's result."""

    run: Path
    adapter: Path
    step: int | None = None

    @property
    def origin(self) -> str:
        """Return in words which adapter it is, and of which step."""
        run = Run(self.run)
        step = f"step {run.exported_step if self.step is None else self.step} of {run.config.get('max_steps')}"
        return f"{self.adapter}, {step}" + ", the result of the run" * (self.step is None)


def find_run(path: Path) -> tuple[Path, Path | None]:
    """Return a run's folder and no checkpoint, or a checkpoint with the folder of its run.

    Raises ValueError for neither, and for a damaged checkpoint.
    """
    run, checkpoint = path, None
    if (path / "state.json").is_file():
        run, checkpoint = run_of_checkpoint(path), path
        if wrong := damage(path):
            raise ValueError(f"{path}: {wrong}, expected a whole checkpoint; name another")
    if not (run / "config.yaml").is_file():
        expected = "expected the folder of a training run, or a checkpoint within it"
        raise ValueError(f"{run / 'config.yaml'}: got no file there, {expected}; correct {path}")
    return run, checkpoint


def find_trained(path: Path) -> Trained:
    """Return a checkpoint, or a run's result, or the newest checkpoint of an interrupted run.

    Raises ValueError as `find_run`, and if nothing was trained.
    """
    run, checkpoint = find_run(path)
    adapter = run / "adapter" / ADAPTER_FILE
    if checkpoint is None and not (adapter.is_file() and Run(run).is_finished):
        checkpoint = newest_undamaged_checkpoint(run / "checkpoints")
    if checkpoint is not None:
        return Trained(run, checkpoint, read_state(checkpoint)["step"])
    refuse_trained_blocks(adapter.parent)
    if not adapter.is_file():
        raise ValueError(f"{adapter}: got no file there, nor a whole checkpoint, expected either; train first")
    return Trained(run, adapter)
