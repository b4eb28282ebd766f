"""The pydantic types that request and response bodies are built from, for validation and for OpenAPI.

Request models reject unknown fields, except for the OAuth2 form. Every constraint of the types in this module is also
in their JSON Schema, so that clients can validate before they send.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    MISSING,
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic.config import JsonDict, JsonValue
from pydantic_core import PydanticCustomError

from core import times
from core.errors import TOO_MANY_MEMBERS, FieldProblem, is_too_large
from core.texts.normal import BLANK, INVISIBLE, is_visible, nfc
from core.texts.numbers import MAX_INTEGER

MAX_ID = MAX_INTEGER
MAX_EPOCH_LENGTH = 64
MAX_BULK_ROWS = 10_000
MAX_GENERATED_ROWS = 1_000_000
MAX_PAGE = 1_000
MAX_PROSE_LENGTH = 10_000
MAX_NAME_LENGTH = 100
# The rows of one resource that a row links to. Each of them is one row of the table of links.
MAX_LINKED_ROWS = 20
MIN_REMARK_LENGTH = 2
MAX_SEARCH_LENGTH = 200
MAX_SEARCHED_WORDS = 8  # bounded because each word is looked up, and searched for in every row that changes
DEFAULT_PAGE = 50
# Large enough for one entity whose strings have the maximum length and consist of escaped characters. Websocket
# messages have the same limit.
MAX_BODY_BYTES = 256 * 1024
MAX_AMOUNT = 2**53 - 1  # the largest integer that every JSON parser represents exactly (RFC 8259, section 6)

# PostgreSQL cannot store NUL in text.
NO_NUL = r"^[^\x00]*$"
_VISIBLE = rf"^[^\x00]*[^{BLANK}{INVISIBLE}][^\x00]*$"
# The characters that `str.strip` removes. Names and addresses may begin and end with them, because both are trimmed.
PADDING = r"\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# Control characters, line breaks, and direction marks, which would affect the text shown after the name.
_DISRUPTIVE = r"\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
_EDGE = rf"[^{_DISRUPTIVE}{BLANK}]"
_SEEN = rf"[^{_DISRUPTIVE}{BLANK}{INVISIBLE}]"
_NAME = rf"^[{PADDING}]*(?:{_EDGE}[^{_DISRUPTIVE}]*)?{_SEEN}(?:[^{_DISRUPTIVE}]*{_EDGE})?[{PADDING}]*$"
_NAME_WORDS = "expected a name with a visible character, without control characters, line breaks or direction marks"
UUID = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_LETTERS = "[A-Za-z]{2}"
_INTEGER = re.compile(r"-?[0-9]{1,19}", re.ASCII)


def _iso_date(value: Any) -> Any:
    if not isinstance(value, str) or times.parse_date(value) is None:
        raise ValueError("expected a date such as 1999-12-31")
    return value


def _written_integer(value: Any) -> Any:
    """Accept plain decimal digits only; pydantic would also accept `1_000`, ` 1 ` and `1.0`."""
    if not isinstance(value, str) or not _INTEGER.fullmatch(value):
        raise ValueError("expected an integer")
    return value


def _id_or_code(value: Any) -> int | str:
    if isinstance(value, str):
        if _INTEGER.fullmatch(value) and 1 <= int(value) <= MAX_ID:
            return int(value)
        if re.fullmatch(_LETTERS, value):
            return value
    raise ValueError("expected an id or a code of two letters")


def _whole(value: Any) -> Any:
    # In JSON Schema, 7.0 is an integer (draft 2020-12, section 4.2.3). Floats beyond 2**53 are not converted, because a
    # float cannot represent every integer in that range.
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_AMOUNT else value


def _id_or_name(value: Any) -> int | str:
    """Return the id or the name of a linked row."""
    if isinstance(value, str):
        if not value or len(value) > MAX_NAME_LENGTH:
            raise ValueError(f"expected an id, or a name of 1 to {MAX_NAME_LENGTH} characters")
        return _visible_text(value, MAX_NAME_LENGTH)
    value = _whole(value)
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_ID:
        return value
    raise ValueError("expected an id or a name")


def of_bounded_size(value: Any) -> Any:
    """Return the value. Raises PydanticCustomError for an object with too many members."""
    if is_too_large(value):
        raise PydanticCustomError("too_long", TOO_MANY_MEMBERS)
    return value


def trimmed(pattern: str, expected: str) -> AfterValidator:
    """Return a validator that matches a string against `pattern` and strips surrounding spaces.

    If the string does not match, it raises ValueError with the message `expected`.
    """

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(expected)
        return text.strip()

    return AfterValidator(check)


def _in_nfc(text: str, max_length: int) -> str:
    text = nfc(text)
    if len(text) > max_length:  # NFC expands a few characters into two or three
        raise ValueError(f"expected at most {max_length} characters in Unicode normal form C")
    return text


def _long_enough(text: str) -> str:
    if len(text) < MIN_REMARK_LENGTH:  # NFC joins a letter and its accent
        raise ValueError(f"expected at least {MIN_REMARK_LENGTH} characters in Unicode normal form C")
    return text


def known(codes: frozenset[str], expected: str) -> AfterValidator:
    """Return a validator that raises ValueError with the message `expected` for a string that is not in `codes`."""

    def check(code: str) -> str:
        if code not in codes:
            raise ValueError(expected)
        return code

    return AfterValidator(check)


def normal(max_length: int) -> AfterValidator:
    """Return a validator that converts a string to NFC, and rejects more than `max_length` characters in NFC."""
    return AfterValidator(lambda text: text if text.isascii() else _in_nfc(text, max_length))


def visible(max_length: int) -> AfterValidator:
    """Return a validator like `normal` that also requires a visible character and rejects NUL.

    `_VISIBLE` expresses the same rule for JSON Schema.
    """

    return AfterValidator(lambda text: _visible_text(text, max_length))


def _visible_text(text: str, max_length: int) -> str:
    if "!" <= text[0] <= "~" and text.isascii() and "\x00" not in text:  # the most frequent case
        return text
    if "\x00" in text or not is_visible(text):
        raise ValueError("expected a string with a visible character, without NUL")
    return _in_nfc(text, max_length)


Whole = Annotated[int, Field(strict=True)]
WHOLE = BeforeValidator(_whole)
Id = Annotated[int, Field(strict=True, ge=1, le=MAX_ID), WHOLE]
# In `Annotated`, list this after the bounds: otherwise the JSON Schema does not contain the bounds.
WRITTEN_INTEGER = BeforeValidator(_written_integer)
PathId = Annotated[int, Field(ge=1, le=MAX_ID), WRITTEN_INTEGER]
PathIdOrCode = Annotated[
    int | str,
    PlainValidator(_id_or_code),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": MAX_ID},
                {"type": "string", "pattern": f"^{_LETTERS}$"},
            ],
            "description": "The id or, ignoring case, the code",
        }
    ),
]
Uuid = Annotated[str, Field(pattern=f"^{UUID}$")]
_SHOWN = Field(json_schema_extra={"pattern": _VISIBLE})
Line = Annotated[str, Field(min_length=1, max_length=255), _SHOWN, visible(255)]
Name = Annotated[
    str,
    Field(
        min_length=1,
        max_length=MAX_NAME_LENGTH,
        description=f"{_NAME_WORDS.capitalize()}; leading and trailing spaces are removed",
        json_schema_extra={"pattern": _NAME},
    ),
    trimmed(_NAME, _NAME_WORDS),
    normal(MAX_NAME_LENGTH),
]
Prose = Annotated[str, Field(max_length=MAX_PROSE_LENGTH, pattern=NO_NUL), normal(MAX_PROSE_LENGTH)]
Remark = Annotated[
    str,
    Field(min_length=MIN_REMARK_LENGTH, max_length=MAX_PROSE_LENGTH),
    _SHOWN,
    visible(MAX_PROSE_LENGTH),
    AfterValidator(_long_enough),
]

_GAP, _LETTER = f"[{PADDING}]", rf"[^{PADDING}\x00]"
_FEW_WORDS = rf"^{_GAP}*(?:{_LETTER}+{_GAP}+){{0,{MAX_SEARCHED_WORDS - 1}}}(?:{_LETTER}+{_GAP}*)?$"


def _few_words(text: str) -> str:
    words = text.split()
    if len(set(words)) > MAX_SEARCHED_WORDS:
        raise ValueError(f"expected at most {MAX_SEARCHED_WORDS} different words, got {len(set(words))}")
    return " ".join(words)


Search = Annotated[
    str,
    Field(
        max_length=MAX_SEARCH_LENGTH,
        pattern=NO_NUL,
        description=f"Only rows that contain every word, ignoring case; at most {MAX_SEARCHED_WORDS} words",
        json_schema_extra={"pattern": _FEW_WORDS},
    ),
    normal(MAX_SEARCH_LENGTH),
    AfterValidator(_few_words),
]
Word = Annotated[str, Field(min_length=1, max_length=50), _SHOWN, visible(50)]
IdOrName = Annotated[
    int | str,
    PlainValidator(_id_or_name),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 1, "maximum": MAX_ID},
                {"type": "string", "minLength": 1, "maxLength": MAX_NAME_LENGTH, "pattern": _VISIBLE},
            ]
        }
    ),
]
Linked = Annotated[list[IdOrName], Field(max_length=MAX_LINKED_ROWS)]
IsoDate = Annotated[str, BeforeValidator(_iso_date), Field(json_schema_extra={"format": "date"})]
Moment = Annotated[str, Field(json_schema_extra={"format": "date-time"})]
Amount = Annotated[int, Field(strict=True, ge=0, le=MAX_AMOUNT), WHOLE]
Rating = Annotated[int, Field(strict=True, ge=1, le=100), WHOLE]
Minutes = Annotated[int, Field(strict=True, ge=1, le=100_000), WHOLE]
Country = Annotated[str, Field(pattern=r"^[A-Z]{2}$", description="ISO 3166-1 alpha-2: the code of a country")]


# The default of a member that clients may send, but not change.
READ_ONLY: Any = Field(default=MISSING, description="Only with its current value", json_schema_extra={"readOnly": True})


def examples(*shown: JsonDict, **more: JsonValue) -> ConfigDict:
    """Return a model configuration that adds these examples and the members `more` to the JSON Schema."""
    return ConfigDict(json_schema_extra={"examples": [*shown], **more})


class Body(BaseModel):
    """A request body.

    Each entry of `NEEDED` is a pair: the names of members, at least one of which must be present and not null, and the
    error message for a body with none of them.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)
    NEEDED: ClassVar[Sequence[tuple[tuple[str, ...], str]]] = ()

    @model_validator(mode="before")
    @classmethod
    def _of_bounded_size(cls, value: Any) -> Any:
        return of_bounded_size(value)

    @classmethod
    def unmet(cls, value: Any, known: Sequence[FieldProblem]) -> list[FieldProblem]:
        """Return a problem for each entry of `NEEDED` that the body `value` does not meet, unless `known` contains it.

        Pydantic checks rules about several members only when each is valid, so its errors may lack these problems.
        """
        places = {problem.loc[1:2] for problem in known}
        said = {problem.msg for problem in known}
        lacking = [
            expected[:1].upper() + expected[1:]
            for names, expected in (cls.NEEDED if isinstance(value, dict) else ())
            if all(value.get(name) is None and (name,) not in places for name in names)
        ]
        return [FieldProblem(("body",), expected, "value_error") for expected in lacking if expected not in said]


