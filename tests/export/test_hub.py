"""Pushing an export: what is wrong is told before the work, and a broken upload loses nothing."""

import types

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

from rlhf import export
from rlhf.export.hub import check_push, push

USER = {"name": "me", "orgs": [{"name": "team"}], "auth": {"accessToken": {"role": "write"}}}


class Refused(Exception):
    response = types.SimpleNamespace(status_code=401)


@pytest.fixture
def hub(monkeypatch):
    """Stand for the Hub; `calls` are its requests, `user` its answer on the token, or the error."""
    state = types.SimpleNamespace(calls=[], user=USER, upload=None, public=False)

    class HfApi:
        def whoami(self):
            if isinstance(state.user, Exception):
                raise state.user
            return state.user

        def create_repo(self, repo_id, private, exist_ok):
            assert exist_ok
            state.calls.append(("create", repo_id, private))
            whole = repo_id if "/" in repo_id else f"me/{repo_id}"
            return types.SimpleNamespace(repo_id=whole, __str__=None)

        def repo_info(self, repo_id):
            return types.SimpleNamespace(private=not state.public)

        def upload_folder(self, repo_id, folder_path, commit_message):
            if state.upload:
                raise state.upload
            state.calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", HfApi)
    return state


@pytest.mark.parametrize(
    ("repo", "user", "told"),
    [
        ("not a name", USER, "got 'not a name', expected USER/NAME or NAME"),
        ("me/x", LocalTokenNotFoundError("none"), "got no token, expected one of the Hugging Face Hub; log in"),
        ("me/x", Refused("401"), "got a token that the Hub refuses, expected a valid one; log in with `hf auth login`"),
        ("me/x", OfflineModeIsEnabled("offline"), r"got no answer from the Hub \(OfflineModeIsEnabled: offline\)"),
        ("me/x", ConnectionError("down"), ".* a network; export without it, then `hf upload me/x OUT`"),
        ("me/x", USER | {"auth": {"accessToken": {"role": "read"}}}, "got a token that may only read"),
        ("them/x", USER, "got 'them/x', expected a repository of me, team; correct the name"),
    ],
)
def test_what_is_wrong_is_told_before_the_work(hub, monkeypatch, tmp_path, repo, user, told):
    hub.user = user
    monkeypatch.setattr(export, "export_adapter", lambda *_: pytest.fail("exported"))
    with pytest.raises(SystemExit, match=f"rlhf.export: error: --push_to_hub: {told}"):
        export.main([str(tmp_path), "--adapter", str(tmp_path / "out"), "--push_to_hub", repo])
    assert hub.calls == []


@pytest.mark.parametrize("repo", ["x", "me/x", "team/x"])
def test_own_repositories_and_those_of_organisations_are_fine(hub, repo):
    assert check_push(repo) is None
    assert hub.calls == [], "a look, nothing is made"


def written(run, out, *_):
    out.mkdir()
    (out / "README.md").write_text("card")


def test_an_export_is_uploaded_with_its_card(hub, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(export, "export_merged", written)
    out = tmp_path / "out"
    export.main([str(tmp_path), "--merged", str(out), "--push_to_hub", "x", "--private"])
    assert hub.calls == [("create", "x", True), ("upload", "me/x", ["README.md"])]
    assert "uploaded to" in capsys.readouterr().out


def test_what_shall_be_private_is_not_uploaded_where_all_can_see_it(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "export_merged", written)
    hub.public = True
    flags = [str(tmp_path), "--merged", str(tmp_path / "out"), "--push_to_hub", "me/x"]
    told = "got me/x, which is public already, expected a private one; .* complete: make it"
    with pytest.raises(SystemExit, match=told):
        export.main([*flags, "--private"])
    assert [call[0] for call in hub.calls] == ["create"]


def test_a_broken_upload_says_how_to_go_on_and_the_export_stays(hub, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "export_adapter", written)
    hub.upload, out = ConnectionResetError("reset by peer"), tmp_path / "out"
    told = f"got ConnectionResetError: reset by peer.*`hf upload me/x {out}` tries again"
    with pytest.raises(SystemExit, match=told):
        export.main([str(tmp_path), "--adapter", str(out), "--push_to_hub", "me/x"])
    assert (out / "README.md").read_text() == "card"
    hub.upload = None
    assert push(out, "me/x")
    assert hub.calls[-1] == ("upload", "me/x", ["README.md"])


def test_without_the_flag_the_hub_is_not_asked(hub, monkeypatch, tmp_path):
    hub.user = ConnectionError("not to be asked")
    monkeypatch.setattr(export, "export_adapter", written)
    export.main([str(tmp_path), "--adapter", str(tmp_path / "out")])
    assert hub.calls == []
