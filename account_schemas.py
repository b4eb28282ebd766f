"""What comes in and goes out of accounts: signing up, signing in, and the account itself. The rest is in `schemas`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import MISSING, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from schemas import BLANK, VISIBLE, Answer, Body, IsoDate, Moment

Username = Annotated[str, Field(min_length=3, max_length=50, pattern=rf"^[^@/\\{BLANK}]{{3,50}}$")]
Password = Annotated[str, Field(min_length=8, max_length=128)]
PersonName = Annotated[str, Field(min_length=1, max_length=100, pattern=VISIBLE)]
Phone = Annotated[str, Field(pattern=r"^\+?[1-9][0-9]{6,14}$", description="E.164; the plus may be left out")]
# The addresses of HTML's <input type=email> (which every browser checks so), with a domain of two labels at least.
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
Email = Annotated[
    str,
    Field(
        max_length=254,
        pattern=rf"^{_ATOM}(?:\.{_ATOM})*@(?:{_LABEL}\.)+[A-Za-z](?:[A-Za-z0-9-]{{0,61}}[A-Za-z0-9])$",
        json_schema_extra={"format": "email"},
    ),
]

_NAMED: JsonDict = {"anyOf": [{"required": ["username"]}, {"required": ["email"]}]}
_WITH_PASSWORD: JsonDict = {"anyOf": [{"required": ["password"]}, {"required": ["hashedPassword"]}]}


class RegisterBody(Body):
    """`username`, `email` or both; `hashedPassword` is another name for `password`."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [_NAMED, _WITH_PASSWORD],
            "examples": [{"username": "holly", "email": "holly@example.org", "password": "third man 1949"}],
        }
    )

    username: Username | MISSING = MISSING
    email: Email | MISSING = MISSING
    password: Password | MISSING = MISSING
    hashedPassword: Password | MISSING = MISSING  # noqa: N815
    name: PersonName | None = None
    first_name: PersonName | None = None
    last_name: PersonName | None = None
    phone_number: Phone | None = None

    @model_validator(mode="after")
    def _named_and_locked(self) -> RegisterBody:
        if not self.model_fields_set & {"username", "email"}:
            raise ValueError("expected username, email or both")
        if not self.model_fields_set & {"password", "hashedPassword"}:
            raise ValueError("expected password")
        return self


class LoginBody(Body):
    """By `username` (which may hold an e-mail address) or `email`."""

    model_config = ConfigDict(
        json_schema_extra={"allOf": [_NAMED], "examples": [{"username": "holly", "password": "third man 1949"}]}
    )

    username: Annotated[str, Field(min_length=1, max_length=320)] | MISSING = MISSING
    email: Annotated[str, Field(min_length=1, max_length=320)] | MISSING = MISSING
    password: Annotated[str, Field(min_length=1, max_length=128)]

    @model_validator(mode="after")
    def _named(self) -> LoginBody:
        if not self.model_fields_set & {"username", "email"}:
            raise ValueError("expected username or email")
        return self


class TokenForm(Body):
    """The password grant of OAuth2 (RFC 6749, section 4.3); other fields of the form are ignored."""

    model_config = ConfigDict(
        extra="ignore", json_schema_extra={"examples": [{"username": "holly", "password": "third man 1949"}]}
    )

    grant_type: Literal["password"] = "password"
    username: Annotated[str, Field(min_length=1, max_length=320)]
    password: Annotated[str, Field(min_length=1, max_length=128)]


class GroupBody(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"group": "moderator"}]})

    group: Literal["user", "moderator", "admin"]


class Session(Answer):
    """Somebody who is signed in somewhere."""

    id: str
    user_id: int
    user_agent: str | None = Field(description="What the client called itself when it signed in")
    address: str | None = Field(description="Where it signed in from")
    created_at: Moment
    last_used_at: Moment = Field(description="When it was last refreshed, or begun")


class Token(Answer):
    access_token: str
    token_type: Literal["bearer"]
    expires_in: int = Field(description="Seconds")
    user_id: int


class User(Answer):
    id: int
    username: str | None
    email: str | None
    name: str | None
    first_name: str | None
    last_name: str | None
    phone_number: str | None
    group: Literal["user", "moderator", "admin"]
    is_active: bool
    awaits_activation: bool = Field(description="Nobody has followed the mailed link yet")
    gender: Literal["female", "male", "other", "undisclosed"] | None
    date_of_birth: IsoDate | None
    info: str | None
    avatar_url: str | None = Field(description="A square picture")
    avatar_thumbnail_url: str | None
    has_profile: bool
    version: int
    created_at: Moment
    updated_at: Moment


class AuditEntry(Answer):
    """What an admin did to an account."""

    id: int
    actor_id: int | None = Field(description="Who did it")
    action: str
    user_id: int = Field(description="Whose account it is")
    changes: dict[str, list[Any]] = Field(description="What became different: as it was, and as it is")
    address: str | None = Field(description="Where the admin was")
    created_at: Moment
