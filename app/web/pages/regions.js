// Regions: which pixels of a picture never count, drawn over one of them and tried on the last parts.

import { ask, get, path, picture, query, send } from '../api.js';
import {
  Button, Choice, Dialog, Empty, Field, ModelPicker, Photo, Problem, Progress, Thumbnail, Tile, Verdict, Waiting,
  confirm, go, html, moment, percent, sentence, toast, useAction, useCallback, useData, useEffect, useMemo,
  useModels, useState, whyNot,
} from '../parts.js';
import { t } from '../words.js';
import { asPng, drawer, greyOf, hidden, reached, readMask, share } from './regions_mask.js';
import { Stage } from './regions_stage.js';

const LAST = 12; // parts on which a mask is tried
const HEAT = 128; // the side to which heat maps are pressed

export default function Regions({ query: asked, session }) {
  const { models, error, again } = useModels();
  const usable = (models ?? []).filter((one) => one.live || one.at_rest);
  const name = asked.get('name') ?? usable[0]?.name ?? models?.[0]?.name;
  if (error && models === null) return html`<h1>${t('pages.regions')}</h1><${Problem} error=${error} again=${again} />`;
  if (models === null) return html`<h1>${t('pages.regions')}</h1><${Waiting} />`;
  if (name === undefined) return html`<h1>${t('pages.regions')}</h1><${Empty} title=${t('regions.no_model')}><a class="button" href="#/teach">${t('pages.teach')}</a><//>`;
  return html`
    <header class="regions-head"><h1>${t('pages.regions')}</h1>
      <${ModelPicker} models=${models} value=${name} onchange=${(one) => go('regions', { name: one }, true)} /></header>
    <p class="soft">${t('regions.about')}</p>
    <${OfModel} key=${name} name=${name} session=${session} />`;
}

// ---- what is drawn, and kept until it is applied ------------------------------------------------

const files = new Map(); // model -> a local file as {url, width, height}; it goes nowhere
const EMPTY = { base: null, size: null, log: [], undone: [], open: [], reference: null };
const key = (name) => `kensa.regions.${name}`;

/** What was drawn for a model: `[draft, change]`. It outlives the page and a reload of it, in this tab. */
function useDraft(name) {
  const [draft, setDraft] = useState(() => ({ ...EMPTY, ...JSON.parse(sessionStorage.getItem(key(name)) ?? '{}') }));
  const change = useCallback((changes) => setDraft((now) => {
    const next = { ...now, ...(typeof changes === 'function' ? changes(now) : changes) };
    try {
      sessionStorage.setItem(key(name), JSON.stringify(next));
    } catch { /* there is no room: it lasts as long as the page */ }
    return next;
  }), [name]);
  const isUnsaved = draft.log.length + draft.open.length > 0;
  useEffect(() => {
    if (!isUnsaved) return undefined;
    const asks = (event) => event.preventDefault();
    addEventListener('beforeunload', asks);
    return () => removeEventListener('beforeunload', asks);
  }, [isUnsaved]);
  return [draft, change, isUnsaved];
}

/** What each thing that can be done changes in a draft. */
const drawing = {
  add: (one) => (now) => ({ log: [...now.log, one], undone: [], open: one.kind === 'shape' ? [] : now.open }),
  undo: (now) => (now.open.length ? { open: now.open.slice(0, -1) }
    : { log: now.log.slice(0, -1), undone: [...now.undone, ...now.log.slice(-1)] }),
  redo: (now) => ({ log: [...now.log, ...now.undone.slice(-1)], undone: now.undone.slice(0, -1) }),
};

const regionsOf = (name) => `${path('models', name)}/regions`;

