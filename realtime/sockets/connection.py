"""One websocket: what it subscribes to, who it is, and what it asks.

Each message gets one reply. The next message is read only when the socket has taken the last reply, so a client that
asks and does not read fills nothing but its own buffer; requests alone are answered when they are done, a bounded
number at a time. The reply to `subscribe` comes before the first frame of the subscription, and the reply to
`unsubscribe` after the last.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import orjson
import structlog
from starlette.websockets import WebSocket

from core import metrics
from core.errors import CLOSE_REASONS, CloseCode, Forbidden, Problem
from core.identity import ANONYMOUS_AUDIENCES, Identity
from realtime.fanout.spec import Spec, check_topics
from realtime.fanout.subscription import Subscription
from realtime.sockets import messages, rest_calls
from realtime.sockets.context import Surroundings
from realtime.sockets.inbound import BadMessage, Message, parse_filters, parse_members, parse_message
from realtime.sockets.message_rate import MAX_REFUSED_MESSAGES, MESSAGES_PER_SECOND, Bucket
from realtime.sockets.registry import Entry
from realtime.wire import frames
from realtime.wire.frames import Frames, Rendering
from realtime.wire.writer import HIGH_WATER_BYTES, Writer
from resources.topics import PUBLIC_TOPICS, TOPICS

MAX_SUBSCRIPTIONS = 32
MAX_REQUESTS_IN_FLIGHT = 16
AUTH_SECONDS = 10.0  # to sign in, where everybody must

log = structlog.get_logger("connection")

ReplyData = Mapping[str, Any]


class Connection:
    """Between `open` and `close` the socket is subscribed."""

    def __init__(self, websocket: WebSocket, stream: Writer, around: Surroundings) -> None:
        self.stream = stream
        self.identity: Identity | None = None
        self.subscriptions: dict[str | None, Subscription] = {}
        self._websocket = websocket
        self._around = around
        self.is_ending = False
        self._turn = asyncio.Lock()
        self._answering = asyncio.Lock()
        self._followed: frozenset[str] = frozenset()  # whose presence it asked for
        self._entry: Entry | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._awaiting_auth: tuple[asyncio.TimerHandle, Spec, Callable[[], None]] | None = None
        self._requests: set[asyncio.Task[None]] = set()
        self._bucket = Bucket(time.monotonic())
        self._counted: tuple[frozenset[str], Identity | None] = (frozenset(), None)
        self._is_closed = False
        self._actions: Mapping[str, Callable[[Message], Awaitable[ReplyData | None]]] = {
            "subscribe": self._subscribe,
            "unsubscribe": self._unsubscribe,
            "auth": self._auth,
            "request": self._request,
            "presence": self._presence,
            "ping": self._ping,
        }

    # --- its life

    async def sign_in(self, identity: Identity) -> None:
        """Be this user, unless that has changed since the token was checked. Raises Unauthenticated, Unavailable."""
        entry = self._around.registry.add(identity, lambda known: self._identity_changed(entry, known))
        try:
            await self._around.registry.confirm(entry)
        except BaseException:
            self._around.registry.discard(entry)
            raise
        if self._entry is not None:
            self._around.registry.discard(self._entry)
        self._entry, self.identity = entry, entry.identity
        if self._is_closed:
            self._around.registry.discard(entry)
            return
        if self._expiry is not None:
            self._expiry.cancel()
        seconds = max(0.0, self.identity.expires_at - time.time())
        self._expiry = asyncio.get_running_loop().call_later(seconds, self._end, CloseCode.TOKEN_EXPIRED)

    def open(self, spec: Spec, position: int) -> None:
        """Begin with the default subscription, after `position`."""
        self._begin_default(spec, position, self._around.sources.feed.generation)

    def open_closed_doors(self, spec: Spec, position: int) -> None:
        """As `open`, but nothing is told before the client has signed in, which it must do soon."""
        timer = asyncio.get_running_loop().call_later(AUTH_SECONDS, self._end, CloseCode.TOKEN_EXPIRED)
        generation = self._around.sources.feed.generation
        self._awaiting_auth = timer, spec, partial(self._begin_default, spec, position, generation)

    def _begin_default(self, spec: Spec, position: int, generation: int) -> None:
        spec = replace(spec, audiences=self._audiences)
        subscription = Subscription(spec, self.stream, self._around.sources, self._turn)
        self._add(None, subscription)
        if generation == self._around.sources.feed.generation:
            subscription.start(position)
        else:
            subscription.start_over("the log was replaced")
        self._count_in()

    def close(self) -> None:
        """The socket is gone: nothing is written any more."""
        self._is_closed = True
        for name in list(self.subscriptions):
            self._drop(name)
        self._around.presence.unwatch(self)
        self._count_in()
        if self._entry is not None:
            self._around.registry.discard(self._entry)
        for timer in (self._expiry, self._awaiting_auth and self._awaiting_auth[0]):
            if timer is not None:
                timer.cancel()

    def _add(self, name: str | None, subscription: Subscription) -> None:
        self.subscriptions[name] = subscription
        metrics.SUBSCRIPTIONS.inc()

    def _drop(self, name: str | None) -> bool:
        """End a subscription; False when there is none of this name."""
        subscription = self.subscriptions.pop(name, None)
        if subscription is None:
            return False
        subscription.stop()
        metrics.SUBSCRIPTIONS.dec()
        return True

    async def finish(self) -> None:
        """Let requests that were begun come to their end, as HTTP does when a client goes away."""
        if self._requests:
            try:
                await asyncio.wait(set(self._requests))
            finally:
                for request in self._requests:
                    request.cancel()

    def _end(self, code: CloseCode) -> None:
        self.is_ending = True
        self.stream.close(code, CLOSE_REASONS[code])

    def _count_in(self) -> None:
        """Tell presence which topics the socket watches, and as whom, as far as that has changed."""
        topics = frozenset(topic for each in self.subscriptions.values() for topic in each.spec.topics)
        before, was = self._counted
        is_same = _user_id(was) == _user_id(self.identity)
        self._counted = topics, self.identity
        presence = self._around.presence
        entered = topics - before if is_same else topics
        left = before - topics if is_same else before
        if entered:
            username = self.identity.username if self.identity is not None else None
            presence.enter(entered, _user_id(self.identity), username)
        if left:
            # Who signs in goes on as somebody else: nobody who may come back.
            presence.leave(left, _user_id(was), lingers=is_same)

    # --- who it is

    @property
    def _audiences(self) -> frozenset[str]:
        return self.identity.audiences if self.identity is not None else ANONYMOUS_AUDIENCES

    def _identity_changed(self, entry: Entry, identity: Identity | None) -> None:
        if entry is not self._entry:
            return  # not this user yet, or no longer by this token
        if identity is None:
            self._end(CloseCode.TOKEN_EXPIRED)
            return
        self.identity = identity
        try:
            for subscription in self.subscriptions.values():
                check_topics(subscription.spec.topics, identity)
            check_topics(self._followed, identity)
        except Forbidden:
            self._end(CloseCode.TOKEN_EXPIRED)
            return
        self._respec()

    def _respec(self) -> None:
        for subscription in self.subscriptions.values():
            if subscription.spec.audiences != self._audiences:
                subscription.respec(replace(subscription.spec, audiences=self._audiences))

    # --- what it says

    async def receive_text(self, text: str) -> None:
        """Answer one text frame."""
        if self.is_ending:
            return  # it came after the end
        close, reply_to, answer = None, None, None
        try:
            is_allowed = self._bucket.take(time.monotonic()) or not self._around.has_limits
            message = parse_message(text)
            reply_to = message.reply_to
            if not is_allowed:
                close = CloseCode.TOO_MANY_MESSAGES if self._bucket.refused > MAX_REFUSED_MESSAGES else None
                raise BadMessage("rate_limited", f"Expected at most {MESSAGES_PER_SECOND:g} messages a second", close)
            action = self._actions.get(message.action)
            if action is None:
                raise BadMessage("unknown_action", f"action: expected one of {', '.join(sorted(self._actions))}")
            if self._awaiting_auth is not None and message.action not in ("auth", "ping"):
                raise BadMessage("unauthenticated", "Sign in first: send auth with a token")
            found = await action(message)
            if found is not None:
                answer = frames.reply(reply_to, found)
        except BadMessage as error:
            answer = frames.error_reply(reply_to if reply_to is not None else error.reply_to, error.code, error.detail)
            close = error.close
        except Problem as error:
            answer = frames.error_reply(reply_to, error.code, error.detail)
        if answer is not None:
            self._write(answer)
        if close is not None:
            self._end(close)
        await self.stream.drained()

    def receive_bytes(self) -> None:
        """The protocol has no binary frames: whoever sends one does not speak it."""
        if self.is_ending:
            return
        detail = "Expected JSON objects in text frames, got a binary frame"
        self._write(frames.error_reply(None, "binary_frame", detail))
        self._end(CloseCode.PROTOCOL_ERROR)

    def _write(self, text: bytes) -> None:
        if not self._is_closed:
            self.stream.write(Frames([text]))

    async def _ping(self, message: Message) -> ReplyData:
        parse_members(messages.Ping, message.members)
        return {}

    async def _auth(self, message: Message) -> ReplyData | None:
        token = parse_members(messages.Auth, message.members).token
        try:
            identity = await self._around.identify(token)
        except Problem as error:
            close = CloseCode.TOKEN_EXPIRED if error.status == 401 else None
            raise BadMessage(error.code, error.detail, close) from error
        if self.identity is not None and self.identity.user_id != identity.user_id:
            raise BadMessage("another_user", "This socket is signed in as another user; open another one")
        awaited = self._awaiting_auth
        topics = frozenset(topic for each in self.subscriptions.values() for topic in each.spec.topics)
        try:
            check_topics(topics | (awaited[1].topics if awaited is not None else frozenset()), identity)
        except Forbidden as error:
            raise BadMessage(error.code, error.detail, CloseCode.FORBIDDEN) from error
        try:
            await self.sign_in(identity)
        except Problem as error:
            close = CloseCode.TOKEN_EXPIRED if error.status == 401 else None
            raise BadMessage(error.code, error.detail, close) from error
        if awaited is not None:
            self._awaiting_auth = None
            awaited[0].cancel()
            self._write(frames.reply(message.reply_to, self._me()))
            awaited[2]()
            return None
        self._respec()
        self._count_in()
        return self._me()

    def _me(self) -> ReplyData:
        assert self.identity is not None
        return {"user_id": self.identity.user_id, "group": self.identity.group}

    async def _subscribe(self, message: Message) -> None:
        wanted = parse_members(messages.Subscribe, message.members)
        topics = tuple(wanted.topics if wanted.topics is not None else sorted(PUBLIC_TOPICS))
        check_topics(frozenset(topics), self.identity)
        filters = parse_filters(wanted.filter, topics)
        feed = self._around.sources.feed
        reason = await feed.find_place(wanted.since, wanted.epoch)
        beginning = None
        if wanted.snapshot and (wanted.since is None or reason is not None):
            beginning = await self._around.sources.snapshots.begin(topics)
        # From here nothing is awaited: the number in the reply is the place where the stream begins. Who it is may have
        # changed meanwhile.
        check_topics(frozenset(topics), self.identity)
        if self._is_closed:
            return
        name = self._new_name(wanted.name)
        deliver = wanted.deliver
        spec = Spec(
            frozenset(topics),
            Rendering(wanted.bulk, name),
            self._audiences,
            filters,
            deliver.latest_every_ms if isinstance(deliver, messages.Latest) else None,
        )
        subscription = Subscription(
            spec,
            self.stream,
            self._around.sources,
            self._turn,
            snapshot_of=topics if wanted.snapshot else (),
            owner_id=_user_id(self.identity),
        )
        self._drop(None)
        self._add(name, subscription)
        resumes = wanted.since is not None and reason is None
        start = wanted.since if wanted.since is not None and resumes else feed.head.seq
        if beginning is not None:
            start = beginning.head.seq
        self._write(frames.reply(message.reply_to, {"subscription": name, "seq": start}))
        if beginning is not None:
            subscription.start_with_snapshot(beginning, reason)
        elif reason is not None:
            subscription.start_over(reason)
        else:
            subscription.start(start)
        self._count_in()

    def _new_name(self, given: str | None) -> str:
        if len(self.subscriptions.keys() - {None}) >= MAX_SUBSCRIPTIONS:
            raise BadMessage("too_many_subscriptions", f"Expected at most {MAX_SUBSCRIPTIONS} on one socket")
        if given is not None:
            if given in self.subscriptions:
                raise BadMessage("name_taken", f"as: {given} is the name of another subscription of this socket")
            return given
        names = (f"s{number}" for number in range(1, MAX_SUBSCRIPTIONS + 2))
        return next(name for name in names if name not in self.subscriptions)

    async def _unsubscribe(self, message: Message) -> ReplyData:
        name = parse_members(messages.Unsubscribe, message.members).subscription
        if not self._drop(name):
            raise BadMessage("unknown_subscription", f"subscription: there is no {name} on this socket")
        self._count_in()
        return {"subscription": name}

    async def _presence(self, message: Message) -> ReplyData:
        topics = frozenset(parse_members(messages.Presence, message.members).topics)
        check_topics(topics, self.identity)
        private = sorted(topic for topic in topics if TOPICS[topic] == "self")
        if private:
            raise Forbidden(f"Topic {private[0]} is each user's own: nobody sees who watches it")
        presence = self._around.presence
        presence.unwatch(self)
        self._followed = topics
        if not topics:
            return {}
        found = await presence.watch(self, topics, self.identity is not None, self._write, self._is_full)
        try:
            check_topics(topics, self.identity)  # who it is may have changed meanwhile
        except Forbidden:
            presence.unwatch(self)
            raise
        return found

    def _is_full(self) -> bool:
        return self.stream.buffered() > HIGH_WATER_BYTES

    async def _request(self, message: Message) -> None:
        wanted = parse_members(messages.Request, message.members)
        refused = sorted({name.lower() for name in wanted.headers} & rest_calls.REFUSED_HEADERS)
        if refused:
            raise BadMessage("invalid_message", f"headers: {refused[0]} belongs to the socket, not to a request on it")
        if len(self._requests) >= MAX_REQUESTS_IN_FLIGHT:
            detail = f"Expected at most {MAX_REQUESTS_IN_FLIGHT} requests at once; wait for an answer"
            raise BadMessage("too_many_requests", detail)
        try:
            body = orjson.dumps(wanted.body) if "body" in wanted.model_fields_set else b""
        except TypeError:
            raise BadMessage("invalid_message", "body: expected fewer levels, one in another") from None
        task = asyncio.create_task(self._answer_request(message.reply_to, wanted, body), name="request")
        self._requests.add(task)
        task.add_done_callback(self._requests.discard)

    async def _answer_request(self, reply_to: int | str | None, wanted: messages.Request, body: bytes) -> None:
        scope = rest_calls.scope_of(self._websocket.scope, wanted, self.identity, body)
        try:
            found = await rest_calls.call(self._websocket.app, scope, body)
        except Exception as error:
            log.error("a request on a socket failed", exc_info=error)
            found = rest_calls.FAILED
        # One at a time: an answer waits until the socket has taken the last.
        async with self._answering:
            await self.stream.drained()
            self._write(rest_calls.reply(reply_to, *found))


def _user_id(identity: Identity | None) -> int | None:
    return identity.user_id if identity is not None else None
