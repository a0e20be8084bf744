"""Push an export to the Hugging Face Hub; credentials are checked before the export begins."""

from pathlib import Path

from rlhf.generator.files import one_line

CURE = "log in with `hf auth login` or set HF_TOKEN to a token that may write"


def check_push(repo_id: str) -> None:
    """Raise ValueError if a push would fail: bad name, no network, no token that may write."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise _error(f"{repo_id!r}", f"USER/NAME or NAME; correct it ({one_line(error)})") from error
    try:
        user = HfApi().whoami()
    except LocalTokenNotFoundError as error:
        raise _error("no token", f"one of the Hugging Face Hub; {CURE}") from error
    except Exception as error:  # a refused token, and all the types that stand for "no network"
        if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
            raise _error("a token that the Hub refuses", f"a valid one; {CURE}") from error
        cure = f"export without it, then `hf upload {repo_id} OUT` where there is one"
        raise _error(f"no answer from the Hub ({one_line(error)})", f"a network; {cure}") from error
    _require_write_access(repo_id, user)


def _require_write_access(repo_id: str, user: dict) -> None:
    """Raise ValueError if the token may not write to the repository; user: the Hub's `whoami`."""
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise _error("a token that may only read", f"one that may write; {CURE}")
    owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs") or [])]
    if "/" in repo_id and repo_id.partition("/")[0] not in owners:
        raise _error(f"{repo_id!r}", f"a repository of {', '.join(owners)}; correct the name")


def push(folder: Path, repo_id: str, private: bool = False) -> str:
    """Upload an export and return its address.

    Raises ValueError, which says how to try again; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api, message = HfApi(), "Upload an export of contentv-rlhf"
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        is_public = private and not api.repo_info(address.repo_id).private  # an older one keeps its state
        if not is_public:
            api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # refused, interrupted and broken connections have types of their own
        cure = f"{folder} is complete: `hf upload {repo_id} {folder}` tries again"
        raise _error(f"{one_line(error)} from the Hub", f"an upload; {cure}") from error
    if is_public:
        cure = f"make it private, or choose another name, then `hf upload NAME {folder}`"
        expected = f"a private one; {folder} is complete: {cure}"
        raise _error(f"{address.repo_id}, which is public already", expected)
    return str(address)


def _error(got: str, expected_and_cure: str) -> ValueError:
    """Return a ValueError that names --push_to_hub."""
    return ValueError(f"--push_to_hub: got {got}, expected {expected_and_cure}")
