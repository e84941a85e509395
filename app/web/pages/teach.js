// Teach: pictures in, a training, and what comes of it.

import { path, query as asQuery, send } from '../api.js';
import { t } from '../words.js';
import {
  Button, Empty, Icon, Photo, Problem, Waiting, confirm, count, go, html, useAction, useCallback, useData, useEffect, useModels, useState, whyNot,
} from '../parts.js';
import { Guide } from './teach_guide.js';
import { Job, Jobs, hasEnded } from './teach_job.js';
import { Learn, Marked, NoWorker } from './teach_learn.js';
import { Pictures, SPLITS } from './teach_pictures.js';

export default function Teach({ query, session }) {
  const { models, error, again: lookAtModels } = useModels();
  const { data: sets, error: unknown, again: count_ } = useData('/datasets', 10_000);
  const { data: jobs, error: noJobs, again: lookAtJobs } = useData('/jobs?limit=30', 3000);
  const again = useCallback(() => { lookAtModels(); count_(); lookAtJobs(); }, []);
  const [gone, setGone] = useState(null); // deleted just now, which the list does not say yet
  useEffect(() => setGone(null), [sets]);
  const problem = error ?? unknown;
  if (!models || !sets) return problem ? html`<${Problem} error=${problem} again=${again} />` : html`<${Waiting} />`;
  const categories = sets.datasets.filter((one) => one.category !== gone);
  const given = { query, session, models, categories, jobs: jobs?.jobs ?? [], noWorker: jobs?.no_worker, noJobs, again };
  if (query.has('new')) return html`<${Guided} ...${given} />`;
  if (query.get('job')) return html`<${JobPage} key=${query.get('job')} ...${given} />`;
  if (query.get('from') === 'decisions') return html`<${FromDecisions} key=${query.get('model')} ...${given} />`;
  if (query.get('category')) return html`<${CategoryPage} key=${query.get('category')} ...${given} ongone=${setGone} />`;
  const isNew = !models.length && !categories.length && !given.jobs.length;
  return isNew ? html`<${Guided} ...${given} />` : html`<${Home} ...${given} />`;
}

const Guided = ({ query, again, ...given }) => html`<${Guide} ...${given} name=${query.get('new') ?? ''} step=${Number(query.get('step') ?? 1)} job=${query.get('job')} onchange=${again} />`;

