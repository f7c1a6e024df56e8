"""Addresses and logins: what may be asked, what may be told, and who gets to see the token."""

import ipaddress
import os
import socket
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

import requests

from corpora.errors import InputError

UNUSABLE = "leads to an address that cannot be used; correct the URL"


def endpoint() -> str:
    """Return the Hugging Face endpoint: $HF_ENDPOINT (a mirror), or the hub itself."""
    found = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    try:
        check_address(found)
    except ValueError as error:
        raise InputError(
            f"HF_ENDPOINT: {error}; set it to an address such as https://huggingface.co"
        ) from None
    return found


def check_address(url: str) -> None:
    """Raise ValueError for what is no http or https address."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) > 0
    except ValueError as error:
        raise ValueError(f"{shown(url)} cannot be an address ({error})") from None
    if not sound:
        raise ValueError(f"{shown(url)} is no http or https address")


def shown(url: str) -> str:
    """Return a URL as it may be told: without user, password, query and fragment."""
    try:
        parts = urlsplit(url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    except ValueError:
        return "the URL"


def token() -> str | None:
    """Return the Hugging Face token: $HF_TOKEN, or the file where `hf auth login` puts it."""
    if found := os.environ.get("HF_TOKEN", "").strip():
        return found
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    path = Path(os.environ.get("HF_TOKEN_PATH") or Path(home) / "token")
    try:
        return path.read_text("utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


class _Bearer(requests.auth.AuthBase):
    """A token as an explicit login: one in ~/.netrc would replace a plain header."""

    def __init__(self, secret: str) -> None:
        self.secret = secret

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        request.headers["Authorization"] = f"Bearer {self.secret}"
        return request


def is_hub(url: str) -> bool:
    """Tell whether a URL is the Hugging Face endpoint's own, by scheme, host and port."""
    return _origin(url) == _origin(endpoint())


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def login(url: str) -> requests.auth.AuthBase | None:
    """Return what to log in with: the token goes to the hub alone, and never over an open line."""
    if not is_hub(url) or not (urlsplit(url).scheme == "https" or near(url) == "loopback"):
        return None
    secret = token()
    if secret is None:
        return None
    if not (secret.isascii() and secret.isprintable()):
        raise InputError("the Hugging Face token (HF_TOKEN or its file) has odd characters; set it anew")
    return _Bearer(secret)


def near(url: str) -> str:
    """Tell how near a URL's host is: link-local, loopback, private, or "" for the world or not known."""
    host = unquote(urlsplit(url).hostname or "").partition("%")[0].rstrip(".")  # no zone, no root
    try:
        found = {str(info[4][0]).partition("%")[0] for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return ""  # a proxy may know it
    addresses = [_plain(ipaddress.ip_address(address)) for address in found]
    if any(address.is_link_local for address in addresses):
        return "link-local"
    if any(address.is_loopback for address in addresses):
        return "loopback"
    return "private" if any(not address.is_global for address in addresses) else ""


def _plain(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the IPv4 address that an IPv6 one carries, where it does (mapped, compatible, NAT64, 6to4)."""
    if isinstance(address, ipaddress.IPv4Address) or address in (ipaddress.ip_address("::1"),):
        return address
    for network in ("::ffff:0:0/96", "::/96", "64:ff9b::/96"):
        if address in ipaddress.ip_network(network):
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.sixtofour or address


def check_redirect(origin: str, here: str, there: str) -> None:
    """Refuse a redirect that could carry the download, or its login, to where nobody meant it to go."""
    try:
        scheme, host = urlsplit(there).scheme, urlsplit(there).hostname
        if scheme in ("http", "https"):
            check_address(there)
    except ValueError:
        raise InputError(f"{shown(origin)}: {UNUSABLE}") from None
    why = None
    if scheme not in ("http", "https") or not host:
        why = f"an address that is not http or https ({scheme}:)"
    elif scheme == "http" and urlsplit(here).scheme == "https":
        why = f"an open http address, at {host}"
    elif _origin(there) != _origin(origin):
        how = near(there)
        if how == "link-local" or (how and not near(origin)):
            why = f"a {how} address, {host}"
    if why:
        raise InputError(
            f"{shown(origin)}: the server redirects to {why}; correct the URL, or use another mirror"
        )
