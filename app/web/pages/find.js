// Find: decisions by part, time, verdict, score and label, as a list or in pictures.

import { download, get, pictureHere, query } from '../api.js';
import { DecisionDialog } from '../decision.js';
import { language, t } from '../words.js';
import {
  Button, Choice, Component, Empty, Field, Mark, Problem, ScoreBar, Thumbnail, Verdict,
  Waiting, count, go, html, moment, number as digits, useAction, useCallback, useData, useEffect,
  thumbnailOf, useLayoutEffect, useMemo, useModels, useReducer, useRef, useState,
} from '../parts.js';

const FILTERS = ['part', 'since', 'until', 'verdict', 'label', 'min_score', 'max_score', 'model', 'version'];
const VERDICTS = ['normal', 'anomaly', 'unusable', 'none'];
const LABELS = ['good', 'defect', 'unusable', 'none'];
const PAGE = 500; // decisions that are asked for at once
const AHEAD = 1000; // so many are known beyond what is in sight
const MOST = 50_000; // in the list: who wants to see more of them narrows the filter
const BEYOND = { list: 6, grid: 2 }; // lines above and below what is in sight
const NARROW = matchMedia('(max-width: 899px)');
const LOOKS = { list: { wide: 68, narrow: 88 }, grid: { wide: 252, narrow: 236 } }; // px of a row
const TILE = { wide: 200, narrow: 158 }; // px, at least
const STILL_MS = 120;
const MINUTE_MS = 60_000;
const DAY_MS = 86_400_000;

export default function Find({ query: asked, session }) {
  const filter = useMemo(() => Object.fromEntries(FILTERS.map((name) => [name, asked.get(name)]).filter(([, value]) => value)), [asked.toString()]);
  const look = asked.get('look') === 'grid' ? 'grid' : 'list';
  const place = useMemo(() => ({ ...filter, look: look === 'grid' ? look : null }), [filter, look]);
  const found = useFound(filter);
  const opened = useOpened(place, asked, found);
  const choose = (changes) => go('find', { ...place, ...changes }, true);
  return html`
    <h1>${t('pages.find')}</h1>
    <${Filters} filter=${filter} choose=${choose} />
    <${Results} found=${found} place=${place} filter=${filter} look=${look} choose=${choose} open=${opened.open} last=${opened.last} />
    ${opened.id && html`<${DecisionDialog} id=${opened.id} number=${opened.number} known=${opened.known} session=${session} onclose=${opened.close}
      onchange=${found.replace} newer=${opened.newer} older=${opened.older} onopen=${opened.instead} />`}`;
}

// ---- what is asked for --------------------------------------------------------------------------

