// What is drawn on: a picture that can be zoomed, its mask over it, and the hand that draws.
//
// By mouse, pen, finger and keyboard. Points are pixels of the picture, whatever the zoom is.

import { Button, html, useCallback, useEffect, useLayoutEffect, useRef, useState } from '../parts.js';
import { t } from '../words.js';
import { inForce } from './regions_mask.js';

const NEAR = { mouse: 12, pen: 16, touch: 26 }; // of a corner, pixels of the screen
const MOVED = 8; // less is a tap, pixels of the screen
const TWICE_MS = 400; // between the taps of a double tap
const MOST_ZOOM = 24; // pixels of the screen for one of the picture
const MOST_PAINTED = 2048; // pixels of a side
const COLOURS = { hide: [230, 40, 40], edge: [255, 255, 255] };

/** Draw on a picture of `width` x `height`.
 *
 * `tool` is polygon, rectangle, brush or move; `value` 1 hides and 0 erases; `open` are the corners of a
 * polygon that is not closed. `onadd` is given what was drawn, `onopen` the corners, `onundo` and `onredo` nothing.
 */
export function Stage({ picture, width, height, mask, reach, size, log, open, tool, value, radius, onadd, onopen, onundo, onredo }) {
  const stage = useRef(null);
  const view = useView(stage, width, height);
  const [doing, setDoing] = useState(null); // what the hand is at: {kind, points, ...}
  const [cursor, setCursor] = useState(null); // of the keyboard
  const [over, setOver] = useState(null); // where the mouse is
  const [said, setSaid] = useState('');
  const say = (words, [x, y]) => setSaid(t(words, { x: Math.round(x), y: Math.round(y), count: open.length }));

  useEffect(() => { setDoing(null); }, [tool]);

  const close = (points = open) => {
    if (points.length < 3) return;
    onadd({ kind: 'shape', points, value });
    setSaid(t('regions.said_closed'));
  };
  const corner = (point) => {
    onopen([...open, point]);
    setSaid(t('regions.said_corner', { count: open.length + 1, x: point[0], y: point[1] }));
  };
  const keys = useKeys({ tool, open, value, radius, width, height, view, cursor, setCursor, doing, setDoing, say, close, corner, onadd, onopen, onundo, onredo });
  const hand = useHand({ stage, view, width, height, tool, value, radius, log, open, doing, setDoing, setOver, setCursor, close, corner, onadd, onopen });

  return html`<div class="stage-box">
    <div ref=${stage} class=${`stage ${tool}`} tabindex="0" role="application" aria-label=${t('regions.stage')} aria-describedby="regions-help"
        onkeydown=${keys} ...${hand} onblur=${() => setCursor(null)} oncontextmenu=${(event) => event.preventDefault()}>
      <div class="ground" style=${{ width: `${width}px`, height: `${height}px`, transform: `translate(${view.x}px, ${view.y}px) scale(${view.scale})` }}>
        ${picture ? html`<img src=${picture} alt="" draggable="false" />` : null}
        ${reach && html`<${Painted} kind="reach" pixels=${reach} width=${size} height=${size} strength=${50} edge=${COLOURS.hide} />`}
        <${Painted} kind="mask" pixels=${mask} width=${width} height=${height} strength=${112} edge=${COLOURS.edge} fine=${view.scale > 2} />
      </div>
      <${Lines} ...${{ view, log, open, tool, value, radius, doing, cursor, over }} />
    </div>
    <div class="zoom">
      <${Button} data-repeats aria-label=${t('regions.zoom_in')} title=${t('regions.zoom_in')} onclick=${() => view.zoom(1.5)}>+<//>
      <${Button} data-repeats aria-label=${t('regions.zoom_out')} title=${t('regions.zoom_out')} onclick=${() => view.zoom(1 / 1.5)}>−<//>
      <${Button} icon="full" aria-label=${t('regions.fit')} title=${t('regions.fit')} onclick=${view.fit} />
    </div>
    <p class="unseen" role="status">${said}</p>
  </div>`;
}

