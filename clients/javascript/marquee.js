/**
 * Watch a Marquee catalog over one websocket.
 *
 *     const client = new Client("ws://127.0.0.1:8000/ws");
 *     for await (const event of client.watch("movies")) console.log(event);
 *
 * The module contains, in this order: errors, values, validation of arguments, `Pacer` (when to reconnect),
 * `Subscription` (one subscription across all connections), `Session` (the protocol across connections), then what the
 * application reads (`Watch`, `View`, `Presence`), and `Client` with the socket. `Pacer`, `Subscription` and `Session`
 * are pure: they use no clock, timers or sockets.
 *
 * @module marquee
 */

// --- errors

/** The base class of all errors that this module throws on purpose. */
export class MarqueeError extends Error {
  /** @param {string} message */
  constructor(message) {
    super(message);
    this.name = new.target.name;
  }
}

/**
 * The server rejected this client, so the client does not reconnect. `code`: the close code, or the HTTP status of the
 * handshake where that is visible. `detail`: the server's reason.
 */
export class Refused extends MarqueeError {
  /** @param {number} code @param {any} detail */
  constructor(code, detail) {
    super(`the server refused the connection (${code}): ${text(detail)}`);
    this.code = code;
    this.detail = detail;
  }
}

/** The token is missing, invalid or expired: sign in again. A token function may throw it to end the client. */
export class Unauthorized extends Refused {
  /** @param {number} [code] @param {any} [detail] */
  constructor(code = 4501, detail = "there is no token") {
    super(code, detail);
  }
}

/** The client is not allowed to connect. */
export class Forbidden extends Refused {}

/** The client or the server violated the protocol, which is a bug in one of them. */
export class ProtocolViolation extends Refused {}

/**
 * The server replied with an error. `code`: the error's code, such as `invalid_filter`. `detail`: a string, or a list of
 * problems.
 */
export class ServerError extends MarqueeError {
  /** @param {string} code @param {any} detail */
  constructor(code, detail) {
    super(`${code}: ${text(detail)}`);
    this.code = code;
    this.detail = detail;
  }
}

/** The connection ended before the reply: the server may or may not have carried out the request. */
export class ConnectionLost extends MarqueeError {}

/** No reply within `timeoutSeconds`: the server may or may not have carried out the request. */
export class TimedOut extends MarqueeError {}

/** A frame contains an integer beyond `Number.MAX_SAFE_INTEGER`, which JavaScript would round. */
export class UnsafeNumber extends MarqueeError {
  /** @param {string} number */
  constructor(number) {
    super(`expected integers between -(2^53 - 1) and 2^53 - 1, got ${number}`);
  }
}

/** `close` was called on the client, or on the watch, view or presence. */
export class ClientClosed extends MarqueeError {}

/** @param {any} detail */
function text(detail) {
  return typeof detail === "string" ? detail : JSON.stringify(detail);
}

/** @param {number} code @param {any} detail */
function refusal(code, detail) {
  if (code === 401 || code === TOKEN_EXPIRED) return new Unauthorized(code, detail);
  if (code === 403 || code === 4503) return new Forbidden(code, detail);
  if (code === 1007 || code === 1009 || code === PROTOCOL_ERROR) return new ProtocolViolation(code, detail);
  return new Refused(code, detail);
}

// --- values

/**
 * A position in the event log: every event up to and including `seq` has been processed.
 * @typedef {{epoch: string, seq: number}} Position
 *
 * An entity as GET returns it.
 * @typedef {{id: number | string, [name: string]: any}} Row
 *
 * One event of a subscription. `seq` is null for ephemeral events (`progress`). `reason` is "filter" when a row no longer
 * matches the filter but still exists. `more`: another event with the same `seq` follows. `position`: where to resume
 * after this event; if `more` is set, the position before the first event with this `seq`.
 * @typedef {{operation: string, topic: string | null, seq: number | null, data: any, position: Position | null,
 *   changed: string[], reason: string | null, actorId: number | null, ts: string | null, more: boolean}} Event
 *
 * Events are missing because the server no longer has them: discard what you built from the watch. The next events are
 * those after `position`.
 * @typedef {{operation: "resync", reason: string, position: Position}} Resync
 *
 * A change to a view: `row` is the row after the change, `old` the row before the change. `reset`: any row may have
 * changed, so read the view again.
 * @typedef {{kind: "add" | "update" | "delete" | "reset", id: number | string | null, row: Row | null, old: Row | null}} Change
 *
 * @typedef {{user_id: number, username: string | null, connections: number}} User
 * @typedef {{count: number, users: Map<number, User>}} Audience
 * @typedef {{topic: string, count: number, joined: User[], left: User[], isReset: boolean}} PresenceChange
 *
 * The response to a request, whatever its status. Header names are in lowercase.
 * @typedef {{status: number, headers: Record<string, string>, body: any}} Response
 *
 * The limits of the pauses between attempts. The n-th pause in a row (counted from 0) is a random time of up to
 * `firstSeconds` * 2^n, but at most `longestSeconds`. It is random so that clients that lost their connections together
 * do not reconnect together. A connection that lasted `provenSeconds` resets the count.
 * @typedef {{firstSeconds: number, longestSeconds: number, provenSeconds: number}} Retry
 *
 * @typedef {string | null | undefined} Shown
 * @typedef {Shown | (() => Promise<Shown> | Shown)} Token
 * @typedef {Record<string, any>} Message
 * @typedef {(reply: Message) => void} Answer
 * @typedef {{topics: string[], filter: object | null, q: string | null, snapshot: boolean,
 *   bulk: "items" | "summary" | null, deliver: "all" | {latest_every_ms: number} | null}} SubscribeOptions
 *
 * The receiver of a subscription. None of these methods may block.
 * @typedef {{began(position: Position): void, take(events: Event[], size: number): void, resynced(resync: Resync): void,
 *   replaced(rows: Row[], position: Position): void, failed(error: MarqueeError): void}} Sink
 *
 * @typedef {{message: Message, resolve: (reply: Message) => void, reject: (error: MarqueeError) => void,
 *   isRepeatable: boolean, attempts: number, isDelayed: boolean, isForgotten: boolean}} Call
 *
 * How a connection or an attempt to connect ended. `code`: the close code from the server, the HTTP status of a refused
 * handshake where it is visible (the package `ws` reports it), or null.
 * @typedef {{code: number | null, detail: string, lastedSeconds: number}} Ending
 *
 * The part of a WebSocket that is used here. The WebSockets of browsers, of Node (22, or 20 with
 * --experimental-websocket) and of the package `ws` work.
 * @typedef {{onopen: any, onmessage: any, onclose: any, onerror: any, send(text: string): void,
 *   close(code?: number): void}} Socket
 * @typedef {new (url: string, protocols?: string[]) => Socket} SocketClass
 */

const PROTOCOL = 1;
const TOKEN_EXPIRED = 4501;
const PROTOCOL_ERROR = 4509;
const TOO_MANY_MESSAGES = 4429;
const TOO_MANY_MESSAGES_SECONDS = 1; // after close code 4429, an immediate reconnect would exceed the limit again

const MAX_REQUESTS_IN_FLIGHT = 16; // the server rejects the 17th request
const MAX_MESSAGE_BYTES = 256 * 1024; // for larger messages, the server closes the socket with 1009
const MAX_ATTEMPTS = 20; // a call whose reply always breaks the connection must not be repeated forever
const DEFAULT_HEARTBEAT_SECONDS = 20;
const OPEN_SECONDS = 10; // the longest wait for the handshake
const WELCOME_SECONDS = 10; // the longest wait for the welcome after the handshake
const REPEAT_SECONDS = 1; // the pause between a temporary error reply and the next attempt
const LONGEST_TIMER_MS = 2 ** 31 - 1; // for longer delays, setTimeout fires immediately
const WARNED_ATTEMPTS = 3; // consecutive failures before a warning, so that a wrong URL is noticed
const NO_HANDSHAKE = "handshake failed: the server is unreachable, or the URL, the origin or the token is wrong";

// Limits of the events that wait for a slow reader. When a limit is reached, the watch pauses its subscription, and
// resumes it at the same position when the reader has consumed half of the events. Meanwhile, the server's log keeps
// the events, so the socket is not blocked.
const QUEUED_EVENTS = 1_000;
const QUEUED_CHARACTERS = 8 * 1024 * 1024;
const QUEUED_CHANGES = 10_000; // limit per loop over a view; beyond it, one `reset` replaces the waiting changes

