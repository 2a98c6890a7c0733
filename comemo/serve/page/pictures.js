/** Pictures: read from files, described by the server, and where their tokens are. */

const LARGEST = 1600; // pixels along the longer side of what is kept for drawing

/**
 * Read a picture.
 *
 * Gives {name, url, facts, pixels}: a data URL, what the server says, and a canvas; `pixels` is
 * null where the browser does not know the format.
 */
export async function readPicture(file, server) {
  const name = file.name || "pasted picture";
  if (!file.type.startsWith("image/")) throw new Error(`${name} is not a picture.`);
  const url = await dataUrl(file);
  let facts;
  try {
    facts = await server.facts(url);
  } catch (error) {
    error.message = `${name}: ${error.message}`;
    throw error;
  }
  return { name, url, facts, pixels: await pixelsOf(file) };
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

async function pixelsOf(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    return null;
  }
  const scale = Math.min(1, LARGEST / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(scale * bitmap.width));
  canvas.height = Math.max(1, Math.round(scale * bitmap.height));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  bitmap.close();
  return canvas;
}

/** The token at a place of the whole picture, counted in tokens: {tile, row, column, id}. */
export function tokenAt({ cols, side, ids }, x, y) {
  const tile = Math.floor(y / side) * cols + Math.floor(x / side);
  const [row, column] = [y % side, x % side];
  return { tile, row, column, id: ids[tile][row * side + column] };
}

/** The token at a place of the thumbnail, counted in tokens. */
export function thumbnailTokenAt({ side, ids }, x, y) {
  const tile = ids.length - 1;
  return { tile, row: y, column: x, id: ids[tile][y * side + x] };
}

/** What the server said about a picture, in a sentence. */
export function factsText({ name, facts }) {
  const { width, height, cols, rows, side, thumbnail, tokens, ids, largest_id: largest } = facts;
  const tiles = thumbnail ? `${cols} × ${rows} tiles and a thumbnail` : tileCount(cols * rows);
  const used = new Set(ids.flat()).size;
  const shared =
    used < tokens ? "; tokens of the same place share an id" : "; no two tokens share an id";
  return (
    `${name}: ${width} × ${height} pixels, ${tiles}, ${side} × ${side} tokens each, ` +
    `${count(tokens, "token")}, ${count(used, "position id")} (0 to ${largest})${shared}.`
  );
}

function tileCount(tiles) {
  return tiles === 1 ? "one tile" : `${tiles} tiles`;
}

/** A number with its noun. */
export function count(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

/** A token in words. */
export function tokenText({ facts }, token) {
  const { cols, rows, ids } = facts;
  let place = "Token ";
  if (token.tile >= cols * rows) {
    place = "Thumbnail, token ";
  } else if (cols * rows > 1) {
    const [column, row] = [(token.tile % cols) + 1, Math.floor(token.tile / cols) + 1];
    place = `Tile ${token.tile + 1} (column ${column}, row ${row}), token `;
  }
  const sharing = ids.flat().filter((id) => id === token.id).length;
  const shared = sharing > 1 ? `, shared by ${sharing} tokens` : "";
  return `${place}row ${token.row + 1}, column ${token.column + 1}: position id ${token.id}${shared}.`;
}

/** Fill an element with one table of ids for each tile. */
export function writeTables(element, { facts }) {
  const { cols, side, thumbnail, ids } = facts;
  const tables = ids.map((of, tile) => {
    const table = document.createElement("table");
    const whole = tile === ids.length - 1 && (thumbnail || ids.length === 1);
    table.createCaption().textContent = whole
      ? "The whole picture"
      : `Tile ${tile + 1}: column ${(tile % cols) + 1}, row ${Math.floor(tile / cols) + 1}`;
    for (let row = 0; row < side; row++) {
      const line = table.insertRow();
      for (const id of of.slice(row * side, (row + 1) * side)) line.insertCell().textContent = id;
    }
    return table;
  });
  element.replaceChildren(...tables);
}
