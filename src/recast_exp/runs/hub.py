"""Task files on the Hugging Face Hub: `hf://owner/name`, `hf://owner/name@revision/file.safetensors`."""

from __future__ import annotations

import re
from pathlib import Path

from recast_exp.errors import MissingInputError, UserError, first_line
from recast_exp.files import user_path

SCHEME = "hf://"
TASK = "task.safetensors"
"""The file of a repository that has one task."""

_ADDRESS = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>refs/\w+/[\w.-]+|[\w./-]+?))?(/(?P<file>[^/@][^@]*\.safetensors))?"
)


def local(where: str | Path) -> Path:
    """The file at a path; one of the Hub is downloaded into the cache of huggingface_hub, once.

    Args:
        where: A path, or an address `hf://owner/name[@revision][/file.safetensors]`.

    Raises:
        UserError: If an address is none.
        MissingInputError: If the Hub has no such file, or cannot be reached and the file is not in the cache.
    """
    text = str(where)
    if not text.startswith(SCHEME):
        return user_path(where)
    found = _ADDRESS.fullmatch(text.removeprefix(SCHEME))
    if found is None or ".." in text:
        raise UserError(f"task: expected hf://owner/name, or hf://owner/name@revision/file.safetensors, got {text}")
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(found["repo"], found["file"] or TASK, revision=found["revision"])
    except Exception as error:  # those of the Hub's client, and of the one for HTTP below it
        raise MissingInputError(f"task: expected a file at {text}, got none ({first_line(error)})") from error
    return Path(path)
