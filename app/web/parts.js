// What pages are made of: small parts that look and behave the same everywhere.

import { Component, createContext, h, html, render, useCallback, useContext, useEffect, useLayoutEffect, useMemo, useReducer, useRef, useState } from './lib/preact.js';
import { Refused, get, keepInTab, path, picture, pictureHere, query, send } from './api.js';
import { language, t } from './words.js';

export { Component, createContext, h, html, render, useCallback, useContext, useEffect, useLayoutEffect, useMemo, useReducer, useRef, useState };

// ---- where we are, and who ----------------------------------------------------------------------

/** The page and the query of `#/page?query`; `without` is the page where none is named. */
export function useRoute(without) {
  const [hash, setHash] = useState(location.hash);
  useEffect(() => {
    const moved = () => setHash(location.hash);
    addEventListener('hashchange', moved);
    return () => removeEventListener('hashchange', moved);
  }, []);
  const [page, search] = hash.replace(/^#\/?/, '').split('?');
  return { page: page || without, query: new URLSearchParams(search ?? '') };
}

/** Go to a page; `values` become its query. `instead`: of the one that is open, not after it. */
export function go(page, values = {}, instead = false) {
  const hash = `#/${page}${query(values)}`;
  if (instead) history.replaceState(null, '', hash);
  else location.hash = hash;
  if (instead) dispatchEvent(new HashChangeEvent('hashchange'));
}

const ROLES = ['line', 'operator', 'admin'];

/** Whether the session's role is this one, or a higher one. */
export const may = (session, role) => ROLES.indexOf(session.role) >= ROLES.indexOf(role);

/** Why the session may not do what needs this role, for a button's `why`; '' where it may. */
export const whyNot = (session, role) => (may(session, role) ? '' : t(`shell.needs_${role}`));

/** Forget the key of this device; the session afterwards. */
export async function leave() {
  keepInTab('');
  await send('DELETE', '/session');
  return get('/session');
}

const styles = new Map();

/** Add a style sheet to the page, once; resolves when it counts. */
export function loadStyle(href) {
  if (!styles.has(href)) {
    styles.set(href, new Promise((loaded, failed) => {
      const link = Object.assign(document.createElement('link'), { rel: 'stylesheet', href, onload: loaded, onerror: failed });
      document.head.append(link);
    }));
    styles.get(href).catch(() => styles.delete(href));
  }
  return styles.get(href);
}

// ---- what the server knows ----------------------------------------------------------------------

/** What GET `from` says, again every `every` ms while somebody looks; null `from` asks nothing.
 *
 * What was there stays while it is asked again, and where that fails: `error` says so beside it.
 */
export function useData(from, every = 0) {
  const [state, setState] = useState({ from: null, data: null, error: null });
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    if (from === null) return undefined;
    const ending = new AbortController();
    let timer = 0;
    const look = async () => {
      if (!document.hidden || every === 0) {
        try {
          const data = await get(from, { signal: ending.signal });
          setState({ from, data, error: null });
        } catch (error) {
          if (error.name === 'AbortError') return;
          setState((now) => ({ from, data: now.from === from ? now.data : null, error }));
        }
      }
      if (every && !ending.signal.aborted) timer = setTimeout(look, every);
    };
    look();
    return () => { ending.abort(); clearTimeout(timer); };
  }, [from, every, turn]);
  const isOurs = state.from === from;
  return {
    data: isOurs ? state.data : null,
    error: isOurs ? state.error : null,
    again: useCallback(() => setTurn((now) => now + 1), []),
  };
}

/** What runs one at a time at a touch: `[run, busy]`. A refusal becomes a toast. */
export function useAction(work) {
  const [busy, setBusy] = useState(false);
  const running = useRef(false);
  const latest = useRef(work);
  latest.current = work;
  const run = useCallback(async (...given) => {
    if (running.current) return undefined;
    running.current = true;
    setBusy(true);
    try {
      return await latest.current(...given);
    } catch (error) {
      if (error.name !== 'AbortError') toast(sentence(error), 'bad');
      return undefined;
    } finally {
      running.current = false;
      setBusy(false);
    }
  }, []);
  return [run, busy];
}

/** Do at a key what `keys` says (`{ g: ..., ArrowLeft: ... }`), unless it is typed into something.
 *
 * A letter that is held down counts once.
 */
