// A submit that waits for the server; served before rate.js and chat.js, in the same file.
"use strict";

const trouble = document.getElementById("trouble");
const wait = (seconds) => new Promise((done) => setTimeout(done, seconds * 1000));
let sending = false;

function unreachable() {
  trouble.textContent = "The server cannot be reached. What you have entered is kept; this page tries again.";
  trouble.hidden = false;
}

async function send(form) {
  if (sending) return;
  sending = true;
  const button = form.querySelector("button[type=submit]");
  button.disabled = true;
  const body = new URLSearchParams(new FormData(form));
  for (;;) {
    try {
      const reply = await fetch(form.action, { method: "POST", body });
      if (reply.redirected) {
        location.assign(reply.url);
        return;
      }
      if (reply.status !== 503) {
        form.submit(); // shows what the server says; the same twice counts once
        return;
      }
    } catch {
      // no connection
    }
    unreachable();
    await wait(2);
  }
}
