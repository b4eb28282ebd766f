// Renders /asyncapi.json as a page. All content becomes text nodes, so that nothing in the document is parsed as HTML.

const DOCUMENT = new URL("../asyncapi.json", import.meta.url);
const content = document.getElementById("content");
const contents = document.getElementById("contents");

/** Returns an element with attributes and children; a string child becomes a text node. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined) element.setAttribute(name, String(value));
  }
  element.append(...children.flat().filter((child) => child !== undefined && child !== null));
  return element;
}

/** Returns nodes for text with `code` and **strong** markup. */
function inline(text) {
  return text.split(/(`[^`]+`|\*\*[^*]+\*\*)/).map((part) => {
    if (part.startsWith("`") && part.length > 2) return make("code", {}, part.slice(1, -1));
    if (part.startsWith("**") && part.length > 4) return make("strong", {}, part.slice(2, -2));
    return part;
  });
}

const paragraphs = (text) => text.split("\n\n").map((part) => make("p", {}, inline(part)));

/** Returns a value as formatted JSON, with short objects and arrays on one line, and spans for syntax colours. */
function json(value) {
  const pre = make("pre", { tabindex: 0 });
  write(pre, value, "", 0);
  return pre;
}

function write(pre, value, indent, used) {
  const flat = JSON.stringify(value);
  if (value === null || typeof value !== "object") {
    pre.append(make("span", { class: value === null ? "null" : typeof value }, flat));
    return;
  }
  const isList = Array.isArray(value);
  const entries = Object.entries(value);
  const [open, close] = isList ? "[]" : "{}";
  const isFlat = entries.length === 0 || used + indent.length + flat.length + entries.length * 2 < 56;
  const inner = isFlat ? "" : `${indent}  `;
  pre.append(open);
  entries.forEach(([name, each], index) => {
    pre.append(isFlat ? "" : `\n${inner}`);
    if (!isList) pre.append(make("span", { class: "key" }, JSON.stringify(name)), ": ");
    write(pre, each, inner, isFlat ? -1e6 : isList ? 0 : name.length + 4);
    if (index < entries.length - 1) pre.append(isFlat ? ", " : ",");
  });
  pre.append(isFlat ? close : `\n${indent}${close}`);
}

// --- schemas

let schemas = {};

const nameOf = (reference) => reference.slice(reference.lastIndexOf("/") + 1);
const resolved = (schema) => (schema.$ref ? schemas[nameOf(schema.$ref)] : schema);
const number = (value) => value.toLocaleString("en-US");
const isObject = (schema) => schema.type === "object" && (schema.properties || schema.additionalProperties?.$ref);

/** Returns the bounds of a schema (items, length or value) in words. */
function bounds(low, high, unit) {
  if (low === undefined && high === undefined) return "";
  if (high === undefined) return low > 0 ? `at least ${number(low)}${unit}` : "";
  if (high >= Number.MAX_SAFE_INTEGER) return low === undefined ? "" : `${number(low)} or more${unit}`;
  return low === undefined ? `at most ${number(high)}${unit}` : `${number(low)} to ${number(high)}${unit}`;
}

/** Returns the type of a value as words and `code` elements. */
function kind(given) {
  const schema = resolved(given);
  const name = given.$ref ? nameOf(given.$ref) : undefined;
  if (schema.const !== undefined) return [make("code", {}, JSON.stringify(schema.const))];
  if (schema.enum) return list(schema.enum.map((each) => make("code", {}, JSON.stringify(each))), " or ");
  const either = schema.anyOf ?? schema.oneOf;
  if (either) return list(either.map((each) => make("span", {}, kind(each))), " or ");
  if (schema.type === "array") {
    const size = bounds(schema.minItems, schema.maxItems, "");
    return ["list of ", ...kind(schema.items), aside(size, schema.uniqueItems && "no duplicates")];
  }
  if (schema.type === "object") return [name ? make("span", { class: "model" }, name) : "object"];
  if (!schema.type) return ["any JSON"];
  const word = { string: "string", boolean: "true or false", null: "null" }[schema.type] ?? schema.type;
  const format = { "date-time": "time (RFC 3339)", date: "date" }[schema.format];
  const extent = bounds(schema.minLength ?? schema.minimum, schema.maxLength ?? schema.maximum,
    schema.type === "string" ? " characters" : "");
  return [format ?? word, aside(extent)];
}

