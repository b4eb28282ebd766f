"""All settings, read once from the environment and `.env` into one frozen object."""

from __future__ import annotations

import os
import secrets
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

import structlog
from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import AfterValidator, EmailStr, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from core import rates, setting_values
from core.errors import SettingsError, words_of
from core.network.hosts import UNSPECIFIED, AllowedHosts, normal
from core.setting_values import ANY_CASE, HASH_BYTES, LISTED, MIN_SECRET_KEY_BYTES

MISSPELT_SIMILARITY = 0.8  # the minimum ratio for difflib: about one letter in five may differ


class Settings(BaseSettings):
    """The settings. Each field is named after its environment variable, in lowercase."""

    model_config = SettingsConfigDict(
        env_file=".env",
        env_file_encoding="utf-8",
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
    )

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535)
    workers: int = Field(default=1, ge=1, le=64)

    database_url: Annotated[str, AfterValidator(setting_values.database_url)] = "sqlite:///data/marquee.db"
    database_pooler: Annotated[Literal["on", "off"], ANY_CASE] = "off"
    broadcast_url: Annotated[str, AfterValidator(setting_values.broadcast_url)] = "memory://"

    secret_key: Annotated[SecretStr, AfterValidator(setting_values.secret_key)] | None = None
    algorithm: Literal["HS256", "HS384", "HS512"] = "HS256"
    old_secret_keys: Annotated[tuple[SecretStr, ...], NoDecode, LISTED] = ()
    access_token_expire_minutes: int = Field(default=15, ge=1, le=60 * 24 * 30)
    refresh_token_expire_days: int = Field(default=7, ge=1, le=365)

    # As recommended by OWASP's password storage cheat sheet: argon2id with 19 MiB, 2 passes, 1 lane.
    password_memory_kib: int = Field(default=19 * 1024, ge=8, le=4 * 1024 * 1024)
    password_time_cost: int = Field(default=2, ge=1, le=100)
    password_parallelism: int = Field(default=1, ge=1, le=64)
    password_mix: Annotated[Literal["on", "off"], ANY_CASE] = "off"  # noqa: S105 (no password)

    account_activation: Annotated[Literal["none", "email"], ANY_CASE] = "none"
    public_url: Annotated[str, AfterValidator(setting_values.public_url)] | None = None
    root_path: Annotated[str, AfterValidator(setting_values.root_path)] | None = None
    smtp_url: Annotated[SecretStr, AfterValidator(setting_values.smtp_url)] | None = None
    mail_from: Annotated[str, AfterValidator(setting_values.mailbox)] = Field(
        default="Marquee <marquee@localhost>", min_length=3, max_length=320
    )
    mail_folder: str = Field(default="mail", min_length=1)

    storage_url: Annotated[str, AfterValidator(setting_values.storage_url)] | None = None
    s3_endpoint_url: Annotated[str, AfterValidator(setting_values.endpoint_url)] | None = None
    s3_region: str = "us-east-1"
    s3_access_key_id: str | None = None
    s3_secret_access_key: SecretStr | None = None

    first_admin_username: str | None = Field(default=None, min_length=3, max_length=50)
    first_admin_email: EmailStr | None = None
    first_admin_password: SecretStr | None = None
    first_admin_first_name: str | None = Field(default=None, max_length=100)
    first_admin_last_name: str | None = Field(default=None, max_length=100)

    max_connections: int = Field(default=10_000, ge=1, le=1_000_000)
    max_connections_per_address: int = Field(default=1_000, ge=1, le=1_000_000)
    max_http_connections: int = Field(default=4_000, ge=1, le=1_000_000)
    max_http_connections_per_address: int = Field(default=500, ge=1, le=1_000_000)
    rate_limits: Annotated[str, AfterValidator(setting_values.rate_limits)] = "on"
    users_per_address: int = Field(default=10, ge=1, le=10_000)
    trusted_proxies: Annotated[tuple[str, ...], NoDecode, LISTED, AfterValidator(setting_values.networks)] = ()
    websocket_auth: Annotated[Literal["optional", "required"], ANY_CASE] = "optional"

    allowed_hosts: Annotated[tuple[str, ...], NoDecode, LISTED, AfterValidator(setting_values.hosts)] = ()
    allowed_origins: Annotated[tuple[str, ...], NoDecode, LISTED, AfterValidator(setting_values.origins)] = ()

    event_retention_hours: float = Field(default=168.0, gt=0, le=24 * 3650)
    event_retention_rows: int = Field(default=1_000_000, ge=1_000)
    event_retention_bytes: int = Field(default=4 * 1024**3, ge=64 * 1024**2)

    read_timeout_seconds: float = Field(default=10, ge=0.1, le=300)

    generated_rows_per_day: int = Field(default=5_000_000, ge=1, le=1_000_000_000)
    # At least 24 hours, because the quota for generated rows counts the jobs of the last 24 hours.
    job_retention_hours: float = Field(default=168.0, ge=24, le=24 * 3650)

    ratings_require_watched: Annotated[Literal["true", "false"], ANY_CASE] = "false"

    compression: Annotated[Literal["on", "off"], ANY_CASE] = "on"
    drain_seconds: float = Field(default=0, ge=0, le=300)
    metrics_token: SecretStr | None = None

    log_format: Annotated[Literal["console", "json"], ANY_CASE] = "console"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], ANY_CASE] = "info"

    @model_validator(mode="after")
    def _fit_together(self) -> Settings:
        if (self.s3_access_key_id is None) != (self.s3_secret_access_key is None):
            raise ValueError("S3_ACCESS_KEY_ID and S3_SECRET_ACCESS_KEY: expected both or neither")
        if self.root_path is not None and self._path_of_public_url not in ("", self.root_path):
            raise ValueError("PUBLIC_URL: expected no path, or the same path as ROOT_PATH")
        needed = HASH_BYTES[self.algorithm]
        if self.secret_key is not None and setting_values.size(self.secret_key) < needed:
            raise ValueError(f"SECRET_KEY: expected at least {needed} bytes for {self.algorithm}")
        if any(setting_values.size(key) < needed for key in self.old_secret_keys):
            # A weak old key lets an attacker forge tokens just as a weak current one does.
            raise ValueError(f"OLD_SECRET_KEYS: expected keys of at least {needed} bytes each for {self.algorithm}")
        if self.password_memory_kib < 8 * self.password_parallelism:
            raise ValueError("PASSWORD_MEMORY_KIB: expected at least 8 times PASSWORD_PARALLELISM")
        given = self.first_admin_username or self.first_admin_email
        if given and self.first_admin_password is None:
            raise ValueError("FIRST_ADMIN_PASSWORD is required with FIRST_ADMIN_USERNAME or FIRST_ADMIN_EMAIL")
        if self.first_admin_password is not None and not given:
            raise ValueError("FIRST_ADMIN_USERNAME or FIRST_ADMIN_EMAIL is required with FIRST_ADMIN_PASSWORD")
        if not given and (self.first_admin_first_name or self.first_admin_last_name):
            raise ValueError(
                "FIRST_ADMIN_USERNAME or FIRST_ADMIN_EMAIL is required "
                "with FIRST_ADMIN_FIRST_NAME or FIRST_ADMIN_LAST_NAME"
            )
        return self

    @property
    def sqlite_path(self) -> Path | None:
        """The SQLite file, or None on PostgreSQL."""
        prefix = "sqlite:///"
        return Path(self.database_url.removeprefix(prefix)) if self.database_url.startswith(prefix) else None

    @property
    def storage_folder(self) -> Path | None:
        """The folder that stores files, or None when they are in a bucket."""
        if self.storage_url is None:
            return (self.sqlite_path.parent if self.sqlite_path else Path("data")) / "files"
        parts = urlsplit(self.storage_url)
        return Path(unquote(parts.path)) if parts.scheme == "file" else None

    @property
    def _path_of_public_url(self) -> str:
        return urlsplit(self.public_url).path if self.public_url is not None else ""

    @property
    def root(self) -> str:
        """The path under which clients reach the service, such as /marquee, or an empty string."""
        return self.root_path or self._path_of_public_url

    @property
    def base_url(self) -> str:
        """The prefix of URLs in emails, without a trailing slash."""
        if self.public_url is not None:
            return self.public_url if self._path_of_public_url else self.public_url + self.root
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104
        return f"http://[{host}]:{self.port}{self.root}" if ":" in host else f"http://{host}:{self.port}{self.root}"

    @property
    def hosts(self) -> AllowedHosts:
        """The hosts that requests may name, in addition to loopback names and addresses."""
        own = [self.host, *([urlsplit(self.public_url).hostname or ""] if self.public_url is not None else [])]
        patterns = frozenset({*self.allowed_hosts, *map(normal, own)})
        return AllowedHosts(patterns, allows_addresses=self.host in UNSPECIFIED)

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins whose pages may connect, in addition to the origin that the `Host` header names."""
        public = urlsplit(self.public_url) if self.public_url is not None else None
        own = (f"{public.scheme}://{public.netloc}".lower(),) if public is not None else ()
        return (*self.allowed_origins, *own)

    @property
    def activates_by_mail(self) -> bool:
        """Whether a new account must be activated through an emailed URL."""
        return self.account_activation == "email"

    @property
    def has_limits(self) -> bool:
        """Whether limits per client apply, such as rate limits and limits on connections per address."""
        return rates.parse_rate_limits(self.rate_limits).is_on

    @property
    def needs_password_mix(self) -> bool:
        return self.password_mix == "on"  # noqa: S105 (no password)

    @property
    def compresses(self) -> bool:
        """Whether responses are compressed for clients that accept it."""
        return self.compression == "on"

    @property
    def allows_only_watched(self) -> bool:
        """Whether users can rate only movies that their watchlist has as watched."""
        return self.ratings_require_watched == "true"

    @property
    def has_pooler(self) -> bool:
        """Whether PostgreSQL may be behind a connection pooler."""
        return self.database_pooler == "on"

    @property
    def has_shared_bus(self) -> bool:
        """Whether the bus connects several processes."""
        return not self.broadcast_url.startswith("memory")


def load_settings(**overrides: Any) -> Settings:
    """Return the settings from the environment and `.env`. Raises SettingsError."""
    try:
        _check_env_file(Path(".env"))
        return Settings(**overrides)
    except UnicodeDecodeError as error:
        raise SettingsError(f".env: expected UTF-8, but the byte at offset {error.start} is invalid.") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        message = words_of(first)
        if not first["loc"]:
            raise SettingsError(f"{message}.") from None
        raise SettingsError(f"{str(first['loc'][0]).upper()}: {message[:1].lower()}{message[1:]}.") from None


def _check_env_file(path: Path) -> None:
    """Raise SettingsError if a line cannot be parsed. The line is not ignored, because it may set the secret key."""
    if not path.exists():
        return
    if not path.is_file():
        raise SettingsError(".env: expected a file.")
    with path.open(encoding="utf-8") as stream:
        for binding in parse_stream(stream):
            if binding.error:
                raise SettingsError(f".env: line {binding.original.line} cannot be parsed; expected NAME=value.")


def warn_of_misspelt_settings() -> None:
    """Log a warning for each name in `.env` that is not a setting but resembles one. Ignore all other names."""
    for name in dotenv_values(".env"):
        likely = get_close_matches(name.lower(), Settings.model_fields, n=1, cutoff=MISSPELT_SIMILARITY)
        if likely and name.lower() not in Settings.model_fields:
            structlog.get_logger("settings").warning("unknown setting in .env", name=name, likely=likely[0].upper())


def secret_key(settings: Settings) -> str:
    """Return the key that signs tokens: SECRET_KEY, or a key generated once and stored beside the database.

    Several workers may start at once in an empty folder: the first to hard-link its file into place wins, and the
    others read that file. Raises SettingsError when the file cannot be used.
    """
    if settings.secret_key is not None:
        return settings.secret_key.get_secret_value()
    folder = settings.sqlite_path.parent if settings.sqlite_path else Path("data")
    path = folder / "secret.key"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            draft = folder / f".secret.key.{os.getpid()}.{secrets.token_hex(4)}"
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_urlsafe(48))
            try:
                # A hard link appears complete or not at all, and never replaces an existing file.
                os.link(draft, path)
                structlog.get_logger("settings").warning(
                    "secret key generated", path=str(path), hint="set SECRET_KEY if several machines share a database"
                )
            except FileExistsError:
                pass
            finally:
                draft.unlink()
        key = path.read_text().strip()
    except OSError as error:
        raise SettingsError(f"SECRET_KEY: not set, and {path} cannot be used: {error.strerror}.") from error
    if len(key.encode()) < MIN_SECRET_KEY_BYTES:
        raise SettingsError(f"SECRET_KEY: {path} is shorter than {MIN_SECRET_KEY_BYTES} bytes; delete the file.")
    return key


def signing_keys(settings: Settings) -> tuple[str, ...]:
    """Return the key that signs new tokens, followed by the old keys, whose tokens are still accepted."""
    return secret_key(settings), *(key.get_secret_value() for key in settings.old_secret_keys)
