"""In both clients, an invalid call raises an error in that call and never causes endless retries."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.http11 import Request, Response

from clients.conformance.server import refusal, token_of
from clients.python.marquee_client import Client, Refused, Retry, TimedOut, Unauthorized
from tests.support.node import node_command
from tests.support.programs import output_of
from tests.support.service import eventually

MODULE = Path(__file__).resolve().parent.parent.parent / "clients" / "javascript" / "marquee.js"
NOWHERE = "ws://127.0.0.1:1/ws"
HALF = "\ud83d"  # half of a surrogate pair


@dataclass
class Deaf:
    """A server that welcomes or rejects every client. It replies only to requests with a body, and echoes the body."""

    status: int | None = None
    port: int = 0
    tokens: list[str | None] = field(default_factory=list)  # the token of each handshake
    said: list[Mapping[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/ws"

    def decide(self, _: ServerConnection, request: Request) -> Response | None:
        self.tokens.append(token_of(request))
        return None if self.status is None else refusal(self.status, {}, "nothing here")

    async def welcome(self, socket: ServerConnection) -> None:
        data = {"protocol": 1, "epoch": "e1", "seq": 0, "user_id": None, "heartbeat_seconds": 20}
        await socket.send(json.dumps({"operation": "welcome", "data": data}))
        async for text in socket:
            message = json.loads(text)
            self.said.append(message)
            if "body" in message:
                await socket.send(json.dumps({"reply_to": message["id"], "status": 200, "body": message["body"]}))


@asynccontextmanager
async def deaf(status: int | None = None) -> AsyncIterator[Deaf]:
    server = Deaf(status)
    async with serve(
        server.welcome, "127.0.0.1", 0, process_request=server.decide,
        select_subprotocol=lambda _, offered: "bearer" if offered else None,  # type: ignore[arg-type, return-value]
    ) as listening:  # fmt: skip
        server.port = next(iter(listening.sockets)).getsockname()[1]
        yield server


async def in_node(program: str) -> Any:
    """Run a JavaScript program that can use `Client`, and return the value that the program passes to `tell`."""
    text = (
        f"import {{ Client }} from {json.dumps(MODULE.as_uri())};\n"
        f"const tell = (value) => console.log(JSON.stringify(value));\n{program}"
    )
    return json.loads(await output_of(*node_command(), "--input-type=module", "--eval", text, seconds=30))


# --- arguments

PYTHON_MISTAKES: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "a filter that is a string": (lambda client: client.view("movies", filter="x"), TypeError, "filter: expected"),
    "a list as q": (lambda client: client.view("movies", q=["x"]), TypeError, "q: expected"),
    "a filter that is not JSON": (lambda client: client.watch("movies", filter={"a": b""}), TypeError, "JSON"),
    "a filter with NaN": (lambda client: client.watch("movies", filter={"a": float("nan")}), ValueError, "JSON"),
    "a surrogate": (lambda client: client.view("movies", filter={"or": [{"title": HALF}]}), ValueError, "or.0..title:"),
    "a surrogate in a name": (lambda client: client.view("movies", filter={HALF: 1}), ValueError, "a name in filter"),
    "a filter that is too large": (
        lambda client: client.view("movies", filter={"title": "x" * 2**18}), ValueError, "at most 262144 bytes"
    ),
    "a number as topics": (lambda client: client.watch(5), TypeError, "topics: expected"),
    "no topic": (lambda client: client.presence([]), TypeError, "topics: expected"),
    "a view of two topics": (lambda client: client.view(["movies", "characters"]), TypeError, "topic: expected one"),
    "a negative since": (lambda client: client.watch("movies", since=-1), ValueError, "since: expected"),
    "a boolean as since": (lambda client: client.watch("movies", since=True), TypeError, "since: expected"),
    "a fraction as since": (lambda client: client.watch("movies", since=1.5), TypeError, "since: expected"),
    "since without an epoch": (lambda client: client.watch("movies", since=1), ValueError, "since: expected the epoch"),
    "a number as epoch": (lambda client: client.watch("movies", since=1, epoch=7), TypeError, "epoch: expected"),
    "a boolean as bulk": (lambda client: client.watch("movies", bulk=True), TypeError, "bulk: expected"),
    "a number as deliver": (lambda client: client.watch("movies", deliver=200), TypeError, "deliver: expected"),
    "a surrogate in a body": (
        lambda client: client.request("POST", "/movies", body={"title": HALF}), ValueError, "body.title: expected"
    ),
    "a line break": (lambda client: type(client)(NOWHERE, token="one\r\ntwo"), ValueError, r" '\\r' at character 4"),
    "a number as token": (lambda client: type(client)(NOWHERE, token=5), TypeError, "token: expected a string"),
    "a blank new token": (lambda client: client.authenticate("\n"), ValueError, "token: expected a token"),
}  # fmt: skip
JAVASCRIPT_MISTAKES = {
    'client.view("movies", { filter: "x" })': "TypeError: filter: expected",
    'client.view("movies", { filter: ["x"] })': "TypeError: filter: expected",
    'client.view("movies", { filter: new Map() })': "TypeError: filter: expected",
    'client.watch("movies", { q: ["x"] })': "TypeError: q: expected",
    'client.watch("movies", { filter: { a: 1n } })': "TypeError: ",
    'client.view("movies", { filter: { or: [{ title: half }] } })': "TypeError: filter.or[0].title: expected Unicode",
    'client.view("movies", { filter: { [half]: 1 } })': "TypeError: a name in filter: expected Unicode",
    'client.view("movies", { filter: { title: "x".repeat(2 ** 18) } })': "RangeError: expected a message of at most",
    "client.watch(5)": "TypeError: topics: expected",
    "client.presence([])": "TypeError: topics: expected",
    'client.view(["movies", "characters"])': "TypeError: topic: expected one",
    'client.watch("movies", { since: -1 })': "TypeError: since: expected",
    'client.watch("movies", { since: NaN })': "TypeError: since: expected",
    'client.watch("movies", { since: {} })': "TypeError: since: expected",
    'client.watch("movies", { since: 1 })': "TypeError: since: expected the epoch",
    'client.watch("movies", { since: ":1" })': "TypeError: since: expected the epoch",
    'client.watch("movies", { since: { epoch: null, seq: 1 } })': "TypeError: since: expected the epoch",
    'client.watch("movies", { since: 1, epoch: 7 })': "TypeError: epoch: expected",
    'client.watch("movies", { bulk: true })': "TypeError: bulk: expected",
    'client.watch("movies", { deliver: 200 })': "TypeError: deliver: expected",
    'client.request("POST", "/movies", { body: { title: half } })': "TypeError: body.title: expected Unicode",
    'client.request("POST", "/" + half)': "TypeError: path: expected Unicode",
    'new Client(url, { token: "one\\r\\ntwo" })': 'TypeError: token: expected letters, digits and -._~+/= only, got "',
    "new Client(url, { token: 5 })": "TypeError: token: expected a string, got number",
    'client.authenticate("\\n")': "TypeError: token: expected a token",
}


@pytest.mark.parametrize("mistake", PYTHON_MISTAKES)
async def test_a_mistake_is_an_error_of_the_call_in_python(mistake: str) -> None:
    call, error, message = PYTHON_MISTAKES[mistake]
    async with Client(NOWHERE) as client:
        with pytest.raises(error, match=message):
            async with asyncio.timeout(5):
                await call(client)


async def test_a_mistake_is_an_error_of_the_call_in_javascript() -> None:
    calls = ", ".join(f"{json.dumps(call)}: () => {call}" for call in JAVASCRIPT_MISTAKES)
    told = await in_node(f"""
        const url = {json.dumps(NOWHERE)}, client = new Client(url), half = "\\u{{1f600}}".slice(0, 1), errors = {{}};
        for (const [name, call] of Object.entries({{ {calls} }})) {{
          try {{ await call(); errors[name] = "nothing"; }} catch (error) {{ errors[name] = String(error); }}
        }}
        client.close();
        tell(errors);
    """)
    assert {call: error for call, error in told.items() if not error.startswith(JAVASCRIPT_MISTAKES[call])} == {}


async def test_a_text_that_only_looks_like_a_lone_surrogate_is_sent() -> None:
    texts = ["\U0001f600", "\\ud83d", "\\\\ud83d"]
    async with deaf() as server:
        told = await in_node(f"""
            const client = new Client({json.dumps(server.url)});
            const answers = {json.dumps(texts)}.map((body) => client.request("POST", "/", {{ body }}));
            tell((await Promise.all(answers)).map((answer) => answer.body));
            client.close();
        """)
        assert told == [message["body"] for message in server.said] == texts


async def test_a_filter_is_sent_as_it_was_checked() -> None:
    async with deaf() as server, Client(server.url) as client:
        condition: dict[str, Any] = {"title": "M"}
        watch = client.watch("movies", filter=condition)
        condition["title"] = b"no JSON"
        async with watch:
            message = await eventually(lambda: next(iter(server.said), None), "the subscription is sent")
        assert message["filter"] == {"title": "M"}


# --- tokens


async def connect_in_python(url: str, token: Any) -> None:
    async with Client(url, token=token) as client:
        await eventually(lambda: client.is_connected, "connected")


async def connect_in_javascript(url: str, token: Any) -> None:
    await in_node(f"""
        const client = new Client({json.dumps(url)}, {{ token: {json.dumps(token)} }});
        client.ping().catch(() => {{}});
        while (!client.isConnected) await new Promise((resolve) => setTimeout(resolve, 5));
        client.close();
        tell(null);
    """)


@pytest.mark.parametrize("connect", [connect_in_python, connect_in_javascript])
@pytest.mark.parametrize(("token", "sent"), [(" a.b-c_d\r\n", "a.b-c_d"), ("", None), (" \n", None), (None, None)])
async def test_white_space_around_a_token_is_not_sent(
    connect: Callable[[str, Any], Awaitable[None]], token: str | None, sent: str | None
) -> None:
    async with deaf() as server:
        await connect(server.url, token)
        assert server.tokens == [sent]


@pytest.mark.parametrize("found", ["no token", 5])
async def test_a_token_function_without_a_valid_token_is_called_twice(found: Any) -> None:
    answers = iter([found, found])
    async with Client(NOWHERE, token=lambda: next(answers)) as client:
        with pytest.raises(Unauthorized, match="token: expected"):
            await client.ping()
    assert next(answers, None) is None
    told = await in_node(f"""
        let calls = 0;
        const token = () => {{ calls += 1; return {json.dumps(found)}; }};
        const client = new Client({json.dumps(NOWHERE)}, {{ token }});
        await client.ping().catch((error) => tell([error.name, calls]));
    """)
    assert told == ["Unauthorized", 2]


# --- retries that must end


async def test_a_request_ends_after_its_timeout() -> None:
    async with deaf() as server:
        async with Client(server.url) as client:
            with pytest.raises(TimedOut, match=r"within 0\.1 s"):
                await client.request("GET", "/movies", timeout_seconds=0.1)
        told = await in_node(f"""
            const client = new Client({json.dumps(server.url)});
            await client.request("GET", "/movies", {{ timeoutSeconds: 0.1 }}).catch((error) => tell(error.name));
            client.close();
        """)
        assert told == "TimedOut"


async def test_a_404_ends_the_client_that_can_see_the_status() -> None:
    async with deaf(404) as server, Client(server.url) as client:
        with pytest.raises(Refused, match=r"\(404\): nothing here"):
            await client.ping()


async def test_repeated_failures_to_connect_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The JavaScript client does not see the status of a rejection, so it retries and logs any rejection."""
    async with deaf(503) as server:
        with caplog.at_level(logging.WARNING, "marquee_client"):
            async with Client(server.url, retry=Retry(0.01, 0.01)) as client:
                await eventually(lambda: len(server.tokens) > 5, "six attempts")
                assert client.trouble == "503: nothing here"
        assert [f"no connection to {server.url} after 3 attempts" in each for each in caplog.messages] == [True]
    async with deaf(404) as server:
        warnings, trouble = await in_node(f"""
            const warnings = [], retry = {{ firstSeconds: 0.01, longestSeconds: 0.01 }};
            console.warn = (text) => warnings.push(text);
            const client = new Client({json.dumps(server.url)}, {{ retry }});
            client.ping().catch(() => {{}});
            while (warnings.length === 0) await new Promise((resolve) => setTimeout(resolve, 5));
            tell([warnings, client.trouble]);
            client.close();
        """)
    assert f"no connection to {server.url} after 3 attempts" in warnings[0]
    assert "handshake failed" in trouble


