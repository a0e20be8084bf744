"""A reward that another process serves by `rewards.serve`, here or on another machine.

Shape legend: B batch, C channels, T frames, H height, W width.
"""

import http.client
import json
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import torch
from torch.autograd.function import once_differentiable

from rewards.common.frames import check_positive
from rewards.common.wire import PROTOCOL, TOKEN_VARIABLE, pack, unpack
from rewards.contract import ATTRIBUTE_DEFAULTS, RewardError, is_url
from rlhf.types import row_of

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between attempts; each pause is twice the one before
RESUME = "a stopped run goes on from its last step with --resume_from_checkpoint latest"


class Remote:
    """A client of a reward server. Scores and their gradient at the pixels come in one answer.

    url         of the server, such as http://127.0.0.1:8000
    token_file  file that holds the server's token; without one, $CONTENTV_RLHF_REWARD_TOKEN does
    timeout     seconds that one answer may take
    retries     attempts after the first where the server cannot be reached, with pauses of 1, 2, 4,
                ... seconds, at most 60
    """

    def __init__(self, *, url: str, token_file: str | None = None, timeout: float = 300.0, retries: int = 4):
        """Connect, and take over the attributes of the served reward. Raises RewardError."""
        self.name, self.url, self.timeout, self.retries = url, url, timeout, retries
        self._place = check_url(url)
        check_positive(url, timeout=timeout)
        if type(retries) is not int or retries < 0:
            raise RewardError(url, got=f"retries={retries!r}", expected="a whole number from 0 on", cure="correct it")
        self._token = read_token(url, token_file)
        self.served = self._connect()
        for attribute in ATTRIBUTE_DEFAULTS:
            setattr(self, attribute, self.served[attribute])

    def __call__(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> torch.Tensor:
        """Return the server's scores (B,), with its gradient if the video has one."""
        gradient = self.differentiable and torch.is_grad_enabled() and video_BCTHW.requires_grad
        answer = self._send("score", self._score_message(video_BCTHW, prompts, info, gradient))
        scores_B = answer["scores"].to(video_BCTHW.device)
        if gradient and "gradient" in answer:  # without one, the scores do not depend on the pixels
            return _WithGradient.apply(video_BCTHW, scores_B, answer["gradient"].to(video_BCTHW.device))
        return scores_B

    def start(self, video_BCTHW: torch.Tensor, prompts: list[str], **info) -> Callable[[], torch.Tensor]:
        """Send a batch; return a function that waits for its scores (B,), without gradient."""
        message, waiting = self._score_message(video_BCTHW, prompts, info, gradient=False), Future()

        def ask() -> None:
            try:
                waiting.set_result(self._send("score", message)["scores"])
            except BaseException as error:  # raised where the scores are wanted
                waiting.set_exception(error)

        threading.Thread(target=ask, daemon=True).start()  # which no interrupted run waits for
        return lambda: waiting.result().to(video_BCTHW.device)

    def check_prompts(self, prompts: list[str]) -> None:
        """Let the served reward check the prompts. Raises RewardError for one that it refuses."""
        if self.served["checks_prompts"]:
            rows = [row_of(prompt) for prompt in prompts]
            self._send("check_prompts", self._pack({"prompts": [str(prompt) for prompt in prompts], "rows": rows}))

    @property
    def source_digest(self) -> str:
        """The digest of the served reward's spec, settings, source and weights files."""
        return self.served["digest"]

    def _connect(self) -> dict:
        """Return the server's description of the reward."""
        answer = self._request_with_retries("GET", "", b"")
        try:
            served = json.loads(answer)
            if served["protocol"] == PROTOCOL and {*ATTRIBUTE_DEFAULTS, "digest", "checks_prompts"} <= set(served):
                return served
            got = f"a server of protocol {served['protocol']}"
        except (ValueError, KeyError, TypeError):
            got = f"an answer that starts with {answer[:40]!r}"
        self._raise(got, f"a reward server of protocol {PROTOCOL}", "correct the url, or use one version on both sides")

    def _score_message(self, video_BCTHW: torch.Tensor, prompts: list[str], info: dict, gradient: bool) -> bytes:
        """Return the message that asks for the scores of a batch. Raises RewardError as `_pack`."""
        facts = {"prompts": [str(prompt) for prompt in prompts], "info": {k: v for k, v in info.items() if k != "rows"}}
        rows = info.get("rows") or [row_of(prompt) for prompt in prompts]
        return self._pack(facts | {"rows": rows, "gradient": gradient}, video=video_BCTHW)

    def _pack(self, facts: dict, **tensors: torch.Tensor) -> bytes:
        """Return a message with the served reward's digest.

        Raises RewardError for facts that JSON does not have and for too many bytes.
        """
        try:
            message = pack(facts | {"digest": self.source_digest}, **tensors)
        except (TypeError, ValueError) as error:
            got, cure = f"a row or info that JSON does not have ({error})", "write its values as text or numbers"
            self._raise(got, "texts, numbers, lists and mappings, which can be sent", cure, error)
        if len(message) > self.served["max_bytes"]:
            got = f"a batch of {len(message) / 2**20:.0f} MiB"
            cure = "raise --max_mib of rewards.serve, or lower the batch size, frames or video size"
            self._raise(got, f"at most {self.served['max_bytes'] / 2**20:.0f} MiB", cure)
        return message

    def _send(self, path: str, message: bytes) -> dict[str, torch.Tensor]:
        """Return the tensors of the answer to a message. Raises RewardError if none comes."""
        answer = self._request_with_retries("POST", path, message)
        try:
            return unpack(answer)[1]
        except ValueError as error:
            self._raise(f"an answer that is {error}", "scores", "look at the server's output", error)

    def _request_with_retries(self, method: str, path: str, message: bytes) -> bytes:
        """Return the body of the answer; retry with pauses while the server cannot be reached.

        Raises RewardError for no answer in time, no server after the last attempt, and any status
        but 200.
        """
        for pause in [*(min(FIRST_PAUSE * 2**i, LONGEST_PAUSE) for i in range(self.retries)), None]:
            try:
                status, answer = self._request(method, path, message)
            except TimeoutError as error:
                got, cure = f"no answer within {self.timeout:g} s", f"raise timeout, or look at the server; {RESUME}"
                self._raise(got, "scores in time", cure, error)
            except (OSError, http.client.HTTPException) as error:
                if pause is None:
                    got = f"no server ({type(error).__name__}: {error}) in {self.retries + 1} attempts"
                    cure = f"start `python -m rewards.serve` there, or correct the url; {RESUME}"
                    self._raise(got, "the reward server that answers there", cure, error)
                time.sleep(pause)
                continue
            if status == 200:
                return answer
            self._raise_refusal(status, answer)
        raise AssertionError("the last attempt returns or raises")

    def _request(self, method: str, path: str, message: bytes) -> tuple[int, bytes]:
        """Send one request, without a proxy; return status and body.

        Raises OSError or HTTPException if there is no answer.
        """
        secure = self._place.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(self._place.hostname, self._place.port, timeout=self.timeout)
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        try:
            connection.request(method, f"{self._place.path.rstrip('/')}/{path}", message, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _raise_refusal(self, status: int, answer: bytes) -> None:
        """Raise the RewardError that the server sent, or one that quotes it."""
        try:
            words = json.loads(answer)
            got, expected, cure = words["got"], words["expected"], words["cure"]
        except (ValueError, KeyError, TypeError):
            got, expected, cure = f"status {status}: {answer[:200]!r}", "scores", "look at the server's output"
        self._raise(got, expected, cure)

    def _raise(self, got: str, expected: str, cure: str, source: Exception | None = None) -> None:
        """Raise a RewardError that names this reward."""
        raise RewardError(self.name, got=got, expected=expected, cure=cure) from source


class _WithGradient(torch.autograd.Function):
    """Scores (B,) whose gradient at the video (B, C, T, H, W) is known."""

    @staticmethod
    def forward(ctx, video_BCTHW, scores_B, gradient_BCTHW):
        """Return the scores."""
        ctx.save_for_backward(gradient_BCTHW)
        return scores_B.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_B):
        """Return the server's gradient times that of each score."""
        (gradient_BCTHW,) = ctx.saved_tensors
        return grad_B.reshape(-1, 1, 1, 1, 1) * gradient_BCTHW, None, None


def check_url(url: str) -> SplitResult:
    """Return the parts of a server's url. Raises RewardError for one without a host or port."""
    try:
        place = urlsplit(url)
        if is_url(url) and place.hostname and (place.port or place.scheme == "https") and not place.username:
            return place
        problem = ""
    except ValueError as error:
        problem = f" ({error})"
    raise RewardError(url, got=f"a url {url!r}{problem}", expected="http://HOST:PORT", cure="correct the url")


def read_token(name: str, path: str | None) -> str | None:
    """Return the token in a file, else that of the environment, None for none.

    Raises RewardError, which does not quote it.
    """
    if path is None and not os.environ.get(TOKEN_VARIABLE):
        return None
    try:
        token = os.environ[TOKEN_VARIABLE] if path is None else Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # UnicodeDecodeError quotes a byte
        got, cure = f"no token in {path} ({type(error).__name__})", "correct token_file, or its rights"
        raise RewardError(name, got=got, expected="a text file that can be read", cure=cure) from None
    if not re.fullmatch(r"[!-~]+", token := token.strip()):
        got, cure = f"no token in {path or TOKEN_VARIABLE}", "write one into it"
        raise RewardError(name, got=got, expected="one word of ASCII", cure=cure)
    return token
