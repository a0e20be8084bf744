"""Hub ids without the Hub: the cache's layout, interrupted downloads, and a server that refuses."""

import json
import os
import shutil
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tiny import tiny_pipeline

from rlhf.adapter.lora_file import find_lora_file
from rlhf.generator.files import model_folder, model_sizes
from rlhf.generator.loading import load_pipeline

COMMIT = "a" * 40


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A cache with org/whole: blobs, and links to them by name, as huggingface_hub leaves it."""
    model = tmp_path_factory.mktemp("hub") / "models--org--whole"
    snapshot = model / "snapshots" / COMMIT
    tiny_pipeline().save_pretrained(snapshot, max_shard_size="200KB")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT)
    (model / "blobs").mkdir()
    for i, file in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        blob = shutil.move(file, model / "blobs" / f"{i:064x}")
        file.symlink_to(os.path.relpath(blob, file.parent))
    return model


@pytest.fixture
def hub(whole, tmp_path, monkeypatch):
    """A copy of the cache that may be damaged, and no network. Returns the folder of org/whole."""
    shutil.copytree(whole, tmp_path / whole.name, symlinks=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / whole.name / "snapshots" / COMMIT


def test_a_hub_id_in_the_cache_needs_no_network(hub):
    pipe = load_pipeline("org/whole")
    assert len(list((hub / "transformer").glob("*-of-*"))) > 1, "the weights are in shards"
    weights = {name: p for name, p in tiny_pipeline().transformer.named_parameters()}
    assert all(p.equal(weights[name]) for name, p in pipe.transformer.named_parameters())
    assert model_sizes("org/whole")["transformer"]["num_layers"] == 2


def test_missing_shards_are_told_together_before_weights_load(hub, monkeypatch):
    index = json.loads(next((hub / "transformer").glob("*.index.json")).read_text())
    shard = sorted(set(index["weight_map"].values()))[1]
    (hub / "transformer" / shard).unlink()
    next((hub / "vae").glob("*-00003-of-*")).resolve().unlink()  # a link to a blob that never came
    next((hub / "text_encoder_3").glob("*.safetensors")).unlink()
    monkeypatch.setattr("rlhf.generator.loading.load_transformer", None)
    with pytest.raises(ValueError, match="expected") as error:
        load_pipeline("org/whole")
    assert f"got 3 weight files missing, the first transformer/{shard}, expected a whole" in str(error.value)
    assert "`hf download org/whole` completes it" in str(error.value)
    with pytest.raises(ValueError, match="downloading or copying it again completes it"):
        load_pipeline(hub)  # the same by its folder
    assert model_sizes("org/whole"), "which needs no weights"


def test_a_missing_component_and_an_absent_model(hub):
    shutil.rmtree(hub / "text_encoder_3")
    with pytest.raises(ValueError, match="lacks text_encoder_3/config.json"):
        load_pipeline("org/whole")
    for ask in (model_folder, model_sizes, find_lora_file):
        with pytest.raises(ValueError, match="no network by HF_HUB_OFFLINE.* `hf download org/absent` where there"):
            ask("org/absent")


class _Refusing(BaseHTTPRequestHandler):
    """What the Hub answers to those who may not read a repository."""

    ANSWERS = {
        "gated": (403, "GatedRepo"),
        "absent": (404, "RepoNotFound"),
        "private": (401, None),
        "busy": (503, None),
    }

    def do_GET(self):
        status, code = next(answer for name, answer in self.ANSWERS.items() if name in self.path)
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        with suppress(BrokenPipeError):
            self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "got", "cure"),
    [
        ("gated", "got a gated repository", "accept its terms at {server}/org/gated, then `hf auth login`"),
        ("absent", "no repository of the Hugging Face Hub that may be read", "correct the name, or `hf auth login`"),
        ("private", "no repository of the Hugging Face Hub that may be read", "with a token that may read it"),
        ("busy", "a failed download (", "correct the path, try again, or run `hf download org/busy` where"),
    ],
)
@pytest.mark.parametrize("ask", [model_folder, find_lora_file])
def test_a_refusal_of_the_hub_says_what_to_do(hub, server, monkeypatch, ask, name, got, cure):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server)
    with pytest.raises(ValueError, match="expected") as error:
        ask(f"org/{name}")
    message = str(error.value)
    assert got in message
    assert cure.format(server=server) in message
    assert "\n" not in message
