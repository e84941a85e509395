// What a training is asked for: a model, a category, and all else only where somebody wants it.

import { path, query, send } from '../api.js';
import { t } from '../words.js';
import {
  Button, Field, Problem, Thumbnail, Waiting, confirm, count, html, sentence, useAction, useData, useState, whyNot,
} from '../parts.js';

const LITE = ['tf_efficientnet_lite0', 'tf_efficientnet_lite1', 'tf_efficientnet_lite2'];
const BACKBONES = [...LITE, 'resnet18', 'wide_resnet50_2'];
const KINDS = ['patchcore', 'padim', 'efficientad', 'vae'];
const NAME = /^[\p{L}\p{N}_-]{1,64}$/u;
const USUAL = { // of a first training, as docs/models.md says of each kind
  patchcore: {},
  padim: { n_features: 100, channel_choice: 'steady' },
  efficientad: { model_size: 'small', learning_rate: 0.0005 },
  vae: { latent_dim: 64, learning_rate: 0.002 },
};
const LONG = { efficientad: { epochs: 11, batch: 2, pretrained: 'teacher.pth' }, vae: { epochs: 80 } };

/** Whether a model or a category may be called so. */
export const isName = (name) => NAME.test(name.normalize('NFC'));

function seenBy(kind, backbone) {
  const padim = kind === 'padim';
  if (!LITE.includes(backbone)) return { backbone, layers: padim ? ['layer1', 'layer2', 'layer3'] : ['layer2', 'layer3'] };
  return padim ? { backbone, layers: ['blocks.1', 'blocks.2', 'blocks.4'] } : { backbone, layers: ['blocks.2', 'blocks.4'], centre_weight: 0.3, feature_power: 0.7 };
}

/** The body of POST /retrain: only what was said. `more` are the fields of the fold. */
export function requestOf({ model, category, isFirst, more }) {
  const kind = more.kind ?? 'patchcore';
  const said = { model, category };
  const meta = { ...(isFirst ? firstMeta(kind, more) : {}), ...(more.size ? { image_size: Number(more.size) } : {}), ...JSON.parse(more.meta || '{}') };
  if (Object.keys(meta).length) said.meta = meta;
  if (isFirst && kind !== 'patchcore') said.kind = kind;
  for (const key of ['epochs', 'batch']) if (more[key]) said[key] = Number(more[key]);
  for (const key of ['false_rejects', 'false_rejects_cap', 'max_flips']) if (more[key]) said[key] = Number(more[key]) / 100;
  if (isFirst && more.pretrained) said.pretrained = more.pretrained;
  if (!isFirst && more.version) said.version = more.version;
  if (!isFirst && more.anew) said.update = false;
  if (more.keep_strange) said.keep_strange = true;
  if (more.from_decisions) said.from_decisions = true;
  if (more.stays) said.activate = false;
  return said;
}

function firstMeta(kind, { backbone }) {
  const meta = { ...USUAL[kind] };
  const sees = kind === 'patchcore' || kind === 'padim';
  if (kind !== 'patchcore') meta.image_size = 256;
  if (sees && (backbone || kind !== 'patchcore')) Object.assign(meta, seenBy(kind, backbone || LITE[0]));
  return meta;
}

/** POST /retrain; where the model has a job already, the question whether to wait behind it. */
export async function start(request) {
  try {
    return await send('POST', '/retrain', request);
  } catch (error) {
    if (error.code !== 'conflict') throw error;
    const yes = await confirm({ title: t('teach.busy_title', { model: request.model }), body: html`<p>${sentence(error)}</p><p>${t('teach.busy_body')}</p>`, yes: t('teach.queue') });
    return yes === null ? null : send('POST', '/retrain', { ...request, queue: true });
  }
}