// ---- what is seen -------------------------------------------------------------------------------

/** Pixels that are set, in red, with an edge; of a large picture not every one is painted. */
function Painted({ kind, pixels, width, height, strength, edge, fine }) {
  const canvas = useRef(null);
  const scale = Math.min(1, MOST_PAINTED / Math.max(width, height));
  const [wide, high] = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
  useLayoutEffect(() => {
    const shown = scale === 1 ? pixels : sampled(pixels, width, height, wide, high);
    const context = canvas.current.getContext('2d');
    const image = context.createImageData(wide, high);
    const whole = new Uint32Array(image.data.buffer);
    const [inside, rim] = [[...COLOURS.hide, strength], [...edge, 255]].map((one) => new Uint32Array(Uint8Array.from(one).buffer)[0]);
    for (let at = 0; at < shown.length; at += 1) {
      if (shown[at] === 0) continue;
      const column = at % wide;
      const isRim = (column > 0 && !shown[at - 1]) || (column < wide - 1 && !shown[at + 1])
        || (at >= wide && !shown[at - wide]) || (at + wide < shown.length && !shown[at + wide]);
      whole[at] = isRim ? rim : inside;
    }
    context.putImageData(image, 0, 0);
  }, [pixels, wide, high]);
  return html`<canvas ref=${canvas} class=${`${kind} ${fine ? 'fine' : ''}`} width=${wide} height=${high}></canvas>`;
}

/** Those of (width * height) pixels that lie in the middle of (wide * high) equal parts. */
function sampled(pixels, width, height, wide, high) {
  const columns = Uint32Array.from({ length: wide }, (_, at) => Math.floor(((at + 0.5) * width) / wide));
  const found = new Uint8Array(wide * high);
  for (let row = 0; row < high; row += 1) {
    const from = Math.floor(((row + 0.5) * height) / high) * width;
    for (let column = 0; column < wide; column += 1) found[row * wide + column] = pixels[from + columns[column]];
  }
  return found;
}

const through = (points) => points.map((point) => point.join(' ')).join('L');

/** Corners, what is being drawn, and where the next of it would be. */
function Lines({ view, log, open, tool, value, radius, doing, cursor, over }) {
  const at = ([x, y]) => [view.x + x * view.scale, view.y + y * view.scale];
  const kind = value ? 'hide' : 'erase';
  const handles = tool === 'polygon' ? shapesOf(log, doing) : [];
  const corners = doing?.kind === 'corner' && doing.place === null ? doing.points : open;
  const wide = radius * 2 * view.scale;
  const here = cursor ?? over;
  return html`<svg class=${`lines ${kind}`} aria-hidden="true">
    ${handles.map((one) => html`<g key=${one.place} class="shape"><path d=${`M${through(one.points.map(at))}Z`} />
      ${one.points.map(at).map(([x, y]) => html`<circle cx=${x} cy=${y} r="6" />`)}</g>`)}
    ${tool === 'polygon' && corners.length > 0 && html`<g class="open"><path d=${`M${through(corners.map(at))}${here ? `L${at(here).join(' ')}` : ''}`} />
      ${corners.map(at).map(([x, y], place) => html`<circle cx=${x} cy=${y} r=${place === 0 ? 10 : 7} />`)}</g>`}
    ${doing?.kind === 'rectangle' && html`<path class="new" d=${`M${through(box(doing.points).map(at))}Z`} />`}
    ${doing?.kind === 'brush' && html`<path class="stroke" style=${{ strokeWidth: wide }} d=${`M${through([doing.points[0], ...doing.points].map(at))}`} />`}
    ${tool === 'brush' && here && html`<circle class="tip" cx=${at(here)[0]} cy=${at(here)[1]} r=${wide / 2} />`}
    ${cursor && html`<path class="cross" d=${`M${at(cursor)[0] - 14} ${at(cursor)[1]}h28M${at(cursor)[0]} ${at(cursor)[1] - 14}v28`} />`}
  </svg>`;
}

