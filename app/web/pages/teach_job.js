// A job: how far it is, what it says, and what came of it.

import { ask, get, path, send } from '../api.js';
import { t } from '../words.js';
import {
  Button, Icon, Problem, Progress, Waiting, confirm, count, go, html, moment, number, percent, toast, useAction,
  useData, useEffect, useRef, useState, whyNot, Photo, sentence,
} from '../parts.js';
import { Findings } from './teach_findings.js';

const ENDED = ['succeeded', 'failed', 'cancelled', 'interrupted'];
const LINES = 400; // of a log that are shown
const AGAIN_MS = 2000;
const FEW = 0.5; // share of drawn defects that are found, below which a newcomer is told what helps

export const hasEnded = (job) => ENDED.includes(job.state);

/** A job as it goes, with the last lines of its log; it is watched again where the line breaks. */
export function useJob(id) {
  const [state, setState] = useState({ id, job: null, lines: [], error: null });
  useEffect(() => {
    if (!id) return undefined;
    const ending = new AbortController();
    watch(id, (change) => setState((now) => ({ ...(now.id === id ? now : { id, job: null, lines: [], error: null }), ...change(now) })), ending.signal);
    return () => ending.abort();
  }, [id]);
  return state.id === id ? state : { job: null, lines: [], error: null };
}

async function watch(id, change, signal) {
  while (!signal.aborted) {
    try {
      if (await follow(id, change, signal)) return;
    } catch (error) {
      if (signal.aborted) return;
      change(() => ({ error }));
      if ([401, 403, 404].includes(error.status)) return;
    }
    await new Promise((done) => setTimeout(done, AGAIN_MS));
  }
}

/** Read a stream of events until it ends; whether the job has ended, too. */
async function follow(id, change, signal) {
  const answer = await ask(`${path('jobs', id)}/events`, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  let lines = []; // each stream begins with the first one
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return false;
    const events = `${text}${value}`.split('\n\n');
    text = events.pop();
    for (const one of events) {
      const [, kind, data] = /^event: (\w+)\ndata: (.*)$/s.exec(one) ?? [];
      if (kind === 'log') lines = [...lines.slice(1 - LINES), JSON.parse(data)];
      if (kind === 'job') {
        const job = JSON.parse(data);
        change(() => ({ job, lines, error: null }));
        if (hasEnded(job)) return true;
      }
      if (kind === 'error') throw Object.assign(new Error(JSON.parse(data)), { code: 'no_worker' });
    }
    change(() => ({ lines }));
  }
}

/** What it does now, in words; what nobody foresaw as it is. */
export function phaseOf(job) {
  if (job.state === 'queued') return t('teach.phase_queued');
  const phase = job.progress?.phase ?? 'starting';
  if (phase.startsWith('waiting')) return `${t('teach.phase_waiting')} ${phase}`;
  const words = t(`teach.phase_${phase.replaceAll(' ', '_')}`);
  return words.startsWith('teach.') ? phase : words;
}

function timeLeft(seconds) {
  if (seconds == null) return '';
  return seconds < 60 ? t('teach.left_s', { n: count(Math.max(1, Math.round(seconds))) }) : t('teach.left_min', { n: count(Math.round(seconds / 60)) });
}

/** How a job ended, in one word and a colour. */
export function Ending({ job }) {
  if (!hasEnded(job)) return html`<span class="ending runs">${t(`teach.state_${job.state}`)}</span>`;
  const how = job.state === 'succeeded' ? job.outcome ?? 'succeeded' : job.state;
  const look = { live: 'good', held: 'held', replaced: '', published: '', succeeded: 'good', cancelled: '' }[how] ?? 'bad';
  return html`<span class=${`ending ${look}`}>${t(`teach.state_${how}`)}</span>`;
}

/** A job from its start to what came of it.
 *
 * `onend(job)` is told once it has ended, `onlive` that a person let its version judge, `onagain(id)`
 * that it was begun once more.
 */
