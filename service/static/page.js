// Classifies the pictures that a visitor drops, pastes or chooses, a few at a time.
"use strict";

const MAX_REQUESTS = 4; // at a time; more would only wait in the service's queue
const MAX_ATTEMPTS = 4; // to classify a picture, while the service answers 429 or 503
const SMALL_PX = 128; // a smaller picture is enlarged without smoothing
const byId = (id) => document.getElementById(id);
const token = byId("token"); // kept only in this page, never stored
const [drop, file, status, results] = ["drop", "file", "status", "results"].map(byId);
let current = new AbortController(); // aborts the requests for the pictures on the page

// Sends a request. If the service answers that it needs a token, the field for the token appears.
async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (token.value) headers.Authorization = `Bearer ${token.value}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) byId("access").hidden = false;
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

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

const percent = (probability) => `${(100 * probability).toFixed(1)} %`;

// One line for each class: its label, a bar and its probability.
function bars(predictions) {
  const list = element("ol", "bars");
  list.append(...predictions.map(({ label, probability }) => {
    const line = element("li", "");
    const [name, track, fill] = [element("span", "label", label), element("span", "track"), element("span", "fill")];
    name.title = label;
    fill.style.width = `${100 * probability}%`;
    track.append(fill);
    line.append(name, track, element("span", "share", percent(probability)));
    return line;
  }));
  return list;
}

function addPicture(picture) {
  const name = picture.name || "pasted picture";
  const item = element("li", "picture");
  const image = element("img", "");
  image.alt = "";
  image.onload = () => image.classList.toggle("small", image.naturalWidth < SMALL_PX);
  image.onerror = () => { image.hidden = true; };
  image.src = URL.createObjectURL(picture);
  const answer = element("div", "answer");
  answer.append(element("p", "waiting", "waiting …"));
  item.append(image, element("p", "name", name), answer);
  results.append(item);
  return { picture, answer, name };
}

function showAnswer(place, { model, predictions }, isOnly) {
  const [best, ...others] = predictions;
  const line = element("p", "best");
  line.append(element("b", "", best.label), ` ${percent(best.probability)} `,
              element("small", "", `${model.name} version ${model.version}`));
  place.replaceChildren(line);
  if (isOnly || others.length === 0) {
    place.append(bars(predictions));
    return;
  }
  const more = element("details", "");
  more.append(element("summary", "", "all classes"), bars(predictions));
  place.append(more);
}

const pause = (ms) => new Promise((resolve) => { setTimeout(resolve, ms); });

async function classify(picture, signal) {
  for (let attempt = 1; ; attempt += 1) {
    const answer = await ask("v1/classify", {
      method: "POST",
      headers: { "Content-Type": "application/octet-stream" },
      body: picture,
      signal,
    });
    const body = await answer.json();
    if (answer.ok) return body;
    const isBusy = answer.status === 429 || answer.status === 503;
    if (!isBusy || attempt === MAX_ATTEMPTS) throw new Error(body.detail);
    await pause(1000 * (Number(answer.headers.get("Retry-After")) || 1));
  }
}

async function classifyAll(files) {
  const pictures = [...files];
  if (pictures.length === 0) return;
  current.abort(); // the new pictures replace the previous ones
  current = new AbortController();
  const { signal } = current;
  for (const image of results.querySelectorAll("img")) URL.revokeObjectURL(image.src);
  results.replaceChildren();
  const entries = pictures.map(addPicture);
  const isOnly = entries.length === 1;
  const started = performance.now();
  let [answered, failed] = [0, 0];
  const showProgress = () => {
    const elapsed_ms = performance.now() - started;
    status.textContent = `${answered + failed} of ${entries.length} answered` +
      `${failed ? `, ${failed} with an error` : ""}, ${elapsed_ms.toFixed(0)} ms`;
  };
  const waiting = entries.values(); // an iterator that the workers below share
  const work = async () => {
    for (const { picture, answer, name } of waiting) {
      try {
        const body = await classify(picture, signal);
        if (signal.aborted) return;
        showAnswer(answer, body, isOnly);
        answered += 1;
      } catch (error) {
        if (signal.aborted) return;
        answer.replaceChildren(element("p", "failed", `${name}: ${error.message}`));
        failed += 1;
      }
      showProgress();
    }
  };
  showProgress();
  await Promise.all(Array.from({ length: MAX_REQUESTS }, work));
}

file.addEventListener("change", () => {
  classifyAll(file.files);
  file.value = ""; // so that the same pictures can be chosen again
});
for (const name of ["dragenter", "dragover"]) {
  drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
for (const name of ["dragleave", "drop"]) {
  drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.remove("over"); });
}
drop.addEventListener("drop", (event) => classifyAll(event.dataTransfer.files));
document.addEventListener("paste", (event) => classifyAll(event.clipboardData.files));
token.addEventListener("change", showModel);
showModel().catch((error) => { byId("model").textContent = error.message; });
