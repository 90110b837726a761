// What the page does besides links and forms: files that are dropped or pasted, boxes on a picture,
// and the button that copies SQL.
"use strict";

const form = () => document.getElementById("search");
const field = (name) => document.querySelector(`input[form="search"][name="${name}"]`);
const EDGES = ["left", "top", "right", "bottom"];
const UNREACHABLE = "The page can't be reached. Does the command still run?";
// A smaller box is a click.
const LEAST_PERCENT = 2;

function tell(text) {
  const paragraph = document.createElement("p");
  paragraph.textContent = text;
  document.getElementById("problem").replaceChildren(paragraph);
}

// --- Files ------------------------------------------------------------------------------------------

async function searchWith(file) {
  const parameters = new URLSearchParams(new FormData(form()));
  const headers = JSON.parse(document.body.getAttribute("hx-headers"));
  headers["Content-Type"] = "application/octet-stream";
  document.body.classList.add("busy");
  try {
    const answer = await fetch(`/files?${parameters}`, { method: "POST", headers, body: file });
    if (answer.ok) {
      location.assign((await answer.json()).address);
      return;
    }
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    tell(page.getElementById("problem")?.textContent.trim() || "The file was not accepted.");
  } catch {
    tell(UNREACHABLE);
  }
  document.body.classList.remove("busy");
}

document.addEventListener("change", (event) => {
  const target = event.target;
  if (target.id === "file" && target.files.length) {
    event.stopPropagation();
    searchWith(target.files[0]);
  } else if (form() && target.form === form() && !form().contains(target)) {
    // Half a box means nothing yet.
    const given = EDGES.filter((name) => field(name)?.value).length;
    if (given === 0 || given === EDGES.length) form().requestSubmit();
  }
}, true);

document.addEventListener("dragover", (event) => {
  if (form() && event.dataTransfer.types.includes("Files")) {
    event.preventDefault();
    document.body.classList.add("dropping");
  }
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  if (form() && event.dataTransfer.files.length) {
    event.preventDefault();
    searchWith(event.dataTransfer.files[0]);
  }
});
document.addEventListener("paste", (event) => {
  if (form() && event.clipboardData.files.length) {
    event.preventDefault();
    searchWith(event.clipboardData.files[0]);
  }
});

// --- Boxes ------------------------------------------------------------------------------------------

function show(area, edges) {
  let box = area.querySelector(".box");
  if (!box) {
    box = document.createElement("div");
    box.className = "box";
    area.append(box);
  }
  box.style.left = `${edges[0]}%`;
  box.style.top = `${edges[1]}%`;
  box.style.width = `${edges[2] - edges[0]}%`;
  box.style.height = `${edges[3] - edges[1]}%`;
}

function showChosen() {
  const area = document.querySelector(".box-area");
  const edges = EDGES.map((name) => field(name)?.value);
  if (area && edges.every((edge) => edge)) show(area, edges.map(Number));
}

document.addEventListener("pointerdown", (event) => {
  const area = event.target.closest(".box-area");
  if (!area || event.button) return;
  event.preventDefault();
  const place = area.getBoundingClientRect();
  const percent = (at, from, size) => Math.min(100, Math.max(0, (100 * (at - from)) / size));
  const point = (e) => [percent(e.clientX, place.left, place.width), percent(e.clientY, place.top, place.height)];
  const start = point(event);
  const edges = (e) => {
    const end = point(e);
    return [0, 1].map((i) => Math.min(start[i], end[i])).concat([0, 1].map((i) => Math.max(start[i], end[i])));
  };
  const move = (e) => show(area, edges(e));
  area.setPointerCapture(event.pointerId);
  area.addEventListener("pointermove", move);
  area.addEventListener("pointerup", (e) => {
    area.removeEventListener("pointermove", move);
    const found = edges(e);
    if (found[2] - found[0] < LEAST_PERCENT || found[3] - found[1] < LEAST_PERCENT) return;
    EDGES.forEach((name, i) => { field(name).value = found[i].toFixed(1); });
    form().requestSubmit();
  }, { once: true });
});

// --- Buttons ----------------------------------------------------------------------------------------

document.addEventListener("click", async (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.copy) {
    await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
    button.textContent = "Copied";
  } else if (button?.dataset.clear) {
    button.dataset.clear.split(" ").forEach((name) => { field(name).value = ""; });
    form().requestSubmit();
  }
});

// --- Answers that come -------------------------------------------------------------------------------

document.addEventListener("DOMContentLoaded", showChosen);
document.addEventListener("htmx:beforeRequest", () => document.body.classList.add("busy"));
document.addEventListener("htmx:afterRequest", () => document.body.classList.remove("busy"));
document.addEventListener("htmx:sendError", () => tell(UNREACHABLE));
document.addEventListener("htmx:afterSettle", () => {
  showChosen();
  // What had the focus is gone, so that the keyboard goes on at the answers.
  if (document.activeElement === document.body) document.getElementById("answers")?.focus({ preventScroll: true });
});
