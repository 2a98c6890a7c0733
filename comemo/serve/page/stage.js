/** Drawing: a picture with its tiles, its position ids, or where the memory path looked. */

import { css, idColour, viridis } from "./colours.js";

const OPACITY = 0.7; // of heat; the rest is the picture, in grey
const TINT = 0.55; // of ids
const LEGIBLE = 19; // CSS pixels of a cell that has room for its id
const LOOKUP = Array.from({ length: 256 }, (_, level) => viridis(level / 255));

/** Two canvases: the picture, and its thumbnail as the model gets it. */
export class Stage {
  #main;
  #small;

  constructor(main, small) {
    [this.#main, this.#small] = [main, small];
  }

  /**
   * Draw.
   *
   * picture: of `readPicture`. view: "tiles", "positions" or "look". heat: {across, down, values,
   * top} of the view "look". id: a position id whose tokens are marked, or null.
   */
  draw({ picture, view, heat, id }) {
    const { facts } = picture;
    const box = this.#main.parentElement;
    const tallest = parseFloat(getComputedStyle(box).maxHeight) || Infinity;
    const fit = Math.min(box.clientWidth / facts.width, tallest / facts.height);
    const pen = resized(this.#main, fit * facts.width, fit * facts.height);
    paintPicture(pen, picture);
    if (view === "look") paintHeat(pen, heat);
    if (view === "positions") {
      paintIds(pen, facts, tokensOf(facts), id);
    }
    paintTiles(pen, facts, view === "tiles");

    const { clientWidth } = this.#small.parentElement;
    const smallPen = resized(this.#small, clientWidth, clientWidth);
    paintPicture(smallPen, picture);
    if (view === "positions") {
      const { side, ids } = facts;
      paintIds(smallPen, facts, { across: side, down: side, ids: ids[ids.length - 1] }, id);
    }
  }

  /** The token under a pointer, {x, y} in tokens of the whole picture. */
  pointed(event, { facts }) {
    const { across, down } = tokensOf(facts);
    return place(this.#main, event, across, down);
  }

  /** The thumbnail's token under a pointer, {x, y} in tokens. */
  pointedSmall(event, { facts }) {
    return place(this.#small, event, facts.side, facts.side);
  }
}

/** The colours from 0 at the bottom to 1, as a heat map has them over middle grey. */
export function paintScale(canvas) {
  const pen = canvas.getContext("2d");
  for (let y = 0; y < canvas.height; y++) {
    const colour = viridis(1 - y / (canvas.height - 1));
    pen.fillStyle = css(colour.map((c) => Math.round(OPACITY * c + (1 - OPACITY) * 128)));
    pen.fillRect(0, y, canvas.width, 1);
  }
}

/** All tokens of the tiles as one raster over the picture. */
export function tokensOf({ cols, rows, side, ids }) {
  const [across, down] = [cols * side, rows * side];
  const raster = [];
  for (let y = 0; y < down; y++) {
    for (let x = 0; x < across; x++) {
      const tile = Math.floor(y / side) * cols + Math.floor(x / side);
      raster.push(ids[tile][(y % side) * side + (x % side)]);
    }
  }
  return { across, down, ids: raster };
}

function place(canvas, event, across, down) {
  const box = canvas.getBoundingClientRect();
  const within = (at, size, cells) =>
    Math.min(Math.max(Math.floor((at / size) * cells), 0), cells - 1);
  return {
    x: within(event.clientX - box.left, box.width, across),
    y: within(event.clientY - box.top, box.height, down),
  };
}

function resized(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [width, height].map((size) => Math.max(1, Math.round(size)));
  canvas.style.width = `${w}px`;
  canvas.style.height = `${h}px`;
  canvas.width = Math.round(w * ratio);
  canvas.height = Math.round(h * ratio);
  const pen = canvas.getContext("2d", { willReadFrequently: true }); // by `paintHeat`
  pen.scale(ratio, ratio);
  return { pen, width: w, height: h, canvas };
}

function paintPicture({ pen, width, height }, { pixels }) {
  pen.imageSmoothingQuality = "high";
  pen.fillStyle = "#888";
  pen.fillRect(0, 0, width, height);
  if (pixels) pen.drawImage(pixels, 0, 0, width, height);
}

function paintTiles({ pen, width, height }, { cols, rows }, named) {
  const lines = new Path2D();
  for (let col = 1; col < cols; col++) {
    lines.moveTo((col * width) / cols, 0);
    lines.lineTo((col * width) / cols, height);
  }
  for (let row = 1; row < rows; row++) {
    lines.moveTo(0, (row * height) / rows);
    lines.lineTo(width, (row * height) / rows);
  }
  for (const [style, thickness] of [["rgb(0 0 0 / 0.7)", 4], ["#fff", 1.5]]) {
    pen.strokeStyle = style;
    pen.lineWidth = thickness;
    pen.stroke(lines);
  }
  if (!named || cols * rows === 1) return;
  pen.font = "13px system-ui, sans-serif";
  pen.textBaseline = "middle";
  pen.textAlign = "center";
  for (let tile = 0; tile < cols * rows; tile++) {
    const x = ((tile % cols) * width) / cols + 6;
    const y = (Math.floor(tile / cols) * height) / rows + 6;
    const wide = pen.measureText(tile + 1).width + 10;
    pen.fillStyle = "rgb(0 0 0 / 0.75)";
    pen.fillRect(x, y, wide, 19);
    pen.fillStyle = "#fff";
    pen.fillText(tile + 1, x + wide / 2, y + 10);
  }
}

function paintIds({ pen, width, height }, facts, { across, down, ids }, marked) {
  const [wide, high] = [width / across, height / down];
  pen.font = `${Math.round(Math.min(wide, high) * 0.5)}px system-ui, sans-serif`;
  pen.textBaseline = "middle";
  pen.textAlign = "center";
  const legible = Math.min(wide, high) >= LEGIBLE;
  const borders = new Path2D();
  const marks = new Path2D();
  ids.forEach((id, at) => {
    const [x, y] = [(at % across) * wide, Math.floor(at / across) * high];
    const colour = idColour(id, facts);
    pen.fillStyle = css(colour, TINT);
    pen.fillRect(x, y, wide, high);
    if (legible) {
      pen.lineWidth = 3;
      pen.strokeStyle = css(colour.map((c) => Math.round(c / 4)));
      pen.fillStyle = "#fff";
      pen.strokeText(id, x + wide / 2, y + high / 2);
      pen.fillText(id, x + wide / 2, y + high / 2);
    }
    if (at % across && ids[at - 1] !== id) {
      borders.moveTo(x, y);
      borders.lineTo(x, y + high);
    }
    if (at >= across && ids[at - across] !== id) {
      borders.moveTo(x, y);
      borders.lineTo(x + wide, y);
    }
    if (id === marked) marks.rect(x, y, wide, high);
  });
  pen.lineWidth = 1;
  pen.strokeStyle = "rgb(255 255 255 / 0.5)";
  pen.stroke(borders);
  for (const [style, thickness] of [["#000", 5], ["#fff", 2.5]]) {
    pen.strokeStyle = style;
    pen.lineWidth = thickness;
    pen.stroke(marks);
  }
}

/** Between the middles of cells heat is interpolated, before it has a colour. */
function paintHeat({ pen, canvas }, { across, down, values, top }) {
  const image = pen.getImageData(0, 0, canvas.width, canvas.height);
  const { data, width, height } = image;
  const columns = Array.from({ length: width }, (_, x) => between(x, width, across));
  for (let y = 0, at = 0; y < height; y++) {
    const [above, below, low] = between(y, height, down);
    for (let x = 0; x < width; x++, at += 4) {
      const [left, right, share] = columns[x];
      const upper = mix(values[above * across + left], values[above * across + right], share);
      const lower = mix(values[below * across + left], values[below * across + right], share);
      const level = top > 0 ? mix(upper, lower, low) / top : 0;
      const colour = LOOKUP[Math.min(255, Math.max(0, Math.round(255 * level)))];
      const grey = 0.299 * data[at] + 0.587 * data[at + 1] + 0.114 * data[at + 2];
      for (let i = 0; i < 3; i++) data[at + i] = OPACITY * colour[i] + (1 - OPACITY) * grey;
    }
  }
  pen.putImageData(image, 0, 0);
}

function between(pixel, pixels, cells) {
  const at = Math.min(Math.max(((pixel + 0.5) * cells) / pixels - 0.5, 0), cells - 1);
  const low = Math.min(Math.floor(at), Math.max(cells - 2, 0));
  return [low, Math.min(low + 1, cells - 1), at - low];
}

function mix(from, to, share) {
  return from + share * (to - from);
}
