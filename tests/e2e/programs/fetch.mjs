// Asks a service with Node's own `fetch`: `node fetch.mjs URL FOLDER`. Prints one JSON object.
import { readdirSync, readFileSync } from "node:fs";

const [url, folder] = process.argv.slice(2);
const files = readdirSync(folder).filter((name) => name.endsWith(".png")).sort();
const pictures = files.map((name) => readFileSync(`${folder}/${name}`));
const texts = pictures.map((each) => each.toString("base64"));

async function post(path, body, headers = {}) {
  const answer = await fetch(url + path, { method: "POST", body, headers });
  if (!answer.ok) throw new Error(`${path}: ${answer.status} ${await answer.text()}`);
  return answer.json();
}

const json = { "Content-Type": "application/json" };
const form = new FormData();
for (const each of pictures) form.append("image", new Blob([each], { type: "image/png" }), "x.png");
const parts = new FormData();
for (const each of pictures) parts.append("data", new Blob([each]), "x.png");
const inputs = [{ name: "x", datatype: "BYTES", shape: [texts.length], data: texts }];

const ordered = (predictions) =>
  predictions.slice().sort((one, other) => one.index - other.index).map((each) => each.probability);
const v1 = (answer) => answer.results.map((each) => ordered(each.predictions));
const raw = [];
for (const each of pictures) {
  const answer = await post("/v1/classify?top_k=10", each, { "Content-Type": "image/png" });
  raw.push(ordered(answer.predictions));
}
const tensor = (await post("/v2/models/digits/infer", JSON.stringify({ inputs }), json)).outputs[0];
const rows = [];
for (let at = 0; at < tensor.data.length; at += tensor.shape[1]) {
  rows.push(tensor.data.slice(at, at + tensor.shape[1]));
}
const scored = await post("/invocations", JSON.stringify({ inputs: texts }), json);
const served = await post("/predictions/digits", parts);
console.log(
  JSON.stringify({
    probabilities: {
      "v1 raw": raw,
      "v1 form": v1(await post("/v1/classify?top_k=10", form)),
      "v1 json": v1(await post("/v1/classify?top_k=10", JSON.stringify({ images: texts }), json)),
      "v2 json": rows,
      "mlflow json": scored.predictions.map((each) => each.probabilities),
    },
    // The order of an object's members is lost here, as these labels look like numbers.
    torchserve: served.map((each) => Object.entries(each).sort((one, other) => other[1] - one[1])[0]),
    ping: await (await fetch(`${url}/ping`)).json(),
  }),
);