/** Start learning from a category. `models`: all there are; `only`: of a model that is named already. */
export function Learn({ category, counts, models, only, noWorker, session, onstart }) {
  const known = models.map((one) => one.name);
  const usual = only ?? (known.includes(category) ? category : models.find((one) => one.versions[0]?.origin.category === category)?.name ?? category);
  const [model, setModel] = useState(usual);
  const [more, setMore] = useState({});
  const [problem, setProblem] = useState(null);
  const isFirst = !known.includes(model);
  const [run, busy] = useAction(async () => {
    setProblem(null);
    try {
      const job = await start(requestOf({ model, category, isFirst, more }));
      if (job) onstart(job);
    } catch (error) {
      setProblem(error instanceof SyntaxError ? { code: 'bad_meta', message: String(error.message) } : error);
    }
  });
  const why = whyNot(session, 'operator') || (isName(model) ? '' : t('teach.bad_name')) || (counts?.train || more.from_decisions ? '' : t('teach.nothing_to_learn'));
  return html`<form class="learn" onsubmit=${(event) => { event.preventDefault(); if (!why) run(); }}>
    ${!only && html`<${Field} label=${t('teach.which_model')} hint=${isFirst ? t('teach.becomes_new', { model }) : t('teach.is_updated', { model })}>
      <input name="model" list="models" value=${model} maxlength="64" autocomplete="off" oninput=${(event) => setModel(event.target.value.trim())} />
      <datalist id="models">${known.map((one) => html`<option key=${one} value=${one} />`)}</datalist><//>`}
    ${noWorker && html`<${NoWorker} why=${noWorker} />`}
    <${More} model=${model} isFirst=${isFirst} more=${more} onchange=${(change) => setMore((now) => ({ ...now, ...change }))} />
    ${problem && html`<${Problem} error=${problem} /><${Advice} code=${problem.code} />`}
    <div class="row"><button class="button main large" disabled=${busy || Boolean(why)} title=${why} data-why=${why || undefined} aria-busy=${busy ? 'true' : undefined}>${t('teach.start')}</button>
      <span class="soft">${why || (isFirst ? '' : t('teach.start_hint'))}</span></div>
  </form>`;
}

/** What to do where nothing here learns. */
export const NoWorker = ({ why }) => html`<div class="warn" role="note"><p><b>${t('codes.no_worker')}</b> ${t('teach.advice_no_worker')}<br /><small>${why}</small></p></div>`;

/** What helps against an error of this kind, where more is to be said than the server does. */
export function Advice({ code }) {
  const words = t(`teach.advice_${code}`);
  return words.startsWith('teach.') ? null : html`<p class="advice">${words}</p>`;
}

/** The fold with all else that POST /retrain takes. */
function More({ model, isFirst, more, onchange }) {
  const [open, setOpen] = useState(false);
  const { data } = useData(open && !isFirst ? `${path('models', model)}?limit=20` : null);
  const kind = more.kind ?? 'patchcore';
  const text = (name, label, given = {}, hint = '') => html`<${Field} label=${label} hint=${hint}><input name=${name} value=${more[name] ?? ''} oninput=${(event) => onchange({ [name]: event.target.value })} ...${given} /><//>`;
  const whole = (name, label, least, most, usual, hint) => text(name, label, { type: 'number', min: least, max: most, step: 1, placeholder: usual, inputmode: 'numeric' }, hint);
  const share = (name, label, usual, hint) => text(name, label, { type: 'number', min: 0, max: 100, step: 'any', placeholder: usual, inputmode: 'decimal' }, hint);
  const check = (name, label) => html`<label class="check"><input type="checkbox" name=${name} checked=${Boolean(more[name])} onchange=${(event) => onchange({ [name]: event.target.checked })} />${label}</label>`;
  return html`<details class="fold" ontoggle=${(event) => setOpen(event.target.open)}><summary>${t('teach.advanced')}</summary>
    <div class="fields">
      ${isFirst && html`
        <${Field} label=${t('teach.kind')} hint=${t(`teach.about_${kind}`)}><select name="kind" value=${kind} onchange=${(event) => onchange({ kind: event.target.value, epochs: '', batch: '', pretrained: '', ...LONG[event.target.value] })}>
          ${KINDS.map((one) => html`<option key=${one} value=${one}>${t(`teach.kind_${one}`)}</option>`)}</select><//>
        ${(kind === 'patchcore' || kind === 'padim') && html`<${Field} label=${t('teach.backbone')} hint=${t('teach.backbone_hint')}><select name="backbone" value=${more.backbone ?? LITE[0]} onchange=${(event) => onchange({ backbone: event.target.value })}>
          ${BACKBONES.map((one) => html`<option key=${one} value=${one}>${one}</option>`)}</select><//>`}
        ${whole('size', t('teach.image_size'), 32, 4096, 256, t('teach.image_size_hint'))}
        ${text('pretrained', t('teach.pretrained'), {}, t('teach.pretrained_hint'))}`}
      ${!isFirst && html`<${Field} label=${t('teach.version')} hint=${t('teach.version_hint')}><select name="version" value=${more.version ?? ''} onchange=${(event) => onchange({ version: event.target.value })}>
          <option value="">${t('teach.version_usual')}</option>
          ${data?.versions.filter((one) => one.kind).map((one) => html`<option key=${one.version} value=${one.version}>${one.version} (${one.state})</option>`)}</select><//>`}
      ${whole('epochs', t('teach.epochs'), 1, 10_000, 1, t('teach.epochs_hint'))}
      ${whole('batch', t('teach.batch'), 1, 256, 4)}
      ${share('false_rejects', t('teach.false_rejects'), isFirst ? 1 : '', t('teach.false_rejects_hint'))}
      ${share('false_rejects_cap', t('teach.false_rejects_cap'), isFirst ? 5 : '', t('teach.false_rejects_cap_hint'))}
      ${!isFirst && share('max_flips', t('teach.max_flips'), '', t('teach.max_flips_hint'))}
      ${text('meta', t('teach.meta'), { placeholder: '{"coreset_ratio": 0.1}', spellcheck: false }, t('teach.meta_hint'))}
    </div>
    <div class="checks">
      ${!isFirst && check('anew', t('teach.anew'))}
      ${check('keep_strange', t('teach.keep_strange'))}
      ${!isFirst && check('from_decisions', t('teach.from_decisions'))}
      ${check('stays', t('teach.stays'))}
    </div></details>`;
}

// ---- marked parts -------------------------------------------------------------------------------

const SEEN = 200;
const SPANS = { all: null, day: 1, week: 7, month: 31 };

/** Parts that somebody has marked: which there are, into which category, and how many became what. */
export function Marked({ model, categories, category, session, onchange, oncategory }) {
  const [span, setSpan] = useState('all');
  const [taught, setTaught] = useState(null);
  const since = useSince(span);
  const [run, busy] = useAction(async () => {
    setTaught(await send('POST', `${path('datasets', category)}/from-decisions`, { model, ...(since && { since }) }));
    onchange();
  });
  const why = whyNot(session, 'operator') || (isName(category) ? '' : t('teach.bad_name'));
  return html`<section class="marked" aria-label=${t('teach.marked')}>
    <p class="soft">${t('teach.marked_about')}</p>
    <div class="row">
      <${Field} label=${t('teach.since')}><select name="since" value=${span} onchange=${(event) => { setSpan(event.target.value); setTaught(null); }}>
        ${Object.keys(SPANS).map((one) => html`<option key=${one} value=${one}>${t(`teach.since_${one}`)}</option>`)}</select><//>
      ${oncategory && html`<${Field} label=${t('teach.into_category')}><input name="category" list="categories" value=${category} maxlength="64" autocomplete="off" oninput=${(event) => oncategory(event.target.value.trim())} />
        <datalist id="categories">${categories.map((one) => html`<option key=${one} value=${one} />`)}</datalist><//>`}
    </div>
    ${['good', 'defect'].map((label) => html`<${OfLabel} key=${label} model=${model} label=${label} since=${since} />`)}
    <p><${Button} kind="main" icon="add" busy=${busy} why=${why} onclick=${run}>${t('teach.take_marked')}<//></p>
    ${taught && html`<p class="row counts taught" role="status">
      ${['train', 'normal', 'anomaly'].map((one) => html`<span key=${one}><b>${count(taught[one])}</b> ${t('teach.into', { split: t(`teach.split_${one}`) })}</span>`)}
      <span><b>${count(taught.already_there)}</b> ${t('teach.there')}</span>
      ${taught.moved > 0 && html`<span><b>${count(taught.moved)}</b> ${t('teach.moved')}</span>`}
      ${taught.without_picture > 0 && html`<span class="mark defect"><b>${count(taught.without_picture)}</b> ${t('teach.without_picture')}</span>`}</p>`}
  </section>`;
}

function useSince(span) {
  const [now] = useState(() => Date.now());
  return SPANS[span] ? new Date(now - SPANS[span] * 86_400_000).toISOString() : null;
}

function OfLabel({ model, label, since }) {
  const { data, error } = useData(`/decisions${query({ model, label, since, limit: SEEN })}`);
  if (error) return html`<${Problem} error=${error} />`;
  if (!data) return html`<${Waiting} />`;
  const n = `${count(data.decisions.length)}${data.next ? '+' : ''}`;
  return html`<div class="of-label"><h2>${t(`teach.marked_${label}`, { n })}</h2>
    ${data.decisions.length > 0 && html`<div class="strip">${data.decisions.slice(0, 12).map((one) => html`<span key=${one.number} title=${one.part ?? one.id}><${Thumbnail} decision=${one} alt=${one.part ?? one.id} /></span>`)}</div>`}</div>`;
}
