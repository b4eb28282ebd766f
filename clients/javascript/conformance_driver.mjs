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

class Watching {
  events = [];
  error = null;
  isReady = false;

  constructor(watch, isSlow) {
    this.watch = watch;
    this.mayRead = new Promise((resolve) => (this.goOn = resolve));
    if (!isSlow) this.goOn();
    watch.ready().then(() => (this.isReady = true), () => {});
    void this.run();
  }

  async run() {
    try {
      await this.mayRead;
      for await (const { actorId, ...item } of this.watch) {
        this.events.push({ ...item, actor_id: actorId, position: written(item.position) });
      }
      this.error = { kind: "closed", code: null };
    } catch (error) {
      this.error = described(error);
    }
  }

  report() {
    const seqs = this.events.map((event) => event.seq).filter((seq) => typeof seq === "number");
    return {
      events: this.events.length < 1000 ? this.events : null,
      count: this.events.length,
      in_order: seqs.every((seq, index) => index === 0 || seqs[index - 1] < seq),
      ready: this.isReady,
      position: written(this.watch.position),
      error: this.error,
    };
  }
}

class Viewing {
  changes = [];
  error = null;
  isReady = false;

  constructor(view) {
    this.view = view;
    view.ready().then(() => (this.isReady = true), () => {});
    void this.run();
  }

  async run() {
    try {
      for await (const change of this.view.changes()) this.changes.push([change.kind, change.id]);
      this.error = { kind: "closed", code: null };
    } catch (error) {
      this.error = described(error);
    }
  }

  report() {
    let rows = [];
    try {
      rows = [...this.view.values()].sort((one, other) => (one.id < other.id ? -1 : 1));
    } catch {
      // The view ended with an error, which `changes` reports.
    }
    const { isLive: live, position } = this.view;
    const { isReady: ready, changes, error } = this;
    return { rows, ready, live, position: written(position), changes, error };
  }
}

class Attending {
  changes = [];
  error = null;

  constructor(presence) {
    this.presence = presence;
    void this.run();
  }

  async run() {
    try {
      for await (const { isReset, ...change } of this.presence) this.changes.push({ ...change, is_reset: isReset });
      this.error = { kind: "closed", code: null };
    } catch (error) {
      this.error = described(error);
    }
  }

  report() {
    const state = {};
    for (const topic of this.presence.topics) {
      const audience = this.presence.get(topic);
      if (audience !== undefined) state[topic] = { count: audience.count, users: [...audience.users.values()] };
    }
    return { state, changes: this.changes, error: this.error };
  }
}

const reports = (map) => Object.fromEntries([...map].map(([name, each]) => [name, each.report()]));

/** One client and everything opened with it. */
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

  watch({ name, topics, slow = false, filter, bulk, deliver, since, epoch }) {
    const watch = this.client.watch(topics, { filter, bulk, deliver, since, epoch });
    this.watches.set(name, new Watching(watch, slow));
  }

  view({ name, topic, filter, deliver }) {
    this.views.set(name, new Viewing(this.client.view(topic, { filter, deliver })));
  }

  presence_({ name, topics }) {
    this.presence.set(name, new Attending(this.client.presence(topics)));
  }

  request({ name, method, path, body, headers, idempotency_key: idempotencyKey }) {
    this.requests[name] = { pending: true };
    this.client.request(method, path, { body, headers, idempotencyKey }).then(
      (answer) => (this.requests[name] = answer),
      (error) => (this.requests[name] = { error: described(error) }),
    );
  }

  /** Returns null when the client has ended or the connection was lost. */
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
    (this.watches.get(name)?.watch ?? this.views.get(name)?.view ?? this.presence.get(name)?.presence).close();
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
