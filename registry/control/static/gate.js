// Waits until the gate has compared the version with the champion, and then loads the page again.
"use strict";

const POLL_MS = 2000;
const gate = document.getElementById("gate");
const began = performance.now();

async function poll() {
  document.getElementById("waited").textContent = `${Math.round((performance.now() - began) / 1000)} s so far.`;
  try {
    const answer = await fetch(gate.dataset.from, { credentials: "same-origin", redirect: "error" });
    if (answer.status !== 202) {
      location.replace(location.href);
      return;
    }
  } catch {
    // The control plane does not answer now; the next poll asks again.
  }
  setTimeout(poll, POLL_MS);
}

setTimeout(poll, POLL_MS);
