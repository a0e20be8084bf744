"""The arms of bench/study.py, and the variants among which its sweep chooses."""

import json
from pathlib import Path

from study_numbers import DEFAULT

from rlhf.config.parse import CONFIGS
from rlhf.io import load_yaml

ROOT = Path(__file__).parents[1]
SWEEPS = [ROOT / "bench" / "results" / f"{name}.json" for name in ("study_sweep_former_judges", "study_sweep")]
WORK = "bench/runs/study"  # below ROOT: what is made once for all runs, see bench/study_inputs.py
HEAD, VIDEOS = f"{WORK}/head.safetensors", f"{WORK}/videos"
BEST_OF = "best-of-n"
CONTROL = " + drift control"  # ending of arms that take the settings chosen without
DDPO = "ddpo"  # in place of a method: `baselines.DDPOTrainer`, with the options of flow_grpo


def changed(settings: dict, *changes: dict) -> dict:
    """Return settings with changes: of method_kwargs one by one, unless the method is another."""
    for change in changes:
        options = {} if "method" in change else settings.get("method_kwargs", {})
        options = options | change.get("method_kwargs", {})
        settings = settings | change | {"method_kwargs": options}
        if not options:
            del settings["method_kwargs"]
    return settings


def options(**changes) -> dict:
    """Return a variant of method_kwargs."""
    return {"method_kwargs": changes}


FIRST_STEPS = {  # without drift control: where bench/main_job.py begins
    "method": "listed",
    "learning_rate": 2.5e-3,
    "per_device_train_batch_size": 8,
    "ema_decay": 0.95,
    "method_kwargs": {"steps": [0, 1]},
}


def shipped(config: str) -> dict:
    """Return what a file of configs/ sets of all that arms change."""
    given = load_yaml((CONFIGS / config).read_text())
    names = "method", "num_grad_steps", "learning_rate", "per_device_train_batch_size", "ema_decay", "method_kwargs"
    return {name: given[name] for name in names if name in given}


ONE_STEP, ALL_STEPS = {"num_grad_steps": 1}, {"num_grad_steps": 4}  # nano takes four denoising steps
GRADIENT = {
    "DRaFT-1": ONE_STEP,
    DEFAULT: ALL_STEPS,
    "DRaFT-LV": ONE_STEP | {"method": "draft_lv"},
    "AlignProp": ALL_STEPS | {"method": "alignprop"},
    "ReFL": ONE_STEP | {"method": "refl", "method_kwargs": {"jump_steps": 2}},
    "DRTune": ALL_STEPS | {"method": "drtune"},
    "SRPO": ONE_STEP | {"method": "srpo"},
    "LeapAlign": ONE_STEP | {"method": "leap_align"},
}
# Adjoint matching's reward_scale controls its drift. PRFL's head predicts the trained reward.
REWARD = {"latent_reward": {"path": HEAD, "recompute": False}}
JUDGES = ["nano_preference", "nano_verifier", "nano_clip"]
FURTHER = {
    "Adjoint matching": ONE_STEP | {"method": "adjoint_matching"},
    "PRFL": ONE_STEP
    | {"method": "prfl", "reward_funcs": ["latent_reward"], "reward_kwargs": REWARD, "eval_reward_funcs": JUDGES},
    "SRPO offline": ONE_STEP | {"method": "srpo", "anchor_data": VIDEOS, "method_kwargs": {"offline": True}},
}
TWO_REWARDS = {"reward_funcs": JUDGES[::2], "eval_reward_funcs": JUDGES[1:2], "calibrate_rewards": 32}
VARIED = {  # endings of DRaFT-K's arms, which take its settings
    " + real videos": {"anchor_data": VIDEOS, "method_kwargs": {"anchor_data_steps": 1, "anchor_data_weight": 0.1}},
    " + moved video": {"method_kwargs": {"reward_perturbation": 0.005}},
    " + moved adapter": {"method_kwargs": {"weight_perturbation": 0.05}},
    ", all linear layers": {"lora_target_modules": ["all-linear"]},
    ", cosine": {"lr_scheduler_type": "cosine"},
    ", sum of two rewards": TWO_REWARDS,  # the CLIP score is trained, too
    ", lower of two rewards": TWO_REWARDS | {"reward_mix": "min"},
}
# By scores alone. More videos a step than with a gradient, for scores are the noisier signal.
NFT = ONE_STEP | {"method": "nft", "per_device_train_batch_size": 32, "learning_rate": 3e-3}
POLICY = {
    "Flow-GRPO": ONE_STEP
    | {"method": "flow_grpo", "per_device_train_batch_size": 64, "method_kwargs": {"group_size": 8}},
    "DDPO": ONE_STEP | {"method": DDPO, "per_device_train_batch_size": 64},
}
DRTUNE_32 = ALL_STEPS | {
    "method": "drtune",
    "learning_rate": 1e-3,
    "per_device_train_batch_size": 32,
    "ema_decay": 0.95,
}
LONG_ARMS = {  # run at a long budget alone; the first was made for a short one
    "first two steps": FIRST_STEPS,
    "Adjoint matching as shipped": shipped("nano_long.yaml"),
    "DRTune, 32 videos": DRTUNE_32,
    **{
        f"DRTune, 32 videos, negative drift {weight:g}": changed(DRTUNE_32, options(negative_drift_weight=weight))
        for weight in (0.5, 2.0)
    },
}
LONG_CHANGES = {  # a tenth of the chosen rate, at which they broke down
    "NFT": {"learning_rate": 3e-4},
    "PRFL": {"learning_rate": 3e-6},
    "SRPO offline": {"learning_rate": 1e-5},
}
DRIFT = {"drift_weight": 1.0}
KL = {"method_kwargs": {"kl_weight": 0.04}}  # the published weight for GenEval
ARMS = {name + end: arm | more for name, arm in GRADIENT.items() for end, more in (("", {}), (CONTROL, DRIFT))}
ARMS |= FURTHER | {DEFAULT + end: changed(GRADIENT[DEFAULT], more) for end, more in VARIED.items()} | {"NFT": NFT}
ARMS |= {name + end: changed(arm, more) for name, arm in POLICY.items() for end, more in (("", {}), (CONTROL, KL))}
ARMS |= LONG_ARMS

