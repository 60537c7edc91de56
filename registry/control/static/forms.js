// Shows in a button how long its request has been running, and disables the button meanwhile.
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
  // A promotion may take a minute: a screen reader announces the start once.
  document.getElementById("progress").textContent = `${text} …`;
  setTimeout(() => { // after the browser has read the form, because it omits a disabled button
    button.disabled = true;
    show();
  });
  timer = setInterval(show, 1000);
});

// A browser that goes back may show its cached page, in which the button is still disabled.
addEventListener("pageshow", () => {
  clearInterval(timer);
  document.getElementById("progress").textContent = "";
  for (const button of document.querySelectorAll("button[data-idle]")) {
    button.textContent = button.dataset.idle;
    button.disabled = false;
  }
});
