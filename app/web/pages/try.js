// Try: pictures from a file or a camera are judged at once; nothing is recorded unless wanted.

import { ask, path, query } from '../api.js';
import { outline, paintHeat, readHeat, ring } from '../heat.js';
import { t } from '../words.js';
import {
  Button, Dialog, Empty, Icon, ModelPicker, Problem, ScoreBar, Verdict, Waiting, count, go, html,
  may, number, sentence, toast, useEffect, useKeys, useLayoutEffect, useModels, useReducer,
  useRef, useState,
} from '../parts.js';

const AT_ONCE = 2; // so that parts of the line find their gap
const MOST = 300; // in the list: each holds its file
const AGAIN_MS = 1000; // where too many parts wait
const TRIES = 8;
const SMALL = 128; // pixels of what the list shows
const READS = '.jpg,.jpeg,.png,.bmp,.tif,.tiff,image/jpeg,image/png,image/bmp,image/tiff';
const VERDICTS = { Normal: 'normal', Anomaly: 'anomaly', Unusable: 'unusable' };

// ---- what was tried in this tab, also while another page is open ---------------------------------

const tried = { list: [], shown: null, atWork: 0, record: false, opacity: 0.8 };
const watchers = new Set();
let last = 0;

const changed = () => { for (const again of watchers) again(); };

function useTried() {
  const [, again] = useReducer((turn) => turn + 1, 0);
  useEffect(() => { watchers.add(again); return () => watchers.delete(again); }, []);
  return tried;
}

/** Put files at the head of the list, and judge them in its order. */
function add(files, how) {
  const batch = [...files].map((file) => ({ id: last += 1, file, name: file.name, state: 'waiting', how }));
  if (!batch.length) return;
  tried.list = [...batch, ...tried.list];
  for (const gone of tried.list.splice(MOST)) forget(gone);
  tried.shown = batch[0].id;
  work();
}

function work() {
  for (const one of tried.list) {
    if (tried.atWork >= AT_ONCE) break;
    if (one.state !== 'waiting') continue;
    one.state = 'asking';
    tried.atWork += 1;
    judge(one).finally(() => { tried.atWork -= 1; work(); });
  }
  changed();
}

async function judge(one) {
  try {
    await see(one);
    const data = await contents(one.file);
    const answer = await patiently(() => infer(one, data, 'application/json'));
    one.answer = await answer.json();
    one.state = 'done';
    changed();
    if (!one.url) await seeByServer(one, data);
  } catch (error) {
    if (one.state !== 'done') Object.assign(one, { state: 'failed', error });
  }
}

async function contents(file) {
  try {
    return await file.arrayBuffer();
  } catch (error) { // it was changed, moved, or is a folder
    throw Object.assign(error, { code: 'unreadable' });
  }
}

const infer = ({ how: { model, record }, name }, data, accept) => ask(
  `/infer${query({ model, heatmap: 'true', record: record ? null : 'false', part: record ? partOf(name) : null })}`,
  { method: 'POST', body: data, headers: { 'Content-Type': 'application/octet-stream', Accept: accept } },
);

/** A file's name, as a part may be called: what can be seen, and not too long. */
const partOf = (name) => [...name.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, '').trim()].slice(0, 200).join('');

async function patiently(asking) {
  for (let attempt = 1; ; attempt += 1) {
    try {
      return await asking();
    } catch (error) {
      if (error.code !== 'overloaded' || attempt === TRIES) throw error;
      await new Promise((later) => setTimeout(later, AGAIN_MS));
    }
  }
}

/** Where this browser can show the file, a small picture of it, and where the whole one lies. */
async function see(one) {
  if (one.url) return;
  try {
    one.small = await smaller(one.file);
    one.url = URL.createObjectURL(one.file);
  } catch { // such as a TIFF, or what is no picture
    one.url = null;
  }
}

async function smaller(data) {
  const image = await createImageBitmap(data);
  const scale = Math.min(1, SMALL / Math.max(image.width, image.height));
  const canvas = document.createElement('canvas');
  canvas.width = Math.max(1, Math.round(image.width * scale));
  canvas.height = Math.max(1, Math.round(image.height * scale));
  canvas.getContext('2d').drawImage(image, 0, 0, canvas.width, canvas.height);
  image.close();
  return canvas.toDataURL('image/jpeg', 0.8);
}

