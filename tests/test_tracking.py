"""Files that a person looks at."""

import json

import imageio.v3 as imageio
import pytest
import torch
from PIL import Image

from rlhf.figures import contact_sheet, plot_curves
from rlhf.run_folder import RUN_FILES, run_in, start_run_folder
from rlhf.trackers import tracked
from rlhf.tracking import RunLog, keep_rows, read_metrics, table, to_uint8, write_samples

ROW = {"base": 0.5, "tuned": 0.625, "diff": 0.125, "ci95": [0.1, 0.15]}


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
    with tracked(accelerator, args), RunLog(accelerator, args, 0) as log:
        for step in (1, 2):
            log.step({"step": step, "reward": 0.5 * step})
            assert read_metrics(tmp_path)[-1] == {"step": step, "reward": 0.5 * step}  # at once, not at the end
    assert accelerator.logged == [(1, {"reward": 0.5}), (2, {"reward": 1.0})]
    assert (accelerator.finished, accelerator.trackers) == (1, []), "accelerate would finish them again"


def test_a_resumed_run_drops_later_rows_and_a_half_written_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "rew')
    keep_rows(tmp_path, last_step=2)
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_overwriting_removes_the_files_of_a_run_and_nothing_else(make_args, tmp_path):
    for name in (*RUN_FILES, "mine"):
        (tmp_path / name / "inside").mkdir(parents=True)
    (tmp_path / "mine.txt").touch()
    start_run_folder(make_args(output_dir=str(tmp_path), overwrite_output_dir=True), ["not written"], [])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "environment.jsonl", "mine", "mine.txt"]
    assert run_in(tmp_path)


def test_eight_bits_are_rounded():
    assert to_uint8(torch.tensor([0.0, 0.5, 1.0, 1.2])).tolist() == [0, 128, 255, 255]


def test_samples_play_and_show_the_colours(tmp_path):
    video = torch.zeros(1, 3, 5, 32, 48, dtype=torch.uint8)
    video[:, 0], video[:, 2] = 200, 40
    write_samples(tmp_path, 12, ["zwölf"], video, fps=8)
    frames = imageio.imread(tmp_path / "step-000012" / "00.mp4")
    assert frames.shape == (5, 32, 48, 3)
    assert abs(frames.mean((0, 1, 2)) - [200, 0, 40]).max() < 8
    assert imageio.immeta(tmp_path / "step-000012" / "00.mp4")["fps"] == 8


def test_table_has_a_line_for_each_judge_and_measure():
    summary = {"trained": {"clip": ROW}, "held_out": {"verifier": ROW}, "motion": ROW, "diversity": {}}
    lines = table(summary).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == ["clip (trained)", "verifier (held-out)", "motion"]
    assert "0.5000  0.6250     +0.1250  [+0.1000, +0.1500]" in lines[3]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("rewards", [["a"], ["a", "b"], ["a", "b", "c", "d"]])
def test_curves_are_drawn_for_any_number_of_rewards_and_a_single_step(tmp_path, rewards):
    row = {"step": 1, "reward": 0.3, "grad_norm": 1.0} | {f"rewards/{name}": 0.1 for name in rewards}
    row |= {f"rewards/{name}_std": 0.1 for name in rewards}
    plot_curves([row], tmp_path / "c.png")
    assert Image.open(tmp_path / "c.png").width > 400


def test_pictures_leave_the_notebook_its_way_of_showing_plots(tmp_path):
    from matplotlib import pyplot

    from rlhf.report.plots import Panel, Series, draw

    pyplot.switch_backend("svg")
    plot_curves([{"step": 1, "grad_norm": 1.0}], tmp_path / "c.png")
    video = torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8)
    contact_sheet(["a"], video, video, tmp_path / "s.png")
    draw(Panel("a", [Series("a", [1, 2, 3], [0.1, 0.2, 0.3])]), 1)
    assert pyplot.get_backend().lower() == "svg"
    assert not pyplot.get_fignums()


@pytest.mark.parametrize("rows", [[], [{"step": 1, "skipped": 1, "why": "nan"}]])
def test_no_curves_are_drawn_of_no_numbers(tmp_path, rows):
    plot_curves(rows, tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def test_contact_sheet_shows_before_on_the_left_and_after_on_the_right(tmp_path):
    before = torch.zeros(2, 3, 9, 64, 64, dtype=torch.uint8)
    before[:, 0] = 250  # red
    after = before.flip(1)  # blue
    contact_sheet(["one", "two " * 100], before, after, tmp_path / "s.png")
    image = Image.open(tmp_path / "s.png").convert("RGB")
    row = [image.getpixel((x, image.height - 90)) for x in range(image.width)]
    red = [x for x, pixel in enumerate(row) if pixel[0] > 240 and pixel[2] < 10]
    blue = [x for x, pixel in enumerate(row) if pixel[2] > 240 and pixel[0] < 10]
    assert len(red) > image.width / 3
    assert len(blue) > image.width / 3
    assert max(red) < image.width / 2 < min(blue)
    contact_sheet(["one", "two"], before, after[:1], tmp_path / "one.png")  # resumed with fewer samples
    assert 0 < Image.open(tmp_path / "one.png").height < image.height


@pytest.mark.parametrize("prompt", ["a $5 bill_ beside {a $10} bill", r"$\frac$"])
def test_a_prompt_with_dollars_is_a_caption_and_no_formula(tmp_path, prompt):
    video = torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8)
    contact_sheet([prompt], video, video, tmp_path / "s.png")
    assert (tmp_path / "s.png").is_file()
