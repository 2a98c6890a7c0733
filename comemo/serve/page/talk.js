/** The conversation: its turns as messages, and as elements of the page. */

import { wordBar } from "./look.js";

/** A question with its answer; `reason` says why the answer is complete. */
export class Turn {
  answer = "";
  ended = false;
  reason = null;
  #text;
  #note;

  constructor(number, question, pictures, model) {
    [this.question, this.pictures] = [question, pictures];
    this.element = document.createElement("li");
    this.element.setAttribute("aria-busy", "true");
    this.element.append(titled(`Question ${number}`, "You"));
    if (pictures.length) {
      const names = pictures.map(({ name }) => name).join(", ");
      this.element.append(paragraph("note", `with ${names}`));
    }
    this.#text = paragraph("text", "");
    this.#note = paragraph("note", "Reading");
    this.element.append(
      paragraph("text asked", question),
      titled(`Answer ${number}`, model),
      this.#text,
      this.#note,
    );
  }

  /** The prompt is read: the answer follows. */
  begin() {
    this.#note.textContent = "Writing";
  }

  /** Add to the answer. */
  write(text) {
    this.answer += text;
    this.#text.textContent = this.answer;
  }

  /** No more text comes; `note` is for the reader, such as why it ends here. */
  end(note = "") {
    this.ended = true;
    this.element.removeAttribute("aria-busy");
    this.#note.textContent = note;
  }

  /** Make the words of the answer show where they looked; see `wordBar`. */
  show(look, reactions) {
    this.#text.classList.add("unseen"); // read at once, before the words one by one
    this.#text.after(wordBar(this.answer, look, reactions));
  }

  /** As messages of a chat completion. */
  messages() {
    const images = this.pictures.map(({ url }) => ({ type: "image_url", image_url: { url } }));
    const content = images.length
      ? [...images, { type: "text", text: this.question }]
      : this.question;
    const asked = { role: "user", content };
    return this.ended ? [asked, { role: "assistant", content: this.answer }] : [asked];
  }
}

function paragraph(classes, text) {
  const element = document.createElement("p");
  element.className = classes;
  element.dir = "auto";
  element.textContent = text;
  return element;
}

/** A heading that is read as one text and shown as another. */
function titled(read, shown) {
  const element = document.createElement("h3");
  const [hidden, visible] = [document.createElement("span"), document.createElement("span")];
  hidden.className = "unseen";
  hidden.textContent = `${read}: `;
  visible.textContent = shown;
  element.append(hidden, visible);
  return element;
}