/** The polygons of the list; the one of which a corner is dragged, as it would be. */
function shapesOf(log, doing) {
  const shapes = inForce(log).filter((one) => one.kind === 'shape');
  if (doing?.kind !== 'corner') return shapes;
  return shapes.map((one) => (one.place === doing.place ? { ...one, points: doing.points } : one));
}

/** The corners of a rectangle between two of them. */
const box = ([[x0, y0], [x1, y1]]) => [[x0, y0], [x1, y0], [x1, y1], [x0, y1]];

// ---- zoom and pan -------------------------------------------------------------------------------

function useView(stage, width, height) {
  const [place, setPlace] = useState({ x: 0, y: 0, scale: 1 });
  const fitted = useRef(true);
  const fit = useCallback(() => {
    const { clientWidth, clientHeight } = stage.current;
    const scale = Math.min(clientWidth / width, clientHeight / height) * 0.97;
    fitted.current = true;
    setPlace({ scale, x: (clientWidth - width * scale) / 2, y: (clientHeight - height * scale) / 2 });
  }, [width, height]);
  const inSight = ({ scale, x, y }) => { // some of it, at least
    const { clientWidth, clientHeight } = stage.current;
    const kept = (at, whole, side) => Math.min(Math.max(at, Math.min(60, whole) - side * scale), whole - Math.min(60, whole));
    return { scale, x: kept(x, clientWidth, width), y: kept(y, clientHeight, height) };
  };
  useLayoutEffect(() => {
    fit();
    const watch = new ResizeObserver(() => (fitted.current ? fit() : setPlace(inSight)));
    watch.observe(stage.current);
    return () => watch.disconnect();
  }, [fit]);
  const bounded = (next) => {
    fitted.current = false;
    setPlace(inSight(next));
  };
  const least = () => Math.min(stage.current.clientWidth / width, stage.current.clientHeight / height) / 2;
  /** So much larger; what is at this place of the stage stays there. */
  const zoom = (times, at = [stage.current.clientWidth / 2, stage.current.clientHeight / 2], from = place) => {
    const scale = Math.min(Math.max(from.scale * times, least()), Math.max(MOST_ZOOM, least()));
    const by = scale / from.scale;
    bounded({ scale, x: at[0] - (at[0] - from.x) * by, y: at[1] - (at[1] - from.y) * by });
  };
  const pan = (dx, dy, from = place) => bounded({ ...from, x: from.x + dx, y: from.y + dy });
  const follow = ([x, y]) => {
    const [left, top] = [place.x + x * place.scale, place.y + y * place.scale];
    const off = (at, whole) => (at < 20 ? 20 - at : Math.min(whole - 20 - at, 0));
    const [dx, dy] = [off(left, stage.current.clientWidth), off(top, stage.current.clientHeight)];
    if (dx || dy) pan(dx, dy);
  };
  return { ...place, fit, zoom, pan, follow, bounded };
}

// ---- mouse, pen and fingers ---------------------------------------------------------------------

