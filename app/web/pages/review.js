// Review: rejects and parts near the limit, to be marked with one touch each.

import { get, path, picture, query, send } from '../api.js';
import { t } from '../words.js';
import {
  Button, Choice, Empty, Icon, Layers, Mark, ModelPicker, Problem, ScoreBar, Thumbnail, Verdict,
  Waiting, go, html, may, moment, number, pictureOf, sentence, toast, useData, useEffect, useKeys,
  useLayoutEffect, useMemo, useModels, useRef, useState, whyNot,
} from '../parts.js';

const AT_ONCE = 200; // decisions that are looked through together
const FEW_LEFT = 20; // of them, before more are asked for
const EVERY_MS = 20_000;
const NEAR = 0.1; // below the limit; as KENSA_RECORD_NEAR keeps pictures, where nobody has set it
const AHEAD = 3; // pictures that are here before they are wanted
const LAST = 8; // marks that are shown to be taken back
const KINDS = 20; // of defects that have a button; any other is typed
const DIGITS = 9; // of them have a key

export default function Review({ query: asked, session }) {
  const { models, error, again } = useModels(20_000);
  const names = (models ?? []).map(({ name }) => name);
  const model = names.includes(asked.get('model')) ? asked.get('model') : names[0];
  const what = asked.get('what') === 'near' ? 'near' : 'rejects';
  const order = asked.get('order') === 'score' ? 'score' : 'newest';
  const show = (more) => go('review', { model, what, order, ...more }, true);
  if (models === null) return html`<h1>${t('review.title')}</h1>${error ? html`<${Problem} error=${error} again=${again} />` : html`<${Waiting} />`}`;
  if (!names.length) return html`<h1>${t('review.title')}</h1><${Empty} title=${t('review.no_model')}><p>${t('review.no_model_hint')}</p><//>`;
  return html`
    <div class="row apart top"><h1>${t('review.title')}</h1>
      <div class="row">
        ${names.length > 1 && html`<${ModelPicker} models=${models} value=${model} onchange=${(name) => show({ model: name })} />`}
        <${Choice} label=${t('review.what')} value=${what} onchange=${(one) => show({ what: one })}
          options=${[['rejects', t('review.rejects')], ['near', t('review.near')]]} />
        <${Choice} label=${t('review.order')} value=${order} onchange=${(one) => show({ order: one })}
          options=${[['newest', t('review.newest')], ['score', t('review.highest')]]} />
      </div></div>
    <${Pile} key=${`${model} ${what}`} model=${model} what=${what} order=${order} session=${session} />`;
}

// ---- what waits, and what was said of it --------------------------------------------------------

/** What is asked of the record; null while the limit is not known yet. */
function useAsked(model, what) {
  const { data: limit, error, again } = useData(what === 'near' ? path('models', model, 'threshold') : null);
  if (what === 'rejects') return { from: `/decisions${query({ model, verdict: 'anomaly', label: 'none', limit: AT_ONCE })}`, error: null, again };
  if (limit === null) return { from: null, error, again };
  const lowest = Math.max(0, limit.threshold - NEAR);
  return { from: `/decisions${query({ model, verdict: 'normal', label: 'none', min_score: lowest, limit: AT_ONCE })}`, error: null, again };
}

/** Of the lines about a decision those that mark it, the last one first. */
const labelsOf = ({ history }) => history.filter(({ what }) => what === 'label');

/** The last one of them; null where the server does not say. */
const lastOf = ({ id, number: which }) => get(`${path('decisions', id)}${query({ number: which })}`).then((one) => labelsOf(one)[0] ?? null, () => null);

/** The decisions that wait, in their order, and what marks them and takes that back.
 *
 * A mark counts here at once, and is told to the server behind it: one after the other, in order.
 */
