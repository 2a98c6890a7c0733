/** Where the memory path looked: the words of an answer, their heat, and that in words. */

const DOWN = ["top", "", "bottom"];
const ACROSS = ["left", "", "right"];

/** The mean of all words, as the heat of one more word. Returns a look with `all` for each picture. */
export function withMean({ words, pictures }) {
  return {
    words,
    pictures: pictures.map(({ across, down, heat }) => {
      const sums = new Array(across * down).fill(0);
      for (const values of heat) values.forEach((value, cell) => (sums[cell] += value));
      return { across, down, heat, all: sums.map((sum) => sum / Math.max(heat.length, 1)) };
    }),
  };
}

/** Heat of a word, or of all words for -1, on every picture: [{across, down, values, top}]. */
export function heatOf(look, word) {
  const found = look.pictures.map(({ across, down, heat, all }) => ({
    across,
    down,
    values: word < 0 ? all : heat[word],
  }));
  const top = Math.max(0, ...found.map(({ values }) => values.reduce((a, b) => Math.max(a, b), 0)));
  return found.map((one) => ({ ...one, top })); // the same scale on all pictures
}

/** The places that a word looked at most: "top left, 34 %". `heat` is of `heatOf`. */
export function placesText(heat, most = 2) {
  const shares = heat.flatMap((one, picture) =>
    ninths(one).map((share, place) => ({ share, picture, place })),
  );
  shares.sort((a, b) => b.share - a.share);
  const shown = shares.slice(0, most).filter(({ share }) => share >= 0.005);
  if (!shown.length) return "no picture";
  return shown
    .map(({ share, picture, place }) => {
      const of = heat.length > 1 ? `picture ${picture + 1}, ` : "";
      return `${of}${placeName(place)}, ${Math.round(100 * share)} %`;
    })
    .join("; ");
}

function placeName(place) {
  return `${DOWN[Math.floor(place / 3)]} ${ACROSS[place % 3]}`.trim() || "centre";
}

/** The heat in each ninth of a picture, row by row. A cell belongs where its middle is. */
function ninths({ across, down, values }) {
  const shares = new Array(9).fill(0);
  values.forEach((value, cell) => {
    const row = Math.floor(((Math.floor(cell / across) + 0.5) * 3) / down);
    const column = Math.floor((((cell % across) + 0.5) * 3) / across);
    shares[3 * row + column] += value;
  });
  return shares;
}

/**
 * The words of an answer as one toolbar: one stop of the Tab key, arrow keys from word to word.
 *
 * onFocus(word) and onPoint(word) follow the focus and the pointer, and get null when they leave;
 * onPress(word) follows keys and clicks. -1 is all words.
 */
export function wordBar(text, look, { onFocus, onPoint, onPress }) {
  const bar = document.createElement("div");
  bar.className = "bar";
  bar.setAttribute("role", "toolbar");
  bar.setAttribute("aria-label", "Where the memory path looked for each word");
  bar.dir = "auto";
  const buttons = [];
  const choose = (word) => {
    for (const [button, of] of buttons) {
      button.tabIndex = of === word ? 0 : -1;
      button.setAttribute("aria-pressed", String(of === word));
    }
    onFocus(word);
  };
  const add = (word, label) => {
    // no <button>: its text could not be selected and copied
    const button = document.createElement("span");
    button.setAttribute("role", "button");
    button.className = word < 0 ? "word all" : "word";
    button.textContent = label;
    const places = placesText(heatOf(look, word));
    button.setAttribute("aria-label", `${label}: looks most at ${places}`);
    button.addEventListener("focus", () => choose(word));
    button.addEventListener("blur", () => onFocus(null));
    button.addEventListener("click", () => {
      button.focus();
      onPress(word);
    });
    button.addEventListener("pointerenter", (event) => {
      if (event.pointerType === "mouse") onPoint(word);
    });
    button.addEventListener("pointerleave", () => onPoint(null));
    buttons.push([button, word]);
    bar.append(button);
  };
  let from = 0;
  look.words.forEach((word, index) => {
    const at = text.indexOf(word, from);
    bar.append(at < 0 ? " " : text.slice(from, at));
    if (at >= 0) from = at + word.length;
    add(index, word);
  });
  bar.append(text.slice(from), " ");
  add(-1, "all words");
  for (const [button, word] of buttons) {
    button.tabIndex = word < 0 ? 0 : -1;
    button.setAttribute("aria-pressed", "false");
  }
  bar.addEventListener("keydown", (event) => {
    const at = buttons.findIndex(([button]) => button === document.activeElement);
    const rightToLeft = getComputedStyle(bar).direction === "rtl";
    const next = {
      ArrowRight: at + (rightToLeft ? -1 : 1),
      ArrowLeft: at + (rightToLeft ? 1 : -1),
      Home: 0,
      End: buttons.length - 1,
      Enter: at,
      " ": at,
    }[event.key];
    if (next === undefined || at < 0 || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    buttons[(next + buttons.length) % buttons.length][0].focus();
    if (next === at) onPress(buttons[at][1]);
  });
  return bar;
}
