// What is learned now, what was, and what is to be learned again and again.

import { ask, path, send } from '../api.js';
import { language, t } from '../words.js';
import {
  Button, Choice, Dialog, Field, Problem, Progress, Waiting, confirm, html, moment, useAction,
  useData, useEffect, useModels, useState, whyNot,
} from '../parts.js';

export function Jobs({ session }) {
  const { data, error, again } = useData('/jobs?limit=30', 2000);
  const under_way = data?.jobs.filter((one) => one.ended === null) ?? [];
  const done = data?.jobs.filter((one) => one.ended !== null) ?? [];
  return html`
    ${error && html`<${Problem} error=${error} again=${again} />`}
    ${data === null && !error && html`<${Waiting} />`}
    ${data && html`<h2>${t('system.jobs_now')}</h2>
      ${under_way.length === 0 && html`<p class="soft">${t('system.jobs_none')}</p>`}
      <ul class="jobs">${under_way.map((one) => html`<${Job} key=${one.id} job=${one} session=${session} again=${again} />`)}</ul>`}
    <${Schedules} session=${session} />
    ${data && html`<h2>${t('system.jobs_done')}</h2>
      ${done.length === 0 && html`<p class="soft">${t('system.jobs_none_yet')}</p>`}
      <ul class="jobs">${done.map((one) => html`<${Job} key=${one.id} job=${one} session=${session} again=${again} />`)}</ul>`}`;
}

function Job({ job, session, again }) {
  const [isOpen, setOpen] = useState(false);
  const [cancel, cancelling] = useAction(async () => {
    if (await confirm({ title: t('system.cancel_title', { model: job.model || job.id }), yes: t('system.cancel'), danger: true }) === null) return;
    await send('POST', `${path('jobs', job.id)}/cancel`);
    again();
  });
  const is_under_way = job.ended === null;
  const came = job.version && `${job.version}${job.outcome ? ` · ${t(`system.outcome_${job.outcome}`)}` : ''}`;
  return html`<li class="card">
    <div class="row apart">
      <span><b>${t(`system.kind_${job.kind}`)}</b> <span class="name">${job.model}</span> <span class=${`state ${job.state}`}>${t(`system.state_${job.state}`)}</span></span>
      <span class="row"><span class="soft nowrap">${moment(job.ended ?? job.created)}</span>
        <${Button} onclick=${() => setOpen(true)}>${t('system.log')}<//>
        ${is_under_way && html`<${Button} icon="close" busy=${cancelling} why=${whyNot(session, 'operator')} onclick=${cancel}>${t('system.cancel')}<//>`}</span>
    </div>
    ${is_under_way && job.progress && html`<${Progress} value=${job.progress.fraction}
      label=${job.progress.seconds_left == null ? t(`system.state_${job.state}`) : t('system.left', { time: lasting(job.progress.seconds_left) })} />`}
    ${came && html`<small class="soft">${came}</small>`}
    ${job.error && html`<p class="warn"><span>${job.error}</span></p>`}
    ${isOpen && html`<${Log} job=${job} onclose=${() => setOpen(false)} />`}</li>`;
}

function Log({ job, onclose }) {
  const [text, setText] = useState(null);
  const [problem, setProblem] = useState(null);
  useEffect(() => {
    ask(`${path('jobs', job.id)}/log`).then((answer) => answer.text()).then(setText, setProblem);
  }, []);
  return html`<${Dialog} title=${`${t('system.log')} · ${job.id}`} onclose=${onclose} wide>
    ${problem && html`<${Problem} error=${problem} />`}
    ${text === null ? !problem && html`<${Waiting} />` : html`<pre tabindex="0">${text || t('system.log_empty')}</pre>`}<//>`;
}

// ---- schedules ----------------------------------------------------------------------------------

function Schedules({ session }) {
  const { data, error, again } = useData('/schedules', 10_000);
  const [isOpen, setOpen] = useState(false);
  const why = whyNot(session, 'operator');
  return html`<div class="row apart head"><h2>${t('system.schedules')}</h2>
      <${Button} icon="add" why=${why} onclick=${() => setOpen(true)}>${t('system.add_schedule')}<//></div>
    ${error && html`<${Problem} error=${error} again=${again} />`}
    ${data?.schedules.length === 0 && html`<p class="soft">${t('system.schedules_none')}</p>`}
    <ul class="jobs">${data?.schedules.map((one) => html`<${Schedule} key=${one.name} one=${one} why=${why} again=${again} />`)}</ul>
    ${isOpen && html`<${NewSchedule} onclose=${() => { setOpen(false); again(); }} />`}`;
}

function Schedule({ one, why, again }) {
  const [remove, removing] = useAction(async () => {
    if (await confirm({ title: t('system.end_schedule', { name: one.name }), yes: t('system.remove'), danger: true }) === null) return;
    await send('DELETE', path('schedules', one.name));
    again();
  });
  const { model, category } = one.retrain;
  return html`<li class="card row apart">
    <span><b class="name">${one.name}</b> ${inWords(one.cron)} <span class="soft">${one.timezone}</span><br />
      <small class="soft">${t('system.learns', { model, category })}${one.last && ` · ${t('system.last_begun', { time: moment(one.last, false) })}`}</small></span>
    <${Button} icon="remove" busy=${removing} why=${why} onclick=${remove}>${t('system.remove')}<//></li>`;
}

