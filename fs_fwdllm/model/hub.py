"""Names on the model hub: what is on this machine already is used as it is, and the hub is asked once, briefly.

The hub's own client tries a dead connection for a minute, and again for every file. Here one request for
``config.json`` decides: it is answered within :data:`ANSWER_S` seconds, or the run ends with both ways out.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from fs_fwdllm.errors import ModelError
from fs_fwdllm.model.folder import check_configuration

__all__ = ["ANSWER_S", "hub_file", "hub_options", "is_on_this_machine"]

#: Seconds the hub has to answer the one request.
ANSWER_S = 5.0
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def is_on_this_machine(name: str) -> bool:
    """Whether configuration and weights of a hub name are in the local cache, so that nobody need be asked."""
    try:
        held = [isinstance(try_to_load_from_cache(name, file), str) for file in ("config.json", *_WEIGHTS)]
    except HFValidationError:
        return False
    return held[0] and any(held[1:])


def hub_options(name: str) -> dict[str, Any]:
    """What ``from_pretrained`` should be told for a hub name, after at most one request.

    Raises:
        ModelError: it is no name of the hub, the hub does not have it or does not give it, or no hub can be reached.
    """
    if is_on_this_machine(name):
        check_configuration(Path(str(try_to_load_from_cache(name, "config.json"))).parent)
        return {"local_files_only": True}
    if constants.HF_HUB_OFFLINE:
        raise ModelError(_unreachable(name, "HF_HUB_OFFLINE is set"))
    check_configuration(_ask(name))
    return {}


def hub_file(name: str, file: str) -> Path | None:
    """A file of a hub name; ``None`` where it has none. Of a model that is on this machine, only what is here counts.

    Raises:
        ModelError: the hub has to be asked, and cannot be.
    """
    held = try_to_load_from_cache(name, file)
    if isinstance(held, str):
        return Path(held)
    if is_on_this_machine(name):
        return None
    try:
        return Path(hf_hub_download(name, file, etag_timeout=ANSWER_S))
    except LocalEntryNotFoundError as error:  # one of the next kind, but what it says is that nobody answered
        raise ModelError(_unreachable(name, f"for {file}")) from error
    except EntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        raise ModelError(_unreachable(name, f"for {file}")) from error


@lru_cache
def _ask(name: str) -> Path:
    """The folder of the local cache that ``config.json`` has been put into."""
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=ANSWER_S)
        return Path(hf_hub_download(name, "config.json")).parent
    except HFValidationError as error:
        raise ModelError(f"model.type: {name!r} is neither a folder here nor a possible name on the hub") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status is None or status >= 500:
            raise ModelError(_unreachable(name, f"the hub answers with status {status}")) from error
        raise ModelError(
            f"model.type: {name!r} is no folder here, and the hub has no such model or does not give it to you "
            f"(status {status}); check the spelling, log in to the hub, or give a local folder"
        ) from error
    except Exception as error:  # the HTTP library's own, which differ between versions
        raise ModelError(_unreachable(name, str(error).strip().splitlines()[0] if str(error) else "")) from error


def _unreachable(name: str, reason: str) -> str:
    return (
        f"model.type: {name!r} is no folder here and not in the local cache, and the hub cannot be reached"
        f"{f' ({reason})' if reason else ''}; give the folder of a model that is on this machine, or fetch it where "
        f"there is a network (hf download {name} --local-dir FOLDER) and give that folder"
    )
