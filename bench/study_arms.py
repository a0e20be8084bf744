"""The arms of bench/study.py, and the variants among which its sweep chooses."""

import dataclasses
import json
from pathlib import Path

from baselines import Policy
from study_numbers import DEFAULT

ROOT = Path(__file__).parents[1]
SWEEP = ROOT / "bench" / "results" / "study_sweep.json"
BEST_OF = "best-of-n"
CONTROL = " + drift control"
POLICY_KEYS = {field.name for field in dataclasses.fields(Policy)}

GRADIENT = {  # by reward gradient; nano takes four denoising steps
    "DRaFT-1": {"num_grad_steps": 1},
    DEFAULT: {"num_grad_steps": 4},
    "DRaFT-LV": {"method": "draft_lv", "num_grad_steps": 1},
    "AlignProp": {"method": "alignprop", "num_grad_steps": 4},
    "ReFL": {"method": "refl", "num_grad_steps": 1, "method_kwargs": {"jump_steps": 2}},
    "DRTune": {"method": "drtune", "num_grad_steps": 4},
    "SRPO": {"method": "srpo", "num_grad_steps": 1},
    "LeapAlign": {"method": "leap_align", "num_grad_steps": 1},
}
ADJOINT = {"Adjoint matching": {"method": "adjoint_matching", "num_grad_steps": 1}}  # reward_scale controls its drift
# Videos of a rollout: more than of a gradient's step, for a policy gradient is the noisier one.
POLICY = {
    "Flow-GRPO": {"per_device_train_batch_size": 64, "group_size": 8},
    "DDPO": {"per_device_train_batch_size": 64, "group_size": 1},
}
SHIPPED = {  # configs/nano.yaml, whatever is chosen
    "DRTune as shipped": {
        "method": "drtune",
        "num_grad_steps": 4,
        "learning_rate": 3e-3,
        "per_device_train_batch_size": 8,
        "ema_decay": 0.95,
    }
}
DRIFT = {"drift_weight": 1.0}
KL = {"kl_weight": 0.04}  # the published weight for GenEval
ARMS = {name + end: arm | more for name, arm in GRADIENT.items() for end, more in (("", {}), (CONTROL, DRIFT))} | {
    name + end: arm | more for name, arm in POLICY.items() for end, more in (("", {}), (CONTROL, KL))
}
ARMS |= ADJOINT | SHIPPED

RATES = [{"learning_rate": rate} for rate in (3e-4, 1e-3, 3e-3)]
GRADIENT_VARIANTS = [*RATES, {"per_device_train_batch_size": 32}]
POLICY_VARIANTS = [
    *RATES,
    {"learning_rate": 3e-3, "noise_level": 0.4},
    {"noise": "sde", "noise_level": 0.3},
    {"noise": "sde"},
    {"updates": 1},
    {"updates": 4, "clip_range": 1e-2},
    {"passes": 2, "clip_range": 1e-2},
    {"per_device_train_batch_size": 128},
    {"per_device_train_batch_size": 32},
]
VARIANTS = {  # the first of equal ones is kept; an arm with drift control takes what was chosen for the same without
    **dict.fromkeys(GRADIENT, GRADIENT_VARIANTS),
    "DRTune": [*GRADIENT_VARIANTS, *(rate | {"num_grad_steps": 2} for rate in RATES)],
    "LeapAlign": [*GRADIENT_VARIANTS, *({"method_kwargs": {"leap_discount": alpha}} for alpha in (0.0, 1.0))],
    "Adjoint matching": [
        *GRADIENT_VARIANTS,
        *({"method_kwargs": {"reward_scale": c}} for c in (0.01, 0.1, 10.0)),
        {"method_kwargs": {"adjoint_steps": 2}},
    ],
    "SRPO": [*GRADIENT_VARIANTS, {"learning_rate": 1e-4}],
    "Flow-GRPO": [*POLICY_VARIANTS, {"group_size": 4}, {"group_size": 16}],
    "DDPO": POLICY_VARIANTS,
}


def settings_of(arm: str, chosen: dict[str, dict]) -> dict:
    """Return what an arm changes in configs/nano.yaml, `chosen` by the sweep included."""
    return ARMS[arm] | chosen.get(arm.removesuffix(CONTROL), {})


def chosen_by_sweep(path: Path = SWEEP) -> dict[str, dict]:
    """Return by arm the variant with the highest mean trained reward; {} without a sweep.

    Held-out judges have no say in it. Only variants with as many seeds as the arm's most are
    compared.
    """
    if not path.exists():
        return {}
    gains: dict[str, dict[str, list[float]]] = {}
    for row in json.loads(path.read_text())["rows"]:
        if "error" not in row:
            of_arm = gains.setdefault(row["arm"], {})
            of_arm.setdefault(json.dumps(row["variant"]), []).append(row["trained"]["diff"])
    return {arm: json.loads(_best(of_arm)) for arm, of_arm in gains.items()}


def _best(gains: dict[str, list[float]]) -> str:
    most = max(map(len, gains.values()))
    whole = {variant: values for variant, values in gains.items() if len(values) == most}
    return max(whole, key=lambda variant: sum(whole[variant]))


def split(settings: dict) -> tuple[dict, Policy | None]:
    """Split an arm's settings into those of the run and of the policy gradient, if any."""
    policy = {key: value for key, value in settings.items() if key in POLICY_KEYS}
    return {k: v for k, v in settings.items() if k not in policy}, Policy(**policy) if policy else None


def cost_key(settings: dict) -> str:
    """Return a key that is equal for settings with the same time a step."""
    free = {"learning_rate", "noise_level", "clip_range", "noise"}
    return json.dumps({key: value for key, value in settings.items() if key not in free}, sort_keys=True)