function OfModel({ name, session }) {
  const [draft, change, isUnsaved] = useDraft(name);
  const now = useData(regionsOf(name), 5000);
  const [hurry, setHurry] = useState(false);
  const model = useData(`${path('models', name)}?limit=20`, hurry ? 1000 : 5000);
  const parts = useData(`/decisions${query({ model: name, limit: 100 })}`, 10_000);
  const version = draft.base ?? now.data?.version ?? null;
  const shown = useShown(name, version);
  const newest = newestOf(model.data);
  useEffect(() => { setHurry(newest?.state === 'at the gate'); }, [newest?.state]);
  useEffect(() => { now.again(); }, [model.data?.live]);
  const state = stateOf(model.data, draft.base);
  useEffect(() => { // nothing is drawn on it, and it is decided whether it goes live: follow what is
    if (draft.base === null || isUnsaved) return;
    const isDecided = state === 'live' ? now.data?.version === draft.base : state && !WAITING.includes(state);
    if (isDecided || shown.error?.status === 404) change({ base: null, size: null });
  }, [state, now.data?.version, shown.error, draft.base, isUnsaved]);
  const isGone = shown.error?.status === 404 && shown.version === draft.base && isUnsaved;
  useEffect(() => { // somebody discarded what was drawn on: the drawing stays
    if (!isGone || !now.data || now.data.version === draft.base) return;
    const isOfSize = now.data.width === null || fits(now.data, draft.size);
    change(isOfSize ? { base: now.data.version } : EMPTY);
    toast(t(isOfSize ? 'regions.base_gone' : 'regions.base_gone_size'), 'bad');
  }, [isGone, now.data?.version, draft.base]);

  if (now.error && now.data === null) return html`<${Problem} error=${now.error} again=${now.again} />`;
  if (shown.error) return html`<${Problem} error=${shown.error} again=${shown.again} />`;
  if (now.data === null || shown.data === null) return html`<${Waiting} />`;
  const size = draft.size ?? (shown.data.width ? [shown.data.width, shown.data.height] : shown.data.sizes[0] ?? null);
  const kept = (parts.data?.decisions ?? []).filter((one) => one.has_picture && fits(one.image, size));
  return html`<${Drawing} ...${{ name, session, draft, change, isUnsaved, live: now.data, shown: shown.data, mask: shown.mask, size, kept, model: model.data, newest }}
    again=${() => { now.again(); model.again(); }} />`;
}

const WAITING = ['at the gate', 'held'];
const stateOf = (model, version) => model?.versions.find((one) => one.version === version)?.state;

const fits = (image, size) => image !== null && (size === null || (image.width === size[0] && image.height === size[1]));

/** The newest version, where it differs from the one before in its regions. */
function newestOf(model) {
  const newest = model?.versions[0];
  return newest?.origin?.regions_of ? newest : null;
}

/** What a version says of its regions, and their mask; null where all of a picture counts. */
function useShown(name, version) {
  const [state, setState] = useState({ version: null, data: null, mask: null, error: null });
  const [turn, setTurn] = useState(0);
  useEffect(() => {
    let gone = false;
    if (version !== null) {
      look(name, version).then(
        (found) => gone || setState({ version, error: null, ...found }),
        (error) => gone || setState((before) => ({ ...before, version, error })),
      );
    }
    return () => { gone = true; };
  }, [name, version, turn]);
  return { ...state, again: () => setTurn((one) => one + 1) };
}

const looked = new Map(); // version -> {data, mask}: it never changes, and a large mask takes its time

function remember(found) {
  looked.set(`${found.data.model} ${found.data.version}`, found);
  if (looked.size > 4) looked.delete(looked.keys().next().value);
  return found;
}

async function look(name, version) {
  const known = looked.get(`${name} ${version}`);
  if (known) return known;
  const from = `${regionsOf(name)}${query({ version })}`;
  const data = await get(from);
  if (data.width === null) return remember({ data, mask: null });
  const answer = await ask(from, { headers: { Accept: 'image/png' } });
  return remember({ data, mask: await readMask(await answer.blob(), data.width, data.height) });
}

// ---- the page -----------------------------------------------------------------------------------

