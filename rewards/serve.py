"""Serve a reward to runs in other processes: `python -m rewards.serve SPEC --port 8000`.

A run names the server in place of the reward, as in `--reward_funcs ocr=http://127.0.0.1:8000`. So
a reward can have packages, a device or a machine of its own. Videos, scores and gradients travel as
safetensors over plain HTTP. A request that does not come from this machine needs a token: any word
in the file --token_file, or in $CONTENTV_RLHF_REWARD_TOKEN.

Shape legend: B batch, C channels, T frames, H height, W width.
"""

import argparse
import hmac
import ipaddress
import json
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from rewards.cli.flags import device, mapping
from rewards.common.wire import PROTOCOL, TOKEN_VARIABLE, pack, unpack
from rewards.contract import (
    ATTRIBUTE_DEFAULTS,
    RewardError,
    call_guarded,
    check_prompts,
    check_scores,
    refuse_latents,
    reward_attribute,
    reward_name,
)
from rewards.load import load_reward, source_digests
from rewards.remote import read_token
from rewards.score_cache import digest, reward_identity
from rlhf.types import Prompt, reworded

MAX_MIB = 4096
CONNECTION_TIMEOUT = 60.0  # seconds between two parts of a request
DRAINED_BYTES = 2**20  # of a refused request, so that its sender reads the refusal


class RefusalError(Exception):
    """A request that is answered with a status other than 200, and with words."""

    def __init__(self, status: int, *, got: str, expected: str, cure: str):
        super().__init__(got)
        self.status, self.words = status, {"got": got, "expected": expected, "cure": cure}


