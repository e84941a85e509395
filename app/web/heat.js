// A heat map, painted in the browser as the server paints one over a picture.

// OpenCV's TURBO at 17 places from 0 to 1; between them it is straight enough (within 7 of 255).
const TURBO = [
  [48, 18, 59], [64, 64, 162], [70, 107, 227], [66, 148, 255], [40, 188, 235], [24, 221, 194],
  [50, 242, 152], [109, 254, 98], [164, 252, 60], [203, 237, 52], [236, 209, 58], [253, 174, 53],
  [251, 129, 34], [236, 83, 15], [210, 49, 5], [172, 23, 1], [122, 4, 3],
];

/** Of a grey PNG in base64 what it shows: `{width, height, grey}`, each value 0 to 255. */
export async function readHeat(png) {
  const data = Uint8Array.from(atob(png), (one) => one.charCodeAt(0));
  const image = await createImageBitmap(new Blob([data], { type: 'image/png' }));
  const { width, height } = image;
  const canvas = Object.assign(document.createElement('canvas'), { width, height });
  const context = canvas.getContext('2d', { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  const { data: pixels } = context.getImageData(0, 0, width, height);
  return { width, height, grey: Uint8Array.from({ length: width * height }, (_, n) => pixels[4 * n]) };
}

/** Paint a heat map onto a canvas: the hotter, the less of what lies below is seen. */
export function paintHeat(canvas, { width, height, grey }) {
  Object.assign(canvas, { width, height });
  const context = canvas.getContext('2d');
  const painted = context.createImageData(width, height);
  grey.forEach((value, n) => {
    painted.data.set(turbo(value / 255), 4 * n);
    painted.data[4 * n + 3] = 255 * Math.min(1, Math.max(0, (2 * value) / 255 - 0.8));
  });
  context.putImageData(painted, 0, 0);
}

function turbo(share) {
  const place = share * (TURBO.length - 1);
  const before = Math.min(Math.floor(place), TURBO.length - 2);
  return TURBO[before].map((one, n) => one + (TURBO[before + 1][n] - one) * (place - before));
}

/** Where a heat map crosses a limit (0 to 1): an SVG path over a box of its width and height. */
export function outline({ width, height, grey }, limit) {
  const at = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? 0 : grey[y * width + x] / 255);
  const parts = [];
  // Squares between the middles of four pixels; one pixel beyond the edge, so that outlines close.
  for (let y = -1; y < height; y += 1) {
    for (let x = -1; x < width; x += 1) {
      const corners = [at(x, y), at(x + 1, y), at(x + 1, y + 1), at(x, y + 1)];
      const hot = corners.filter((one) => one > limit).length;
      if (hot > 0 && hot < 4) parts.push(crossing(corners, limit, x + 0.5, y + 0.5));
    }
  }
  return parts.join('');
}

/** A ring where a heat map is highest, as a path over the same box. */
export function ring({ width, height, grey }) {
  const place = grey.indexOf(grey.reduce((most, one) => Math.max(most, one), 0));
  const [x, y] = [(place % width) + 0.5, Math.floor(place / width) + 0.5];
  const r = 0.04 * Math.max(width, height);
  return `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`;
}

const SIDES = [[0, 0, 1, 0], [1, 0, 0, 1], [1, 1, -1, 0], [0, 1, 0, -1]]; // from a corner to the next

function crossing(corners, limit, x, y) {
  const points = SIDES.flatMap(([left, top, along, down], n) => {
    const [one, other] = [corners[n], corners[(n + 1) % 4]];
    if (one > limit === other > limit) return [];
    const share = (limit - one) / (other - one);
    return [`${(x + left + along * share).toFixed(2)} ${(y + top + down * share).toFixed(2)}`];
  });
  return points.length === 4
    ? `M${points[0]}L${points[1]}M${points[2]}L${points[3]}`
    : `M${points[0]}L${points[1]}`;
}
