"""What comes in and goes out of accounts: signing up, signing in, and the account itself. The rest is in `schemas`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from email_validator import EmailNotValidError, validate_email
from pydantic import MISSING, AfterValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from core.password_rules import MAX_PASSWORD_LENGTH, MIN_PASSWORD_LENGTH
from schemas import BLANK, Answer, Body, IsoDate, Moment

MAX_EMAIL_LENGTH = 254  # RFC 5321, section 4.5.3.1.3, without the angle brackets
MAX_ONE_TIME_TOKEN_LENGTH = 128  # ours have 43 characters

# What cannot be seen, or turns what follows: controls, marks of direction and format, joiners, fillers, private use.
# And what becomes @, / or a backslash when it is normalised.
_INVISIBLE = (
    r"\x80-\x9f\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    r"\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ue000-\uf8ff\ufe00-\ufe0f\uffa0\ufff0-\uffff"
    # As they are: JSON Schema has no other way to write them.
    "\U000110bd\U000110cd\U00013430-\U0001345f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U0010ffff"
)
_NORMALISED_AWAY = r"\u2100\u2101\u2105\u2106\ufe68\ufe6b\uff0f\uff20\uff3c"
# What `str.strip` takes off: names and addresses are trimmed.
_PADDING = r"\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_USERNAME = rf"^[{_PADDING}]*[^@/\\{BLANK}{_INVISIBLE}{_NORMALISED_AWAY}]{{3,50}}[{_PADDING}]*$"
_USERNAME_WORDS = "expected 3 to 50 characters that can be seen, without blanks, @, / and backslash"
# Control characters, ends of lines, and marks that turn the direction of whatever is shown after the name.
_DISRUPTIVE = r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
_PERSON_NAME = rf"^[{_PADDING}]*[^{_DISRUPTIVE}{BLANK}](?:[^{_DISRUPTIVE}]*[^{_DISRUPTIVE}{BLANK}])?[{_PADDING}]*$"
_PERSON_NAME_WORDS = "expected a name, without control characters, ends of lines and marks of direction"


def _username(name: str) -> str:
    if not re.fullmatch(_USERNAME, name):
        raise ValueError(_USERNAME_WORDS)
    return name.strip()


def _person_name(name: str) -> str:
    if not re.fullmatch(_PERSON_NAME, name):
        raise ValueError(_PERSON_NAME_WORDS)
    return name.strip()


Username = Annotated[
    str,
    AfterValidator(_username),
    Field(
        description=f"{_USERNAME_WORDS.capitalize()}; blanks around it are taken off",
        json_schema_extra={"minLength": 3, "pattern": _USERNAME},
    ),
]
PersonName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=100,
        description=f"{_PERSON_NAME_WORDS.capitalize()}; blanks around it are taken off",
        json_schema_extra={"pattern": _PERSON_NAME},
    ),
    AfterValidator(_person_name),
]
# How long it is `password_rules` checks with the other rules, so that every broken one is named at once.
NewPassword = Annotated[
    str, Field(json_schema_extra={"minLength": MIN_PASSWORD_LENGTH, "maxLength": MAX_PASSWORD_LENGTH})
]
Phone = Annotated[str, Field(pattern=r"^\+?[1-9][0-9]{6,14}$", description="E.164; the plus may be left out")]
# The addresses of HTML's <input type=email> (which every browser checks so), with a domain of two labels at least.
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+"
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_ADDRESS = rf"{_ATOM}(?:\.{_ATOM})*@(?:{_LABEL}\.)+[A-Za-z](?:[A-Za-z0-9-]{{0,61}}[A-Za-z0-9])"
_EMAIL = rf"^[{_PADDING}]*{_ADDRESS}[{_PADDING}]*$"
# What no mail server takes: a first part that is too long, and labels kept for encodings that there are not (RFC 5891).
_UNDELIVERABLE: JsonDict = {
    "anyOf": [
        {"pattern": rf"[^@{_PADDING}]{{65}}@"},
        {"pattern": r"@(?:[^@]*\.)?(?![xX][nN])[^.@]{2}--"},
        {"pattern": rf"[^{_PADDING}]{{{MAX_EMAIL_LENGTH + 1}}}"},
    ]
}


def _deliverable(address: str) -> str:
    """The address in the form that mail servers take, its domain in small letters."""
    if len(address.strip()) > MAX_EMAIL_LENGTH:
        raise ValueError(f"expected at most {MAX_EMAIL_LENGTH} characters")
    if not re.fullmatch(_EMAIL, address):
        raise ValueError("expected an address such as holly@example.org")
    try:
        found = validate_email(address.strip(), check_deliverability=False, allow_smtputf8=False, strict=True)
    except EmailNotValidError as error:
        raise ValueError(f"expected an address that mails can be sent to: {error}") from None
    assert found.ascii_email is not None
    return found.ascii_email


Email = Annotated[
    str,
    Field(
        description=f"At most {MAX_EMAIL_LENGTH} characters, not of a domain that is kept for other uses, such as "
        ".local and .test; blanks around it are taken off",
        json_schema_extra={"pattern": _EMAIL, "not": _UNDELIVERABLE},
    ),
    AfterValidator(_deliverable),
]

_NAMED: JsonDict = {"anyOf": [{"required": ["username"]}, {"required": ["email"]}]}
_WITH_PASSWORD: JsonDict = {"anyOf": [{"required": ["password"]}, {"required": ["hashedPassword"]}]}


class RegisterBody(Body):
    """`username`, `email` or both; `hashedPassword` is another name for `password`, which counts if both are there."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [_NAMED, _WITH_PASSWORD],
            "examples": [{"username": "holly", "email": "holly@example.org", "password": "third man 1949"}],
        }
    )

    username: Username | MISSING = MISSING
    email: Email | MISSING = MISSING
    password: NewPassword | MISSING = MISSING
    hashedPassword: NewPassword | MISSING = MISSING  # noqa: N815
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


