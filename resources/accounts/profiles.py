"""Request and response models for existing accounts and their profiles."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal

from pydantic import MISSING, AfterValidator, Field, model_validator
from pydantic.config import JsonDict

from resources.accounts.credentials import Email, NewPassword, Phone, Username
from schemas import READ_ONLY, WHOLE, Answer, Body, IsoDate, Moment, Name, Prose, Whole, examples

EARLIEST_BIRTH = "1900-01-01"
MIN_AGE_YEARS = 13  # below this age, many countries require parental consent, which this service cannot obtain
CURRENT_PASSWORD = "Required to change the user name or the email"  # noqa: S105 (no password)
PROOFS = ("current_password", "password")  # the fields for the current password; the first one sent counts


def latest_birth(today: date) -> str:
    """Return the latest date of birth of a user who is old enough on the day `today`. Pure."""
    # The year that is MIN_AGE_YEARS before a leap year has no 29 February.
    day = 28 if (today.month, today.day) == (2, 29) else today.day
    return date(today.year - MIN_AGE_YEARS, today.month, day).isoformat()


def _old_enough(value: str) -> str:
    latest = latest_birth(datetime.now(UTC).date())
    if not EARLIEST_BIRTH <= value <= latest:
        raise ValueError(f"expected a date from {EARLIEST_BIRTH} to {latest} ({MIN_AGE_YEARS} years ago)")
    return value


Gender = Literal["female", "male", "other", "undisclosed"]
Birthday = Annotated[
    IsoDate,
    AfterValidator(_old_enough),
    Field(description=f"Not before {EARLIEST_BIRTH}, and at least {MIN_AGE_YEARS} years ago"),
]
CurrentPassword = Annotated[str, Field(min_length=1, max_length=128, description=CURRENT_PASSWORD)]
CurrentPasswordAlias = Annotated[str, Field(min_length=1, max_length=128, description="Alias of `current_password`")]
# PUT replaces the whole account, so the body must contain a user name or an email.
_NAMED: JsonDict = {
    "anyOf": [
        {"required": ["username"], "properties": {"username": {"type": "string"}}},
        {"required": ["email"], "properties": {"email": {"type": "string"}}},
    ]
}
_NAMELESS: JsonDict = {
    "required": ["username", "email"],
    "properties": {"username": {"type": "null"}, "email": {"type": "null"}},
}


# --- accounts


class AccountBody(Body):
    """An account as its owner or an admin edits it; a missing field takes its default."""

    model_config = examples(
        {"username": "holly", "name": "Holly Martins", "phone_number": "+436641234567"}, allOf=[_NAMED]
    )
    NEEDED = ((("username", "email"), "expected username, email or both"),)

    username: Username | None = None
    email: Email | None = None
    name: Name | None = None
    first_name: Name | None = None
    last_name: Name | None = None
    phone_number: Phone | None = None

    @model_validator(mode="after")
    def _named(self) -> AccountBody:
        if self.username is None and self.email is None:
            raise ValueError("expected username, email or both")
        return self


class AccountPatch(Body):
    """Only the fields in the body change."""

    model_config = examples({"name": "Holly Martins", "phone_number": "+436641234567"}, **{"not": _NAMELESS})

    username: Username | None | MISSING = MISSING
    email: Email | None | MISSING = MISSING
    name: Name | None | MISSING = MISSING
    first_name: Name | None | MISSING = MISSING
    last_name: Name | None | MISSING = MISSING
    phone_number: Phone | None | MISSING = MISSING

    @model_validator(mode="after")
    def _named(self) -> AccountPatch:
        if self.username is None and self.email is None:
            raise ValueError("expected at least one of username and email, got null for both")
        return self


_Number = Annotated[Whole, WHOLE]
_Flag = Annotated[bool, Field(strict=True)]


class KeptAccount(Body):
    """The members of an account that other routes or the service change. They must have their current values."""

    id: _Number | MISSING = READ_ONLY
    group: str | MISSING = READ_ONLY
    is_active: _Flag | MISSING = READ_ONLY
    awaits_activation: _Flag | MISSING = READ_ONLY
    gender: str | None | MISSING = READ_ONLY
    date_of_birth: str | None | MISSING = READ_ONLY
    info: str | None | MISSING = READ_ONLY
    avatar_url: str | None | MISSING = READ_ONLY
    avatar_thumbnail_url: str | None | MISSING = READ_ONLY
    has_profile: _Flag | MISSING = READ_ONLY
    version: _Number | MISSING = READ_ONLY
    created_at: str | MISSING = READ_ONLY
    updated_at: str | MISSING = READ_ONLY


class AccountReplacement(KeptAccount, AccountBody):
    """An account as its owner or an admin edits it. PUT replaces all of it: a missing field takes its default."""


class AccountChange(KeptAccount, AccountPatch):
    """Only the fields in the body change."""


class OwnAccountReplacement(AccountReplacement):
    current_password: CurrentPassword | MISSING = MISSING
    password: CurrentPasswordAlias | MISSING = MISSING


class OwnAccountChange(AccountChange):
    current_password: CurrentPassword | MISSING = MISSING
    password: CurrentPasswordAlias | MISSING = MISSING


class NewAccountBody(AccountBody):
    """An account that an admin creates; it is active immediately."""

    model_config = examples(
        {"username": "calloway", "password": "sewers of 1949", "group": "moderator"}, allOf=[_NAMED]
    )

    password: NewPassword
    group: Literal["user", "moderator", "admin"] = "user"


class OtherUser(Answer):
    """An account as other users see it."""

    id: int
    username: str | None
    name: str | None


# --- profiles


class ProfileBody(Body):
    """A profile as its owner edits it; a missing field takes its default."""

    model_config = examples(
        {
            "first_name": "Holly",
            "last_name": "Martins",
            "gender": "male",
            "date_of_birth": "1905-05-15",
            "info": "Writes westerns.",
        }
    )

    first_name: Name | None = None
    last_name: Name | None = None
    gender: Gender | None = None
    date_of_birth: Birthday | None = None
    info: Prose | None = None


class ProfilePatch(Body):
    """Only the fields in the body change."""

    model_config = examples({"info": "Wrote westerns."})

    first_name: Name | None | MISSING = MISSING
    last_name: Name | None | MISSING = MISSING
    gender: Gender | None | MISSING = MISSING
    date_of_birth: Birthday | None | MISSING = MISSING
    info: Prose | None | MISSING = MISSING


class KeptProfile(Body):
    """The members of a profile that the service maintains. They must have their current values."""

    user_id: _Number | MISSING = READ_ONLY
    avatar_url: str | None | MISSING = READ_ONLY
    avatar_thumbnail_url: str | None | MISSING = READ_ONLY
    version: _Number | MISSING = READ_ONLY
    created_at: str | MISSING = READ_ONLY
    updated_at: str | MISSING = READ_ONLY


class ProfileReplacement(KeptProfile, ProfileBody):
    """A profile as its owner edits it. PUT replaces all of it: a missing field takes its default."""


class ProfileChange(KeptProfile, ProfilePatch):
    """Only the fields in the body change."""


Picture = Annotated[
    bytes, Field(description="JPEG, PNG or WebP", json_schema_extra={"type": "string", "format": "binary"})
]
# An example for forms, which can carry a file besides the fields. Examples show a binary field as text.
_PICTURE_EXAMPLE: JsonDict = {"info": "Writes westerns.", "avatar": "(the bytes of a picture)"}


class ProfileForm(ProfileBody):
    """A profile with its picture. Without `avatar`, the picture is kept. An empty string means null."""

    model_config = examples(_PICTURE_EXAMPLE)

    avatar: Picture | MISSING = MISSING


class ProfilePatchForm(ProfilePatch):
    """Only the fields in the body change. An empty string means null."""

    model_config = examples(_PICTURE_EXAMPLE)

    avatar: Picture | MISSING = MISSING


class AvatarForm(Body):
    """A picture. Its format is detected from the bytes, not from the file name or the media type."""

    model_config = examples({"avatar": "(the bytes of a picture)"})

    avatar: Picture


class Profile(Answer):
    """The personal data of an account's owner."""

    user_id: int
    first_name: str | None
    last_name: str | None
    gender: Gender | None
    date_of_birth: IsoDate | None
    info: str | None
    avatar_url: str | None = Field(description="URL of a square picture")
    avatar_thumbnail_url: str | None
    version: int = Field(description="Version of the account, which includes the profile")
    created_at: Moment
    updated_at: Moment


def dumped(body: Body) -> dict[str, Any]:
    """Return the members of a body, without passwords and picture. For a PATCH, return only those that were sent."""
    is_patch = isinstance(body, (AccountPatch, ProfilePatch))
    return body.model_dump(exclude_unset=is_patch, exclude={*PROOFS, "avatar"})
