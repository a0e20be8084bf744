"""Training runs of nano, arm by arm and seed by seed, for bench/methods.py and bench/cheaper.py."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from environment import environment

from rlhf.tracking import read_metrics

ROOT = Path(__file__).parents[1]
MOST = 100  # seeds


@dataclass(frozen=True)
class Study:
    """Arms by name, each the settings in which it differs from configs/nano.yaml, and where its runs and result lie."""

    name: str
    arms: dict[str, dict]

    @property
    def result(self) -> Path:
        return ROOT / "bench" / "results" / f"{self.name}.json"

    def folder_of(self, arm: str, seed: int | str) -> Path:
        place = f"{arm.replace(', ', '-').replace(' = ', '').replace(' ', '_')}-{seed}"
        return ROOT / "bench" / "runs" / self.name / place

    def command(self, arm: str, folder: Path, seed: int, device: str, flags: list[str]) -> list[str]:
        settings = self.arms[arm] | {"seed": seed, "device": device, "output_dir": folder, "report_to": "none"}
        if any((folder / "checkpoints").glob("step-*[0-9]")):
            settings["resume_from_checkpoint"] = "latest"
        else:
            settings["overwrite_output_dir"] = True
        given = [word for key, value in settings.items() for word in (f"--{key}", *_words(value))]
        config = ["--config", str(ROOT / "configs" / "nano.yaml")]
        return [sys.executable, str(ROOT / "train_rlhf.py"), *config, *given, *flags]

    def train(self, arm: str, seed: int, device: str, flags: list[str]) -> None:
        """Run until its summary is there; its output goes to log.txt beside it."""
        folder = self.folder_of(arm, seed)
        if (folder / "summary.json").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        done = _run(self.command(arm, folder, seed, device, flags), folder)
        print(f"{arm}, seed {seed}: {'done' if done else f'failed, see {folder}/log.txt'}", flush=True)

    def seconds_per_step(self, arm: str, device: str, steps: int) -> float:
        """Mean of so many optimizer steps after the first, in a run without evaluation that is made for it."""
        folder = self.folder_of(arm, "timing")
        if not (folder / "summary.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            flags = [
                "--max_steps",
                str(steps + 1),
                "--warmup_steps",
                "0",
                "--eval_prompts",
                "none",
                "--save_steps",
                "0",
            ]
            if not _run(self.command(arm, folder, 0, device, flags), folder):
                raise SystemExit(f"{arm} failed, see {folder}/log.txt")
        return statistics.mean(row["seconds"] for row in read_metrics(folder)[1:])

    def row(self, arm: str, seed: int) -> dict:
        """What a finished run says: differences to the base (motion: relative), gains in spreads, seconds of a step."""
        folder = self.folder_of(arm, seed)
        summary = json.loads((folder / "summary.json").read_text())
        (trained,) = summary["trained"].values()
        found = {"arm": arm, "seed": seed, "settings": self.arms[arm]}
        found |= {"steps": summary["steps"], "seconds": summary["seconds"]}
        found["seconds_per_step"] = statistics.median(row["seconds"] for row in read_metrics(folder))
        found |= {"trained": trained["diff"]} | {name: judge["diff"] for name, judge in summary["held_out"].items()}
        found["motion"] = summary["motion"]["tuned"] / summary["motion"]["base"] - 1
        found |= {measure: summary[measure]["diff"] for measure in ("diversity", "high_frequency", "saturation")}
        return found | {key: summary[key] for key in ("gain_trained", "gain_held_out", "hacking_gap")}

    def write(self, device: torch.device, about: dict) -> None:
        """The result of all runs that are done, by arm in their order."""
        done = [
            (arm, seed)
            for arm in self.arms
            for seed in range(MOST)
            if (self.folder_of(arm, seed) / "summary.json").exists()
        ]
        about = environment(device) | {"config": "configs/nano.yaml"} | about
        self.result.parent.mkdir(exist_ok=True)
        rows = [self.row(*pair) for pair in done]
        self.result.write_text(json.dumps({"environment": about, "rows": rows}, indent=2) + "\n")

    def train_all(
        self,
        arms: list[str],
        seeds: list[int],
        jobs: int,
        device: torch.device,
        flags_of: Callable[[str], list[str]],
        about: dict,
    ) -> None:
        """Every arm with every seed, `jobs` of them at a time; the result is written after each run."""
        with ThreadPoolExecutor(jobs) as pool:
            for seed in seeds:
                running = [pool.submit(self.train, arm, seed, device.type, flags_of(arm)) for arm in arms]
                for job in running:
                    job.result()
                    self.write(device, about)


def _run(command: list[str], folder: Path) -> bool:
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    with (folder / "log.txt").open("a") as log:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environ).returncode == 0


def _words(value) -> list[str]:
    return [str(item) for item in (value if isinstance(value, list) else [value])]
