"""Lists of values in one query parameter, such as `title[in]="The Good, the Bad and the Ugly",Alien`. No I/O.

    list   = value *( "," value )
    value  = quoted / plain
    quoted = DQUOTE *( character other than DQUOTE / 2DQUOTE ) DQUOTE
    plain  = empty, or a character other than DQUOTE and ",", and then any characters other than ","

Inside quotes, two quotes stand for one, as in CSV (RFC 4180). A quote after the first character of a plain value is an
ordinary character. Spaces belong to the values. The clients in `clients/` write lists in the same grammar.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

EXPECTED = 'double quotes around a value with a comma or a leading quote, with each quote inside doubled: "a, ""b""",c'
_VALUE = re.compile(r'"((?:[^"]|"")*)"|(?!")([^,]*)', re.DOTALL)


def split(text: str) -> list[str] | None:
    """Return the values of a list, or None if a quoted value is not closed or is followed by anything but a comma."""
    values = []
    position = 0
    while True:
        found = _VALUE.match(text, position)
        if found is None:
            return None
        values.append(found[1].replace('""', '"') if found[1] is not None else found[2])
        position = found.end()
        if position == len(text):
            return values
        if text[position] != ",":
            return None
        position += 1


def join(values: Iterable[str]) -> str:
    """Return a list with these values. This is the inverse of `split`."""
    return ",".join(_quoted(value) if "," in value or value.startswith('"') else value for value in values)


def _quoted(value: str) -> str:
    return '"' + value.replace('"', '""') + '"'