function Drawing({ name, session, draft, change, isUnsaved, live, shown, mask: base, size, kept, model, newest, again }) {
  const [tool, setTool] = useState('polygon');
  const [value, setValue] = useState(1);
  const [wide, setWide] = useState(4); // of the brush, hundredths of the longer side
  const [withReach, setWithReach] = useState(true);
  const [found, setFound] = useState(false); // whether what was found in the part is painted
  const [choosing, setChoosing] = useState(false);
  const reference = useReference({ name, draft, kept, size, model, found });
  const [width, height] = size ?? [reference.width, reference.height];
  const has = Boolean(width);
  const draw = useMemo(() => drawer(width, height, base), [width, height, base]);
  const mask = useMemo(() => (has ? draw(draft.log) : null), [draft.log, draw]);
  const reach = useMemo(() => (has ? reached(mask, width, height, shown.image_size, shown.reach) : null), [mask, shown]);
  const shares = useMemo(() => (has ? { never: share(mask), reach: share(reach) } : null), [mask, reach]);
  const veil = useMemo(() => (has ? veilOf(mask, width, height, reach, shown.image_size) : null), [mask, reach]);
  const radius = Math.max(0.5, Math.round((wide / 100) * Math.max(width, height)) / 2);
  const on = (now) => ({ base: now.base ?? shown.version, size: [width, height] });
  const sketch = {
    add: (one) => change((now) => ({ ...on(now), ...drawing.add(one)(now) })),
    open: (open) => change((now) => ({ ...on(now), open })),
    undo: () => change(drawing.undo),
    redo: () => change((now) => ({ ...on(now), ...drawing.redo(now) })),
  };
  const startOver = async () => {
    const sure = await confirm({ title: t('regions.discard_title'), body: html`<p>${t('regions.discard_body')}</p>`, yes: t('regions.discard'), danger: true });
    if (sure !== null) change({ ...EMPTY, reference: draft.reference });
  };
  const chosen = (one) => {
    setChoosing(false);
    if (size === null || (one.width === size[0] && one.height === size[1])) {
      if (one.kind === 'file') files.set(name, one);
      change({ reference: one });
    } else toast(t('regions.other_size', { width: one.width, height: one.height, wide: size[0], high: size[1] }), 'bad');
  };
  const whole = { name, session, draft, change, isUnsaved, live, shown, width, height, mask, shares, newest, model, again };
  return html`<div class="regions-page">
    <${Tools} ...${{ tool, setTool, value, setValue, wide, setWide, radius, draft, sketch }} />
    <section class="draw" aria-label=${t('regions.stage')}>
      ${reference.error && html`<${Problem} error=${reference.error} />`}
      ${has ? html`<${Stage} picture=${reference.url} width=${width} height=${height} mask=${mask} reach=${withReach ? reach : null} size=${shown.image_size}
          log=${draft.log} open=${draft.open} tool=${tool} value=${value} radius=${radius} onadd=${sketch.add}
          onopen=${sketch.open} onundo=${sketch.undo} onredo=${sketch.redo} />`
        : html`<${Empty} title=${t('regions.no_picture')}><p>${t('regions.no_picture_why')}</p><//>`}
      <div class="row apart under-stage">
        <p class="soft caption">${reference.words}</p>
        <${Button} icon="try" onclick=${() => setChoosing(true)}>${t('regions.choose')}<//>
      </div>
      <p id="regions-help" class="soft help">${t(`regions.help_${tool}`)}</p>
    </section>
    <aside aria-label=${t('regions.mask')}>
      ${has && html`<div class="tiles two"><${Tile} name=${t('regions.never')} value=${percent(shares.never)} />
        <${Tile} name=${t('regions.with_reach')} value=${percent(shares.reach)} look=${shares.reach > 0.5 ? 'bad' : ''} /></div>`}
      <p class="soft small">${t('regions.reach_why', { reach: percent(shown.reach / shown.image_size, 0) })}</p>
      <label class="check"><input type="checkbox" checked=${withReach} onchange=${(event) => setWithReach(event.target.checked)} />${t('regions.show_reach')}</label>
      <label class="check"><input type="checkbox" checked=${found} disabled=${reference.kind !== 'decision'} onchange=${(event) => setFound(event.target.checked)} />${t('regions.show_found')}</label>
      <${Outdated} ...${whole} />
      <${Apply} ...${whole} startOver=${startOver} />
      <${Newest} ...${whole} />
    </aside>
    ${has && html`<${LastParts} ...${{ kept, reach, veil, size: shown.image_size }} onchoose=${chosen} />`}
    ${choosing && html`<${Chooser} kept=${kept} model=${model} name=${name} onclose=${() => setChoosing(false)} onchoose=${chosen} />`}
  </div>`;
}

function Tools({ tool, setTool, value, setValue, wide, setWide, radius, draft, sketch }) {
  return html`<div class="row tools" role="toolbar" aria-label=${t('regions.tools')}>
    <${Choice} label=${t('regions.tool')} value=${tool} onchange=${setTool}
      options=${['polygon', 'rectangle', 'brush', 'move'].map((one) => [one, t(`regions.tool_${one}`)])} />
    <${Choice} label=${t('regions.does')} value=${value} onchange=${setValue} options=${[[1, t('regions.hide')], [0, t('regions.erase')]]} />
    ${tool === 'brush' && html`<label class="brush-size"><span>${t('regions.brush', { size: radius * 2 })}</span>
      <input type="range" aria-label=${t('regions.brush_size')} min="0.2" max="25" step="0.2" value=${wide} oninput=${(event) => setWide(Number(event.target.value))} /></label>`}
    ${tool === 'polygon' && draft.open.length > 0 && html`<${Button} icon="good" kind="main" why=${draft.open.length < 3 ? t('regions.three') : ''}
      onclick=${() => sketch.add({ kind: 'shape', points: draft.open, value })}>${t('regions.close_shape')}<//>`}
    <div class="row steps">
    <${Button} data-repeats icon="undo" aria-label=${t('regions.undo')} title=${t('regions.undo')} disabled=${draft.log.length + draft.open.length === 0} onclick=${sketch.undo} />
    <${Button} data-repeats kind="redo" icon="undo" aria-label=${t('regions.redo')} title=${t('regions.redo')} disabled=${draft.undone.length === 0} onclick=${sketch.redo} />
    <${Button} onclick=${() => sketch.add({ kind: 'invert' })} title=${t('regions.invert_why')}>${t('regions.invert')}<//>
    <${Button} onclick=${() => { sketch.open([]); sketch.add({ kind: 'clear' }); }}>${t('regions.clear')}<//></div>
  </div>`;
}

/** That what is shown is not what judges. */
function Outdated({ live, draft, change, isUnsaved, model }) {
  const state = stateOf(model, draft.base);
  if (draft.base === live.version || !state || state === 'live') return null;
  const follow = () => change({ base: null });
  return html`<div class="warn"><p>${t(isUnsaved ? 'regions.begun_from' : 'regions.shows', { version: draft.base, live: live.version })}</p>
    ${!isUnsaved && html`<${Button} onclick=${follow}>${t('regions.show_live')}<//>`}</div>`;
}

// ---- the picture that is drawn on ---------------------------------------------------------------

/** What is drawn on: the one chosen, else the newest part that fits, else a picture that was learned. */
function useReference({ name, draft, kept, size, model, found }) {
  const [state, setState] = useState({ of: null, url: null, error: null });
  const [learned, setLearned] = useState(null);
  const chosen = draft.reference?.kind === 'file' ? files.get(name) : draft.reference;
  const [first, setFirst] = useState(null); // so that a part that comes meanwhile takes no picture away
  useEffect(() => { if (first === null && kept.length) setFirst(ofDecision(kept[0])); }, [kept, first]);
  useEffect(() => {
    let gone = false;
    if (!chosen && !kept.length && model) ofTraining(name, model).then((one) => gone || setLearned(one), () => {});
    return () => { gone = true; };
  }, [name, Boolean(model), kept.length > 0]);
  const one = chosen ?? first ?? learned;
  const from = one && addressOf(one, found);
  useEffect(() => {
    let gone = false;
    if (from) urlOf(one, from).then(
      (shown) => gone || setState({ of: from, error: null, ...shown }),
      (error) => gone || setState({ of: from, url: null, error }),
    );
    return () => { gone = true; };
  }, [from]);
  if (!one) return { url: null, error: null, words: size ? t('regions.blank') : '' };
  const isOurs = state.of === from;
  const { width, height } = isOurs ? { ...one, ...state } : one;
  if (size && width && !fits({ width, height }, size)) return { url: null, error: null, words: t('regions.blank') };
  return {
    ...one, ...(isOurs && state), url: state.url, // the one before, until the other one is there
    error: isOurs ? state.error : null, words: wordsOf(one),
  };
}

const ofDecision = (one) => ({
  kind: 'decision', id: one.id, number: one.number, format: one.image.format, width: one.image.width, height: one.image.height,
  part: one.part, time: one.time,
});

function addressOf(one, found) {
  if (one.kind === 'file') return one.url;
  if (one.kind === 'learned') return path('datasets', one.category, 'train', one.name);
  const isSharper = one.format === 'JPEG' && Math.max(one.width, one.height) > 1024;
  if (isSharper && !found) return `${path('decisions', one.id)}/image${query({ number: one.number })}`;
  return `${path('decisions', one.id)}/overlay${query({ number: one.number, paint: found ? null : 'false' })}`;
}

async function urlOf(one, from) {
  const url = one.kind === 'file' ? from : await picture(from);
  if (one.width) return { url };
  return { url, ...await sizeOf(url) };
}

async function sizeOf(url) {
  const image = Object.assign(new Image(), { src: url });
  try {
    await image.decode();
  } catch {
    throw { code: 'unsupported_image', message: '' };
  }
  return { width: image.naturalWidth, height: image.naturalHeight };
}

async function ofTraining(name, model) {
  const { datasets } = await get('/datasets');
  const learned = model.versions.map((one) => one.origin?.category).find(Boolean) ?? name;
  const category = datasets.find((one) => one.category === learned && one.train > 0)?.category;
  if (!category) return null;
  const { images } = await get(`${path('datasets', category, 'train')}?limit=1`);
  return images.length ? { kind: 'learned', category, name: images[0].name } : null;
}

function wordsOf(one) {
  if (one.kind === 'file') return t('regions.of_file', { name: one.name });
  if (one.kind === 'learned') return t('regions.of_training', { name: one.name, category: one.category });
  return t('regions.of_part', { part: one.part ?? one.id, time: moment(one.time) });
}

function Chooser({ kept, model, name, onclose, onchoose }) {
  const [source, setSource] = useState(kept.length ? 'parts' : 'learned');
  const [busy, setBusy] = useState(false);
  const give = async (making) => {
    setBusy(true);
    try {
      onchoose(await making());
    } catch (error) {
      toast(sentence(error), 'bad');
    } finally {
      setBusy(false);
    }
  };
  const file = (event) => give(async () => {
    const one = event.target.files[0];
    const url = URL.createObjectURL(one);
    return { kind: 'file', name: one.name, url, ...await sizeOf(url) };
  });
  return html`<${Dialog} title=${t('regions.choose')} onclose=${onclose} wide>
    <${Choice} label=${t('regions.choose')} value=${source} onchange=${setSource}
      options=${[['parts', t('regions.from_parts')], ['learned', t('regions.from_learned')], ['file', t('regions.from_file')]]} />
    ${busy && html`<${Waiting} />`}
    ${source === 'parts' && (kept.length ? html`<ul class="pick">${kept.slice(0, 48).map((one) => html`<li key=${one.number}>
      <button type="button" onclick=${() => onchoose(ofDecision(one))}><${Thumbnail} decision=${one} alt="" /><span>${one.part ?? one.id}</span></button></li>`)}</ul>`
      : html`<p class="soft">${t('regions.no_parts')}</p>`)}
    ${source === 'learned' && html`<${Learned} model=${model} name=${name} onchoose=${(one) => give(async () => (
      { ...one, ...await sizeOf(await picture(addressOf(one, false))) }))} />`}
    ${source === 'file' && html`<${Field} label=${t('regions.file')} hint=${t('regions.file_why')}><input type="file" accept="image/*" onchange=${file} /><//>`}
  <//>`;
}