class RewardServer(ThreadingHTTPServer):
    """A server of one reward, which scores one batch at a time.

    identity is the digest by which a run recognises the reward. token: None for no need of one.
    Raises RewardError for a reward of latents.
    """

    daemon_threads = True

    def __init__(
        self,
        reward: Callable,
        name: str,
        address: tuple[str, int],
        device: torch.device | str = "cpu",
        identity: str = "",
        token: str | None = None,
        max_mib: int = MAX_MIB,
    ):
        self.reward, self.name, self.device, self.token = reward, name, device, token
        self.max_bytes, self.scoring = max_mib * 2**20, threading.Lock()
        refuse_latents(name, reward, "give it to the run itself; `device` places it on another device of the host")
        if isinstance(reward, torch.nn.Module):
            reward.to(device).requires_grad_(False).eval()
        self.description = {
            "protocol": PROTOCOL,
            "reward": name,
            "digest": identity,
            "max_bytes": self.max_bytes,
            "checks_prompts": hasattr(reward, "check_prompts"),
        } | {attribute: reward_attribute(reward, attribute) for attribute in ATTRIBUTE_DEFAULTS}
        super().__init__(address, RewardHandler)

    @property
    def url(self) -> str:
        """The url that runs name."""
        return f"http://{self.server_address[0]}:{self.server_address[1]}"

    def score(self, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> bytes:
        """Return a message with scores (B,) and, if asked for, their gradient at the video.

        Raises RefusalError for another message than one of `Remote`, RewardError of the reward.
        """
        prompts, info, wanted = self._prompts(facts), facts.get("info"), facts.get("gradient")
        video = tensors.get("video")
        if not isinstance(info, dict) or not isinstance(wanted, bool):
            _refuse(f"info of {type(info).__name__}, gradient {wanted!r}", "a mapping, and true or false")
        if video is None or not video.is_floating_point() or video.ndim != 5 or not all(video.shape):
            got = "none" if video is None else f"one of {video.dtype} and shape {tuple(video.shape)}"
            _refuse(f"for the video {got}", "a tensor of floats (B, C, T, H, W) in [0, 1]")
        if len(video) != len(prompts):
            _refuse(f"{len(video)} videos and {len(prompts)} prompts", "as many of both")
        told = f"the prompts {[*map(str, prompts)]}", "scores of these videos", "correct the reward where it failed"
        with self.scoring, torch.set_grad_enabled(wanted):
            video_BCTHW = video.to(self.device).requires_grad_(wanted)
            scores_B = call_guarded(self.name, self.reward, video_BCTHW, prompts, info, *told)
            check_scores(self.name, scores_B, prompts, video_BCTHW.detach())
            answer = {"scores": scores_B}
            if wanted and scores_B.requires_grad:  # scores know nothing of their neighbours
                (gradient,) = torch.autograd.grad(scores_B.sum(), video_BCTHW, allow_unused=True)
                answer |= {} if gradient is None else {"gradient": gradient}
        return pack({}, **answer)

    def check_prompts(self, facts: dict[str, Any]) -> bytes:
        """Let the reward check prompts; return an empty message. Raises its RewardError."""
        with self.scoring:
            check_prompts(self.name, self.reward, self._prompts(facts))
        return pack({})

    def _prompts(self, facts: dict[str, Any]) -> list[Prompt]:
        """Return the prompts of a message with their rows.

        Raises RefusalError for a message to another reward (its digest) and malformed prompts.
        """
        if facts.get("digest") != self.description["digest"]:
            got = f"a run that began with another reward than {self.name!r} as it is served now"
            expected, cure = "the same spec, settings, code and weights", "serve that one again, or begin a new run"
            raise RefusalError(409, got=got, expected=expected, cure=cure)
        texts, rows = facts.get("prompts"), facts.get("rows")
        if not (_all_are(texts, str) and _all_are(rows, dict) and len(texts) == len(rows) > 0):
            _refuse("no prompts with a row for each", "a list of texts, and as many mappings")
        return [reworded(Prompt(row.get("prompt", ""), row), text) for text, row in zip(texts, rows, strict=True)]


class RewardHandler(BaseHTTPRequestHandler):
    """One request: GET / describes the reward, POST /score and /check_prompts ask it."""

    server: RewardServer
    timeout = CONNECTION_TIMEOUT

    def do_GET(self) -> None:
        """Answer with the description as JSON."""
        self._answer({"/": lambda message: json.dumps(self.server.description).encode()})

    def do_POST(self) -> None:
        """Answer with a message of `rewards.common.wire`."""
        score, check = self.server.score, self.server.check_prompts
        paths = {"/score": lambda message: score(*_read(message))}
        self._answer(paths | {"/check_prompts": lambda message: check(_read(message)[0])})

    def _answer(self, paths: dict[str, Callable[[bytes], bytes]]) -> None:
        """Send what the path's function returns, or why it refuses."""
        status, body = 200, b""
        try:
            message = self._message(paths)
            body = paths[self.path](message)
        except RefusalError as error:
            status, words = error.status, error.words
        except RewardError as error:
            status, words = 422, {"got": error.got, "expected": error.expected, "cure": error.cure}
        except Exception as error:  # such as the end of memory; the next batch may do
            got = f"{type(error).__name__}: {error}".rstrip(".")
            cure = "look at the server's output; for memory, serve with fewer frames or a smaller chunk in --kwargs"
            status, words = 500, {"got": got, "expected": "scores of the served reward", "cure": cure}
        if status != 200:
            self.log_error("%s %s: status %d, got %s", self.command, self.path, status, words["got"])
            body = json.dumps(words).encode()
        with suppress(ConnectionError):  # of a run that no longer waits
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def _message(self, paths: dict) -> bytes:
        """Return the body of an allowed request. Raises RefusalError for any other or a cut one."""
        length = self.headers.get("Content-Length", "0" if self.command == "GET" else "")
        size = int(length) if length.isdecimal() else None
        try:
            self._require_allowed(paths, size)
        except RefusalError:
            self.rfile.read(min(size or 0, DRAINED_BYTES))
            raise
        message = self.rfile.read(size)
        if len(message) < size:
            _refuse(f"{len(message)} of {size} bytes", "the whole body")
        return message

    def _require_allowed(self, paths: dict, size: int | None) -> None:
        """Raise RefusalError for a wrong token, an unknown path and a body of a wrong size."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ").encode()
        if self.server.token and not hmac.compare_digest(given, self.server.token.encode()):
            got = "another token than the server's" if given else "no token"
            cure = f"set token_file in reward_kwargs, or {TOKEN_VARIABLE}, to that of the server"
            raise RefusalError(401, got=got, expected="the server's token", cure=cure)
        if self.path not in paths:
            expected, cure = "GET /, POST /score or POST /check_prompts", "correct the url"
            raise RefusalError(404, got=f"{self.command} {self.path[:80]}", expected=expected, cure=cure)
        if size is None:
            expected, cure = "a Content-Length in bytes", "send the length of the body"
            raise RefusalError(411, got="no length", expected=expected, cure=cure)
        if size > self.server.max_bytes:
            got, expected = f"a body of {size} bytes", f"at most {self.server.max_bytes}"
            raise RefusalError(413, got=got, expected=expected, cure="raise --max_mib, or send fewer videos")

    def log_request(self, code="-", size="-") -> None:
        """Say nothing of requests that were answered; `log_error` tells the others."""


def _read(message: bytes) -> tuple[dict, dict[str, torch.Tensor]]:
    """Unpack a message. Raises RefusalError for a malformed one."""
    try:
        return unpack(message)
    except ValueError as error:
        _refuse(str(error), "a message of rewards.common.wire")


def _refuse(got: str, expected: str) -> None:
    """Raise RefusalError (status 400) for a malformed message."""
    raise RefusalError(400, got=got, expected=expected, cure="send what rewards.remote sends")


def _all_are(values: Any, kind: type) -> bool:
    """Return whether values is a list of this type alone."""
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def parse_serve_args(argv: list[str] | None) -> argparse.Namespace:
    """Parse the flags of the command."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m rewards.serve", description=__doc__, formatter_class=formatter)
    parser.add_argument("spec", help="built-in name, path/to/file.py:Class, package.module:Class or an entry point")
    parser.add_argument("--port", type=_port, default=8000, help="default 8000; 0: any that is free")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at; default 127.0.0.1: this machine only"
    )
    parser.add_argument("--kwargs", type=mapping, default={}, help="arguments of the reward, for example '{frames: 8}'")
    parser.add_argument("--device", type=device, default="cpu", help="where the reward runs; default cpu")
    parser.add_argument("--token_file", help=f"file with the token; default: ${TOKEN_VARIABLE}, else none")
    parser.add_argument("--max_mib", type=_size, default=MAX_MIB, help=f"largest batch in MiB; default {MAX_MIB}")
    arguments = parser.parse_args(argv)
    try:
        arguments.token = read_token(arguments.spec, arguments.token_file)
    except RewardError as error:
        parser.error(str(error))
    if not arguments.token and not _is_loopback(arguments.host):
        got = f"got --host {arguments.host} and no token, expected one where other machines may ask"
        parser.error(f"{got}; write a long random word into a file and name it by --token_file")
    return arguments


