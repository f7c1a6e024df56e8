"""Where a fetched shard lies, and the receipt beside it: the only record of "fetched".

A receipt holds the file's size and mtime, so that a check is cheap; a file that looks changed is hashed again
before anything is believed or thrown away.  Where no lock knew the sha256, the first download's is trusted, and
its receipt is what later ones are held against.
"""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from corpora.errors import InputError
from corpora.files import inside, read_json
from corpora.read import FORMATS, suffix_of
from corpora.settings import Strict

RECEIPT = ".receipt.json"


class Receipt(Strict):
    """The proof that a shard lies under the data root, whole."""

    shard: str
    path: str = Field(description="of the file, relative to the data root")
    size: int
    sha256: str
    url: str = Field(description="where it comes from; of a hub's file the repository and commit")
    mtime_ns: int = Field(description="of the file when it was last hashed")
    trust: Literal["lock", "first use"] = Field(
        default="lock", description="where the sha256 comes from: the lock, or this very download"
    )


def raw_path(corpus: str, shard: str, path: str, data: Path) -> Path:
    """Return where a shard lies once fetched; the source's `path` tells its format by the suffix.

    Raises InputError for a format that cannot be read, and for a name that leads out of the data root.
    """
    suffix = suffix_of(path)
    if suffix is None:
        raise InputError(
            f"corpus {corpus}: shard {shard}: {path} is of no format that can be read (known: {', '.join(FORMATS)})"
        )
    return inside(data, f"{corpus}/raw/{shard}{suffix}")


def receipt_path(final: Path) -> Path:
    """Return the receipt's place beside a shard."""
    return final.with_name(f"{final.name}{RECEIPT}")


def read_receipt(final: Path) -> Receipt | None:
    """Return the receipt beside a shard; a lost or torn one is none, and the file itself is asked."""
    try:
        return Receipt.model_validate(read_json(receipt_path(final)))
    except (InputError, ValidationError, OSError):
        return None
