/** The page of the server: pictures and questions go out, answers and what is known of them come. */

import { withMean } from "./look.js";
import { Numbers } from "./numbers.js";
import { Panel } from "./panel.js";
import { readPicture } from "./pictures.js";
import { Server } from "./server.js";
import { Turn } from "./talk.js";

const find = (id) => document.getElementById(id);
const server = new Server();
const numbers = new Numbers(find);
const panel = new Panel(find, say);
const question = find("question");

let turns = [];
let waiting = []; // pictures of the next question
let reading = Promise.resolve(); // until all pictures that were added are read
let misread = 0; // how many could not be
let running = null; // the AbortController of the answer that is being written
let connected = false;
let talk = 0; // counts conversations

/** Tell a screen reader, once what it says now is finished. */
function say(text) {
  find("spoken").textContent = text;
}

function complain(text) {
  find("alert").textContent = text;
}

/** Show an error in words, and the field of the key where one is missing. */
function fail(error) {
  if (error.status === 401) {
    find("key-form").hidden = false;
    find("key").focus();
  }
  complain(error.message);
}

async function connect() {
  try {
    const names = await server.models();
    const options = names.map((name) => new Option(name, name));
    find("model-name").replaceChildren(...options);
    find("model-field").hidden = names.length < 2;
    connected = names.length > 0;
    if (!connected) throw new Error("The server has no model.");
    showModel();
  } catch (error) {
    connected = false;
    find("model").textContent = "not connected";
    fail(error);
  }
  return connected;
}

function showModel() {
  find("model").textContent = find("model-name").value;
}

// pictures

function allPictures() {
  return [...turns.flatMap((turn) => turn.pictures), ...waiting];
}

function showPictures(shown = panel.shown) {
  panel.take(allPictures(), shown);
}

function add(files) {
  complain("");
  for (const file of files) {
    reading = reading.then(() => addOne(file));
  }
}

async function addOne(file) {
  const began = talk;
  find("drop").setAttribute("aria-busy", "true");
  try {
    const picture = await readPicture(file, server);
    if (began !== talk) return;
    waiting.push(picture);
    showPictures(Infinity);
    say(`${picture.name} is added.`);
  } catch (error) {
    misread += 1;
    fail(error);
  } finally {
    find("drop").removeAttribute("aria-busy");
  }
}

function remove() {
  waiting.splice(panel.shown - (allPictures().length - waiting.length), 1);
  showPictures();
  find("file").focus();
}

function offerRemoval() {
  const first = allPictures().length - waiting.length;
  const button = find("remove");
  button.hidden = !panel.picture || panel.shown < first;
  if (!button.hidden) button.textContent = `Remove ${panel.picture.name}`;
}

// questions

function settings() {
  const body = {};
  const [temperature, most] = [find("temperature"), find("max-tokens")];
  for (const field of [temperature, most]) {
    if (!field.checkValidity()) {
      find("settings").open = true;
      field.reportValidity();
      return null;
    }
  }
  if (temperature.value) body.temperature = Number(temperature.value);
  if (most.value) body.max_tokens = Number(most.value);
  return body;
}

function messages() {
  const system = find("system").value.trim();
  const first = system ? [{ role: "system", content: system }] : [];
  return [...first, ...turns.flatMap((turn) => turn.messages())];
}

async function ask() {
  if (running) return say("An answer is being written. Escape stops it.");
  complain("");
  const text = question.value.trim();
  if (!text) {
    complain("Write a question first.");
    return question.focus();
  }
  const chosen = settings();
  if (!chosen) return;
  const stopper = new AbortController();
  show(stopper);
  try {
    const before = misread;
    await reading;
    if (misread === before && (connected || (await connect())) && !stopper.signal.aborted) {
      await answer(text, chosen, stopper);
    }
  } finally {
    if (running === stopper) show(null);
  }
}