const NO_TOKEN_CHARACTER = /[^A-Za-z0-9._~+/=-]/; // RFC 6750 defines the allowed characters
const MANY_DIGITS = /[0-9]{16}/; // integers with fewer digits are always safe
const JSON_TOKEN = /"[^"\\]*(?:\\.[^"\\]*)*"|-?[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?/g; // matches strings and numbers
const INTEGER = /^-?[0-9]+$/;
const HALF_PAIR = /\p{Surrogate}/u;
const NOT_HANDLED = new Set(["rate_limited", "too_many_requests"]); // error codes of messages that had no effect
const DURABLE = new Set(["add", "update", "delete", "add_bulk", "update_bulk", "delete_bulk"]);

/** @param {Message} frame @param {Position | null} position @returns {Event} */
function eventOf(frame, position) {
  return {
    operation: frame.operation,
    topic: frame.topic ?? null,
    seq: frame.seq ?? null,
    data: frame.data ?? {},
    position,
    changed: Array.isArray(frame.changed) ? frame.changed : [],
    reason: frame.reason ?? null,
    actorId: frame.actor_id ?? null,
    ts: frame.ts ?? null,
    more: frame.more === true,
  };
}

// --- validation of arguments
//
// Arguments are validated in the call that receives them. If an invalid argument failed only later, when its message is
// sent, the failure would look like a server error, and the message would be retried forever. The validated
// value is a copy, so that later changes by the caller have no effect.

/**
 * Converts `since` to a `Position`. It may be a `Position`, a string in the form of the header `Stream-Position`
 * (`<epoch>:<seq>`), or a number if `epoch` is given. A number alone is rejected because it could belong to another
 * log, for example if a backup has been restored. Throws TypeError and RangeError.
 * @param {Position | number | string | null | undefined} since
 * @param {string} [epoch]
 * @returns {Position | null}
 */
export function positionOf(since, epoch = "") {
  if (since === null || since === undefined) return null;
  const found = typeof since === "string" ? /^(.*):([0-9]+)$/.exec(since) : null;
  /** @type {Position} */
  let position = { epoch, seq: Number.NaN };
  if (typeof since === "number") position.seq = since;
  else if (typeof since === "object") position = { epoch: since.epoch ?? "", seq: since.seq };
  else if (found !== null) position = { epoch: found[1], seq: Number(found[2]) };
  if (!Number.isSafeInteger(position.seq) || position.seq < 0) {
    throw new TypeError(
      `since: expected a position, a string <epoch>:<seq>, or a number >= 0 with its epoch, got ${shown(since)}`,
    );
  }
  if (typeof position.epoch !== "string") throw new TypeError(`epoch: expected a string, got ${shown(position.epoch)}`);
  if (position.epoch === "") {
    throw new TypeError(
      `since: expected the epoch of the log together with the number, as in "<epoch>:${position.seq}"`,
    );
  }
  checked({ epoch: position.epoch });
  return position;
}

/**
 * Checks that the server can read a message, and returns a copy without an id. Throws TypeError for values that JSON
 * cannot represent and for a lone surrogate, which is not valid Unicode; RangeError for a message that is too large and
 * for an integer that JavaScript may have rounded.
 * @param {Message} message
 * @returns {Message}
 */
function checked(message) {
  const written = JSON.stringify({ ...message, id: Number.MAX_SAFE_INTEGER });
  const size = new TextEncoder().encode(written).length;
  if (size > MAX_MESSAGE_BYTES) {
    throw new RangeError(`expected a message of at most ${MAX_MESSAGE_BYTES} bytes, got ${size}`);
  }
  const unsafe = unsafeNumberIn(written);
  if (unsafe !== null) throw new RangeError(new UnsafeNumber(unsafe).message);
  const { id: _, ...copy } = JSON.parse(written);
  // JSON.stringify writes a lone surrogate as an escape, which the server rejects. Apart from such escapes, only text
  // with a backslash can match this pattern, so few messages need the full check.
  if (/\\ud[89a-f]/.test(written)) refuseHalfPairs(copy, "");
  return copy;
}

/**
 * Returns the first integer of a JSON text that a JavaScript number cannot represent exactly, or null.
 * @param {string} json
 */
function unsafeNumberIn(json) {
  if (!MANY_DIGITS.test(json)) return null; // the case for nearly all messages
  for (const [token] of json.matchAll(JSON_TOKEN)) {
    if (INTEGER.test(token) && !Number.isSafeInteger(Number(token))) return token;
  }
  return null;
}

/** @param {any} value @param {string} place the path of the value, such as `body.titles[2]` */
function refuseHalfPairs(value, place) {
  if (typeof value === "string") {
    if (HALF_PAIR.test(value)) throw new TypeError(`${place}: expected Unicode, got half a surrogate pair`);
  } else if (Array.isArray(value)) {
    value.forEach((each, index) => refuseHalfPairs(each, `${place}[${index}]`));
  } else if (value !== null && typeof value === "object") {
    for (const [name, each] of Object.entries(value)) {
      refuseHalfPairs(name, `a name in ${place || "the message"}`);
      refuseHalfPairs(each, place ? `${place}.${name}` : name);
    }
  }
}

/** @param {string | Iterable<string>} topics @returns {string[]} */
function topicsOf(topics) {
  const isMany = topics !== null && typeof topics === "object" && typeof topics[Symbol.iterator] === "function";
  const found = isMany ? [...topics] : [topics];
  if (found.length === 0 || !found.every((topic) => typeof topic === "string")) {
    throw new TypeError(`topics: expected one topic or several, such as "movies", got ${shown(topics)}`);
  }
  return checked({ topics: found }).topics;
}

/**
 * Returns the options of a subscription. Only types are checked; the server validates the values. Throws TypeError and
 * RangeError.
 * @param {{topics: string[], filter?: any, q?: any, snapshot?: boolean, bulk?: any, deliver?: any}} options
 * @returns {SubscribeOptions}
 */
function optionsOf({ topics, filter = null, q = null, snapshot = false, bulk = null, deliver = null }) {
  if (filter !== null && !isPlain(filter)) {
    throw new TypeError(`filter: expected an object such as {genre: "Drama"}, got ${shown(filter)}`);
  }
  if (q !== null && typeof q !== "string") {
    throw new TypeError(`q: expected a string such as "third man", got ${shown(q)}`);
  }
  if (bulk !== null && typeof bulk !== "string") {
    throw new TypeError(`bulk: expected "items" or "summary", got ${shown(bulk)}`);
  }
  if (deliver !== null && typeof deliver !== "string" && !isPlain(deliver)) {
    throw new TypeError(`deliver: expected "all" or {latest_every_ms: 200}, got ${shown(deliver)}`);
  }
  const message = checked({ topics, filter, q, bulk, deliver });
  return { topics, snapshot, q, filter: message.filter, bulk: message.bulk, deliver: message.deliver };
}

/**
 * Returns the query string for a REST list. `filter` has the form that subscriptions take; `parameters` are further
 * query parameters, such as `sort`, `limit` and `q`. A value of `in` that contains a comma or starts with a quote is
 * written in double quotes, with the quotes inside doubled. Throws TypeError for values other than strings, numbers and
 * booleans.
 *
 *     "/movies?" + queryOf({ title: { in: ["The Good, the Bad and the Ugly", "Alien"] } }, { sort: "-rating" })
 * @param {Record<string, any> | null} [filter]
 * @param {Record<string, string | number | boolean | null | undefined>} [parameters]
 * @returns {string}
 */
export function queryOf(filter = null, parameters = {}) {
  const { or = [], ...conditions } = filter ?? {};
  const pairs = [...conditionPairs(conditions, (field) => field)];
  or.forEach((/** @type {any} */ group, /** @type {number} */ number) => {
    pairs.push(...conditionPairs(group, (field) => `or[${number}][${field}]`));
  });
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== null && value !== undefined) pairs.push([name, queryText(value)]);
  }
  return new URLSearchParams(pairs).toString();
}

/**
 * @param {Record<string, any>} conditions
 * @param {(field: string) => string} nameOf
 * @returns {Generator<[string, string]>}
 */
function* conditionPairs(conditions, nameOf) {
  for (const [field, member] of Object.entries(conditions)) {
    const name = nameOf(field);
    if (!isPlain(member)) {
      yield [name, queryText(member)];
      continue;
    }
    for (const [operator, value] of Object.entries(member)) {
      yield [`${name}[${operator}]`, operator === "in" ? Array.from(value, listedText).join(",") : queryText(value)];
    }
  }
}

/** @param {any} value */
function listedText(value) {
  const text = queryText(value);
  return text.includes(",") || text.startsWith('"') ? `"${text.replaceAll('"', '""')}"` : text;
}

/** @param {any} value */
function queryText(value) {
  if (!["string", "number", "boolean"].includes(typeof value)) {
    throw new TypeError(`expected a string, a number or a boolean, got ${shown(value)}`);
  }
  return String(value);
}

/**
 * Returns the token without surrounding whitespace, or null if nothing is left. Throws a TypeError whose message does
 * not reveal the token.
 * @param {any} token
 * @returns {string | null}
 */
function tokenOf(token) {
  if (token === null || token === undefined) return null;
  if (typeof token !== "string") throw new TypeError(`token: expected a string, got ${typeof token}`);
  const trimmed = token.trim();
  const wrong = NO_TOKEN_CHARACTER.exec(trimmed);
  if (wrong !== null) {
    const [found, place] = [JSON.stringify(wrong[0]), wrong.index + 1];
    throw new TypeError(`token: expected letters, digits and -._~+/= only, got ${found} at character ${place}`);
  }
  return trimmed || null;
}

/** Whether a value is a plain object and not, for example, an array, a Map or a Date. @param {any} value */
function isPlain(value) {
  return Object.prototype.toString.call(value) === "[object Object]";
}

/** @param {any} value */
function shown(value) {
  return Array.isArray(value) || isPlain(value) ? JSON.stringify(value) : String(value);
}

// --- when to reconnect

/** Decides when one client reconnects. */
class Pacer {
  #attempts = 0;
  #renewed = false;

  /** @param {Retry} retry @param {boolean} canRenew whether the token comes from a function */
  constructor(retry, canRenew) {
    this.retry = retry;
    this.canRenew = canRenew;
  }

  /**
   * Returns the seconds to wait before the next attempt. Throws Refused when the client must give up.
   * @param {Ending} ending
   */
  after({ code, detail, lastedSeconds }) {
    if (lastedSeconds >= this.retry.provenSeconds) {
      this.#attempts = 0;
      this.#renewed = false;
    }
    if (code === 401 || code === TOKEN_EXPIRED) {
      if (!this.canRenew || this.#renewed) throw new Unauthorized(code, detail);
      this.#renewed = true;
    } else if (code !== null && isFinal(code)) {
      throw refusal(code, detail);
    }
    const longest = Math.min(this.retry.firstSeconds * 2 ** this.#attempts, this.retry.longestSeconds);
    this.#attempts = Math.min(this.#attempts + 1, 16);
    return Math.random() * longest + (code === TOO_MANY_MESSAGES ? TOO_MANY_MESSAGES_SECONDS : 0);
  }
}

/**
 * Whether a message that the server rejected with this error code should be sent again. `isRepeatable`: the message may
 * be sent again even if the server has already acted on it.
 * @param {string} code
 */
function isTemporary(code, isRepeatable = true) {
  return NOT_HANDLED.has(code) || (code === "unavailable" && isRepeatable);
}

/** @param {number} code */
function isFinal(code) {
  // A code below 1000 is an HTTP status: 408, 425, 429 and all from 500 on are temporary.
  if (code < 1000) return code >= 400 && code < 500 && ![408, 425, 429].includes(code);
  return code === 1007 || code === 1009 || (code >= 4500 && code < 5000);
}

// --- one subscription

/**
 * One subscription across all its connections.
 *
 * - Everything up to `position` has been handed to the sink. The next connection resumes from there, so nothing is
 *   missed and nothing arrives twice.
 * - The events with the same `seq` (see `more`) are handed over together or, if the connection ends between them, not
 *   at all.
 * - A snapshot is handed over after its last page. Until then there is no position, and the next connection requests a
 *   new snapshot.
 * - Frames are handled only between the reply to `subscribe` and the end of the connection, and only under the name
 *   given in that `subscribe`. Every attempt uses a new name, so late frames of an earlier attempt are ignored.
 */
class Subscription {
  isPaused = false; // whether the subscription is paused because its reader is too slow
  /** @type {Position | null} */ #asked = null;
  #isAccepted = false;
  /** @type {Event[]} */ #group = [];
  #groupSize = 0;
  /** @type {Row[]} */ #rows = [];
  /** @type {Position | null} */ #rowsPosition = null;
  /** @type {Set<string>} */ #done = new Set();

  /** @param {SubscribeOptions} options @param {Sink} sink @param {Position | null} [since] */
  constructor(options, sink, since = null) {
    this.options = options;
    this.sink = sink;
    this.position = since;
  }

  /** Whether the server has accepted the subscription and no snapshot is under way. */
  get isLive() {
    return this.#isAccepted && this.position !== null;
  }

  /** Returns the `subscribe` message, without an id. @param {string} name the name of the subscription */
  subscribe(name) {
    this.cut();
    this.#asked = this.position;
    /** @type {Message} */
    const message = { action: "subscribe", topics: this.options.topics, as: name };
    const { filter, q, snapshot, bulk, deliver } = this.options;
    if (filter !== null && Object.keys(filter).length > 0) message.filter = filter;
    if (q) message.q = q;
    if (snapshot) message.snapshot = true;
    if (bulk !== null) message.bulk = bulk;
    if (deliver !== null) message.deliver = deliver;
    if (this.position !== null) {
      message.since = this.position.seq;
      message.epoch = this.position.epoch;
    }
    return message;
  }

  /** Handles the reply to `subscribe`. @param {number} seq @param {string} epoch */
  accepted(seq, epoch) {
    this.#isAccepted = true;
    if (this.#asked !== null) {
      // The subscription resumes at this position. If the server cannot resume there, its next frame is `resync`.
      this.position = this.#asked;
      this.sink.began(this.position);
    } else if (!this.options.snapshot) {
      this.position = { epoch, seq };
      this.sink.began(this.position);
    }
  }

  /** Drops incomplete groups and snapshots when the connection or subscription ends. They will be sent again. */
  cut() {
    this.#isAccepted = false;
    this.#dropGroup();
    this.#dropPages();
  }

  /**
   * Handles a frame of this subscription. Throws ProtocolViolation when the frames contradict each other.
   * @param {Message} frame @param {string} epoch @param {number} size
   */
  receive(frame, epoch, size) {
    if (!this.#isAccepted) return;
    if (frame.operation === "resync") {
      this.#dropGroup();
      this.#dropPages();
      const position = { epoch: frame.data.epoch, seq: frame.data.seq };
      this.position = this.options.snapshot ? null : position;
      this.sink.resynced({ operation: "resync", reason: String(frame.data.reason ?? ""), position });
    } else if (frame.operation === "snapshot") {
      this.#page(frame, { epoch, seq: frame.seq });
    } else if (typeof frame.seq === "number") {
      this.#event(frame, { epoch, seq: frame.seq }, size);
    } else if (frame.operation === "progress") {
      this.sink.take([eventOf(frame, this.position)], size);
    }
  }

  /** @param {Message} frame @param {Position} position */
  #page(frame, position) {
    if (this.#rowsPosition?.seq !== position.seq || this.#rowsPosition.epoch !== position.epoch) {
      this.#dropPages(); // a new snapshot replaces an unfinished one
      this.#rowsPosition = position;
    }
    for (const row of frame.data.items) this.#rows.push(row);
    if (frame.data.done) this.#done.add(frame.topic);
    if (this.options.topics.every((topic) => this.#done.has(topic))) {
      const rows = this.#rows;
      this.#dropGroup();
      this.#dropPages();
      this.position = position;
      this.sink.replaced(rows, position);
    }
  }

  /** @param {Message} frame @param {Position} position @param {number} size */
  #event(frame, position, size) {
    const before = this.position;
    if (before === null || this.#rowsPosition !== null) {
      throw new ProtocolViolation(PROTOCOL_ERROR, `event ${position.seq} arrived before the end of the snapshot`);
    }
    if (position.seq <= before.seq) return; // the event was already handed over
    const begun = this.#group[0]?.seq;
    if (begun !== undefined && begun !== position.seq) {
      throw new ProtocolViolation(PROTOCOL_ERROR, `event ${position.seq} arrived before the end of event ${begun}`);
    }
    const more = frame.more === true;
    this.#group.push(eventOf(frame, more ? before : position));
    this.#groupSize += size;
    if (more) return;
    const group = this.#group.filter((event) => DURABLE.has(event.operation));
    const groupSize = this.#groupSize;
    this.#dropGroup();
    this.position = position;
    if (group.length > 0) this.sink.take(group, groupSize);
  }

  #dropGroup() {
    this.#group = [];
    this.#groupSize = 0;
  }

  #dropPages() {
    this.#rows = [];
    this.#rowsPosition = null;
    this.#done = new Set();
  }
}

// --- the protocol across connections

/** The server was silent for two heartbeats. */
class ServerSilent extends Error {}

/**
 * The protocol of one client. The application opens subscriptions, makes calls and requests presence at any time. The
 * owner of the socket calls `connected`, `receive` and `lost`, sends what `messages` returns, and calls `beat` when the
 * time that the last `beat` returned has passed. Each connection starts with the server's welcome. Then everything that
 * the application has open is requested again, each subscription from its position. All times are in seconds.
 */
class Session {
  /** @type {string | null} */ epoch = null;
  /** @type {number | null} */ userId = null;
  isWelcome = false;
  /** @type {number | null} */ welcomedAt = null; // when the current or the last connection was welcomed
  /** @type {MarqueeError | null} */ error = null; // the error that ended the session
  /** @type {() => void} */ onMessage = () => {}; // called when there are messages to send or `beat` is due earlier
  #heartbeatSeconds = DEFAULT_HEARTBEAT_SECONDS;
  #heardAt = 0;
  /** @type {number | null} */ #pingedAt = null;
  /** @type {string | null} */ #token = null; // a token to be sent in the first message
  /** @type {Map<Subscription, string>} the open subscriptions with their current names */ #subscriptions = new Map();
  /** @type {Map<string, Subscription>} */ #byName = new Map();
  /** @type {Set<Presence>} */ #presences = new Set();
  /** @type {Set<Presence>} */ #confirmed = new Set();
  #isPresenceAsked = false;
  /** @type {Call[]} */ #waiting = [];
  /** @type {Map<number, Call>} */ #sent = new Map();
  /** @type {Map<number, Answer>} */ #replies = new Map();
  /** @type {{at: number, repeat: () => void}[]} */ #retries = [];
  #now = 0;
  #lastId = 0;
  #lastName = 0;
  /** @type {string[]} */ #outbox = [];

  // The following methods are called by the application.

  /** @param {Subscription} subscription */
  open(subscription) {
    if (this.error !== null) {
      subscription.sink.failed(this.error);
      return;
    }
    this.#subscriptions.set(subscription, "");
    this.#subscribe(subscription);
  }

  /** Ends a subscription. Its sink receives nothing further. @param {Subscription} subscription */
  close(subscription) {
    this.#unsubscribe(subscription);
    this.#subscriptions.delete(subscription);
  }

  /**
   * Unsubscribes temporarily and keeps the position. Until `resume`, the server's log keeps the events.
   * @param {Subscription} subscription
   */
  pause(subscription) {
    if (subscription.isPaused || !this.#subscriptions.has(subscription)) return;
    subscription.isPaused = true;
    this.#unsubscribe(subscription);
  }

  /** @param {Subscription} subscription */
  resume(subscription) {
    if (!subscription.isPaused || !this.#subscriptions.has(subscription)) return;
    subscription.isPaused = false;
    this.#subscribe(subscription);
  }

  /**
   * Sends a message as soon as there is a connection and, for a request, fewer than 16 requests are in flight. Throws
   * the same errors as `checked`.
   * @param {Call} call
   */
  call(call) {
    call.message = checked(call.message);
    if (this.error !== null) {
      call.reject(this.error);
      return;
    }
    this.#waiting.push(call);
    this.#sendCalls();
  }

  /**
   * Stops waiting for the reply to a call. A request that was already sent counts as in flight until its reply arrives.
   * @param {Call} call
   */
  forget(call) {
    this.#waiting = this.#waiting.filter((each) => each !== call);
    call.isRepeatable = false;
    call.isForgotten = true;
  }

  /** @param {Presence} presence */
  addPresence(presence) {
    if (this.error !== null) {
      presence.failed(this.error);
      return;
    }
    this.#presences.add(presence);
    this.#askPresence();
  }

  /** @param {Presence} presence */
  removePresence(presence) {
    this.#confirmed.delete(presence);
    if (this.#presences.delete(presence)) this.#askPresence();
  }

  /** Ends the session. All subscriptions, presences and calls receive the error. @param {MarqueeError} error */
  fail(error) {
    if (this.error !== null) return;
    this.error = error;
    this.#endConnection();
    const subscriptions = [...this.#subscriptions.keys()];
    const presences = [...this.#presences];
    const calls = [...this.#sent.values(), ...this.#waiting];
    this.#subscriptions.clear();
    this.#presences.clear();
    this.#sent.clear();
    this.#waiting = [];
    for (const subscription of subscriptions) subscription.sink.failed(error);
    for (const presence of presences) presence.failed(error);
    for (const call of calls) call.reject(error);
  }

  // The following methods are called by the owner of the socket.

  /** @param {number} now @param {string | null} token sent in the first message; null if the handshake carried it */
  connected(now, token) {
    this.#now = this.#heardAt = now;
    this.#pingedAt = null;
    this.#token = token;
    this.#heartbeatSeconds = DEFAULT_HEARTBEAT_SECONDS;
    this.welcomedAt = null;
  }

  /**
   * Handles a frame. Throws ProtocolViolation if the connection is no longer usable and must be replaced.
   * @param {string} received @param {number} now
   */
  receive(received, now) {
    this.#now = this.#heardAt = now;
    this.#pingedAt = null;
    try {
      const frame = JSON.parse(received);
      const unsafe = unsafeNumberIn(received);
      if (unsafe === null) this.#frame(frame, received.length);
      else this.#refuse(frame, new UnsafeNumber(unsafe));
    } catch (error) {
      if (error instanceof ProtocolViolation) throw error;
      throw new ProtocolViolation(PROTOCOL_ERROR, `${error} in ${received.slice(0, 200)}`);
    }
  }

  /**
   * Handles the end of the connection. Of the calls already sent, those that are repeatable and have attempts left wait
   * for the next connection; the others fail. Calls not yet sent keep waiting.
   */
  lost() {
    this.#endConnection();
    const sent = [...this.#sent.values()];
    this.#sent.clear();
    const again = sent.filter((call) => call.isRepeatable && call.attempts < MAX_ATTEMPTS);
    this.#waiting.unshift(...again);
    for (const call of sent) {
      if (!again.includes(call)) {
        const detail = "the connection ended before the reply; the server may have acted on the message";
        call.reject(new ConnectionLost(detail));
      }
    }
  }

  /** Returns the messages to send, and forgets them. */
  messages() {
    const messages = this.#outbox;
    this.#outbox = [];
    return messages;
  }

  /**
   * Does the work that is due, and returns the seconds until `beat` must be called again. Sends a ping if the server
   * has been silent for one heartbeat. Throws ServerSilent after two silent heartbeats.
   * @param {number} now
   */
  beat(now) {
    this.#now = now;
    const due = this.#retries.filter(({ at }) => at <= now);
    this.#retries = this.#retries.filter(({ at }) => at > now);
    for (const { repeat } of due) repeat();
    if (!this.isWelcome) {
      if (now - this.#heardAt >= WELCOME_SECONDS) throw new ServerSilent();
      return this.#heardAt + WELCOME_SECONDS - now;
    }
    let since = this.#pingedAt ?? this.#heardAt;
    if (now - since >= this.#heartbeatSeconds) {
      if (this.#pingedAt !== null) throw new ServerSilent();
      this.#pingedAt = since = now;
      this.#ask({ action: "ping" }, () => {});
    }
    return Math.min(since + this.#heartbeatSeconds, ...this.#retries.map(({ at }) => at)) - now;
  }

  #endConnection() {
    this.isWelcome = false;
    this.#outbox = [];
    this.#replies.clear();
    this.#retries = [];
    this.#confirmed.clear();
    this.#isPresenceAsked = false;
    this.#byName.clear();
    for (const call of this.#waiting) call.isDelayed = false;
    for (const subscription of this.#subscriptions.keys()) {
      this.#subscriptions.set(subscription, "");
      subscription.cut();
    }
  }

  /**
   * Repeats a message REPEAT_SECONDS after a temporary error. If the connection ends first, nothing happens, because
   * the next connection sends everything again.
   * @param {() => void} repeat
   */
  #later(repeat) {
    this.#retries.push({ at: this.#now + REPEAT_SECONDS, repeat });
    this.onMessage(); // the owner must call `beat` earlier
  }

  /** @param {Message} message @param {Answer} answer */
  #ask(message, answer) {
    const id = ++this.#lastId;
    this.#replies.set(id, answer);
    this.#outbox.push(JSON.stringify({ id, ...message }));
    this.onMessage();
    return id;
  }

  /** @param {Message} frame @param {number} size */
  #frame(frame, size) {
    if ("reply_to" in frame) {
      if (frame.reply_to === null && frame.ok === false) {
        // The server does not name the unreadable message, whose sender would wait forever without a reconnect.
        throw new ProtocolViolation(PROTOCOL_ERROR, `the server could not read a message: ${text(frame.error)}`);
      }
      const answer = this.#replies.get(frame.reply_to);
      this.#replies.delete(frame.reply_to);
      answer?.(frame);
    } else if (frame.operation === "welcome") {
      this.#welcome(frame.data);
    } else if (frame.operation === "presence") {
      for (const presence of [...this.#confirmed]) {
        if (presence.topics.includes(frame.topic)) presence.changed(frame.topic, frame.data);
      }
    } else {
      if (frame.operation === "resync") this.epoch = frame.data.epoch;
      const subscription = this.#byName.get(frame.subscription);
      if (subscription !== undefined && this.epoch !== null) subscription.receive(frame, this.epoch, size);
    }
  }

  /**
   * Handles a frame with an unsafe number: ends the call or the subscription that the frame belongs to, or the client
   * if the frame concerns the whole client.
   * @param {Message} frame @param {UnsafeNumber} error
   */
  #refuse(frame, error) {
    const call = this.#sent.get(frame.reply_to);
    const subscription = this.#byName.get(frame.subscription);
    if (call !== undefined) {
      this.#sent.delete(frame.reply_to);
      this.#replies.delete(frame.reply_to);
      call.reject(error);
      this.#sendCalls();
    } else if (subscription !== undefined) {
      this.close(subscription);
      subscription.sink.failed(error);
    } else if (frame.operation === "welcome" || frame.operation === "presence" || this.#replies.has(frame.reply_to)) {
      this.fail(error);
    }
  }

  /** @param {Message} data */
  #welcome(data) {
    if (data.protocol !== PROTOCOL) {
      const detail = `the server speaks protocol version ${data.protocol}, this client speaks version ${PROTOCOL}`;
      this.fail(new ProtocolViolation(PROTOCOL_ERROR, detail));
      return;
    }
    this.epoch = data.epoch;
    this.userId = data.user_id ?? null;
    if (data.heartbeat_seconds > 0) this.#heartbeatSeconds = data.heartbeat_seconds;
    const token = this.#token;
    if (token === null) {
      this.#begin();
      return;
    }
    this.#ask({ action: "auth", token }, (reply) => {
      if (!reply.ok) {
        // The server closes the socket with 4501, unless it was temporarily unable to check the token.
        if (isTemporary(reply.error.code)) throw new ProtocolViolation(PROTOCOL_ERROR, reply.error.detail);
        return;
      }
      this.userId = reply.data.user_id ?? null;
      this.#begin();
    });
  }

  #begin() {
    this.isWelcome = true;
    this.welcomedAt = this.#now;
    this.onMessage(); // the time at which `beat` is due has changed
    for (const subscription of this.#subscriptions.keys()) this.#subscribe(subscription);
    this.#askPresence();
    this.#sendCalls();
  }

  /** @param {Subscription} subscription */
  #subscribe(subscription) {
    if (!this.isWelcome || subscription.isPaused) return;
    const name = `s${++this.#lastName}`;
    this.#subscriptions.set(subscription, name);
    this.#byName.set(name, subscription);
    this.#ask(subscription.subscribe(name), (reply) => {
      if (this.#byName.get(name) !== subscription) return; // the subscription was closed or paused
      if (reply.ok) {
        subscription.accepted(reply.data.seq, /** @type {string} */ (this.epoch));
        return;
      }
      this.#byName.delete(name);
      this.#subscriptions.set(subscription, "");
      if (isTemporary(reply.error.code)) {
        this.#later(() => {
          if (this.#subscriptions.get(subscription) === "") this.#subscribe(subscription);
        });
      } else {
        this.#subscriptions.delete(subscription);
        subscription.sink.failed(errorIn(reply));
      }
    });
  }

  /** @param {Subscription} subscription */
  #unsubscribe(subscription) {
    const name = this.#subscriptions.get(subscription);
    if (name === undefined) return;
    this.#subscriptions.set(subscription, "");
    subscription.cut();
    if (this.#byName.delete(name)) this.#ask({ action: "unsubscribe", subscription: name }, () => {});
  }

  #sendCalls() {
    while (this.isWelcome) {
      // While the limit of requests in flight is reached, other messages overtake the waiting requests.
      const isFull = [...this.#sent.values()].filter(isRequest).length >= MAX_REQUESTS_IN_FLIGHT;
      const index = this.#waiting.findIndex((each) => !each.isDelayed && !(isFull && isRequest(each)));
      const call = this.#waiting[index];
      if (call === undefined) return;
      this.#waiting.splice(index, 1);
      call.attempts += 1;
      const id = this.#ask(call.message, (reply) => {
        this.#sent.delete(reply.reply_to);
        if (reply.ok === false) this.#refused(call, errorIn(reply));
        else call.resolve(reply);
        this.#sendCalls();
      });
      this.#sent.set(id, call);
    }
  }

  /** @param {Call} call @param {ServerError} error */
  #refused(call, error) {
    const isRepeatable = call.isRepeatable || !isRequest(call);
    if (!isTemporary(error.code, isRepeatable) || call.isForgotten || call.attempts >= MAX_ATTEMPTS) {
      call.reject(error);
      return;
    }
    call.isDelayed = true;
    this.#waiting.unshift(call);
    this.#later(() => {
      call.isDelayed = false;
      this.#sendCalls();
    });
  }

  /** Requests the presence of all topics in one message, which replaces the previous request on the server. */
  #askPresence() {
    if (!this.isWelcome) return;
    const asking = [...this.#presences];
    const topics = [...new Set(asking.flatMap((presence) => presence.topics))].sort();
    if (topics.length === 0 && !this.#isPresenceAsked) return;
    this.#isPresenceAsked = true;
    this.#ask({ action: "presence", topics }, (reply) => {
      const present = asking.filter((presence) => this.#presences.has(presence));
      if (reply.ok) {
        for (const presence of present) {
          this.#confirmed.add(presence);
          presence.loaded(reply.data);
        }
        return;
      }
      if (isTemporary(reply.error.code)) {
        if (present.length > 0) this.#later(() => this.#askPresence());
        return;
      }
      const refused = present.filter((presence) => !this.#confirmed.has(presence));
      for (const presence of refused) {
        this.#presences.delete(presence);
        presence.failed(errorIn(reply));
      }
      if (refused.length > 0 && this.#presences.size > 0) this.#askPresence();
    });
  }
}

/** @param {Call} call */
const isRequest = (call) => call.message.action === "request";

/** @param {Message} reply */
const errorIn = ({ error }) => new ServerError(error.code, error.detail);

// --- what the application reads

/**
 * A queue of items between the socket, which must never wait, and the application, which may wait. The owner of the
 * queue limits its length.
 * @template Item
 */
class Queue {
  /** @type {Item[]} */ items = [];
  /** @type {MarqueeError | null} */ #end = null;
  /** @type {(() => void)[]} */ #waiting = [];

  /** @param {Iterable<Item>} items */
  put(items) {
    for (const item of items) this.items.push(item);
    this.#wake();
  }

  /** Replaces all waiting items. @param {Iterable<Item>} items */
  replace(items) {
    this.items = [];
    this.put(items);
  }

  /** Ends the queue. The error is thrown after the last item. @param {MarqueeError} error */
  end(error) {
    this.#end ??= error;
    this.#wake();
  }

  /**
   * Yields the items until the queue has ended. Throws the error that ended it, unless that was a `close`.
   * @returns {AsyncGenerator<Item, void, void>}
   */
  async *[Symbol.asyncIterator]() {
    for (;;) {
      if (this.items.length > 0) yield /** @type {Item} */ (this.items.shift());
      else if (this.#end instanceof ClientClosed) return;
      else if (this.#end !== null) throw this.#end;
      else await new Promise((resolve) => this.#waiting.push(() => resolve(undefined)));
    }
  }

  #wake() {
    const waiting = this.#waiting;
    this.#waiting = [];
    for (const wake of waiting) wake();
  }
}

/**
 * Opens a watch, a view or a presence when it is first used. `passed` resolves when the watch, view or presence is
 * ready, and rejects with the error that ended it.
 */
class Gate {
  #enter;
  #isEntered = false;

  /** @param {() => void} enter */
  constructor(enter) {
    this.#enter = enter;
    /** @type {() => void} */ this.open = () => {};
    /** @type {(error: MarqueeError) => void} */ this.fail = () => {};
    /** @type {Promise<void>} */
    this.passed = new Promise((resolve, reject) => {
      this.open = resolve;
      this.fail = reject;
    });
    this.passed.catch(() => {}); // prevents an unhandled rejection when no caller waits
  }

  enter() {
    if (this.#isEntered) return;
    this.#isEntered = true;
    this.#enter();
  }
}

/**
 * The events of some topics: each once, in order, across reconnects. For one reader only.
 *
 * A watch begins when it is iterated or `ready` is called, and ends when the loop over it ends. It yields `Event`
 * objects, and a `Resync` where events are missing because the server no longer has them.
 * @implements {AsyncIterable<Event | Resync>}
 */
export class Watch {
  #session;
  #subscription;
  #gate;
  /** @type {Queue<Event | Resync>} */ #queue = new Queue();
  /** @type {{events: number, characters: number}[]} the size of each batch in the queue */ #sizes = [];
  #characters = 0;

  /** @param {Session} session @param {() => void} begin @param {SubscribeOptions} options @param {Position | null} since */
  constructor(session, begin, options, since) {
    this.#session = session;
    /**
     * The position of the last item that the loop has processed. It advances when the loop requests the next item. If
     * the loop ends while it processes an item, by an exception or by `break`, a watch that resumes from this position
     * yields the item again.
     * @type {Position | null}
     */
    this.position = since;
    const subscription = new Subscription(options, this.#sink(), since);
    this.#subscription = subscription;
    this.#gate = new Gate(() => {
      begin();
      session.open(subscription);
    });
  }

  /** Waits until the server has accepted the subscription, so that all later events arrive. */
  async ready() {
    this.#gate.enter();
    await this.#gate.passed;
  }

  /** Ends the watch. To continue later, open a watch with `{since: watch.position}`. */
  close() {
    this.#session.close(this.#subscription);
    this.#fail(new ClientClosed("the watch is closed"));
  }

  /** @returns {AsyncGenerator<Event | Resync, void, void>} */
  async *[Symbol.asyncIterator]() {
    this.#gate.enter();
    try {
      for await (const item of this.#queue) {
        this.#accountForRead();
        yield item;
        // Advance only now, so that a watch resumed after an exception in the loop repeats the item.
        this.position = item.position ?? this.position;
      }
    } finally {
      this.close();
    }
  }

  /** @param {MarqueeError} error */
  #fail(error) {
    this.#queue.end(error);
    this.#gate.fail(error);
  }

  #accountForRead() {
    const first = this.#sizes[0];
    if (first !== undefined && --first.events === 0) {
      this.#sizes.shift();
      this.#characters -= first.characters;
    }
    if (this.#queue.items.length <= QUEUED_EVENTS / 2 && this.#characters <= QUEUED_CHARACTERS / 2) {
      this.#session.resume(this.#subscription);
    }
  }

  /** @returns {Sink} */
  #sink() {
    return {
      began: (position) => {
        if (this.position === null) this.position = position;
        this.#gate.open();
      },
      take: (events, characters) => {
        this.#queue.put(events);
        this.#sizes.push({ events: events.length, characters });
        this.#characters += characters;
        if (this.#queue.items.length >= QUEUED_EVENTS || this.#characters >= QUEUED_CHARACTERS) {
          this.#session.pause(this.#subscription);
        }
      },
      resynced: (resync) => {
        this.#queue.put([resync]);
        this.#sizes.push({ events: 1, characters: 0 });
      },
      replaced: () => {},
      failed: (error) => this.#fail(error),
    };
  }
}