export function Job({ id, session, models, onend, onlive, onagain }) {
  const { job, lines, error } = useJob(id);
  const told = useRef(null);
  useEffect(() => {
    if (job && hasEnded(job) && told.current !== id) { told.current = id; onend?.(job); }
  }, [job]);
  const [cancel, busy] = useAction(async () => {
    if ((await confirm({ title: t('teach.cancel_title'), body: html`<p>${t('teach.cancel_body')}</p>`, yes: t('teach.cancel'), danger: true })) === null) return;
    await send('POST', `${path('jobs', id)}/cancel`);
  });
  if (!job) return error ? html`<${Problem} error=${error} />` : html`<${Waiting} />`;
  return html`<section class="job" aria-label=${t('teach.job')}>
    ${!hasEnded(job) && html`<div class="card going">
      <${Progress} value=${job.state === 'queued' ? null : job.progress?.fraction ?? 0} label=${phaseOf(job)} />
      <div class="row apart"><span class="soft">${howItIs(job)}</span>
        <${Button} icon="close" busy=${busy} why=${whyNot(session, 'operator')} onclick=${cancel}>${t('teach.cancel')}<//></div>
      ${error && html`<${Problem} error=${error} />`}
    </div>`}
    ${hasEnded(job) && html`<${Result} job=${job} session=${session} models=${models} onlive=${onlive} onagain=${onagain} />`}
    <${Log} lines=${lines} open=${job.state === 'failed' || job.state === 'interrupted'} />
  </section>`;
}

function howItIs(job) {
  const { progress } = job;
  const said = [];
  if (progress?.total > 1) said.push(t('teach.done_of', { done: count(progress.done), of: count(progress.total) }));
  if (job.state === 'running') said.push(timeLeft(progress?.seconds_left));
  if (progress?.held_back >= 0.1) said.push(t('teach.held_back', { share: percent(progress.held_back, 0) }));
  if (job.attempts > 1) said.push(t('teach.attempt', { n: count(job.attempts) }));
  if (job.machine) said.push(job.machine);
  return said.filter(Boolean).join(' · ');
}

function Log({ lines, open }) {
  const end = useRef(null);
  useEffect(() => { const box = end.current; if (box && box.open) box.lastElementChild.scrollTop = box.lastElementChild.scrollHeight; }, [lines]);
  return html`<details class="log" ref=${end} open=${open}><summary>${t('teach.log')}</summary><pre tabindex="0" role="log" aria-label=${t('teach.log')}>${lines.join('\n')}</pre></details>`;
}

// ---- what came of it ----------------------------------------------------------------------------

function Result({ job, session, models, onlive, onagain }) {
  const isVersion = job.state === 'succeeded' && job.version;
  const { data: version, again } = useData(isVersion ? path('models', job.model, 'versions', job.version) : null);
  const [accepted, setAccepted] = useState(false);
  if (job.state !== 'succeeded') return html`<${NotDone} job=${job} session=${session} onagain=${onagain} />`;
  if (job.kind === 'teacher') return html`<${Told} look="good" icon="good" title=${t('teach.teacher_made', { name: job.request.teacher ?? 'teacher.pth' })} />`;
  const outcome = accepted || version?.state === 'live' ? 'live' : job.outcome ?? 'published';
  const look = { live: 'good', held: 'held' }[outcome] ?? '';
  const live = models?.find((one) => one.name === job.model)?.live;
  return html`
    <${Told} look=${look} icon=${outcome === 'live' ? 'good' : 'warning'} title=${t(`teach.outcome_${outcome}`, { model: job.model, version: job.version })}>
      <p>${t(`teach.outcome_${outcome}_more`, { live: live ?? '–', version: job.version })} ${outcome === 'live' && version?.gate?.against && t('teach.outcome_live_back')}</p>
    <//>
    ${version && html`<${Findings} model=${job.model} version=${version} live=${live} session=${session} outcome=${outcome}
      onlive=${() => { setAccepted(true); again(); onlive?.(); }} />`}
    ${version?.calibration && html`<${Promised} known=${version.calibration} />`}
    ${job.images && html`<${Learned} job=${job} version=${version} session=${session} />`}`;
}

/** The large sentence on how it ended. */
export const Told = ({ look = '', icon, title, children }) => html`<div class=${`told ${look}`} role="status"><${Icon} name=${icon} /><div><h2>${title}</h2>${children}</div></div>`;

function NotDone({ job, session, onagain }) {
  const [again, busy] = useAction(async () => {
    const next = await send('POST', `/${job.kind}`, job.request);
    (onagain ?? ((id) => go('teach', { job: id })))(next.id);
  });
  const advice = t(`teach.advice_${job.code}`);
  return html`<${Told} look=${job.state === 'cancelled' ? '' : 'bad'} icon="warning" title=${t(`teach.state_${job.state}`)}>
    ${job.state === 'cancelled' ? html`<p>${t('teach.cancelled_more')}</p>` : html`<p>${sentence({ code: job.code ?? 'internal_error', message: job.error ?? '' })}</p>`}
    ${!advice.startsWith('teach.') && html`<p>${advice}</p>`}
    <p><${Button} busy=${busy} why=${whyNot(session, 'operator')} onclick=${again}>${t('teach.once_more')}<//></p><//>`;
}