RefreshToken = Annotated[str, Field(min_length=1, max_length=4_096)]


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
    """The grants `password` and `refresh_token` of OAuth2 (RFC 6749, sections 4.3 and 6); other fields are ignored."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={
            "anyOf": [
                {"required": ["username", "password"], "properties": {"grant_type": {"const": "password"}}},
                {"required": ["grant_type", "refresh_token"], "properties": {"grant_type": {"const": "refresh_token"}}},
            ],
            "examples": [
                {"username": "holly", "password": "third man 1949"},
                {"grant_type": "refresh_token", "refresh_token": "eyJhbGciOiJIUzI1NiJ9.e30.c2lnbmF0dXJl"},
            ],
        },
    )

    grant_type: Literal["password", "refresh_token"] = "password"
    username: Annotated[str, Field(min_length=1, max_length=320)] | MISSING = MISSING
    password: Annotated[str, Field(min_length=1, max_length=128)] | MISSING = MISSING
    refresh_token: RefreshToken | MISSING = MISSING

    @model_validator(mode="after")
    def _whole(self) -> TokenForm:
        if self.grant_type == "refresh_token" and "refresh_token" not in self.model_fields_set:
            raise ValueError("expected refresh_token")
        if self.grant_type == "password" and not self.model_fields_set >= {"username", "password"}:
            raise ValueError("expected username and password")
        return self


class RefreshBody(Body):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"refresh_token": "eyJhbGciOiJIUzI1NiJ9.e30.c2lnbmF0dXJl"}]}
    )

    refresh_token: RefreshToken


# --- links in mails, and passwords

OneTimeToken = Annotated[str, Field(min_length=1, max_length=MAX_ONE_TIME_TOKEN_LENGTH)]
_TOKEN = "pFkTfjOhxL2cF1pUhAu6KyMVzMcCCyTBZb7JbLRNTxA"  # noqa: S105 (an example)


class LinkBody(Body):
    """What the link in a mail carries."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"token": _TOKEN}]})

    token: OneTimeToken


class AddressBody(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"email": "holly@example.org"}]})

    email: Email


class ChangePasswordBody(Body):
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"old_password": "third man 1949", "new_password": "prater wheel 1949"}]}
    )

    old_password: Annotated[str, Field(min_length=1, max_length=MAX_PASSWORD_LENGTH)]
    new_password: NewPassword


class ResetPasswordBody(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"token": _TOKEN, "new_password": "prater wheel 1949"}]})

    token: OneTimeToken
    new_password: NewPassword


class MailPromise(Answer):
    """The same for everybody, whether there is such an account or not."""

    detail: str


class GroupBody(Body):
    model_config = ConfigDict(json_schema_extra={"examples": [{"group": "moderator"}]})

    group: Literal["user", "moderator", "admin"]


class Session(Answer):
    """Somebody who is signed in somewhere."""

    id: str
    user_id: int
    user_agent: str | None = Field(description="What the client called itself when it signed in")
    address: str | None = Field(description="Where it was last refreshed from, or signed in")
    created_at: Moment
    last_used_at: Moment = Field(description="When it was last refreshed, or begun")


class Token(Answer):
    access_token: str
    refresh_token: str = Field(description="Good once, for the next pair of tokens")
    token_type: Literal["bearer"]
    expires_in: int = Field(description="Seconds that the access token is good for")
    refresh_expires_in: int = Field(description="Seconds that the refresh token is good for")
    user_id: int
    session_id: str = Field(description="Which of the sessions in /auth/sessions this is")


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
    actor_id: int | None = Field(description="Who did it; null: whoever runs the service, outside of it")
    action: str
    user_id: int = Field(description="Whose account it is")
    changes: dict[str, list[Any]] = Field(description="What became different: as it was, and as it is")
    address: str | None = Field(description="Where the admin was")
    created_at: Moment