function Learned({ model, name, onchoose }) {
  const { data, error } = useData('/datasets');
  const guess = model?.versions.map((one) => one.origin?.category).find(Boolean) ?? name;
  const [chosen, setChosen] = useState(null);
  const all = (data?.datasets ?? []).filter((one) => one.train > 0).map((one) => one.category);
  const category = chosen ?? (all.includes(guess) ? guess : all[0]);
  const images = useData(category ? `${path('datasets', category, 'train')}?limit=48` : null);
  if (error ?? images.error) return html`<${Problem} error=${error ?? images.error} />`;
  if (data === null) return html`<${Waiting} />`;
  if (!category) return html`<p class="soft">${t('regions.no_learned')}</p>`;
  return html`<${Field} label=${t('regions.category')}><select value=${category} onchange=${(event) => setChosen(event.target.value)}>
      ${all.map((one) => html`<option key=${one} value=${one}>${one}</option>`)}</select><//>
    <ul class="pick">${(images.data?.images ?? []).map((one) => html`<li key=${one.name}><button type="button" onclick=${() => onchoose({ kind: 'learned', category, name: one.name })}>
      <${Photo} class="thumbnail" src=${`${path('datasets', category, 'train', one.name)}/thumbnail`} alt="" /><span>${one.name}</span></button></li>`)}</ul>`;
}

