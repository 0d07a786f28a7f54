// Keys, and answers kept in the browser until they are submitted.
// Without scripts the page is a plain form, which works, too.

const form = document.getElementById("rate");
const questions = [...form.querySelectorAll(".question")];
const draft = `plato2 ${form.action} ${form.elements.revision.value}`;
let now = 0;

function answered(question) {
  return question.querySelector("input:checked") !== null;
}

function show(place, scroll) {
  now = Math.max(0, Math.min(questions.length - 1, place));
  questions.forEach((question, number) => question.classList.toggle("now", number === now));
  if (scroll) questions[now].scrollIntoView({ block: "center" });
}

function answer(level) {
  const inputs = questions[now].querySelectorAll("input");
  if (level < 0 || level >= inputs.length) return false;
  inputs[level].checked = true;
  questions[now].classList.remove("missing");
  keep();
  return true;
}

// ------------------------------------------------------------------ kept until they are submitted

function keep() {
  const ticked = [...form.querySelectorAll("input:checked")].map((input) => [input.name, input.value]);
  try {
    localStorage.setItem(draft, JSON.stringify(ticked));
  } catch {
    // a browser that keeps nothing
  }
}

function restore() {
  try {
    for (const key of Object.keys(localStorage)) {
      if (key.startsWith("plato2 ") && key !== draft) localStorage.removeItem(key);
    }
    for (const [name, value] of JSON.parse(localStorage.getItem(draft) ?? "[]")) {
      const input = [...form.querySelectorAll("input[type=radio]")].find(
        (one) => one.name === name && one.value === value,
      );
      if (input) input.checked = true;
    }
  } catch {
    // as above
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  send(form);
});

// ----------------------------------------------------------------------------------------- keys

form.addEventListener("change", (event) => {
  const question = event.target.closest(".question");
  question.classList.remove("missing");
  show(questions.indexOf(question), false);
  keep();
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "TEXTAREA") return;
  const levels = [...questions[now].querySelectorAll("input")];
  const ticked = levels.findIndex((input) => input.checked);
  if (/^[0-9]$/.test(event.key)) {
    if (answer(Number(event.key))) {
      const next = questions.findIndex((question, number) => number > now && !answered(question));
      const first = questions.findIndex((question) => !answered(question));
      show(next >= 0 ? next : first >= 0 ? first : now, true);
    }
  } else if (event.key === "ArrowUp") show(now - 1, true);
  else if (event.key === "ArrowDown") show(now + 1, true);
  else if (event.key === "ArrowLeft") answer(Math.max(0, ticked - 1));
  else if (event.key === "ArrowRight") {
    answer(ticked < 0 ? levels.length - 1 : Math.min(levels.length - 1, ticked + 1));
  } else if (event.key === "Enter" && event.target.tagName !== "A" && event.target.tagName !== "SUMMARY") {
    form.requestSubmit();
  } else if (event.key === "b") document.getElementById("back")?.click();
  else return;
  event.preventDefault();
});

restore();
const first = questions.findIndex((question) => !answered(question));
show(first >= 0 ? first : 0, false);
if (document.getElementById("back") && matchMedia("(max-width: 900px)").matches) {
  document.getElementById("criteria").open = false; // seen on the first item
}