function useHand(given) {
  const { stage, view } = given;
  const now = useRef(null);
  now.current = given; // of the last drawing: events may come faster
  const pointers = useRef(new Map());
  const gesture = useRef(null);
  const tapped = useRef({ time: 0, x: 0, y: 0 });

  useEffect(() => {
    const wheel = (event) => { // passive listeners, as of JSX, cannot keep the page from scrolling
      event.preventDefault();
      now.current.view.zoom(Math.exp(-event.deltaY / 400), onStage(event));
    };
    stage.current.addEventListener('wheel', wheel, { passive: false });
    return () => stage.current?.removeEventListener('wheel', wheel);
  }, []);

  const onStage = (event) => {
    const frame = stage.current.getBoundingClientRect();
    return [event.clientX - frame.left - stage.current.clientLeft, event.clientY - frame.top - stage.current.clientTop];
  };
  const onPicture = ([x, y]) => [(x - view.x) / view.scale, (y - view.y) / view.scale];
  const within = ([x, y]) => [Math.min(Math.max(Math.round(x), 0), given.width), Math.min(Math.max(Math.round(y), 0), given.height)];
  const set = (next) => { gesture.current = next; given.setDoing(next); };
  const middle = () => {
    const [[ax, ay], [bx, by]] = [...pointers.current.values()];
    return { at: [(ax + bx) / 2, (ay + by) / 2], apart: Math.hypot(ax - bx, ay - by) };
  };

  const down = (event) => {
    if (event.button === 2) return;
    event.preventDefault();
    stage.current.focus({ preventScroll: true });
    given.setCursor(null);
    stage.current.setPointerCapture(event.pointerId);
    const at = onStage(event);
    pointers.current.set(event.pointerId, at);
    if (pointers.current.size === 2) set({ kind: 'pinch', ...middle(), view });
    else if (pointers.current.size === 1) set(begun(event, at));
  };
  const begun = (event, at) => {
    const point = onPicture(at);
    if (event.button === 1 || given.tool === 'move') return { kind: 'pan', at, view };
    if (given.tool === 'rectangle') return { kind: 'rectangle', points: [within(point), within(point)] };
    if (given.tool === 'brush') return { kind: 'brush', points: [centre(point)] };
    const held = nearest(given, at, NEAR[event.pointerType] ?? NEAR.mouse);
    return held ? { kind: 'corner', ...held, at, moved: false } : { kind: 'tap', at, view };
  };

  const move = (event) => {
    const at = onStage(event);
    if (event.pointerType !== 'touch') given.setOver(onPicture(at));
    if (!pointers.current.has(event.pointerId)) return;
    pointers.current.set(event.pointerId, at);
    const doing = gesture.current;
    if (doing?.kind === 'pinch' && pointers.current.size === 2) pinched(doing);
    else if (doing?.kind === 'pan') view.pan(at[0] - doing.at[0], at[1] - doing.at[1], doing.view);
    else if (doing?.kind === 'tap' && apart(at, doing.at) > MOVED) set({ ...doing, kind: 'pan' });
    else if (doing?.kind === 'rectangle') set({ ...doing, points: [doing.points[0], within(onPicture(at))] });
    else if (doing?.kind === 'brush') set({ ...doing, points: painted(doing.points, event) });
    else if (doing?.kind === 'corner' && (doing.moved || apart(at, doing.at) > MOVED / 2)) {
      set({ ...doing, moved: true, points: doing.points.map((one, which) => (which === doing.which ? within(onPicture(at)) : one)) });
    }
  };
  const pinched = (doing) => {
    const { at, apart: wide } = middle();
    const [dx, dy] = [at[0] - doing.at[0], at[1] - doing.at[1]];
    view.zoom(wide / Math.max(doing.apart, 1), at, { ...doing.view, x: doing.view.x + dx, y: doing.view.y + dy });
  };
  const painted = (points, event) => {
    const all = event.getCoalescedEvents?.() ?? [];
    const far = Math.max(1, given.radius / 6); // nearer ones would change nothing that is seen
    const found = [...points];
    for (const one of all.length ? all : [event]) {
      const point = centre(onPicture(onStage(one)));
      if (apart(point, found[found.length - 1]) >= far) found.push(point);
    }
    return found;
  };

  const up = (event) => {
    if (!pointers.current.delete(event.pointerId)) return;
    const doing = gesture.current;
    if (doing?.kind === 'pinch') {
      if (pointers.current.size === 0) set(null);
      return;
    }
    set(null);
    if (doing?.kind === 'rectangle') finishRectangle(given, doing);
    else if (doing?.kind === 'brush') given.onadd({ kind: 'brush', points: doing.points, radius: given.radius, value: given.value });
    else if (doing?.kind === 'corner') released(doing, event);
    else if (doing?.kind === 'tap') tap(event);
  };
  const released = (doing, event) => {
    if (doing.moved && doing.place === null) given.onopen(doing.points);
    else if (doing.moved) given.onadd({ kind: 'reshape', of: doing.place, points: doing.points });
    else if (doing.place !== null) tap(event);
    else if (doing.which === 0 || isTwice(event)) given.close();
  };
  const isTwice = (event) => {
    const before = tapped.current;
    tapped.current = { time: event.timeStamp, x: event.clientX, y: event.clientY };
    return event.timeStamp - before.time < TWICE_MS && apart([event.clientX, event.clientY], [before.x, before.y]) < NEAR.touch;
  };
  const tap = (event) => {
    if (isTwice(event) && given.open.length) given.close();
    else given.corner(within(onPicture(onStage(event))));
  };
  const cancel = (event) => { pointers.current.delete(event.pointerId); set(null); };

  return { onpointerdown: down, onpointermove: move, onpointerup: up, onpointercancel: cancel, onpointerleave: () => given.setOver(null) };
}

