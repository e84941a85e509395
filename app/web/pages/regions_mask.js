// A mask of regions: the list of what was drawn, and the pixels that come of it. 1 never counts.
//
// Nothing here is drawn by a canvas: it smooths edges, and some browsers change what is read from
// one. Greys in a mask are refused, since nobody could say what they mean.

/** What is drawn is one of
 *
 * `{kind: 'shape', points, value}`: a polygon, also a rectangle,
 * `{kind: 'brush', points, radius, value}`: a line, as wide as the brush,
 * `{kind: 'reshape', of, points}`: other corners for the shape with this place in the list,
 * `{kind: 'invert'}` and `{kind: 'clear'}`,
 *
 * with points [x, y] in pixels of the picture, and the value 1 to hide or 0 to let count again.
 * What counts of them: those after the last `clear`, as they were reshaped, with their `place`.
 */
export function inForce(log) {
  const begin = log.findLastIndex((one) => one.kind === 'clear') + 1;
  const found = new Map();
  log.forEach((one, place) => {
    if (place < begin) return;
    if (one.kind !== 'reshape') found.set(place, { ...one, place });
    else if (found.has(one.of)) found.get(one.of).points = one.points;
  });
  return [...found.values()];
}

/** The mask that a list draws on one that there was (null: none), row by row. */
export function drawn(log, width, height, base) {
  const isCleared = log.some((one) => one.kind === 'clear');
  const mask = base && !isCleared ? base.slice() : new Uint8Array(width * height);
  for (const one of inForce(log)) draw(mask, width, height, one);
  return mask;
}

/** `drawn` for one list after the other, each of which is mostly the one before and a line more. */
export function drawer(width, height, base) {
  let made = []; // the last lists and their masks: an undo has its own there
  return (log) => {
    const known = made.filter((one) => begins(one.log, log)).sort((one, other) => other.log.length - one.log.length)[0];
    const mask = known ? known.mask.slice() : drawn(log, width, height, base);
    if (known) for (const one of log.slice(known.log.length)) draw(mask, width, height, one);
    made = [...made.slice(-KEPT + 1), { log, mask }];
    return mask;
  };
}

const KEPT = 5;
const ADDS = ['shape', 'brush', 'invert'];
const begins = (before, log) => before.every((one, place) => one === log[place]) && log.slice(before.length).every((one) => ADDS.includes(one.kind));

function draw(mask, width, height, one) {
  if (one.kind === 'invert') for (let at = 0; at < mask.length; at += 1) mask[at] ^= 1;
  else if (one.kind === 'shape') fill(mask, width, height, one.points, one.value);
  else brush(mask, width, height, one);
}

/** Set the pixels whose centres are inside of a polygon, as the server does. */
function fill(mask, width, height, points, value) {
  const rows = points.map((point) => point[1]);
  const last = Math.min(Math.ceil(Math.max(...rows)), height);
  for (let row = Math.max(Math.floor(Math.min(...rows)), 0); row < last; row += 1) {
    const crossed = crossings(points, row + 0.5);
    for (let pair = 0; pair + 1 < crossed.length; pair += 2) {
      const from = Math.max(Math.ceil(crossed[pair] - 0.5), 0);
      const until = Math.min(Math.ceil(crossed[pair + 1] - 0.5), width);
      if (from < until) mask.fill(value, row * width + from, row * width + until);
    }
  }
}

/** Where the edges of a polygon cross a height, from left to right. */
function crossings(points, y) {
  const found = [];
  points.forEach(([x0, y0], place) => {
    const [x1, y1] = points[(place + 1) % points.length];
    if ((y0 <= y) !== (y1 <= y)) found.push(x0 + ((y - y0) * (x1 - x0)) / (y1 - y0));
  });
  return found.sort((one, other) => one - other);
}

function brush(mask, width, height, { points, radius, value }) {
  points.forEach((point, place) => stroke(mask, width, height, points[Math.max(place - 1, 0)], point, radius, value));
}

/** Set the pixels whose centres are at most `radius` away from a line. */
function stroke(mask, width, height, [x0, y0], [x1, y1], radius, value) {
  const [dx, dy] = [x1 - x0, y1 - y0];
  const square = dx * dx + dy * dy || 1;
  const left = Math.max(Math.floor(Math.min(x0, x1) - radius), 0);
  const right = Math.min(Math.ceil(Math.max(x0, x1) + radius), width);
  const low = Math.min(Math.ceil(Math.max(y0, y1) + radius), height);
  for (let row = Math.max(Math.floor(Math.min(y0, y1) - radius), 0); row < low; row += 1) {
    for (let column = left; column < right; column += 1) {
      const [x, y] = [column + 0.5 - x0, row + 0.5 - y0];
      const along = Math.min(Math.max((x * dx + y * dy) / square, 0), 1);
      if ((x - along * dx) ** 2 + (y - along * dy) ** 2 <= radius * radius) mask[row * width + column] = value;
    }
  }
}

/** The share of a mask that is set. */
export function share(mask) {
  let sum = 0;
  for (let at = 0; at < mask.length; at += 1) sum += mask[at];
  return sum / mask.length;
}

// ---- its reach ----------------------------------------------------------------------------------

