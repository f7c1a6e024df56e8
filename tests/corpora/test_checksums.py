"""Lists of checksums: every form a line can have, what is refused, and what coreutils write."""

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from corpora.checksums import Checksum, check_name, checksum_file, parse_checksums
from corpora.errors import InputError

MD5 = hashlib.md5(b"seed").hexdigest()
SHA256 = hashlib.sha256(b"seed").hexdigest()
BOTH = Checksum(MD5, SHA256)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{MD5}  params.json\n", {"params.json": Checksum(md5=MD5)}),
        (f"{SHA256}  params.json\n", {"params.json": Checksum(sha256=SHA256)}),
        (f"{MD5} *params.json", {"params.json": Checksum(md5=MD5)}),  # binary mode, no line break at the end
        (f"{SHA256.upper()}  a", {"a": Checksum(sha256=SHA256)}),
        (f"MD5 (params.json) = {MD5}", {"params.json": Checksum(md5=MD5)}),
        (f"SHA256 (7B/params.json) = {SHA256.upper()}", {"7B/params.json": Checksum(sha256=SHA256)}),
        (f"SHA256 (a (1) = b) = {SHA256}", {"a (1) = b": Checksum(sha256=SHA256)}),
        (f"{MD5}   two  spaces ", {" two  spaces ": Checksum(md5=MD5)}),
        (f"{MD5}  *star", {"*star": Checksum(md5=MD5)}),
        (f"{MD5}  ./7B/params.json", {"7B/params.json": Checksum(md5=MD5)}),
        (f"{MD5}  größe.bin", {"größe.bin": Checksum(md5=MD5)}),
        (
            f"# by hand\r\n\r\n{MD5}  a\r\n   \n{SHA256}  b\r\n",
            {"a": Checksum(MD5), "b": Checksum(None, SHA256)},
        ),
        (f"{MD5}  a\n{SHA256}  a\n", {"a": BOTH}),
        (f"{MD5}  a\n{MD5.upper()} *./a\nMD5 (a) = {MD5}\n", {"a": Checksum(md5=MD5)}),
        (f"\\{MD5}  plain", {"plain": Checksum(md5=MD5)}),  # escaped, with nothing to escape
    ],
)
def test_lists_that_are_read(text: str, expected: dict[str, Checksum]) -> None:
    assert parse_checksums(text, "list") == expected
    assert parse_checksums(text.encode("utf-8-sig"), "list") == expected


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (f"{MD5}  ../evil", "'../evil' is no plain relative path"),
        (f"{MD5}  a/../../evil", "is no plain relative path"),
        (f"{MD5}  /etc/passwd", "is no plain relative path"),
        (f"{MD5}  .//etc/passwd", "is no plain relative path"),
        (f"{MD5}  a//b", "is no plain relative path"),
        (f"{MD5}  a/", "is no plain relative path"),
        (f"{MD5}  ./", "is no plain relative path"),
        (f"{MD5}  ././a", "is no plain relative path"),
        (f"{MD5}  ..", "is no plain relative path"),
        (f"{MD5}  a\\b", "is no plain relative path"),
        (f"\\{MD5}  a\\\\b", "'a\\\\b' is no plain relative path"),
        (f"\\{MD5}  a\\nb", "'a\\nb' is no plain relative path"),
        (f"\\{MD5}  a\\tb", "a backslash before something else"),
        (f"\\{MD5}  a\\", "a backslash before something else"),
        (f"{MD5}  a\0b", "is no plain relative path"),
        (f"{MD5}  a\rb", "is no plain relative path"),
        (f"{MD5}  a\u202eb", "is no plain relative path"),
        (f"{MD5}  a\u2028b", "is no plain relative path"),
        (f"MD5 (../evil) = {MD5}", "is no plain relative path"),
        (f"{MD5} a", "neither `HEX  NAME` nor"),
        (f"{MD5}\ta", "neither `HEX  NAME` nor"),
        (f" {MD5}  a", "neither `HEX  NAME` nor"),
        (f"{MD5}  ", "neither `HEX  NAME` nor"),
        (MD5, "neither `HEX  NAME` nor"),
        ("md5sum: WARNING: 1 line", "neither `HEX  NAME` nor"),
        (f"{MD5[:-1]}g  a", "neither `HEX  NAME` nor"),
        (f"{'0' * 40}  a", "40 hex digits are neither an md5 (32) nor a sha256 (64)"),
        (f"{MD5[:-1]}  a", "31 hex digits"),
        (f"SHA1 (a) = {'0' * 40}", "SHA1 is neither MD5 nor SHA256"),
        (f"SHA256 (a) = {MD5}", "32 hex digits instead of the 64 of sha256"),
        (f"{'0' * 32}  first", f"'first' has two checksums: md5 {MD5} and md5 {'0' * 32}"),
        (f"{'0' * 32}  First", "'First' differs in case only from the name in line 1"),
    ],
)
def test_lines_that_are_refused(line: str, told: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_checksums(f"{MD5}  first\n\n{line}\n{MD5}  last\n", "http://x/MD5SUMS")
    assert str(caught.value).startswith("http://x/MD5SUMS: line 3: ")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"\n <!DOCTYPE html><title>Log in</title>", "an HTML page"),
        (b"<HTML><body>", "an HTML page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an HTML page (or XML)"),
        (b"\xef\xbb\xbf<html>", "an HTML page"),
        (b"", "it names no file"),
        (b"# nothing\n\n", "it names no file"),
        (b"PK\x03\x04\xff\xfe", "it is no UTF-8 text"),
        (f"{MD5}  a".encode("utf-16"), "it is no UTF-8 text"),
    ],
)
def test_what_is_no_list(text: bytes, told: str) -> None:
    with pytest.raises(InputError, match=r"^list: is not a list of checksums") as caught:
        parse_checksums(text, "list")
    assert told in str(caught.value)


