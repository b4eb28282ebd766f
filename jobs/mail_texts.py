"""What mails say, as text and as HTML. Pure.

Nothing that a stranger can choose is repeated but the user name, and that only as one word: whoever registers with
somebody else's address must not be able to write to them.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from html import escape
from urllib.parse import urlencode, urlsplit

from repository.accounts.one_time_tokens import DAYS_TO_ACTIVATE
from repository.accounts.outbox import ClaimedMail, MailType

LINE_LENGTH = 72


@dataclass(frozen=True, slots=True)
class Wording:
    """One kind of mail. `path` is where its link leads and `button` what is written on it, if there is one."""

    subject: str
    paragraphs: Sequence[str]
    path: str = ""
    button: str = ""
    after: Sequence[str] = ()


_ONE_DAY = "The link works once, and for one day."
WORDINGS: Mapping[MailType, Wording] = {
    MailType.ACTIVATE: Wording(
        "Activate your account",
        ("Somebody registered at Marquee with this address. If it was you, follow the link to activate the account.",),
        "/auth/activate",
        "Activate the account",
        (
            _ONE_DAY,
            "If it was not you, do nothing: without the link nobody can use the account, and it is deleted after "
            f"{DAYS_TO_ACTIVATE} days.",
        ),
    ),
    MailType.RESET_PASSWORD: Wording(
        "Choose a new password",
        (
            "Somebody asked for a new password for your account at Marquee. If it was you, follow the link to choose "
            "one.",
        ),
        "/reset-password",
        "Choose a new password",
        (_ONE_DAY, "If it was not you, do nothing: your password stays as it is."),
    ),
    MailType.CONFIRM_EMAIL: Wording(
        "Confirm your new address",
        (
            "Somebody wants to use this address for an account at Marquee. If it was you, follow the link to confirm "
            "it.",
        ),
        "/auth/activate",
        "Confirm the address",
        (_ONE_DAY, "If it was not you, do nothing: the account keeps the address that it has."),
    ),
    MailType.EMAIL_CHANGE_ASKED: Wording(
        "Another address for your account",
        (
            "Somebody who knows the password of your account at Marquee wants it to have another e-mail address. It "
            "keeps this one until the link that was mailed to the other one is followed.",
            "If it was not you, choose a new password at once, and that link is good no more:",
        ),
        "/reset-password",
        "Choose a new password",
    ),
    MailType.PASSWORD_CHANGED: Wording(
        "Your password was changed",
        (
            "The password of your account at Marquee was changed just now, and the account was signed out everywhere "
            "else.",
            "If it was not you, choose a new password at once:",
        ),
        "/reset-password",
        "Choose a new password",
    ),
    MailType.EMAIL_CHANGED: Wording(
        "Your address was changed",
        (
            "Your account at Marquee has another e-mail address now. Mails about it do not come to this one any more.",
            "If it was not you, somebody else is using your account: change its password, if you still can, and write "
            "to whoever runs this service.",
        ),
    ),
}


def compose(mail: ClaimedMail, *, sender: str, base_url: str) -> EmailMessage:
    """The whole message. Its `Message-ID` and `Date` are the same each time that one mail is tried."""
    wording = WORDINGS[mail.kind]
    link = _link(base_url, wording.path, mail.token)
    greeting = _greeting(mail.username)
    message = EmailMessage(policy=SMTP)
    message["From"] = sender
    message["To"] = mail.recipient
    message["Subject"] = wording.subject
    created_at = datetime.fromisoformat(mail.created_at)
    message["Date"] = format_datetime(created_at.astimezone(UTC))
    # An id is never given twice, and with its time not by another database either.
    message["Message-ID"] = f"<mail-{mail.id}-{created_at.timestamp():.6f}@{urlsplit(base_url).hostname}>"
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: nobody's holiday answers it
    text, html = _text(greeting, wording, link), _html(greeting, wording, link)
    message.set_content(text, cte=_encoding(text))
    message.add_alternative(html, subtype="html", cte=_encoding(html))
    return message


def _encoding(text: str) -> str:
    # As it is wherever that is possible: a link that is looked up in a file must not be broken in two.
    return "7bit" if text.isascii() else "quoted-printable"


def _link(base_url: str, path: str, token: str | None) -> str | None:
    if not path:
        return None
    return f"{base_url}{path}" + (f"?{urlencode({'token': token})}" if token is not None else "")


def _greeting(username: str | None) -> str:
    # Nothing that turns the direction of what follows, that cannot be seen, or that programs make a link of.
    is_plain = username is not None and re.fullmatch(r"[\w-]+", username) and not username.isdecimal()
    return f"Hello {username}," if is_plain else "Hello,"


def _text(greeting: str, wording: Wording, link: str | None) -> str:
    blocks = [greeting, *(textwrap.fill(each, LINE_LENGTH) for each in wording.paragraphs)]
    if link is not None:
        blocks.append(link)
    blocks += [textwrap.fill(each, LINE_LENGTH) for each in wording.after]
    return "\n\n".join(blocks) + "\n"


def _html(greeting: str, wording: Wording, link: str | None) -> str:
    """Nothing in it is loaded from anywhere, so reading it tells nobody."""
    blocks = [f"<p>{escape(each)}</p>" for each in (greeting, *wording.paragraphs)]
    if link is not None:
        style = "background:#b45309;border-radius:6px;color:#fff;display:inline-block;padding:10px 16px"
        blocks.append(
            f'<p><a href="{escape(link)}" style="{style};text-decoration:none">{escape(wording.button)}</a></p>'
        )
        blocks.append(f"<p>Or copy this into your browser:<br>{escape(link)}</p>")
    blocks += [f"<p>{escape(each)}</p>" for each in wording.after]
    body = "\n".join(blocks)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(wording.subject)}</title></head>\n"
        f'<body style="font:16px/1.5 sans-serif;max-width:36em">\n{body}\n</body></html>\n'
    )
