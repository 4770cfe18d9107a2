"""A trained model on the model hub."""

import textwrap
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from deepen.core.checksums import CHECKSUMS
from deepen.core.errors import DeepenError
from deepen.train.resume import TRAINING

# What a run needs to go on, and a model doesn't; the checksums are of these files too.
_OWN = (f"{TRAINING}/*", CHECKSUMS)

_UNAUTHORIZED, _FORBIDDEN = 401, 403


def push(folder: Path, repository: str) -> str:
    """Upload the model in a checkpoint folder to `owner/name`, made private if it isn't there; gives its address.

    Raises `DeepenError`, which tells how to push it by hand, whatever the reason.
    """
    try:
        hub = HfApi()
        address = hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(
            repo_id=repository,
            folder_path=folder,
            ignore_patterns=list(_OWN),
            commit_message=f"Upload {folder.name}",
        )
    except Exception as cause:  # the network libraries have no common ancestor
        left_out = " ".join(f"--exclude '{pattern}'" for pattern in _OWN)
        raise DeepenError(
            f"push_to_hub {repository} failed: {_reason(cause)}. The run itself is saved, in {folder}; push it later "
            f"by the same command, or by `hf upload {repository} {folder} . --private {left_out}`"
        ) from cause
    return str(address)


def _reason(cause: Exception) -> str:
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so that the hub is not asked"
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if isinstance(cause, LocalTokenNotFoundError) or status == _UNAUTHORIZED:
        return "the hub knows no valid token of yours; `hf auth login`, or set HF_TOKEN"
    if status == _FORBIDDEN:
        return "your token may not write there; take one with write access, or a name under an owner of yours"
    return textwrap.shorten(str(cause) or type(cause).__name__, 240, placeholder=" ...").rstrip(".")
