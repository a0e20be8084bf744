"""Real videos in the loop on nano: against a hacked reward, for diversity, instead of rollouts.

    python bench/anchor_data.py [--only ARM ...] [--device cpu]

The videos are rendered by nano's world, of combinations that are not held out, with right captions.
Three of four captions of nano's own training were right, so that the videos teach it something,
too. Writes bench/results/anchor_data.json, and bench/runs/anchor_data.png to look at. Rows that are
there are not made again. One seed.

Prediction: with weight 1 the loss on videos leaves little of the hacked reward and keeps the
verifier; with .1 the hack is slowed down. On the preference model the videos keep the base's
diversity and cost a part of the gain. srpo gains little here, offline no more. (Weight .1 did not
slow the hack down, and offline srpo lost most of what the base could do.)
"""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from environment import environment, make_parser, read_rows, write_rows
from hacking import COMMON, HACKED, ROOT, draw_frames, run
from md_table import made_on, table
from study_inputs import make_videos

from rlhf.device import pick_device
from rlhf.run.video import write_video

RESULT, PICTURE = ROOT / "bench" / "results" / "anchor_data.json", ROOT / "bench" / "runs" / "anchor_data.png"
SHORT = COMMON | {"eval_steps": 0}
GRAIN, PREFERENCE = {"reward_funcs": [HACKED]}, {"reward_funcs": ["nano_preference"]}
OFFLINE = {"method": "srpo", "num_grad_steps": 1}


def anchored(weight: float) -> dict:
    """Return the settings of a loss on real videos at every step."""
    return {"method_kwargs": {"anchor_data_steps": 1, "anchor_data_weight": weight}}


ARMS = {
    "hacked reward": GRAIN,
    "hacked reward, videos of weight 0.1": GRAIN | anchored(0.1),
    "hacked reward, videos of weight 1": GRAIN | anchored(1.0),
    "preference model": PREFERENCE,
    "preference model, videos of weight 0.1": PREFERENCE | anchored(0.1),
    "preference model, srpo": PREFERENCE | OFFLINE,
    "preference model, srpo offline": PREFERENCE | OFFLINE | {"method_kwargs": {"offline": True}},
    "preference model, srpo offline, a tenth of the rate": PREFERENCE
    | OFFLINE
    | {"method_kwargs": {"offline": True}, "learning_rate": 3e-4},
}


def run_arm(arm: str, device: str, folder: Path) -> dict:
    """Train an arm; return its row."""
    settings = SHORT | ARMS[arm]
    given = settings | ({"anchor_data": str(folder)} if "method_kwargs" in settings else {})
    return {"arm": arm, "settings": settings} | run(given, device)


def anchor_table(result: dict) -> str:
    """Return a row for each arm: what the reward gains, and what becomes of the videos."""
    headings = ["run", "trained reward, spreads", "verifier, base → tuned", "high frequencies", "diversity"]
    lines = []
    for row in result["rows"]:
        summary, verifier = row["summary"], row["summary"]["held_out"]["verifier"]
        cells = [row["arm"], f"{summary['gain_trained']:+.1f}"]
        cells += [f"{verifier['base']:.0%} → {verifier['tuned']:.0%}"]
        cells += [f"{summary[m]['tuned'] / summary[m]['base'] - 1:+.0%}" for m in ("high_frequency", "diversity")]
        lines.append(cells)
    return made_on(result) + "\n\n" + table(headings, lines)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=list(ARMS), metavar="ARM", help=f"of {', '.join(ARMS)}")
    parser.add_argument("--device", help="kind of device; default: the accelerator of this machine")
    parser.add_argument("--output", type=Path, default=RESULT, help="the result's file")
    given = parser.parse_args(argv)
    device = pick_device(given.device)
    about = environment(device)
    rows = read_rows(given.output, about, lambda row: row["arm"])
    with tempfile.TemporaryDirectory() as work:
        os.environ["CONTENTV_RLHF_CACHE"] = work
        make_videos(folder := Path(work) / "videos", ".mp4", write_video)
        for arm in given.only or ARMS:
            if arm not in rows or rows[arm]["settings"] != SHORT | ARMS[arm]:
                rows[arm] = run_arm(arm, device.type, folder)
                ordered = [rows[name] for name in ARMS if name in rows]
                write_rows(given.output, about, ordered)
                print(anchor_table({"environment": about, "rows": ordered}), flush=True)
    PICTURE.parent.mkdir(exist_ok=True)
    draw_frames([rows[name] for name in ARMS if name in rows], PICTURE)


if __name__ == "__main__":
    main()
