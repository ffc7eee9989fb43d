// Sends one image and one set of labels, and shows the answers of the base and the newest version side by side.

const RETRY_MS = 3000;
const byId = (id) => document.getElementById(id);
const kindOf = () => document.querySelector("input[name=kind]:checked").value;

let served = null; // what the server serves, as /state returns it
let away = false; // whether the last request for the state failed
let retry; // timer of the next attempt in that case
let image = null;
let asking = null; // AbortController of the pending question

/** Create an element: make("p", {className: "soft"}, "text", anotherElement). Text is never parsed as markup. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

async function call(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The program behind this page has ended; start it again with: client demo");
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error.charAt(0).toUpperCase() + answer.error.slice(1));
  return answer;
}

function say(id, text) {
  const place = byId(id);
  place.hidden = !text;
  if (place.textContent !== text) place.textContent = text;
}

const percent = (share) => `${(100 * share).toFixed(1)}%`;

function complain(text) {
  say("error", text);
  byId("error").scrollIntoView({ block: "nearest" });
}

// What is served ------------------------------------------------------------------------------------------------------

/** Get the state, and retry until the server answers. */
async function refresh() {
  clearTimeout(retry);
  try {
    showServed(await call("/state"));
    if (away) say("error", "");
    away = false;
  } catch (error) {
    away = true;
    complain(error.message);
    if (!served) say("served", "Waits for the server.");
    retry = setTimeout(refresh, RETRY_MS);
  }
}

function showServed(state) {
  served = { ...served, ...state };
  const { base, newest, tasks } = served;
  byId("served").replaceChildren(
    make("span", {}, `${served.model} at ${served.url}`),
    ...(base ? [make("span", { className: "base" }, `version ${base}: the base`)] : []),
    ...(newest ? [make("span", { className: "newest" }, `version ${newest}: ${learned(tasks)}`)] : []),
  );
  byId("ask").textContent = base && newest ? "Compare" : "Ask";
  say("notice", notice(base, newest));
  showTasks(tasks);
  if (!byId("answers").querySelector("ol")) showEmpty();
}

function learned(tasks) {
  const names = tasks.slice(0, 6).map((task) => task.name).join(", ");
  return tasks.length ? `has learned ${names}${tasks.length > 6 ? ` and ${tasks.length - 6} more` : ""}` : "no tasks";
}

function notice(base, newest) {
  if (!newest) return "Only version 1, the base, is served: nothing was learned yet, so there is nothing to compare it with.";
  if (!base) return `The base, version 1, is not served: version ${newest} answers alone.`;
  return "";
}

function showTasks(tasks) {
  const select = byId("task");
  const signature = JSON.stringify(tasks);
  if (select.dataset.tasks !== signature) {
    const firstTime = select.dataset.tasks === undefined;
    const chosen = select.value;
    select.replaceChildren(...tasks.map((task) => make("option", { value: task.name }, `${task.name} (${task.class_names.length} classes)`)));
    select.value = tasks.some((task) => task.name === chosen) ? chosen : tasks.at(-1)?.name ?? "";
    select.dataset.tasks = signature;
    document.querySelector("input[value=task]").disabled = tasks.length === 0;
    if (tasks.length === 0 || firstTime) document.querySelector(`input[value=${tasks.length ? "task" : "labels"}]`).checked = true;
  }
  showKind();
}

function showKind() {
  const task = kindOf() === "task" ? served?.tasks.find((one) => one.name === byId("task").value) : undefined;
  byId("by-task").hidden = kindOf() !== "task";
  byId("by-labels").hidden = kindOf() === "task";
  byId("class-names").textContent = task?.class_names.join(", ") ?? "";
  showAccuracy(task);
}

function showAccuracy(task) {
  byId("accuracy").hidden = !task;
  if (!task) return;
  const { accuracy_before: before, accuracy_after: after } = task;
  const title = [make("span", {}, `Accuracy on ${task.name}`)];
  if (before !== null && after !== null) {
    const gain = after - before;
    title.push(make("span", { className: "gain" }, `${gain < 0 ? "−" : "+"}${Math.abs(gain).toFixed(1)} points`));
  }
  byId("accuracy-title").replaceChildren(...title);
  byId("accuracy-bars").replaceChildren(
    bar("div", "base first", "zero-shot", before === null ? null : before / 100),
    bar("div", "newest first", "learned", after === null ? null : after / 100),
  );
}

// The answers ---------------------------------------------------------------------------------------------------------

/** Create a name, a percentage and a bar of that length. A share of null has not been measured. */
function bar(tag, className, name, share) {
  const fill = make("i");
  fill.style.width = `${100 * (share ?? 0)}%`;
  return make(tag, { className },
    make("span", { className: "name" }, name),
    make("span", { className: "number" }, share === null ? "not measured" : percent(share)),
    make("span", { className: "bar" }, fill));
}

function card(version, ...content) {
  const isBase = version === 1;
  return make("article", { className: `panel answer ${isBase ? "base" : "newest"}` },
    make("header", {}, make("h2", {}, isBase ? "Base CLIP" : "Newest"), make("span", { className: "soft small" }, `version ${version}`)),
    ...content);
}

