// The machine, its jobs, who may do what, and what is wrong.

import { query as inQuery } from '../api.js';
import { language, t } from '../words.js';
import {
  Button, Empty, Field, ModelPicker, Problem, Tile, Waiting, bytes, count, html, moment, number,
  percent, useData, useEffect, useModels, useRef, useState, whyNot,
} from '../parts.js';
import { Jobs, lasting } from './system_jobs.js';
import { Keys } from './system_keys.js';
import { Doctor, Settings } from './system_setup.js';

const PARTS = { // and the role that each needs
  now: ['line', Now], jobs: ['line', Jobs], keys: ['admin', Keys], doctor: ['operator', Doctor],
  settings: ['operator', Settings], trail: ['operator', Trail],
};

export default function System({ query, session, onsession }) {
  const chosen = query.get('part') in PARTS ? query.get('part') : 'now';
  const [role, Part] = PARTS[chosen];
  const why = whyNot(session, role);
  const here = useRef(null);
  useEffect(() => here.current.scrollIntoView({ block: 'nearest', inline: 'center' }), [chosen]);
  return html`
    <h1>${t('pages.system')}</h1>
    <nav class="tabs" aria-label=${t('system.parts')}>
      ${Object.keys(PARTS).map((name) => html`<a key=${name} href=${`#/system?part=${name}`} ref=${name === chosen ? here : null}
        aria-current=${name === chosen ? 'page' : undefined}>${t(`system.part_${name}`)}</a>`)}
    </nav>
    ${why ? html`<${Empty} title=${t(`system.part_${chosen}`)}><p>${why}</p><//>`
      : html`<${Part} session=${session} onsession=${onsession} />`}`;
}

// ---- now ----------------------------------------------------------------------------------------

function Now() {
  const { data, error, again } = useData('/healthz', 3000);
  const now = error?.body?.device ? error.body : data; // 503 says the same, where no model is ready
  if (now === null) return error ? html`<${Problem} error=${error} again=${again} />` : html`<${Waiting} />`;
  return html`
    ${error && error.body !== now && html`<${Problem} error=${error} />`}
    ${now.error && html`<div class="warn" role="status"><p>${t('codes.not_ready')} ${now.error}</p></div>`}
    <section aria-label=${t('system.wrong_now')}>
      ${now.degraded.length === 0 && !now.error
        ? html`<p class="well">${t('system.all_well')}</p>`
        : html`<ul class="wrongs">${now.degraded.map((one) => html`<li key=${one} class="warn"><p>${one}</p></li>`)}</ul>`}
    </section>
    <${Machine} now=${now} />
    <${InMemory} now=${now} />
    <${Reports} />`;
}

function Machine({ now }) {
  const { device, disk, inspections } = now;
  const zones = Object.entries(device.temperatures);
  const hottest = zones.length ? zones.reduce((one, other) => (other[1] > one[1] ? other : one)) : null;
  const slowed = Object.entries(device.throttled).filter(([, is]) => is).map(([part]) => part);
  const taken = device.memory_total == null || device.memory_available == null ? null : device.memory_total - device.memory_available;
  return html`<h2>${t('system.machine')}</h2><div class="tiles">
    <${Tile} name=${t('system.memory')} value=${t('system.free', { size: bytes(device.memory_available) })}>
      <${Bar} part=${taken} of=${device.memory_total} />${t('system.of', { size: bytes(device.memory_total) })}<//>
    <${Tile} name=${t('system.process')} value=${bytes(now.resident_bytes)}>
      <${Bar} part=${now.resident_bytes} of=${device.memory_total} />Kensa ${now.version}<//>
    <${Tile} name=${t('system.disk')} value=${t('system.free', { size: bytes(disk.free_bytes) })}>
      <${Bar} part=${disk.size_bytes == null ? null : disk.size_bytes - disk.free_bytes} of=${disk.size_bytes} />${t('system.of', { size: bytes(disk.size_bytes) })}<//>
    ${device.gpu_load != null && html`<${Tile} name="GPU" value=${percent(device.gpu_load, 0)}>
      ${device.gpu_memory != null && t('system.gpu_memory', { size: bytes(device.gpu_memory) })}<//>`}
    ${(hottest || device.power_mode) && html`<${Tile} name=${t('system.heat')} look=${slowed.length ? 'bad' : ''}
      value=${hottest ? `${number(hottest[1], 0)} °C` : '–'}>${[hottest?.[0], device.power_mode,
        slowed.length && t('system.slowed', { parts: slowed.join(', ') })].filter(Boolean).join(' · ')}<//>`}
    <${Tile} name=${t('system.cores')} value=${count(device.cpus)}>${t('system.uptime', { time: lasting(now.uptime_s) })}<//>
    <${Tile} name=${t('system.parts_since')} value=${count(inspections.normal + inspections.anomaly + inspections.unusable)}>
      ${t('system.parts_split', { ng: count(inspections.anomaly), unusable: count(inspections.unusable), refused: count(inspections.refused) })}<//>
  </div>`;
}

/** How much of something is taken; what it says stands beside it in words. */
const Bar = ({ part, of }) => part != null && of > 0
  && html`<span class=${`bar ${part / of > 0.9 ? 'full' : ''}`} aria-hidden="true"><i style=${{ width: `${100 * Math.min(1, part / of)}%` }}></i></span>`;

function InMemory({ now }) {
  const absent = [
    ...Object.entries(now.problems).map(([name, why]) => [name, 'problem', why]),
    ...now.resting.map((name) => [name, 'resting', '']),
    ...now.unloaded.map((name) => [name, 'unloaded', '']),
  ];
  const total = now.models.reduce((sum, one) => sum + one.resident_bytes, 0);
  return html`<h2>${t('system.models')} <small class="soft">${t('system.together', { size: bytes(total) })}</small></h2>
    ${now.models.length + absent.length === 0 && html`<p class="soft">${t('system.no_models')}</p>`}
    <div class="models">
      ${now.models.map((one) => html`<div key=${one.name} class="card">
        <div class="row apart"><a class="name" href=${`#/model${inQuery({ name: one.name })}`}>${one.name}</a><b class="nowrap">${bytes(one.resident_bytes)}</b></div>
        <${Bar} part=${one.resident_bytes} of=${now.device.memory_total} />
        <small class="soft">${one.version} · ${one.kind} · ${one.runtime} ${one.precision} · ${one.image_size} px${one.bank_rows != null && ` · ${t('system.rows', { rows: count(one.bank_rows) })}`}</small>
        ${one.stale && html`<p class="warn"><span>${one.stale}</span></p>`}</div>`)}
      ${absent.map(([name, state, why]) => html`<div key=${name} class="card">
        <div class="row apart"><a class="name" href=${`#/model${inQuery({ name })}`}>${name}</a><span>${t(`system.is_${state}`)}</span></div>
        ${why && html`<small class="soft">${why}</small>`}</div>`)}
    </div>`;
}

// ---- reports ------------------------------------------------------------------------------------

function Reports() {
  const { models } = useModels(30_000);
  const [model, setModel] = useState('');
  // The new tab gets this one's key only by its opener, and stays with this server's own pages.
  const link = (shift, words) => html`<a class="button" target="_blank" rel="opener"
    href=${`/web/report.html${inQuery({ shift, model, lang: language() })}`}>${words}</a>`;
  return html`<h2>${t('system.reports')}</h2>
    <div class="row reports"><${ModelPicker} models=${models ?? []} value=${model} onchange=${setModel} all />
      ${link('last', t('system.last_shift'))}${link('running', t('system.running_shift'))}</div>`;
}

// ---- trail --------------------------------------------------------------------------------------

const PAGE = 50;
const MOST = 500;

function Trail() {
  const [subject, setSubject] = useState('');
  const [limit, setLimit] = useState(PAGE);
  const { data, error, again } = useData(`/trail${inQuery({ limit, subject: subject.trim() })}`, 10_000);
  return html`<p class="soft">${t('system.trail_why')}</p>
    <${Field} label=${t('system.trail_of')}><input type="search" maxlength="200" value=${subject} oninput=${(event) => setSubject(event.target.value)} /><//>
    ${error && html`<${Problem} error=${error} again=${again} />`}
    ${data === null && !error && html`<${Waiting} />`}
    ${data?.lines.length === 0 && html`<p class="soft">${t('system.trail_empty')}</p>`}
    ${data?.lines.length > 0 && html`<ol class="lines">
      ${data.lines.map((one) => html`<li key=${one.number}>
        <time datetime=${one.time}>${moment(one.time)}</time>
        <span><b>${changed(one.what)}</b> <span class="name">${one.subject}</span>${one.reason && html` <q>${one.reason}</q>`}
          <small class="soft">${details(one.details)}</small></span>
        <span class="by soft">${one.key ?? by(one)}</span></li>`)}
    </ol>
    ${data.next !== null && limit < MOST && html`<${Button} onclick=${() => setLimit((now) => Math.min(MOST, 2 * now))}>${t('system.more')}<//>`}`}`;
}

const OF_ITSELF = ['held', 'prune', 'lost', 'repair'];

/** Who did it, where it was nobody with a key. */
function by(line) {
  if (line.details.by === 'command') return t('system.by_command');
  return OF_ITSELF.includes(line.what) ? 'Kensa' : '–';
}

/** What was done, in words; as the record has it where there are none. */
function changed(what) {
  const words = t(`system.what_${what}`);
  return words.startsWith('system.') ? what : words;
}

function details(given) {
  const shown = Object.entries(given).filter(([name, value]) => name !== 'by' && value !== null && value !== '');
  const text = shown.map(([name, value]) => `${name}: ${typeof value === 'object' ? JSON.stringify(value) : value}`).join(', ');
  return text.length > 240 ? `${text.slice(0, 240)} …` : text;
}
