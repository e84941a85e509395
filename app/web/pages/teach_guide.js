// The first model from nothing, in five steps.

import { t } from '../words.js';
import { Button, Field, Icon, count, go, html, percent, useEffect, useRef, useState, whyNot } from '../parts.js';
import { Job, hasEnded, useJob } from './teach_job.js';
import { Learn, isName } from './teach_learn.js';
import { Sending } from './teach_pictures.js';

const STEPS = ['name', 'good', 'defects', 'learn', 'try'];
const LEAST = 4; // pictures of which a threshold can be made
const ENOUGH = 20;
const PROMISED = [20, 40, 100, 299];

/** What share of good parts is rejected at most, 95 % sure, where none of so many is. */
const atMost = (parts) => 1 - 0.05 ** (1 / parts);

/** `name`, `step` and `job` stand in the address, so that a reload goes on where it was. */
export function Guide({ name, step, job, categories, models, noWorker, session, onchange }) {
  const counts = categories.find((one) => one.category === name) ?? { train: 0, normal: 0, anomaly: 0 };
  const to = (next, more = {}) => go('teach', { new: name, step: next, job, ...more });
  const at = isName(name) ? Math.min(5, Math.max(1, step)) : 1;
  const title = useRef(null);
  const shown = useRef(at);
  useEffect(() => { // who moves on by keyboard, or hears the page, begins at the new step
    if (shown.current !== at) title.current?.focus();
    shown.current = at;
  }, [at]);
  const given = { name, counts, categories, models, noWorker, session, onchange, to, job };
  return html`<div class="guide">
    <div class="row apart title"><h1>${t('teach.guide')}</h1>${models.length + categories.length > 0 && html`<a class="button plain" href="#/teach"><${Icon} name="close" /><span>${t('teach.guide_leave')}</span></a>`}</div>
    <ol class="steps" aria-label=${t('teach.steps')}>${STEPS.map((one, index) => html`<li key=${one} class=${index + 1 < at ? 'done' : ''} aria-current=${index + 1 === at ? 'step' : undefined}>
      <span class="number">${index + 1 < at ? html`<${Icon} name="good" />` : index + 1}</span><span>${t(`teach.step_${one}`)}</span></li>`)}</ol>
    <h2 tabindex="-1" ref=${title}>${t(`teach.ask_${STEPS[at - 1]}`, { name })}</h2>
    ${at === 1 && html`<${NameIt} ...${given} />`}
    ${at === 2 && html`<${Good} ...${given} />`}
    ${at === 3 && html`<${Defects} ...${given} />`}
    ${at === 4 && html`<${LearnIt} ...${given} />`}
    ${at === 5 && html`<${TryIt} ...${given} />`}
  </div>`;
}

/** Back, and on: why not, or that it need not be. */
const Feet = ({ onback, onnext, why, next = t('teach.next'), kind = 'main' }) => html`<div class="row apart feet">
  ${onback ? html`<${Button} icon="back" onclick=${onback}>${t('teach.back')}<//>` : html`<span></span>`}
  <span class="row">${why && html`<span class="soft">${why}</span>`}<${Button} kind=${`${kind} large`} why=${why} onclick=${onnext}>${next}<//></span></div>`;

function NameIt({ name, categories, models, session, to }) {
  const [text, setText] = useState(name);
  const isTaken = models.some((one) => one.name === text);
  const why = whyNot(session, 'operator') || (!text || isName(text) ? '' : t('teach.bad_name'));
  const free = categories.filter((one) => !models.some((model) => model.name === one.category));
  const on = (chosen) => to(2, { new: chosen, job: null });
  return html`<form class="card" onsubmit=${(event) => { event.preventDefault(); if (text && !why) on(text); }}>
    <p>${t('teach.name_about')}</p>
    <${Field} label=${t('teach.name')} hint=${t('teach.name_hint')}><input name="name" value=${text} maxlength="64" autocomplete="off" spellcheck="false"
      aria-invalid=${why ? 'true' : undefined} oninput=${(event) => setText(event.target.value.trim())} /><//>
    ${why && html`<p class="problem" role="alert">${why}</p>`}
    ${isTaken && html`<p class="warn">${t('teach.name_taken', { name: text })}</p>`}
    ${free.length > 0 && html`<p class="row"><span class="soft">${t('teach.has_pictures')}</span>${free.map((one) => html`<${Button} key=${one.category} onclick=${() => on(one.category)}>${one.category} (${count(one.train)})<//>`)}</p>`}
    <div class="row end"><button class="button main large" disabled=${!text || Boolean(why)}>${t('teach.next')}</button></div>
  </form>`;
}

