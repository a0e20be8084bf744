"""Exports on the Hugging Face Hub: what can be wrong is told before the work, and what was exported is never lost."""

from pathlib import Path

from rlhf.contentv.files import one_line

CURE = "log in with `hf auth login` or set HF_TOKEN to a token that may write"


def check_push(repo_id: str) -> None:
    """Raise ValueError if nothing can be pushed there: its name, no network, no token or one that may not."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        told = f"--push_to_hub: got {repo_id!r}, expected USER/NAME or NAME; correct it ({one_line(error)})"
        raise ValueError(told) from error
    try:
        user = HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise ValueError(f"--push_to_hub: got no token, expected one of the Hugging Face Hub; {CURE}") from error
    except Exception as error:  # a refused token, and whichever way the client puts "no network"
        refused = getattr(getattr(error, "response", None), "status_code", None) in (401, 403)
        if refused:
            raise ValueError(
                f"--push_to_hub: got a token that the Hub refuses, expected a valid one; {CURE}"
            ) from error
        raise ValueError(
            f"--push_to_hub: got no answer from the Hub ({one_line(error)}), expected a network; export without it, "
            f"then `hf upload {repo_id} OUT` where there is one"
        ) from error
    _check_rights(repo_id, user)


def _check_rights(repo_id: str, user: dict) -> None:
    """user: what the Hub says of the token, `whoami`."""
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise ValueError(f"--push_to_hub: got a token that may only read, expected one that may write; {CURE}")
    mine = [user["name"], *(organisation["name"] for organisation in user.get("orgs") or [])]
    owner = repo_id.partition("/")[0] if "/" in repo_id else user["name"]
    if owner not in mine:
        raise ValueError(
            f"--push_to_hub: got {repo_id!r}, expected a repository of {', '.join(mine)}; correct the name"
        )


def push(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload an export; returns its address. Raises ValueError, which says how to go on; the folder stays as it is."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        public = private and not api.repo_info(address.repo_id).private  # one that was there stays as it was
        if not public:
            api.upload_folder(
                repo_id=address.repo_id, folder_path=folder, commit_message="Upload an export of contentv-rlhf"
            )
    except Exception as error:  # refused, interrupted and broken connections all have types of their own
        raise ValueError(
            f"--push_to_hub: got {one_line(error)} from the Hub, expected an upload; {folder} is whole: "
            f"`hf upload {repo_id} {folder}` tries again"
        ) from error
    if public:
        raise ValueError(
            f"--push_to_hub: got {address.repo_id}, which is public already, expected a private one; {folder} is "
            f"whole: make it private, or choose another name, then `hf upload NAME {folder}`"
        )
    return str(address)
