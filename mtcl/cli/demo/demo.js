// Runs once, as the body of a function of `element`, whose content changes with every image.
const decoded = new WeakMap(); // figure -> promise of its values
const pointer = { x: 0.5, y: 0.5 };
let shown = 0;

async function decodeValues(about) {
  const packed = Uint8Array.from(atob(about.data), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  return { ...about, array: about.bytes === 2 ? new Uint16Array(buffer) : new Uint8Array(buffer) };
}

const formats = {
  class: (at) => (at.names[at.value(0)] ?? "void"),
  metres: (at) => (at.value(0) ? `${(at.value(0) / 1000).toFixed(2)} m` : "no depth"),
  inverse_depth: (at) => (at.value(0) ? `inverse depth ${(at.value(0) / 10000).toFixed(4)}` : "no depth"),
  percent: (at) => `${at.value(0)} %`,
  direction: (at) => {
    const names = [["left", "right"], ["up", "down"], ["to the viewer", "away"]];
    return names
      .map(([plus, minus], axis) => [at.value(axis) - 100, plus, minus])
      .map(([part, plus, minus]) => `${(Math.abs(part) / 100).toFixed(2)} ${part < 0 ? minus : plus}`)
      .join(", ");
  },
};

function formatValue(about) {
  const [width, height] = about.size;
  const column = Math.min(width - 1, Math.floor(pointer.x * width));
  const row = Math.min(height - 1, Math.floor(pointer.y * height));
  const parts = about.kind === "direction" ? 3 : 1;
  const value = (part) => about.array[(row * width + column) * parts + part];
  return formats[about.kind]({ names: about.names, value });
}

async function show() {
  const turn = ++shown;
  for (const figure of element.querySelectorAll(".tile")) {
    const frame = figure.querySelector(".frame");
    frame.classList.add("pointed");
    frame.style.setProperty("--x", `${100 * pointer.x}%`);
    frame.style.setProperty("--y", `${100 * pointer.y}%`);
    if (!figure.dataset.values) continue;
    if (!decoded.has(figure)) decoded.set(figure, decodeValues(JSON.parse(figure.dataset.values)));
    const about = await decoded.get(figure);
    if (turn !== shown) return;
    figure.querySelector("output").textContent = formatValue(about);
  }
}

function hide() {
  shown++;
  for (const frame of element.querySelectorAll(".frame")) frame.classList.remove("pointed");
  for (const output of element.querySelectorAll("output")) output.textContent = "";
}

function point(event) {
  const frame = event.target.closest(".frame");
  if (!frame) return event.pointerType === "mouse" && hide();
  const box = frame.getBoundingClientRect();
  pointer.x = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
  pointer.y = Math.min(1, Math.max(0, (event.clientY - box.top) / box.height));
  show();
}

const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
element.addEventListener("pointermove", point);
element.addEventListener("pointerdown", point);
element.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
element.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hide();
  if (!event.target.closest(".frame") || !steps[event.key]) return;
  event.preventDefault();
  const [x, y] = steps[event.key];
  pointer.x = Math.min(1, Math.max(0, pointer.x + x / 50));
  pointer.y = Math.min(1, Math.max(0, pointer.y + y / 50));
  show();
});
