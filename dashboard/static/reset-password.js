// The page for a new password. The emailed URL carries a one-time token in its query. The script first removes the
// token from the address bar and the history. From then on, only this variable contains the token.

const token = new URLSearchParams(location.search).get("token");
history.replaceState(null, "", location.pathname);

const byId = (id) => document.getElementById(id);

function show(id) {
  for (const section of ["choose", "ask", "done"]) byId(section).hidden = section !== id;
}

function finish(title, text) {
  byId("done-title").textContent = title;
  byId("done-text").textContent = text;
  show("done");
  byId("done-title").focus();
}

function askAgain() {
  byId("ask-title").textContent = "This link is no longer valid";
  byId("ask-why").textContent =
    "The link has been used or has expired. Enter your email address and we'll send you a new link.";
  show("ask");
  byId("email").focus();
}

// Returns the status of the response, and its problems as sentences. `path` is relative to the service's root.
async function post(path, body) {
  try {
    const response = await fetch(new URL(`../${path}`, import.meta.url), {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      credentials: "omit",
      cache: "no-store",
    });
    if (response.ok) return { status: response.status, problem: "" };
    const { detail } = await response.json();
    // Messages such as "String should have at least …" are worded for programmers.
    const sentences = Array.isArray(detail) ? detail.map((each) => each.msg.replace(/^String /, "It ")) : [detail];
    return { status: response.status, problem: sentences.map((each) => `${each}.`).join("\n") };
  } catch {
    return { status: 0, problem: "The service cannot be reached. Try again in a moment." };
  }
}

// Handles one form: shows the problem that `act` returns, and ignores a second click while `act` runs.
function onSubmit(formId, problemId, inputs, act) {
  byId(formId).addEventListener("submit", async (event) => {
    event.preventDefault();
    const button = event.target.querySelector("button");
    if (button.disabled) return;
    button.disabled = true;
    byId(problemId).textContent = "";
    const problem = await act();
    byId(problemId).textContent = problem;
    for (const input of inputs) byId(input).setAttribute("aria-invalid", String(problem !== ""));
    button.disabled = false;
    if (problem) byId(inputs[0]).focus();
  });
}

onSubmit("choose-form", "password-problem", ["password", "again"], async () => {
  const password = byId("password").value;
  if (password !== byId("again").value) return "The passwords do not match.";
  const { status, problem } = await post("auth/password/reset", { token, new_password: password });
  if (status === 404) askAgain();
  else if (problem) return problem;
  else finish("Your password was changed", "You can now sign in with it.");
  return "";
});

onSubmit("ask-form", "email-problem", ["email"], async () => {
  const { status, problem } = await post("auth/password/forgot", { email: byId("email").value.trim() });
  if (status === 422) return "Enter a valid email address.";
  if (problem) return problem;
  finish("Check your inbox", "If there is an account with this address, you will receive an email with a link.");
  return "";
});

show(token ? "choose" : "ask");
byId(token ? "password" : "email").focus();
