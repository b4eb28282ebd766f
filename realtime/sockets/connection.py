"""One websocket: its identity, its subscriptions, and the messages of its client.

Rules:
- Each message receives one reply. The next message is read only when the socket has taken the previous reply, so a
  client that sends without reading fills only its own buffer. The reply to `request` is sent when the call is done.
- The reply to `subscribe` comes before the subscription's first frame, the reply to `unsubscribe` after the last one.
- The identity, and therefore what the socket may see, can change during any `await`, so it is checked again before
  frames that depend on it are sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.websockets import WebSocket

from core import metrics
from core.errors import CloseCode, Forbidden, Problem
from core.identity import Identity
from realtime.fanout.spec import Spec, audiences_of, check_topics, user_id_of
from realtime.fanout.subscription import Subscription
from realtime.feed.positions import LOG_REPLACED, find_start
from realtime.sockets import actions, parsing
from realtime.sockets.context import SocketContext
from realtime.sockets.parsing import BadMessage, Bucket, Message, parse_filters, parse_members, parse_message
from realtime.sockets.places import Place, TooMany
from realtime.sockets.registry import Entry
from realtime.sockets.rest_calls import RestCalls
from realtime.wire import frames
from realtime.wire.frames import Frames, Rendering
from realtime.wire.room import Room
from realtime.wire.writer import HIGH_WATER_BYTES, Writer
from resources.topics import PUBLIC_TOPICS, TOPICS

MAX_SUBSCRIPTIONS = 32
AUTH_SECONDS = 10.0  # a client must authenticate within AUTH_SECONDS, if authentication is required

ReplyData = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _AwaitedAuth:
    """The default subscription of a client that has yet to authenticate. `open` begins the subscription; `timer` closes
    the socket when AUTH_SECONDS are over.
    """

    timer: asyncio.TimerHandle
    topics: frozenset[str]
    open: Callable[[], None]


class Connection:
    """One websocket. It has subscriptions only between `open` and `close`."""

    def __init__(self, websocket: WebSocket, writer: Writer, context: SocketContext, place: Place) -> None:
        self.writer = writer
        self.identity: Identity | None = None
        self.subscriptions: dict[str | None, Subscription] = {}  # by name; the default subscription has the name None
        self.is_ending = False
        self._context = context
        self._place = place
        self._room = Room(writer, context.places.unsent, place.client)
        self._rest_calls = RestCalls(websocket, writer, self._write, self._room, context.places.calls)
        self._presence_topics: frozenset[str] = frozenset()  # the topics whose presence the client follows
        self._entry: Entry | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._awaited_auth: _AwaitedAuth | None = None
        self._bucket = Bucket(time.monotonic())
        self._counted_topics: frozenset[str] = frozenset()  # the topics for which presence counts the socket
        self._counted_identity: Identity | None = None
        self._is_closed = False
        writer.count_control_frames(self._receive_control_frame)
        self._actions: Mapping[str, Callable[[Message], Awaitable[ReplyData | None]]] = {
            "subscribe": self._subscribe,
            "unsubscribe": self._unsubscribe,
            "auth": self._auth,
            "request": self._request,
            "presence": self._presence,
            "ping": self._ping,
        }

    # --- opening and closing

    async def sign_in(self, identity: Identity) -> None:
        """Adopt this identity, unless it has become invalid since the token was checked.

        Raises Unauthenticated or Unavailable.
        """
        registry = self._context.registry
        entry = registry.add(identity, lambda current: self._identity_changed(entry, current))
        try:
            await registry.confirm(entry)
        except BaseException:
            registry.discard(entry)
            raise
        if self._entry is not None:
            registry.discard(self._entry)
        self._entry, self.identity = entry, entry.identity
        if self._is_closed:
            registry.discard(entry)
            return
        if self._expiry is not None:
            self._expiry.cancel()
        seconds = max(0.0, self.identity.expires_at - time.time())
        self._expiry = asyncio.get_running_loop().call_later(seconds, self._end, CloseCode.TOKEN_EXPIRED)

    def open(self, spec: Spec, position: int) -> None:
        """Begin the default subscription after `position`."""
        self._begin_default(spec, position, self._context.feed.generation)

    def open_after_auth(self, spec: Spec, position: int) -> None:
        """Begin the default subscription once the client has authenticated, which it must do within AUTH_SECONDS."""
        timer = asyncio.get_running_loop().call_later(AUTH_SECONDS, self._end, CloseCode.TOKEN_EXPIRED)
        begin = partial(self._begin_default, spec, position, self._context.feed.generation)
        self._awaited_auth = _AwaitedAuth(timer, spec.topics, begin)

    def _begin_default(self, spec: Spec, position: int, generation: int) -> None:
        subscription = self._new_subscription(replace(spec, audiences=self._audiences))
        self._add(None, subscription)
        if generation == self._context.feed.generation:
            subscription.start(position)
        else:
            subscription.start_over(LOG_REPLACED)
        self._update_presence()

    def close(self) -> None:
        """End everything that writes to the socket, because the socket is closed."""
        self._is_closed = True
        self._room.close(self._rest_calls)
        for name in list(self.subscriptions):
            self._drop(name)
        self._context.presence.unwatch(self)
        self._update_presence()
        if self._entry is not None:
            self._context.registry.discard(self._entry)
        if self._expiry is not None:
            self._expiry.cancel()
        if self._awaited_auth is not None:
            self._awaited_auth.timer.cancel()

    async def finish(self) -> None:
        """Interrupt the client's reads, and wait for its writes, as when an HTTP client disconnects."""
        await self._rest_calls.finish()

    def _new_subscription(self, spec: Spec, snapshot_of: tuple[str, ...] = ()) -> Subscription:
        return Subscription(
            spec,
            self.writer,
            self._room,
            feed=self._context.feed,
            live=self._context.live,
            snapshots=self._context.snapshots,
            snapshot_of=snapshot_of,
            owner_id=user_id_of(self.identity),
        )

    def _add(self, name: str | None, subscription: Subscription) -> None:
        self.subscriptions[name] = subscription
        metrics.SUBSCRIPTIONS.inc()

    def _drop(self, name: str | None) -> bool:
        """End a subscription. Return False when there is none with this name."""
        subscription = self.subscriptions.pop(name, None)
        if subscription is None:
            return False
        subscription.stop()
        if name is not None:  # the default subscription is not counted
            self._place.release(subscription.spec.filters)
        metrics.SUBSCRIPTIONS.dec()
        return True

    def _end(self, code: CloseCode) -> None:
        self.is_ending = True
        self.writer.close(code)

    @property
    def _topics(self) -> frozenset[str]:
        return frozenset(topic for each in self.subscriptions.values() for topic in each.spec.topics)

    def _update_presence(self) -> None:
        """Tell presence which topics the socket watches now, and as which user."""
        topics, before, was = self._topics, self._counted_topics, self._counted_identity
        user_id = user_id_of(self.identity)
        is_same = user_id_of(was) == user_id
        self._counted_topics, self._counted_identity = topics, self.identity
        presence = self._context.presence
        entered = topics - before if is_same else topics
        left = before - topics if is_same else before
        if entered:
            username = self.identity.username if self.identity is not None else None
            presence.enter(entered, user_id, username)
        if left:
            # A socket that signs in continues as another user. The anonymous client will not come back, so it must not
            # linger.
            presence.leave(left, user_id_of(was), lingers=is_same)

    # --- identity

    @property
    def _audiences(self) -> frozenset[str]:
        return audiences_of(self.identity)

    def _identity_changed(self, entry: Entry, identity: Identity | None) -> None:
        if entry is not self._entry:
            return  # the socket does not use this identity yet, or no longer uses it
        with suppress(Forbidden):
            if identity is not None:
                self.identity = identity
                check_topics(self._topics | self._presence_topics, identity)
                self._update_audiences()
                return
        self._end(CloseCode.TOKEN_EXPIRED)

    def _update_audiences(self) -> None:
        for subscription in self.subscriptions.values():
            if subscription.spec.audiences != self._audiences:
                subscription.change_spec(replace(subscription.spec, audiences=self._audiences))

    # --- messages

    async def receive_text(self, text: str) -> None:
        """Handle one text frame and write the reply."""
        if self.is_ending:
            return
        close, reply_to, reply = None, None, None
        try:
            is_allowed = self._take_message(parsing.weight_of(text))
            message = parse_message(text)
            reply_to = message.reply_to
            if not is_allowed:
                close = CloseCode.TOO_MANY_MESSAGES if self._ignores_refusals else None
                expected = f"Expected at most {parsing.MESSAGES_PER_SECOND:g} messages a second"
                raise BadMessage("rate_limited", expected, close)
            action = self._actions.get(message.action)
            if action is None:
                raise BadMessage("unknown_action", f"action: expected one of {', '.join(sorted(self._actions))}")
            if self._awaited_auth is not None and message.action not in ("auth", "ping"):
                raise BadMessage("unauthenticated", "Sign in first: send auth with a token")
            found = await action(message)
            if found is not None:
                reply = frames.reply(reply_to, found)
        except BadMessage as error:
            reply = frames.error_reply(reply_to if reply_to is not None else error.reply_to, error.code, error.detail)
            close = error.close
        except Problem as error:
            reply = frames.error_reply(reply_to, error.code, error.detail)
        except Exception as error:
            if (unavailable := await self._context.explain(error)) is None:
                raise
            reply = frames.error_reply(reply_to, unavailable.code, unavailable.detail)
        if reply is not None:
            self._write(reply)
        if close is not None:
            self._end(close)
        await self.writer.drained()

    def _take_message(self, weight: int = 1) -> bool:
        """Count one message. Return False when the client has sent too many."""
        return self._bucket.take(time.monotonic(), weight) or not self._context.limits_messages

    @property
    def _ignores_refusals(self) -> bool:
        return self._bucket.refused > parsing.MAX_REFUSED_MESSAGES

    def _receive_control_frame(self) -> bool:
        """Count a control frame or a small fragment as a message. Return False when the client has sent too many."""
        is_allowed = self._take_message()
        if not is_allowed and self._ignores_refusals and not self.is_ending:
            self._end(CloseCode.TOO_MANY_MESSAGES)
        return is_allowed

    def receive_bytes(self) -> None:
        """Close the socket, because the protocol has no binary frames."""
        if self.is_ending:
            return
        detail = "Expected JSON objects in text frames, got a binary frame"
        self._write(frames.error_reply(None, "binary_frame", detail))
        self._end(CloseCode.PROTOCOL_ERROR)

    def _write(self, text: bytes) -> None:
        if not self._is_closed:
            self.writer.write(Frames([text]))

    async def _ping(self, message: Message) -> ReplyData:
        parse_members(actions.Ping, message.members)
        return {}

    async def _auth(self, message: Message) -> ReplyData | None:
        token = parse_members(actions.Auth, message.members).token
        try:
            identity = await self._context.identify(token, self._place.address)
            if self.identity is not None and self.identity.user_id != identity.user_id:
                raise BadMessage("another_user", "This socket is signed in as another user; open another socket")
            awaited = self._awaited_auth
            check_topics(self._topics | (awaited.topics if awaited is not None else frozenset()), identity)
            await self.sign_in(identity)
        except Problem as error:
            closes = {401: CloseCode.TOKEN_EXPIRED, 403: CloseCode.FORBIDDEN}
            raise BadMessage(error.code, error.detail, closes.get(error.status)) from error
        if awaited is not None:
            self._awaited_auth = None
            awaited.timer.cancel()
            self._write(frames.reply(message.reply_to, self._signed_in()))
            awaited.open()
            return None
        self._update_audiences()
        self._update_presence()
        return self._signed_in()

    def _signed_in(self) -> ReplyData:
        assert self.identity is not None
        return {"user_id": self.identity.user_id, "group": self.identity.group}

    async def _subscribe(self, message: Message) -> None:
        wanted = parse_members(actions.Subscribe, message.members)
        topics = tuple(wanted.topics if wanted.topics is not None else sorted(PUBLIC_TOPICS))
        check_topics(frozenset(topics), self.identity)
        filters = parse_filters(wanted.filter, topics, wanted.q)
        feed = self._context.feed
        since = wanted.position
        reason = await find_start(feed, since)
        beginning = None
        if wanted.snapshot and (since is None or reason is not None):
            beginning = await self._context.snapshots.begin(topics)
        # Nothing is awaited from here on, so that the events begin exactly after the number in the reply.
        check_topics(frozenset(topics), self.identity)
        if self._is_closed:
            return
        name = self._new_name(wanted.name)
        deliver = wanted.deliver
        latest_every_ms = deliver.latest_every_ms if isinstance(deliver, actions.Latest) else None
        spec = Spec(frozenset(topics), Rendering(wanted.bulk, name), self._audiences, filters, latest_every_ms)
        try:
            self._place.hold(filters)
        except TooMany as error:
            raise BadMessage(error.code, str(error)) from error
        subscription = self._new_subscription(spec, snapshot_of=topics if wanted.snapshot else ())
        self._drop(None)
        self._add(name, subscription)
        start = since.seq if since is not None and reason is None else feed.head.seq
        if beginning is not None:
            start = beginning.head.seq
        self._write(frames.reply(message.reply_to, {"subscription": name, "seq": start}))
        if beginning is not None:
            subscription.start_with_snapshot(beginning, reason)
        elif reason is not None:
            subscription.start_over(reason)
        else:
            subscription.start(start)
        self._update_presence()

    def _new_name(self, given: str | None) -> str:
        if len(self.subscriptions.keys() - {None}) >= MAX_SUBSCRIPTIONS:
            raise BadMessage("too_many_subscriptions", f"Expected at most {MAX_SUBSCRIPTIONS} subscriptions")
        if given is not None:
            if given in self.subscriptions:
                raise BadMessage("name_taken", f"as: {given} is the name of another subscription of this socket")
            return given
        names = (f"s{number}" for number in range(1, MAX_SUBSCRIPTIONS + 2))
        return next(name for name in names if name not in self.subscriptions)

    async def _unsubscribe(self, message: Message) -> ReplyData:
        name = parse_members(actions.Unsubscribe, message.members).subscription
        if not self._drop(name):
            raise BadMessage("unknown_subscription", f"subscription: this socket has no subscription {name}")
        self._update_presence()
        return {"subscription": name}

    async def _presence(self, message: Message) -> ReplyData:
        topics = frozenset(parse_members(actions.Presence, message.members).topics)
        check_topics(topics, self.identity)
        private = sorted(topic for topic in topics if TOPICS[topic] == "self")
        if private:
            raise Forbidden(f"Topic {private[0]} has no presence, because it is private to each user")
        presence = self._context.presence
        presence.unwatch(self)
        self._presence_topics = topics
        if not topics:
            return {}
        found = await presence.watch(self, topics, self.identity is not None, self._write, self._is_full)
        try:
            check_topics(topics, self.identity)
        except Forbidden:
            presence.unwatch(self)
            raise
        return found

    def _is_full(self) -> bool:
        return self.writer.buffered() > HIGH_WATER_BYTES

    async def _request(self, message: Message) -> None:
        wanted = parse_members(actions.Request, message.members)
        self._rest_calls.start(message.reply_to, wanted, self.identity)