async function answer(text, chosen, stopper) {
  const turn = new Turn(turns.length + 1, text, waiting, find("model-name").value);
  [question.value, waiting] = ["", []];
  turns.push(turn);
  find("turns").append(turn.element);
  find("turns").scrollTop = find("turns").scrollHeight;
  panel.look(null);
  showPictures();
  numbers.clear();
  say("Reading.");
  const body = {
    ...chosen,
    model: find("model-name").value,
    messages: messages(),
    stream: true,
    stream_options: { include_usage: true },
    comemo: { report: true, look: find("look").checked && allPictures().length > 0 },
  };
  try {
    for await (const chunk of server.answer(body, stopper.signal)) {
      stopper.signal.throwIfAborted();
      receive(chunk, turn);
    }
    finish(turn);
  } catch (error) {
    if (turns.includes(turn)) give(turn, error);
  }
}

/** Take the next chunk of an answer. */
function receive(chunk, turn) {
  const { begun, step_s: step, look } = chunk.comemo ?? {};
  if (begun) {
    numbers.begin(begun);
    turn.begin();
  }
  if (step !== undefined && step !== null) numbers.step(step);
  const choice = chunk.choices?.[0];
  const text = choice?.delta?.content;
  if (text) follow(() => turn.write(text));
  turn.reason = choice?.finish_reason ?? turn.reason;
  if (look?.words.length && look.pictures.length) {
    const found = withMean(look);
    follow(() =>
      turn.show(found, {
        onFocus: (word) => panel.focus(found, word),
        onPoint: (word) => panel.point(found, word),
        onPress: (word) => panel.look(found, word),
      }),
    );
    panel.look(found);
  }
  if (chunk.usage) numbers.end(chunk.usage);
}

function finish(turn) {
  turn.end(turn.reason === "length" ? "The answer is cut: it has as many tokens as it may." : "");
  say(`Answer: ${turn.answer}`);
}

/** Keep an answer that was complete or stopped; any other question is given back. */
function give(turn, error) {
  const stopped = error.name === "AbortError";
  if (turn.reason) {
    finish(turn);
    return stopped || fail(error);
  }
  if (stopped && turn.answer) {
    turn.end("Stopped here.");
    return say(`Stopped. ${turn.answer}`);
  }
  turns = turns.filter((other) => other !== turn);
  turn.element.remove();
  waiting = [...turn.pictures, ...waiting];
  question.value = [turn.question, question.value].filter(Boolean).join("\n");
  showPictures();
  if (stopped) say("Stopped before the answer began.");
  else fail(error);
}

/** Change the conversation; its end stays in view if it was. */
function follow(change) {
  const list = find("turns");
  const form = find("ask-form");
  const below = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
  const inView = form.getBoundingClientRect().bottom < window.innerHeight + 40;
  change();
  if (below) list.scrollTop = list.scrollHeight;
  if (inView) form.scrollIntoView({ block: "nearest" });
}

/** Show the buttons of an answer that is being written, or of none. */
function show(stopper) {
  running = stopper;
  const [askButton, stopButton] = [find("ask"), find("stop")];
  const focused = [askButton, stopButton].includes(document.activeElement);
  askButton.hidden = Boolean(stopper);
  stopButton.hidden = !stopper;
  if (focused) (stopper ? stopButton : question).focus();
}

function stop() {
  running?.abort();
}

function restart() {
  stop();
  show(null);
  talk += 1;
  [turns, waiting] = [[], []];
  find("turns").replaceChildren();
  find("file").value = "";
  question.value = "";
  complain("");
  numbers.clear();
  panel.look(null);
  showPictures(0);
  say("A new conversation.");
  question.focus();
}

// what people do

find("file").addEventListener("change", (event) => {
  add([...event.target.files]);
  event.target.value = ""; // so that the same file can be chosen again
});
find("remove").addEventListener("click", remove);
find("shown").addEventListener("picture", offerRemoval);
find("restart").addEventListener("click", restart);
find("stop").addEventListener("click", stop);
find("model-name").addEventListener("change", showModel);
find("ask-form").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
find("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  server.key = find("key").value.trim();
  complain("");
  if (!(await connect())) return;
  find("key-form").hidden = true;
  question.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing) stop();
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  find("drop").classList.add("over");
});
document.addEventListener("dragleave", () => find("drop").classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault(); // a browser would open the file
  find("drop").classList.remove("over");
  add([...event.dataTransfer.files]);
});
document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (!files.length) return; // text
  event.preventDefault();
  add(files);
});

connect();
