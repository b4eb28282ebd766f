"""Validators of individual settings. Each validator returns the value in its normal form, or raises ValueError.

No message repeats a value that may contain a password.
"""

from __future__ import annotations

import re
from email.policy import SMTP
from ipaddress import ip_network
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from pydantic import BeforeValidator, SecretStr

from core import rates
from core.databases import postgresql_urls
from core.errors import got
from core.network.hosts import parse_pattern

# RFC 7518, section 3.2: an HMAC key must be at least as long as the hash.
HASH_BYTES = {"HS256": 32, "HS384": 48, "HS512": 64}
MIN_SECRET_KEY_BYTES = HASH_BYTES["HS256"]
# The redis-py options that the URLs of hosted databases contain. Credentials belong before the host, not in an option.
REDIS_OPTIONS = frozenset(
    {"ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname", "protocol"}
)
# Path segments of ordinary characters, except "." and "..", which clients remove from URLs.
_ROOT_PATH = re.compile(r"(?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9._~-]+)+")
MAX_ROOT_PATH_LENGTH = 100
_NO_CONTROLS = re.compile(r"[^\x00-\x1f\x7f]*")


def _require(condition: object, expected: str) -> None:
    """Raise ValueError unless the condition is true. The message omits the value, which may contain a password."""
    if not condition:
        raise ValueError(f"expected {expected}")


def _url_parts(url: str, expected: str) -> SplitResult:
    """Split a URL. Raises ValueError, without the library's own message, which may contain part of a password."""
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ValueError(f"expected {expected}") from None
    try:
        _ = parts.port
    except ValueError:
        raise ValueError("expected a port from 0 to 65535 after the host") from None
    return parts


def lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def split(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def database_url(value: str) -> str:
    known = "sqlite:///path/to/file.db or postgresql://user:password@host/database"
    parts = _url_parts(value, known)
    kind, plus, _ = parts.scheme.partition("+")
    if plus and kind in ("sqlite", "postgresql", "postgres"):
        raise ValueError(f"expected {kind}:// without a driver{got(parts.scheme)}")
    if parts.scheme == "sqlite":
        is_file = value.startswith("sqlite:///") and value != "sqlite:///" and not re.search(r"\?|:memory:", value)
        _require(is_file, "a file, as in sqlite:///path/to/file.db")
    else:
        _require(parts.scheme in ("postgresql", "postgres"), known)
        _require(parts.path.strip("/"), "a database name, as in postgresql://user:password@host/database")
        postgresql_urls.options_of(value)
    return value


def broadcast_url(value: str) -> str:
    parts = _url_parts(value, "memory:// or redis://host:port/number")
    _require(parts.scheme in ("memory", "redis", "rediss"), "memory:// or redis://host:port/number")
    is_alone = parts.scheme != "memory" or value == "memory://"
    _require(is_alone, "memory:// alone, or redis://host:port/number")
    number = "a database number after the slash, as in redis://host:port/number"
    _require(re.fullmatch(r"/?[0-9]*", parts.path), number)
    options = ", ".join(sorted(REDIS_OPTIONS))
    _require(
        REDIS_OPTIONS.issuperset(dict(parse_qsl(parts.query, keep_blank_values=True))), f"only the options {options}"
    )
    return value


def public_url(value: str) -> str:
    expected = "a URL such as https://example.org, without a query"
    parts = _url_parts(value, expected)
    is_plain = not set("@?#") & set(value) and re.fullmatch(r"[\x21-\x7e]{1,500}", value)
    is_complete = parts.scheme in ("http", "https") and parts.hostname
    _require(is_plain and is_complete, expected)
    if path := parts.path.rstrip("/"):
        root_path(path)
    return value.rstrip("/")


def root_path(value: str) -> str:
    is_path = len(value) <= MAX_ROOT_PATH_LENGTH and _ROOT_PATH.fullmatch(value)
    _require(is_path, "a path such as /marquee, without a trailing slash, a query or percent-escapes")
    return value


def smtp_url(value: SecretStr) -> SecretStr:
    url = value.get_secret_value()
    expected = "smtp://host:port or smtps://host:port, optionally with user:password@ before the host"
    parts = _url_parts(url, expected)
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    _require(parts.scheme in ("smtp", "smtps") and parts.hostname and not parts.path.strip("/"), expected)
    _require(not parts.query and not parts.fragment and bool(user) == bool(password), expected)
    _require(_NO_CONTROLS.fullmatch(user + password), "a user and a password without control characters")
    return value


def mailbox(value: str) -> str:
    expected = "an email address, or a name and an address such as Marquee <marquee@example.org>"
    _require(_NO_CONTROLS.fullmatch(value), expected)
    header = SMTP.header_factory("From", value)
    _require(not header.defects and len(header.addresses) == 1, expected)
    _require(re.fullmatch(r"[\x21-\x7e]+@[\x21-\x7e]+", header.addresses[0].addr_spec), expected)
    return value


def storage_url(value: str) -> str:
    expected = "file:///path/to/folder, s3://bucket or s3://bucket/prefix"
    parts = _url_parts(value, expected)
    _require(not parts.query and not parts.fragment and "\x00" not in parts.path, expected)
    if parts.scheme == "file":
        _require(not parts.netloc and len(parts.path) > 1, expected)
    else:
        is_bucket = re.fullmatch(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]", parts.netloc)
        _require(parts.scheme == "s3" and is_bucket and ".." not in parts.path.split("/"), expected)
    return value


def endpoint_url(value: str) -> str:
    expected = "https://host:port or http://host:port"
    parts = _url_parts(value, expected)
    is_plain = parts.hostname and "@" not in parts.netloc and not parts.query
    _require(parts.scheme in ("http", "https") and is_plain, expected)
    return value.rstrip("/")


def origins(values: tuple[str, ...]) -> tuple[str, ...]:
    expected = "comma-separated origins such as https://example.org, or *"
    origins = tuple(value.rstrip("/") for value in values)
    for origin in origins:
        parts = _url_parts(origin, expected)
        is_origin = parts.scheme in ("http", "https") and parts.netloc and "@" not in parts.netloc and not parts.path
        _require(is_origin or origin == "*", expected)
    return origins


def hosts(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(parse_pattern(value) for value in values)


def networks(values: tuple[str, ...]) -> tuple[str, ...]:
    for each in values:
        try:
            ip_network(each)
        except ValueError:
            raise ValueError(f"expected addresses or networks such as 10.0.0.0/8{got(each)}") from None
    return values


def rate_limits(value: str) -> str:
    rates.parse_rate_limits(value)
    return value


def secret_key(value: SecretStr) -> SecretStr:
    _require(size(value) >= MIN_SECRET_KEY_BYTES, f"at least {MIN_SECRET_KEY_BYTES} bytes")
    return value


def size(key: SecretStr) -> int:
    return len(key.get_secret_value().encode())


ANY_CASE = BeforeValidator(lower)
LISTED = BeforeValidator(split)  # needs NoDecode, because the value is a comma-separated list, not JSON
