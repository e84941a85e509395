// The model: which version judges, where its limit lies, what its versions promise, and known pictures.

import { get, path, query as inQuery, send } from '../api.js';
import { t } from '../words.js';
import {
  Button, Empty, ModelPicker, Problem, Waiting, confirm, go, html, moment, sentence, toast, useAction, useCallback,
  useData, useModels, useRef, useState, whyNot,
} from '../parts.js';
import { Known } from './model_known.js';
import { Limit } from './model_limit.js';
import { Versions } from './model_versions.js';

export default function Model({ query, session }) {
  const { models, error, again } = useModels();
  const asked = query.get('name');
  const name = asked ?? models?.[0]?.name ?? null;
  if (models === null) return html`<h1>${t('pages.model')}</h1>${error ? html`<${Problem} error=${error} again=${again} />` : html`<${Waiting} />`}`;
  if (name === null) {
    return html`<h1>${t('pages.model')}</h1><${Empty} title=${t('model.none')}><p>${t('model.none_why')}</p>
      <a class="button main" href="#/teach">${t('model.to_teach')}</a><//>`;
  }
  return html`<div class="row apart"><h1>${t('pages.model')} <span class="called">${name}</span></h1>
      ${models.length > 1 && html`<${ModelPicker} models=${models} value=${name} onchange=${(one) => go('model', { name: one })} />`}</div>
    <${OfModel} key=${name} name=${name} chosen=${query.get('version')} session=${session} />`;
}

const PAGE = 20; // versions

function OfModel({ name, chosen, session }) {
  const [limit, setLimit] = useState(PAGE);
  const of = path('models', name);
  const { data, error, again } = useData(`${of}${inQuery({ limit })}`, 4000);
  const last = useRef(null); // what is there stays while more of it is asked for
  if (data !== null) last.current = data;
  const model = last.current;
  const [turn, setTurn] = useState(0); // of what hangs on the live version
  const changed = useCallback(() => { again(); setTurn((now) => now + 1); }, [again]);
  const undo = useCallback((from, to) => rollBack(name, from, to).finally(changed), [name, changed]);
  if (model === null) return error ? html`<${Problem} error=${error} again=${again} />` : html`<${Waiting} />`;
  const more = model.versions.length === limit ? () => setLimit((now) => Math.min(200, now + PAGE)) : null;
  return html`
    ${error && html`<${Problem} error=${error} again=${again} />`}
    <${State} model=${model} of=${of} session=${session} changed=${changed} undo=${undo} />
    ${model.live !== null && html`<${Limit} of=${of} version=${`${model.live} ${turn}`} live=${model.live} session=${session} changed=${changed} undo=${undo} />`}
    <${Versions} model=${model} of=${of} chosen=${chosen} session=${session} changed=${changed} more=${more} />
    <${Known} model=${model} of=${of} session=${session} changed=${changed} />`;
}

/** Go back, where wanted only from one version, and to one: else somebody changed the model meanwhile. */
async function rollBack(name, from, to) {
  try {
    const now = await send('POST', `${path('models', name)}/rollback${inQuery({ live: from, to })}`);
    toast(t('model.rolled_back', { version: now.live }));
  } catch (error) {
    const now = error.code === 'conflict' ? await get(`${path('models', name)}?limit=1`).catch(() => null) : null;
    const isOvertaken = now?.live && (now.previous !== to || (from && now.live !== from));
    toast(isOvertaken ? t('model.overtaken', { live: now.live }) : sentence(error), 'bad');
  }
}

/** Which version judges, and whether parts pass. */
function State({ model, of, session, changed, undo }) {
  const [back, going] = useAction(async () => {
    const title = t('model.ask_rollback', { version: model.previous });
    if (await confirm({ title, body: html`<p>${t('model.rollback_why')}</p>`, yes: t('model.rollback') }) !== null) await undo(null, model.previous);
  });
  const live = model.versions.find((one) => one.version === model.live);
  return html`<section class="now card" aria-label=${t('model.now')}>
    <div class="row apart">
      <div><span class="soft">${t('model.judges')}</span> ${model.live
        ? html`<b class="version">${model.live}</b>${live && html` <span class="soft">${moment(live.created, false)}</span>`}`
        : html`<b>${t('model.nobody')}</b>`}</div>
      ${model.previous && html`<${Button} icon="undo" busy=${going} why=${whyNot(session, 'operator')} onclick=${back}>
        ${t('model.rollback_to', { version: model.previous })}<//>`}
    </div>
    ${model.problem && html`<div class="problem" role="alert"><p>${model.problem}</p></div>`}
    ${model.at_rest && html`<p class="warn">${t('model.at_rest')}</p>`}
    ${model.stale && html`<div class="warn"><p>${model.stale}</p></div>`}
    ${!model.released && html`<${Closed} model=${model} of=${of} session=${session} changed=${changed} />`}
    ${model.drift.map((one) => html`<div key=${one.statistic} class="warn"><p>${one.sentence}</p></div>`)}
    ${Object.entries(model.refused).map(([version, why]) => html`<div key=${version} class="warn"><p><b class="version">${version}</b> ${t('model.refused')} ${why}</p></div>`)}
  </section>`;
}

/** It failed its challenge: what was wrong, and the two ways out. */
function Closed({ model, of, session, changed }) {
  const { data } = useData(`${of}/challenges`);
  const wrong = (data?.pictures ?? []).filter((one) => one.last && !one.last.right);
  const [challenge, trying] = useAction(async () => {
    const found = await send('POST', `${of}/challenge`);
    toast(t(found.passed ? 'model.passed' : 'model.failed', { right: found.right, of: found.of }), found.passed ? '' : 'bad');
    changed();
  });
  const [release, releasing] = useAction(async () => {
    const reason = await confirm({ title: t('model.ask_release'), body: html`<p>${t('model.release_why')}</p>`, yes: t('model.release'), reason: 'must', danger: true });
    if (reason === null) return;
    await send('POST', `${of}/release`, { reason });
    changed();
  });
  return html`<div class="problem closed" role="alert"><p><b>${t('model.closed')}</b>
      ${model.challenge && html` ${t('model.failed', { right: model.challenge.right, of: model.challenge.of })} ${moment(model.challenge.time)}`}
      ${wrong.map((one) => html`<br />${one.name}: ${one.last.problem ?? t('model.judged_as', { label: t(one.last.label === 'Normal' ? 'verdict.normal' : 'verdict.anomaly') })}`)}</p>
    <div class="row"><${Button} kind="main" busy=${trying} onclick=${challenge}>${t('model.challenge')}<//>
      <${Button} busy=${releasing} why=${whyNot(session, 'operator')} onclick=${release}>${t('model.release')}<//></div></div>`;
}
