"""The protocol of one client across its connections. Pure: strings in, strings out; the caller passes the time.

The application opens subscriptions, makes calls and requests presence at any time. The owner of the socket calls
`connected`, `receive` and `lost`, sends what `messages` returns, and calls `beat` when it is due. Each connection
starts with the server's welcome. Then everything that the application has open is requested again, each subscription
from its position.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from .arguments import checked, text_of
from .errors import ConnectionLost, MarqueeError, ProtocolViolation, ServerError
from .retry import REPEAT_SECONDS, is_temporary
from .subscription import Subscription

MAX_REQUESTS_IN_FLIGHT = 16  # The server rejects a 17th request.
MAX_ATTEMPTS = 20  # Attempts per call. A request whose reply always breaks the connection must not be repeated forever.
PROTOCOL = 1
DEFAULT_HEARTBEAT_SECONDS = 20.0
WELCOME_SECONDS = 10.0  # the longest wait for the welcome after the handshake


class ServerSilent(Exception):
    """The server was silent for two heartbeats."""


@dataclass(eq=False)
class Call:
    """A message that needs a reply. `is_repeatable`: it may be sent again even if the server has handled it before."""

    message: dict[str, Any]
    resolve: Callable[[Mapping[str, Any]], None]
    reject: Callable[[MarqueeError], None]
    is_repeatable: bool = False
    attempts: int = field(default=0, init=False)
    is_delayed: bool = field(default=False, init=False)  # whether the call waits after a temporary error


class PresenceSink(Protocol):
    """A receiver of the presence of some topics."""

    topics: tuple[str, ...]

    def loaded(self, state: Mapping[str, Any]) -> None: ...
    def changed(self, topic: str, data: Mapping[str, Any]) -> None: ...
    def failed(self, error: MarqueeError) -> None: ...


class Session:
    """The protocol state of one client. Not thread-safe."""

    def __init__(self) -> None:
        self.epoch: str | None = None
        self.user_id: int | None = None
        self.is_welcome = False
        self.welcomed_at: float | None = None  # The time when the current or the last connection was welcomed.
        self.error: MarqueeError | None = None  # The error that ended the session.
        self.on_message: Callable[[], None] = lambda: None  # `on_message` is called when there are messages to send.
        self._heartbeat_seconds = DEFAULT_HEARTBEAT_SECONDS
        self._heard_at = self._pinged_at = 0.0
        self._is_pinged = False
        self._subscriptions: dict[Subscription, str] = {}  # open subscriptions with their current names, oldest first
        self._by_name: dict[str, Subscription] = {}
        self._presences: list[PresenceSink] = []
        self._confirmed: set[int] = set()  # the presences that have received their state, by id()
        self._is_presence_asked = False
        self._waiting: deque[Call] = deque()
        self._sent: dict[int, Call] = {}
        self._replies: dict[int, Callable[[Mapping[str, Any]], None]] = {}
        self._retries: list[tuple[float, Callable[[], None]]] = []
        self._now = 0.0
        self._last_id = 0
        self._last_name = 0
        self._outbox: list[str] = []

    # --- the application

    def open(self, subscription: Subscription) -> None:
        if self.error is not None:
            subscription.sink.failed(self.error)
            return
        self._subscriptions[subscription] = ""
        self._subscribe(subscription)

    def close(self, subscription: Subscription) -> None:
        """End a subscription. Its sink receives nothing further."""
        if subscription in self._subscriptions:
            self._unsubscribe(subscription)
            del self._subscriptions[subscription]

    def pause(self, subscription: Subscription) -> None:
        """Unsubscribe temporarily and keep the position. Until `resume`, the server's log keeps the events."""
        if not subscription.is_paused and subscription in self._subscriptions:
            subscription.is_paused = True
            self._unsubscribe(subscription)

    def resume(self, subscription: Subscription) -> None:
        if subscription.is_paused and subscription in self._subscriptions:
            subscription.is_paused = False
            self._subscribe(subscription)

    def call(self, call: Call) -> None:
        """Send a message once the connection and the request limit permit it. Raises the same errors as `checked`."""
        call.message = checked(call.message)
        if self.error is not None:
            call.reject(self.error)
            return
        self._waiting.append(call)
        self._send_calls()

    def forget(self, call: Call) -> None:
        """Stop waiting for the reply to a call. A request already sent counts as in flight until its reply arrives."""
        if call in self._waiting:
            self._waiting.remove(call)
        call.resolve, call.reject, call.is_repeatable = _ignore, _ignore, False

    def add_presence(self, presence: PresenceSink) -> None:
        if self.error is not None:
            presence.failed(self.error)
            return
        self._presences.append(presence)
        self._ask_presence()

    def remove_presence(self, presence: PresenceSink) -> None:
        if presence in self._presences:
            self._presences.remove(presence)
            self._confirmed.discard(id(presence))
            self._ask_presence()

    def fail(self, error: MarqueeError) -> None:
        """End the session with a final error, which all subscriptions, presences and calls receive."""
        if self.error is not None:
            return
        self.error = error
        self._end_connection()
        for subscription in list(self._subscriptions):
            subscription.sink.failed(error)
        for presence in self._presences:
            presence.failed(error)
        calls = [*self._sent.values(), *self._waiting]
        self._subscriptions.clear()
        self._presences.clear()
        self._sent.clear()
        self._waiting.clear()
        for call in calls:
            call.reject(error)

    # --- the socket

    def connected(self, now: float) -> None:
        self._now = self._heard_at = now
        self._is_pinged = False
        self._heartbeat_seconds = DEFAULT_HEARTBEAT_SECONDS
        self.welcomed_at = None

    def receive(self, text: str, now: float) -> None:
        """Handle a frame. Raises ProtocolViolation if the connection is no longer usable and must be replaced."""
        self._now = self._heard_at = now
        self._is_pinged = False
        try:
            frame = json.loads(text)
            if not isinstance(frame, dict):
                raise TypeError("expected an object")
            self._frame(frame, len(text))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ProtocolViolation(4509, f"{error!r} in {text[:200]}") from error

    def lost(self) -> None:
        """Handle the end of the connection.

        Of the calls already sent, those that are repeatable and have attempts left wait for the next connection; the
        others fail. Calls not yet sent keep waiting.
        """
        self._end_connection()
        sent, self._sent = self._sent, {}
        again = []
        for call in sent.values():
            if call.is_repeatable and call.attempts < MAX_ATTEMPTS:
                again.append(call)
            else:
                detail = "the connection ended before the reply; the server may have acted on the message"
                call.reject(ConnectionLost(detail))
        self._waiting.extendleft(reversed(again))

    def messages(self) -> list[str]:
        """Return the messages to send, and forget them."""
        messages, self._outbox = self._outbox, []
        return messages

    def beat(self, now: float) -> float:
        """Do the work that is due, and return the seconds until `beat` must be called again.

        Send a ping if the server has been silent for one heartbeat. Raises ServerSilent after two silent heartbeats.
        """
        self._now = now
        due = [repeat for at, repeat in self._retries if at <= now]
        self._retries = [(at, repeat) for at, repeat in self._retries if at > now]
        for repeat in due:
            repeat()
        if not self.is_welcome:
            if now - self._heard_at >= WELCOME_SECONDS:
                raise ServerSilent
            return self._heard_at + WELCOME_SECONDS - now
        since = self._pinged_at if self._is_pinged else self._heard_at
        if now - since >= self._heartbeat_seconds:
            if self._is_pinged:
                raise ServerSilent
            self._is_pinged, self._pinged_at = True, now
            self._ask({"action": "ping"}, _ignore)
            since = now
        return min([since + self._heartbeat_seconds, *(at for at, _ in self._retries)]) - now

    # --- internals

    def _end_connection(self) -> None:
        self.is_welcome = False
        self._outbox.clear()
        self._replies.clear()
        self._retries.clear()
        self._confirmed.clear()
        self._is_presence_asked = False
        self._by_name.clear()
        for call in self._waiting:
            call.is_delayed = False
        for subscription in self._subscriptions:
            self._subscriptions[subscription] = ""
            subscription.cut()

    def _later(self, repeat: Callable[[], None]) -> None:
        """Repeat a message later. If the connection ends first, the next connection sends everything again."""
        self._retries.append((self._now + REPEAT_SECONDS, repeat))
        self.on_message()  # the owner must call `beat` earlier

    def _ask(self, message: Mapping[str, Any], answer: Callable[[Mapping[str, Any]], None]) -> int:
        self._last_id += 1
        self._replies[self._last_id] = answer
        self._outbox.append(text_of({"id": self._last_id, **message}))
        self.on_message()
        return self._last_id

    def _frame(self, frame: dict[str, Any], size: int) -> None:
        if "reply_to" in frame:
            if frame["reply_to"] is None and frame.get("ok") is False:
                # The server does not name the unreadable message, whose sender would wait forever without a reconnect.
                raise ProtocolViolation(4509, f"the server could not read a message: {_error(frame)}")
            answer = self._replies.pop(frame["reply_to"], None)
            if answer is not None:
                answer(frame)
            return
        operation, name = frame.get("operation"), frame.get("subscription")
        if operation == "welcome":
            self._welcome(frame["data"])
        elif operation == "presence":
            for presence in [each for each in self._presences if id(each) in self._confirmed]:
                if frame["topic"] in presence.topics:
                    presence.changed(frame["topic"], frame["data"])
        else:
            if operation == "resync":
                self.epoch = frame["data"]["epoch"]
            subscription = self._by_name.get(name) if isinstance(name, str) else None
            if subscription is not None and self.epoch is not None:
                subscription.receive(frame, self.epoch, size)

    def _welcome(self, data: Mapping[str, Any]) -> None:
        if data["protocol"] != PROTOCOL:
            detail = f"the server speaks protocol version {data['protocol']}, this client speaks version {PROTOCOL}"
            self.fail(ProtocolViolation(4509, detail))
            return
        self.epoch, self.user_id = data["epoch"], data.get("user_id")
        heartbeat = data.get("heartbeat_seconds")
        if isinstance(heartbeat, int | float) and heartbeat > 0:
            self._heartbeat_seconds = float(heartbeat)
        self.is_welcome, self.welcomed_at = True, self._now
        for subscription in self._subscriptions:
            self._subscribe(subscription)
        self._ask_presence()
        self._send_calls()

    def _subscribe(self, subscription: Subscription) -> None:
        if not self.is_welcome or subscription.is_paused:
            return
        self._last_name += 1
        name = f"s{self._last_name}"
        self._subscriptions[subscription] = name
        self._by_name[name] = subscription

        def again() -> None:
            if self._subscriptions.get(subscription) == "":
                self._subscribe(subscription)

        def answer(reply: Mapping[str, Any]) -> None:
            if self._by_name.get(name) is not subscription:
                return  # the subscription was closed or paused meanwhile
            if reply.get("ok"):
                assert self.epoch is not None, "the welcome sets the epoch"
                subscription.accepted(reply["data"]["seq"], self.epoch)
                return
            self._subscriptions[subscription] = ""
            del self._by_name[name]
            error = _error(reply)
            if is_temporary(error.code):
                self._later(again)
            else:
                del self._subscriptions[subscription]
                subscription.sink.failed(error)

        self._ask(subscription.subscribe(name), answer)

    def _unsubscribe(self, subscription: Subscription) -> None:
        name = self._subscriptions[subscription]
        self._subscriptions[subscription] = ""
        subscription.cut()
        if self._by_name.pop(name, None) is not None:
            self._ask({"action": "unsubscribe", "subscription": name}, _ignore)

    def _send_calls(self) -> None:
        while self.is_welcome:
            # While the limit of requests in flight is reached, other messages overtake the waiting requests.
            is_full = sum(map(_is_request, self._sent.values())) >= MAX_REQUESTS_IN_FLIGHT
            ready = (each for each in self._waiting if not (each.is_delayed or (is_full and _is_request(each))))
            call = next(ready, None)
            if call is None:
                return
            self._waiting.remove(call)
            call.attempts += 1

            def answer(reply: Mapping[str, Any], call: Call = call) -> None:
                self._sent.pop(reply["reply_to"], None)
                if reply.get("ok") is False:
                    self._refused(call, _error(reply))
                else:
                    call.resolve(reply)
                self._send_calls()

            self._sent[self._ask(call.message, answer)] = call

    def _refused(self, call: Call, error: ServerError) -> None:
        is_repeatable = call.is_repeatable or not _is_request(call)
        if not is_temporary(error.code, is_repeatable) or call.reject is _ignore or call.attempts >= MAX_ATTEMPTS:
            call.reject(error)
            return

        def again() -> None:
            call.is_delayed = False
            self._send_calls()

        call.is_delayed = True
        self._waiting.appendleft(call)
        self._later(again)

    def _ask_presence(self) -> None:
        """Request the presence of all topics in one message, which replaces the previous request on the server."""
        if not self.is_welcome:
            return
        asking: Sequence[PresenceSink] = tuple(self._presences)

        def answer(reply: Mapping[str, Any]) -> None:
            present = [each for each in asking if each in self._presences]
            if reply.get("ok"):
                for presence in present:
                    self._confirmed.add(id(presence))
                    presence.loaded(reply["data"])
                return
            error = _error(reply)
            if is_temporary(error.code):
                if present:
                    self._later(self._ask_presence)
                return
            new = [each for each in present if id(each) not in self._confirmed]
            for presence in new:
                self._presences.remove(presence)
                presence.failed(error)
            if new and self._presences:
                self._ask_presence()  # asks again for the remaining presences, whose topics the server accepted earlier

        topics = sorted({topic for presence in asking for topic in presence.topics})
        if topics or self._is_presence_asked:
            self._is_presence_asked = True
            self._ask({"action": "presence", "topics": topics}, answer)


def _is_request(call: Call) -> bool:
    return bool(call.message["action"] == "request")


def _error(reply: Mapping[str, Any]) -> ServerError:
    error = reply["error"]
    return ServerError(str(error["code"]), error.get("detail"))


def _ignore(_: object) -> None:
    return None