const aside = (...remarks) => (remarks.some(Boolean) ? ` (${remarks.filter(Boolean).join(", ")})` : "");

function list(parts, between) {
  return parts.flatMap((part, index) => (index ? [between, part] : [part]));
}

/** Returns the object schemas that a schema contains. Their members are shown below the schema. */
function inside(given) {
  const found = [];
  const visit = (schema) => {
    const full = resolved(schema);
    for (const each of full.anyOf ?? full.oneOf ?? []) visit(each);
    if (full.type === "array" && full.items) visit(full.items);
    if (isObject(full)) {
      if (full.properties && Object.keys(full.properties).length) found.push([schema.$ref && nameOf(schema.$ref), full]);
      else if (full.additionalProperties?.$ref) visit(full.additionalProperties);
    }
  };
  visit(given);
  return found;
}

function members(schema, depth = 0) {
  const required = new Set(schema.required ?? []);
  const rows = Object.entries(schema.properties).map(([name, each]) => {
    const full = resolved(each);
    const about = each.description ?? full.description;
    const isDocstring = each.description === undefined && each.$ref;
    const objects = inside(each);
    const inner = objects.map(([model, object]) =>
      make("details", { open: depth === 0 && Object.keys(object.properties).length < 6 },
        make("summary", {}, objects.length > 1 ? ["Members of ", make("span", { class: "model" }, model)] : "Members"),
        members(object, depth + 1)));
    const fallback = full.default ?? each.default;
    return make("div", { class: "member" },
      make("div", { class: "member-name" }, make("code", {}, name),
        required.has(name) ? undefined : make("span", { class: "optional" }, "optional")),
      make("div", { class: "member-text" },
        make("div", { class: "kind" }, kind(each),
          fallback !== undefined && fallback !== null && fallback !== ""
            ? [make("span", {}, "; default "), make("code", {}, JSON.stringify(fallback))] : undefined),
        about && !isDocstring ? make("div", { class: "about" }, inline(about)) : undefined),
      inner);
  });
  return make("div", { class: "members" }, rows);
}

// --- messages

/** Returns the schemas of a payload. Several schemas have one tab per topic; a tab also selects the topic's examples. */
function payload(message, id, examples) {
  const options = message.payload.oneOf ?? [message.payload];
  const panels = options.map((option) => {
    const schema = resolved(option);
    return Object.keys(schema.properties).length ? members(schema) : make("p", { class: "quiet" }, "No members.");
  });
  if (options.length === 1) return [panels[0]];
  const names = options.map((option) => resolved(option).properties.topic.const);
  const show = (topic) => {
    panels.forEach((panel, index) => (panel.hidden = names[index] !== topic));
    for (const each of examples) each.hidden = each.dataset.topic !== topic;
  };
  show(names[0]);
  const tabs = make("fieldset", { class: "tabs" }, make("legend", {}, "Topic"),
    names.map((name, index) => make("label", {},
      make("input", { type: "radio", name: `topic-${id}`, value: name, checked: index === 0, autocomplete: "off" }),
      make("span", {}, name))));
  tabs.addEventListener("change", (event) => show(event.target.value));
  return [tabs, ...panels];
}

function section(id, title, badge, ...children) {
  const heading = make("h3", {}, make("a", { href: `#${id}` }, title), badge);
  return make("section", { id, "aria-label": title }, heading, ...children);
}

function messageSection(key, message, { kind: badge, reply } = {}) {
  const id = key.replaceAll("_", "-");
  const tag = make("span", { class: "badge", "data-kind": badge }, message.name);
  const examples = message.examples.map((example) =>
    make("div", { "data-topic": example.payload.topic ?? undefined }, json(example.payload)));
  return section(id, message.title, tag,
    make("p", { class: "lead" }, inline(message.summary)),
    make("div", { class: "pair" },
      make("div", {}, payload(message, id, examples)),
      make("div", { class: "examples" }, make("h4", {}, "Examples"), examples)),
    reply);
}

function replyTo(action, messages) {
  const reply = messages[`${action}_reply`];
  return make("details", { class: "reply" },
    make("summary", {}, "Reply"),
    make("p", {}, inline(reply.summary), " If the action fails, the reply is an ",
      make("a", { href: "#error" }, "error"), "."),
    make("div", { class: "pair" },
      members(resolved(reply.payload)),
      make("div", { class: "examples" }, make("h4", {}, "Examples"),
        reply.examples.map((example) => make("div", {}, json(example.payload))))));
}

