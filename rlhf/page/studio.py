"""The page of demo.py: videos of the base and of an adapter from one noise, and a blind vote."""

import hashlib
import json
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rlhf.adapter.merge import check_lora_scale
from rlhf.checks import check_sampling
from rlhf.evaluation.generate import Variant, save_video
from rlhf.evaluation.sampler import Sampler
from rlhf.generator.files import SamplingDefaults
from rlhf.page.server import bind, serve
from rlhf.page.votes import Pair, VoteError, Votes, describe_pair

SAMPLING = {field.name: field.type for field in fields(SamplingDefaults)}
KINDS = SAMPLING | {"prompt": str, "adapter": str, "seed": int, "scale": float}  # of the form's values
WORDS = {int: "a whole number", float: "a number", str: "text"}


class Stopped(Exception):
    """The user stopped the sampling."""


@dataclass(frozen=True)
class Request:
    """A checked request for one video, or for two that are compared.

    video     what all videos share: prompt, negative prompt and seed
    sampling  by model, "base" or "tuned"
    variants  the weights and the adapter, by model
    blind     whether the page hides which video is which
    """

    video: dict
    sampling: dict[str, SamplingDefaults]
    variants: dict[str, Variant]
    blind: bool

    def settings(self, model: str) -> dict:
        """Return what a model's video is made with, without what `video` holds for all."""
        variant, sampling = self.variants[model], asdict(self.sampling[model])
        made = variant.identity() | {"adapter": variant.lora and str(variant.lora)} | sampling
        return {name: value for name, value in made.items() if name not in self.video}


class StudioApp:
    """One sampler, its form and its votes. One request runs at a time.

    sampler: the loaded model. adapters: the LoRAs that the form offers. form: its first values.
    folder: for the videos. check: raises ValueError for sampling that does not
    fit the device.
    """

    def __init__(
        self,
        sampler: Sampler,
        model: str,
        adapters: list[str],
        form: dict[str, Any],
        folder: Path,
        check: Callable[[SamplingDefaults], Any],
        votes: Votes,
    ):
        self.sampler, self.model, self.adapters, self.form = sampler, model, adapters, form
        self.folder, self.check, self.votes = folder, check, votes
        self.actions = {"start": self.start, "vote": self.vote, "stop": self.stop}
        self.lock, self.made, self.told = threading.Lock(), {}, set()
        self.job: dict[str, Any] | None = None
        self.error, self.pair, self.single, self.stopped = "", None, None, False

    def state(self) -> dict[str, Any]:
        """Return what the page shows: form, progress, error, pair or single video, and votes."""
        demo = {"model": self.model, "adapters": self.adapters, "form": self.form}
        pair = self.pair and describe_pair(self.votes, self.pair, self.pair.key in self.told)
        result = self.votes.result(self.pair.settings) if self.pair else None
        single = self.single and {"key": self.single.stem, "prompt": self.form["prompt"]}
        return {"demo": demo, "job": self.job, "error": self.error, "pair": pair, "single": single, "result": result}

    def video(self, key: str, side: str) -> Path | None:
        """Return the file on a side of a pair that was shown, or the single video, or None."""
        return self.single if self.single and key == self.single.stem else self.votes.file(key, side)

    def vote(self, body: dict) -> None:
        """Record a vote on a pair that was shown blind. Raise VoteError for any other pair."""
        if body.get("pair") in self.told:
            raise VoteError("got a vote on a pair whose sides were told, expected a blind one; make another pair")
        self.votes.vote(body.get("pair"), body.get("choice"))

    def stop(self, body: dict) -> None:
        """Stop the sampling after its current denoising step."""
        self.stopped = True

    def start(self, body: dict) -> None:
        """Check a request and make its videos in a thread.

        Raises ValueError for a wrong request, or if another one runs.
        """
        request = self.parse_request(body)
        with self.lock:
            if self.job:
                raise ValueError("got a second request, expected one at a time; wait for it, or stop it")
            self.job, self.error, self.stopped = {"stage": "starting", "done": 0, "total": 0}, "", False
        self.form = self.form | {name: body[name] for name in (*KINDS, "blind") if name in body}
        threading.Thread(target=self._make_videos, args=(request,), daemon=True).start()

    def parse_request(self, body: dict) -> Request:
        """Return the request of a form, checked without weights. Raises ValueError if wrong."""
        given = self.form | body
        for name, kind in KINDS.items():
            accepted = int | float if kind is float else kind  # JSON has 1 for 1.0
            if not isinstance(given[name], accepted) or isinstance(given[name], bool):
                raise ValueError(f"{name}: got {given[name]!r}, expected {WORDS[kind]}; correct it")
        if given["adapter"] not in ("", *self.adapters):
            raise ValueError(f"adapter: got {given['adapter']!r}, expected one of the page's; choose one")
        chosen = {name: given[name] for name in SAMPLING}
        check_sampling(self.model, chosen, given["seed"], self.sampler.device.type)
        check_lora_scale(given["scale"])
        base = SamplingDefaults(**chosen)
        self.check(base)
        sampling, variants = {"base": base}, {"base": Variant(self.model)}
        if given["adapter"]:
            tuned = Variant(self.model, Path(given["adapter"]), scale=float(given["scale"]))
            variants["tuned"] = tuned
            sampling["tuned"] = replace(base, guidance_scale=1.0) if tuned.adapter.distilled else base
        video = {name: given[name] for name in ("prompt", "negative_prompt", "seed")}
        return Request(video, sampling, variants, bool(given["blind"]))

    def _make_videos(self, request: Request) -> None:
        """Make the videos of a request and show them; show an error in their place."""
        try:
            settings = {model: request.settings(model) for model in request.variants}
            keys = {model: _digest([request.video, settings[model]]) for model in settings}
            todo = [model for model in keys if keys[model] not in self.made]
            progress = _Progress(self, [request.sampling[model].num_inference_steps for model in todo])
            for model in todo:
                self.made[keys[model]] = self._make_video(request, model, keys[model], progress)
            files = {model: self.made[key] for model, key in keys.items()}
            self.single = None if len(files) > 1 else files["base"]
            self.pair = Pair(request.video, settings, files) if len(files) > 1 else None
            if self.pair:
                key = self.votes.add(self.pair)
                if not request.blind:
                    self.told.add(key)
        except Stopped:
            self.error = "Stopped; nothing was made."
        except Exception as error:  # the page says it, and serves on
            traceback.print_exc()
            kind = type(error).__name__
            lower = "; lower the size or the number of frames" if "OutOfMemory" in kind else ""
            self.error = f"{kind}: {str(error).partition(chr(10))[0]}{lower}"
        finally:
            self.job = None

    def _make_video(self, request: Request, model: str, key: str, progress: "_Progress") -> Path:
        """Sample and write one video; return its file."""
        variant, sampling = request.variants[model], request.sampling[model]
        print(self.sampler.use(variant.adapter, variant.scale) or "base", flush=True)
        progress.begin()
        pixels = self.sampler.sample(request.video["prompt"], request.video["seed"], sampling, progress)
        path = self.folder / "videos" / f"{key}.mp4"
        save_video(path, pixels, sampling.fps)
        return path