/** What this browser cannot show the server draws, with what is anomalous painted over it. */
async function seeByServer(one, data) {
  const { answer, how } = one;
  const drawn = how.record && !how.mayTry // judged once more it would be recorded once more
    ? ask(`${path('decisions', answer.id)}/overlay`)
    : infer({ ...one, how: { ...how, record: false } }, data, 'image/png');
  try {
    const picture = await (await drawn).blob();
    one.small = await smaller(picture);
    one.painted = URL.createObjectURL(picture);
  } catch { // there is a verdict, and no picture to it
    one.painted = null;
  }
}

function again(one, how) {
  Object.assign(one, { state: 'waiting', answer: null, error: null, heat: null, how });
  if (one.painted) URL.revokeObjectURL(one.painted);
  one.painted = null;
  work();
}

function forget(one) {
  for (const url of [one.url, one.painted]) if (url) URL.revokeObjectURL(url);
}

function remove(one) {
  const at = tried.list.indexOf(one);
  tried.list = tried.list.filter((other) => other !== one);
  forget(one);
  if (tried.shown === one.id) tried.shown = (tried.list[at] ?? tried.list[at - 1])?.id ?? null;
  changed();
}

function removeAll() {
  tried.list.forEach(forget);
  Object.assign(tried, { list: [], shown: null });
  changed();
}

const set = (values) => { Object.assign(tried, values); changed(); };

// ---- the page -----------------------------------------------------------------------------------