export function useKeys(keys) {
  const latest = useRef(keys);
  latest.current = keys;
  useLayoutEffect(() => {
    const pressed = (event) => {
      const isLetter = event.key.length === 1;
      if (event.defaultPrevented || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
      if (event.target.closest?.('dialog, select, textarea, input:not([type=checkbox])')) return;
      const act = latest.current[isLetter ? event.key.toLowerCase() : event.key];
      if (!act || (isLetter && event.repeat)) return;
      event.preventDefault();
      act();
    };
    addEventListener('keydown', pressed);
    return () => removeEventListener('keydown', pressed);
  }, []);
}

// ---- words and numbers --------------------------------------------------------------------------

/** What a person reads of an error: in their language what kind it is, then the server's sentence. */
export function sentence(error) {
  if (!(error instanceof Refused) && !error.code) return String(error.message ?? error);
  const kind = t(`codes.${error.code}`);
  return error.message ? `${kind} ${error.message}` : kind;
}

const formats = new Map();

/** What writes a number or a time in the language of now. To make one takes longer than a row of a table. */
function format(Kind, options) {
  const key = `${language()} ${Kind.name} ${JSON.stringify(options)}`;
  if (!formats.has(key)) formats.set(key, new Kind(language(), options));
  return formats.get(key);
}

const digitsOf = (digits) => ({ minimumFractionDigits: digits, maximumFractionDigits: digits });
export const number = (value, digits = 2) => (value == null ? '–' : format(Intl.NumberFormat, digitsOf(digits)).format(value));
export const count = (value) => (value == null ? '–' : format(Intl.NumberFormat).format(value));
export const percent = (share, digits = 1) => (share == null ? '–' : format(Intl.NumberFormat, { style: 'percent', ...digitsOf(digits) }).format(share));

/** Bytes as MiB or GiB. */
export function bytes(value) {
  if (value == null) return '–';
  return value < 1024 ** 3 ? `${number(value / 1024 ** 2, 0)} MiB` : `${number(value / 1024 ** 3, 1)} GiB`;
}

/** A moment: the time alone where it is of today, else with its date. `seconds`: to the second. */
export function moment(iso, seconds = true) {
  if (!iso) return '–';
  const at = new Date(iso);
  const clock = { hourCycle: 'h23', hour: '2-digit', minute: '2-digit', ...(seconds && { second: '2-digit' }) };
  const isToday = at.toDateString() === new Date().toDateString();
  return format(Intl.DateTimeFormat, isToday ? clock : { year: 'numeric', month: 'short', day: 'numeric', ...clock }).format(at);
}

// ---- drawn --------------------------------------------------------------------------------------

const STROKES = {
  line: 'M3 17h18M3 17V9h6v8M9 12h6v5M15 6h6v11',
  try: 'M4 8h4l2-3h4l2 3h4v11H4zM12 16.5a3.5 3.5 0 1 0 0-7 3.5 3.5 0 0 0 0 7z',
  review: 'm3 12 4 4 6-7M13 17h8M16 12h5M17 7h4',
  find: 'M11 18a7 7 0 1 0 0-14 7 7 0 0 0 0 14zM16 16l5 5',
  model: 'M4 20V10M9 20V4M14 20v-8M19 20V7M2 14h20',
  teach: 'M12 5 2 9l10 4 10-4zM6 11v5c3 3 9 3 12 0v-5M22 9v6',
  regions: 'M4 6l9-2 7 6-4 9-11 1zM4 6h.01M13 4h.01M20 10h.01M16 19h.01M5 20h.01',
  system: 'M12 15a3 3 0 1 0 0-6 3 3 0 0 0 0 6zM12 2v3M12 19v3M4.9 4.9 7 7M17 17l2.1 2.1M2 12h3M19 12h3M4.9 19.1 7 17M17 7l2.1-2.1',
  leave: 'M10 4H4v16h6M15 8l5 4-5 4M20 12H9',
  again: 'M20 5v5h-5M20 10a8 8 0 1 0 0 5',
  undo: 'M8 5 4 9l4 4M4 9h10a6 6 0 0 1 0 12h-4',
  close: 'M5 5l14 14M19 5 5 19',
  add: 'M12 4v16M4 12h16',
  remove: 'M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13',
  download: 'M12 3v12M7 11l5 5 5-5M4 20h16',
  upload: 'M12 16V4M7 8l5-5 5 5M4 20h16',
  warning: 'M12 4 2 20h20zM12 10v5M12 17.5v.5',
  good: 'm4 12 5 6L20 6',
  defect: 'M5 5l14 14M19 5 5 19',
  unusable: 'M12 21a9 9 0 1 0 0-18 9 9 0 0 0 0 18zM5.6 5.6l12.8 12.8',
  play: 'M7 4v16l13-8z',
  next: 'm9 5 7 7-7 7',
  back: 'm15 5-7 7 7 7',
  full: 'M4 9V4h5M20 9V4h-5M4 15v5h5M20 15v5h-5',
  erase: 'm7 20-4-4L14 5l6 6-9 9zM11 20h9M9 10l6 6',
  brush: 'M14 4l6 6-8 8a4 4 0 0 1-6 0 4 4 0 0 1 0-6zM6 18l-3 3',
};

/** A drawn sign, of no meaning to who hears the page. */
export const Icon = ({ name }) => html`<svg class="icon" viewBox="0 0 24 24" aria-hidden="true" focusable="false"><path d=${STROKES[name]} /></svg>`;

/** A button; `why` is why it cannot be pressed now, and `busy` that it is at work.
 *
 * One that is pressed many times over, such as for the next picture, has `data-repeats`.
 */
export function Button({ kind = '', icon, busy, why, children, ...given }) {
  return html`<button type="button" class=${`button ${kind}`} ...${given} disabled=${given.disabled || busy || Boolean(why)}
    title=${why || given.title} data-why=${why || undefined} aria-busy=${busy ? 'true' : undefined}>${icon && html`<${Icon} name=${icon} />`}${children && html`<span>${children}</span>`}</button>`;
}

/** Choices of which one counts: `options` are `[value, words]`. */
export function Choice({ label, value, options, onchange }) {
  return html`<div class="choice" role="radiogroup" aria-label=${label}>
    ${options.map(([one, words]) => html`<button key=${one} type="button" role="radio" aria-checked=${one === value ? 'true' : 'false'} onclick=${() => onchange(one)}>${words}</button>`)}
  </div>`;
}

/** A labelled field; what is inside is the input. */
export const Field = ({ label, hint, children }) => html`<label class="field"><span>${label}</span>${children}${hint && html`<small>${hint}</small>`}</label>`;

export const Tile = ({ name, value, look = '', children }) => html`<div class=${`tile ${look}`}><span>${name}</span><b>${value}</b>${children && html`<small>${children}</small>`}</div>`;

/** How far something is: 0 to 1, or null where nobody knows. */
export function Progress({ value, label }) {
  const share = value == null ? undefined : Math.round(value * 100);
  return html`<div class="progress"><progress max="100" value=${share} aria-label=${label}></progress><span>${label}${share != null && html` <b>${share} %</b>`}</span></div>`;
}

export const Waiting = ({ children }) => html`<p class="waiting" role="status"><span class="dots" aria-hidden="true"></span>${children ?? t('shell.waiting')}</p>`;

/** What went wrong, and what to do. */
export function Problem({ error, again }) {
  return html`<div class="problem" role="alert"><${Icon} name="warning" /><p>${sentence(error)}</p>
    ${again && html`<${Button} onclick=${again}>${t('shell.again')}<//>`}</div>`;
}

/** What is shown where there is nothing yet: why, and the next step. */
export const Empty = ({ title, children }) => html`<div class="empty"><h2>${title}</h2>${children}</div>`;

const SIGNS = { normal: 'good', anomaly: 'defect', unusable: 'unusable', none: 'warning' };

/** The drawn sign of a verdict. */
export const Sign = ({ verdict }) => html`<${Icon} name=${SIGNS[verdict] ?? 'warning'} />`;

/** OK, NG, or why neither. */
export function Verdict({ verdict, code, size = '' }) {
  return html`<span class=${`verdict ${verdict} ${size}`}><${Sign} verdict=${verdict} />${t(`verdict.${verdict}`)}${code && html`<small>${t(`codes.${code}`)}</small>`}</span>`;
}

/** What a person said of a part. */
export const Mark = ({ label, defect }) => label && html`<span class=${`mark ${label}`}><${Icon} name=${label} />${t(`label.${label}`)}${defect && html`: ${defect}`}</span>`;

/** Score and limit, both 0 to 1, as a bar with a mark. */
export function ScoreBar({ score, threshold }) {
  if (score == null) return null;
  const over = threshold != null && score > threshold;
  return html`<div class=${`scorebar ${over ? 'over' : ''}`} role="img" aria-label=${t('shell.score', { score: number(score, 3), limit: number(threshold, 3) })}>
    <i style=${{ width: `${score * 100}%` }}></i>${threshold != null && html`<u style=${{ left: `${threshold * 100}%` }}></u>`}
  </div>`;
}

/** A picture of the server's, asked for when it comes into sight. */
export function Photo({ src, alt, ...given }) {
  const frame = useRef(null);
  const [state, setState] = useState({ src: null, url: null, error: null });
  useEffect(() => {
    let gone = false;
    const watch = new IntersectionObserver((entries) => {
      if (!entries.some((one) => one.isIntersecting)) return;
      watch.disconnect();
      picture(src).then(
        (url) => gone || setState({ src, url, error: null }),
        (error) => gone || setState({ src, url: null, error }),
      );
    }, { rootMargin: '300px' });
    if (src) watch.observe(frame.current);
    return () => { gone = true; watch.disconnect(); };
  }, [src]);
  const shown = state.src === src ? state : { url: pictureHere(src), error: null };
  const isKept = shown.error && shown.error.code !== 'unknown_decision';
  return html`<span ...${given} ref=${frame} class=${`photo ${given.class ?? ''} ${shown.url ? '' : 'away'}`}>
    ${shown.url && html`<img src=${shown.url} alt=${alt} />`}
    ${(shown.error || !src) && html`<span class="none" title=${shown.error ? sentence(shown.error) : undefined}>${isKept ? t(`codes.${shown.error.code}`) : t('shell.no_picture')}</span>`}
  </span>`;
}

/** Where the picture of a decision lies, with what is anomalous painted over it or as it was sent. */
export const pictureOf = (decision, view, painted) => `${path('decisions', decision.id)}/overlay${query({ number: decision.number, view, paint: painted ? null : 'false' })}`;

/** Of a decision: its picture, and over it what is anomalous, as strong as `opacity` (0 to 1). */
export function Layers({ decision, view, opacity = 1, alt }) {
  if (!decision.has_picture) return html`<${Photo} src=${null} alt="" class="layers" />`;
  return html`<span class="layers"><${Photo} src=${pictureOf(decision, view, false)} alt=${alt} />
    <span class="over" style=${{ opacity }}><${Photo} src=${pictureOf(decision, view, true)} alt="" /></span></span>`;
}

/** Where the small picture of a decision lies; null where none is kept. */
export const thumbnailOf = (decision, view) => (decision.has_picture ? `${path('decisions', decision.id)}/thumbnail${query({ number: decision.number, view })}` : null);

/** A small picture of a decision. */
export const Thumbnail = ({ decision, view, alt }) => html`<${Photo} class="thumbnail" alt=${alt ?? ''} src=${thumbnailOf(decision, view)} />`;

/** Which model, of those that there are. `all`: or of every one. */
export function ModelPicker({ models, value, onchange, all = false }) {
  return html`<${Field} label=${t('shell.model')}><select value=${value ?? ''} onchange=${(event) => onchange(event.target.value)}>
    ${all && html`<option value="">${t('shell.all_models')}</option>`}
    ${models.map((one) => html`<option key=${one.name} value=${one.name}>${one.name}</option>`)}</select><//>`;
}

/** The models, each with its newest version, again every few seconds. */
export function useModels(every = 5000) {
  const { data, error, again } = useData('/models?limit=1', every);
  return { models: data?.models ?? null, error, again };
}

// ---- said and asked -----------------------------------------------------------------------------

let said = []; // what is shown of it
const tellers = []; // those that show it: the last one, as what lies under an open window is not seen
const asked = new Set();

function say(next) {
  said = next;
  for (const again of tellers) again();
}

/** Say something for some seconds. `kind`: '' or 'bad'; `action` is `[words, do]`, such as an undo. */
export function toast(words, kind = '', action = null) {
  const one = { id: crypto.getRandomValues(new Uint32Array(1))[0], words, kind, action };
  say([...said.slice(-2), one]);
  setTimeout(() => unsay(one), kind === 'bad' ? 12_000 : 6000);
}

/** A finger sees no title: where it touches a button that cannot be pressed, why is said. */
function sayWhy({ pointerType, clientX, clientY }) {
  if (pointerType === 'mouse') return;
  const why = document.elementFromPoint(clientX, clientY)?.closest('[data-why]')?.dataset.why;
  if (why && !said.some((one) => one.words === why)) toast(why);
}
document.addEventListener('pointerup', sayWhy, true);

const TWICE = { ms: 350, px: 30 }; // nobody sees what a touch did, and touches again, any sooner
let touched = { at: -Infinity, x: 0, y: 0 };

/** The second click of a double click counts for nothing: another part, or a window, lies there by then. */
function onlyOnce(event) {
  const { timeStamp: at, clientX: x, clientY: y, detail, target, pointerType } = event;
  if (detail === 0 || target.closest('input')) return; // by keyboard, or by the label around it
  const isSecond = (detail > 1 || pointerType === 'touch') && at - touched.at < TWICE.ms && Math.hypot(x - touched.x, y - touched.y) < TWICE.px;
  touched = { at, x, y };
  if (!isSecond || !(target.closest('button:not([data-repeats]), a') || target.matches('dialog'))) return;
  event.preventDefault();
  event.stopPropagation();
}
document.addEventListener('click', onlyOnce, true);

const unsay = (one) => say(said.filter((other) => other.id !== one.id));

export function Toasts() {
  const [, again] = useReducer((turn) => turn + 1, 0);
  useEffect(() => {
    tellers.push(again);
    say(said);
    return () => { tellers.splice(tellers.indexOf(again), 1); say(said); };
  }, []);
  const shown = tellers.at(-1) === again ? said : [];
  return html`<div class="toasts" role="status" aria-live="polite">${shown.map((one) => html`<div key=${one.id} class=${`toast ${one.kind}`}>
    <p>${one.words}</p>${one.action && html`<${Button} onclick=${() => { unsay(one); one.action[1](); }}>${one.action[0]}<//>`}
    <${Button} kind="plain" icon="close" aria-label=${t('shell.close')} onclick=${() => unsay(one)} /></div>`)}</div>`;
}

/** Ask before something is done. Resolves to the reason given ('' where none is wanted), null for no.
 *
 * `reason`: 'must', 'may' or nothing; `danger` colours the button; `body` is shown above it.
 */
export function confirm({ title, body = null, yes, reason = '', danger = false }) {
  return new Promise((done) => { for (const hear of asked) hear({ title, body, yes, reason, danger, done }); });
}

export function Dialogs() {
  const [one, setOne] = useState(null);
  useEffect(() => { asked.add(setOne); return () => asked.delete(setOne); }, []);
  if (one === null) return null;
  const end = (answer) => { setOne(null); one.done(answer); };
  return html`<${Question} ...${one} end=${end} />`;
}

function Question({ title, body, yes, reason, danger, end }) {
  const [text, setText] = useState('');
  const missing = reason === 'must' && !text.trim();
  return html`<${Dialog} title=${title} onclose=${() => end(null)}>
    <form method="dialog" onsubmit=${(event) => { event.preventDefault(); if (!missing) end(text.trim()); }}>
      ${body}
      ${reason && html`<${Field} label=${t(reason === 'must' ? 'shell.reason' : 'shell.reason_may')}><input value=${text} maxlength="500" oninput=${(event) => setText(event.target.value)} /><//>`}
      <div class="row end"><${Button} onclick=${() => end(null)}>${t('shell.no')}<//>
        <button class=${`button ${danger ? 'danger' : 'main'}`} disabled=${missing}>${yes}</button></div>
    </form><//>`;
}

/** A window over the page; Escape, and a touch beside it, close it. */
export function Dialog({ title, onclose, children, wide = false }) {
  const box = useRef(null);
  useLayoutEffect(() => { box.current.showModal(); }, []);
  useLayoutEffect(() => { // one that was moved in the page lies no more over it
    if (!box.current.open || box.current.matches(':modal')) return;
    box.current.open = false;
    box.current.showModal();
  });
  return html`<dialog ref=${box} class=${wide ? 'wide' : ''} aria-label=${title} onclose=${onclose}
    onclick=${(event) => { if (event.target === box.current) box.current.close(); }}>
    <div class="inside"><header><h2>${title}</h2><${Button} kind="plain" icon="close" aria-label=${t('shell.close')} onclick=${() => box.current.close()} /></header>
    ${children}</div><${Toasts} /></dialog>`;
}
