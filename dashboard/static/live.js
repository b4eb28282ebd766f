// Lists the frames that the websocket sends, newest first.
//
// Frames may arrive much faster than a screen can show them, and some are large. So each frame is parsed, reduced to
// what a row needs and put into a bounded list when it arrives; the DOM changes only on animation frames.

const MAX_ROWS = 200;
const KEPT_ITEMS = 20; // items kept of each bulk frame
const KEPT_TEXT = 2_000; // characters kept of each string in the kept items
const MAX_JSON = 20_000; // characters shown of an expanded frame
const RATE_SECONDS = 5;

const FIRST_DELAY_MS = 500;
const LAST_DELAY_MS = 10_000;
const STEADY_MS = 5_000; // a connection that lasted this long resets the back-off
const WELCOME_MS = 10_000; // a connection without a welcome after this time is closed
const FIRST_FINAL_CODE = 4500;
const LAST_FINAL_CODE = 4999;

const numbers = new Intl.NumberFormat("en");

// --- the connection

const root = new URL("..", import.meta.url); // this script is in static/, below the service's root
const position = { epoch: null, seq: null };
const connection = { socket: null, state: "connecting", why: "", attempt: 0, liveAt: null, retryAt: 0, timer: 0 };

function socketUrl() {
  const url = new URL("ws", root);
  url.protocol = location.protocol === "https:" ? "wss:" : "ws:";
  return url;
}

function resumingUrl() {
  const url = socketUrl();
  if (position.epoch !== null) {
    url.searchParams.set("since", position.seq);
    url.searchParams.set("epoch", position.epoch);
  }
  return url;
}

function connect() {
  clearTimeout(connection.timer);
  const socket = new WebSocket(resumingUrl());
  socket.onmessage = (event) => {
    if (socket === connection.socket) onMessage(event.data);
  };
  socket.onclose = (event) => onClose(socket, event.code, event.reason);
  connection.socket = socket;
  connection.state = "connecting";
  connection.timer = setTimeout(() => {
    onClose(socket, null, "no welcome");
    socket.close();
  }, WELCOME_MS);
  requestDraw();
}

function onClose(socket, code, reason) {
  if (socket !== connection.socket) return; // this socket was closed earlier and replaced
  clearTimeout(connection.timer);
  connection.socket = null;
  connection.why = [code, reason].filter(Boolean).join(" ");
  if (code >= FIRST_FINAL_CODE && code <= LAST_FINAL_CODE) {
    connection.state = "stopped";
  } else {
    connection.state = "waiting";
    retryLater();
  }
  connection.liveAt = null;
  requestDraw();
}

function retryLater() {
  if (connection.liveAt !== null && performance.now() - connection.liveAt > STEADY_MS) connection.attempt = 0;
  const longest = Math.min(LAST_DELAY_MS, FIRST_DELAY_MS * 2 ** connection.attempt);
  // The delay is random, so that the clients of a restarted service do not all reconnect at the same time.
  const delay = longest * (0.5 + Math.random() / 2);
  connection.attempt += 1;
  connection.retryAt = performance.now() + delay;
  connection.timer = setTimeout(connect, delay);
}

// --- frames

function onMessage(text) {
  const frame = parsed(text);
  if (frame === null) {
    keep({ operation: "unreadable" }, `${numbers.format(text.length)} characters, not a frame`);
  } else if (frame.operation === "welcome") {
    onWelcome(frame);
  } else if (frame.operation === "resync") {
    onResync(frame);
  } else {
    onEvent(frame);
  }
  requestDraw();
}