function usePile(model, what, order) {
  const { from, error: noLimit, again: askLimit } = useAsked(model, what);
  const { data, error, again } = useData(from, EVERY_MS);
  const [marks, setMarks] = useState([]); // {decision, label, defect}, the last one at the end
  const [back, setBack] = useState([]); // decisions whose marks were taken back
  const [told, setTold] = useState(0); // how often the server has heard of one
  const telling = useRef(Promise.resolve());
  const waiting = useMemo(() => {
    const gone = new Set(marks.map(({ decision }) => decision.number));
    const here = new Map([...back, ...(data?.decisions ?? [])].map((one) => [one.number, one]));
    const by = order === 'score' ? (one) => one.score ?? 0 : (one) => Date.parse(one.time);
    return [...here.values()].filter((one) => !gone.has(one.number)).sort((a, b) => by(b) - by(a) || b.number - a.number);
  }, [data, marks, back, order]);
  const hasMore = data?.next != null;
  useEffect(() => { if (hasMore && waiting.length < FEW_LEFT) telling.current.then(again); }, [hasMore, waiting.length < FEW_LEFT]);

  const tell = (work, otherwise) => {
    telling.current = telling.current.then(work).catch(async (problem) => toast(await otherwise(problem) ?? sentence(problem), 'bad'))
      .then(() => setTold((now) => now + 1));
  };
  const drop = (mark) => {
    setMarks((now) => now.filter((one) => one !== mark));
    setBack((now) => [mark.decision, ...now.filter(({ number: other }) => other !== mark.decision.number)]);
  };
  const put = (mark) => setMarks((now) => [...now, mark]);
  const of = ({ decision }, more) => `${path('decisions', decision.id, 'label')}${query({ number: decision.number, ...more })}`;
  const lost = ({ decision }, last) => { // somebody else has the last word
    setBack((now) => now.filter(({ number: other }) => other !== decision.number));
    again();
    return t('review.meanwhile', { part: nameOf(decision), who: last.key ?? t('review.nobody'), label: last.details.label ? wordsOf(last.details.label, last.details.defect) : t('review.withdrawn') });
  };
  return {
    waiting, marks, told, hasMore, error: error ?? noLimit, again: noLimit ? askLimit : again, isHere: data !== null,
    mark: (decision, label, defect = '') => {
      const mark = { decision, label, defect, before: null, line: null }; // line: of the trail, once it is there
      put(mark);
      tell(async () => {
        const [own, before] = labelsOf(await send('POST', of(mark), { label, defect }));
        mark.line = own.number;
        mark.before = before?.details; // somebody else may have said something meanwhile
      }, () => drop(mark));
    },
    takeBack: (mark) => {
      drop(mark);
      tell(async () => {
        if (mark.line === null) return; // the server did not take it
        const { label, defect } = mark.before ?? {};
        await (label ? send('POST', of(mark), { label, defect, after: mark.line }) : send('DELETE', of(mark, { after: mark.line })));
      }, async (problem) => {
        const last = problem.code === 'conflict' ? await lastOf(mark.decision) : null;
        if (last && last.number !== mark.line) return lost(mark, last);
        return put(mark);
      });
    },
  };
}

/** How many are marked, and which kinds of defects there are: in the record, and since. */
function useMarked(model, marks) {
  const said = (label) => `/decisions${query({ model, label, limit: AT_ONCE })}`;
  const { data: good } = useData(said('good'));
  const { data: defects } = useData(said('defect'));
  const since = (label) => marks.filter((one) => one.label === label);
  const of = (data, label) => {
    const known = new Set((data?.decisions ?? []).map((one) => one.number));
    const more = since(label).filter(({ decision }) => !known.has(decision.number)).length;
    return { n: known.size + more, more: data?.next != null };
  };
  const kinds = new Map();
  for (const { defect } of [...since('defect'), ...(defects?.decisions ?? [])]) {
    if (defect) kinds.set(defect, (kinds.get(defect) ?? 0) + 1);
  }
  const often = [...kinds].sort(([a, n], [b, m]) => m - n || a.localeCompare(b)).slice(0, KINDS).map(([kind]) => kind);
  return { good: of(good, 'good'), defects: of(defects, 'defect'), kinds: often };
}

const several = (n, more) => (more ? `${n}+` : String(n));

// ---- the pile -----------------------------------------------------------------------------------