// ---- tried on the last parts --------------------------------------------------------------------

/** A picture of a mask and its reach, to be laid over thumbnails. */
function veilOf(mask, width, height, reach, size) {
  const scale = Math.min(1, 256 / Math.max(width, height));
  const [wide, high] = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
  const canvas = Object.assign(document.createElement('canvas'), { width: wide, height: high });
  const context = canvas.getContext('2d');
  const image = context.createImageData(wide, high);
  for (let at = 0; at < wide * high; at += 1) {
    const [x, y] = [((at % wide) + 0.5) / wide, (Math.floor(at / wide) + 0.5) / high];
    const isMask = mask[Math.floor(y * height) * width + Math.floor(x * width)];
    const isReached = reach[Math.floor(y * size) * size + Math.floor(x * size)];
    image.data.set([230, 40, 40, isMask ? 140 : isReached ? 64 : 0], at * 4);
  }
  context.putImageData(image, 0, 0);
  return canvas.toDataURL();
}

const heats = new Map(); // decision -> its heat map, HEAT * HEAT

function heatOf(one) {
  const from = `${path('decisions', one.id)}/heatmap${query({ number: one.number })}`;
  if (!heats.has(from)) {
    heats.set(from, ask(from).then((answer) => answer.blob()).then((blob) => greyOf(blob, HEAT, HEAT)));
    heats.get(from).catch(() => heats.delete(from));
    if (heats.size > 100) heats.delete(heats.keys().next().value);
  }
  return heats.get(from);
}