function parsed(text) {
  try {
    const frame = JSON.parse(text);
    return isObject(frame) && typeof frame.operation === "string" ? frame : null;
  } catch {
    return null;
  }
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function onWelcome(frame) {
  const data = dataOf(frame);
  clearTimeout(connection.timer);
  connection.state = "live";
  connection.liveAt = performance.now();
  if (data.epoch === position.epoch) {
    // data.seq may be the head of the log while missed events are still to come. The position advances with the
    // events, so that nothing is lost if the connection ends meanwhile.
    keep(frame, `Resumed after seq ${position.seq}`);
    return;
  }
  position.epoch = data.epoch;
  position.seq = data.seq;
  keep(frame, `Connected at seq ${data.seq}`);
}

function onResync(frame) {
  const data = dataOf(frame);
  position.epoch = data.epoch;
  position.seq = data.seq;
  keep(frame, `Some events are missing (${plain(data.reason)}); continuing after seq ${data.seq}`);
}

function onEvent(frame) {
  if (Number.isInteger(frame.seq)) {
    if (position.seq !== null && frame.seq <= position.seq) return; // the event was received before the connection was lost
    position.seq = frame.seq;
  }
  countEvent();
  keep(frame, summaryOf(frame), listOf(frame.changed).join(", "));
}

function dataOf(frame) {
  return isObject(frame.data) ? frame.data : {};
}

function plain(value) {
  return value === undefined || value === null ? "–" : String(value);
}

function summaryOf(frame) {
  const data = dataOf(frame);
  if (frame.operation === "progress") return progressText(data);
  if (frame.operation.endsWith("_bulk")) return bulkText(data);
  return entityText(data);
}

function entityText(data) {
  const name = data.title ?? data.name;
  if (name !== undefined) return plain(name);
  if (data.kind !== undefined) return `${plain(data.kind)} ${plain(data.state)}`;
  return `id ${plain(data.id)}`;
}

function bulkText(data) {
  const named = Array.isArray(data.ids) ? data.ids : listOf(data.items).map((item) => item?.id);
  const ids = named.filter(Number.isInteger);
  const count = Number.isInteger(data.count) ? data.count : ids.length;
  const rows = count === 1 ? "1 row" : `${numbers.format(count)} rows`;
  return ids.length ? `${rows} (${idsText(ids)})` : rows;
}

function listOf(value) {
  return Array.isArray(value) ? value : [];
}

function idsText(ids) {
  if (ids.length === 1) return `id ${ids[0]}`;
  const lowest = ids.reduce((one, other) => (other < one ? other : one));
  const highest = ids.reduce((one, other) => (other > one ? other : one));
  if (highest - lowest === ids.length - 1) return `ids ${lowest}–${highest}`;
  return ids.length <= 4 ? `ids ${ids.join(", ")}` : `ids from ${lowest} to ${highest}`;
}

function progressText(data) {
  const parts = [percentText(data), data.state, `${amount(data.done)} of ${amount(data.total)}`];
  if (data.rows_per_second > 0) parts.push(`${amount(data.rows_per_second)} rows/s`);
  return parts.filter(Boolean).join(" · ");
}

function amount(value) {
  return Number.isFinite(value) ? numbers.format(value) : "?";
}

function percentText(data) {
  const share = shareOf(data);
  return share === null ? "" : `${Math.floor(share * 100)}%`; // rounded down, so that 100% appears only at the end
}

function shareOf(data) {
  return data.total > 0 && data.done >= 0 ? Math.min(1, data.done / data.total) : null;
}

// --- the rows kept

const views = new Map([["all", []]]);
let lastOrder = 0;

// Adds a view of a topic and its radio button, unless the view already exists.
function addTopic(name) {
  if (views.has(name)) return;
  views.set(name, views.get("all").filter(({ frame }) => frame.topic === name));
  const input = Object.assign(make("input", ""), { type: "radio", name: "topic", value: name, autocomplete: "off" });
  const label = make("label", "");
  label.append(input, make("span", "", name[0].toUpperCase() + name.slice(1)));
  nodes.topics.append(label);
}

// Adds the topics that the service lists as public. If this fails, a topic is added when its first frame arrives.
async function addPublicTopics() {
  try {
    const { "x-topics": topics } = await (await fetch(new URL("asyncapi.json", root))).json();
    for (const [name, topic] of Object.entries(topics)) if (topic.default) addTopic(name);
  } catch (error) {
    console.warn("topics not loaded", error);
  }
}

function keep(frame, summary, changed = "") {
  if (frame.topic) addTopic(frame.topic);
  lastOrder += 1;
  const entry = {
    order: lastOrder,
    when: timeOf(frame),
    summary,
    changed,
    share: frame.operation === "progress" ? shareOf(dataOf(frame)) : null,
    ...reduced(frame),
  };
  // Each view has its own rows, so that a busy topic does not push out the rows of a quiet topic.
  for (const [name, rows] of views) {
    if (name !== "all" && name !== frame.topic && frame.topic) continue;
    rows.push(entry);
    if (rows.length > MAX_ROWS) rows.shift();
  }
}

function timeOf(frame) {
  const time = new Date(frame.ts ?? NaN);
  return Number.isNaN(time.getTime()) ? new Date() : time;
}

// Returns the frame with its long lists shortened, and a note that names these lists.
function reduced(frame) {
  const long = Object.entries(dataOf(frame)).filter(([, value]) => listOf(value).length > KEPT_ITEMS);
  if (!long.length) return { frame, note: "" };
  const short = long.map(([key, value]) => [key, value.slice(0, KEPT_ITEMS).map(withShortTexts)]);
  const counts = long.map(([key, value]) => `the first ${KEPT_ITEMS} of ${amount(value.length)} ${key}`);
  return {
    frame: { ...frame, data: { ...frame.data, ...Object.fromEntries(short) } },
    note: `Only ${counts.join(" and ")} are kept here.`,
  };
}

function withShortTexts(item) {
  if (!isObject(item)) return item;
  const isLong = (value) => typeof value === "string" && value.length > KEPT_TEXT;
  const short = (value) => (isLong(value) ? `${value.slice(0, KEPT_TEXT)}…` : value);
  return Object.fromEntries(Object.entries(item).map(([key, value]) => [key, short(value)]));
}

// --- counting

const slots = Array.from({ length: RATE_SECONDS + 1 }, () => ({ second: -1, count: 0 }));
let events = 0;

function thisSecond() {
  return Math.floor(performance.now() / 1000);
}

function countEvent() {
  const second = thisSecond();
  const slot = slots[second % slots.length];
  if (slot.second !== second) {
    slot.second = second;
    slot.count = 0;
  }
  slot.count += 1;
  events += 1;
}

// Counts only complete seconds, because the current second would make the number flicker.
function eventsPerSecond() {
  const now = thisSecond();
  const whole = slots.filter((slot) => slot.second < now && slot.second >= now - RATE_SECONDS);
  const sum = whole.reduce((total, slot) => total + slot.count, 0);
  return sum / Math.max(1, Math.min(RATE_SECONDS, now));
}

// --- drawing

const nodes = Object.fromEntries(Array.from(document.querySelectorAll("[id]"), (node) => [node.id, node]));
const shown = { view: "all", order: 0, paused: false, pausedByRow: false, pressed: false };
const entries = new WeakMap(); // the entry of each row
let drawRequested = false;

function requestDraw() {
  if (drawRequested) return;
  drawRequested = true;
  requestAnimationFrame(() => {
    drawRequested = false;
    drawHeader();
    // If rows moved while the mouse button is pressed, the wrong row would be clicked.
    if (!shown.paused && !shown.pressed) drawRows();
    drawPause();
  });
}

function put(node, text) {
  // Assigning the same text would trigger a new layout and make screen readers announce it again.
  if (node.textContent !== text) node.textContent = text;
}

function drawHeader() {
  const words = { connecting: "Connecting", live: "Live", waiting: "Reconnecting", stopped: "Stopped" };
  const seconds = Math.max(1, Math.ceil((connection.retryAt - performance.now()) / 1000));
  nodes["state-box"].dataset.state = connection.state;
  put(nodes.state, words[connection.state]);
  put(nodes["state-more"], connection.state === "waiting" ? `in ${seconds} s` : "");
  nodes["state-more"].title = connection.state === "waiting" ? `Closed: ${connection.why}` : "";
  nodes.connect.hidden = connection.state !== "waiting" && connection.state !== "stopped";
  nodes.stopped.hidden = connection.state !== "stopped";
  put(nodes.stopped, nodes.stopped.hidden ? "" : `The service closed the connection: ${connection.why}. Not reconnecting.`);
  put(nodes.epoch, position.epoch === null ? "–" : String(position.epoch).slice(0, 8));
  nodes.epoch.title = position.epoch ?? "";
  put(nodes.seq, position.seq === null ? "–" : numbers.format(position.seq));
  put(nodes.events, numbers.format(events));
  const rate = eventsPerSecond();
  put(nodes.rate, rate < 10 ? String(Math.round(rate * 10) / 10) : numbers.format(Math.round(rate)));
}

function newRows() {
  return views.get(shown.view).filter((entry) => entry.order > shown.order);
}

function drawRows() {
  const fresh = newRows();
  if (!fresh.length) return;
  shown.order = fresh.at(-1).order;
  nodes.frames.prepend(...fresh.reverse().map(rowOf));
  while (nodes.frames.childElementCount > MAX_ROWS) dropLastRow();
}

function dropLastRow() {
  const row = nodes.frames.lastElementChild;
  const before = row.previousElementSibling;
  const hadFocus = row.contains(document.activeElement);
  row.remove();
  // Focus the previous row; otherwise, the keyboard focus would move to the top of the page.
  if (hadFocus) before.querySelector("summary").focus({ preventScroll: true });
}

function redrawRows() {
  nodes.frames.replaceChildren();
  drawRows();
  resumeIfAllClosed();
  requestDraw();
}

function drawPause() {
  const count = shown.paused ? newRows().length : 0;
  const some = count === MAX_ROWS ? `${MAX_ROWS}+` : String(count);
  put(nodes.pause, shown.paused ? (count ? `Resume (${some} new)` : "Resume") : "Pause");
}

function make(tag, className, text = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

function rowOf(entry) {
  const { operation, topic, seq } = entry.frame;
  const summary = document.createElement("summary");
  const badge = make("span", "badge", operation);
  badge.dataset.kind = operation === "progress" ? "ephemeral" : operation.replace("_bulk", "");
  summary.append(
    make("span", "seq", Number.isInteger(seq) ? String(seq) : ""),
    timeNode(entry.when),
    badge,
    make("span", "topic", topic ?? ""),
    textNode(entry),
  );
  const details = document.createElement("details");
  details.append(summary);
  const row = make("li", operation === "resync" ? "row resync" : "row");
  row.append(details);
  entries.set(row, entry);
  return row;
}

function timeNode(when) {
  const two = (value) => String(value).padStart(2, "0");
  const clock = [when.getHours(), when.getMinutes(), when.getSeconds()].map(two).join(":");
  const node = make("time", "time", clock);
  node.append(make("span", "millis", `.${String(when.getMilliseconds()).padStart(3, "0")}`));
  node.dateTime = when.toISOString();
  return node;
}

function textNode(entry) {
  const node = make("span", "text");
  if (entry.share !== null) node.append(barOf(entry.share));
  node.append(make("span", "name", entry.summary));
  if (entry.changed) node.append(make("span", "changed", `changed ${entry.changed}`));
  return node;
}

function barOf(share) {
  const bar = document.createElement("progress");
  bar.value = share;
  bar.setAttribute("aria-hidden", "true"); // the text beside the bar says the same
  return bar;
}

// --- expanding

function onToggle(details) {
  details.querySelector(".json")?.remove();
  if (details.open) {
    details.append(jsonOf(entries.get(details.parentElement)));
    holdForReading();
  } else {
    resumeIfAllClosed();
  }
}

// Pauses the list already on the click, because the "toggle" event fires later and rows may be drawn before it.
function onClick(event) {
  const details = event.target.closest("summary")?.parentElement;
  if (details && !details.open) holdForReading();
}

function jsonOf(entry) {
  const whole = JSON.stringify(entry.frame, null, 2);
  const notes = [entry.note];
  if (whole.length > MAX_JSON) notes.push(`Only the first ${amount(MAX_JSON)} characters are shown.`);
  const pre = make("pre", "", whole.slice(0, MAX_JSON));
  pre.tabIndex = 0; // the element scrolls, so it must be reachable by keyboard
  const box = make("div", "json");
  const note = notes.filter(Boolean).join(" ");
  if (note) box.append(make("p", "note", note));
  box.append(pre);
  return box;
}

// An open row is being read, so it must neither move nor be dropped from the end of the list. A list that was paused
// only for this reason resumes when the last row is closed.
function holdForReading() {
  if (shown.paused) return;
  shown.paused = true;
  shown.pausedByRow = true;
  requestDraw();
}

function resumeIfAllClosed() {
  if (shown.pausedByRow && !nodes.frames.querySelector("details[open]")) setPaused(false);
}

function setPaused(paused) {
  shown.paused = paused;
  shown.pausedByRow = false;
  requestDraw();
}

// --- controls

function showView(name) {
  shown.view = name;
  shown.order = 0;
  redrawRows();
}

function clear() {
  for (const rows of views.values()) rows.length = 0;
  redrawRows();
}

function setPressed(pressed) {
  shown.pressed = pressed;
  requestDraw();
}

function start() {
  nodes.wscat.textContent = `wscat -c ${socketUrl()}`;
  nodes.curl.textContent = `curl ${root}movies`;
  nodes.topics.addEventListener("change", (event) => showView(event.target.value));
  nodes.pause.addEventListener("click", () => setPaused(!shown.paused));
  nodes.clear.addEventListener("click", clear);
  nodes.connect.addEventListener("click", connect);
  nodes.frames.addEventListener("click", onClick);
  // "toggle" does not bubble.
  nodes.frames.addEventListener("toggle", (event) => onToggle(event.target), { capture: true });
  nodes.frames.addEventListener("pointerdown", () => setPressed(true));
  addEventListener("pointerup", () => setPressed(false));
  addEventListener("pointercancel", () => setPressed(false));
  addEventListener("online", () => {
    if (connection.state === "waiting") connect();
  });
  setInterval(requestDraw, 1000); // updates the rate and the countdown when nothing arrives
  addPublicTopics();
  connect();
}

start();
