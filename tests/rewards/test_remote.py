"""A served reward: equal to the local one, refused in words, and a run that outlives its server."""

import http.client
import json
import pickle
import re
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
import torch
from processes import FOLDER, free_port, start
from reward_checks import make_video
from runs import At, OneProcess, adapter, saved_adapter, train
from served import serve
from tiny import tiny_pipeline
from toy_rewards import PROMPTS, rows_without_cost

from rewards import RewardError, RewardMix, load_reward, probe, reward_name
from rewards.common.wire import pack, unpack
from rewards.load import check_spec, source_digests
from rewards.remote import Remote
from rewards.score_cache import ScoreCache, Scorer, reward_identity, score_conditions
from rewards.serve import RewardServer, main, parse_serve_args, served_digest
from rlhf.evaluation.held_out import EVAL_FINGERPRINT, EvalOptions, HeldOut, fingerprint
from rlhf.method.decode import Decoder, Sampled
from rlhf.trainer import RewardGradientTrainer
from rlhf.types import Prompt

REWARD = f"{FOLDER / 'served.py'}:Picky"
INFO = {"fps": 8, "seed": 3, "step": 5}


@pytest.fixture
def quick(monkeypatch):
    """Pauses between attempts are short."""
    monkeypatch.setattr("rewards.remote.FIRST_PAUSE", 0.02)


@contextmanager
def process(port: int, spec: str = REWARD):
    """A server in a process of its own, killed at the end."""
    (started,) = start(serve, spec, port, processes=1)
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)) and started.process.is_alive():
            time.sleep(0.05)
        yield started.process
    finally:
        started.process.kill()
        started.process.join()


@contextmanager
def thread(reward, **options):
    """A server in this process; its url."""
    with RewardServer(reward, "toy", ("127.0.0.1", 0), **options) as server:
        server.daemon_threads = False  # closing waits for them: they keep and restore this process's state
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server.url
        finally:
            server.shutdown()


def graded(reward, video, prompts, **info):
    pixels = video.detach().requires_grad_()
    total, scores = RewardMix({"toy": reward}, [0.7])(pixels, prompts, **INFO | info)
    return scores["toy"], torch.autograd.grad(total.sum(), pixels)[0]


def test_another_process_scores_to_the_bit_with_its_gradient():
    port, video = free_port(), make_video(5, 24, 40, batch=2)
    prompts = [Prompt("a red fox", {"target": 0.25}), Prompt("rain", {"target": 0.75})]
    with process(port):
        local, remote = load_reward(REWARD), load_reward(f"far=http://127.0.0.1:{port}")
        assert (remote.frames, remote.mean, remote.std, remote.differentiable) == (3, 0.5, 2.0, True)
        sliced = torch.cat([video, video], 4)[..., ::2, :40]
        for pixels in (video, video.to(memory_format=torch.channels_last_3d), sliced):
            scores, grad = graded(local, pixels, prompts)
            far_scores, far_grad = graded(remote, pixels, prompts)
            assert torch.equal(scores, far_scores)
            assert grad[:, :, :3].abs().min() > 0
            torch.testing.assert_close(far_grad, grad, rtol=1e-6, atol=1e-6 * grad.abs().max().item())
        other = graded(remote, video, [prompts[1], prompts[0]], step=6)[0]
        assert torch.equal(other, graded(local, video, [prompts[1], prompts[0]], step=6)[0])
        assert not torch.equal(other, scores)
        assert probe(remote, (3, 5, 24, 40), prompts).frames == 3
        with torch.no_grad():
            assert not remote(video[:, :, :3], prompts, **INFO).requires_grad
        with pytest.raises(RewardError, match="got ValueError: 'snow' has no target.*line .*Correct the prompt"):
            remote.check_prompts(["snow"])
        with pytest.raises(RewardError, match="KeyError.*no field 'target' in the row.*served.py, line"):
            remote(video, ["snow", "ice"], **INFO)


def test_a_reward_without_a_gradient_stays_one():
    def count(video, prompts):
        return (video > 0.5).float().sum((1, 2, 3, 4))

    count.differentiable = False
    video = make_video(2, 8, 8)
    with thread(count) as url:
        remote = load_reward(url)
        assert not remote.differentiable
        assert torch.equal(remote(video.requires_grad_(), ["a", "b"], **INFO), count(video, []))
        with pytest.raises(RewardError, match="got differentiable=False"):
            graded(remote, video, ["a", "b"])


def test_a_gradient_that_is_missing_is_found():
    no_gradient = pytest.raises(RewardError, match="no gradient at the pixels")
    with thread(lambda video, prompts: (video > 0.5).float().mean((1, 2, 3, 4))) as url, no_gradient:
        probe(load_reward(url), (3, 2, 8, 8))


