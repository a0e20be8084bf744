"""What a run shows at its end: the result table and the contact sheet."""

import pytest
import torch
from PIL import Image

from rlhf.evaluation.statistics import paired_interval
from rlhf.report.contact_sheet import draw_contact_sheet
from rlhf.report.summary import summary_table

ROW = {"base": 0.5, "tuned": 0.625, "diff": 0.125, "ci95": [0.1, 0.15]}


def test_table_has_a_line_for_each_judge_and_measure():
    summary = {"trained": {"clip": ROW}, "held_out": {"verifier": ROW}, "motion": ROW, "diversity": {}}
    lines = summary_table(summary).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == ["clip (trained)", "verifier (held-out)", "motion"]
    assert lines[3].split() == ["verifier", "(held-out)", "0.5000", "0.6250", "+0.1250", "[+0.1000,", "+0.1500]"]
    assert len({len(line) for line in lines}) == 1


def test_below_the_table_are_the_measures_that_too_few_videos_have():
    wide = {"base": 0.1, "tuned": 0.07, "diff": -0.03, "ci95": [-0.061, 0.001]}
    text = summary_table({"trained": {"clip": ROW}, "held_out": {}, "motion": ROW, "diversity": wide})
    assert text.splitlines()[-1] == "diversity: -30 ± 31 %: too few videos to tell; raise num_diversity_prompts"
    assert text.count("too few") == 1


def test_one_prompt_has_no_interval():
    row = paired_interval(torch.tensor([0.5]), torch.tensor([0.75]))
    summary = {"trained": {"clip": row}, "held_out": {}, "motion": ROW, "diversity": {}}
    assert summary_table(summary).splitlines()[2].split() == ["clip", "(trained)", "0.5000", "0.7500", "+0.2500", "-"]


def test_pictures_leave_the_notebook_its_way_of_showing_plots(tmp_path):
    from matplotlib import pyplot

    from rlhf.report.plots import Panel, Series, draw_svg

    pyplot.switch_backend("svg")
    video = torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8)
    draw_contact_sheet(["a"], video, video, tmp_path / "s.png")
    draw_svg(Panel("a", [Series("a", {1: 0.1, 2: 0.2, 3: 0.3})]), 1)
    assert pyplot.get_backend().lower() == "svg"
    assert not pyplot.get_fignums()


def test_contact_sheet_shows_before_on_the_left_and_after_on_the_right(tmp_path):
    before = torch.zeros(2, 3, 9, 64, 64, dtype=torch.uint8)
    before[:, 0] = 250  # red
    after = before.flip(1)  # blue
    draw_contact_sheet(["one", "two " * 100], before, after, tmp_path / "s.png")
    image = Image.open(tmp_path / "s.png").convert("RGB")
    row = [image.getpixel((x, image.height - 90)) for x in range(image.width)]
    red = [x for x, pixel in enumerate(row) if pixel[0] > 240 and pixel[2] < 10]
    blue = [x for x, pixel in enumerate(row) if pixel[2] > 240 and pixel[0] < 10]
    assert len(red) > image.width / 3
    assert len(blue) > image.width / 3
    assert max(red) < image.width / 2 < min(blue)
    draw_contact_sheet(["one", "two"], before, after[:1], tmp_path / "one.png")  # resumed with fewer samples
    assert 0 < Image.open(tmp_path / "one.png").height < image.height


@pytest.mark.parametrize("prompt", ["a $5 bill_ beside {a $10} bill", r"$\frac$"])
def test_a_prompt_with_dollars_is_a_caption_and_no_formula(tmp_path, prompt):
    video = torch.zeros(1, 3, 2, 8, 8, dtype=torch.uint8)
    draw_contact_sheet([prompt], video, video, tmp_path / "s.png")
    assert (tmp_path / "s.png").is_file()