function Pile({ model, what, order, session }) {
  const pile = usePile(model, what, order);
  const { good, defects, kinds } = useMarked(model, pile.marks);
  const [number_, setNumber] = useState(null); // of the one that is shown
  const [all, setAll] = useState(false); // also those without a picture
  const [heard, setHeard] = useState(''); // for who does not see the page
  const why = whyNot(session, 'operator');
  const list = all ? pile.waiting : pile.waiting.filter((one) => one.has_picture);
  const place = Math.max(0, list.findIndex((one) => one.number === number_));
  const one = list[place] ?? null;
  const without = pile.waiting.length - list.length;
  const left = (n) => t('review.left', { n: several(n, pile.hasMore) });
  useEffect(() => { if (one && one.number !== number_) setNumber(one.number); }, [one?.number]);
  useEffect(() => setNumber(null), [order]); // another order has another first one
  useAhead(list, place);

  const step = (by) => setNumber((list[place + by] ?? one)?.number ?? null);
  const mark = (label, defect = '') => {
    if (!one || why) return;
    setNumber((list[place + 1] ?? list[place - 1])?.number ?? null);
    pile.mark(one, label, defect);
    setHeard(t('review.marked_as', { part: nameOf(one), label: wordsOf(label, defect), left: left(list.length - 1) }));
  };
  const takeBack = (past) => {
    if (!past || why) return;
    pile.takeBack(past);
    setNumber(past.decision.number);
    setHeard(t('review.taken_back', { part: nameOf(past.decision) }));
  };
  const undo = () => takeBack(pile.marks.at(-1));
  const digits = kinds.slice(0, DIGITS).map((kind, n) => [n + 1, () => mark('defect', kind)]);
  useKeys({
    g: () => mark('good'), d: () => mark('defect'), u: () => mark('unusable'), z: undo,
    ArrowRight: () => step(1), ArrowLeft: () => step(-1), ...Object.fromEntries(digits),
  });

  return html`<p class="heard" role="status">${heard}</p>
    ${pile.error && html`<${Problem} error=${pile.error} again=${pile.again} />`}
    ${why && html`<p class="warn"><${Icon} name="warning" /><span>${why}</span></p>`}
    <div class="desk">
      ${one ? html`<${One} decision=${one} step=${step} place=${place} count=${list.length}
          words=${left(list.length)} mark=${mark} undo=${undo} kinds=${kinds} why=${why} canUndo=${pile.marks.length > 0} told=${pile.told} />`
    : html`<section class="sight">${!pile.isHere && !pile.error ? html`<${Waiting} />` : html`<${Empty} title=${t('review.done')}>
          <p>${t(`review.done_${what}`, { model })}</p>
          ${pile.marks.length > 0 && html`<p><${Button} icon="undo" why=${why} onclick=${undo}>${t('review.undo')}<//></p>`}<//>`}</section>`}
      <aside class="beside">
        ${without > 0 && html`<p class="soft">${t('review.no_pictures', { n: without })} <${Button} onclick=${() => setAll(true)}>${t('review.show_them')}<//></p>`}
        ${pile.marks.length > 0 && html`<${Last} marks=${pile.marks} takeBack=${takeBack} why=${why} />`}
        <${Lesson} model=${model} good=${good} defects=${defects} />
        ${may(session, 'operator') && html`<${Who} />`}
        <p class="keys soft">${t('review.keys')}</p>
      </aside></div>`;
}

/** Ask for the pictures that come next, and the one before, so that they are here when wanted. */
function useAhead(list, place) {
  const next = [...list.slice(place + 1, place + 1 + AHEAD), ...list.slice(Math.max(0, place - 1), place)];
  useEffect(() => {
    for (const one of next.filter(({ has_picture: has }) => has)) {
      for (const painted of [false, true]) picture(pictureOf(one, undefined, painted)).catch(() => {});
    }
  }, [next.map((one) => one.number).join()]);
}

const scoreOf = ({ score, threshold }) => t('shell.score', { score: number(score, 3), limit: number(threshold, 3) });
const nameOf = (decision) => decision.part ?? decision.id;
const wordsOf = (label, defect) => (defect ? `${t(`label.${label}`)}: ${defect}` : t(`label.${label}`));

// ---- one of them --------------------------------------------------------------------------------

function One({ decision, step, place, count, words, mark, undo, kinds, why, canUndo, told }) {
  const [opacity, setOpacity] = useOpacity();
  const [chosen, setChosen] = useState({ number: null, view: '' });
  const view = chosen.number === decision.number ? chosen.view : ''; // that of the worst, each time
  const setView = (name) => setChosen({ number: decision.number, view: name });
  useKeys({ h: () => setOpacity(opacity ? 0 : 1) });
  const of = decision.views?.views.find((other) => other.view === (view || decision.views.decided_by)) ?? decision;
  return html`<section class="sight">
      <div class="row apart"><b class="left">${words}</b>
        <div class="row steps">
          <${Button} data-repeats icon="back" aria-label=${t('review.before')} disabled=${place === 0} onclick=${() => step(-1)} />
          <${Button} data-repeats icon="next" aria-label=${t('review.later')} disabled=${place === count - 1} onclick=${() => step(1)} /></div></div>
      <p class="brief" aria-hidden="true"><${Verdict} verdict=${of.verdict} /><span class="name">${nameOf(decision)}</span><span class="soft">${scoreOf(of)}</span></p>
      <div class="picture"><${Layers} decision=${decision} view=${view} opacity=${opacity} alt=${nameOf(decision)} /></div>
      ${decision.views && html`<${Views} decision=${decision} view=${view} setView=${setView} />`}
      ${decision.has_picture && html`<label class="opacity"><span>${t('shell.heat_map')}</span>
        <input type="range" min="0" max="100" value=${Math.round(opacity * 100)} oninput=${(event) => setOpacity(event.target.value / 100)} /></label>`}
    </section>
    <section class="ruling">
      <div class="about">
        <${Verdict} verdict=${of.verdict} code=${of.code} size="big" />
        <${Mark} label=${decision.label} defect=${decision.defect} />
        <p class="score">${scoreOf(of)}</p>
        <${ScoreBar} score=${of.score} threshold=${of.threshold} />
        <dl><dt>${t('review.part')}</dt><dd><a href=${`#/find${query({ id: decision.id, number: decision.number })}`}>${decision.part ?? html`<i>${t('review.no_name')}</i>`}</a></dd>
          <dt>${t('review.time')}</dt><dd>${moment(decision.time)}</dd>
          <dt>${t('review.version')}</dt><dd>${of.version ?? '–'}</dd></dl>
        <${History} decision=${decision} told=${told} />
      </div>
      <div class="marks">
        <${Button} kind="large good" icon="good" aria-keyshortcuts="G" why=${why} onclick=${() => mark('good')}>${t('review.good')}<kbd aria-hidden="true">G</kbd><//>
        <${Button} kind="large bad" icon="defect" aria-keyshortcuts="D" why=${why} onclick=${() => mark('defect')}>${t('review.defect')}<kbd aria-hidden="true">D</kbd><//>
        <${Button} kind="large" icon="unusable" aria-keyshortcuts="U" why=${why} onclick=${() => mark('unusable')}>${t('review.unusable')}<kbd aria-hidden="true">U</kbd><//>
        <${Button} kind="large" icon="undo" aria-keyshortcuts="Z" why=${why} disabled=${!canUndo} onclick=${undo}>${t('review.undo')}<kbd aria-hidden="true">Z</kbd><//>
      </div>
      <${Kinds} kinds=${kinds} mark=${mark} why=${why} />
    </section>`;
}

let opacityOfAll = 1; // as it was left, from part to part

function useOpacity() {
  const [opacity, setOpacity] = useState(opacityOfAll);
  return [opacity, (value) => { opacityOfAll = value; setOpacity(value); }];
}

function Views({ decision, view, setView }) {
  const { views, decided_by: worst } = decision.views;
  return html`<div class="views" role="group" aria-label=${t('review.views')}>${views.map((one) => html`
    <button key=${one.view} type="button" aria-pressed=${(view || worst) === one.view ? 'true' : 'false'} onclick=${() => setView(one.view)}>
      <${Thumbnail} decision=${decision} view=${one.view} /><span class="name">${one.view}</span><${Verdict} verdict=${one.verdict} /></button>`)}</div>`;
}

/** Each kind is one touch; the most frequent ones have a digit. */
function Kinds({ kinds, mark, why }) {
  const [isNew, setIsNew] = useState(false);
  return html`<div class="kinds" role="group" aria-label=${t('review.kinds')}>
    ${kinds.map((kind, n) => html`<${Button} key=${kind} kind="kind" why=${why} onclick=${() => mark('defect', kind)}>${kind}${n < DIGITS && html`<kbd aria-hidden="true">${n + 1}</kbd>`}<//>`)}
    ${isNew ? html`<${NewKind} mark=${mark} end=${() => setIsNew(false)} />`
    : html`<${Button} kind="kind" icon="add" why=${why} onclick=${() => setIsNew(true)}>${t('review.new_kind')}<//>`}</div>`;
}

function NewKind({ mark, end }) {
  const [text, setText] = useState('');
  const input = useRef(null);
  useLayoutEffect(() => input.current.focus(), []);
  const kind = text.trim();
  const take = (event) => { event.preventDefault(); end(); if (kind) mark('defect', kind); };
  return html`<form class="row" onsubmit=${take}><input ref=${input} aria-label=${t('review.new_kind')} placeholder=${t('review.new_kind_hint')} maxlength="100"
      value=${text} oninput=${(event) => setText(event.target.value)} onkeydown=${(event) => event.key === 'Escape' && end()} />
    <button class="button bad" disabled=${!kind}>${t('review.mark_it')}</button></form>`;
}

/** What people said of it before. */
function History({ decision, told }) {
  const { data, again } = useData(`${path('decisions', decision.id)}${query({ number: decision.number })}`);
  useEffect(() => { if (told) again(); }, [told]); // a mark that was just taken back stands there, too
  if (!data?.history.length) return null;
  return html`<h2>${t('review.said')}</h2><ul class="history">${data.history.map((line) => html`<li key=${line.number}><${Said} line=${line} /></li>`)}</ul>`;
}

const Said = ({ line }) => html`<b>${line.key ?? t('review.nobody')}</b> <span class="soft">${moment(line.time)}</span>${' '}
  ${line.details.label ? html`<${Mark} label=${line.details.label} defect=${line.details.defect} />` : html`<span class="mark">${t('review.withdrawn')}</span>`}
  ${line.reason && html`<q>${line.reason}</q>`}`;

// ---- beside it ----------------------------------------------------------------------------------

function Last({ marks, takeBack, why }) {
  return html`<h2>${t('review.last')}</h2><ul class="lastly">${marks.slice(-LAST).reverse().map((one) => html`<li key=${one.decision.number}>
    <button type="button" disabled=${Boolean(why)} onclick=${() => takeBack(one)} title=${t('review.undo')}
      aria-label=${t('review.take_back', { part: nameOf(one.decision), label: wordsOf(one.label, one.defect) })}>
      <${Thumbnail} decision=${one.decision} /><span class="name">${nameOf(one.decision)}</span><${Mark} label=${one.label} defect=${one.defect} /><${Icon} name="undo" /></button></li>`)}</ul>`;
}

/** How much there is to learn from. */
function Lesson({ model, good, defects }) {
  return html`<h2>${t('review.marked')}</h2>
    <div class="row"><${Mark} label="good" /><b>${several(good.n, good.more)}</b><${Mark} label="defect" /><b>${several(defects.n, defects.more)}</b></div>
    ${good.n + defects.n > 0 && html`<p><a class="button" href=${`#/teach${query({ from: 'decisions', model })}`}><${Icon} name="teach" /><span>${t('review.teach')}</span></a></p>
      <p class="soft">${t('review.teach_hint')}</p>`}`;
}

/** The last marks of everybody, from the audit trail. */
function Who() {
  const [open, setOpen] = useState(false);
  const { data, error } = useData(open ? '/trail?limit=100' : null, 5000);
  const lines = (data?.lines ?? []).filter(({ what }) => what === 'label').slice(0, 20);
  return html`<details class="who-marked" ontoggle=${(event) => setOpen(event.target.open)}><summary>${t('review.who')}</summary>
    ${error && html`<${Problem} error=${error} />`}
    <ul class="history">${lines.map((line) => html`<li key=${line.number}><a class="name" href=${`#/find${query({ id: line.subject, number: line.details.number })}`}>${line.subject}</a> <${Said} line=${line} /></li>`)}</ul></details>`;
}
