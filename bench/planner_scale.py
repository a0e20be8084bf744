"""The planner's figures beside bench/results/scale.json: a step of ContentV-8B on one device and divided over several.

    python bench/planner_scale.py          without a device, in half a minute; writes bench/results/planner_scale.json
    python bench/tables.py                 puts the results into docs/planner.md

Memory is the most of any phase that bench/scale.py measures, without a reward; time is its whole step, worked out of
the same phases there and here.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))  # before this folder, which has a rewards.py
from scale_arms import SETTINGS, arms
from step import write

from rlhf.checks import with_sampling
from rlhf.config import RewardGradientConfig
from rlhf.contentv.files import CONTENTV_8B, model_sizes
from rlhf.planner import Planner
from rlhf.rates import Rates, known_rates

FOLDER, GIB = Path(__file__).parent / "results", 2**30
PHASES = {
    "sampling": "sampling",
    "segment": "gradient segment",
    "sum": "optimizer",
}  # of both; not the decoder's memory


def predicted(row: dict, environment: dict, rates: Rates) -> dict[str, dict]:
    """{phase: {"peak_gib", "seconds"}} of a row of a whole step."""
    reward = {"reward_funcs": ["hps_v2_1"], "reward_kwargs": {"hps_v2_1": {"frames": environment["scored"]}}}
    settings = SETTINGS | arms(row["devices"])[row["arm"]] | reward
    settings |= {
        "num_frames": row["frames"],
        "num_inference_steps": row["steps"],
        "lora_rank": 32,
        "guidance_scale": 6.0,
    }
    settings |= {name: environment[name] for name in ("height", "width")}
    args = RewardGradientConfig(model=CONTENTV_8B, eval_prompts=None, plan_processes=row["devices"], **settings)
    card = model_sizes(args.model)
    plan = Planner(with_sampling(args, card["sampling"]), card, rates).plan()
    held, times = plan.memory.resident - plan.memory.held["rewards"], plan.time.parts
    found = {
        phase: {"peak_gib": (held + plan.memory.phases[name]) / GIB, "seconds": times[name]}
        for phase, name in PHASES.items()
    }
    found["step"] = {
        "peak_gib": max(one["peak_gib"] for one in found.values()),
        "seconds": sum(one["seconds"] for one in found.values()) + times["decoding and back"],
    }
    found["sampling"]["seconds"] /= row["steps"] - 1
    return found


def compared(row: dict, environment: dict, rates: Rates) -> dict:
    """A row as those of bench/planner.py."""
    whole = predicted(row, environment, rates)["step"]
    measured = {key: row[key] for key in whole}
    name = row["arm"] if row["devices"] == 1 else f"{row['arm']}, {row['devices']} devices"
    ratios = {f"{key}_ratio": whole[key] / measured[key] for key in whole}
    return {"arm": f"{name}, {row['frames']} frames", "measured": measured, "predicted": whole} | ratios


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=FOLDER / "scale.json")
    parser.add_argument("--output", type=Path, default=FOLDER / "planner_scale.json")
    arguments = parser.parse_args(argv)
    result = json.loads(arguments.measured.read_text())
    environment, rows = result["environment"], []
    for row in result["rows"]:
        if row["phase"] == "step" and "seconds" in row:
            rows.append(compared(row, environment, known_rates(environment["device"])))
            write(arguments.output, environment, rows)
            print(f"{rows[-1]['arm']}: memory {rows[-1]['peak_gib_ratio']:.2f}, time {rows[-1]['seconds_ratio']:.2f}")


if __name__ == "__main__":
    main()
