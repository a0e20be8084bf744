"""Check the settings of rewards against each other."""

import difflib
from collections.abc import Callable, Iterator

from rewards import check_spec, reward_name
from rewards.catalogue import CATALOGUE
from rewards.contract import check_frames, split_spec
from rewards.load import resolve_paths
from rlhf.config import ConfigError, RewardGradientConfig
from rlhf.evaluation.measures import MEASURES
from rlhf.method.options import read_options


def problems_raised_by(check: Callable, *arguments) -> list[str]:
    """Return the problems that a check raises as ConfigError or ValueError, [] for none."""
    try:
        check(*arguments)
    except ConfigError as error:
        return error.problems
    except ValueError as error:
        return [str(error)]
    return []


def reward_problems(args: RewardGradientConfig, rewards: list[str | Callable] | None) -> Iterator[str]:
    """Yield rewards that are unknown or named twice, wrong weights and arguments, and a wrong mix.

    rewards: in place of reward_funcs of args.
    """
    trained = args.reward_funcs if rewards is None else rewards
    names = [reward_name(reward) for reward in [*trained, *args.eval_reward_funcs]]
    for spec in [*trained, *args.eval_reward_funcs]:
        if isinstance(spec, str):
            kwargs = (args.reward_kwargs or {}).get(reward_name(spec), {})
            yield from problems_raised_by(check_spec, spec, args.base_dir, kwargs)
            if split_spec(spec)[1] == "latent_reward" and isinstance(kwargs.get("path"), str):
                yield from problems_raised_by(_check_head, kwargs["path"], args.base_dir)
            if split_spec(spec)[1] in CATALOGUE and "frames" in kwargs:
                yield from problems_raised_by(check_frames, reward_name(spec), kwargs["frames"])
    if not trained:
        yield "reward_funcs: got none, expected at least one reward; name one"
    for name in dict.fromkeys(n for n in names if names.count(n) > 1):
        cure = f"leave one out (--eval_reward_funcs names judges), or name one: other={name}, or a callable's `name`"
        yield f"reward_funcs and eval_reward_funcs: got {name!r} twice, expected each once; {cure}"
    for name in dict.fromkeys(n for n in names if n in MEASURES):
        expected = f"expected another name than those of the measures of every evaluation ({', '.join(MEASURES)})"
        yield f"reward_funcs and eval_reward_funcs: got {name!r}, {expected}; rename the class or function"
    weights = args.reward_weights
    if weights is not None and len(weights) != len(trained):
        expected = f"expected {len(trained)}, one for each of reward_funcs"
        yield f"reward_weights: got {len(weights)}, {expected}; correct them, or give --reward_weights none"
    elif weights is not None and not any(weights):
        yield "reward_weights: got only zeros, expected one that is not; nothing would be learnt"
    yield from _unknown_rewards("reward_kwargs", args.reward_kwargs, names)
    yield from _mix_problems(args, [reward_name(reward) for reward in trained])


def built_in_latent_problems(args: RewardGradientConfig, rewards: list[str | Callable] | None) -> list[str]:
    """Return `latent_problems` where all rewards are built in, so that none has to be loaded.

    args has a method and options without a problem. rewards: as in `reward_problems`.
    """
    trained = args.reward_funcs if rewards is None else rewards
    names = [split_spec(reward)[1] if isinstance(reward, str) else "" for reward in trained]
    if args.method == "auto" or not CATALOGUE.keys() >= set(names):
        return []
    inputs = [CATALOGUE[name].input for name in names]
    return latent_problems(args, {reward_name(r): "latents" in i for r, i in zip(trained, inputs, strict=True)})


def latent_problems(args: RewardGradientConfig, trained: dict[str, bool]) -> list[str]:
    """Return the problems of rewards of latents with other settings, and of prfl without one.

    trained: whether each reward to train on scores latents, by short name.
    """
    latent, weights = [name for name in trained if trained[name]], args.reward_weights or [1.0] * len(trained)
    if args.method == "prfl" and not any(map(all, zip(trained.values(), weights, strict=True))):
        got = f"got prfl with {', '.join(trained)}, expected a reward of latents among those trained on"
        cure = "distil one by `python -m rewards.distill`, or choose method refl, which decodes an estimate"
        return [f"method: {got}, since it scores videos that are not finished; {cure}"]
    if not latent:
        return []
    named, options = f"the reward {latent[0]} of latents", read_options(args.method, args.method_kwargs)
    return [
        f"{setting}: got {got} with {named}, expected none: {why}; leave one of the two out"
        for setting, got, why in (
            ("relative_words", options.relative_words, "its text is that of the prompts alone"),
            ("reward_perturbation", options.reward_perturbation, "the step is one of pixels"),
            ("balance_reward_gradients", args.balance_reward_gradients, "its gradients would be of pixels"),
        )
        if got
    ]


def _check_head(path: str, base_dir: str | None) -> None:
    """Raise ValueError unless the file is the head of a latent_reward."""
    from rewards.models.latent_reward import read_facts  # which takes seconds to import

    read_facts(resolve_paths(path, base_dir))


def _mix_problems(args, trained: list[str]) -> Iterator[str]:
    """Yield problems of reward_caps, reward_targets, reward_mix and calibrate_rewards."""
    caps, targets = args.reward_caps or {}, args.reward_targets or {}
    yield from _unknown_rewards("reward_caps", caps, trained)
    yield from _unknown_rewards("reward_targets", targets, trained)
    for name in caps.keys() & targets.keys():
        yield f"reward_caps and reward_targets: got {name!r} in both, expected one of them; leave one out"
    weights = args.reward_weights or [1.0] * len(trained)
    if args.reward_mix == "min" and sum(weight != 0 for weight in weights) < 2:
        expected = "expected at least two that are trained on"
        yield f"reward_mix: got min with the rewards {', '.join(trained)}, {expected}; leave it out, or add one"
    if args.reward_mix == "min" and any(weight < 0 for weight in weights):
        yield f"reward_mix: got min with reward_weights {weights}, expected none below 0; correct them"
    if args.calibrate_rewards == 1:
        yield "calibrate_rewards: got 1, expected 0 or at least 2, since one video has no spread; raise it"
    if args.calibrate_rewards and not args.normalise_rewards:
        yield "calibrate_rewards: got no normalise_rewards, which uses what is measured; set it, or calibrate none"


def _unknown_rewards(key: str, given: dict | None, names: list[str]) -> Iterator[str]:
    """Yield a problem for each key of `given` that is no reward of this run."""
    for name in given or {}:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the rewards are {', '.join(names)}; give --{key} none"
            yield f"{key}: got {name!r}, expected a reward of this run; {hint}"
