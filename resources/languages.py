"""Languages, by ISO 639-1. The standard decides which codes exist; admins edit the names."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

import models
from resources.resource import Resource
from schemas import Body, Name, examples, known

# All codes except those that the standard has withdrawn, such as `bh`, `in`, `iw`, `ji`, `mo` and `sh`.
_LISTED = """
    aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en
    eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja
    jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb
    nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq
    sr ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu
"""
CODES = _LISTED.split()

LanguageCode = Annotated[
    str,
    Field(description="ISO 639-1, in lower case", json_schema_extra={"enum": [*CODES]}),
    known(frozenset(CODES), "expected an ISO 639-1 code in lower case, such as de"),
]


class LanguageBody(Body):
    """A language. Its code, if it has one, is unique. PUT replaces all of it."""

    model_config = examples({"code": "de", "name": "German"})

    code: LanguageCode | None = Field(description="Null for a language without a code in the standard")
    name: Name


LANGUAGES = Resource(
    table=models.languages,
    body=LanguageBody,
    singular="language",
    label="name",
    searched=("name", "code"),
    example_change={"name": "Standard German"},
    changed_by="admins",
    code="code",
)