/**
 * The rows of a topic by id, as of `position`. With a filter, only the rows that match the filter.
 *
 * Reading never waits and never shows part of a transaction. While the client is disconnected or a new snapshot is
 * arriving, the rows stay as they were at the last `position`, and `isLive` is false. After an error that ends the client or the
 * view, reading throws that error, because the rows would be outdated. Do not modify the rows: they belong to the view.
 * @implements {AsyncIterable<Change>}
 */
export class View {
  #session;
  #subscription;
  #gate;
  /** @type {Map<number | string, Row>} */ #rows = new Map();
  /** @type {Set<Queue<Change>>} */ #queues = new Set();
  /** @type {MarqueeError | null} */ #ended = null;

  /** @param {Session} session @param {() => void} begin @param {SubscribeOptions} options */
  constructor(session, begin, options) {
    this.#session = session;
    const subscription = new Subscription(options, this.#sink());
    this.#subscription = subscription;
    this.#gate = new Gate(() => {
      begin();
      session.open(subscription);
    });
    /** @type {Position | null} */
    this.position = null;
  }

  /** Waits for the first snapshot. Throws the error that ended the view. */
  async ready() {
    this.#gate.enter();
    await this.#gate.passed;
  }

  /** Whether the view is connected and complete, so that only events in transit can be missing. */
  get isLive() {
    return this.#subscription.isLive && this.#ended === null;
  }

  /** Stops updating the view. Its rows can still be read, as of `position`. */
  close() {
    this.#session.close(this.#subscription);
    this.#end(new ClientClosed("the view is closed"));
  }

  get size() {
    return this.#readable().size;
  }

  /** @param {number | string} id */
  get(id) {
    return this.#readable().get(id);
  }

  /** @param {number | string} id */
  has(id) {
    return this.#readable().has(id);
  }

  keys() {
    return this.#readable().keys();
  }

  values() {
    return this.#readable().values();
  }

  entries() {
    return this.#readable().entries();
  }

  [Symbol.iterator]() {
    return this.entries();
  }

  /**
   * Iterates over the changes from now on. Several loops may run concurrently. In a loop that is too slow, a `reset`
   * replaces the waiting changes.
   * @returns {AsyncGenerator<Change, void, void>}
   */
  changes() {
    this.#gate.enter();
    /** @type {Queue<Change>} */
    const queue = new Queue();
    if (this.#ended !== null) queue.end(this.#ended);
    this.#queues.add(queue);
    return this.#read(queue);
  }

  /** @param {Queue<Change>} queue @returns {AsyncGenerator<Change, void, void>} */
  async *#read(queue) {
    try {
      yield* queue;
    } finally {
      this.#queues.delete(queue);
    }
  }

  [Symbol.asyncIterator]() {
    return this.changes();
  }

  #readable() {
    if (this.#ended !== null && !(this.#ended instanceof ClientClosed)) throw this.#ended;
    return this.#rows;
  }

  /** @param {MarqueeError} error */
  #end(error) {
    this.#ended ??= error;
    this.#gate.fail(error);
    for (const queue of this.#queues) queue.end(error);
  }

  /** Applies all events or none: a malformed event throws before any row is changed. @param {Event[]} events */
  #apply(events) {
    /** @type {[number | string, Row | null][]} */
    const steps = [];
    for (const { operation, data } of events) {
      if (operation === "add" || operation === "update") steps.push([data.id, data]);
      else if (operation === "delete") steps.push([data.id, null]);
      else if (operation === "add_bulk" || operation === "update_bulk") {
        for (const row of data.items) steps.push([row.id, row]);
      } else if (operation === "delete_bulk") for (const id of data.ids) steps.push([id, null]);
    }
    /** @type {Change[]} */
    const changes = [];
    for (const [id, row] of steps) {
      const old = this.#rows.get(id) ?? null;
      if (row !== null) {
        this.#rows.set(id, row);
        changes.push({ kind: old === null ? "add" : "update", id, row, old });
      } else if (this.#rows.delete(id)) {
        changes.push({ kind: "delete", id, row, old });
      }
    }
    return changes;
  }

  /** @returns {Sink} */
  #sink() {
    /** @type {Change} */
    const reset = { kind: "reset", id: null, row: null, old: null };
    return {
      began: () => {}, // after a resume, the rows are still correct
      take: (events) => {
        const changes = this.#apply(events);
        const last = events[events.length - 1];
        if (last !== undefined && last.seq !== null) this.position = last.position;
        for (const queue of this.#queues) {
          if (queue.items.length + changes.length > QUEUED_CHANGES) queue.replace([reset]);
          else queue.put(changes);
        }
      },
      resynced: () => {}, // the rows stay until the snapshot that follows is complete
      replaced: (rows, position) => {
        this.#rows = new Map(rows.map((row) => [row.id, row]));
        this.position = position;
        this.#gate.open();
        for (const queue of this.#queues) queue.replace([reset]);
      },
      failed: (error) => this.#end(error),
    };
  }
}