def _port(text: str) -> int:
    """Parse a port, 0 to 65535."""
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a port from 0 to 65535")
    return int(text)


def _size(text: str) -> int:
    """Parse a whole number of MiB, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a whole number of MiB, 1 or more")
    return int(text)


def _is_loopback(host: str) -> bool:
    """Return whether a host name or address is this machine's loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def served_digest(spec: str, kwargs: dict) -> str:
    """Return a digest of a reward's spec, settings, source and weights files."""
    return digest(reward_identity(spec, kwargs), json.dumps(source_digests([spec]), sort_keys=True))


def main(argv: list[str] | None = None) -> int:
    """Load the reward, serve it until interrupted, and return the exit status."""
    arguments = parse_serve_args(argv)
    try:
        reward = load_reward(arguments.spec, **arguments.kwargs)
        identity = served_digest(arguments.spec, arguments.kwargs)
        address, name = (arguments.host, arguments.port), reward_name(arguments.spec)
        where = arguments.device, identity, arguments.token, arguments.max_mib
        server = RewardServer(reward, name, address, *where)
    except RewardError as error:
        print(f"rewards.serve: {error}", file=sys.stderr)
        return 1
    except (OSError, OverflowError) as error:
        where, expected = f"--host {arguments.host} --port {arguments.port}", "an address of this machine, a free port"
        print(f"rewards.serve: {where}: got {error}, expected {expected}; choose others", file=sys.stderr)
        return 1
    print(f"Serving {name} on {arguments.device} at {server.url}; end with Ctrl-C.", flush=True)
    with server:
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0


if __name__ == "__main__":
    sys.exit(main())
