// The line: the last parts as they come, the newest one large, and what to see to.

import { path, picture, query, send, get } from '../api.js';
import {
  Button, Dialog, Empty, Field, Icon, ModelPicker, Problem, ScoreBar, Sign, Thumbnail, Waiting,
  confirm, count, go, html, may, moment, number, percent, useAction, useEffect, useMemo, useRef, useState,
} from '../parts.js';
import { watchLine } from '../stream.js';
import { language, t } from '../words.js';

const MOST = 200; // parts that are known
const STRIP = 60; // of them, that are to be touched
const OTHERS_MS = 400; // no other part is large any sooner: nobody could read it
const FAST_MS = 1000; // the same of a line that is fast
const SPREAD_MS = 400; // within which tabs ask for a picture there, so that they do not at once
const REJECT_MS = 1500; // and after one that did not pass
const LOOKED_AT_MS = 20_000; // then it goes on by itself
const IN_MEMORY = 32; // of a model, pictures that the server has though nobody keeps them
const PAINTED_FROM = 0.4; // of a score; below, an overlay paints nothing
const OPACITY = 'kensa.opacity';

export default function Line({ query: asked, session }) {
  const line = useLine();
  const wall = asked.get('wall') === '1';
  const model = asked.get('model') ?? '';
  const parts = useMemo(() => line.parts.filter((one) => !model || one.model === model), [line.parts, model]);
  const [picked, setPicked] = useState(null);
  const newest = useHero(parts);
  useEffect(() => {
    if (!picked) return undefined;
    const timer = setTimeout(() => setPicked(null), LOOKED_AT_MS);
    return () => clearTimeout(timer);
  }, [picked]);
  useEffect(() => setPicked(null), [model]);
  const hero = picked ?? newest;
  const given = { line, parts, hero, model, session };
  return html`
    ${wall ? html`<${Wall} ...${given} hero=${newest} />` : html`<${Screen} ...${given} picked=${picked} onpick=${setPicked} />`}
    <p class="unseen" aria-live="assertive">${newest?.live && newest.verdict === 'anomaly' ? t('line.said', { part: called(newest) }) : ''}</p>`;
}

// ---- what is known ------------------------------------------------------------------------------

function useLine() {
  const [line, setLine] = useState({ parts: [], state: null, link: null });
  useEffect(() => watchLine((message) => setLine((now) => after(now, message))), []);
  return line;
}

function after(now, { parts, anew, state, link }) {
  if (parts) return { ...now, parts: (anew ? parts : [...now.parts, ...parts]).slice(-MOST) };
  return state ? { ...now, state } : { ...now, link };
}

/** The part that is large: the newest; but one that did not pass stays for a moment. */
function useHero(parts) {
  const [hero, setHero] = useState(null);
  const shown = useRef({ part: null, at: 0 });
  useEffect(() => {
    let timer = 0;
    const look = () => {
      const next = following(shown.current.part, parts);
      if (next === shown.current.part) return;
      const wait = shown.current.at + held(shown.current.part, next, parts) - Date.now();
      if (wait > 0) {
        timer = setTimeout(look, wait);
        return;
      }
      shown.current = { part: next, at: Date.now() };
      setHero(next);
      timer = setTimeout(look, OTHERS_MS);
    };
    look();
    return () => clearTimeout(timer);
  }, [parts]);
  return hero;
}

function following(part, parts) {
  if (!parts.includes(part)) return parts.at(-1) ?? null;
  const fresh = parts.slice(parts.indexOf(part) + 1);
  return fresh.findLast((one) => one.live && one.verdict !== 'normal') ?? fresh.at(-1) ?? part;
}

function held(part, next, parts) {
  if (!parts.includes(part)) return 0;
  if (part.verdict !== 'normal' && next.verdict === 'normal') return REJECT_MS;
  return isFast(parts) ? FAST_MS : OTHERS_MS;
}

/** Whether more than a part a second came just now. */
const isFast = (parts) => parts.length > 3 && Date.parse(parts.at(-1).time) - Date.parse(parts.at(-4).time) < 3000;

const called = (part) => part.part ?? part.id.slice(0, 8);

// ---- the page -----------------------------------------------------------------------------------