function table(columns, rows) {
  return make("div", { class: "scroll", tabindex: 0 },
    make("table", {},
      make("thead", {}, make("tr", {}, columns.map((column) => make("th", { scope: "col" }, column)))),
      make("tbody", {}, rows.map((row) => make("tr", {}, row.map((cell) => make("td", {}, cell)))))));
}

const code = (text) => make("code", {}, String(text));

// --- the page

const KINDS = [[/^add/, "add"], [/^update/, "update"], [/^delete/, "delete"], [/^progress|^presence/, "ephemeral"],
  [/^resync|^error/, "resync"]];
const kindOf = (key) => KINDS.find(([pattern]) => pattern.test(key))?.[1];

function page(spec) {
  schemas = spec.components.schemas;
  const messages = spec.components.messages;
  const actions = Object.keys(messages).filter((key) => messages[`${key}_reply`]);
  const frames = Object.keys(messages).filter((key) => key.endsWith("_frame"));
  const socket = spec.channels.ws;
  const query = socket.bindings.ws.query;
  const security = spec.components.securitySchemes;

  const groups = [
    ["Start", [
      section("introduction", "Introduction", undefined, paragraphs(spec.info.description)),
      section("handshake", "Handshake", code(`GET ${socket.address}`),
        make("p", {}, "Query parameters:"), members(query),
        make("p", {}, inline(spec.servers.plain.description)),
        make("p", {}, inline(security.subprotocol.description)),
        make("p", {}, "The service rejects a handshake with an HTTP response, ", code('{"detail": …}'), ":"),
        table(["Status", "When"], spec["x-refusals"].map((each) => [code(each.status), inline(each.when)]))),
      section("topics", "Topics and filters", undefined,
        make("p", {}, "The filter of ", make("a", { href: "#subscribe" }, "subscribe"),
          " refers to fields of its topics. All fields must match; ", code("or"), " contains a list of alternatives."),
        Object.entries(spec["x-topics"]).map(([topic, each]) => make("details", {},
          make("summary", {}, code(topic), ` for ${each.for}${each.default ? "; included by default" : ""}`),
          table(["Field", "Kind", "Operators"], Object.entries(each.filters).map(([name, field]) =>
            [code(name), field.kind, list(field.operators.map(code), " ")]))))),
    ]],
    ["You send", actions.map((key) => messageSection(key, messages[key], { kind: "asked", reply: replyTo(key, messages) }))],
    ["You receive", [
      ...frames.map((key) => messageSection(key, messages[key], { kind: kindOf(key) })),
      messageSection("error", messages.error, { kind: "resync" })]],
    ["Reference", [
      section("close-codes", "Close codes", undefined,
        make("p", {}, "4000 to 4499: reconnect and resume. 4500 to 4999: do not reconnect until the cause is resolved."),
        table(["Code", "Name", "Reason", "What to do"], spec["x-close-codes"].map((each) =>
          [code(each.code), each.name, each.reason, each.then]))),
      section("limits", "Limits", undefined,
        table(["Limit", "Value"], spec["x-limits"].map((each) =>
          [inline(each.what), make("span", { class: "number" }, number(each.value))]))),
    ]],
  ];
  for (const [title, sections] of groups) {
    content.append(make("h2", {}, title), ...sections);
    contents.append(make("div", { class: "group" }, make("h2", {}, title),
      make("ul", {}, sections.map((each) => make("li", {},
        make("a", { href: `#${each.id}` }, each.querySelector("h3 a").textContent))))));
  }
}

/** Highlights, in the table of contents, the section that is being read. */
function follow() {
  const links = new Map([...contents.querySelectorAll("a")].map((link) => [link.hash.slice(1), link]));
  const seen = new Set();
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (entry.isIntersecting) seen.add(entry.target.id);
      else seen.delete(entry.target.id);
    }
    const first = [...links.keys()].find((id) => seen.has(id));
    for (const [id, link] of links) {
      if (id === first) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  }, { rootMargin: "-80px 0px -60% 0px" });
  for (const each of content.querySelectorAll("section")) observer.observe(each);
}

try {
  const response = await fetch(DOCUMENT);
  if (!response.ok) throw new Error(`${DOCUMENT} returned ${response.status}`);
  page(await response.json());
  follow();
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
} catch (error) {
  const problem = document.getElementById("problem");
  problem.textContent = `The document cannot be shown: ${error.message}`;
  problem.hidden = false;
  throw error;
}