function Filters({ filter, choose }) {
  const isNarrow = useNarrow();
  const more = FILTERS.filter((name) => name !== 'part' && filter[name]).length;
  return html`<form role="search" class="filters" onsubmit=${(event) => event.preventDefault()}>
    <div class="row first">
      <${Field} label=${t('find.part')}><${Late} type="search" value=${filter.part} maxlength="200" placeholder=${t('find.exact')} autocomplete="off" enterkeyhint="search" onvalue=${(part) => choose({ part })} /><//>
      <${Quick} choose=${choose} />
    </div>
    <details open=${isNarrow ? undefined : true}><summary>${t('find.more')}${more > 0 && html` <b>${t('find.set', { count: more })}</b>`}</summary>
      <div class="more">
        <${Times} filter=${filter} choose=${choose} />
        <${Select} label=${t('find.verdict')} value=${filter.verdict} onvalue=${(verdict) => choose({ verdict })}
          options=${VERDICTS.map((one) => [one, t(`verdict.${one}`)])} />
        <${Select} label=${t('find.label')} value=${filter.label} onvalue=${(label) => choose({ label })}
          options=${LABELS.map((one) => [one, one === 'none' ? t('find.unmarked') : t(`label.${one}`)])} />
        <${Field} label=${t('find.min_score')}><${Late} type="number" min="0" max="1" step="0.01" inputmode="decimal" value=${filter.min_score} onvalue=${(value) => choose({ min_score: value })} /><//>
        <${Field} label=${t('find.max_score')}><${Late} type="number" min="0" max="1" step="0.01" inputmode="decimal" value=${filter.max_score} onvalue=${(value) => choose({ max_score: value })} /><//>
        <${OfModel} filter=${filter} choose=${choose} />
        ${Object.keys(filter).length > 0 && html`<${Button} kind="plain" icon="close" onclick=${() => choose(nothing())}>${t('find.reset')}<//>`}
      </div></details>
  </form>`;
}

/** Whether the screen is a narrow one. */
function useNarrow() {
  const [isNarrow, setNarrow] = useState(NARROW.matches);
  useEffect(() => {
    const changed = () => setNarrow(NARROW.matches);
    NARROW.addEventListener('change', changed);
    return () => NARROW.removeEventListener('change', changed);
  }, []);
  return isNarrow;
}

const nothing = () => Object.fromEntries(FILTERS.map((name) => [name, null]));

/** A field that counts once it is left, or at Enter: half a name finds nothing. */
function Late({ value = '', onvalue, ...given }) {
  const [text, setText] = useState(value);
  useLayoutEffect(() => setText(value), [value]);
  const tell = (event) => { const now = event.target.value.trim(); if (now !== value && event.target.validity.valid) onvalue(now); };
  return html`<input ...${given} value=${text} oninput=${(event) => setText(event.target.value)} onchange=${tell}
    onsearch=${tell} onkeydown=${(event) => { if (event.key === 'Enter') tell(event); }} />`;
}

const Select = ({ label, value = '', options, onvalue }) => html`<${Field} label=${label}><select value=${value} onchange=${(event) => onvalue(event.target.value)}>
  <option value="">${t('find.any')}</option>${options.map(([one, words]) => html`<option key=${one} value=${one}>${words}</option>`)}</select><//>`;

/** From and until, as the clock on the wall says. */
const Times = ({ filter, choose }) => ['since', 'until'].map((name) => html`<${Field} key=${name} label=${t(`find.${name}`)}>
  <input type="datetime-local" value=${onTheWall(filter[name])} onchange=${(event) => choose({ [name]: event.target.value ? new Date(event.target.value).toISOString() : null })} /><//>`);

/** A moment as such a field has it; what is no moment, in an address from elsewhere, is none. */
function onTheWall(iso) {
  const at = new Date(iso ?? NaN);
  return Number.isNaN(at.getTime()) ? '' : new Date(at - at.getTimezoneOffset() * MINUTE_MS).toISOString().slice(0, 16);
}

/** Times that are asked for most. They become moments, so that an address finds the same tomorrow. */
function Quick({ choose }) {
  const [toShift, busy] = useAction(async () => choose({ since: (await get('/statistics?per=shift')).shift.since, until: null }));
  const since = (at) => choose({ since: new Date(Math.floor(at / MINUTE_MS) * MINUTE_MS).toISOString(), until: null });
  return html`<div class="quick" role="group" aria-label=${t('find.time')}>
    <${Button} onclick=${() => since(Date.now() - 60 * MINUTE_MS)}>${t('find.hour')}<//>
    <${Button} busy=${busy} onclick=${toShift}>${t('find.shift')}<//>
    <${Button} onclick=${() => since(new Date().setHours(0, 0, 0, 0))}>${t('find.today')}<//>
    <${Button} onclick=${() => since(Date.now() - 7 * DAY_MS)}>${t('find.week')}<//>
    <${Button} onclick=${() => choose({ since: null, until: null })}>${t('find.always')}<//>
  </div>`;
}

function OfModel({ filter, choose }) {
  const { models } = useModels(0);
  const { data } = useData(models?.some((one) => one.name === filter.model) ? `/models/${encodeURIComponent(filter.model)}?limit=200` : null);
  const names = [...new Set([...(models ?? []).map((one) => one.name), ...(filter.model ? [filter.model] : [])])];
  return html`<${Select} label=${t('shell.model')} value=${filter.model} options=${names.map((one) => [one, one])} onvalue=${(model) => choose({ model, version: null })} />
    <${Field} label=${t('find.version')}><${Late} value=${filter.version} maxlength="64" list="find-versions" autocomplete="off" onvalue=${(version) => choose({ version })} /><//>
    <datalist id="find-versions">${(data?.versions ?? []).map((one) => html`<option key=${one.version} value=${one.version} />`)}</datalist>`;
}

// ---- what is found ------------------------------------------------------------------------------

/** Decisions that a filter finds: as far as somebody has looked, and a little further. */
function useFound(filter) {
  const [turn, again] = useReducer((before) => before + 1, 0);
  const key = JSON.stringify([filter, turn]);
  const [state, setState] = useState({ key: '', rows: [], isWhole: false, error: null });
  const reach = useRef(null); // makes the rows known up to one
  useEffect(() => {
    const ending = new AbortController();
    let [rows, next, wanted, busy] = [[], null, 1, false];
    const load = async () => {
      if (busy) return;
      busy = true;
      try {
        while (rows.length < Math.min(wanted, MOST)) {
          const page = await get(`/decisions${query({ ...filter, limit: PAGE, before: next })}`, { signal: ending.signal });
          rows = [...rows, ...page.decisions];
          next = page.next;
          if (next === null) wanted = 0;
          setState({ key, rows, isWhole: next === null, error: null });
        }
      } catch (error) {
        if (error.name !== 'AbortError') setState((now) => ({ key, rows, isWhole: false, error }));
      }
      busy = false;
    };
    reach.current = (row) => {
      if (next === null && rows.length > 0) return;
      wanted = Math.max(wanted, row + AHEAD);
      load();
    };
    load();
    return () => ending.abort();
  }, [key]);
  const replace = useCallback((one) => setState((now) => ({ ...now, rows: now.rows.map((other) => (other.number === one.number ? one : other)) })), []);
  const isOurs = state.key === key;
  return {
    rows: state.rows, isWhole: isOurs && state.isWhole, error: isOurs ? state.error : null, isWaiting: !isOurs, again, replace, reach: useCallback((row) => reach.current?.(row), []),
  };
}

/** The decision that the address names, and how another one is opened instead. */
function useOpened(place, asked, { rows, reach }) {
  const [id, number] = [asked.get('id'), asked.get('number')];
  const wasOpened = useRef(false); // here, so that going back closes it
  const last = useRef(null); // place in the list of the one that was seen last
  const at = useMemo(() => (id ? rows.findIndex((one) => one.id === id && (!number || one.number === Number(number))) : -1), [rows, id, number]);
  useEffect(() => {
    if (!id) wasOpened.current = false;
    if (at < 0) return;
    last.current = at;
    reach(at);
  }, [id, at]);
  const open = useCallback((one) => { wasOpened.current = true; go('find', { ...place, id: one.id, number: one.number }); }, [place]);
  const instead = (one) => go('find', { ...place, id: one.id, number: one.number }, true);
  const step = (by) => (at >= 0 && rows[at + by] ? () => instead(rows[at + by]) : undefined);
  const close = () => {
    if (wasOpened.current) history.back();
    else if (id) go('find', place, true);
  };
  return { id, number, known: rows[at] ?? null, last: id ? null : last, close, newer: step(-1), older: step(1), open, instead };
}

function Results({ found, place, filter, look, choose, open, last }) {
  const { rows, isWhole, isWaiting, error } = found;
  const isMost = rows.length >= MOST;
  const [save, saving] = useAction(() => download(`/decisions.csv${query(filter)}`, 'decisions.csv'));
  if (error?.code === 'conflict' && rows.length === 0) {
    return html`<section class="results"><${Empty} title=${t('find.off')}><p>${error.message}</p><${Button} onclick=${found.again}>${t('shell.again')}<//><//></section>`;
  }
  return html`<section class="results">
    <div class="head row apart">
      <b role="status">${!isWaiting && !error && t(isWhole ? 'find.found' : 'find.found_more', { count: count(rows.length) })}</b>
      <div class="row">
        <${Choice} label=${t('find.look')} value=${look} options=${[['list', t('find.list')], ['grid', t('find.grid')]]} onchange=${(next) => choose({ look: next === 'grid' ? next : null })} />
        <${Button} icon="again" title=${t('find.again')} aria-label=${t('find.again')} busy=${isWaiting} onclick=${found.again} />
        <${Button} icon="download" busy=${saving} disabled=${rows.length === 0} title=${t('find.csv_all')} aria-label=${t('find.csv')} onclick=${save}>CSV<//>
      </div></div>
    ${rows.length > 0 && html`<${List} key=${look} rows=${rows} isWhole=${isWhole} isOld=${isWaiting} reach=${found.reach} look=${look} place=${place} open=${open} last=${last} />`}
    ${rows.length === 0 && isWhole && !isWaiting && html`<${Nothing} filter=${filter} choose=${choose} />`}
    ${error && html`<${Problem} error=${error} again=${found.again} />`}
    ${!error && (isMost ? html`<p class="soft">${t('find.most', { count: count(MOST) })}</p>` : !isWhole && html`<${Waiting} />`)}
  </section>`;
}

function Nothing({ filter, choose }) {
  if (Object.keys(filter).length === 0) return html`<${Empty} title=${t('find.empty')}><p><a href="#/try">${t('find.try_one')}</a></p><//>`;
  return html`<${Empty} title=${t('find.none')}>
    ${filter.part && html`<p>${t('find.none_exact', { part: filter.part })}</p>`}
    <${Button} onclick=${() => choose(nothing())}>${t('find.reset')}<//><//>`;
}

/** Of thousands of rows only those in sight are there; the others are room to scroll. */
function List({ rows, isWhole, isOld, reach, look, place, open, last }) {
  const box = useRef(null);
  const width = useWidth(box);
  const kind = useNarrow() ? 'narrow' : 'wide';
  const height = LOOKS[look][kind];
  const columns = look === 'grid' ? Math.max(1, Math.floor(width / TILE[kind])) : 1;
  const lines = Math.ceil(rows.length / columns);
  const [above, below] = useSight(box, height);
  const [from, to] = [Math.max(0, above - BEYOND[look]) * columns, Math.min(lines, below + BEYOND[look]) * columns];
  const { stop, keys, onfocusin } = useStop({ box, rows, height, columns, lines: below - above, last });
  const shown = rows.slice(from, to);
  const stopHere = stop >= from && stop < to ? stop : above * columns;
  useEffect(() => reach(to), [to, rows.length]);
  return html`<ol ref=${box} class=${`found ${look} ${isOld ? 'old' : ''}`} style=${{ height: `${lines * height}px` }} onkeydown=${keys} onfocusin=${onfocusin}>
    ${shown.map((one, offset) => html`<${Row} key=${one.number} one=${one} at=${from + offset} count=${isWhole ? rows.length : -1} isStop=${from + offset === stopHere}
      height=${height} columns=${columns} look=${look} place=${place} open=${open} words=${language()} />`)}
  </ol>`;
}

/** How wide the list is. */
function useWidth(box) {
  const [width, setWidth] = useState(0);
  useLayoutEffect(() => {
    const measure = () => setWidth(box.current.clientWidth);
    const watch = new ResizeObserver(measure);
    watch.observe(box.current);
    measure();
    return () => watch.disconnect();
  }, []);
  return width;
}

/** The first and the last line of the list that are in sight. */
function useSight(box, height) {
  const [sight, setSight] = useState([0, Math.ceil(innerHeight / height)]);
  useLayoutEffect(() => {
    const look = (event) => {
      if (event?.type === 'scroll') wait();
      const { top } = box.current.getBoundingClientRect();
      const now = [Math.max(0, Math.floor(-top / height)), Math.max(0, Math.ceil((innerHeight - top) / height))];
      setSight((before) => (before[0] === now[0] && before[1] === now[1] ? before : now));
    };
    look();
    addEventListener('scroll', look, { passive: true });
    addEventListener('resize', look);
    return () => { removeEventListener('scroll', look); removeEventListener('resize', look); };
  }, [height]);
  return sight;
}

const waiting = new Set();
let still = 0;

function wait() {
  clearTimeout(still);
  still = setTimeout(() => { for (const show of waiting) show(); waiting.clear(); still = 0; }, STILL_MS);
}

/** Do it once nothing is scrolled: no picture is asked for of what flies by. Returns what ends that. */
function whenStill(show) {
  waiting.add(show);
  if (!still) wait();
  return () => waiting.delete(show);
}

/** Which row the Tab key stops at, and the arrows that move on from there. */
function useStop({ box, rows, height, columns, lines, last }) {
  const [stop, setStop] = useState(0);
  const wanted = useRef(null);
  const focus = (at) => {
    const next = Math.max(0, Math.min(rows.length - 1, at));
    wanted.current = next;
    setStop(next);
    intoSight(box.current.getBoundingClientRect().top + Math.floor(next / columns) * height, height);
  };
  useLayoutEffect(() => { // a row that was far away is drawn only now
    const row = wanted.current === null ? null : box.current.querySelector(`[data-at="${wanted.current}"] a`);
    row?.focus({ preventScroll: true });
    if (row) wanted.current = null;
  });
  useEffect(() => { // its window was closed
    if (!last || last.current === null || document.querySelector('dialog[open]')) return;
    focus(last.current);
    last.current = null;
  }, [last]);
  const keys = (event) => {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const page = Math.max(1, lines - 2) * columns;
    const by = { ArrowDown: columns, ArrowUp: -columns, PageDown: page, PageUp: -page, Home: -rows.length, End: rows.length, ...(columns > 1 && { ArrowRight: 1, ArrowLeft: -1 }) }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    focus(stop + by);
  };
  const onfocusin = (event) => setStop(Number(event.target.closest('li')?.dataset.at ?? 0));
  return { stop, keys, onfocusin };
}

/** Scroll so far that what lies there in the window is in sight, below the head and above the foot. */
function intoSight(top, height) {
  const [least, most] = [80, innerHeight - height - 80];
  if (top < least) scrollBy(0, top - least);
  else if (top > most) scrollBy(0, top - most);
}

/** One decision of the list. It is drawn again only where it changes: a list is scrolled fast. */
class Row extends Component {
  constructor({ one }) {
    super();
    this.state = { isHere: pictureHere(thumbnailOf(one)) !== null };
  }

  componentDidMount() {
    this.away = whenStill(() => this.setState({ isHere: true }));
  }

  componentWillUnmount() {
    this.away();
  }

  shouldComponentUpdate(next, state) {
    return state.isHere !== this.state.isHere || Object.keys(next).some((name) => next[name] !== this.props[name]);
  }

  render({ one, at, count: total, isStop, height, columns, place, open, look }, { isHere }) {
    const style = { top: `${Math.floor(at / columns) * height}px`, height: `${height}px`, left: `${((at % columns) * 100) / columns}%`, width: `${100 / columns}%` };
    const plain = (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      open(one);
    };
    return html`<li data-at=${at} style=${style} aria-setsize=${total} aria-posinset=${at + 1}>
      <a href=${`#/find${query({ ...place, id: one.id, number: one.number })}`} tabindex=${isStop ? 0 : -1} onclick=${plain}>
        ${isHere ? html`<${Thumbnail} decision=${one} />` : html`<span class="photo thumbnail"></span>`}
        <span class="what"><b>${one.part ?? t('find.unnamed')}</b><small>${one.model}${one.views && ` · ${t('find.views', { of: one.views.of })}`}</small></span>
        <span class="when">${moment(one.time)}</span>
        <${Verdict} verdict=${one.verdict} code=${look === 'list' ? one.code : null} />
        <span class="score"><${ScoreBar} score=${one.score} threshold=${one.threshold} /><span>${digits(one.score, 3)}</span></span>
        <span class="said"><${Mark} label=${one.label} defect=${one.defect} /></span>
      </a></li>`;
  }
}