function Screen({ line, parts, hero, model, session, picked, onpick }) {
  const { state, link } = line;
  const models = state?.models ?? [];
  const chosen = models.find((one) => one.name === model) ?? (models.length === 1 ? models[0] : null);
  return html`
    <div class="head">
      <h1>${t('pages.line')}</h1>
      <${Link} link=${link} />
      ${(models.length > 1 || model) && html`<${ModelPicker} models=${models} value=${model} all
        onchange=${(name) => go('line', { model: name }, true)} />`}
      <span class="grow"></span>
      ${chosen && html`<${Challenge} model=${chosen} />`}
      ${state && html`<${Button} icon="full" onclick=${() => toWall(model)}>${t('line.wall')}<//>`}
    </div>
    <${Warnings} line=${line} parts=${parts} models=${models} model=${model} session=${session} />
    ${!state && (link === 'away' || link === 'refused' ? '' : html`<${Waiting} />`)}
    ${state && !hero && html`<${Nothing} models=${models} session=${session} />`}
    ${hero && html`
      <${Hero} part=${hero} parts=${parts} models=${models} away=${link !== 'open'} />
      <${Strip} parts=${parts} hero=${hero} picked=${picked} onpick=${onpick} />`}
    ${state && models.length > 0 && html`<div class="below">
      <${Minutes} models=${models.filter((one) => !model || one.name === model)} />
      <${Models} models=${models.filter((one) => !model || one.name === model)} />
    </div>`}`;
}

/** Whether what is seen is of now. */
function Link({ link }) {
  if (link === null) return null;
  const words = { open: t('line.open'), away: t('line.away'), refused: t('line.refused') };
  return html`<span class=${`link ${link}`} role="status"><i aria-hidden="true"></i>${words[link]}</span>`;
}

function Nothing({ models, session }) {
  if (!models.length) {
    return html`<${Empty} title=${t('line.no_model')}><p>${t('line.no_model_why')}</p>
      <p><a class="button main large" href="#/teach">${t('line.to_teach')}</a></p><//>`;
  }
  const key = session.keys ? " -H 'X-API-Key: KEY'" : '';
  const name = models.length > 1 ? '&model=NAME' : '';
  return html`<${Empty} title=${t('line.no_part')}><p>${t('line.no_part_why')}</p>
    <pre>${`curl '${location.origin}/infer?part=A-1${name}'${key} -F file=@part.jpg`}</pre>
    <p><a class="button" href="#/try">${t('line.to_try')}</a></p><//>`;
}

// ---- one part, large ----------------------------------------------------------------------------