RATES = [{"learning_rate": rate} for rate in (3e-4, 1e-3, 3e-3)]
LOW_RATES = [{"learning_rate": 1e-4}, *RATES[:2]]
GRADIENT_VARIANTS = [*RATES, {"per_device_train_batch_size": 32}]


POLICY_VARIANTS = [*RATES, options(noise_level=0.4), options(noise="sde"), options(noise="sde", noise_level=0.3)]
VARIANTS = {  # the first of equal ones is kept
    **dict.fromkeys(GRADIENT, GRADIENT_VARIANTS),
    "PRFL": [{"learning_rate": rate} for rate in (1e-5, 3e-5, 1e-4, 3e-4)],
    "DRTune": [*GRADIENT_VARIANTS, *(rate | {"num_grad_steps": 2} for rate in RATES)],
    "LeapAlign": [*GRADIENT_VARIANTS, *(options(leap_discount=alpha) for alpha in (0.0, 1.0))],
    "Adjoint matching": [
        *GRADIENT_VARIANTS,
        *(options(reward_scale=c) for c in (0.01, 0.1, 10.0)),
        options(adjoint_steps=2),
    ],
    "SRPO": [*GRADIENT_VARIANTS, LOW_RATES[0]],
    "SRPO offline": [*LOW_RATES, {"per_device_train_batch_size": 32}],
    "NFT": [
        *({"learning_rate": rate} for rate in (1e-3, 3e-3, 1e-2)),
        {"per_device_train_batch_size": 64},
        options(beta=0.3),
        options(num_levels=4),
        options(group_size=16),
    ],
    "Flow-GRPO": [
        *POLICY_VARIANTS,
        {"per_device_train_batch_size": 128},
        {"per_device_train_batch_size": 128, "learning_rate": 3e-3},
        options(group_size=16),
    ],
    "DDPO": [*POLICY_VARIANTS, {"per_device_train_batch_size": 128}],
}


def settings_of(arm: str, chosen: dict[str, dict]) -> dict:
    """Return what an arm changes in configs/nano.yaml, `chosen` by the sweep included."""
    plain = next((arm.removesuffix(end) for end in (CONTROL, *VARIED) if arm.endswith(end)), arm)
    return changed(ARMS[arm], chosen.get(plain, {}))


def chosen_by_sweeps(paths: list[Path] = SWEEPS) -> dict[str, dict]:
    """Return by arm the variant with the highest mean trained reward, in the last sweep with it.

    Held-out judges have no say in it. Only rows with settings that the arm has today count, and of
    these variants those with as many seeds as the arm's most.
    """
    chosen = {}
    for path in paths:
        gains: dict[str, dict[str, list[float]]] = {}
        for row in json.loads(path.read_text())["rows"] if path.exists() else ():
            of_today = row["arm"] in ARMS and row["settings"] == changed(ARMS[row["arm"]], row["variant"])
            if "error" not in row and of_today:
                of_arm = gains.setdefault(row["arm"], {})
                of_arm.setdefault(json.dumps(row["variant"]), []).append(row["trained"]["diff"])
        chosen |= {arm: json.loads(_best(of_arm)) for arm, of_arm in gains.items()}
    return chosen


def _best(gains: dict[str, list[float]]) -> str:
    most = max(map(len, gains.values()))
    whole = {variant: values for variant, values in gains.items() if len(values) == most}
    return max(whole, key=lambda variant: sum(whole[variant]))


def cost_key(settings: dict) -> str:
    """Return a key that is equal for settings with the same time a step."""
    free = "learning_rate", "lr_scheduler_type", "noise_level", "noise", "anchor_data_weight", "beta", "reward_scale"
    kept = lambda given: {key: value for key, value in given.items() if key not in free}
    options = kept(settings.get("method_kwargs", {}))
    if options.get("negative_drift_weight"):
        options["negative_drift_weight"] = "any"  # weight: they cost the same
    settings = {key: value for key, value in kept(settings).items() if key != "method_kwargs"}
    return json.dumps(settings | ({"method_kwargs": options} if options else {}), sort_keys=True)
