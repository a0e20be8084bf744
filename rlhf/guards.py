"""Whether a run learns to please its reward or to make better videos: gains, the gap between them, and when to stop."""

from dataclasses import dataclass

from rewards.mix import has_spread
from rlhf.config import RewardGradientConfig
from rlhf.evaluate import Evaluation


def gain(name: str, base: Evaluation, tuned: Evaluation) -> float | None:
    """How far a judge's mean rose, in units of the spread of the base's scores over prompts.

    None for no spread but float32's rounding.
    """
    before = base.scores[name].double()
    return ((tuned.scores[name].double().mean() - before.mean()) / before.std()).item() if has_spread(before) else None


def gains(base: Evaluation, tuned: Evaluation, trained: dict[str, float], held_out: list[str]) -> dict[str, float]:
    """gain_trained, gain_held_out and hacking_gap, their difference; what cannot be told is left out.

    trained: the weight of each reward that is trained on, for their weighted mean; held_out: judges that are not.
    """
    pairs = [(weight, gain(name, base, tuned)) for name, weight in trained.items() if weight]
    pairs = [(weight, value) for weight, value in pairs if value is not None]
    others = [value for name in held_out if (value := gain(name, base, tuned)) is not None]
    found = {}
    if pairs:
        found["gain_trained"] = sum(w * value for w, value in pairs) / sum(abs(w) for w, _ in pairs)
    if others:
        found["gain_held_out"] = sum(others) / len(others)
    if len(found) == 2:
        found["hacking_gap"] = found["gain_trained"] - found["gain_held_out"]
    return found


@dataclass
class Guard:
    """Follows the held-out gain over a run's evaluations; the base, with gain 0, is the first of them."""

    patience: int  # evaluations without a better gain after which the run should stop; 0: never
    best_gain: float = 0.0
    best_step: int = 0
    worse: int = 0  # evaluations since the best

    @classmethod
    def of(cls, args: RewardGradientConfig) -> "Guard | None":
        """The guard of a run, None where no reward is held out or nothing is evaluated on the way."""
        if not (args.eval_steps and args.eval_reward_funcs):
            return None
        return cls(args.early_stopping_patience)

    def is_best(self, step: int, found: dict[str, float]) -> bool:
        """Take note of the gains after a step; whether the held-out one is the best so far."""
        better = found.get("gain_held_out", 0.0) > self.best_gain
        if better:
            self.best_gain, self.best_step = found["gain_held_out"], step
        self.worse = 0 if better else self.worse + 1
        return better

    @property
    def stop(self) -> bool:
        """Whether the held-out gain has not risen for as long as the run has patience."""
        return self.patience > 0 and self.worse >= self.patience
