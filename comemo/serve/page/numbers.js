/** The numbers of an answer: tokens, pictures, times. */

import { count } from "./pictures.js";

const [WIDTH, HEIGHT] = [160, 28]; // of the sparkline, in its own units

/** Shows the numbers of one answer at a time. `find` gives an element by its id. */
export class Numbers {
  #find;
  #steps = [];

  constructor(find) {
    this.#find = find;
  }

  /** Forget those of the answer before. */
  clear() {
    this.#steps = [];
    for (const id of ["tokens-read", "tokens-cached", "pictures-known", "waited", "first-token"]) {
      this.#find(id).textContent = "none yet";
    }
    for (const id of ["answer-tokens", "per-token"]) this.#find(id).textContent = "none yet";
    this.#draw();
  }

  /** The prompt is read: `begun` of the report. */
  begin(begun) {
    const { prompt_tokens: tokens, cached_tokens: cached, pictures, found_pictures: found } = begun;
    this.#find("tokens-read").textContent = (tokens - cached).toLocaleString("en");
    this.#find("tokens-cached").textContent = cached.toLocaleString("en");
    this.#find("pictures-known").textContent = `${found} known, ${pictures - found} computed`;
    this.#find("waited").textContent = seconds(begun.waited_s);
    this.#find("first-token").textContent = seconds(begun.waited_s + begun.read_s);
  }

  /** A token came so many seconds after the one before. */
  step(duration) {
    this.#steps.push(1000 * duration);
    const mean = this.#steps.reduce((a, b) => a + b, 0) / this.#steps.length;
    this.#find("per-token").textContent = `${milliseconds(mean)} on average`;
    this.#draw();
  }

  /** The answer is complete: `usage` of its last chunk. */
  end(usage) {
    this.#find("answer-tokens").textContent = usage.completion_tokens.toLocaleString("en");
    const cached = usage.prompt_tokens_details?.cached_tokens;
    if (cached !== undefined) {
      this.#find("tokens-cached").textContent = cached.toLocaleString("en");
    }
  }

  #draw() {
    const spark = this.#find("spark");
    const steps = this.#steps.slice(-WIDTH); // a pixel each at most
    const [low, high] = [Math.min(...steps), Math.max(...steps)];
    const points = steps.map((step, at) => {
      const x = steps.length > 1 ? (at / (steps.length - 1)) * WIDTH : WIDTH / 2;
      return `${x.toFixed(1)},${(HEIGHT - 2 - (step / high) * (HEIGHT - 4)).toFixed(1)}`;
    });
    spark.querySelector("polyline").setAttribute("points", points.join(" "));
    const label = steps.length
      ? `${count(steps.length, "step")}, ${milliseconds(low)} to ${milliseconds(high)}`
      : "No times yet";
    spark.setAttribute("aria-label", label);
  }
}

function seconds(value) {
  return `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

function milliseconds(value) {
  return `${value.toFixed(value < 10 ? 1 : 0)} ms`;
}