/**
 * Who watches the topics, as last reported by the server: the number of sockets, and the users signed in on these
 * sockets (an anonymous client sees no users).
 * @implements {AsyncIterable<PresenceChange>}
 */
export class Presence {
  #session;
  #gate;
  /** @type {Map<string, Audience>} */ #audiences = new Map();
  /** @type {Queue<PresenceChange>} */ #queue = new Queue();

  /** @param {Session} session @param {() => void} begin @param {string[]} topics */
  constructor(session, begin, topics) {
    this.topics = topics;
    this.#session = session;
    this.#gate = new Gate(() => {
      begin();
      session.addPresence(this);
    });
  }

  /** Waits for the first state. Throws the error that ended the presence. */
  async ready() {
    this.#gate.enter();
    await this.#gate.passed;
  }

  /** @param {string} topic */
  get(topic) {
    return this.#audiences.get(topic);
  }

  close() {
    this.#session.removePresence(this);
    this.failed(new ClientClosed("the presence is closed"));
  }

  /** Yields joins and leaves as they happen. For one reader only. @returns {AsyncGenerator<PresenceChange, void, void>} */
  async *changes() {
    this.#gate.enter();
    yield* this.#queue;
  }

  [Symbol.asyncIterator]() {
    return this.changes();
  }

  /** @param {PresenceChange} change */
  #put(change) {
    if (this.#queue.items.length >= QUEUED_EVENTS) {
      const audiences = [...this.#audiences];
      this.#queue.replace(audiences.map(([topic, { count }]) => ({ topic, count, joined: [], left: [], isReset: true })));
    } else this.#queue.put([change]);
  }

  /** Called by the session with the state that it has requested. @param {Message} state */
  loaded(state) {
    for (const topic of this.topics) {
      const { count, users } = state[topic];
      /** @type {Audience} */
      const audience = { count, users: new Map(users.map((/** @type {User} */ user) => [user.user_id, user])) };
      const old = this.#audiences.get(topic);
      this.#audiences.set(topic, audience);
      if (old !== undefined && !sameAudience(old, audience)) {
        this.#put({ topic, count, joined: [], left: [], isReset: true });
      }
    }
    this.#gate.open();
  }

  /** Called by the session when users join or leave a topic. @param {string} topic @param {Message} data */
  changed(topic, data) {
    const users = new Map(this.#audiences.get(topic)?.users);
    for (const user of data.left ?? []) users.delete(user.user_id);
    for (const user of data.joined ?? []) users.set(user.user_id, user);
    this.#audiences.set(topic, { count: data.count, users });
    this.#put({ topic, count: data.count, joined: data.joined ?? [], left: data.left ?? [], isReset: false });
  }

  /** Called by the session with the error that ends the presence. @param {MarqueeError} error */
  failed(error) {
    this.#gate.fail(error);
    this.#queue.end(error);
  }
}