/** What of a model's input (size * size) is in a mask or within its reach: engines/regions.py. */
export function reached(mask, width, height, size, reach) {
  const white = touched(mask, width, height, size);
  const all = new Uint8Array(size * size);
  for (let row = 0; row < size; row += 1) {
    const sums = sumsOf(white.subarray(row * size, (row + 1) * size));
    if (sums[size] === 0) continue;
    for (let dy = -reach; dy <= reach; dy += 1) {
      if (row + dy < 0 || row + dy >= size) continue;
      spread(all.subarray((row + dy) * size, (row + dy + 1) * size), sums, Math.round(Math.sqrt(reach * reach - dy * dy)));
    }
  }
  return all;
}

function sumsOf(row) {
  const sums = new Uint16Array(row.length + 1);
  row.forEach((one, at) => { sums[at + 1] = sums[at] + one; });
  return sums;
}

function spread(row, sums, dx) {
  for (let at = 0; at < row.length; at += 1) {
    if (sums[Math.min(at + dx + 1, row.length)] > sums[Math.max(at - dx, 0)]) row[at] = 1;
  }
}

/** Which of size * size equal parts of a mask hold any of it. */
function touched(mask, width, height, size) {
  const found = new Uint8Array(size * size);
  const [columns, rows] = [partsOf(width, size), partsOf(height, size)];
  const cells = new Uint8Array(size);
  for (let row = 0; row < height; row += 1) {
    cells.fill(0);
    for (let column = 0; column < width; column += 1) {
      if (mask[row * width + column] === 0) continue;
      for (let at = columns[2 * column]; at < columns[2 * column + 1]; at += 1) cells[at] = 1; // `fill` takes 5 times as long
    }
    for (let y = rows[2 * row]; y < rows[2 * row + 1]; y += 1) {
      for (let at = 0; at < size; at += 1) found[y * size + at] |= cells[at];
    }
  }
  return found;
}

/** Of each pixel of a side, the first of so many parts that touches it, and the one after the last. */
const partsOf = (side, parts) => Uint32Array.from({ length: 2 * side }, (_, at) => (
  at % 2 ? Math.ceil(((at + 1) / 2) * parts / side) : Math.floor((at / 2) * parts / side)));

/** How much of what was found in a part lies within the reach: 'all', 'some' or 'none' of it.
 *
 * `heat` (side * side, 0 to 255) is its heat map; where smoothing took all of it below the limit, the hottest
 * place counts.
 */
export function hidden(heat, side, limit, reach, size) {
  const hottest = heat.reduce((most, one) => Math.max(most, one), 0);
  const least = Math.min(limit * 255, hottest * 0.98);
  let [inside, all] = [0, 0];
  heat.forEach((value, at) => {
    if (value < least) return;
    const row = Math.floor(((Math.floor(at / side) + 0.5) * size) / side);
    all += 1;
    inside += reach[row * size + Math.floor((((at % side) + 0.5) * size) / side)];
  });
  if (inside === 0 || hottest === 0) return 'none';
  return inside === all ? 'all' : 'some';
}

// ---- from and to files --------------------------------------------------------------------------

/** The grey values (width * height) of a picture, 0 to 255, stretched to that size. */
export async function greyOf(blob, width, height) {
  const picture = await createImageBitmap(blob, { colorSpaceConversion: 'none' });
  const context = Object.assign(document.createElement('canvas'), { width, height }).getContext('2d', { willReadFrequently: true });
  context.drawImage(picture, 0, 0, width, height);
  picture.close();
  const pixels = context.getImageData(0, 0, width, height).data;
  const grey = new Uint8Array(width * height);
  for (let at = 0; at < grey.length; at += 1) grey[at] = pixels[4 * at]; // they have been equal, red, green and blue
  return grey;
}

/** The mask that a PNG holds. */
export async function readMask(blob, width, height) {
  return (await greyOf(blob, width, height)).map((grey) => (grey > 127 ? 1 : 0));
}

/** The bytes of a grey PNG of a mask: 255 where it is set, 0 elsewhere. */
export async function asPng(mask, width, height) {
  const rows = new Uint8Array((width + 1) * height); // each begins with its filter: none
  for (let row = 0; row < height; row += 1) {
    for (let column = 0; column < width; column += 1) rows[row * (width + 1) + 1 + column] = mask[row * width + column] * 255;
  }
  const packed = new Blob([rows]).stream().pipeThrough(new CompressionStream('deflate'));
  const head = new Uint8Array(13);
  const view = new DataView(head.buffer);
  view.setUint32(0, width);
  view.setUint32(4, height);
  head.set([8, 0, 0, 0, 0], 8); // 8 bits, grey
  const data = new Uint8Array(await new Response(packed).arrayBuffer());
  const signature = Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a);
  const whole = new Blob([signature, chunk('IHDR', head), chunk('IDAT', data), chunk('IEND', new Uint8Array())]);
  return whole.arrayBuffer();
}

function chunk(name, data) {
  const whole = new Uint8Array(data.length + 12);
  const view = new DataView(whole.buffer);
  view.setUint32(0, data.length);
  whole.set(new TextEncoder().encode(name), 4);
  whole.set(data, 8);
  view.setUint32(data.length + 8, crc(whole.subarray(4, data.length + 8)));
  return whole;
}

/** CRC-32, as PNG has it. */
function crc(bytes) {
  let sum = 0xffffffff;
  for (const byte of bytes) {
    sum ^= byte;
    for (let bit = 0; bit < 8; bit += 1) sum = (sum >>> 1) ^ (sum & 1 ? 0xedb88320 : 0);
  }
  return ~sum >>> 0;
}