def serve_studio(
    load: Callable[[], Sampler],
    model: str,
    adapters: list[str],
    form: dict[str, Any],
    folder: Path,
    check: Callable[[SamplingDefaults], Any],
    host: str,
    port: int,
) -> None:
    """Load the model and serve its page until Ctrl-C; the arguments are those of `StudioApp`.

    Raises ValueError for an address that is taken and a damaged votes.json, before the model loads.
    """
    server, votes = bind(host, port), Votes(folder / "votes.json")
    form = form | {"prompt": form["prompt"] or "", "adapter": adapters[0] if adapters else "", "blind": True}
    serve(server, StudioApp(load(), model, adapters, form, folder, check, votes))


class _Progress:
    """The progress of a request: seconds a step, and seconds left in all its videos."""

    def __init__(self, app: StudioApp, steps: list[int]):
        self.app, self.steps, self.number = app, steps, 0
        self.seconds, self.timed, self.last = 0.0, 0, 0.0

    def begin(self) -> None:
        """Begin the next video."""
        self.number += 1
        self._update_job("reading the prompt", 0)

    def __call__(self, done: int) -> None:
        """Count a step of this video; raise Stopped if the user asked for it."""
        if self.app.stopped:
            raise Stopped
        now = time.monotonic()
        if done > 1:  # the first step's time has the encoding of the prompt in it
            self.seconds, self.timed = self.seconds + now - self.last, self.timed + 1
        self.last = now
        self._update_job("decoding" if done == self.steps[self.number - 1] else "denoising", done)

    def _update_job(self, stage: str, done: int) -> None:
        """Show the stage, the steps done of this video, and the seconds left."""
        done, total = sum(self.steps[: self.number - 1]) + done, sum(self.steps)
        each = self.seconds / self.timed if self.timed else None
        times = {"seconds_a_step": each, "seconds_left": each and each * (total - done)}
        counts = {"video": self.number, "videos": len(self.steps), "done": done, "total": total}
        self.app.job = {"stage": stage} | counts | times


def _digest(content: Any) -> str:
    """Return 16 digits of the content's SHA-256, as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
