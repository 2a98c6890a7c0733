/** Colours of heat and of position ids. */

// viridis (Stefan van der Walt and Nathaniel Smith, in the public domain by CC0): equal steps look
// equally large, also in grey and to people who see colours otherwise
const VIRIDIS = [
  [68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142], [33, 144, 141], [39, 173, 129],
  [93, 200, 99], [170, 220, 50], [253, 231, 37],
];
// of the thumbnail's corners: top left, top right, bottom left, bottom right
const CORNERS = [[37, 99, 235], [22, 163, 74], [190, 24, 150], [234, 120, 12]];

/** [red, green, blue] of a level from 0 to 1. */
export function viridis(level) {
  const at = Math.min(Math.max(level, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return VIRIDIS[low].map((from, i) => Math.round(from + (at - low) * (VIRIDIS[low + 1][i] - from)));
}

/** Colour of a position id, by its place on the thumbnail or, of more ids, by its size. */
export function idColour(id, { side, largest_id: largest }) {
  if (largest >= side * side) return viridis(id / largest);
  const down = Math.floor(id / side) / Math.max(side - 1, 1);
  const across = (id % side) / Math.max(side - 1, 1);
  const shares = [(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across];
  return [0, 1, 2].map((i) =>
    Math.round(shares.reduce((sum, share, corner) => sum + share * CORNERS[corner][i], 0)),
  );
}

/** For CSS. */
export function css([red, green, blue], alpha = 1) {
  return `rgb(${red} ${green} ${blue} / ${alpha})`;
}