class Answer(BaseModel):
    # Response models only describe responses and never validate them, so building their validators is deferred.
    model_config = ConfigDict(extra="forbid", defer_build=True)


# --- bulk operations and counts


class BulkIds(Body):
    model_config = examples({"ids": [5, 6]})

    ids: list[Id] = Field(min_length=1, max_length=MAX_BULK_ROWS)


class Skipped(Answer):
    index: int = Field(description="Position in the request, counting from 0")
    detail: list[FieldError]


class Deleted(Answer):
    deleted: list[int]
    not_found: list[int]


class Count(Answer):
    count: int


# --- errors and health


class FieldError(Answer):
    loc: list[str | int]
    msg: str
    type: str


class ErrorAnswer(Answer):
    detail: str | list[FieldError]


class ProblemDetails(Answer):
    """An error in the form of RFC 9457, for clients that prefer `application/problem+json`."""

    type: Literal["about:blank"]
    title: str = Field(description="The phrase of the status")
    status: int
    detail: str
    errors: list[FieldError] = Field(default=[], description="Every problem, if `detail` is a list in JSON errors")
    checks: dict[str, str] = Field(default={}, description="Only from `/readyz`: the result of each check")


class Health(Answer):
    status: Literal["ok"]


class Readiness(Answer):
    status: Literal["ready", "degraded", "not_ready"]
    checks: dict[str, str] = Field(description="The result of each check: `ok`, or what is wrong")