function showEmpty() {
  const versions = [served?.base, served?.newest].filter(Boolean);
  const ghosts = () => [1, 2, 3].map(() => make("li", {}, make("span", { className: "bar" })));
  byId("answers").replaceChildren(...versions.map((version) =>
    card(version, make("p", { className: "best none" }, "?"), make("ul", { className: "bars ghosts" }, ...ghosts()))));
  byId("latency-note").hidden = true;
}

function showAnswers({ answers, labels }) {
  byId("answers").replaceChildren(...answers.map(({ version, latency_ms, predictions }) => {
    const rest = labels - predictions.length;
    const shared = 1 - predictions.reduce((sum, one) => sum + one.probability, 0);
    const more = make("p", { className: "soft small" }, `${rest} more label${rest === 1 ? "" : "s"}: ${percent(Math.max(0, shared))}`);
    return card(version,
      make("p", { className: "best" }, predictions[0].label),
      make("ol", { className: "bars" }, ...predictions.map((one, rank) => bar("li", rank ? "" : "first", one.label, one.probability))),
      ...(rest > 0 ? [more] : []),
      make("footer", {}, make("span", { className: "soft" }, "Latency"), make("span", { className: "latency" }, make("b", {}, latency_ms.toFixed(1)), " ms")));
  }));
  byId("latency-note").hidden = false;
  if (byId("answers").getBoundingClientRect().top > innerHeight - 150) byId("answers").scrollIntoView();
  say("spoken", answers.map(({ version, predictions: [best] }) => `Version ${version}: ${best.label}, ${percent(best.probability)}`).join("; "));
}

// The question --------------------------------------------------------------------------------------------------------

/** Return the typed labels, separated by commas or line breaks; a label that contains a comma is in quotes. */
function ownLabels() {
  const fields = byId("labels").value.matchAll(/\s*"((?:[^"]|"")*)"\s*(?=[,\n]|$)|[^,\n]+/g);
  const labels = [...fields].map(([whole, quoted]) => (quoted?.replaceAll('""', '"') ?? whole).trim());
  return [...new Set(labels.filter(Boolean))];
}

function question() {
  const query = new URLSearchParams();
  if (kindOf() === "task") query.append("task", byId("task").value);
  else for (const label of ownLabels()) query.append("label", label);
  return query.toString();
}

/** Return a message about what is still missing; empty if nothing is. */
function missing() {
  if (!image) return "Choose an image first.";
  return question() ? "" : "Type a label or more first, with commas or lines between them.";
}

async function ask() {
  asking?.abort();
  const mine = (asking = new AbortController());
  byId("answers").setAttribute("aria-busy", "true");
  try {
    const answer = await call(`/answer?${question()}`, { method: "POST", body: image, signal: mine.signal });
    say("error", "");
    showServed(answer.state);
    showAnswers(answer);
  } catch (error) {
    if (error.name === "AbortError") return;
    showEmpty();
    complain(error.message);
    refresh(); // other tasks may be served by now
  }
  byId("answers").setAttribute("aria-busy", "false");
}

function askIfComplete() {
  if (!missing()) ask();
}

function take(file) {
  if (!file) return;
  const limit = served?.max_upload_bytes ?? Infinity;
  if (file.size > limit) {
    complain(`${file.name} has ${(file.size / 1e6).toFixed(1)} MB; at most ${limit / 1e6} MB are taken.`);
    return;
  }
  image = file;
  say("error", "");
  showPreview(file);
  askIfComplete();
}

function showPreview(file) {
  const preview = byId("preview");
  if (preview.src) URL.revokeObjectURL(preview.src);
  preview.onload = () => {
    preview.classList.toggle("tiny", Math.max(preview.naturalWidth, preview.naturalHeight) < 100);
    preview.hidden = false;
    byId("invitation").hidden = true;
  };
  preview.onerror = () => { // browsers can't show every image that can be classified
    preview.hidden = true;
    byId("invitation").hidden = false;
  };
  preview.src = URL.createObjectURL(file);
  say("file-name", file.name);
}

function listen() {
  byId("question").addEventListener("submit", (event) => {
    event.preventDefault();
    const lacking = missing();
    if (lacking) complain(lacking);
    else ask();
  });
  byId("file").addEventListener("change", (event) => {
    take(event.target.files[0]);
    event.target.value = ""; // so that the same file can be chosen again
  });
  byId("labels").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey) || event.isComposing) return;
    event.preventDefault();
    byId("question").requestSubmit();
  });
  byId("kinds").addEventListener("change", () => { showKind(); askIfComplete(); });
  byId("task").addEventListener("change", () => { showKind(); askIfComplete(); });
  document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
  document.addEventListener("dragover", (event) => { event.preventDefault(); byId("drop").classList.add("over"); });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) byId("drop").classList.remove("over"); });
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    byId("drop").classList.remove("over");
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
    else complain("That was no file; drop an image file.");
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
}

listen();
refresh();