# --- numbers

BEYOND = 2**53 + 1


class Counting(Deaf):
    """A server that sends a number beyond 2^53 in its events and in its replies to requests."""

    async def welcome(self, socket: ServerConnection) -> None:
        data = {"protocol": 1, "epoch": "e1", "seq": 0, "user_id": None, "heartbeat_seconds": 20}
        await socket.send(json.dumps({"operation": "welcome", "data": data}))
        async for text in socket:
            message = json.loads(text)
            reply = {"reply_to": message["id"], "ok": True, "data": {"seq": 0}}
            if message["action"] == "request":
                reply = {"reply_to": message["id"], "status": 200, "body": {"budget": BEYOND, "text": '\\" 1'}}
            await socket.send(json.dumps(reply))
            if message["action"] == "subscribe":
                seq, key = (BEYOND, 1) if message["topics"] == ["seq"] else (1, BEYOND)
                frame = {"operation": "add", "topic": "movies", "subscription": message["as"]}
                await socket.send(json.dumps({**frame, "seq": seq, "data": {"id": key, "title": str(BEYOND)}}))


async def test_a_number_that_a_client_would_round_is_an_error() -> None:
    server = Counting()
    async with serve(server.welcome, "127.0.0.1", 0) as listening:
        server.port = next(iter(listening.sockets)).getsockname()[1]
        async with Client(server.url) as client, asyncio.timeout(10):
            assert (await client.request("GET", "/movies")).body["budget"] == BEYOND
            event = await anext(aiter(client.watch("seq")))
            assert event.position is not None
            assert event.position.seq == BEYOND
        told = await in_node(f"""
            const client = new Client({json.dumps(server.url)});
            const failed = (error) => error.name + ": " + error.message;
            const first = async (topic) => {{ for await (const each of client.watch(topic)) return each; }};
            const told = [
              await first("seq").catch(failed),
              await first("id").catch(failed),
              await client.request("GET", "/movies").catch(failed),
              await client.request("POST", "/movies", {{ body: {{ budget: 2 ** 53 }} }}).catch(failed),
              (await client.ping()) >= 0,
            ];
            client.close();
            tell(told);
        """)
    expected = "expected integers between -(2^53 - 1) and 2^53 - 1, got"
    beyond = f"UnsafeNumber: {expected} {BEYOND}"
    assert told == [beyond, beyond, beyond, f"RangeError: {expected} {2**53}", True]


async def test_digits_in_text_and_fractions_are_no_such_numbers() -> None:
    body = {"text": f'\\" {BEYOND} ,{BEYOND}', str(BEYOND): [2**53 - 1, 1 - 2**53, 0.1234567890123456789, 1e300]}
    async with deaf() as server:
        told = await in_node(f"""
            const client = new Client({json.dumps(server.url)});
            tell((await client.request("POST", "/movies", {{ body: {json.dumps(body)} }})).body);
            client.close();
        """)
    assert told == body
