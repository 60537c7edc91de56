// Says in a button that its request runs, and for how long, and takes no second press meanwhile.
"use strict";

let timer;

addEventListener("submit", (event) => {
  const button = event.submitter;
  const text = button?.dataset.busy;
  if (text === undefined) return;
  const began = performance.now();
  const show = () => {
    button.textContent = `${text}: ${Math.round((performance.now() - began) / 1000)} s`;
  };
  button.dataset.idle = button.textContent;
  // A promotion may take a minute: those who do not see the button hear it once.
  document.getElementById("progress").textContent = `${text} …`;
  setTimeout(() => { // after the browser has read the form: a disabled button is not sent
    button.disabled = true;
    show();
  });
  timer = setInterval(show, 1000);
});

// A page that the browser kept comes back with the button as it was left.
addEventListener("pageshow", () => {
  clearInterval(timer);
  document.getElementById("progress").textContent = "";
  for (const button of document.querySelectorAll("button[data-idle]")) {
    button.textContent = button.dataset.idle;
    button.disabled = false;
  }
});
