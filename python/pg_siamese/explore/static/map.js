// The map: points on a canvas, the picture under the pointer, and a line around points to choose them.
"use strict";

(async () => {
  const canvas = document.getElementById("map");
  const context = canvas.getContext("2d");
  const picture = document.getElementById("near");
  const text = document.getElementById("near-text");
  const button = document.getElementById("choose");
  // Okabe and Ito's palette, which anybody can tell apart, and grey for the rest.
  const palette = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#b8a900", "#7f5fc4", "#6b4a2f", "#8a8a8a"];
  const NEAR = 14;
  const answer = await fetch(canvas.dataset.points);
  if (!answer.ok) {
    text.textContent = "The map can't be shown. Reload the page.";
    return;
  }
  const { keys, x, y, colours, legend, total } = await answer.json();
  let chosen = new Set();
  let line = [];
  let cursor = null;
  let size = 0;
  let shown = -1;

  const place = (i) => [(x[i] * 0.94 + 1) * size / 2, (1 - y[i] * 0.94) * size / 2];
  const address = (path, parameters) =>
    `${path}?${new URLSearchParams({ c: canvas.dataset.collection, ...parameters })}`;

  function draw() {
    const ratio = window.devicePixelRatio || 1;
    size = canvas.clientWidth;
    canvas.width = canvas.height = Math.round(size * ratio);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const side = keys.length > 5000 ? 2 : keys.length > 500 ? 3.5 : 6;
    keys.forEach((_, i) => {
      const [left, top] = place(i);
      context.globalAlpha = chosen.size && !chosen.has(i) ? 0.15 : 0.85;
      context.fillStyle = palette[Math.min(colours[i], palette.length - 1)];
      context.fillRect(left - side / 2, top - side / 2, side, side);
    });
    context.globalAlpha = 1;
    const ink = getComputedStyle(canvas).color;
    context.strokeStyle = context.fillStyle = ink;
    context.lineWidth = 1.5;
    if (line.length) {
      context.beginPath();
      line.forEach(([left, top], i) => (i ? context.lineTo(left, top) : context.moveTo(left, top)));
      if (!drawing) context.closePath();
      context.stroke();
    }
    if (cursor) {
      context.beginPath();
      context.arc(cursor[0], cursor[1], NEAR, 0, 2 * Math.PI);
      context.stroke();
    }
  }

  function nearest([left, top]) {
    let best = -1;
    let least = NEAR * NEAR;
    keys.forEach((_, i) => {
      const [a, b] = place(i);
      const distance = (a - left) ** 2 + (b - top) ** 2;
      if (distance < least) [best, least] = [i, distance];
    });
    return best;
  }

  function look(point) {
    const found = nearest(point);
    if (found === shown) return;
    shown = found;
    picture.hidden = found < 0;
    if (found < 0) {
      text.textContent = summary();
      return;
    }
    picture.src = address("/picture", { of: `key:${keys[found]}` });
    text.textContent = `${canvas.dataset.key} ${keys[found]}${legend.length ? `: ${legend[colours[found]]}` : ""}`;
  }

  function summary() {
    if (chosen.size) return `${chosen.size} chosen`;
    return keys.length < total ? `${keys.length} of ${total} rows` : `${keys.length} rows`;
  }

  // Whether a point is inside the line: how often a ray from it crosses that.
  function inside([left, top]) {
    let odd = false;
    line.forEach(([a, b], i) => {
      const [c, d] = line[(i + 1) % line.length];
      if (b > top !== d > top && left < ((c - a) * (top - b)) / (d - b) + a) odd = !odd;
    });
    return odd;
  }

  function chooseInside() {
    chosen = new Set(line.length > 2 ? keys.map((_, i) => i).filter((i) => inside(place(i))) : []);
    button.disabled = !chosen.size;
    shown = -1;
    picture.hidden = true;
    text.textContent = summary();
    draw();
  }

  const open = (i) => location.assign(address("/search", { like: `key:${keys[i]}` }));
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  let drawing = false;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    drawing = true;
    line = [at(event)];
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drawing) {
      look(at(event));
      return;
    }
    line.push(at(event));
    draw();
  });
  canvas.addEventListener("pointerup", (event) => {
    drawing = false;
    const [first] = line;
    const end = at(event);
    if (line.every(([a, b]) => Math.hypot(a - first[0], b - first[1]) < 4)) {
      line = [];
      const found = nearest(end);
      if (found >= 0) open(found);
    }
    chooseInside();
  });

  canvas.addEventListener("keydown", (event) => {
    const step = size / (event.shiftKey ? 100 : 25);
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    cursor ??= [size / 2, size / 2];
    if (moves[event.key]) {
      cursor = cursor.map((value, i) => Math.min(size, Math.max(0, value + moves[event.key][i])));
      look(cursor);
    } else if (event.key === " ") {
      line.push([...cursor]);
      chooseInside();
    } else if (event.key === "Escape") {
      line = [];
      chooseInside();
    } else if (event.key === "Enter" && nearest(cursor) >= 0) {
      open(nearest(cursor));
    } else {
      return;
    }
    event.preventDefault();
    draw();
  });

  button.addEventListener("click", async () => {
    const headers = JSON.parse(document.body.getAttribute("hx-headers"));
    headers["Content-Type"] = "application/json";
    const body = JSON.stringify([...chosen].map((i) => keys[i]));
    const kept = await fetch(address("/among", {}), { method: "POST", headers, body });
    if (kept.ok) location.assign((await kept.json()).address);
    else text.textContent = "The rows can't be searched. Reload the page.";
  });

  const list = document.getElementById("legend");
  legend.forEach((name, i) => {
    const item = document.createElement("li");
    const spot = document.createElement("span");
    spot.className = "spot";
    spot.style.background = palette[Math.min(i, palette.length - 1)];
    item.append(spot, name);
    list.append(item);
  });
  text.textContent = summary();
  window.addEventListener("resize", draw);
  draw();
  canvas.dataset.ready = "yes";
})();
