"""Links in mails, and new passwords: activating an account, proving an address, recovering from a lost password.

Whoever asks for a mail is answered the same in each case, and the same is done: the wish is stored, and what becomes of
it is decided where mails are sent (`repository.accounts.outbox`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, TypeAdapter
from starlette.responses import Response

from core.errors import Conflict, FieldProblem, InvalidInput, NotFound, Problem
from repository.accounts import confirmations, outbox, users
from repository.accounts.one_time_tokens import Purpose
from repository.accounts.outbox import MailType
from repository.engine.transaction import Transaction
from resources.accounts import credentials
from resources.accounts.credentials import MAX_ONE_TIME_TOKEN_LENGTH
from routes.accounts import pages
from routes.http import queries, rendering
from routes.http.limit_groups import LimitGroup
from routes.http.negotiation import client_prefers
from routes.http.operation import Call, Operation, Services
from routes.http.parsing import FORM_MEDIA_TYPE, JSON_MEDIA_TYPE
from services.authentication import invalid_access_token

NO_STORE = {"Cache-Control": "no-store"}

# --- links


async def _follow(call: Call, token: str) -> Response:
    user = await call.database.write(lambda tx: confirmations.confirm(tx, token))
    if _is_for_a_page(call):
        return pages.page("It worked", f"{user['email']} is confirmed, and the account can be used.", 200)
    return rendering.JSONResponse(user, headers={**NO_STORE, "Vary": "Accept"})


def _is_for_a_page(call: Call) -> bool:
    return client_prefers(call.headers, pages.MEDIA_TYPE)


def _problem_page(error: Problem) -> Response:
    match error:
        case NotFound():
            why = f"{error.detail}. If the account is active already, sign in; else you can ask for another link."
            title = "This link does not work"
        case InvalidInput():
            title, why = "This link is not whole", "Copy all of it from the mail into the browser."
        case Conflict():
            title, why = "This address is taken", "Another account has it by now. Yours keeps the address that it has."
        case _:
            title, why = "This did not work", "Try again in a moment."
    return pages.page(title, why, error.status, error.headers)


async def activate(call: Call) -> Response:
    return await _follow(call, call.body.token)


async def follow_link(call: Call) -> Response:
    if call.method == "HEAD":
        # Programs that look at links before people do: for them nothing is used up.
        return Response(headers=NO_STORE)
    token = call.query.token
    if not _is_for_a_page(call):
        return await _follow(call, token)
    pending = await confirmations.preview(call.database, token)
    user, address = pending.user, pending.email
    if pending.purpose is Purpose.ACTIVATE:
        name = user["username"] or address
        sentences = f"Somebody registered as {name} with the address {address}. Was it you?"
        return pages.question("Activate the account", sentences, token, "Activate the account")
    sentences = f"The account {user['username'] or user['email']} is to have the address {address}."
    return pages.question("Confirm the address", sentences, token, "Confirm the address")


class ByToken(queries.Query):
    token: Annotated[str, Field(min_length=1, max_length=MAX_ONE_TIME_TOKEN_LENGTH)]


# --- asking for mails

PROMISE = "If there is an account with this address that needs it, a mail is on its way"


async def _promise_mail(call: Call, kind: MailType) -> Response:
    async def work(tx: Transaction) -> None:
        await outbox.request(tx, kind, call.body.email)

    await call.database.write(work)
    call.services.outbox.wake()
    return rendering.JSONResponse({"detail": PROMISE}, 202, NO_STORE)


async def resend_activation(call: Call) -> Response:
    return await _promise_mail(call, MailType.ACTIVATE)


async def forgot_password(call: Call) -> Response:
    return await _promise_mail(call, MailType.RESET_PASSWORD)


# --- new passwords


def new_password_problems(services: Services, body: Any, valid: Any) -> Sequence[FieldProblem]:
    """The rules that a new password breaks whoever's it is to be, to be named with what else is wrong with the body.

    None of a body that is right: then the handler names them, with those that depend on whose password it is.
    """
    password = body.get("new_password") if isinstance(body, dict) else None
    if valid is not None or not isinstance(password, str):
        return ()
    return services.passwords.problems(password, username=None, email=None, field="new_password")


def _problems_for(call: Call, user: dict[str, Any]) -> list[FieldProblem]:
    names = {"username": user["username"], "email": user["email"]}
    return call.services.passwords.problems(call.body.new_password, **names, field="new_password")


async def change_password(call: Call) -> Response:
    me, services, body = call.me, call.services, call.body
    user = await users.find(call.database, me.user_id)
    if user is None:
        raise invalid_access_token()
    await services.lockout.try_old_password(me.user_id, call.address)
    problems = _problems_for(call, user)
    if (await services.passwords.verify(body.old_password, user["password_hash"])).is_right:
        await services.lockout.knew_old_password(me.user_id, call.address)
        if body.new_password == body.old_password:
            problems.append(FieldProblem(("body", "new_password"), "This is the old password", "password_is_old"))
    else:
        problems.insert(0, FieldProblem(("body", "old_password"), "The old password is wrong", "wrong_password"))
    if problems:
        raise InvalidInput(problems)
    password_hash = await services.passwords.hash(body.new_password)
    checked_hash = user["password_hash"]

    async def work(tx: Transaction) -> None:
        await confirmations.change_password(tx, me.user_id, me.session_id, checked_hash, password_hash)

    await call.database.write(work)
    services.outbox.wake()
    return Response(status_code=204)


async def reset_password(call: Call) -> Response:
    services, body = call.services, call.body
    # Looked at before: hashing is dear, and is not done for whoever guesses links.
    user = await confirmations.account_to_reset(call.database, body.token)
    if problems := _problems_for(call, user):
        raise InvalidInput(problems)
    password_hash = await services.passwords.hash(body.new_password)
    await call.database.write(lambda tx: confirmations.reset_password(tx, body.token, password_hash))
    for login in (user["username"], user["email"]):
        if login is not None:
            # Whoever forgot the password has tried a few.
            await services.lockout.signed_in(login, call.address)
    services.outbox.wake()
    return Response(status_code=204)


ABOUT_LINKS = (
    "A link is good once, and for 24 hours. One that is no good is a 404, whatever is wrong with it. The same is done"
    " for the link that confirms another address of an account; a 409 says that somebody else has that address by now."
)
A_PAGE = {pages.MEDIA_TYPE: {"schema": {"type": "string", "description": "A page for browsers"}}}
ABOUT_MAILS = (
    "The answer is the same whether there is such an account or not. An account gets at most one such mail a minute and"
    " five a day; what is asked for beyond that is not sent."
)

OPERATIONS = [
    Operation(
        "POST",
        "/auth/activate",
        activate,
        "Activate an account by the link that was mailed",
        "accounts",
        {200: credentials.User},
        description=ABOUT_LINKS,
        body=TypeAdapter(credentials.LinkBody),
        body_media_types=(JSON_MEDIA_TYPE, FORM_MEDIA_TYPE),
        looks_at_token=False,
        errors=(404, 409),
        other_content=A_PAGE,
        problem_page=_problem_page,
        limit_group=LimitGroup.SIGN_IN,
    ),
    Operation(
        "GET",
        "/auth/activate",
        follow_link,
        "Follow the link that was mailed",
        "accounts",
        {200: credentials.User},
        description=ABOUT_LINKS + " A browser (`Accept: text/html`) gets a page with a button that does it, because"
        " programs that look for dangerous mails visit links, too.",
        query_model=ByToken,
        looks_at_token=False,
        errors=(404, 409),
        other_content=A_PAGE,
        problem_page=_problem_page,
        limit_group=LimitGroup.SIGN_IN,
    ),
    Operation(
        "POST",
        "/auth/activate/resend",
        resend_activation,
        "Ask for another link that activates an account",
        "accounts",
        {202: credentials.MailPromise},
        description=ABOUT_MAILS,
        body=TypeAdapter(credentials.AddressBody),
        looks_at_token=False,
        limit_group=LimitGroup.MAIL,
    ),
    Operation(
        "POST",
        "/auth/password/change",
        change_password,
        "Change my password",
        "accounts",
        {204: None},
        description="All other sessions of the account end. A wrong old password is a 422 that names it.",
        body=TypeAdapter(credentials.ChangePasswordBody),
        check=new_password_problems,
        signed_in=True,
        errors=(409, 429),
        limit_group=LimitGroup.SIGN_IN,
    ),
    Operation(
        "POST",
        "/auth/password/forgot",
        forgot_password,
        "Ask for a link to choose a new password",
        "accounts",
        {202: credentials.MailPromise},
        description=ABOUT_MAILS,
        body=TypeAdapter(credentials.AddressBody),
        looks_at_token=False,
        limit_group=LimitGroup.MAIL,
    ),
    Operation(
        "POST",
        "/auth/password/reset",
        reset_password,
        "Choose a new password by the link that was mailed",
        "accounts",
        {204: None},
        description="All sessions of the account end. An account that waited for its activation is active. A link that "
        "is no good is a 404, whatever is wrong with it.",
        body=TypeAdapter(credentials.ResetPasswordBody),
        check=new_password_problems,
        looks_at_token=False,
        errors=(404, 429),
        limit_group=LimitGroup.SIGN_IN,
    ),
]
