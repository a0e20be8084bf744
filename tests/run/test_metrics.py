"""The metrics log and the sample videos of a run."""

import json

import pytest
import torch
from stored import stored_frames, stored_rate

from rlhf.checks import check_config
from rlhf.config import ConfigError
from rlhf.run.folder import RUN_FILES, has_run, start_run_folder
from rlhf.run.metrics import RunLog, drop_rows_after, read_metrics
from rlhf.run.trackers import run_trackers
from rlhf.run.video import to_uint8, write_samples


class Accelerator:
    """Accelerator and tracker in one."""

    is_main_process, finished = True, 0

    def __init__(self):
        self.logged, self.trackers = [], [self]

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_metrics_go_to_the_file_and_the_trackers_step_by_step(make_args, tmp_path):
    args = make_args(output_dir=str(tmp_path))
    accelerator = Accelerator()
    with run_trackers(accelerator, args), RunLog(accelerator, args, 0) as log:
        for step in (1, 2):
            log.step({"step": step, "reward": 0.5 * step})
            assert read_metrics(tmp_path)[-1] == {"step": step, "reward": 0.5 * step}  # at once, not at the end
    assert accelerator.logged == [(1, {"reward": 0.5}), (2, {"reward": 1.0})]
    assert (accelerator.finished, accelerator.trackers) == (1, []), "accelerate would finish them again"


def test_a_resumed_run_drops_later_rows_and_a_half_written_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "rew')
    drop_rows_after(tmp_path, 2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_overwriting_removes_the_files_of_a_run_and_nothing_else(make_args, tmp_path):
    for name in (*RUN_FILES, "mine"):
        (tmp_path / name / "inside").mkdir(parents=True)
    (tmp_path / "mine.txt").touch()
    start_run_folder(make_args(output_dir=str(tmp_path), overwrite_output_dir=True), ["not written"], [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "environment.jsonl", "mine", "mine.txt"]
    assert has_run(tmp_path)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "checkpoints").symlink_to(tmp_path / "mine")
    assert has_run(tmp_path / "new")
    with pytest.raises(ConfigError, match="overwrite_output_dir: got links in .*new, checkpoints, expected"):
        check_config(make_args(output_dir=str(tmp_path / "new"), overwrite_output_dir=True, prompts="nano_train"))
    (tmp_path / "mine" / "inside").rmdir()
    assert not has_run(tmp_path / "new"), "the checkpoints' place alone, linked before the start"


def test_eight_bits_are_rounded():
    assert to_uint8(torch.tensor([0.0, 0.5, 1.0, 1.2])).tolist() == [0, 128, 255, 255]


def test_samples_play_and_show_the_colours(tmp_path):
    video = torch.zeros(1, 3, 5, 32, 48, dtype=torch.uint8)
    video[:, 0], video[:, 2] = 200, 40
    write_samples(tmp_path, 12, ["zwölf"], video, fps=8)
    frames = stored_frames(tmp_path / "step-000012" / "00.mp4")
    assert frames.shape == (5, 32, 48, 3)
    assert (frames.mean((0, 1, 2)) - torch.tensor([200, 0, 40])).abs().max() < 8
    assert stored_rate(tmp_path / "step-000012" / "00.mp4") == 8
