"""The page in a real browser, and what its server refuses."""

import json
import random
import threading
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from adapted_model import save_tiny_model
from chromium import needs_browser
from scripts import script
from stored import stored_frames

from rlhf.evaluation.sampler import Sampler
from rlhf.evaluation.statistics import wilson_interval
from rlhf.evaluation.video_set import Video, write_manifest
from rlhf.generator.files import model_sizes
from rlhf.page.server import bind
from rlhf.page.sets import SetsApp
from rlhf.page.studio import StudioApp
from rlhf.page.votes import Votes
from rlhf.run.video import write_video


@contextmanager
def served(app):
    """The address of a page, on a thread and a free port."""
    with bind("127.0.0.1", 0) as server:
        server.app = app
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def studio(model, tmp_path):
    """The page of a tiny model with an adapter; it refuses more than 9 frames, as for a device."""
    name, adapter = str(model / "base"), str(model / "adapter")
    form = model_sizes(name)["sampling"] | {"prompt": "a star", "seed": 3, "scale": 1.0}
    form |= {"adapter": adapter, "blind": True, "num_inference_steps": 2}

    def check(sampling):
        if sampling.num_frames > 9:
            raise ValueError("memory_limit_gib: got 1, expected at least 2")

    votes = Votes(tmp_path / "votes.json", lambda: 0.1)  # tuned on the left
    return StudioApp(Sampler(name, torch.device("cpu")), name, [adapter], form, tmp_path, check, votes)


def make(studio, **body) -> None:
    studio.start(body)
    while studio.job:
        time.sleep(0.02)


@pytest.fixture
def sets(tmp_path):
    """Two sets of three videos, red and blue, with one prompt in two seeds and a video alone."""
    names = [("a star", 0), ("a star", 1), ("rain", 0)]
    for i, folder in enumerate((tmp_path / "red", tmp_path / "blue")):
        folder.mkdir()
        pixels = torch.zeros(3, 5, 32, 32, dtype=torch.uint8)
        pixels[2 * i] = 200
        videos = [Video(folder / f"{n}.mp4", *name) for n, name in enumerate(names + [("sea", 0)] * i)]
        for video in videos:
            write_video(video.path, pixels, 8)
        write_manifest(folder, videos)
    (tmp_path / "red" / "generate.json").write_text('{"model": "red"}')
    return {"base": tmp_path / "red", "tuned": tmp_path / "blue"}


@needs_browser
def test_a_video_of_each_is_made_a_vote_cast_and_kept(studio, browser, tmp_path):
    with served(studio) as address:
        browser.open(address)
        browser.wait_for("!id('form').hidden")
        browser.evaluate("(fields.seed.value = 5, id('make').click())")
        browser.wait_for("!id('pair').hidden && player.left.readyState > 1 && player.right.readyState > 1")
        assert browser.evaluate("all = [...document.querySelectorAll('figcaption')].map(f => f.textContent)") == [
            "left",
            "right",
        ]
        page = browser.evaluate("document.documentElement.innerHTML + JSON.stringify(state.pair)")
        assert '"sides"' not in page
        assert not (tmp_path / "votes.json").exists()
        browser.open(address)  # a reload keeps pair and sides
        browser.wait_for("!id('pair').hidden && player.left.readyState > 1")
        browser.press("ArrowLeft")
        browser.wait_for("state.pair.chosen")
        assert browser.evaluate("id('left').textContent.trim()") == "tuned"
        assert browser.evaluate("id('rate').textContent") == "tuned wins 100 % [21, 100]"
        browser.evaluate("id('next').click()")
        browser.wait_for("state.pair.seed === 6 && !state.job")
        assert browser.evaluate("id('verdict').textContent + fields.seed.value") == "6", "the next pair is blind again"
        assert browser.problems == [], "nothing is asked of another address"
    (found,) = json.loads((tmp_path / "votes.json").read_text())["comparisons"]
    assert (found["base"]["adapter"], found["tuned"]["adapter"]) == (None, studio.adapters[0])
    assert (found["tuned"]["scale"], found["base"]["num_inference_steps"]) == (1.0, 2)
    (vote,) = found["votes"]
    assert (vote["prompt"], vote["seed"], vote["left"], vote["chosen"]) == ("a star", 5, "tuned", "tuned")
    base, tuned = (stored_frames(studio.pair.files[name]) for name in ("base", "tuned"))
    assert base.shape == (9, 32, 48, 3)
    assert not torch.equal(base, tuned)


@needs_browser
def test_two_sets_are_voted_on_by_the_keyboard(sets, browser, tmp_path):
    app = SetsApp(sets, Votes(tmp_path / "votes.json", lambda: 0.9), random.Random(0))  # red on the left
    with served(app) as address:
        browser.open(address)
        for _ in range(3):
            browser.wait_for("state.pair && !state.pair.chosen && player.left.readyState > 1")
            browser.press("ArrowRight")
            browser.wait_for("state.pair.chosen")
            browser.evaluate("id('next').click()")
        browser.wait_for("!id('empty').hidden")
        assert "3 of 3 pairs" in browser.evaluate("id('lead').textContent")
        assert "1 videos have no partner" in browser.evaluate("id('lead').textContent")
        assert "3 votes on 2 prompts" in browser.evaluate("id('counts').textContent")
        assert browser.evaluate("document.documentElement.scrollWidth") <= 1200
        assert browser.problems == []
    (found,) = json.loads((tmp_path / "votes.json").read_text())["comparisons"]
    assert found["base"]["model"] == "red"
    assert (found["win_rate"], found["ci95"]) == (1.0, wilson_interval(1.0, 2))
    again = SetsApp(sets, Votes(tmp_path / "votes.json"), random.Random(1))
    assert again.state()["sets"]["done"] == 3