function Home({ session, models, categories, jobs, noWorker, noJobs }) {
  const running = jobs.filter((one) => !hasEnded(one));
  const why = whyNot(session, 'operator');
  return html`
    <div class="row apart"><h1>${t('teach.title')}</h1>
      <span class="row"><${Button} why=${why} onclick=${() => go('teach', { from: 'decisions', model: models[0]?.name ?? '' })}>${t('teach.from_marked')}<//>
      <${Button} kind="main" icon="add" why=${why} onclick=${() => { location.hash = '#/teach?new='; }}>${t('teach.new_model')}<//></span></div>
    ${noWorker && html`<${NoWorker} why=${noWorker} />`}
    ${!models.length && html`<p class="note">${t('teach.no_model_yet')} <a href="#/teach?new=">${t('teach.guide')}</a></p>`}
    <div class="halves">
      <section><h2>${t('teach.categories')}</h2>
        ${categories.length ? html`<ul class="categories">${categories.map((one) => html`<li key=${one.category}><${Card} one=${one} models=${models} /></li>`)}</ul>`
          : html`<${Empty} title=${t('teach.no_categories')}><p>${t('teach.no_categories_more')}</p><//>`}
      </section>
      <section><h2>${running.length ? t('teach.jobs_running') : t('teach.jobs')}</h2>
        ${noJobs && !jobs.length ? html`<${Problem} error=${noJobs} />` : html`<${Jobs} jobs=${[...running, ...jobs.filter(hasEnded)]} />`}</section>
    </div>`;
}

/** A category, how much it has, and which model learned from it. */
function Card({ one, models }) {
  const model = models.find((found) => found.name === one.category || found.versions[0]?.origin.category === one.category);
  return html`<a class="card category" href=${`#/teach?category=${encodeURIComponent(one.category)}`}><b>${one.category}</b>
    ${one.train > 0 && html`<${Strip} category=${one.category} />`}
    <span class="row counts">${SPLITS.map((split) => html`<span key=${split}><b>${count(one[split])}</b> ${t(`teach.split_${split}`)}</span>`)}</span>
    ${model && html`<small class="soft">${t('teach.learned_by', { model: model.name })}</small>`}</a>`;
}

/** The first pictures of good parts, to know a category by. */
function Strip({ category }) {
  const { data } = useData(`${path('datasets', category, 'train')}?limit=5`);
  return html`<span class="strip">${data?.images.map((one) => html`<${Photo} key=${one.name} class="thumbnail" alt="" src=${`${path('datasets', category, 'train', one.name)}/thumbnail`} />`)}</span>`;
}

const BackTo = ({ href = '#/teach', children }) => html`<a class="button plain back" href=${href}><${Icon} name="back" /><span>${children ?? t('teach.title')}</span></a>`;

function CategoryPage({ query, session, models, categories, jobs, noWorker, again, ongone }) {
  const category = query.get('category');
  const counts = categories.find((one) => one.category === category);
  const split = SPLITS.includes(query.get('split')) ? query.get('split') : 'train';
  const running = jobs.find((one) => !hasEnded(one) && one.request.category === category);
  const [remove, busy] = useAction(async () => {
    const body = html`<p>${SPLITS.map((one) => `${t(`teach.split_${one}`)}: ${count(counts[one])}`).join(' · ')}</p><p>${t('teach.delete_stays')}</p>`;
    if ((await confirm({ title: t('teach.delete_category', { category }), body, yes: t('teach.delete'), danger: true })) === null) return;
    await send('DELETE', path('datasets', category));
    ongone(category);
    again();
    go('teach');
  });
  return html`<${BackTo} /><div class="row apart"><h1 class="named">${category}</h1>
      ${counts && html`<${Button} kind="plain" icon="remove" busy=${busy} why=${whyNot(session, 'operator')} onclick=${remove}>${t('teach.delete_this_category')}<//>`}</div>
    <div class="halves wide-left"><section aria-label=${t('teach.splits')}>
      <${Pictures} category=${category} counts=${counts} split=${split} session=${session} onchange=${again}
        onsplit=${(one) => go('teach', { category, split: one }, true)} /></section>
    <section class="card side"><h2>${t('teach.learn')}</h2>
      ${running ? html`<p>${t('teach.learns_now')} <a href=${`#/teach?job=${encodeURIComponent(running.id)}`}>${t('teach.watch')}</a></p>` : null}
      <${Learn} category=${category} counts=${counts} models=${models} noWorker=${noWorker} session=${session} onstart=${(job) => go('teach', { job: job.id })} />
    </section></div>`;
}

function JobPage({ query, session, models, jobs, again }) {
  const id = query.get('job');
  const job = jobs.find((one) => one.id === id);
  const category = job?.request.category;
  return html`<${BackTo} /><div class="row apart"><h1 class="named">${job?.model || t('teach.job')}</h1>
      <span class="row soft">${id}${category && html` · <a href=${`#/teach${asQuery({ category })}`}>${category}</a>`}</span></div>
    <${Job} id=${id} session=${session} models=${models} onend=${again} onlive=${again} />
    ${job && hasEnded(job) && job.model && html`<p class="row">${models.find((one) => one.name === job.model)?.live && html`<a class="button" href=${`#/try${asQuery({ model: job.model })}`}>${t('teach.try_it')}</a>`}
      <a class="button" href=${`#/model${asQuery({ name: job.model })}`}>${t('teach.to_the_model')}</a></p>`}`;
}

/** From Review: what people said becomes pictures to learn from, and is learned. */
function FromDecisions({ query, session, models, categories, noWorker, again }) {
  const model = query.get('model') ?? '';
  const found = models.find((one) => one.name === model);
  const learned = found?.versions[0]?.origin.category;
  const [category, setCategory] = useState(learned ?? model);
  const counts = categories.find((one) => one.category === category);
  return html`<${BackTo} /><h1>${t('teach.from_marked')}</h1>
    ${!found && html`<p class="warn">${t('teach.which_marked')}</p>`}
    <div class="halves wide-left"><section>
      <label class="field"><span>${t('shell.model')}</span><select value=${found ? model : ''} onchange=${(event) => go('teach', { from: 'decisions', model: event.target.value }, true)}>
        ${!found && html`<option value="">–</option>`}${models.map((one) => html`<option key=${one.name} value=${one.name}>${one.name}</option>`)}</select></label>
      ${found && html`<${Marked} model=${model} category=${category} categories=${categories.map((one) => one.category)} session=${session} onchange=${again} oncategory=${setCategory} />`}
    </section>
    <section class="card side"><h2>${t('teach.learn')}</h2>
      ${counts && html`<p class="row counts">${SPLITS.map((split) => html`<span key=${split}><b>${count(counts[split])}</b> ${t(`teach.split_${split}`)}</span>`)}</p>`}
      ${found && html`<${Learn} key=${category} only=${model} category=${category} counts=${counts} models=${models} noWorker=${noWorker} session=${session} onstart=${(job) => go('teach', { job: job.id })} />`}
    </section></div>`;
}
