/** The panel of pictures: which one is shown, how, and what is said about it. */

import { heatOf, placesText } from "./look.js";
import { factsText, thumbnailTokenAt, tokenAt, tokenText, writeTables } from "./pictures.js";
import { paintScale, Stage, tokensOf } from "./stage.js";

const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const HINT = "Point at a token, or move with the arrow keys, to see its position id.";

/** `find` gives an element by its id; `say` tells a screen reader. */
export class Panel {
  #find;
  #say;
  #stage;
  #pictures = [];
  #shown = 0;
  #view = "tiles";
  #look = null; // of the answer that is looked at
  #word = -1;
  #pointed = null; // a word under the pointer: [look, word]
  #focused = null; // a word with the focus
  #cursor = { x: 0, y: 0 };
  #token = null;
  #drawing = 0;

  constructor(find, say) {
    [this.#find, this.#say] = [find, say];
    this.#stage = new Stage(find("canvas"), find("thumbnail"));
    paintScale(find("scale"));
    find("views").addEventListener("change", (event) => this.#choose(event.target.value));
    find("which").addEventListener("change", (event) => this.show(Number(event.target.value)));
    find("ids").addEventListener("toggle", () => this.#write());
    this.#follow(find("canvas"), (event) => {
      this.#cursor = this.#stage.pointed(event, this.picture);
      return tokenAt(this.picture.facts, this.#cursor.x, this.#cursor.y);
    });
    this.#follow(find("thumbnail"), (event) => {
      const { x, y } = this.#stage.pointedSmall(event, this.picture);
      return thumbnailTokenAt(this.picture.facts, x, y);
    });
    find("canvas").addEventListener("keydown", (event) => this.#move(event));
    find("canvas").addEventListener("focus", () => this.#stand());
    new ResizeObserver(() => this.redraw()).observe(find("stage"));
    window.addEventListener("resize", () => this.redraw());
  }

  /** The picture that is shown, if any. */
  get picture() {
    return this.#pictures[this.#shown];
  }

  get shown() {
    return this.#shown;
  }

  /** Take all pictures of the conversation, in order, and show one of them. */
  take(pictures, shown) {
    this.#pictures = pictures;
    const which = this.#find("which");
    const labels = pictures.map(({ name }, index) => {
      const label = document.createElement("label");
      const radio = document.createElement("input");
      Object.assign(radio, { type: "radio", name: "which", value: index });
      label.append(radio, ` ${index + 1}: ${name}`);
      return label;
    });
    which.replaceChildren(which.querySelector("legend"), ...labels);
    which.hidden = pictures.length < 2;
    this.#find("shown").hidden = !pictures.length;
    this.show(Math.max(0, Math.min(shown, pictures.length - 1)));
  }

  /** Show one of the pictures, by its number. */
  show(index) {
    this.#shown = index;
    this.#token = null;
    this.#cursor = { x: 0, y: 0 };
    const radios = this.#find("which").querySelectorAll("input");
    radios.forEach((radio, at) => (radio.checked = at === index));
    this.#find("shown").dispatchEvent(new Event("picture"));
    this.#write();
    this.redraw();
  }

  /** Show where a word of an answer looked, -1 for all; null for no answer at all. */
  look(look, word = -1) {
    [this.#look, this.#word] = [look, word];
    if (!look) [this.#pointed, this.#focused] = [null, null];
    const radios = this.#find("views").querySelectorAll("input");
    radios[2].disabled = !look;
    this.#choose(look ? "look" : this.#view === "look" ? "tiles" : this.#view);
  }

  /** The same while the pointer is on a word; null when it leaves. */
  point(look, word) {
    this.#pointed = word === null ? null : [look, word];
    this.redraw();
  }

  /** The same while a word has the focus; afterwards the choice among the views counts again. */
  focus(look, word) {
    this.#focused = word === null ? null : [look, word];
    if (this.#focused) [this.#look, this.#word] = this.#focused;
    this.redraw();
  }

  /** Draw again, once before the next frame. */
  redraw() {
    this.#drawing ||= requestAnimationFrame(() => {
      this.#drawing = 0;
      if (this.picture && this.#find("stage").clientWidth) this.#draw();
    });
  }

  #choose(view) {
    this.#view = view;
    this.#token = null;
    const radios = this.#find("views").querySelectorAll("input");
    for (const radio of radios) radio.checked = radio.value === view;
    this.redraw();
  }

  #draw() {
    const { picture } = this;
    const passing = this.#pointed ?? this.#focused;
    const [look, word] = passing ?? [this.#look, this.#word];
    const view = passing ? "look" : this.#view;
    const heats = view === "look" ? heatOf(look, word) : [];
    const heat = heats[this.#shown];
    const drawn = view === "look" && !heat ? "tiles" : view; // a picture that came later
    const thumbnail = drawn !== "look" && picture.facts.thumbnail;
    this.#find("small").hidden = !thumbnail;
    this.#find("legend").hidden = drawn !== "look";
    if (heat) this.#find("scale-top").textContent = `${(100 * heat.top).toFixed(1)} % in a cell`;
    this.#stage.draw({ picture, view: drawn, heat, id: this.#token?.id ?? null });
    const readout = this.#readout(view, look, word, heats);
    this.#find("readout").textContent = readout;
    this.#describe(drawn, readout);
  }

  #readout(view, look, word, heats) {
    if (view === "positions") return this.#token ? tokenText(this.picture, this.#token) : HINT;
    if (view !== "look") return "";
    const who = word < 0 ? "All words together look" : `“${look.words[word]}” looks`;
    const later = heats[this.#shown] ? "" : " This picture came later.";
    return `${who} most at: ${placesText(heats)}.${later}`;
  }

  /** What a screen reader finds in place of the canvas. */
  #describe(view, readout) {
    const canvas = this.#find("canvas");
    const { name } = this.picture;
    if (view === "positions") {
      canvas.setAttribute("role", "application"); // so that it gets the arrow keys
      canvas.tabIndex = 0;
      canvas.setAttribute("aria-label", `Position ids of ${name}: arrow keys move among tokens`);
      return;
    }
    canvas.setAttribute("role", "img");
    canvas.removeAttribute("tabindex");
    const label = view === "look" ? `Heat map over ${name}. ${readout}` : `${name} with its tiles`;
    canvas.setAttribute("aria-label", label);
  }

  #write() {
    const { picture } = this;
    this.#find("facts").textContent = picture ? factsText(picture) : "";
    const tables = this.#find("tables");
    if (picture && this.#find("ids").open) writeTables(tables, picture);
    else tables.replaceChildren();
  }

  #follow(canvas, tokenUnder) {
    canvas.addEventListener("pointermove", (event) => {
      if (this.#view !== "positions") return;
      this.#token = tokenUnder(event);
      this.redraw();
    });
  }

  #stand() {
    this.#token = tokenAt(this.picture.facts, this.#cursor.x, this.#cursor.y);
    this.#say(tokenText(this.picture, this.#token));
    this.redraw();
  }

  #move(event) {
    const move = MOVES[event.key];
    if (!move || this.#view !== "positions") return;
    event.preventDefault();
    const { across, down } = tokensOf(this.picture.facts);
    const within = (at, size) => Math.min(Math.max(at, 0), size - 1);
    this.#cursor = {
      x: within(this.#cursor.x + move[0], across),
      y: within(this.#cursor.y + move[1], down),
    };
    this.#stand();
  }
}
