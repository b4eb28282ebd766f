// The page for a new password. The link in the mail carries a token in the query: it is taken out of the address bar and
// the history before anything else happens, and kept nowhere but here.

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
  byId("ask-title").textContent = "This link does not work";
  byId("ask-why").textContent =
    "It was used before, or is older than a day. Say which address your account has, and you get another one.";
  show("ask");
  byId("email").focus();
}

// The status of the answer, and what is wrong in sentences.
async function post(path, body) {
  try {
    const answer = await fetch(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
      credentials: "omit",
      cache: "no-store",
    });
    if (answer.ok) return { status: answer.status, problem: "" };
    const { detail } = await answer.json();
    // "String" is the word of programs.
    const sentences = Array.isArray(detail) ? detail.map((each) => each.msg.replace(/^String /, "It ")) : [detail];
    return { status: answer.status, problem: sentences.map((each) => `${each}.`).join("\n") };
  } catch {
    return { status: 0, problem: "The service cannot be reached. Try again in a moment." };
  }
}

// One form: what `act` answers is shown as its problem, and nothing is sent twice.
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
  if (password !== byId("again").value) return "The two are not the same.";
  const { status, problem } = await post("auth/password/reset", { token, new_password: password });
  if (status === 404) askAgain();
  else if (problem) return problem;
  else finish("Your password was changed", "You can sign in with it now.");
  return "";
});

onSubmit("ask-form", "email-problem", ["email"], async () => {
  const { status, problem } = await post("auth/password/forgot", { email: byId("email").value.trim() });
  if (status === 422) return "This is no e-mail address that mails can be sent to.";
  if (problem) return problem;
  finish("Look into your mailbox", "If there is an account with this address, a mail with a link is on its way.");
  return "";
});

show(token ? "choose" : "ask");
byId(token ? "password" : "email").focus();
