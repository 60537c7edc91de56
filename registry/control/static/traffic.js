// Draws the live figures anew every two seconds; without it they are those of when the page came.
const live = document.getElementById("live");
let failures = 0;

async function renew() {
  if (!document.hidden) {
    try {
      const answer = await fetch(live.dataset.from, { credentials: "same-origin", redirect: "error" });
      if (answer.ok) {
        live.innerHTML = await answer.text();
        failures = 0;
      }
    } catch {
      failures += 1;
    }
  }
  setTimeout(renew, Math.min(2000 * 2 ** failures, 60000));
}

setTimeout(renew, 2000);