export default function Try({ query: asked, session }) {
  const { list, shown, opacity } = useTried();
  const { models, error, again: lookAgain } = useModels();
  const [filming, setFilming] = useState(false);
  const chooser = useRef(null);
  const mayTry = may(session, 'operator');
  const record = tried.record || !mayTry;
  const model = (models ?? []).some((one) => one.name === asked.get('model')) ? asked.get('model') : ((models ?? []).find((one) => one.live) ?? models?.[0])?.name;
  const how = { model, record, mayTry };
  const isReady = Boolean(model);
  const take = (files) => (isReady ? add(files, how) : undefined);
  const over = useDropped(take);
  const one = list.find(({ id }) => id === shown) ?? null;
  const step = (by) => {
    const next = list[list.indexOf(one) + by];
    if (next) set({ shown: next.id });
  };
  useKeys(isReady ? {
    c: () => chooser.current?.click(),
    ...(list.length && {
      h: () => set({ opacity: opacity ? 0 : 0.8 }),
      ArrowDown: () => step(1), ArrowUp: () => step(-1),
      Delete: () => one && remove(one),
    }),
  } : {});
  if (models === null) return html`<h1>${t('try.title')}</h1>${error ? html`<${Problem} error=${error} again=${lookAgain} />` : html`<${Waiting} />`}`;
  if (!models.length) {
    return html`<h1>${t('try.title')}</h1><${Empty} title=${t('try.no_model')}><p>${t('try.no_model_hint')}</p>
      <p><a class="button main" href="#/teach">${t('pages.teach')}</a></p><//>`;
  }
  return html`
    <div class="row apart top"><h1>${t('try.title')}</h1>
      <div class="row">
        ${models.length > 1 && html`<${ModelPicker} models=${models} value=${model} onchange=${(name) => go('try', { model: name }, true)} />`}
        <label class="check" title=${mayTry ? undefined : t('try.records_always')}>
          <input type="checkbox" checked=${record} disabled=${!mayTry} onchange=${(event) => set({ record: event.target.checked })} />${t('try.record')}</label>
      </div></div>
    ${!mayTry && html`<p class="warn">${t('try.records_always')}</p>`}
    <input ref=${chooser} type="file" multiple accept=${READS} hidden aria-label=${t('try.choose')}
      onchange=${(event) => { take(event.target.files); event.target.value = ''; }} />
    <div class=${`dropping ${over ? 'over' : ''}`} aria-hidden="true"><b>${t('try.drop_here')}</b></div>
    ${list.length === 0
    ? html`<${Empty} title=${t('try.empty')}><p>${t('try.empty_hint')}</p>
        <div class="row ways"><${Ways} choose=${() => chooser.current.click()} film=${() => setFilming(true)} take=${take} large=${true} /></div>
        <p class="soft">${t(record ? 'try.is_recorded' : 'try.not_recorded')}</p><//>`
    : html`<div class="bench">
        <section class="look">${one && html`<${Look} key=${one.id} one=${one} opacity=${opacity} judgeAgain=${() => again(one, how)} />`}</section>
        <section class="list" aria-label=${t('try.list')}>
          <div class="row ways"><${Ways} choose=${() => chooser.current.click()} film=${() => setFilming(true)} take=${take} /></div>
          <${Summary} list=${list} />
          <${List} list=${list} shown=${one} />
          <div class="row apart foot"><${Button} kind="plain" icon="remove" onclick=${removeAll}>${t('try.clear')}<//>
            <span class="keys soft">${t('try.keys')}</span></div>
        </section></div>`}
    ${filming && html`<${Camera} take=${(file) => take([file])} onclose=${() => setFilming(false)} />`}`;
}

/** Take what is dropped or pasted anywhere on the page; whether something is held over it. */
function useDropped(take) {
  const [over, setOver] = useState(false);
  const latest = useRef(take);
  latest.current = take;
  useLayoutEffect(() => {
    let leaving = 0;
    const held = (event) => {
      if (![...event.dataTransfer.types].includes('Files')) return;
      event.preventDefault();
      clearTimeout(leaving);
      setOver(true);
    };
    // It leaves each element that it is drawn across.
    const left = () => { clearTimeout(leaving); leaving = setTimeout(() => setOver(false), 80); };
    const dropped = (event) => {
      if (![...event.dataTransfer.types].includes('Files')) return;
      event.preventDefault();
      setOver(false);
      const items = [...event.dataTransfer.items].filter(({ kind }) => kind === 'file');
      const isFolder = items.map((item) => item.webkitGetAsEntry?.()?.isDirectory);
      if (isFolder.some(Boolean)) toast(t('try.no_folders'), 'bad');
      latest.current([...event.dataTransfer.files].filter((_, n) => !isFolder[n]));
    };
    const pasted = (event) => {
      if (event.clipboardData?.files.length) latest.current(event.clipboardData.files);
    };
    const all = { dragover: held, dragleave: left, drop: dropped, paste: pasted };
    for (const [name, hear] of Object.entries(all)) addEventListener(name, hear);
    return () => { for (const [name, hear] of Object.entries(all)) removeEventListener(name, hear); };
  }, []);
  return over;
}

/** The ways in: files, and the camera of this device. */
function Ways({ choose, film, take, large = false }) {
  const photo = useRef(null);
  // Live pictures need https or this very machine; everywhere else a tablet opens its camera itself.
  const isLive = window.isSecureContext && Boolean(navigator.mediaDevices?.getUserMedia);
  return html`
    <${Button} kind=${`main ${large ? 'large' : ''}`} icon="upload" onclick=${choose}>${t('try.choose')}<//>
    <${Button} kind=${large ? 'large' : ''} icon="try" onclick=${isLive ? film : () => photo.current.click()}>${t('try.camera')}<//>
    ${!isLive && html`<input ref=${photo} type="file" accept="image/*" capture="environment" hidden aria-label=${t('try.camera')}
      onchange=${(event) => { take(event.target.files); event.target.value = ''; }} />`}`;
}

/** The device's camera, live, for as many pictures as somebody likes. */
function Camera({ take, onclose }) {
  const video = useRef(null);
  const [problem, setProblem] = useState('');
  const [isOn, setIsOn] = useState(false);
  useEffect(() => {
    let stream = null;
    let gone = false;
    const end = () => stream?.getTracks().forEach((track) => track.stop());
    const wanted = { video: { facingMode: 'environment', width: { ideal: 1920 }, height: { ideal: 1440 } } };
    navigator.mediaDevices.getUserMedia(wanted).then((found) => {
      stream = found;
      if (gone) end();
      else video.current.srcObject = stream;
    }, (error) => gone || setProblem(error.name === 'NotAllowedError' ? t('try.camera_forbidden') : t('try.camera_none')));
    return () => { gone = true; end(); };
  }, []);
  const shoot = () => {
    const { videoWidth: width, videoHeight: height } = video.current;
    const canvas = Object.assign(document.createElement('canvas'), { width, height });
    canvas.getContext('2d').drawImage(video.current, 0, 0);
    const name = `camera-${new Date().toTimeString().slice(0, 8).replaceAll(':', '')}.png`;
    canvas.toBlob((data) => take(new File([data], name, { type: 'image/png' })), 'image/png');
  };
  return html`<${Dialog} title=${t('try.camera')} onclose=${onclose} wide=${true}>
    ${problem && html`<p class="warn">${problem}</p>`}
    <video class="film" ref=${video} autoplay muted playsinline onplaying=${() => setIsOn(true)}></video>
    <div class="row end"><${Button} kind="main large" icon="try" disabled=${!isOn} onclick=${shoot}>${t('try.shoot')}<//></div><//>`;
}