/** Of each of these rejects, how much of what was found is hidden; by its number, as it gets known. */
function useHidden(rejects, reach, size) {
  const [known, setKnown] = useState({});
  const numbers = rejects.map((one) => one.number).join();
  useEffect(() => {
    let gone = false;
    for (const one of rejects) {
      heatOf(one).then((heat) => gone || setKnown((before) => ({ ...before, [one.number]: heat })), () => {});
    }
    return () => { gone = true; };
  }, [numbers]);
  return useMemo(() => Object.fromEntries(rejects.filter((one) => known[one.number])
    .map((one) => [one.number, hidden(known[one.number], HEAT, one.threshold ?? 0.5, reach, size)])), [known, numbers, reach, size]);
}

function LastParts({ kept, reach, veil, size, onchoose }) {
  const last = kept.slice(0, LAST);
  const rejects = last.filter((one) => one.verdict === 'anomaly');
  const how = useHidden(rejects, reach, size);
  const passing = Object.values(how).filter((one) => one === 'all').length;
  const hides = reach.some(Boolean);
  return html`<section class="last"><h2>${t('regions.last')}</h2>
    ${last.length === 0 ? html`<p class="soft">${t('regions.no_parts')}</p>` : html`
      <p class="soft" role="status">${rejects.length ? t(passing ? 'regions.would_pass' : 'regions.none_pass', { count: passing, of: rejects.length }) : t('regions.no_rejects')}</p>
      <ul class="strip">${last.map((one) => html`<li key=${one.number}><button type="button" onclick=${() => onchoose(ofDecision(one))} title=${t('regions.draw_on')}>
        <span class="veiled"><${Thumbnail} decision=${one} alt="" /><img src=${veil} alt="" /></span>
        <${Verdict} verdict=${one.verdict} />
        ${hides && how[one.number] && html`<small class=${`hidden-${how[one.number]}`}>${t(`regions.hidden_${how[one.number]}`)}</small>`}
        <span class="part">${one.part ?? moment(one.time)}</span></button></li>`)}</ul>`}
  </section>`;
}

