// Sends the requests of the forms on /docs, and shows the answers.
"use strict";

const MAX_SHOWN_CHARS = 20000;
const SHOWN_HEADERS = ["content-type", "x-model-version", "x-request-id", "retry-after"];
const token = document.getElementById("token"); // kept only in this page, never stored
const authorization = () => (token.value ? { Authorization: `Bearer ${token.value}` } : {});

function address(form) {
  let path = form.dataset.path.slice(1); // relative: a proxy may serve the page below a path prefix
  const query = new URLSearchParams();
  for (const input of form.querySelectorAll("input[data-in]")) {
    if (input.dataset.in === "path") path = path.replace(`{${input.name}}`, encodeURIComponent(input.value));
    else if (input.value) query.set(input.name, input.value);
  }
  return query.size ? `${path}?${query}` : path;
}

async function base64(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  let text = "";
  for (let at = 0; at < bytes.length; at += 8192) text += String.fromCharCode(...bytes.subarray(at, at + 8192));
  return btoa(text);
}

async function json(files, make) {
  const texts = await Promise.all([...files].map(base64));
  return { body: JSON.stringify(make(texts)), type: "application/json" };
}

// How each protocol takes pictures.
const makers = {
  // One picture is the body; several pictures are parts of a form.
  images(files) {
    if (files.length === 1) return { body: files[0], type: "application/octet-stream" };
    const parts = new FormData();
    for (const file of files) parts.append("image", file);
    return { body: parts };
  },
  tensor: (files) =>
    json(files, (data) => ({ inputs: [{ name: "image", datatype: "BYTES", shape: [data.length], data }] })),
  scoring: (files) => json(files, (inputs) => ({ inputs })),
};

function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  made.className = className;
  return made;
}

function pretty(text, type) {
  const shown = type?.includes("json") ? JSON.stringify(JSON.parse(text), null, 2) : text;
  const rest = shown.length - MAX_SHOWN_CHARS;
  return rest > 0 ? `${shown.slice(0, MAX_SHOWN_CHARS)}\n… and ${rest} more characters` : shown;
}

async function send(form) {
  const options = { method: form.dataset.method, headers: authorization() };
  const files = form.querySelector("input[type=file]")?.files;
  if (files) {
    const { body: sent, type } = await makers[form.dataset.maker](files);
    options.body = sent;
    if (type) options.headers["Content-Type"] = type;
  }
  const started = performance.now();
  const answer = await fetch(address(form), options);
  const text = await answer.text();
  const elapsed_ms = performance.now() - started;
  const status = `${answer.status} ${answer.statusText}, ${elapsed_ms.toFixed(1)} ms`;
  const headers = SHOWN_HEADERS.filter((name) => answer.headers.has(name));
  const content = element("pre", pretty(text, answer.headers.get("content-type")));
  content.tabIndex = 0; // so that a keyboard can scroll it
  return [
    element("p", status, answer.ok ? "status" : "status failed"),
    element("pre", headers.map((name) => `${name}: ${answer.headers.get(name)}`).join("\n")),
    content,
  ];
}

async function submit(event) {
  event.preventDefault();
  const form = event.target;
  const button = form.querySelector("button");
  const place = form.querySelector(".answer");
  button.disabled = true;
  place.replaceChildren(element("p", "sending …"));
  try {
    place.replaceChildren(...(await send(form)));
  } catch (error) {
    place.replaceChildren(element("p", error.message, "status failed"));
  }
  button.disabled = false;
}

// Fills the forms with the model that is served, in place of the examples' model.
async function nameServedModel() {
  const answer = await fetch("v1/models", { headers: authorization() });
  if (!answer.ok) return;
  const [model] = (await answer.json()).models;
  for (const input of document.querySelectorAll("input[data-in=path]")) {
    const value = model[input.name];
    if (value != null && input.value === input.defaultValue) input.value = input.defaultValue = value;
  }
}

const page = document.querySelector("main");
for (const line of document.querySelectorAll(".curl")) {
  line.textContent = line.textContent.replace(page.dataset.base, new URL(".", document.baseURI).href.replace(/\/$/, ""));
}
for (const form of document.querySelectorAll("form.try")) {
  form.hidden = false;
  form.addEventListener("submit", submit);
}
document.getElementById("access").hidden = false;
token.addEventListener("change", () => nameServedModel().catch(() => {}));
nameServedModel().catch(() => {}); // if the service does not answer, the forms show the error
