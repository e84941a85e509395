// A picture to look into: over it what is anomalous, and closer by wheel, two fingers, buttons or keys.

import { path, query } from './api.js';
import { t } from './words.js';
import {
  Button, Icon, Photo, html, loadStyle, useEffect, useLayoutEffect, useRef, useState,
} from './parts.js';

await loadStyle('/web/viewer.css');

const MOST = 16; // times
const STEP = 1.4; // times, of a button, a key or a notch of the wheel
const PAN = 60; // pixels, of a key
const DRAWN = 1024; // pixels of the longer side, which the server's drawings have at most
const SHOWN = ['JPEG', 'PNG', 'BMP']; // what browsers show as well
const WHOLE = { scale: 1, x: 0, y: 0 };

let opacityNow = 0.7; // stays from one picture to the next

/** A decision's picture; `view` names one of several, and `image` says what of it is known. */
export function Viewer({ decision, view, image, alt }) {
  const [opacity, setOpacity] = useState(opacityNow);
  const [place, setPlace] = useState(WHOLE);
  const [box, move] = useLook(setPlace);
  useLayoutEffect(() => setPlace(WHOLE), [decision.number, view]);
  const over = (share) => { opacityNow = share; setOpacity(share); };
  const hasMap = decision.has_picture && decision.verdict !== 'none';
  const isLarger = image && Math.max(image.width, image.height) > DRAWN && SHOWN.includes(image.format);
  const isSharper = isLarger && decision.has_picture && place.scale > 1.5;
  const of = (kind, more) => `${path('decisions', decision.id, kind)}${query({ number: decision.number, view, ...more })}`;
  const keys = (event) => {
    if (event.key === 'o') over(opacity > 0 ? 0 : 0.7);
    else if (!move.byKey(event.key, place)) return;
    event.preventDefault();
  };
  return html`<div class="viewer">
    <div ref=${box} class=${`box ${place.scale > 1 ? 'near' : ''}`} tabindex="0" role="group" data-keys=${place.scale > 1 ? '' : undefined}
      aria-label=${t('viewer.picture', { times: place.scale.toFixed(1) })} onkeydown=${keys}>
      <div class="moved" style=${{ transform: `translate(${place.x}px, ${place.y}px) scale(${place.scale})` }}>
        <${Photo} src=${decision.has_picture ? of('overlay', { paint: 'false' }) : null} alt=${alt} />
        ${isSharper && html`<${Photo} class="over" src=${of('image')} alt="" />`}
        ${hasMap && html`<div style=${{ opacity }}><${Photo} class="over" src=${of('overlay')} alt="" /></div>`}
      </div>
    </div>
    ${decision.has_picture && html`<div class="row controls">
      ${hasMap && html`<label class="opacity grow"><span>${t('shell.heat_map')}</span><input type="range" min="0" max="1" step="0.05" value=${opacity} oninput=${(event) => over(Number(event.target.value))} /></label>`}
      <div class="row zoom">
        <${Button} data-repeats aria-label=${t('viewer.farther')} title=${t('viewer.farther')} disabled=${place.scale <= 1} onclick=${() => move.times(1 / STEP)}>−<//>
        <${Button} aria-label=${t('viewer.whole')} title=${t('viewer.whole')} onclick=${() => setPlace(WHOLE)}><${Icon} name="full" /><//>
        <${Button} data-repeats aria-label=${t('viewer.closer')} title=${t('viewer.closer')} disabled=${place.scale >= MOST} onclick=${() => move.times(STEP)}>+<//>
      </div></div>`}
  </div>`;
}

/** What moves the picture in its box: the box's ref, and what buttons and keys call. */
function useLook(setPlace) {
  const box = useRef(null);
  const size = () => [box.current.clientWidth, box.current.clientHeight];
  const times = (factor, at) => setPlace((now) => nearer(now, factor, at ?? size().map((side) => side / 2), size()));
  const by = (x, y) => setPlace((now) => within({ ...now, x: now.x + x, y: now.y + y }, size()));
  const byKey = (key, { scale }) => {
    const arrow = { ArrowLeft: [PAN, 0], ArrowRight: [-PAN, 0], ArrowUp: [0, PAN], ArrowDown: [0, -PAN] }[key];
    if (arrow && scale > 1) by(...arrow);
    else if (key === '+' || key === '=') times(STEP);
    else if (key === '-') times(1 / STEP);
    else if (key === '0') setPlace(WHOLE);
    else return false;
    return true;
  };
  useEffect(() => listen(box.current, times, by), []);
  return [box, { times, byKey }];
}

/** `place`, this many times closer, while the point `at` of the box stays where it is. */
function nearer(place, factor, [x, y], size) {
  const scale = Math.min(MOST, Math.max(1, place.scale * factor));
  const by = scale / place.scale;
  return within({ scale, x: x - (x - place.x) * by, y: y - (y - place.y) * by }, size);
}

/** So that the picture covers its box. */
function within({ scale, x, y }, [width, height]) {
  const held = (at, side) => Math.min(0, Math.max(side * (1 - scale), at));
  return { scale, x: held(x, width), y: held(y, height) };
}

/** Wheel, fingers and double clicks; returns what ends that. */
function listen(box, times, by) {
  const ending = new AbortController();
  const options = { signal: ending.signal };
  const fingers = new Map(); // pointer -> where it is
  const at = (event) => { const { left, top } = box.getBoundingClientRect(); return [event.clientX - left, event.clientY - top]; };
  const isNear = () => box.classList.contains('near');
  box.addEventListener('wheel', (event) => {
    event.preventDefault();
    times(STEP ** (-Math.sign(event.deltaY) * Math.min(1, Math.abs(event.deltaY) / 100)), at(event));
  }, { ...options, passive: false });
  box.addEventListener('dblclick', (event) => times(isNear() ? 1 / MOST : 3, at(event)), options);
  box.addEventListener('pointerdown', (event) => {
    fingers.set(event.pointerId, at(event));
    if (isNear() || fingers.size > 1) box.setPointerCapture(event.pointerId);
  }, options);
  box.addEventListener('pointermove', (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return;
    const now = at(event);
    const other = [...fingers].find(([id]) => id !== event.pointerId)?.[1];
    if (other) times(distance(now, other) / Math.max(1, distance(before, other)), middle(now, other));
    else if (isNear()) by(now[0] - before[0], now[1] - before[1]);
    fingers.set(event.pointerId, now);
  }, options);
  for (const end of ['pointerup', 'pointercancel', 'pointerleave']) box.addEventListener(end, (event) => fingers.delete(event.pointerId), options);
  box.addEventListener('dragstart', (event) => event.preventDefault(), options);
  return () => ending.abort();
}

const distance = ([x, y], [a, b]) => Math.hypot(x - a, y - b);
const middle = ([x, y], [a, b]) => [(x + a) / 2, (y + b) / 2];
