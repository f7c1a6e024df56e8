"""Repositories of the Hugging Face hub: which files, how large, which sha256, and at which address.

    hf://datasets/monology/pile-uncopyrighted      a dataset
    hf://meta-llama/Llama-2-7b                     a model

Files are always asked for at `/resolve/<commit>/`, which redirects to a signed address that soon runs out.
HF_ENDPOINT names a mirror, HF_TOKEN opens gated repositories.  (API: huggingface.co/docs/hub/api.)
"""

import json
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from requests.utils import parse_header_links

from corpora.addresses import endpoint
from corpora.errors import InputError
from corpora.patience import Patience
from corpora.web import small

LIMIT = 64 << 20  # bytes of one answer; a thousand files are about 0.4 MB
UNKNOWN_FORM = "the answer has an unknown form; is HF_ENDPOINT a Hugging Face endpoint?"
COMMIT = "[0-9a-f]{40}"


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repository at one commit."""

    path: str
    size: int | None  # some mirrors say 0, which is no size
    sha256: str | None  # of LFS and Xet files; small files in git itself have none


def repository(url: str) -> tuple[str, str]:
    """Return ("datasets" or "models", "OWNER/NAME") of an hf:// address.  Raises ValueError."""
    found = re.fullmatch(r"hf://(datasets/)?([\w.-]+/[\w.-]+)", url.rstrip("/"), re.ASCII)
    if not found or ".." in url:
        raise ValueError(f"{url!r} is not hf://datasets/OWNER/NAME (a dataset) or hf://OWNER/NAME (a model)")
    return ("datasets" if found[1] else "models"), found[2]


def resolve(url: str, revision: str | None) -> str:
    """Return the base URL of a repository's files."""
    kind, name = _repository(url)
    prefix = "datasets/" if kind == "datasets" else ""
    return f"{endpoint()}/{prefix}{name}/resolve/{quote(revision or 'main', safe='')}"


def files(url: str, revision: str | None, patience: Patience | None = None) -> tuple[str, list[HubFile]]:
    """Return the commit that a revision stands for, and its files, sorted by path."""
    kind, name = _repository(url)
    api = f"{endpoint()}/api/{kind}/{name}"
    commit = _json(f"{api}/revision/{quote(revision or 'main', safe='')}", dict, patience)[0].get("sha")
    if not isinstance(commit, str) or not re.fullmatch(COMMIT, commit):
        raise InputError(f"{api}: the answer names no commit; is HF_ENDPOINT a Hugging Face endpoint?")
    if re.fullmatch(COMMIT, revision or "") and commit != revision:
        raise InputError(f"{api}: asked for commit {revision}, the answer is of {commit}")
    found: list[HubFile] = []
    page: str | None = f"{api}/tree/{commit}?recursive=true"
    while page:
        items, link = _json(page, list, patience)
        try:
            found += [_file(item) for item in items if item["type"] == "file"]
        except (AttributeError, KeyError, TypeError):
            raise InputError(f"{page}: {UNKNOWN_FORM}") from None
        page = _next(link)
    return commit, sorted(found, key=lambda file: file.path)


def _file(item: dict[str, Any]) -> HubFile:
    lfs = item.get("lfs") or {}
    sha256 = lfs.get("oid")
    known = isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)
    path = str(item["path"])
    if not path.isprintable():
        raise TypeError(path)
    return HubFile(path, lfs.get("size") or item.get("size") or None, sha256 if known else None)


def _repository(url: str) -> tuple[str, str]:
    try:
        return repository(url)
    except ValueError as error:
        raise InputError(str(error)) from None


def _json(url: str, kind: type, patience: Patience | None) -> tuple[Any, str]:
    body, headers = small(url, LIMIT, patience, {"Accept": "application/json"})
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise InputError(f"{url}: {UNKNOWN_FORM}") from None
    if not isinstance(value, kind):
        raise InputError(f"{url}: {UNKNOWN_FORM}")
    return value, headers.get("Link", "")


def _next(link: str) -> str | None:
    """Return the next page's address: at our endpoint, whatever host a mirror passes on."""
    for found in parse_header_links(link) if link else []:
        if found.get("rel") == "next":
            parts = urlsplit(found["url"])
            path = parts.path.removeprefix(urlsplit(endpoint()).path)
            return f"{endpoint()}{path}?{parts.query}"
    return None