/** @param {Audience} one @param {Audience} other */
function sameAudience(one, other) {
  return (
    one.count === other.count &&
    one.users.size === other.users.size &&
    [...one.users].every(([id, user]) => other.users.get(id)?.connections === user.connections)
  );
}

// --- the socket

/**
 * A connection to a Marquee service, shared by any number of watches, views and requests. It connects when it is first
 * used, and stays connected until `close`. When it ends with an error, its watches, views, presences and requests throw
 * that error.
 */
export class Client {
  #url;
  #token;
  #SocketClass;
  #pacer;
  #session = new Session();
  #isBegun = false;
  /** @type {Socket | null} */ #socket = null;
  #isOpen = false; // whether the handshake of #socket is complete
  #wasRefused = false; // whether the last attempt failed before the end of the handshake
  /** @type {string | null} */ #trouble = null;
  #failures = 0; // consecutive attempts without a welcome
  /** @type {ReturnType<typeof setTimeout> | undefined} */ #timer;

  /**
   * @param {string | URL} url a URL such as `ws://127.0.0.1:8000/ws`
   * @param {object} [options]
   * @param {Token} [options.token] an access token, or a function (async or not) that returns a token or null. The
   *   function is called before every connection. It may throw `Unauthorized` to end the client; after any other error
   *   the client tries again later. If the token is malformed, or the server rejects it, the function is called once
   *   more; if the second token is not accepted either, the client ends with `Unauthorized`. Whitespace around a token
   *   is removed. Without a token, or with an empty one, the client is anonymous.
   * @param {SocketClass} [options.WebSocket] required where `WebSocket` is not global: `import { WebSocket } from "ws"`
   * @param {Partial<Retry>} [options.retry]
   *
   * The client and its methods validate their arguments immediately and throw TypeError or RangeError.
   */
  constructor(url, { token = null, WebSocket = undefined, retry = {} } = {}) {
    this.#url = withSmallDefault(url);
    this.#token = typeof token === "function" ? token : tokenOf(token);
    const found = WebSocket ?? /** @type {SocketClass | undefined} */ (/** @type {any} */ (globalThis).WebSocket);
    if (found === undefined) {
      throw new TypeError("expected a WebSocket: pass {WebSocket}, or run Node 20 with --experimental-websocket");
    }
    this.#SocketClass = found;
    const paces = { firstSeconds: 0.25, longestSeconds: 15, provenSeconds: 5, ...retry };
    this.#pacer = new Pacer(paces, typeof token === "function");
    this.#session.onMessage = () => this.#flush();
  }