/** A cron expression as people say it, where it is a usual one. */
function inWords(cron) {
  const found = /^(\d{1,2}) (\d{1,2}) \* \* (\*|1-5|[0-6])$/.exec(cron);
  if (!found) return html`<code>${cron}</code>`;
  const time = `${found[2].padStart(2, '0')}:${found[1].padStart(2, '0')}`;
  if (found[3] === '*') return t('system.daily_at', { time });
  if (found[3] === '1-5') return t('system.weekdays_at', { time });
  return t('system.weekly_at', { day: weekday(Number(found[3])), time });
}

/** Its name; 0 is Sunday. */
const weekday = (day) => new Date(Date.UTC(2024, 0, 7 + day)).toLocaleDateString(language(), { weekday: 'long', timeZone: 'UTC' });

function NewSchedule({ onclose }) {
  const { models } = useModels(0);
  const { data } = useData('/datasets');
  const categories = data?.datasets.map((one) => one.category) ?? [];
  const names = [...new Set([...(models ?? []).map((one) => one.name), ...categories])].sort();
  const [given, setGiven] = useState({
    name: 'nightly', model: null, category: null, rhythm: 'daily', day: '0', time: '02:00', cron: '0 2 * * *',
    timezone: Intl.DateTimeFormat().resolvedOptions().timeZone ?? 'UTC',
  });
  const set = (name) => (event) => setGiven((now) => ({ ...now, [name]: event.target.value }));
  const model = given.model ?? names[0] ?? '';
  const category = given.category ?? (categories.includes(model) ? model : categories[0] ?? '');
  const [hour, minute] = given.time.split(':').map(Number);
  const days = { daily: '*', weekdays: '1-5', weekly: given.day };
  const cron = given.rhythm === 'own' ? given.cron : `${minute} ${hour} * * ${days[given.rhythm]}`;
  const [add, adding] = useAction(async () => {
    try {
      await send('PUT', path('schedules', given.name), { cron, timezone: given.timezone, retrain: { model, category } });
      onclose();
    } catch (error) {
      setProblem(error);
    }
  });
  const [problem, setProblem] = useState(null);
  const options = (of) => of.map((one) => html`<option key=${one} value=${one}>${one}</option>`);
  return html`<${Dialog} title=${t('system.add_schedule')} onclose=${onclose}>
    <form onsubmit=${(event) => { event.preventDefault(); add(); }}>
      <${Field} label=${t('system.schedule_name')}><input value=${given.name} required pattern="[A-Za-z0-9_\\-]{1,64}" oninput=${set('name')} /><//>
      <div class="two"><${Field} label=${t('shell.model')}><select value=${model} onchange=${set('model')}>${options(names)}</select><//>
        <${Field} label=${t('system.category')}><select value=${category} onchange=${set('category')}>${options(categories)}</select><//></div>
      ${data && categories.length === 0 && html`<p class="warn"><span>${t('system.no_categories')}</span></p>`}
      <${Choice} label=${t('system.rhythm')} value=${given.rhythm} onchange=${(rhythm) => setGiven((now) => ({ ...now, rhythm }))}
        options=${['daily', 'weekdays', 'weekly', 'own'].map((one) => [one, t(`system.rhythm_${one}`)])} />
      <div class="two">
        ${given.rhythm === 'weekly' && html`<${Field} label=${t('system.weekday')}><select value=${given.day} onchange=${set('day')}>
          ${[0, 1, 2, 3, 4, 5, 6].map((day) => html`<option key=${day} value=${String(day)}>${weekday(day)}</option>`)}</select><//>`}
        ${given.rhythm === 'own'
          ? html`<${Field} label="cron" hint=${t('system.cron_hint')}><input value=${given.cron} required maxlength="100" oninput=${set('cron')} /><//>`
          : html`<${Field} label=${t('system.time')}><input type="time" value=${given.time} required onchange=${set('time')} /><//>`}
        <${Field} label=${t('system.timezone')}><input value=${given.timezone} required maxlength="100" oninput=${set('timezone')} /><//>
      </div>
      ${problem && html`<${Problem} error=${problem} />`}
      <div class="row end"><${Button} onclick=${onclose}>${t('shell.no')}<//>
        <button class="button main" disabled=${adding || !model || !category}>${t('system.add')}</button></div>
    </form><//>`;
}

/** Seconds in the largest unit that says enough. */
export function lasting(seconds) {
  const [most, unit] = [[90, 1, 'second'], [5400, 60, 'minute'], [172_800, 3600, 'hour'], [Infinity, 86_400, 'day']]
    .filter(([end]) => seconds < end).map(([, size, name]) => [seconds / size, name])[0];
  return new Intl.NumberFormat(language(), { style: 'unit', unit, unitDisplay: 'long', maximumFractionDigits: 0 }).format(most);
}