/** What the version promises, as its training measured it. */
export function Promised({ known }) {
  const words = { parts: count(known.parts), rejected: count(known.rejected), share: percent(known.at_most), goal: percent(known.false_rejects), needed: count(known.parts_needed) };
  return html`<section class="promised"><h2>${t('teach.promise')}</h2><ul>
    ${known.rejected != null && html`<li>${t('teach.promise_measured', words)}</li>`}
    ${known.at_most != null && html`<li>${t('teach.promise_at_most', words)}${known.parts_needed > known.parts && html` <span class="soft">${t('teach.promise_needed', words)}</span>`}</li>`}
    ${known.defects > 0 && known.misses != null && html`<li>${t('teach.promise_defects', { found: count(known.defects - known.misses), of: count(known.defects) })}</li>`}
    ${known.defects === 0 && html`<li class="soft">${t('teach.promise_no_defects')}</li>`}
    ${known.drawn > 0 && html`<li>${t('teach.promise_drawn', { found: count(known.found), of: count(known.drawn) })}${known.found / known.drawn < FEW && html` <b>${t('teach.promise_few')}</b>`}</li>`}
  </ul></section>`;
}

/** What became of the pictures, and those that were too strange to be learned. */
function Learned({ job, version, session }) {
  const { images } = job;
  return html`<section class="learned"><h2>${t('teach.learned_title')}</h2>
    <p class="row counts"><span><b>${count(images.learned)}</b> ${t('teach.learned')}</span>
      ${images.known > 0 && html`<span><b>${count(images.known)}</b> ${t('teach.known')}</span>`}
      ${images.strange > 0 && html`<span class="mark defect"><b>${count(images.strange)}</b> ${t('teach.strange')}</span>`}
      ${images.skipped > 0 && html`<span class="mark defect"><b>${count(images.skipped)}</b> ${t('teach.unread')}</span>`}</p>
    ${images.notes.map((note) => html`<p class="warn">${note}</p>`)}
    ${images.strange > 0 && html`<${Strange} job=${job} version=${version} session=${session} />`}
  </section>`;
}

function Strange({ job, version, session }) {
  const { names } = job.images;
  const why = whyNot(session, 'operator');
  const [keep, keeping] = useAction(async () => {
    if ((await confirm({ title: t('teach.keep_strange_title'), body: html`<p>${t('teach.keep_strange_body')}</p>`, yes: t('teach.learn_them') })) === null) return;
    const next = await send('POST', '/retrain', { model: job.model, category: job.request.category, keep_strange: true });
    go('teach', { job: next.id });
  });
  const [remove, removing] = useAction(async () => {
    const body = html`<p class="named">${names.join(', ')}</p><p>${t('teach.delete_stays')}</p>`;
    if ((await confirm({ title: t('teach.delete_strange_title', { n: count(names.length) }), body, yes: t('teach.delete'), danger: true })) === null) return;
    for (const name of names) await goneAlready(send('DELETE', path('datasets', job.request.category, 'train', name)));
    toast(t('teach.deleted_n', { n: count(names.length) }));
  });
  return html`<p>${t('teach.strange_more')}</p><p class="named">${names.join(', ')}${job.images.strange > names.length && ` ${t('teach.more', { n: count(job.images.strange - names.length) })}`}</p>
    ${version?.files['strange.jpg'] && html`<${Photo} class="sheet" src=${path('models', job.model, 'versions', job.version, 'strange')} alt=${t('teach.strange_alt')} />`}
    <div class="row"><${Button} busy=${keeping} why=${why} onclick=${keep}>${t('teach.strange_good')}<//>
      <${Button} busy=${removing} why=${why} icon="remove" onclick=${remove}>${t('teach.strange_bad')}<//></div>`;
}

const goneAlready = (deleting) => deleting.catch((error) => { if (error.code !== 'unknown_dataset') throw error; });

// ---- jobs of before -----------------------------------------------------------------------------

/** The newest jobs, running ones first to see. */
export function Jobs({ jobs }) {
  if (!jobs.length) return html`<p class="soft">${t('teach.no_jobs')}</p>`;
  return html`<ul class="jobs">${jobs.map((job) => html`<li key=${job.id}><a href=${`#/teach?job=${encodeURIComponent(job.id)}`}>
    <span class="grow"><b>${job.model || job.request.teacher || 'teacher.pth'}</b> <span class="soft">${t(`teach.kind_${job.kind}`)}</span><br />
      <small class="soft">${moment(job.created, false)}${!hasEnded(job) && job.progress && ` · ${phaseOf(job)} ${number(100 * job.progress.fraction, 0)} %`}</small></span>
    <${Ending} job=${job} /></a></li>`)}</ul>`;
}

/** The newest jobs, and why none is begun. */
export const newestJobs = () => get('/jobs?limit=30');
