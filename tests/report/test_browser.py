"""The report in a browser: no network, no complaints, videos in step, sorting, keyboard."""

import shutil

import chromium
import pytest
from report_runs import GAINS, UNFINISHED

from rlhf.report import write_report

pytestmark = chromium.needs_browser


def test_in_a_browser_it_plays_in_step_and_sorts(finished, browser, tmp_path):
    moved = tmp_path / "moved.html"
    write_report(finished, moved)
    shutil.rmtree(finished)  # the file is all that is needed
    browser.open(moved)
    browser.evaluate("id('cards').scrollIntoView()")
    times = "pairs.slice(0, 2).map(pair => [pair.left, pair.right].map(video => video.currentTime))"
    watch = f"new Promise(done => setTimeout(() => done({times}), 250))"
    frame, seen = 1 / 8, []
    for _ in range(6):
        for left, right in browser.evaluate(watch):
            assert abs(left - right) < frame
            seen.append(left)
    assert max(seen) > 0.3
    assert min(seen) < max(seen)
    browser.evaluate("(pairs[0].seek(0), pairs[0].right.currentTime = 1)")  # out of step, long before the end
    left, right = browser.evaluate(watch.replace("250", "600"))[0]
    assert left < 1.5, "not started again, which would bring them together too"
    assert abs(left - right) < frame
    colours = browser.evaluate(COLOURS)
    assert colours[0][0] > colours[0][2] + 50, "before is red"
    assert colours[1][2] > colours[1][0] + 50, "after is blue"
    first, best = browser.evaluate(f"[{ORDER}, (id('order').value = 'gain', {CHANGE}, {ORDER})]")
    assert first == pytest.approx(sorted(GAINS.tolist())[:10])
    assert best == pytest.approx(sorted(GAINS.tolist())[:1:-1])
    assert len(browser.evaluate(f"(id('more').click(), {ORDER})")) == 12
    assert browser.problems == []


ORDER = "all('.card').filter(c => !c.hidden).map(c => JSON.parse(c.dataset.gains).redness)"
CHANGE = "id('order').dispatchEvent(new Event('change'))"
COLOURS = """[pairs[0].left, pairs[0].right].map(video => {
  const canvas = document.createElement('canvas'), c = canvas.getContext('2d');
  canvas.width = video.videoWidth; canvas.height = video.videoHeight; c.drawImage(video, 0, 0);
  const d = c.getImageData(0, 0, canvas.width, canvas.height).data, sum = [0, 0, 0];
  for (let i = 0; i < d.length; i += 4) for (const k of [0, 1, 2]) sum[k] = Math.max(sum[k], d[i + k]);
  return sum;
})"""


def test_the_keyboard_reaches_and_works_everything(finished, browser):
    browser.open(write_report(finished))
    browser.evaluate("playAll(false)")
    reached, names = [], "document.activeElement.id || document.activeElement.className || document.activeElement.type"
    for _ in range(60):
        browser.press("Tab")
        reached.append(browser.evaluate(names))
        if reached[-1] == "toggle":
            break
    assert [name for name in reached if name in ("play", "judge", "order", "speed", "wide")] == [
        "wide",
        "play",
        "judge",
        "order",
        "speed",
    ]
    assert browser.evaluate("pairs[0].button === document.activeElement")
    browser.press(" ")
    assert browser.evaluate("pairs[0].wanted")
    browser.press(" ")
    assert not browser.evaluate("pairs[0].wanted")
    assert browser.problems == []


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_and_its_text_is_readable(finished, browser, dark):
    browser.open(write_report(finished), width=400, height=740, dark=dark)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 400
    wider = browser.evaluate("all('.card *').filter(e => e.getBoundingClientRect().right > innerWidth + 1).length")
    assert wider == 0
    colours = browser.evaluate(
        "['--ink', '--muted', '--after', '--second', '--good', '--bad', '--page', '--panel']"
        ".map(name => getComputedStyle(document.documentElement).getPropertyValue(name).trim())"
    )
    scrolls = "id('headline').parentElement.classList.contains('more')"
    box = "id('headline').parentElement"
    assert browser.evaluate(scrolls), "a table that is wider than the screen says so"
    browser.evaluate(f"({box}.scrollLeft = {box}.scrollWidth, tellAll())")
    assert not browser.evaluate(scrolls), "until its last column is seen"
    *texts, page, panel = colours
    assert (luminance(page) < 0.1) == dark
    assert min(contrast(text, ground) for text in texts for ground in (page, panel)) >= 4.5  # WCAG 2.2, AA


def luminance(colour: str) -> float:
    """WCAG's relative luminance of #rrggbb."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("leave", UNFINISHED)
def test_unfinished_runs_open_without_complaint(started, browser, leave):
    leave(started)
    browser.open(write_report(started))
    assert browser.evaluate("id('status').textContent").endswith(("done", "steps"))
    assert browser.problems == []
