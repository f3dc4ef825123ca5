// The page of the gateway. It uses the gateway's own API and nothing else.

const at = (id) => document.getElementById(id);
const KEY = "flowturbo-key", HISTORY = "flowturbo-history", MOST_HISTORY = 24, PARTIAL = 3;
const NOTHING = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=";  // one clear pixel
const models = new Map();
let running = null;  // the AbortController of what is being made
let source = null;   // the file to start from: { file, image }
let painted = null;  // the canvas with the mask: opaque where to repaint
let last = null;     // the last request: { path, fields, files }

// Requests -----------------------------------------------------------------------------------

async function call(path, options = {}) {
  const headers = { ...options.headers };
  const key = at("key").value.trim();
  if (key) headers.Authorization = `Bearer ${key}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  if (answer.status === 401) at("key-box").open = true;
  let told = `the gateway answered with status ${answer.status}`;
  try { told = (await answer.json()).error.message; } catch { /* no message */ }
  const wait = answer.headers.get("Retry-After");
  throw new Error(wait ? `${told} (try again in ${wait} s)` : told);
}

function body(request) {
  if (!request.files) {
    return { headers: { "Content-Type": "application/json" }, body: JSON.stringify(request.fields) };
  }
  const form = new FormData();
  for (const [name, value] of Object.entries(request.fields)) form.append(name, String(value));
  for (const [name, file] of Object.entries(request.files)) form.append(name, file, `${name}.png`);
  return { body: form };
}

// Yields the events of a streamed answer.
async function* events(request, signal) {
  const answer = await call(request.path, { method: "POST", signal, ...body(request) });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((each) => each.startsWith("data: "));
      if (!line) continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

// The form -----------------------------------------------------------------------------------

const mode = () => document.querySelector("input[name=mode]:checked").value;
const model = () => models.get(at("model").value);
const isClass = () => model().condition.kind === "class_label";

function option(value, text = value) {
  const made = document.createElement("option");
  made.value = value;
  made.textContent = text;
  return made;
}

function showModel() {
  const of = model(), names = of.condition.class_names ?? [];
  at("for-prompt").hidden = isClass();
  at("for-class").hidden = !isClass();
  at("class").replaceChildren(...names.map((name) => option(name)));
  at("class").hidden = document.querySelector("label[for=class]").hidden = !names.length;
  at("class-id").hidden = document.querySelector("label[for=class-id]").hidden = names.length > 0;
  at("class-id").max = (of.condition.num_classes ?? 1) - 1;
  at("class-id").disabled = !isClass() || names.length > 0;  // what is hidden must not be checked
  const presets = Object.keys(of.presets);
  const known = [...presets, ...Object.keys(of.solvers ?? {})];
  at("schedules").replaceChildren(...known.map((name) => option(name, of.presets[name] ?? name)));
  at("schedule").placeholder = of.default_schedule;
  at("many").value = presets.slice(0, 3).join(", ");
  at("guidance").placeholder = of.default_guidance_scale;
  at("for-guidance").hidden = of.condition.null_class === false || of.condition.can_guide === false;
  const sizes = of.sizes.map(([high, wide]) => `${wide}x${high}`);
  at("size").replaceChildren(...sizes.map((size) => option(size)));
  for (const each of document.querySelectorAll("input[value=edit], input[value=inpaint]")) {
    each.disabled = !of.edits;
    if (!of.edits && each.checked) document.querySelector("input[value=create]").click();
  }
  showMode();
}

function showMode() {
  const now = mode(), ofImage = now === "edit" || now === "inpaint";
  at("for-image").hidden = !ofImage;
  at("for-strength").hidden = now !== "edit";
  at("for-one").hidden = now === "compare";
  at("for-many").hidden = now !== "compare";
  at("brush-tools").hidden = now !== "inpaint";
  at("canvas").classList.toggle("brush", now === "inpaint");  // a finger paints or scrolls
  at("canvas-help").textContent = now === "inpaint"
    ? "Paint what to repaint. By keyboard: arrows move the brush, Space paints." : "";
  at("canvas").setAttribute("aria-label", now === "inpaint"
    ? "Image to repaint. Arrow keys move the brush, Space paints." : "Image to start from");
  drawCanvas();
}

// The request of the form; without a schedule for the model's default.
function request(schedule, seed, partial) {
  const fields = { model: at("model").value };
  if (isClass()) {
    const names = model().condition.class_names ?? [];
    fields.label = names.length ? at("class").value : Number(at("class-id").value);
  } else {
    fields.prompt = at("prompt").value.trim();
    const negative = at("negative").value.trim();
    if (negative) fields.negative_prompt = negative;
  }
  if (schedule) fields.schedule = schedule;
  if (at("guidance").value && !at("for-guidance").hidden) {
    fields.guidance_scale = Number(at("guidance").value);
  }
  if (at("size").value) fields.size = at("size").value;
  if (seed !== null) fields.seed = seed;
  if (partial) Object.assign(fields, { stream: true, partial_images: partial });
  return { path: "v1/images/generations", fields };
}

async function withImage(made) {
  if (!source) throw new Error("choose an image to start from");
  const files = { image: source.file };
  if (mode() === "inpaint") {
    files.mask = await maskFile();
  } else {
    made.fields.strength = Number(at("strength").value);
  }
  return { ...made, path: "v1/images/edits", files };
}

const seedOf = () => at("seed").value === "" ? null : Number(at("seed").value);
const randomSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

// The image to start from, and its mask --------------------------------------------------------

async function takeImage(file) {
  const image = await createImageBitmap(file);
  source = { file, image };
  painted = Object.assign(document.createElement("canvas"),
    { width: image.width, height: image.height });
  Object.assign(at("canvas"), { width: image.width, height: image.height });
  brush.x = image.width / 2;
  brush.y = image.height / 2;
  at("canvas-box").hidden = false;
  drawCanvas();
}

const brush = { x: 0, y: 0, shown: false };
// The slider is in hundredths of the image's longer side.
const radius = () => at("brush").value / 200 * Math.max(painted.width, painted.height);

function drawCanvas() {
  if (!source) return;
  const on = at("canvas").getContext("2d");
  on.clearRect(0, 0, painted.width, painted.height);
  on.drawImage(source.image, 0, 0);
  if (mode() !== "inpaint") return;
  on.globalAlpha = 0.6;
  on.drawImage(painted, 0, 0);
  on.globalAlpha = 1;
  if (!brush.shown) return;
  on.beginPath();
  on.arc(brush.x, brush.y, radius(), 0, 7);
  on.lineWidth = Math.max(1, painted.width / 200);
  on.strokeStyle = "#fff";
  on.stroke();
}

function paint(x, y) {
  const on = painted.getContext("2d");
  on.strokeStyle = on.fillStyle = "#e0218a";
  on.lineCap = "round";
  on.lineWidth = 2 * radius();
  on.beginPath();
  on.moveTo(brush.x, brush.y);
  on.lineTo(x, y);
  on.stroke();
  on.beginPath();
  on.arc(x, y, radius(), 0, 7);
  on.fill();
}

function pointed(event) {
  const box = at("canvas").getBoundingClientRect();
  return [(event.clientX - box.left) / box.width * painted.width,
    (event.clientY - box.top) / box.height * painted.height];
}

function onPointer(event) {
  if (mode() !== "inpaint" || !source) return;
  const [x, y] = pointed(event);
  if (event.type === "pointerdown") {
    at("canvas").setPointerCapture(event.pointerId);
    [brush.x, brush.y] = [x, y];
  }
  if (event.buttons) paint(x, y);
  Object.assign(brush, { x, y, shown: event.type !== "pointerleave" });
  drawCanvas();
}

function onKey(event) {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (mode() !== "inpaint" || !source) return;
  if (event.key === " ") {
    paint(brush.x, brush.y);
  } else if (step[event.key]) {
    const [dx, dy] = step[event.key];
    brush.x = Math.min(painted.width, Math.max(0, brush.x + dx * radius() / 2));
    brush.y = Math.min(painted.height, Math.max(0, brush.y + dy * radius() / 2));
  } else {
    return;
  }
  event.preventDefault();
  brush.shown = true;
  drawCanvas();
}

// A PNG file that is transparent where to repaint.
async function maskFile() {
  const pixels = painted.getContext("2d").getImageData(0, 0, painted.width, painted.height).data;
  if (!pixels.some((value, k) => k % 4 === 3 && value > 127)) {
    throw new Error("paint what to repaint first");
  }
  const mask = Object.assign(document.createElement("canvas"),
    { width: painted.width, height: painted.height });
  const on = mask.getContext("2d");
  on.fillRect(0, 0, mask.width, mask.height);
  on.globalCompositeOperation = "destination-out";
  on.drawImage(painted, 0, 0);
  return new Promise((done) => mask.toBlob(done, "image/png"));
}

// Results --------------------------------------------------------------------------------------

function figure(title) {
  const made = document.createElement("figure");
  const image = document.createElement("img");
  const caption = document.createElement("figcaption");
  image.alt = `${title}, not there yet`;
  image.className = "forming";
  image.src = NOTHING;
  image.addEventListener("load", () => image.classList.toggle("small", image.naturalWidth < 256));
  caption.textContent = title;
  made.append(image, caption);
  at("pictures").append(made);
  return { made, image, caption, title };
}

const url = (event) => `data:image/${event.output_format};base64,${event.b64_json}`;

async function make(asked, shown) {
  let done = null;
  for await (const event of events(asked, running.signal)) {
    shown.image.src = url(event);
    if (event.type.endsWith("partial_image")) {
      shown.image.alt = `${shown.title}, after step ${event.step}`;
      at("status").textContent = `Forming: step ${event.step}`;
    } else {
      done = event;
    }
  }
  if (!done) throw new Error("the answer ended early");
  const of = done.flowturbo;
  shown.image.classList.remove("forming");
  shown.image.alt = `${shown.title}, seed ${done.seed}`;
  const times = of.evaluations === 1 ? "evaluation" : "evaluations";
  shown.caption.textContent =
    `${of.schedule}: ${of.evaluations} ${times}, ${of.service_ms.toFixed(0)} ms, seed ${done.seed}` +
    (done.truncated ? "; the prompt was too long and was cut" : "");
  const again = document.createElement("button");
  again.type = "button";
  again.textContent = "Start from this";
  again.hidden = !model().edits;
  again.addEventListener("click", async () => {
    const bytes = Uint8Array.from(atob(done.b64_json), (each) => each.charCodeAt(0));
    await takeImage(new Blob([bytes], { type: `image/${done.output_format}` }));
    if (mode() !== "edit") document.querySelector("input[value=inpaint]").click();
    at("canvas").focus();
  });
  shown.made.append(again);
  remember(asked, done, shown.image);
  return done;
}

async function submit(event) {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  at("pictures").replaceChildren();
  at("error").hidden = true;
  at("copy").hidden = true;
  at("go").disabled = true;
  at("stop").hidden = false;
  at("status").textContent = "Asked.";
  if (at("result").offsetTop > innerHeight) at("result").scrollIntoView();  // on a phone
  try {
    let done;
    if (mode() === "compare") {
      const names = at("many").value.split(/[\s,]+/).filter(Boolean);
      if (!names.length) throw new Error("name the schedules to compare");
      const seed = seedOf() ?? randomSeed();
      const shown = names.map((name) => figure(name));
      const asked = names.map((name) => request(name, seed, null));
      for (const [k, each] of asked.entries()) {  // one after the other: times can be compared
        each.fields.stream = true;
        last = each;
        done = await make(each, shown[k]);
      }
    } else {
      last = request(at("schedule").value.trim(), seedOf(), PARTIAL);
      if (mode() !== "create") last = await withImage(last);
      done = await make(last, figure(titleOf(last.fields)));
    }
    last.fields.seed = done.seed;
    at("status").textContent = "Done.";
    at("copy").hidden = false;
  } catch (error) {
    const stopped = error.name === "AbortError";
    document.querySelectorAll("figure:has(.forming)").forEach((each) => each.remove());
    at("status").textContent = stopped ? "Stopped." : "";
    if (!stopped) {
      at("error").textContent = error.message;
      at("error").hidden = false;
    }
  } finally {
    running = null;
    at("go").disabled = false;
    at("stop").hidden = true;
  }
}

const titleOf = (fields) => String(fields.prompt ?? `class ${fields.label}`).slice(0, 80);

// History: small pictures and what made them ---------------------------------------------------

function stored() {
  try { return JSON.parse(localStorage.getItem(HISTORY)) ?? []; } catch { return []; }
}

function remember(asked, done, image) {
  const small = Object.assign(document.createElement("canvas"), { width: 96, height: 96 });
  const fields = { ...asked.fields, seed: done.seed };
  const kind = !asked.files ? "create" : asked.files.mask ? "inpaint" : "edit";
  image.decode().then(() => {
    small.getContext("2d").drawImage(image, 0, 0, 96, 96);
    const entry = { picture: small.toDataURL("image/jpeg"), fields, kind };
    const all = [entry, ...stored()].slice(0, MOST_HISTORY);
    try { localStorage.setItem(HISTORY, JSON.stringify(all)); } catch { /* no room */ }
    showHistory();
  });
}

function showHistory() {
  const all = stored();
  at("history-box").hidden = !all.length;
  at("history").replaceChildren(...all.map((entry) => {
    const item = document.createElement("li"), button = document.createElement("button");
    const image = document.createElement("img");
    image.src = entry.picture;
    image.alt = `${titleOf(entry.fields)}, seed ${entry.fields.seed}: take these settings`;
    button.type = "button";
    button.append(image);
    button.addEventListener("click", () => restore(entry));
    item.append(button);
    return item;
  }));
}

function restore({ fields, kind = "create" }) {
  if (models.has(fields.model)) at("model").value = fields.model;
  showModel();
  document.querySelector(`input[value=${kind}]`).click();
  if (fields.strength !== undefined) {
    at("strength").value = at("strength-shown").textContent = fields.strength;
  }
  at("prompt").value = fields.prompt ?? "";
  at("negative").value = fields.negative_prompt ?? "";
  if (fields.label !== undefined) at("class").value = at("class-id").value = fields.label;
  at("schedule").value = fields.schedule ?? "";
  at("guidance").value = fields.guidance_scale ?? "";
  at("seed").value = fields.seed;
  if (fields.size) at("size").value = fields.size;
  at("status").textContent = kind === "create"
    ? "The settings of that picture are in the form."
    : "The settings of that picture are in the form. Choose the image that it started from.";
  at("go").focus();
}

// Copies ---------------------------------------------------------------------------------------

// The fields without those of a stream.
function plain() {
  const { stream, partial_images: partial, ...fields } = last.fields;
  return fields;
}

const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;

function asCurl() {
  const where = new URL(last.path, location.href).href;
  const key = at("key").value ? " \\\n  -H \"Authorization: Bearer $API_KEY\"" : "";
  if (!last.files) {
    return `curl ${quoted(where)}${key} \\\n  -H 'Content-Type: application/json' \\\n` +
      `  -d ${quoted(JSON.stringify(plain()))}`;
  }
  const parts = Object.entries(plain()).map(
    ([name, value]) => `--form-string ${quoted(`${name}=${value}`)}`);
  const files = Object.keys(last.files).map((name) => `-F ${name}=@${name}.png`);
  return `curl ${quoted(where)}${key} \\\n  ${[...files, ...parts].join(" \\\n  ")}`;
}

function asPython() {
  const own = ["seed", "schedule", "guidance_scale", "negative_prompt", "label", "strength"];
  const written = (value) => JSON.stringify(value);
  const fields = Object.entries(plain());
  const usual = fields.filter(([name]) => !own.includes(name));
  const extra = fields.filter(([name]) => own.includes(name));
  const files = Object.keys(last.files ?? {}).map((name) => `${name}=open("${name}.png", "rb")`);
  const prompt = last.fields.prompt === undefined ? ["prompt=openai.omit"] : [];
  const given = [...files, ...prompt, ...usual.map(([name, value]) => `${name}=${written(value)}`)];
  const rest = `{${extra.map(([name, value]) => `"${name}": ${written(value)}`).join(", ")}}`;
  const verb = last.files ? "edit" : "generate";
  return `import base64\nimport os\n\nimport openai\n\n` +
    `client = openai.OpenAI(base_url="${new URL("v1", location.href).href}", api_key=${at("key").value ? 'os.environ["API_KEY"]' : '"none"'})\n` +
    `answer = client.images.${verb}(\n    ${[...given, `extra_body=${rest}`].join(",\n    ")},\n)\n` +
    `open("image.png", "wb").write(base64.b64decode(answer.data[0].b64_json))\n`;
}

async function copy(text) {
  try {
    if (navigator.clipboard) {
      await navigator.clipboard.writeText(text);
    } else {  // by plain http from another machine
      const area = Object.assign(document.createElement("textarea"), { value: text });
      document.body.append(area);
      area.select();
      const done = document.execCommand("copy");
      area.remove();
      if (!done) throw new Error("refused");
    }
    at("error").hidden = true;
    at("status").textContent = "Copied.";
  } catch {
    at("error").textContent = `the browser does not let this page copy; the text is:\n${text}`;
    at("error").hidden = false;
  }
}

// Start ----------------------------------------------------------------------------------------

async function start() {
  try {
    const all = (await (await call("v1/models")).json()).data;
    const found = all.filter((each) => each.id === each.flowturbo.name);  // no aliases
    models.clear();
    for (const each of found) models.set(each.id, each.flowturbo);
    at("model").replaceChildren(...found.map((each) => option(each.id)));
    at("model").value = found.find((each) => each.flowturbo.default)?.id ?? found[0].id;
    at("error").hidden = true;
    at("status").textContent = "";
    showModel();
  } catch (error) {
    at("error").textContent = error.message;
    at("error").hidden = false;
  }
  at("go").disabled = !models.size;
}

at("key").value = sessionStorage.getItem(KEY) ?? "";
at("key").addEventListener("change", () => {
  sessionStorage.setItem(KEY, at("key").value);
  start();
});
at("form").addEventListener("submit", submit);
at("stop").addEventListener("click", () => running?.abort());
at("model").addEventListener("change", showModel);
for (const each of document.querySelectorAll("input[name=mode]")) {
  each.addEventListener("change", showMode);
}
at("file").addEventListener("change", async () => {
  try {
    if (at("file").files.length) await takeImage(at("file").files[0]);
  } catch {
    at("error").textContent = "this file cannot be read as an image";
    at("error").hidden = false;
  }
});
at("strength").addEventListener("input", () => {
  at("strength-shown").textContent = at("strength").value;
});
for (const name of ["pointerdown", "pointermove", "pointerleave"]) {
  at("canvas").addEventListener(name, onPointer);
}
at("canvas").addEventListener("keydown", onKey);
at("brush").addEventListener("input", drawCanvas);
at("clear").addEventListener("click", () => {
  painted.getContext("2d").clearRect(0, 0, painted.width, painted.height);
  drawCanvas();
});
at("copy-curl").addEventListener("click", () => copy(asCurl()));
at("copy-python").addEventListener("click", () => copy(asPython()));
at("forget").addEventListener("click", () => {
  localStorage.removeItem(HISTORY);
  showHistory();
});
showHistory();
start();