def test_a_file_is_hashed_as_its_list_does(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"seed")
    seen: list[int] = []
    assert checksum_file(path, BOTH, seen.append) == BOTH
    assert checksum_file(path, Checksum(md5="?")) == Checksum(md5=MD5)
    assert (seen, BOTH.kinds) == ([4], ("md5", "sha256"))


# Bytes that a file name may have on Linux, with those that lists treat in a way of their own drawn more often.
PIECES = st.sampled_from([*"ab0 *()=\\#.\n\r\t/é\u202e-", ") = ", "./", "..", "SHA256 (", MD5, "\\n"])
NAMES = st.lists(PIECES, min_size=1, max_size=8).map("".join)


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="coreutils are not there")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(NAMES, min_size=1, max_size=4, unique=True), st.booleans())
@example(["a\\b", "plain", "\\n", "new\nline", "back\rspace", "-x", "#", "p) = q"], True)
def test_what_coreutils_write_is_read(names: list[str], tag: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        written = {}
        for name in names:
            path = Path(folder, name)
            if name == "-" or name.endswith(("/", "/.", "\r")):  # stdin; folders; not escaped by coreutils 8
                continue
            real = path.resolve()
            if not real.is_relative_to(Path(folder).resolve()) or real.exists():
                continue
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(name.encode())
            except OSError:  # a folder by now, or a file where this one has a folder
                continue
            written[name] = Checksum(
                hashlib.md5(name.encode()).hexdigest(), hashlib.sha256(name.encode()).hexdigest()
            )
        for name, checksum in written.items():
            lines = b""
            for tool in ("md5sum", "sha256sum"):
                command = [tool, *(["--tag"] if tag else []), "--", name]
                lines += subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout
            try:
                plain = check_name(name)
            except ValueError:
                with pytest.raises(InputError, match=r"line 1: .* is no plain relative path"):
                    parse_checksums(lines, "list")
                continue
            assert parse_checksums(lines, "list") == {plain: checksum}
            assert (Path(folder) / plain).read_bytes() == name.encode()