const apart = ([ax, ay], [bx, by]) => Math.hypot(ax - bx, ay - by);
const centre = ([x, y]) => [Math.floor(x) + 0.5, Math.floor(y) + 0.5]; // so that the least brush is a pixel

function finishRectangle({ onadd, value }, { points }) {
  const [[x0, y0], [x1, y1]] = points;
  if (x0 !== x1 && y0 !== y1) onadd({ kind: 'shape', points: box(points), value });
}

/** The corner that is touched: of the open polygon (`place` is null), else of one in the list. */
function nearest({ view, open, log }, at, near) {
  const all = [{ place: null, points: open }, ...inForce(log).filter((one) => one.kind === 'shape').reverse()];
  let found = null;
  let least = near;
  for (const { place, points } of all) {
    points.forEach(([x, y], which) => {
      const far = apart(at, [view.x + x * view.scale, view.y + y * view.scale]);
      if (far < least) [found, least] = [{ place, points, which }, far];
    });
    if (found) return found;
  }
  return null;
}

// ---- keyboard -----------------------------------------------------------------------------------

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function useKeys(given) {
  const { tool, open, value, radius, width, height, view, cursor, setCursor, doing, setDoing, say, close, corner, onadd, onopen, onundo, onredo } = given;
  const wide = Math.max(width, height);
  const here = cursor ?? [Math.round(width / 2), Math.round(height / 2)];
  const step = (key, isFine) => {
    const by = isFine ? 1 : Math.max(1, Math.round(wide / 64));
    const point = [Math.min(Math.max(here[0] + STEPS[key][0] * by, 0), width), Math.min(Math.max(here[1] + STEPS[key][1] * by, 0), height)];
    setCursor(point);
    view.follow(point);
    if (doing?.kind === 'rectangle') setDoing({ ...doing, points: [doing.points[0], point] });
    say('regions.said_at', point);
  };
  const set = () => {
    setCursor(here);
    if (tool === 'polygon') corner(here);
    else if (tool === 'brush') onadd({ kind: 'brush', points: [centre(here)], radius, value });
    else if (tool === 'rectangle' && doing?.kind === 'rectangle') { finishRectangle(given, doing); setDoing(null); }
    else if (tool === 'rectangle') setDoing({ kind: 'rectangle', points: [here, here] });
  };
  const withControl = { z: (event) => (event.shiftKey ? onredo() : onundo()), y: onredo };
  const alone = {
    ' ': set,
    Enter: () => (tool === 'polygon' ? close() : set()),
    Backspace: () => onopen(open.slice(0, -1)),
    Delete: () => onopen(open.slice(0, -1)),
    Escape: () => { setDoing(null); if (open.length) onopen([]); },
    '+': () => view.zoom(1.5),
    '-': () => view.zoom(1 / 1.5),
    0: () => view.fit(),
  };
  return (event) => {
    const does = event.ctrlKey || event.metaKey ? withControl[event.key.toLowerCase()] : alone[event.key];
    if (!STEPS[event.key] && !does) return;
    event.preventDefault();
    if (does) does(event);
    else step(event.key, event.shiftKey);
  };
}
