"""Declaring operations: a handler's annotation names its models, and a contradictory declaration fails at import."""

from __future__ import annotations

from functools import partial

import pytest
from pydantic import BaseModel
from starlette.responses import Response

from repository.jobs import ORDERING
from resources.accounts.profiles import AccountBody, AccountPatch, AvatarForm, ProfileBody, ProfileForm
from routes.http.operation import LIST_HEADERS, Call, Operations
from routes.http.queries import ById, ByUserId, PageQuery


async def edit(call: Call[ById | None, None, AccountBody | AccountPatch]) -> Response:
    return Response()


async def add(name: str, call: Call[None, None, BaseModel]) -> Response:
    return Response(name)


async def upload(call: Call[None, None, AvatarForm]) -> Response:
    return Response()


async def create(call: Call[None, None, ProfileBody]) -> Response:
    return Response()


async def names(call: Call[None, PageQuery, None]) -> Response:
    return Response()


@pytest.fixture
def operations() -> Operations:
    return Operations("tests")


def test_the_annotation_names_the_models(operations: Operations) -> None:
    operations.listing("/names", "List names", list[str], ORDERING)(names)
    operations.post("/profiles", "Create a profile", {201: None}, form=ProfileForm)(create)
    listed, created = operations
    assert (listed.path_model, listed.query_model, listed.body) == (None, PageQuery, None)
    assert (listed.method, listed.tag, listed.answers) == ("GET", "tests", {200: list[str]})
    assert listed.answer_headers == LIST_HEADERS
    assert (created.body, created.form) == (ProfileBody, ProfileForm)


def test_one_handler_serves_several_operations(operations: Operations) -> None:
    operations.put("/me", "Replace", {200: None}, body=AccountBody)(edit)
    operations.patch("/users/{id}", "Change", {200: None}, body=AccountPatch)(edit)
    mine, others = operations
    assert mine.handler is others.handler is edit
    assert (mine.path_model, mine.body) == (None, AccountBody)
    assert (others.path_model, others.body) == (ById, AccountPatch)


def test_a_base_class_in_the_annotation_stands_for_the_model_of_the_declaration(operations: Operations) -> None:
    operations.post("/users", "Add", {201: None}, body=AccountBody)(partial(add, "users"))
    (added,) = operations
    assert added.body is AccountBody


def test_a_handler_whose_body_is_the_form_takes_no_json(operations: Operations) -> None:
    operations.put("/picture", "Upload", {200: None}, form=AvatarForm)(upload)
    (uploaded,) = operations
    assert (uploaded.body, uploaded.form) == (None, AvatarForm)


def test_a_declaration_that_contradicts_its_handler_fails_at_import(operations: Operations) -> None:
    with pytest.raises(AssertionError, match="expected one model"):
        operations.put("/me", "Replace", {200: None})(edit)
    with pytest.raises(AssertionError, match="expected"):
        operations.put("/me", "Replace", {200: None}, body=ByUserId)(edit)
    with pytest.raises(AssertionError, match="expected a model for"):
        operations.patch("/users/{user_id}", "Change", {200: None}, body=AccountPatch)(edit)
    with pytest.raises(AssertionError, match="expected a model for"):
        operations.get("/names/{id}", "Get a name", {200: None})(names)
    assert not list(operations)