  get isConnected() {
    return this.#session.isWelcome;
  }

  /** Why the last connection or attempt failed, as text; null while connected and before the first failure. */
  get trouble() {
    return this.isConnected ? null : this.#trouble;
  }

  /** The id of the user that the last connection was authenticated as; null if anonymous. */
  get userId() {
    return this.#session.userId;
  }

  /**
   * Returns a watch: the events of some topics, from now on or after `since`.
   * @param {string | Iterable<string>} topics
   * @param {{filter?: object, q?: string, bulk?: "items" | "summary", deliver?: "all" | {latest_every_ms: number},
   *   since?: Position | number | string | null, epoch?: string}} [options]
   */
  watch(topics, { since, epoch, ...options } = {}) {
    const wanted = optionsOf({ ...options, topics: topicsOf(topics), snapshot: false });
    return new Watch(this.#session, () => this.#begin(), wanted, positionOf(since, epoch));
  }

  /**
   * Returns a view: the rows of a topic, kept up to date.
   * @param {string} topic
   * @param {{filter?: object, q?: string, deliver?: "all" | {latest_every_ms: number}}} [options]
   */
  view(topic, { filter, q, deliver } = {}) {
    if (typeof topic !== "string") {
      throw new TypeError(`topic: expected one topic, such as "movies", got ${shown(topic)}`);
    }
    const wanted = optionsOf({ topics: topicsOf(topic), snapshot: true, filter, q, deliver });
    return new View(this.#session, () => this.#begin(), wanted);
  }

  /** Returns the presence of some topics: who watches them. @param {string | Iterable<string>} topics */
  presence(topics) {
    return new Presence(this.#session, () => this.#begin(), topicsOf(topics));
  }

  /**
   * Sends a REST request over the socket, as the socket's user, and returns the response, whatever its status.
   *
   * The call waits until there is a connection and fewer than 16 requests are in flight. If the connection ends before
   * the response, the request is sent again if that is safe: GET, HEAD, PUT and DELETE without `If-Match`, and every
   * request with an idempotency key (a repeated DELETE may find nothing left to delete). Otherwise throws
   * ConnectionLost.
   *
   * Throws ServerError if the server could not handle the message, TypeError if the request cannot be written as JSON,
   * RangeError if it is too large or contains an unsafe integer, and TimedOut after `timeoutSeconds`, which include the
   * time spent waiting to send. After a timeout, the server may still have carried out the request.
   * @param {string} method
   * @param {string} path
   * @param {{body?: any, headers?: Record<string, string>, idempotencyKey?: string,
   *   timeoutSeconds?: number | null}} [options]
   * @returns {Promise<Response>}
   */
  async request(method, path, { body, headers = {}, idempotencyKey, timeoutSeconds } = {}) {
    const verb = method.toUpperCase();
    const sent = { ...headers, ...(idempotencyKey === undefined ? {} : { "Idempotency-Key": idempotencyKey }) };
    const names = Object.keys(sent).map((name) => name.toLowerCase());
    const isIdempotent = ["GET", "HEAD", "PUT", "DELETE"].includes(verb) && !names.includes("if-match");
    /** @type {Message} */
    const message = { action: "request", method: verb, path, headers: sent };
    if (body !== undefined && body !== null) message.body = body;
    const reply = await this.#call(message, isIdempotent || names.includes("idempotency-key"), timeoutSeconds);
    /** @type {Record<string, string>} */
    const received = {};
    for (const [name, value] of Object.entries(reply.headers ?? {})) received[name.toLowerCase()] = String(value);
    return { status: reply.status, headers: received, body: reply.body ?? null };
  }

  /** Returns the round-trip time to the server in seconds. Throws ConnectionLost. */
  async ping() {
    const asked = now();
    await this.#call({ action: "ping" }, false);
    return now() - asked;
  }

  /**
   * Sends a new token without reconnecting. Later connections use the new token, too, unless the client gets its tokens
   * from a function. Throws ServerError.
   * @param {string} token
   * @returns {Promise<{user_id: number, group: string}>}
   */
  async authenticate(token) {
    const wanted = tokenOf(token);
    if (wanted === null) throw new TypeError("token: expected a token, got none");
    const reply = await this.#call({ action: "auth", token: wanted }, false);
    if (typeof this.#token !== "function") this.#token = wanted;
    this.#session.userId = reply.data.user_id ?? null;
    return reply.data;
  }

  /** Closes the client. Loops over watches and changes end; requests throw ClientClosed. */
  close() {
    this.#fail(new ClientClosed("the client is closed"));
  }

  /**
   * @param {Message} message
   * @param {boolean} isRepeatable
   * @param {number | null} [timeoutSeconds]
   * @returns {Promise<Message>}
   */
  async #call(message, isRepeatable, timeoutSeconds) {
    this.#begin();
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    let timer;
    try {
      return await new Promise((resolve, reject) => {
        /** @type {Call} */
        const call = { message, resolve, reject, isRepeatable, attempts: 0, isDelayed: false, isForgotten: false };
        this.#session.call(call);
        if (timeoutSeconds === undefined || timeoutSeconds === null) return;
        timer = setTimeout(() => {
          this.#session.forget(call);
          reject(new TimedOut(`no reply within ${timeoutSeconds} s; the server may have acted on the request`));
        }, Math.min(timeoutSeconds * 1000, LONGEST_TIMER_MS));
      });
    } finally {
      clearTimeout(timer);
    }
  }

  #begin() {
    if (this.#isBegun || this.#session.error !== null) return;
    this.#isBegun = true;
    void this.#connect();
  }

  async #connect() {
    /** @type {Shown} */
    let found;
    try {
      found = typeof this.#token === "function" ? await this.#token() : this.#token;
    } catch (error) {
      // The service that issues tokens may be down as well, so the client tries again.
      if (error instanceof MarqueeError) this.#fail(error);
      else this.#again({ code: null, detail: `the token function failed: ${error}`, lastedSeconds: 0 });
      return;
    }
    if (this.#session.error !== null) return;
    /** @type {string | null} */
    let token;
    try {
      token = tokenOf(found);
    } catch (error) {
      this.#again({ code: TOKEN_EXPIRED, detail: String(error), lastedSeconds: 0 });
      return;
    }
    // Browsers do not reveal why a handshake was refused. So after a refusal, the token is sent in the first message,
    // because the reply to that message says whether the token was the reason. Tokens that a subprotocol cannot carry
    // are also sent in the first message.
    const first = token !== null && (this.#wasRefused || /[/=]/.test(token)) ? token : null;
    /** @type {Socket} */
    let socket;
    try {
      socket = new this.#SocketClass(this.#url, token !== null && first === null ? ["bearer", token] : []);
    } catch (error) {
      this.#fail(token === null ? new MarqueeError(String(error)) : new Unauthorized(TOKEN_EXPIRED, String(error)));
      return;
    }
    this.#socket = socket;
    this.#isOpen = false;
    this.#wasRefused = true;
    this.#timer = setTimeout(() => this.#ended(socket, null, NO_HANDSHAKE), OPEN_SECONDS * 1000);
    socket.onopen = () => {
      if (this.#socket !== socket) return;
      this.#isOpen = true;
      this.#wasRefused = false;
      this.#session.connected(now(), first);
      this.#beat(socket);
    };
    socket.onmessage = (/** @type {{data: any}} */ { data }) => {
      if (this.#socket !== socket || typeof data !== "string") return;
      try {
        this.#session.receive(data, now());
      } catch (error) {
        this.#ended(socket, null, String(error));
        return;
      }
      if (this.#session.error !== null) this.#fail(this.#session.error);
    };
    socket.onerror = (/** @type {{message?: string}} */ { message }) => {
      // Node 20 fires no `close` event after a refused handshake, and the package `ws` reports the status only here.
      if (this.#isOpen) return;
      const status = /^Unexpected server response: ([0-9]{3})$/.exec(message ?? "");
      if (status === null) this.#ended(socket, null, message ? `${NO_HANDSHAKE} (${message})` : NO_HANDSHAKE);
      else this.#ended(socket, Number(status[1]), "the handshake was refused");
    };
    socket.onclose = (/** @type {{code: number, reason: any}} */ { code, reason }) => {
      if (this.#isOpen) this.#ended(socket, code, String(reason));
      else this.#ended(socket, null, NO_HANDSHAKE);
    };
  }

  /** Runs `Session.beat`, and schedules its next run. @param {Socket} socket */
  #beat(socket) {
    clearTimeout(this.#timer);
    try {
      const seconds = this.#session.beat(now());
      this.#timer = setTimeout(() => this.#beat(socket), Math.max(0, seconds) * 1000);
    } catch (error) {
      this.#ended(socket, null, error instanceof ServerSilent ? "the server does not respond" : String(error));
    }
  }

  #flush() {
    const socket = this.#socket;
    if (socket === null || !this.#isOpen) return;
    for (const message of this.#session.messages()) socket.send(message);
    queueMicrotask(() => {
      if (this.#socket === socket) this.#beat(socket);
    });
  }

  /** @param {Socket} socket @param {number | null} code @param {string} detail */
  #ended(socket, code, detail) {
    if (this.#socket !== socket) return;
    this.#drop();
    const welcomed = this.#session.welcomedAt;
    this.#session.lost();
    this.#again({ code, detail, lastedSeconds: this.#isOpen && welcomed !== null ? now() - welcomed : 0 });
  }

  /** @param {Ending} ending */
  #again(ending) {
    if (this.#session.error !== null) return;
    try {
      this.#timer = setTimeout(() => void this.#connect(), this.#pacer.after(ending) * 1000);
      this.#record(ending);
    } catch (error) {
      this.#fail(error instanceof MarqueeError ? error : new MarqueeError(String(error)));
    }
  }

  /** @param {Ending} ending */
  #record({ code, detail, lastedSeconds }) {
    this.#trouble = code === null ? detail : `${code}: ${detail}`;
    this.#failures = lastedSeconds === 0 ? this.#failures + 1 : 0;
    if (this.#failures !== WARNED_ATTEMPTS) return;
    const address = this.#url.split("?")[0];
    console.warn(`marquee: no connection to ${address} after ${this.#failures} attempts; still trying: ${this.#trouble}`);
  }

  /** @param {MarqueeError} error */
  #fail(error) {
    this.#session.fail(error);
    this.#drop();
  }

  /** Closes the socket and ignores its later events. */
  #drop() {
    clearTimeout(this.#timer);
    const socket = this.#socket;
    this.#socket = null;
    try {
      socket?.close();
    } catch {
      // The package `ws` throws when the socket is still connecting.
    }
  }
}

function now() {
  return performance.now() / 1000;
}

/**
 * Returns the URL with parameters for a small default subscription, because the client ignores that subscription.
 * @param {string | URL} address
 */
function withSmallDefault(address) {
  const url = new URL(address);
  if (url.protocol !== "ws:" && url.protocol !== "wss:") {
    throw new TypeError(`expected a URL such as ws://127.0.0.1:8000/ws, got ${address}`);
  }
  if (!url.searchParams.has("topics")) url.searchParams.set("topics", "jobs");
  if (!url.searchParams.has("bulk")) url.searchParams.set("bulk", "summary");
  url.hash = "";
  return url.href;
}