// ---- one picture --------------------------------------------------------------------------------

const verdictOf = (one) => VERDICTS[one.answer?.label] ?? 'none';

/** One of them, large: what was said of it, where and why. */
function Look({ one, opacity, judgeAgain }) {
  const { answer, error } = one;
  return html`
    <div role="status"><${Said} one=${one} judgeAgain=${judgeAgain} /></div>
    <${Stage} one=${one} opacity=${opacity} />
    ${answer && !one.painted && one.url && html`<label class="opacity"><span>${t('shell.heat_map')}</span>
      <input type="range" min="0" max="100" value=${Math.round(opacity * 100)} oninput=${(event) => set({ opacity: event.target.value / 100 })} /></label>`}
    ${one.painted && html`<p class="soft">${t('try.painted')}</p>`}
    ${answer?.hint && html`<p class="warn"><${Icon} name="warning" /><span>${answer.hint}</span></p>`}
    ${answer?.unusable && html`<p class="warn"><${Icon} name="warning" /><span>${answer.unusable.reason}</span></p>`}
    ${answer && html`<${Numbers} one=${one} />`}
    ${!answer && error && html`<p class="soft name">${one.name}</p>`}`;
}

function Said({ one, judgeAgain }) {
  const { answer, error, state } = one;
  if (state === 'failed') {
    return html`<div class="said none"><${Verdict} verdict="none" size="big" /></div>
      <div class="problem"><${Icon} name="warning" /><p>${sentence(error)}</p><${Button} onclick=${judgeAgain}>${t('shell.again')}<//></div>`;
  }
  if (!answer) return html`<div class="said waits"><${Waiting}>${t(state === 'waiting' ? 'try.waits' : 'try.judges')}<//></div>`;
  return html`<div class=${`said ${verdictOf(one)}`}><${Verdict} verdict=${verdictOf(one)} code=${answer.unusable?.code} size="big" />
    <div class="grow"><p class="score"><b>${number(answer.score, 3)}</b> <span>${t('try.limit', { limit: number(answer.threshold, 3) })}</span></p>
      <${ScoreBar} score=${answer.score} threshold=${answer.threshold} /></div></div>`;
}

function Stage({ one, opacity }) {
  const { width, height } = one.answer?.image ?? {};
  const box = width ? { '--ratio': width / height } : undefined;
  if (one.painted || !one.url) {
    return html`<div class="stage" style=${box}>${one.painted
      ? html`<img src=${one.painted} alt=${one.name} />`
      : html`<p class="none soft">${t(one.state === 'done' && one.painted === null ? 'try.no_picture' : 'try.not_shown')}</p>`}</div>`;
  }
  return html`<div class=${`stage ${width ? '' : 'free'}`} style=${box}><img src=${one.url} alt=${one.name} />
    ${one.answer?.heatmap && html`<${Heat} one=${one} opacity=${opacity} />`}</div>`;
}