function Hero({ part, parts, models, away }) {
  const [opacity, setOpacity] = useState(() => Number(localStorage.getItem(OPACITY) ?? 1));
  const of = models.find((one) => one.name === part.model);
  const isPainted = paints(part);
  const change = (event) => {
    setOpacity(event.target.value / 100);
    localStorage.setItem(OPACITY, event.target.value / 100);
  };
  return html`<section class=${`hero ${part.verdict} ${away ? 'old' : ''}`} aria-label=${t('line.part')}>
    <p class="big"><${Sign} verdict=${part.verdict} />${t(`verdict.${part.verdict}`)}</p>
    <${Picture} part=${part} parts=${parts} opacity=${opacity} />
    <div class="about">
      ${part.code && html`<p class="why">${t(`codes.${part.code}`)}</p>`}
      <p class="called">${part.part ?? html`<span class="soft">${t('line.no_name')}</span>`}</p>
      ${part.score != null && html`<div class="scores"><b>${number(part.score, 3)}</b>
        <span>${t('line.limit', { limit: number(part.threshold, 3) })}</span></div>
        <${ScoreBar} score=${part.score} threshold=${part.threshold} />`}
      <dl>
        <div><dt>${t('line.when')}</dt><dd>${moment(part.time)}</dd></div>
        ${part.timing && html`<div><dt>${t('line.took')}</dt><dd>${number(part.timing.total_ms, 0)} ms</dd></div>`}
        ${part.model && html`<div><dt>${t('shell.model')}</dt><dd><a href=${`#/model${query({ name: part.model })}`}>${part.model}</a></dd></div>`}
        ${part.version && html`<div><dt>${t('line.version')}</dt><dd>${part.version}${of?.version && of.version !== part.version && html` <span class="soft">${t('line.not_live')}</span>`}</dd></div>`}
        ${part.views && html`<div><dt>${t('line.views')}</dt><dd>${t('line.decided_by', { view: part.views.decided_by, of: part.views.of })}</dd></div>`}
      </dl>
      ${isPainted && html`<${Field} label=${t('shell.heat_map')}><input type="range" min="0" max="100" value=${opacity * 100} oninput=${change} /><//>`}
    </div>
  </section>`;
}

const paints = (part) => part.score != null && (part.verdict === 'anomaly' || part.score >= PAINTED_FROM);

const fetched = new Set(); // pictures that came while the server had them

/** Where a part's picture may come from, and the painted one: each a list, the first comes first. */
function sources(part, parts) {
  const found = { plain: [], painted: [] };
  if (part.verdict === 'none') return found;
  const add = (url) => {
    found.plain.push(url({ paint: 'false' }));
    if (paints(part)) found.painted.push(url({}));
  };
  const ofMemory = (more) => `/line/picture${query({ model: part.model, id: part.id, ...more })}`;
  const last = parts.filter((one) => one.model === part.model && one.verdict !== 'none').slice(-IN_MEMORY);
  if (part.in_memory && (last.includes(part) || fetched.has(ofMemory({ paint: 'false' })))) add(ofMemory);
  if (part.has_picture) add((more) => `${path('decisions', part.id)}/overlay${query({ number: part.number, ...more })}`);
  return found;
}

/** The first of these that there is: `[its address, a blob: URL]`. */
async function firstOf([first, ...others]) {
  try {
    return [first, await picture(first)];
  } catch (error) {
    if (!others.length) throw error;
    return firstOf(others);
  }
}

/** The picture of a part, and over it what is anomalous. The one before fades until it is there. */
function Picture({ part, parts, opacity }) {
  const [shown, setShown] = useState({ part: null, plain: null, painted: null, error: null });
  useEffect(() => {
    let gone = false;
    const from = sources(part, parts);
    const is = (more) => gone || setShown((now) => ({ ...(now.part === part ? now : { plain: null, painted: null, error: null }), part, ...more }));
    if (!from.plain.length) {
      is({ error: t('shell.no_picture') });
      return undefined;
    }
    const timer = setTimeout(() => {
      firstOf(from.plain).then(
        ([url, plain]) => { fetched.add(url); is({ plain }); },
        () => is({ error: t('shell.no_picture') }),
      );
      if (from.painted.length) firstOf(from.painted).then(([, painted]) => is({ painted }), () => {});
    }, isFast(parts) && part.verdict === 'normal' ? Math.random() * SPREAD_MS : 0);
    return () => { gone = true; clearTimeout(timer); };
  }, [part.id, part.number]);
  const isOurs = shown.part?.id === part.id && shown.part.number === part.number;
  return html`<div class=${`picture ${isOurs ? '' : 'before'}`}>
    ${shown.plain && html`<img src=${shown.plain} alt=${t('line.picture', { part: called(part) })} />`}
    ${isOurs && shown.plain && shown.painted && html`<img class="over" src=${shown.painted} alt="" style=${{ opacity }} />`}
    ${isOurs && shown.error && html`<p class="soft">${shown.error}</p>`}
  </div>`;
}

// ---- the last parts -----------------------------------------------------------------------------

function Strip({ parts, hero, picked, onpick }) {
  const last = parts.slice(-STRIP).reverse();
  return html`<section class="last">
    <div class="row apart"><h2>${t('line.last')}</h2>
      ${picked && html`<${Button} kind="main" icon="play" onclick=${() => onpick(null)}>${t('line.go_on')}<//>`}</div>
    <ol class="strip" tabindex="0" aria-label=${t('line.last')}>${last.map((one) => html`<li key=${one.id + one.number}>
      <button type="button" class=${one.verdict} aria-pressed=${one === hero ? 'true' : 'false'} onclick=${() => onpick(one)}
        aria-label=${`${t(`verdict.${one.verdict}`)}, ${called(one)}, ${moment(one.time)}`}>
        <${Small} part=${one} />
        <b><${Sign} verdict=${one.verdict} />${t(`verdict.${one.verdict}`)}</b>
        <span class="name">${called(one)}</span><span class="soft">${moment(one.time)}</span>
      </button></li>`)}</ol>
  </section>`;
}

/** Those that did not pass have their picture: of the others there are too many to ask for. */
const Small = ({ part }) => (part.has_picture && (part.verdict === 'anomaly' || part.verdict === 'unusable')
  ? html`<${Thumbnail} decision=${part} />`
  : html`<span class="thumbnail none">${part.score != null && html`<${ScoreBar} score=${part.score} threshold=${part.threshold} />`}</span>`);

/** How many came in each of the last minutes, and how many of them did not pass. */
function Minutes({ models }) {
  const [first] = models;
  if (!first) return null;
  const summed = (key) => first.minutes[key].map((_, minute) => models.reduce((sum, one) => sum + one.minutes[key][minute], 0));
  const [parts, rejects, unusable] = [summed('parts'), summed('rejects'), summed('unusable')];
  const total = (values) => values.reduce((sum, one) => sum + one, 0);
  const [all, bad] = [total(parts), total(rejects)];
  const most = Math.max(4, ...parts);
  const [wide, high, top] = [20, 90, 8];
  const y = (value) => top + high - (value / most) * high;
  const said = t('line.rate_said', { parts: count(all), rejects: count(bad), minutes: parts.length });
  const clock = (minute) => new Date((first.minutes.first + minute) * 60_000).toLocaleTimeString(language(), { hour: '2-digit', minute: '2-digit', hourCycle: 'h23' });
  return html`<section class="card minutes"><div class="row apart"><h2>${t('line.rate', { minutes: parts.length })}</h2>
      <p class="rate"><b>${all ? percent(bad / all) : '–'}</b></p></div>
    <p class="soft">${said}${total(unusable) > 0 && ` · ${t('line.unusable', { count: count(total(unusable)) })}`}</p>
    <svg viewBox=${`0 0 ${parts.length * wide} ${high + top + 22}`} role="img" aria-label=${said}>
      <line x1="0" x2=${parts.length * wide} y1=${y(0)} y2=${y(0)} class="ground" />
      ${parts.map((value, minute) => html`<g key=${minute}>
        <rect x=${minute * wide + 3} width=${wide - 6} y=${y(value)} height=${y(0) - y(value)} class="all" />
        <rect x=${minute * wide + 3} width=${wide - 6} y=${y(rejects[minute])} height=${y(0) - y(rejects[minute])} class="bad" /></g>`)}
      ${[0, 10, 20, parts.length - 1].map((minute) => html`<text key=${minute} x=${minute === 0 ? 0 : (minute + 0.5) * wide} y=${high + top + 17}
        text-anchor=${minute === 0 ? 'start' : minute === parts.length - 1 ? 'end' : 'middle'}>${clock(minute)}</text>`)}
    </svg></section>`;
}

function Models({ models }) {
  return html`<section class="card models"><h2>${t('line.judging')}</h2><ul>${models.map((one) => html`<li key=${one.name}>
    <a href=${`#/model${query({ name: one.name })}`}>${one.name}</a>
    <span>${one.version ?? t('line.no_version')}</span>
    <span class=${`state ${one.released && one.version ? 'good' : 'bad'}`}><${Icon} name=${one.released && one.version ? 'good' : 'warning'} />${one.released ? (one.version ? t('line.judges') : t('line.judges_not')) : t('line.closed')}</span>
  </li>`)}</ul></section>`;
}

// ---- what to see to -----------------------------------------------------------------------------

const RECENT = 20; // parts, of which a camera is judged
const OFTEN = 3;

function Warnings({ line, parts, models, model, session }) {
  const shown = models.filter((one) => !model || one.name === model);
  const degraded = line.state?.degraded ?? [];
  const known = new Set(shown.flatMap((one) => [one.problem, ...one.drift].filter(Boolean)));
  const rest = degraded.filter((one) => ![...known].some((other) => one.includes(other)) && !isSaidBy(shown, one));
  return html`<div class="warnings">
    ${line.link === 'away' && html`<div class="warn" role="status"><${Icon} name="warning" /><p><b>${t('line.away')}</b> ${t('line.away_why')}</p></div>`}
    ${shown.filter((one) => !one.released).map((one) => html`<${Closed} key=${one.name} model=${one} why=${degraded.find((other) => isSaidBy([one], other))} session=${session} />`)}
    ${shown.filter((one) => one.problem).map((one) => html`<${Warning} key=${`p${one.name}`} what=${t('line.stands_in', { model: one.name })} why=${one.problem} />`)}
    ${shown.filter((one) => one.drift.length).map((one) => html`<${Warning} key=${`d${one.name}`} what=${t('line.drifts', { model: one.name })} why=${one.drift.join('; ')} />`)}
    ${cameras(parts).map(([code, times]) => html`<${Warning} key=${code} what=${t('line.camera', { times, of: Math.min(RECENT, parts.length) })} why=${t(`codes.${code}`)} />`)}
    ${rest.length > 0 && html`<details class="warn more"><summary><${Icon} name="warning" />${t('line.degraded', { count: rest.length })}</summary>
      <ul>${rest.map((one) => html`<li key=${one}>${one}</li>`)}</ul></details>`}
  </div>`;
}

const isSaidBy = (models, sentence) => models.some((one) => !one.released && sentence.startsWith(`${one.name} is not released`));

const Warning = ({ what, why }) => html`<div class="warn"><${Icon} name="warning" /><p><b>${what}</b> ${why}</p></div>`;

/** What camera faults came often among the last parts: `[code, times]`. */
function cameras(parts) {
  const codes = parts.slice(-RECENT).map((one) => one.code).filter((code) => code?.startsWith('camera_'));
  return [...new Set(codes)].map((code) => [code, codes.filter((one) => one === code).length]).filter(([, times]) => times >= OFTEN);
}

function Closed({ model, why, session }) {
  const [release, busy] = useAction(async () => {
    const reason = await confirm({ title: t('line.release', { model: model.name }), body: html`<p>${t('line.release_why')}</p>`, yes: t('line.release_yes'), reason: 'must', danger: true });
    if (reason !== null) await send('POST', `${path('models', model.name)}/release`, { reason });
  });
  return html`<div class="problem" role="alert"><${Icon} name="warning" /><p><b>${t('line.closed_long', { model: model.name })}</b> ${why ?? ''}</p>
    ${may(session, 'operator') && html`<${Button} busy=${busy} onclick=${release}>${t('line.release_yes')}<//>`}</div>`;
}

/** Judge the known pictures now, as a PLC does at the beginning of a shift. */
function Challenge({ model }) {
  const [shown, setShown] = useState(null); // {pictures, since}, then the outcome or why there is none
  const run = async () => {
    const known = { of: null, since: Date.now() };
    setShown(known);
    try {
      const { pictures } = await get(`${path('models', model.name)}/challenges`);
      setShown({ ...known, of: pictures.length });
      setShown({ outcome: await send('POST', `${path('models', model.name)}/challenge`) });
    } catch (error) {
      setShown({ error });
    }
  };
  return html`<${Button} icon="play" busy=${shown?.since != null} why=${model.has_challenge ? '' : t('line.no_challenge')} onclick=${run}>${t('line.challenge')}<//>
    ${shown && html`<${Dialog} title=${t('line.challenge_of', { model: model.name })} onclose=${() => setShown(null)}><${Outcome} ...${shown} model=${model} /><//>`}`;
}

function Outcome({ of, since, outcome, error, model }) {
  const [, again] = useState(0);
  useEffect(() => {
    if (since == null) return undefined;
    const timer = setInterval(() => again((turn) => turn + 1), 500);
    return () => clearInterval(timer);
  }, [since]);
  if (error) return html`<${Problem} error=${error} />`;
  if (!outcome) {
    const seconds = number((Date.now() - since) / 1000, 0);
    return html`<div class="progress"><progress aria-label=${t('line.judging_known')}></progress>
      <span>${of == null ? t('line.judging_known') : t('line.judging_of', { count: of })} <span class="soft">${seconds} s</span></span></div>`;
  }
  const wrong = outcome.pictures.filter((one) => !one.right);
  return html`<p class=${`outcome ${outcome.passed ? 'good' : 'bad'}`} role="status"><${Icon} name=${outcome.passed ? 'good' : 'defect'} />
      ${outcome.passed ? t('line.passed') : t('line.failed')} <span>${t('line.right_of', { right: outcome.right, of: outcome.of })}</span></p>
    ${!outcome.passed && html`<p>${t('line.failed_why')}</p>`}
    <ul class="wrong">${wrong.map((one) => html`<li key=${one.name}><${Known} model=${model.name} known=${one} />
      <div><b>${one.name}</b><p>${one.expected === 'good' ? t('line.good_as_bad') : t('line.bad_as_good')}</p>
      <p class="soft">${one.problem ?? t('shell.score', { score: number(one.score, 3), limit: number(one.threshold, 3) })}</p></div></li>`)}</ul>`;
}

function Known({ model, known }) {
  const [url, setUrl] = useState(null);
  useEffect(() => {
    let gone = false;
    picture(path('models', model, 'challenges', known.sha256)).then((found) => gone || setUrl(found), () => {});
    return () => { gone = true; };
  }, [known.sha256]);
  return html`<span class="thumbnail photo">${url && html`<img src=${url} alt="" />`}</span>`;
}

// ---- on the wall --------------------------------------------------------------------------------

function toWall(model) {
  document.documentElement.requestFullscreen?.().catch(() => {}); // where the browser lets us
  go('line', { wall: 1, model });
}

function fromWall(model) {
  if (document.fullscreenElement) document.exitFullscreen();
  go('line', { model });
}

/** To be read from five metres: one word, one colour, one sign. Escape leaves it. */
function Wall({ line, parts, hero, model }) {
  const [touched, setTouched] = useState(false);
  useEffect(() => {
    const key = (event) => { if (event.key === 'Escape') fromWall(model); };
    const full = () => { if (!document.fullscreenElement) fromWall(model); };
    addEventListener('keydown', key);
    document.addEventListener('fullscreenchange', full);
    return () => {
      removeEventListener('keydown', key);
      document.removeEventListener('fullscreenchange', full);
    };
  }, [model]);
  useEffect(stayOn, []);
  useEffect(() => {
    if (!touched) return undefined;
    const timer = setTimeout(() => setTouched(false), 4000);
    return () => clearTimeout(timer);
  }, [touched]);
  const isOpen = line.link === 'open';
  const shown = isOpen ? hero : null;
  const closed = isOpen ? (line.state?.models ?? []).filter((one) => (!model || one.name === model) && !one.released) : [];
  return html`<div class=${`onwall ${shown?.verdict ?? 'away'}`} onclick=${() => setTouched(true)}>
    <h1 class="unseen">${t('pages.line')}</h1>
    ${shown && html`<p class="word"><${Sign} verdict=${shown.verdict} /><span>${t(`verdict.${shown.verdict}`)}</span></p>
      <p class="below-word">${shown.code ? t(`codes.${shown.code}`) : ''} <b>${called(shown)}</b></p>
      ${shown.verdict === 'anomaly' && html`<div class="beside"><${Picture} part=${shown} parts=${parts} opacity=${1} /></div>`}
      ${closed.length > 0 && html`<p class="notice"><${Icon} name="warning" />${t('line.closed_long', { model: closed[0].name })}</p>`}
      <p class="clock">${shown.model} · ${moment(shown.time)}</p>`}
    ${!shown && html`<p class="word small">${!isOpen && line.link !== null ? t('line.away') : t('line.waits')}</p>`}
    ${touched && html`<${Button} icon="close" onclick=${() => fromWall(model)}>${t('line.leave_wall')}<//>`}
  </div>`;
}

/** Keep the screen from going dark, where the browser lets us. */
function stayOn() {
  let lock = null;
  let gone = false;
  navigator.wakeLock?.request('screen').then(
    (held) => { lock = held; if (gone) lock.release(); },
    () => {}, // a page that came without TLS may not
  );
  return () => { gone = true; lock?.release(); };
}