/** How many good parts there are, and what so many can promise. */
function Good({ name, counts, session, onchange, to }) {
  const n = counts.train;
  const why = n < LEAST ? t('teach.at_least', { n: LEAST }) : '';
  return html`<div class="card"><p>${t('teach.good_about')}</p>
    <ul class="hints">${['same', 'clean', 'different'].map((one) => html`<li key=${one}>${t(`teach.good_${one}`)}</li>`)}</ul>
    <${Sending} large category=${name} split="train" session=${session} onchange=${onchange} />
    <div class="have" role="status"><b class="big">${count(n)}</b><div><progress max=${ENOUGH} value=${Math.min(n, ENOUGH)} aria-label=${t('teach.good_parts')}></progress>
      <p>${n === 0 ? t('teach.have_none', { n: ENOUGH }) : n < ENOUGH ? t('teach.have_few', { n: count(n), more: count(ENOUGH - n) }) : t('teach.have_enough')}
        ${n >= LEAST && html` ${t('teach.can_promise', { n: count(n), share: percent(atMost(n)) })}`}</p></div></div>
    <p class="promises soft">${t('teach.promises')} ${PROMISED.map((parts) => t('teach.promise_of', { n: count(parts), share: percent(atMost(parts)) })).join(' · ')}</p>
    <${Feet} onback=${() => to(1)} onnext=${() => to(3)} why=${why} /></div>`;
}

function Defects({ name, counts, session, onchange, to }) {
  return html`<div class="card"><p>${t('teach.defects_about')}</p>
    <${Sending} large category=${name} split="anomaly" session=${session} onchange=${onchange} />
    <p role="status" class="have"><b class="big">${count(counts.anomaly)}</b> <span>${t('teach.defects_have')}</span></p>
    <details class="fold"><summary>${t('teach.test_good')} (${count(counts.normal)})</summary><p class="soft">${t('teach.about_normal')}</p>
      <${Sending} category=${name} split="normal" session=${session} onchange=${onchange} /></details>
    <${Feet} onback=${() => to(2)} onnext=${() => to(4)} next=${counts.anomaly ? t('teach.next') : t('teach.no_defects')} /></div>`;
}

function LearnIt({ name, counts, models, noWorker, session, job, to }) {
  const learns = Boolean(job);
  return html`<div class="card">
    <p class="row counts"><span><b>${count(counts.train)}</b> ${t('teach.good_parts')}</span><span><b>${count(counts.anomaly)}</b> ${t('teach.defect_parts')}</span>${counts.normal > 0 && html`<span><b>${count(counts.normal)}</b> ${t('teach.test_parts')}</span>`}</p>
    <p>${t('teach.learn_about')}</p>
    ${learns
      ? html`<${Job} id=${job} session=${session} models=${models} onend=${(ended) => ended.state === 'succeeded' && go('teach', { new: name, step: 5, job }, true)} onagain=${(next) => to(4, { job: next })} />`
      : html`<${Learn} key=${name} only=${name} category=${name} counts=${counts} models=${models} noWorker=${noWorker} session=${session} onstart=${(begun) => to(4, { job: begun.id })} />`}
    <${Feet} onback=${() => to(learns ? 2 : 3, { job: null })} onnext=${() => to(5)} why=${t('teach.learn_first')} kind="" /></div>`;
}

function TryIt({ name, models, session, job, onchange, to }) {
  const { job: found } = useJob(job);
  const live = models.find((one) => one.name === name)?.live;
  const isLive = Boolean(live);
  return html`<div class="card">
    ${job ? html`<${Job} id=${job} session=${session} models=${models} onlive=${onchange} onagain=${(next) => to(4, { job: next })} />` : html`<p>${t(isLive ? 'teach.try_live' : 'teach.learn_first', { name })}</p>`}
    ${isLive && html`<p>${t('teach.try_about')}</p>`}
    <div class="row apart feet"><${Button} icon="back" onclick=${() => to(2, { job: null })}>${t('teach.more_pictures')}<//>
      ${isLive && (!found || hasEnded(found)) && html`<span class="row"><a class="button large" href="#/line">${t('teach.to_the_line')}</a>
        <a class="button main large" href=${`#/try?model=${encodeURIComponent(name)}`}>${t('teach.try_it')}</a></span>`}</div></div>`;
}