// ---- applied, accepted, undone ------------------------------------------------------------------

/** Through the gate, or at once. */
function How({ onchange }) {
  const [gate, setGate] = useState(true);
  return html`<${Choice} label=${t('regions.how')} value=${gate} options=${[[true, t('regions.by_gate')], [false, t('regions.at_once')]]}
      onchange=${(one) => { setGate(one); onchange(one); }} />
    <p class="soft">${t(gate ? 'regions.by_gate_why' : 'regions.at_once_why')}</p>`;
}

/** Ask how, and why: `{gate, reason}`, or null. */
async function askHow(title, yes, more, danger = false) {
  let gate = true;
  const body = html`${more}<${How} onchange=${(one) => { gate = one; }} />`;
  const reason = await confirm({ title, yes, reason: 'must', danger, body });
  return reason === null ? null : { gate, reason };
}

function Apply({ name, session, draft, change, isUnsaved, live, width, height, mask, shares, newest, again, startOver }) {
  const after = (made, drawnMask) => {
    remember({ data: made, mask: drawnMask });
    change({ ...EMPTY, reference: draft.reference, base: made.version });
    toast(t(made.state === 'live' ? 'regions.is_live' : 'regions.is_looked_at', { version: made.version }));
    again();
  };
  const [apply, applying] = useAction(async () => {
    const how = await askHow(t('regions.apply_title', { name }), t('regions.apply'), html`<p>${t('regions.apply_body', { share: percent(shares.never), reach: percent(shares.reach) })}</p>`);
    if (how === null) return;
    const to = `${regionsOf(name)}${query(how)}`;
    const body = await asPng(mask, width, height);
    const answer = await ask(to, { method: 'PUT', headers: { 'Content-Type': 'image/png' }, body });
    after(await answer.json(), mask);
  });
  const [remove, removing] = useAction(async () => {
    const how = await askHow(t('regions.remove_title'), t('regions.remove'), html`<p>${t('regions.remove_body')}${isUnsaved && html` ${t('regions.discard_body')}`}</p>`, true);
    if (how !== null) after(await send('DELETE', `${regionsOf(name)}${query(how)}`), null);
  });
  const missing = () => {
    if (!mask || draft.log.length === 0) return t('regions.nothing_drawn');
    if (draft.open.length) return t('regions.not_closed');
    if (newest?.state === 'at the gate') return t('regions.gate_first');
    return shares.reach === 1 ? t('regions.nothing_left') : '';
  };
  const why = whyNot(session, 'operator') || missing();
  return html`<div class="actions">
    <${Button} kind="main" busy=${applying} why=${why} onclick=${apply}>${t('regions.apply_more')}<//>
    ${why && isUnsaved && html`<p class="soft small">${why}</p>`}
    ${isUnsaved && html`<p class="soft small">${t('regions.unsaved')}</p><${Button} icon="remove" onclick=${startOver}>${t('regions.discard')}<//>`}
    ${!isUnsaved && html`<${Button} icon="remove" busy=${removing} why=${whyNot(session, 'operator') || (live.width === null ? t('regions.all_counts') : '')}
      onclick=${remove}>${t('regions.remove')}<//>`}
  </div>`;
}

/** The last change of the regions: looked at, held or live, and what can be done about it. */
function Newest({ name, session, newest, model, again }) {
  const [accept, accepting] = useAction(async () => {
    const sure = await confirm({ title: t('regions.accept_title', { version: newest.version }), body: html`<p>${t('regions.accept_body')}</p>`, yes: t('regions.accept'), danger: true });
    if (sure === null) return;
    await send('POST', `${path('models', name, 'versions', newest.version)}/activate`);
    toast(t('regions.is_live', { version: newest.version }));
    again();
  });
  const [rollBack, rolling] = useAction(async () => {
    const sure = await confirm({ title: t('regions.roll_back_title'), body: html`<p>${t('regions.roll_back_body', { version: model.previous })}</p>`, yes: t('regions.roll_back') });
    if (sure === null) return;
    await send('POST', `${path('models', name)}/rollback${query({ live: newest.version, to: model.previous })}`);
    toast(t('regions.rolled_back'));
    again();
  });
  if (!newest || !['at the gate', 'held', 'live'].includes(newest.state)) return null;
  const why = whyNot(session, 'operator');
  return html`<section class=${`card newest ${newest.state.replaceAll(' ', '-')}`} aria-live="polite">
    <h2>${t(`regions.state_${newest.state.replaceAll(' ', '_')}`)}</h2>
    <p class="soft small">${newest.version} · ${moment(newest.created)}</p>
    <p>${t('regions.share_of', { share: percent(newest.never_counts ?? 0) })}${newest.origin.reason && html`<br /><q>${newest.origin.reason}</q>`}</p>
    ${newest.state === 'at the gate' && html`<${Progress} value=${null} label=${t('regions.gate_looks')} />`}
    ${newest.state === 'held' && html`<${Held} name=${name} newest=${newest} />
      <${Button} kind="danger" busy=${accepting} why=${why} onclick=${accept}>${t('regions.accept')}<//>`}
    ${newest.state === 'live' && model.previous && html`<${Button} icon="undo" busy=${rolling} why=${why} onclick=${rollBack}>${t('regions.roll_back')}<//>`}
  </section>`;
}

function Held({ name, newest }) {
  const { reasons = [], flips = [] } = newest.gate ?? {};
  return html`<ul class="reasons">${reasons.map((one) => html`<li key=${one}>${one}</li>`)}</ul>
    ${flips.length > 0 && html`<ul class="flips">${flips.slice(0, 8).map((one) => html`<li key=${one.number}>
      <${Photo} class="thumbnail" src=${`${path('models', name, 'versions', newest.version)}/flips/${one.number}`} alt="" />
      <small>${t(`verdict.${one.was === 'Anomaly' ? 'anomaly' : 'normal'}`)} → ${t(`verdict.${one.becomes === 'Anomaly' ? 'anomaly' : 'normal'}`)}</small></li>`)}</ul>`}`;
}