def test_the_adapter_is_taken_off_again_and_one_noise_is_used(studio):
    make(studio)
    alone = Sampler(studio.model, torch.device("cpu"))
    asked = "a star", 3, studio.parse_request({}).sampling["base"]
    assert not torch.equal(studio.sampler.sample(*asked), alone.sample(*asked)), "the tuned one is made last"
    studio.sampler.use(None)
    assert torch.equal(studio.sampler.sample(*asked), alone.sample(*asked))
    make(studio, scale=0.0)
    files = studio.pair.files
    assert torch.equal(stored_frames(files["base"]), stored_frames(files["tuned"])), "scale 0 is the base"
    make(studio, adapter="")
    assert (studio.pair, studio.video(studio.single.stem, "left")) == (None, files["base"])


def test_sides_that_were_told_are_not_voted_on(studio):
    make(studio, blind=False)
    assert studio.state()["pair"]["sides"] == {"left": "tuned", "right": "base"}
    with pytest.raises(ValueError, match="got a vote on a pair whose sides were told"):
        studio.vote({"pair": studio.pair.key, "choice": "left"})


def test_a_stopped_or_broken_request_says_so_and_the_page_goes_on(studio, monkeypatch):
    sample = studio.sampler.sample
    stopping = lambda *args: (studio.stop({}), sample(*args))
    monkeypatch.setattr(studio.sampler, "sample", stopping)
    make(studio)
    assert studio.error.startswith("Stopped")

    def fail(*args):
        raise torch.OutOfMemoryError("CUDA out of memory\nmore")

    monkeypatch.setattr(studio.sampler, "sample", fail)
    make(studio)
    assert studio.error == "OutOfMemoryError: CUDA out of memory; lower the size or the number of frames"
    monkeypatch.setattr(studio.sampler, "sample", sample)
    make(studio)
    assert studio.error == ""
    assert studio.pair


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"seed": None}, "seed: got None, expected a whole number"),
        ({"seed": 1.5}, "seed: got 1.5, expected a whole number"),
        ({"prompt": 3}, "prompt: got 3, expected text"),
        ({"height": 30}, "height=30 is not divisible by 16"),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0, expected at least 1"),
        ({"scale": float("nan")}, "scale: got nan"),
        ({"adapter": "/etc/passwd"}, "adapter: got '/etc/passwd', expected one of the page's"),
        ({"num_frames": 13}, "memory_limit_gib: got 1, expected at least 2"),
    ],
)
def test_wrong_requests_start_nothing(studio, body, message):
    with pytest.raises(ValueError, match="got|divisible") as error:
        studio.start(body)
    assert message in "; ".join(getattr(error.value, "problems", [str(error.value)]))
    assert studio.job is None


def answer(address, body=None, **headers) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body, headers)) as found:
            return found.status, found.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_server_answers_its_own_page_alone(sets, tmp_path):
    app = SetsApp(sets, Votes(tmp_path / "votes.json"), random.Random(0))
    json_type = {"Content-Type": "application/json"}
    with served(app) as address:
        key = json.loads(answer(f"{address}state")[1])["pair"]["key"]
        vote = json.dumps({"pair": key, "choice": "tie"}).encode()
        assert answer(f"{address}state", Host="evil.example:80")[0] == 403  # a name that points here
        assert answer(f"{address}vote", vote, **json_type, Origin="http://evil.example")[0] == 403
        assert answer(f"{address}vote", vote, **{"Content-Type": "text/plain"})[0] == 403
        assert answer(f"{address}video/{key}/base")[0] == 404
        assert answer(f"{address}../votes.json")[0] == 404
        status, text = answer(f"{address}vote", b"[]", **json_type)
        assert (status, json.loads(text)["error"]) == (400, "got list, expected an object")
        assert not (tmp_path / "votes.json").exists()
        assert answer(f"{address}vote", vote, **json_type)[0] == 200
        with pytest.raises(ValueError, match="expected an address of this machine and a free port"):
            bind("127.0.0.1", int(address.rsplit(":")[-1].strip("/")))
    assert json.loads((tmp_path / "votes.json").read_text())["comparisons"][0]["equal"] == 1


def test_sets_without_a_pair_are_refused(sets, tmp_path):
    votes = Votes(tmp_path / "votes.json")
    with pytest.raises(ValueError, match="got the same folder twice"):
        SetsApp({"base": sets["base"], "tuned": sets["base"]}, votes, random.Random())
    write_manifest(sets["tuned"], [Video(sets["tuned"] / "0.mp4", "another", 0)])
    with pytest.raises(ValueError, match="got no prompt and seed in common"):
        SetsApp(sets, votes, random.Random())


def test_the_command_of_two_sets_refuses_what_is_no_set(sets, tmp_path, capsys):
    main = script("eval/vote.py").main
    assert main([str(sets["base"]), str(tmp_path / "none"), "--output", str(tmp_path / "v.json")]) == 2
    assert "none: got no folder there, expected one with videos" in capsys.readouterr().err
    (tmp_path / "v.json").write_text("{}")
    assert main([*map(str, sets.values()), "--output", str(tmp_path / "v.json")]) == 2
    assert "got a damaged file" in capsys.readouterr().err
