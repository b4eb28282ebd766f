"""Activation and confirmation URLs, and new passwords.

A request for an email receives the same response and causes the same work whether the account exists or not: the
request is only stored, and the mailer decides later whether an email is sent (`repository.accounts.outbox`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import structlog
from pydantic import Field
from starlette.responses import Response

from core.errors import Conflict, FieldProblem, Forbidden, InvalidInput, NotFound, Problem
from core.texts.normal import nfkc
from repository.accounts import confirmations, outbox
from repository.accounts.one_time_tokens import Purpose
from repository.accounts.outbox import MailType
from resources.accounts import credentials
from routes.accounts import pages
from routes.accounts.access import knows_password, own_account, wrong_password
from routes.http import queries, rendering
from routes.http.limit_groups import LimitGroup
from routes.http.operation import JSON_MEDIA_TYPE, AnyCall, Call, Details, Operations, Services
from routes.http.parsing import FORM_MEDIA_TYPE

NO_STORE = {"Cache-Control": "no-store"}
ABOUT_URLS = (
    "An activation or confirmation URL can be used once, within 24 hours. The response to an invalid token is a 404 "
    "without a reason. If another account has taken the new address meanwhile, the response is a 409."
)
REQUEST_EMAIL = Details(
    description="The response is the same whether the account exists or not. An account receives at most one such "
    "email a minute and five a day; further requests are dropped.",
    ignores_credentials=True,
    limit_group=LimitGroup.MAIL,
)
USE_POST = "The token has not been used yet; to use it, send it to POST /auth/activate"
PROMISE = "If there is an eligible account with this address, an email is on its way"

operations = Operations("accounts")
log = structlog.get_logger("sign-in")


# --- activation and confirmation URLs


def _problem_page(error: Problem) -> Response:
    match error:
        case NotFound():
            title = "This link does not work"
            why = f"{error.detail}. If the account is already active, sign in; otherwise request another link."
        case InvalidInput():
            title, why = "This link is incomplete", "Copy the whole link from the email into the browser."
        case Conflict():
            title, why = "This address is taken", "Another account has this address, so your account cannot use it."
        case _:
            title, why = "This did not work", "Try again in a moment."
    return pages.page(title, why, error.status, error.headers)


USE_TOKEN = Details(
    ignores_credentials=True,
    errors=(404, 409),
    other_content={pages.MEDIA_TYPE: {"schema": {"type": "string", "description": "A page for browsers"}}},
    problem_page=_problem_page,
    limit_group=LimitGroup.SIGN_IN,
    uncompressed=True,  # the page contains the token
)


@operations.post(
    "/auth/activate",
    "Activate an account, or confirm its new address, with an emailed token",
    {200: credentials.User},
    description=ABOUT_URLS,
    body_media_types=(JSON_MEDIA_TYPE, FORM_MEDIA_TYPE),
    like=USE_TOKEN,
)
async def activate(call: Call[None, None, credentials.LinkBody]) -> Response:
    return await _use(call, call.body.token)


class ByToken(queries.Parameters):
    token: Annotated[str, Field(min_length=1, max_length=credentials.MAX_ONE_TIME_TOKEN_LENGTH)]


@operations.get(
    "/auth/activate",
    "Show the purpose of an emailed token",
    {200: credentials.PendingConfirmation},
    description=ABOUT_URLS
    + " Opening the URL changes nothing, because mail scanners open URLs, too. A browser (`Accept: text/html`) "
    "receives a page with a button; other clients receive the purpose of the token. Only `POST` uses the token.",
    like=USE_TOKEN,
)
async def open_url(call: Call[None, ByToken, None]) -> Response:
    if call.method == "HEAD":
        # Mail scanners check URLs with HEAD, which must not use up the token.
        return Response(headers=NO_STORE)
    token = call.query.token
    with _logging_refusals(call):
        pending = await confirmations.preview(call.database, token)
    user, address = pending.user, pending.email
    if not _wants_page(call):
        found = {"purpose": pending.purpose.value, "username": user["username"], "email": address, "detail": USE_POST}
        return rendering.JSONResponse(found, headers={**NO_STORE, "Vary": "Accept"})
    if pending.purpose is Purpose.ACTIVATE:
        name = user["username"] or address
        text = f"Someone registered as {name} with the address {address}. Was it you?"
        return pages.question("Activate the account", text, token, "Activate the account")
    text = f"This changes the address of the account {user['username'] or user['email']} to {address}."
    return pages.question("Confirm the address", text, token, "Confirm the address")


async def _use(call: AnyCall, token: str) -> Response:
    with _logging_refusals(call):
        user = await call.write(lambda tx: confirmations.confirm(tx, token))
    if _wants_page(call):
        return pages.page("It worked", f"{user['email']} is confirmed, and the account is ready to use.", 200)
    return rendering.JSONResponse(user, headers={**NO_STORE, "Vary": "Accept"})


@contextmanager
def _logging_refusals(call: AnyCall) -> Iterator[None]:
    """Log the rejection of an emailed token. The log reveals neither the reason nor the account."""
    try:
        yield
    except NotFound:
        log.info("emailed token rejected", address=call.address)
        raise


def _wants_page(call: AnyCall) -> bool:
    return rendering.client_prefers(call.headers, pages.MEDIA_TYPE)


# --- requests for emails


@operations.post(
    "/auth/activate/resend", "Request another activation URL", {202: credentials.MailPromise}, REQUEST_EMAIL
)
async def resend_activation(call: Call[None, None, credentials.AddressBody]) -> Response:
    return await _promise_email(call, MailType.ACTIVATE)


@operations.post(
    "/auth/password/forgot", "Request a URL to choose a new password", {202: credentials.MailPromise}, REQUEST_EMAIL
)
async def forgot_password(call: Call[None, None, credentials.AddressBody]) -> Response:
    return await _promise_email(call, MailType.RESET_PASSWORD)


async def _promise_email(call: Call[None, None, credentials.AddressBody], kind: MailType) -> Response:
    await call.write(lambda tx: outbox.request(tx, kind, call.body.email))
    call.services.outbox.wake()
    return rendering.JSONResponse({"detail": PROMISE}, 202, NO_STORE)


# --- new passwords


def new_password_problems(services: Services, body: Any, valid: Any) -> Sequence[FieldProblem]:
    """Return the problems of the new password in an invalid body, by the rules that do not depend on the user.

    The password in a valid body is checked by the handler, because some rules depend on the user's names.
    """
    password = body.get("new_password") if isinstance(body, dict) else None
    if valid is not None or not isinstance(password, str):
        return ()
    return services.passwords.problems(password, username=None, email=None, field="new_password")


def _problems_for(
    call: Call[None, None, credentials.ChangePasswordBody | credentials.ResetPasswordBody], user: dict[str, Any]
) -> list[FieldProblem]:
    names = {"username": user["username"], "email": user["email"]}
    return call.services.passwords.problems(call.body.new_password, **names, field="new_password")


@operations.post(
    "/auth/password/change",
    "Change my password",
    {204: None},
    description="Ends all other sessions of the account. If the old password is wrong, the response is a 403 "
    "that lists this problem and those of the new password.",
    check=new_password_problems,
    signed_in=True,
    errors=(403, 409),
    limit_group=LimitGroup.SIGN_IN,
)
async def change_password(call: Call[None, None, credentials.ChangePasswordBody]) -> Response:
    me, services, body = call.me, call.services, call.body
    user = await own_account(call)
    problems = _problems_for(call, user)
    if not await knows_password(call, user, body.old_password):
        raise Forbidden([wrong_password("old_password"), *problems])
    if nfkc(body.new_password) == nfkc(body.old_password):
        message = "Expected a password other than the old one"
        problems.append(FieldProblem(("body", "new_password"), message, "password_is_old"))
    if problems:
        raise InvalidInput(problems)
    password_hash = await services.passwords.hash(body.new_password)
    checked_hash = user["password_hash"]
    await call.write(
        lambda tx: confirmations.change_password(tx, me.user_id, me.session_id, checked_hash, password_hash)
    )
    services.outbox.wake()
    return Response(status_code=204)


@operations.post(
    "/auth/password/reset",
    "Choose a new password with the token from the emailed URL",
    {204: None},
    description="Ends all sessions of the account, and activates an account that awaits its activation. The response "
    "to an invalid token is a 404 without a reason.",
    check=new_password_problems,
    ignores_credentials=True,
    errors=(404,),
    limit_group=LimitGroup.SIGN_IN,
)
async def reset_password(call: Call[None, None, credentials.ResetPasswordBody]) -> Response:
    services, body = call.services, call.body
    # Check the token first: hashing is expensive, and must not be triggered by guessed tokens.
    with _logging_refusals(call):
        user = await confirmations.account_to_reset(call.database, body.token)
    if problems := _problems_for(call, user):
        raise InvalidInput(problems)
    password_hash = await services.passwords.hash(body.new_password)
    with _logging_refusals(call):
        await call.write(lambda tx: confirmations.reset_password(tx, body.token, password_hash))
    for login in (user["username"], user["email"]):
        if login is not None:
            # Reset the count of failed attempts, because a user who forgot the password has usually made some.
            await services.lockout.signed_in(login, call.address)
    services.outbox.wake()
    return Response(status_code=204)