/** What is anomalous, over the picture, and outlined where it is above the limit. */
function Heat({ one, opacity }) {
  const canvas = useRef(null);
  const [edge, setEdge] = useState({ answer: null });
  const { answer } = one;
  useEffect(() => {
    let gone = false;
    readHeat(answer.heatmap.png).then((heat) => {
      if (gone) return;
      paintHeat(canvas.current, heat);
      const isReject = answer.score > answer.threshold;
      const d = outline(heat, answer.threshold) || (isReject ? ring(heat) : '');
      setEdge({ answer, box: `0 0 ${heat.width} ${heat.height}`, d });
    });
    return () => { gone = true; };
  }, [answer]);
  return html`<span class="heat" aria-hidden="true"><canvas ref=${canvas} style=${{ opacity }}></canvas>
    ${edge.answer === answer && opacity > 0 && html`<svg viewBox=${edge.box} preserveAspectRatio="none"><path class="under" d=${edge.d} /><path d=${edge.d} /></svg>`}</span>`;
}

function Numbers({ one: { answer, name, how } }) {
  const { timing, image } = answer;
  const rows = [
    [t('try.file'), name],
    [t('try.image'), `${image.format} ${image.width} × ${image.height}`],
    [t('shell.model'), `${answer.model_name} · ${answer.model_version}`],
    [t('try.raw'), `${number(answer.raw_score, 4)} / ${number(answer.raw_threshold, 4)}`],
    [t('try.time'), t('try.times', {
      total: number(timing.total_ms, 0), queue: number(timing.queue_ms, 0), decode: number(timing.decode_ms, 0), infer: number(timing.infer_ms, 0),
    })],
    [t('try.recorded'), how.record
      ? html`<a href=${`#/find${query({ id: answer.repeat_of ?? answer.id })}`}>${t(answer.repeat_of ? 'try.was_recorded' : 'try.yes')}</a>` : t('try.no')],
  ];
  return html`<dl class="numbers">${rows.map(([what, value]) => html`<div key=${what}><dt>${what}</dt><dd>${value}</dd></div>`)}</dl>`;
}

// ---- all of them --------------------------------------------------------------------------------

function Summary({ list }) {
  const judged = list.filter(({ answer }) => answer);
  const of = (verdict) => judged.filter((one) => verdictOf(one) === verdict).length;
  const mean = judged.reduce((sum, { answer }) => sum + answer.timing.total_ms, 0) / judged.length;
  const failed = list.filter(({ state }) => state === 'failed').length;
  const left = list.length - judged.length - failed;
  const parts = [
    ['normal', t('verdict.normal'), of('normal')], ['anomaly', t('verdict.anomaly'), of('anomaly')],
    of('unusable') && ['unusable', t('verdict.unusable'), of('unusable')],
    failed && ['none', t('verdict.none'), failed],
    judged.length && ['time', t('try.mean'), `${number(mean, 0)} ms`],
    left && ['left', t('try.left'), left],
  ].filter(Boolean);
  return html`<dl class="summary">${parts.map(([kind, what, value]) => html`<div key=${kind} class=${kind}><dt>${what}</dt><dd>${typeof value === 'number' ? count(value) : value}</dd></div>`)}</dl>`;
}

function List({ list, shown }) {
  const here = useRef(null);
  useEffect(() => here.current?.scrollIntoView?.({ block: 'nearest', inline: 'nearest' }), [shown]);
  return html`<ul class="tried">${list.map((one) => html`<li key=${one.id}>
    <button type="button" ref=${one === shown ? here : null} aria-current=${one === shown ? 'true' : undefined} onclick=${() => set({ shown: one.id })}>
      ${one.small ? html`<img src=${one.small} alt="" />` : html`<span class="blank"><${Icon} name="try" /></span>`}
      <span class="name">${one.name}</span>
      ${one.answer || one.state === 'failed'
    ? html`<${Verdict} verdict=${verdictOf(one)} /><span class="soft">${one.answer ? number(one.answer.score, 3) : t(`codes.${one.error.code ?? 'http_error'}`)}</span>`
    : html`<span class="soft">${t(one.state === 'waiting' ? 'try.waits' : 'try.judges')}</span>`}
    </button></li>`)}</ul>`;
}