def test_errors_of_the_reward_are_told_with_their_words():
    nan = pytest.raises(RewardError, match="got the score nan for prompt 'a'; expected a finite number")
    with thread(lambda video, prompts: video.mean((1, 2, 3, 4)) * float("nan")) as url, nan:
        load_reward(url)(make_video(2, 8, 8), ["a", "b"])
    with thread(lambda video, prompts: video.mean((1, 2, 3, 4)), max_mib=1) as url:
        with pytest.raises(RewardError, match=r"got a batch of 2 MiB; expected at most 1 MiB. Raise --max_mib"):
            load_reward(url)(torch.zeros(1, 3, 2, 300, 300), ["a"])
        with pytest.raises(RewardError, match="got a row or info that JSON does not have .*date is not JSON"):
            load_reward(url)(make_video(2, 8, 8), ["a", "b"], day=date(2026, 1, 1))


def request(url, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    status, answer = response.status, response.read()
    connection.close()
    return status, answer


def test_bad_requests_are_refused_in_words():
    reward = lambda video, prompts: video.mean((1, 2, 3, 4))
    video, facts = torch.rand(1, 3, 1, 4, 4), {"digest": "x", "prompts": ["a"], "rows": [{}], "info": {}}
    message = pack(facts | {"gradient": False}, video=video)
    cases = [
        (400, "no safetensors message", pickle.dumps({"video": 1})),
        (400, "no safetensors message", message[:-3]),
        (400, "no safetensors message", b""),
        (400, "no prompts with a row for each", pack(facts | {"rows": [3], "gradient": False}, video=video)),
        (400, "2 videos and 1 prompts", pack(facts | {"gradient": True}, video=torch.rand(2, 3, 1, 4, 4))),
        (400, r"shape \(3, 4\)", pack(facts | {"gradient": True}, video=torch.rand(3, 4))),
        (400, "torch.uint8", pack(facts | {"gradient": True}, video=torch.ones(1, 3, 1, 4, 4, dtype=torch.uint8))),
        (400, "for the video none", pack(facts | {"gradient": True})),
        (400, "gradient None", pack(facts, video=video)),
        (409, "a run that began with another reward", pack(facts | {"digest": "y", "gradient": True}, video=video)),
    ]
    with thread(reward, identity="x", token="secret", max_mib=1) as url:
        allowed = {"Authorization": "Bearer secret"}
        for status, words, body in cases:
            got, answer = request(url, "POST", "/score", body, allowed)
            assert got == status, answer
            assert re.search(words, json.loads(answer)["got"])
            assert {"expected", "cure"} <= set(json.loads(answer))
        for headers in ({}, {"Authorization": "Bearer secreT"}):
            status, answer = request(url, "POST", "/score", message, headers)
            assert status == 401
            assert b"secret" not in answer
        assert request(url, "GET", "/", headers={})[0] == 401
        assert request(url, "POST", "/run", b"", allowed)[0] == 404
        assert request(url, "POST", "/score", b"x" * (2**20 + 1), allowed)[0] == 413
        assert request(url, "POST", "/score", None, allowed | {"Content-Length": "many"})[0] == 411
        assert request(url, "DELETE", "/score", headers=allowed)[0] == 501
        status, answer = request(url, "POST", "/score", message, allowed)
        assert status == 200, "it serves on after all of these"
        assert torch.equal(unpack(answer)[1]["scores"], reward(video, []))


def test_a_token_is_read_from_a_file_or_the_environment(tmp_path, monkeypatch, capsys):
    file = tmp_path / "token.txt"
    file.write_text("open-sesame\n")
    with thread(lambda video, prompts: video.mean((1, 2, 3, 4)), token="open-sesame") as url:
        assert Remote(url=url, token_file=str(file)).frames == "all"
        with pytest.raises(RewardError, match="got no token; expected the server's token. Set token_file"):
            Remote(url=url)
        monkeypatch.setenv("CONTENTV_RLHF_REWARD_TOKEN", "another")
        with pytest.raises(RewardError, match="got another token"):
            Remote(url=url)
    with pytest.raises(RewardError, match="no token in .*missing"):
        Remote(url=url, token_file=str(tmp_path / "missing"))
    file.write_text("open sesame")
    for name, words in ((str(file), "expected one word of ASCII"), (None, "in CONTENTV_RLHF_REWARD_TOKEN")):
        monkeypatch.setenv("CONTENTV_RLHF_REWARD_TOKEN", "open\nsesame")
        with pytest.raises(RewardError, match=words) as raised:
            Remote(url=url, token_file=name)
        assert "sesame" not in str(raised.value)
    monkeypatch.setenv("CONTENTV_RLHF_REWARD_TOKEN", "another")
    assert parse_serve_args(["flicker", "--host", "0.0.0.0"]).token == "another"
    monkeypatch.delenv("CONTENTV_RLHF_REWARD_TOKEN")
    with pytest.raises(SystemExit):
        parse_serve_args(["flicker", "--host", "0.0.0.0"])
    told = " ".join(capsys.readouterr().err.split())
    assert "got --host 0.0.0.0 and no token, expected one" in told
    assert parse_serve_args(["flicker", "--host", "localhost"]).token is None


def test_a_server_that_is_not_there_or_is_another(quick):
    port = free_port()
    with pytest.raises(RewardError, match=r"got no server \(ConnectionRefused.*in 3 attempts; expected the reward"):
        load_reward(f"http://127.0.0.1:{port}", retries=2)
    slow = lambda video, prompts: time.sleep(0.5) or video.mean((1, 2, 3, 4))
    with thread(slow) as url, pytest.raises(RewardError, match="got no answer within 0.2 s; .*[Rr]aise timeout"):
        load_reward(url, timeout=0.2)(make_video(2, 8, 8), ["a", "b"])
    for url in ("http://", "http://host", "http://host:port", "http://me:pw@host:1"):
        with pytest.raises(RewardError, match="expected http://HOST:PORT"):
            check_spec(url)
    for wrong in ({"timeout": 0}, {"retries": -1}, {"retries": 1.5}):
        with pytest.raises(RewardError, match=f"got {next(iter(wrong))}="):
            load_reward("http://host:1", **wrong)
    assert reward_name("http://host:1") == "remote"
    assert reward_name("ocr=http://host:1") == "ocr"


def test_the_command_says_why_it_cannot_serve(capsys, monkeypatch):
    assert main(["flickr"]) == 1
    assert "The nearest name is 'flicker'" in capsys.readouterr().err
    with thread(lambda video, prompts: video.mean((1, 2, 3, 4))) as url:
        assert main(["flicker", "--port", url.rsplit(":", 1)[1]]) == 1
    assert "expected an address of this machine, a free port; choose others" in capsys.readouterr().err
    monkeypatch.setattr(RewardServer, "serve_forever", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["flicker", "--port", "0"]) == 0
    assert re.fullmatch(r"Serving flicker on cpu at http://127.0.0.1:\d+; end with Ctrl-C.\n", capsys.readouterr().out)


def test_scores_are_kept_by_what_is_served(tmp_path, make_args):
    source, png = tmp_path / "mine.py", Path("docs/images/nano_before_after.png").resolve()
    source.write_text("def mine(video, prompts, **info):\n    return video.mean((1, 2, 3, 4)) * info['rows'][0]['w']\n")
    spec = f"{source}:mine"
    first = served_digest(spec, {})
    source.write_text(source.read_text() + "\n")
    second = served_digest(spec, {})
    assert first != second != served_digest(spec, {"w": 1})
    reward = load_reward(spec)
    with thread(reward, identity=first) as url:
        scorer = Scorer([f"far={url}"], {}, ScoreCache(tmp_path / "cache"), "cpu")
        scores = [scorer(png, Prompt("a", {"w": weight}))["scores"]["far"] for weight in (1.0, 2.0, 1.0)]
        assert scores[1] == pytest.approx(2 * scores[0])
        assert scores[2] == scores[0]
        identity, conditions = reward_identity(f"far={url}", {}), score_conditions(f"far={url}", {}, None)
        args = make_args(reward_funcs=[f"far={url}"])
        base = fingerprint(args, EVAL_FINGERPRINT)
    with thread(reward, identity=first) as url:
        assert reward_identity(f"far={url}", {}) == identity
        assert score_conditions(f"far={url}", {}, None) == conditions
    with thread(reward, identity=second) as url:
        assert reward_identity(f"far={url}", {}) != identity
        assert score_conditions(f"far={url}", {}, None) != conditions
        assert source_digests([f"far={url}"]) == {"far": second}
        assert fingerprint(replace(args, reward_funcs=[f"far={url}"]), EVAL_FINGERPRINT) != base


def test_an_evaluation_samples_the_next_batch_while_one_is_scored(tmp_path):
    """The first batch is scored only once the second was sampled; else the server waits in vain."""
    sampled, order = threading.Event(), []

    def patient(video, prompts):
        order.append(list(prompts))
        assert len(order) > 1 or sampled.wait(20)
        return video.mean((1, 2, 3, 4))

    def videos(prompts, noise):
        if len(order) or prompts[0] == PROMPTS[2]:
            sampled.set()
        return Sampled(noise[:, :3].sigmoid().repeat(1, 1, 1, 4, 4))

    options = EvalOptions(0, 2, 0, 0, (2, 8, 8), {})

    def evaluate(judge):
        return HeldOut(videos, {"j": judge}, PROMPTS, (16, 2, 2, 2), 8, options, tmp_path, OneProcess()).evaluate(
            "x", 0
        )

    local = evaluate(lambda video, prompts: video.mean((1, 2, 3, 4)))
    sampled.clear()
    with thread(patient) as url:
        far = evaluate(load_reward(url))
    assert order == [PROMPTS[:2], PROMPTS[2:4], PROMPTS[4:]]
    assert torch.equal(far.scores["j"], local.scores["j"])
    assert far.scores["j"].unique().numel() == 6


def test_a_step_without_gradient_samples_the_next_batch_while_one_is_scored(make_args, tmp_path, monkeypatch):
    """The first batch is scored only once the second was decoded; the run is that of a local reward."""
    decoded, calls, decode = threading.Semaphore(0), [], Decoder.__call__

    def counted(self, latents, step):
        decoded.release()
        return decode(self, latents, step)

    def score(video, prompts):
        return (video.mean((1, 2, 3, 4)) * 1000).round()

    def patient(video, prompts, probe=False):
        if not probe:
            calls.append(prompts)
            assert len(calls) > 1 or (decoded.acquire(timeout=20) and decoded.acquire(timeout=20))
        return score(video, prompts)

    score.differentiable = patient.differentiable = False
    many = {"gradient_accumulation_steps": 3, "method": "nft", "method_kwargs": {"group_size": 2, "num_levels": 2}}
    runs = [make_args(output_dir=str(tmp_path / name), max_steps=2, **many) for name in ("near", "far")]
    train(runs[0], score)
    monkeypatch.setattr(Decoder, "__call__", counted)
    with thread(patient) as url:
        remote = load_reward(url)
        remote.name = "score"
        train(runs[1], remote)
    assert len(calls) == 6
    assert rows_without_cost(runs[0]) == rows_without_cost(runs[1])
    assert torch.equal(adapter(runs[0]), adapter(runs[1]))


@pytest.mark.parametrize("place", ["here", "served"])
def test_a_step_without_gradient_ends_with_the_words_of_the_reward(place, make_args):
    def fails(video, prompts, step, probe=False):
        if step == 1 and not probe:
            raise ValueError("worn out")
        return video.mean((1, 2, 3, 4))

    fails.differentiable = False
    many = {"gradient_accumulation_steps": 2, "method": "nft", "method_kwargs": {"group_size": 2, "num_levels": 2}}
    args = make_args(max_steps=3, **many)
    with thread(fails) as url, pytest.raises(RewardError, match="got ValueError: worn out for the prompts"):
        train(args, fails if place == "here" else load_reward(url))
    assert [path.name for path in (Path(args.output_dir) / "checkpoints").iterdir()] == ["step-1"]


def test_a_run_saves_its_state_when_its_server_is_killed_and_goes_on_when_it_is_back(make_args, tmp_path, quick):
    port, spec = free_port(), f"{FOLDER / 'served.py'}:smooth"
    prompts = [Prompt(prompt, {"target": i / 6}) for i, prompt in enumerate(PROMPTS)]
    args = make_args(reward_funcs=[f"far=http://127.0.0.1:{port}"], max_steps=4, save_steps=0)
    args = replace(args, reward_kwargs={"far": {"retries": 2}})

    def run(args, **kwargs):
        RewardGradientTrainer(tiny_pipeline(), None, args, prompts, **kwargs).train()

    with process(port, spec) as server:
        killer = At(2, lambda control: (server.kill(), server.join()))
        with pytest.raises(RewardError, match="got no server .*--resume_from_checkpoint latest"):
            run(args, callbacks=[killer])
    assert [path.name for path in (Path(args.output_dir) / "checkpoints").iterdir()] == ["step-2"]
    with process(port, spec):
        run(replace(args, resume_from_checkpoint="latest"))
    local = make_args(output_dir=str(tmp_path / "local"), reward_funcs=[f"far={spec}"], max_steps=4)
    run(local)
    assert rows_without_cost(args) == rows_without_cost(local)
    for name, tensor in saved_adapter(args).items():
        assert torch.equal(tensor, saved_adapter(local)[name])
