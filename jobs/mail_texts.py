"""The texts of emails, as plain text and as HTML. Pure.

Security: the only text in an email that an attacker can choose is the user name, which is included only if it is a
single word. Otherwise, an attacker could register another person's address to send that person messages.
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
    """The text of one type of email. If `path` is set, the email has a link to that path, labelled `button`."""

    subject: str
    paragraphs: Sequence[str]
    path: str = ""
    button: str = ""
    after: Sequence[str] = ()


_ONE_DAY = "The link works once and expires after one day."
WORDINGS: Mapping[MailType, Wording] = {
    MailType.ACTIVATE: Wording(
        "Activate your account",
        ("A Marquee account was registered with this email address. If that was you, follow the link to activate it.",),
        "/auth/activate",
        "Activate account",
        (
            _ONE_DAY,
            "If that was not you, ignore this email: the account cannot be used until it is activated, and will be "
            f"deleted unless it is activated within {DAYS_TO_ACTIVATE} days.",
        ),
    ),
    MailType.RESET_PASSWORD: Wording(
        "Reset your password",
        (
            "We received a request to reset the password of your Marquee account. If that was you, follow the link "
            "to choose a new password.",
        ),
        "/reset-password",
        "Choose a new password",
        (_ONE_DAY, "If that was not you, ignore this email: your password stays the same."),
    ),
    MailType.CONFIRM_EMAIL: Wording(
        "Confirm your new email address",
        (
            "We received a request to use this email address for a Marquee account. If that was you, follow the "
            "link to confirm it.",
        ),
        "/auth/activate",
        "Confirm email address",
        (_ONE_DAY, "If that was not you, ignore this email: the account keeps its current address."),
    ),
    MailType.EMAIL_CHANGE_ASKED: Wording(
        "Request to change your email address",
        (
            "We received a request, made with your password, to change the email address of your Marquee account. The "
            "account keeps this address until the new one is confirmed.",
            "If that was not you, choose a new password now. This also cancels the change:",
        ),
        "/reset-password",
        "Choose a new password",
    ),
    MailType.PASSWORD_CHANGED: Wording(
        "Your password was changed",
        (
            "The password of your Marquee account was just changed, and all other sessions were signed out.",
            "If that was not you, choose a new password now:",
        ),
        "/reset-password",
        "Choose a new password",
    ),
    MailType.ADDRESS_TAKEN: Wording(
        "Your email address already has an account",
        (
            "Someone tried to use this email address for another Marquee account. The address already belongs to "
            "your account, so nothing has changed.",
            "If that was you, sign in with this address. If you have forgotten the password, choose a new one:",
        ),
        "/reset-password",
        "Choose a new password",
        ("If that was not you, ignore this email.",),
    ),
    MailType.EMAIL_CHANGED: Wording(
        "Your email address was changed",
        (
            "The email address of your Marquee account was changed. This address no longer receives emails about "
            "the account.",
            "If that was not you, someone else has access to your account: change its password if you still can, and "
            "contact the operator of this service.",
        ),
    ),
}


def compose(mail: ClaimedMail, *, sender: str, base_url: str) -> EmailMessage:
    """Return the complete message. `Message-ID` and `Date` are the same in every attempt to deliver an email."""
    wording = WORDINGS[mail.kind]
    url = _url(base_url, wording.path, mail.token)
    greeting = _greeting(mail.username)
    message = EmailMessage(policy=SMTP)
    message["From"] = sender
    message["To"] = mail.recipient
    message["Subject"] = wording.subject
    created_at = datetime.fromisoformat(mail.created_at)
    message["Date"] = format_datetime(created_at.astimezone(UTC))
    # A database never reuses an id; the time distinguishes emails with equal ids from different databases.
    message["Message-ID"] = f"<mail-{mail.id}-{created_at.timestamp():.6f}@{urlsplit(base_url).hostname}>"
    message["Auto-Submitted"] = "auto-generated"  # RFC 3834: suppresses automatic replies
    text, html = _text(greeting, wording, url), _html(greeting, wording, url)
    message.set_content(text, cte=_encoding(text))
    message.add_alternative(html, subtype="html", cte=_encoding(html))
    return message


def _encoding(text: str) -> str:
    # ASCII text stays unencoded, because developers copy URLs from the files that `gateways.mail.Folder` writes, and
    # quoted-printable would break long URLs across lines.
    return "7bit" if text.isascii() else "quoted-printable"


def _url(base_url: str, path: str, token: str | None) -> str | None:
    if not path:
        return None
    return f"{base_url}{path}" + (f"?{urlencode({'token': token})}" if token is not None else "")


def _greeting(username: str | None) -> str:
    # Characters other than letters, digits, `_` and `-` could hide text, change the text direction or form a link.
    is_plain = username is not None and re.fullmatch(r"[\w-]+", username) and not username.isdecimal()
    return f"Hello {username}," if is_plain else "Hello,"


def _text(greeting: str, wording: Wording, url: str | None) -> str:
    blocks = [greeting, *(textwrap.fill(each, LINE_LENGTH) for each in wording.paragraphs)]
    if url is not None:
        blocks.append(url)
    blocks += [textwrap.fill(each, LINE_LENGTH) for each in wording.after]
    return "\n\n".join(blocks) + "\n"


def _html(greeting: str, wording: Wording, url: str | None) -> str:
    """Return the HTML part. It loads no remote content, so opening the email discloses nothing."""
    blocks = [f"<p>{escape(each)}</p>" for each in (greeting, *wording.paragraphs)]
    if url is not None:
        style = "background:#b45309;border-radius:6px;color:#fff;display:inline-block;padding:10px 16px"
        blocks.append(
            f'<p><a href="{escape(url)}" style="{style};text-decoration:none">{escape(wording.button)}</a></p>'
        )
        blocks.append(f"<p>Or copy this address into your browser:<br>{escape(url)}</p>")
    blocks += [f"<p>{escape(each)}</p>" for each in wording.after]
    body = "\n".join(blocks)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(wording.subject)}</title></head>\n"
        f'<body style="font:16px/1.5 sans-serif;max-width:36em">\n{body}\n</body></html>\n'
    )
