// The driver of the JavaScript client for the conformance suite, in Node and in browsers.
//
//     python -m clients.conformance -- node --experimental-websocket clients/javascript/conformance_driver.mjs
//
// clients/conformance/README.md describes the commands and the report.

import {
  Client,
  ClientClosed,
  ConnectionLost,
  Forbidden,
  MarqueeError,
  ProtocolViolation,
  Refused,
  ServerError,
  Unauthorized,
} from "./marquee.js";

const CAPABILITIES = []; // browsers do not reveal why a handshake was refused
const KINDS = [
  [Unauthorized, "unauthorized"],
  [Forbidden, "forbidden"],
  [ProtocolViolation, "protocol_violation"],
  [Refused, "refused"],
  [ServerError, "server_error"],
  [ConnectionLost, "connection_lost"],
  [ClientClosed, "closed"],
];

function described(error) {
  if (!(error instanceof MarqueeError)) throw error;
  const [, kind] = KINDS.find(([type]) => error instanceof type) ?? [null, "other"];
  return { kind, code: error.code ?? null, message: error.message };
}

const written = (position) => (position === null ? null : `${position.epoch ?? ""}:${position.seq}`);

/** Reads a watch, a view or a presence to its end. */
class Reading {
  error = null;
  isReady = false;

  constructor(opened) {
    this.opened = opened;
    opened.ready().then(() => (this.isReady = true), () => {});
  }

  async run() {
    try {
      await this.read();
      this.error = { kind: "closed", code: null };
    } catch (error) {
      this.error = described(error);
    }
  }
}

class WatchReading extends Reading {
  events = [];

  constructor(watch, isSlow) {
    super(watch);
    this.mayRead = new Promise((resolve) => (this.goOn = resolve));
    if (!isSlow) this.goOn();
    void this.run();
  }

  async read() {
    await this.mayRead;
    for await (const { actorId, ...item } of this.opened) {
      this.events.push({ ...item, actor_id: actorId, position: written(item.position) });
    }
  }

  report() {
    const seqs = this.events.map((event) => event.seq).filter((seq) => typeof seq === "number");
    return {
      events: this.events.length < 1000 ? this.events : null,
      count: this.events.length,
      in_order: seqs.every((seq, index) => index === 0 || seqs[index - 1] < seq),
      ready: this.isReady,
      position: written(this.opened.position),
      error: this.error,
    };
  }
}

class ViewReading extends Reading {
  changes = [];

  constructor(view) {
    super(view);
    void this.run();
  }

  async read() {
    for await (const change of this.opened.changes()) this.changes.push([change.kind, change.id]);
  }

  report() {
    let rows = [];
    try {
      rows = [...this.opened.values()].sort((one, other) => (one.id < other.id ? -1 : 1));
    } catch {
      // The view ended with an error, which `changes` reports.
    }
    const { isLive: live, position } = this.opened;
    const { isReady: ready, changes, error } = this;
    return { rows, ready, live, position: written(position), changes, error };
  }
}

class PresenceReading extends Reading {
  changes = [];

  constructor(presence) {
    super(presence);
    void this.run();
  }

  async read() {
    for await (const { isReset, ...change } of this.opened) this.changes.push({ ...change, is_reset: isReset });
  }

  report() {
    const state = {};
    for (const topic of this.opened.topics) {
      const audience = this.opened.get(topic);
      if (audience !== undefined) state[topic] = { count: audience.count, users: [...audience.users.values()] };
    }
    return { state, changes: this.changes, error: this.error };
  }
}

const reports = (map) => Object.fromEntries([...map].map(([name, each]) => [name, each.report()]));

/** A client under test and everything opened with it. */
class Subject {
  tokensAsked = 0;
  watches = new Map();
  views = new Map();
  presence = new Map();
  requests = {};

  constructor({ url, token, retry }) {
    const { first_seconds: firstSeconds, longest_seconds: longestSeconds, proven_seconds: provenSeconds } = retry;
    const next = async () => token[Math.min(this.tokensAsked++, token.length - 1)];
    this.client = new Client(url, {
      token: Array.isArray(token) ? next : token,
      retry: { firstSeconds, longestSeconds, provenSeconds },
    });
  }

  watch({ name, topics, slow = false, filter, q, bulk, deliver, since, epoch }) {
    const watch = this.client.watch(topics, { filter, q, bulk, deliver, since, epoch });
    this.watches.set(name, new WatchReading(watch, slow));
  }

  view({ name, topic, filter, q, deliver }) {
    this.views.set(name, new ViewReading(this.client.view(topic, { filter, q, deliver })));
  }

  presence_({ name, topics }) {
    this.presence.set(name, new PresenceReading(this.client.presence(topics)));
  }

  request({ name, method, path, body, headers, idempotency_key: idempotencyKey }) {
    this.requests[name] = { pending: true };
    this.client.request(method, path, { body, headers, idempotencyKey }).then(
      (answer) => (this.requests[name] = answer),
      (error) => (this.requests[name] = { error: described(error) }),
    );
  }

  /** Pings the server. Returns the round-trip time, or null if the client has ended or the connection was lost. */
  async ping() {
    try {
      return await this.client.ping();
    } catch (error) {
      return described(error) && null;
    }
  }

  authenticate({ token }) {
    return this.client.authenticate(token);
  }

  go_on({ name }) {
    this.watches.get(name).goOn();
  }

  end({ name }) {
    (this.watches.get(name) ?? this.views.get(name) ?? this.presence.get(name)).opened.close();
  }

  report() {
    return {
      watches: reports(this.watches),
      views: reports(this.views),
      presence: reports(this.presence),
      requests: this.requests,
      tokens_asked: this.tokensAsked,
    };
  }

  close() {
    this.client.close();
  }
}

const isNode = typeof process !== "undefined" && process.versions?.node !== undefined;
const control = isNode ? process.argv[2] : new URLSearchParams(location.search).get("control");
const subjects = new Map();
const socket = new WebSocket(control);
socket.onopen = () => socket.send(JSON.stringify({ hello: { capabilities: CAPABILITIES } }));
socket.onmessage = async ({ data }) => {
  const command = JSON.parse(data);
  const answer = { reply_to: command.id };
  try {
    if (command.do === "open") {
      subjects.set(command.client, new Subject(command));
    } else {
      const subject = subjects.get(command.client);
      const act = command.do === "presence" ? "presence_" : command.do;
      answer.result = (await subject[act](command)) ?? null;
      if (command.do === "close") subjects.delete(command.client);
    }
  } catch (error) {
    answer.error = `${error} ${error.stack}`;
  }
  socket.send(JSON.stringify(answer));
};
