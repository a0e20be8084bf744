"""Put measured results where the installed package reads them: `python bench/package.py`.

bench/results/rewards.json becomes rewards/measured.py; the rates in bench/results/planner.json become rlhf/measured.py.
"""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
MADE = '"""{what}\n\nMade by `python bench/package.py` from {source}: do not edit.\n"""\n\n'


def rewards_module(result: dict) -> str:
    """The source of rewards/measured.py."""
    rows = {}
    for row in result["rows"]:
        if row["phase"] == "forward and backward" and "seconds" in row:
            weights, of_frames = rows.setdefault((row["arm"], row["dtype"]), (row["weights_gib"], {}))
            of_frames[row["frames"]] = (round(row["seconds"], 4), round(max(0.0, row["peak_gib"] - weights), 3))
    head = MADE.format(what="What the built-in rewards take.", source="bench/results/rewards.json")
    about = result["environment"]
    lines = [f'DEVICE = "{about["device"]}"', f"HEIGHT, WIDTH = {about['height']}, {about['width']}", ""]
    lines += ["# Reward, format -> GiB of weights; by frames: seconds, and GiB besides, of scoring and going back.", ""]
    entries = (
        f'    ("{name}", "{dtype}"): ({round(weights, 3)}, {of_frames}),'
        for (name, dtype), (weights, of_frames) in sorted(rows.items())
    )
    return head + "\n".join([*lines[:-1], "COSTS = {", *entries, "}"]) + "\n"


def rates_module(result: dict) -> str:
    """The source of rlhf/measured.py: the rates of each device that bench/planner.py ran on."""
    head = MADE.format(what="What devices do in a second; see `rlhf.rates`.", source="bench/results/planner.json")
    rows = [row for row in result["rows"] if row["arm"] == "rates"]
    lines = ["RATES = {"]
    for row in rows:
        rates = row["rates"]
        lines += [f'    "{rates["device"]}": {{']
        lines += [f'        "{key}": {_number(value)},' for key, value in rates.items() if key != "device"]
        lines += ["    },"]
    return head + "\n".join([*lines, "}"]) + "\n"


def _number(value) -> str:
    """Four digits of numbers, and of those in a dict, one a line."""
    if isinstance(value, dict):
        lines = (f'            "{key}": {_number(number)},' for key, number in value.items())
        return "\n".join(["{", *lines, "        }"])
    return f"{value:.4g}".replace("e+", "e") if isinstance(value, float) else repr(value)


MODULES = {
    "rewards/measured.py": ("rewards.json", rewards_module),
    "rlhf/measured.py": ("planner.json", rates_module),
}


def main() -> None:
    for path, (source, make) in MODULES.items():
        results = ROOT / "bench" / "results" / source
        if results.exists():
            (ROOT / path).write_text(make(json.loads(results.read_text())))
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
