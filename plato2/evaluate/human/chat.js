// Enter sends, what is typed is kept in the browser until it is sent, and a reply is shown when it is there.
// Without scripts the page is a plain form, which works, too.

const form = document.getElementById("say");
const standing = document.getElementById("standing");

function talk() {
  const box = form.elements.text;
  const draft = `plato2 ${form.action} ${form.elements.place.value}`;
  try {
    for (const key of Object.keys(localStorage)) {
      if (key.startsWith("plato2 ") && key !== draft) localStorage.removeItem(key);
    }
    box.value ||= localStorage.getItem(draft) ?? "";
    box.addEventListener("input", () => localStorage.setItem(draft, box.value));
  } catch {
    // a browser that keeps nothing
  }
  box.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    form.requestSubmit();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send(form);
  });
}

async function look() {
  for (;;) {
    await wait(1);
    try {
      const reply = await fetch(standing.dataset.url);
      if (reply.status !== 503 && (await reply.text()) !== standing.dataset.standing) {
        location.reload();
        return;
      }
      trouble.hidden = true;
    } catch {
      unreachable();
    }
  }
}

if (form) talk();
else if (!standing.dataset.standing.endsWith("failed")) look();
scrollTo(0, document.body.scrollHeight);
