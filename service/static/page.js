"use strict";

const byId = (id) => document.getElementById(id);
const key = byId("key"); // kept in this page only, so that it goes nowhere by itself
const [drop, file, preview, hint, status, bars] =
  ["drop", "file", "preview", "hint", "status", "bars"].map(byId);
const SMALL_PX = 128; // below this, single pixels are worth seeing
let newest = 0;

// Services may ask for a key: the field for it shows when one does.
async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (key.value) headers.Authorization = `Bearer ${key.value}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) byId("door").hidden = false;
  return answer;
}

async function showModel() {
  const answer = await ask("v1/models");
  if (!answer.ok) {
    byId("model").textContent = (await answer.json()).detail;
    return;
  }
  const [model] = (await answer.json()).models;
  byId("model").textContent = model.ready
    ? `${model.name} version ${model.version}` +
      `${model.alias ? ` (${model.alias})` : ""} on ${model.device}`
    : `${model.name} is not ready: ${model.error ?? "loading"}`;
}

function say(text, failed = false) {
  status.textContent = text;
  status.classList.toggle("failed", failed);
}

function draw(predictions) {
  bars.replaceChildren(...predictions.map(({ label, probability }) => {
    const line = document.createElement("li");
    const percent = `${(100 * probability).toFixed(1)} %`;
    const cells = ["label", "track", "share"].map((name) => {
      const cell = document.createElement("span");
      cell.className = name;
      return cell;
    });
    cells[0].textContent = cells[0].title = label;
    const fill = document.createElement("span");
    fill.className = "fill";
    fill.style.width = `${100 * probability}%`;
    cells[1].append(fill);
    cells[2].textContent = percent;
    line.append(...cells);
    return line;
  }));
}

async function classify(picture) {
  const mine = ++newest;
  URL.revokeObjectURL(preview.src);
  preview.onload = () => preview.classList.toggle("small", preview.naturalWidth < SMALL_PX);
  preview.onerror = () => { preview.hidden = true; };
  preview.src = URL.createObjectURL(picture);
  preview.alt = picture.name ?? "pasted picture";
  preview.hidden = false;
  hint.textContent = picture.name ?? "pasted picture";
  bars.replaceChildren();
  say("classifying …");
  try {
    const started = performance.now();
    const answer = await ask("v1/classify", {
      method: "POST",
      headers: { "Content-Type": "application/octet-stream" },
      body: picture,
    });
    const body = await answer.json();
    if (mine !== newest) return; // another picture was dropped meanwhile
    if (!answer.ok) throw new Error(body.detail);
    const total = performance.now() - started;
    draw(body.predictions);
    say(`${body.model.name} version ${body.model.version} · ${body.timings_ms.total.toFixed(1)} ms` +
        ` in the service, ${total.toFixed(1)} ms in all`);
  } catch (error) {
    if (mine === newest) say(error.message, true);
  }
}

file.addEventListener("change", () => file.files[0] && classify(file.files[0]));
drop.addEventListener("keydown", (event) => event.key === "Enter" && file.click());
for (const name of ["dragenter", "dragover"]) {
  drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
for (const name of ["dragleave", "drop"]) {
  drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.remove("over"); });
}
drop.addEventListener("drop", (event) => {
  const [picture] = event.dataTransfer.files;
  if (picture) classify(picture);
});
document.addEventListener("paste", (event) => {
  const [picture] = event.clipboardData.files;
  if (picture) classify(picture);
});
key.addEventListener("change", showModel);
showModel().catch((error) => { byId("model").textContent = error.message; });
