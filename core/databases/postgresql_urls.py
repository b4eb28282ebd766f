"""The options in a PostgreSQL database URL, named as in libpq. Providers of hosted databases issue URLs with options.

An error message never repeats a value. It repeats the name of an option only if the name cannot be part of a password.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, unquote, urlencode, urlsplit

# A request may wait this long for a database that does not respond.
MAX_CONNECT_SECONDS = 60
# The options that asyncpg understands. If an option has a tuple, only the values in the tuple are valid.
PASSED_ON: Mapping[str, tuple[str, ...] | None] = {
    "sslmode": ("disable", "allow", "prefer", "require", "verify-ca", "verify-full"),
    "sslrootcert": None,
    "sslcert": None,
    "sslkey": None,
    "sslpassword": None,
    "sslcrl": None,
    "sslnegotiation": ("postgres", "direct"),
    "ssl_min_protocol_version": ("TLSv1.2", "TLSv1.3"),
    "ssl_max_protocol_version": ("TLSv1.2", "TLSv1.3"),
    "target_session_attrs": ("any", "primary", "standby", "read-write", "read-only", "prefer-standby"),
    "host": None,
    "port": None,
    "user": None,
    "password": None,
}
FILES = ("sslrootcert", "sslcert", "sslkey", "sslcrl")
SERVER_SETTINGS = ("application_name", "options")
CONNECT_TIMEOUT = "connect_timeout"
# These options are accepted, but have no effect: asyncpg supports neither channel binding nor GSSAPI encryption, does
# not compress, and always sends the host name in the TLS handshake.
IGNORED = (
    "channel_binding", "gssencmode", "sslcompression", "sslsni", "client_encoding", "fallback_application_name",
    "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout",
)  # fmt: skip
KNOWN = (*PASSED_ON, *SERVER_SETTINGS, CONNECT_TIMEOUT, *IGNORED)
_NAME = re.compile(r"[A-Za-z_]{1,40}")


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a URL that have an effect. `passed_on` goes to the driver, `server_settings` to the server."""

    passed_on: Mapping[str, str]
    server_settings: Mapping[str, str]
    connect_seconds: int | None

    @property
    def dsn(self) -> str | None:
        """The options for the driver, as a URL without a host, user or database, or None if there are none."""
        return f"postgresql:///?{urlencode(self.passed_on)}" if self.passed_on else None


def options_of(url: str) -> Options:
    """Return the options of a URL that `urlsplit` accepts. Raises ValueError for an unknown option or value."""
    parts = urlsplit(url)
    if parts.fragment:
        raise ValueError("expected no fragment; write # as %23")
    given = {}
    for part in filter(None, parts.query.split("&")):
        name, _, value = part.partition("=")
        # Unlike in forms, a plus sign does not stand for a space here: libpq reads it literally.
        name, value = ("sslmode" if name == "ssl" else unquote(name)), unquote(value)
        if name not in KNOWN:
            raise ValueError(_unknown(name, parts))
        if "\x00" in value:
            raise ValueError(f"expected no NUL in the option {name}")
        if value:  # an empty value stands for the default
            given[name] = value
    _check(given, parts)
    return Options(
        passed_on={name: value for name, value in given.items() if name in PASSED_ON},
        server_settings={name: value for name, value in given.items() if name in SERVER_SETTINGS},
        connect_seconds=int(given[CONNECT_TIMEOUT]) if CONNECT_TIMEOUT in given else None,
    )


def _unknown(name: str, parts: SplitResult) -> str:
    # If the path or the query contains an @, what looks like an option name may be part of a password that is not
    # percent-encoded.
    is_shown = _NAME.fullmatch(name) and "@" not in parts.path + parts.query
    return f"unknown option{f' {name}' if is_shown else ''}; expected one of {', '.join(sorted(KNOWN))}"


def _check(given: Mapping[str, str], parts: SplitResult) -> None:
    """Raise ValueError unless each option has a valid value."""
    for name, value in given.items():
        values = PASSED_ON.get(name)
        if values is not None and value not in values:
            raise ValueError(f"expected {', '.join(values)} for the option {name}")
    seconds = given.get(CONNECT_TIMEOUT, "1")
    if not re.fullmatch(r"[0-9]{1,3}", seconds) or not 1 <= int(seconds) <= MAX_CONNECT_SECONDS:
        raise ValueError(f"expected 1 to {MAX_CONNECT_SECONDS} seconds for the option {CONNECT_TIMEOUT}")
    if given.get("gssencmode") == "require":
        raise ValueError("expected disable, allow or prefer for the option gssencmode")
    if "host" in given and parts.hostname:
        raise ValueError("expected a host either before the database or in the option host, not in both")
    port = given.get("port", "1")
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65_535:
        raise ValueError("expected 1 to 65535 for the option port")
    if "port" in given and parts.port is not None:
        raise ValueError("expected a port either after the host or in the option port, not in both")
