// Where the limit lies among the scores of parts; it is dragged, looked at, and only then applied.

import { ask, get, query as inQuery, send } from '../api.js';
import { language, t } from '../words.js';
import {
  Button, Dialog, Field, Layers, Mark, Problem, Thumbnail, Tile, Verdict, Waiting, confirm, count, html,
  moment, number, percent, toast, useAction, useData, useEffect, useRef, useState, whyNot,
} from '../parts.js';

const [NARROWEST, WIDEST] = [320, 2000]; // px, of a drawing
const STEP = 20; // so that not each px of a window that is resized is another drawing
const SMALL = 200; const LARGE = 20; // so many steps of the arrow keys, and of the page keys, are all of the range
const GOALS = [0.001, 0.005, 0.01, 0.02, 0.05];
const FIRST = 24; // flips that are shown at once
const NOTHING = { preview: null, problem: null, asked: null };
const LEGEND = [ // group of scores -> its colour
  ['normals', 'normal'], ['defects', 'anomaly'], ['drawn', 'drawn'], ['parts', 'soft'],
  ['marked_good', 'good'], ['marked_defect', 'anomaly'],
];

export function Limit({ of, version, live, session, changed, undo }) {
  const { data: scores, error, again } = useData(`${of}/scores`, 15_000);
  const { data: now, error: noLimit, again: askAgain } = useData(`${of}/threshold`, 15_000);
  const [wanted, setWanted] = useState(null); // {raw} or {false_rejects}; null: that in force
  useEffect(() => { setWanted(null); again(); askAgain(); }, [version]);
  const { preview, problem, looking } = usePreview(of, wanted);
  const wrong = error ?? noLimit;
  if (scores === null || now === null) return html`<h2>${t('model.limit')}</h2>${wrong ? html`<${Problem} error=${wrong} again=${() => { again(); askAgain(); }} />` : html`<${Waiting} />`}`;
  const raw = wanted?.raw ?? preview?.raw ?? scores.raw_threshold;
  const set = (to) => setWanted({ raw: Math.min(scores.high, Math.max(scores.low, to)) });
  return html`<section class="limit" aria-label=${t('model.limit')}>
    <h2>${t('model.limit')}</h2>
    <${Legend} scores=${scores} />
    <${Histogram} of=${of} scores=${scores} raw=${raw} moved=${wanted !== null} set=${set} leave=${() => setWanted(null)} />
    <${Fields} scores=${scores} now=${now} raw=${raw} wanted=${wanted} want=${setWanted} set=${set} />
    <${Promises} scores=${scores} now=${now} raw=${raw} moved=${wanted !== null} />
    ${problem && html`<${Problem} error=${problem} />`}
    ${wanted !== null && html`<${Preview} preview=${preview} looking=${looking}>
      <${Apply} of=${of} wanted=${wanted} raw=${raw} preview=${preview} looking=${looking} live=${live} session=${session} leave=${() => setWanted(null)} changed=${changed} undo=${undo} /><//>`}
  </section>`;
}

/** What another limit would have said, asked once it stands still; what was there stays meanwhile. */
function usePreview(of, wanted) {
  const [last, setLast] = useState(NOTHING);
  useEffect(() => {
    if (wanted === null) {
      setLast(NOTHING);
      return undefined;
    }
    const ending = new AbortController();
    const timer = setTimeout(() => {
      get(`${of}/threshold/preview${inQuery(wanted)}`, { signal: ending.signal }).then(
        (preview) => setLast({ preview, problem: null, asked: wanted }),
        (problem) => problem.name === 'AbortError' || setLast({ preview: null, problem, asked: wanted }),
      );
    }, 250);
    return () => { clearTimeout(timer); ending.abort(); };
  }, [of, wanted]);
  const { preview, problem } = wanted === null ? NOTHING : last; // an effect runs only after what it is of was painted
  return { preview, problem, looking: wanted !== null && last.asked !== wanted };
}

const Legend = ({ scores }) => html`<p class="legend">${LEGEND.filter(([group]) => scores[group].length > 0).map(([group, colour]) => html`
  <span key=${group}><i class=${`is-${colour}`}></i>${count(scores[group].length)} ${t(`model.scores_${group}`)}</span>`)}</p>`;

// ---- the drawing, and the limit that lies over it ---------------------------------------------------

function Histogram({ of, scores, raw, moved, set, leave }) {
  const [scale, setScale] = useState(null);
  const [problem, setProblem] = useState(null);
  const box = useRef(null);
  const drawing = useRef(null);
  const [wide, setWide] = useState(null); // as wide as it is seen, so that its words are as large as any others
  useEffect(() => {
    const watch = new ResizeObserver(([seenBox]) => setWide(Math.min(WIDEST, Math.max(NARROWEST, Math.floor(seenBox.contentRect.width / STEP) * STEP))));
    watch.observe(box.current);
    return () => watch.disconnect();
  }, []);
  const [turn, setTurn] = useState(0);
  const seen = LEGEND.map(([group]) => scores[group].join()).join(';');
  useEffect(() => {
    if (wide === null) return undefined;
    let gone = false;
    const show = (text) => {
      if (gone) return;
      const svg = document.importNode(new DOMParser().parseFromString(text, 'image/svg+xml').documentElement, true);
      drawing.current.replaceChildren(svg);
      setProblem(null);
      const { left, width, low, high } = svg.dataset;
      setScale({ left: Number(left), width: Number(width), low: Number(low), high: Number(high), of: wide });
    };
    ask(`${of}/scores.svg${inQuery({ lang: language(), width: wide })}`).then((answer) => answer.text()).then(show, (error) => gone || setProblem(error));
    return () => { gone = true; };
  }, [of, seen, scores.raw_threshold, wide, language(), turn]);

  const place = (score) => `${(100 * (scale.left + ((score - scale.low) / (scale.high - scale.low)) * scale.width)) / scale.of}%`;
  const follow = (event) => {
    const { left, width } = box.current.getBoundingClientRect();
    const across = ((event.clientX - left) / width) * scale.of;
    set(scale.low + ((across - scale.left) / scale.width) * (scale.high - scale.low));
  };
  const dragged = useRef(false);
  const down = (event) => {
    if (scale === null || event.button !== 0) return;
    dragged.current = true;
    box.current.setPointerCapture(event.pointerId);
    box.current.querySelector('[role=slider]').focus({ preventScroll: true });
    follow(event);
  };
  const move = (event) => { if (dragged.current) follow(event); };
  const up = () => { dragged.current = false; };
  const key = (event) => {
    const span = scores.high - scores.low;
    const to = {
      ArrowRight: raw + span / SMALL, ArrowUp: raw + span / SMALL, ArrowLeft: raw - span / SMALL, ArrowDown: raw - span / SMALL,
      PageUp: raw + span / LARGE, PageDown: raw - span / LARGE, Home: scores.low, End: scores.high,
    }[event.key];
    if (event.key === 'Escape') leave();
    else if (to !== undefined) set(to);
    else return;
    event.preventDefault();
  };
  return html`<div class="histogram" ref=${box} onpointerdown=${down} onpointermove=${move} onpointerup=${up} onpointercancel=${up}>
    <div class="drawing" ref=${drawing}></div>
    ${scale && html`
      <div class="in-force" style=${{ left: place(scores.raw_threshold) }} aria-hidden="true"><span>${t('model.in_force', { raw: number(scores.raw_threshold, 3) })}</span></div>
      <div class=${`handle ${moved ? 'moved' : ''} ${raw > (scale.low + scale.high) / 2 ? 'right' : ''}`} style=${{ left: place(raw) }}
        role="slider" tabindex="0" aria-label=${t('model.slider')} aria-valuemin=${scores.low} aria-valuemax=${scores.high} aria-valuenow=${raw}
        aria-valuetext=${number(raw, 3)} aria-orientation="horizontal" onkeydown=${key}>
        <i></i><b>◂ ${number(raw, 3)} ▸</b></div>`}
  </div>${problem && html`<${Problem} error=${problem} again=${() => setTurn(turn + 1)} />`}`;
}

function Fields({ scores, now, raw, wanted, want, set }) {
  const low = now.limits[0]?.false_rejects;
  const high = now.limits.at(-1)?.false_rejects;
  const share = wanted === null ? now.false_rejects : wanted.false_rejects ?? rejectsAt(now.limits, raw);
  return html`<div class="fields">
    <${Field} label=${t('model.raw')}><input type="number" inputmode="decimal" step=${step(scores)} min=${scores.low} max=${scores.high}
      value=${Number(raw.toFixed(4))} onchange=${(event) => event.target.value !== '' && set(Number(event.target.value))} /><//>
    ${now.limits.length > 0 && html`<${Field} label=${t('model.goal')}><input type="number" inputmode="decimal" step="0.1" min=${100 * low} max=${100 * high}
      value=${share == null ? '' : Number((100 * share).toFixed(3))} onchange=${(event) => {
        if (event.target.value !== '') want({ false_rejects: Math.min(high, Math.max(low, Number(event.target.value) / 100)) });
      }} /><//>
      <div class="goals" role="group" aria-label=${t('model.goals')}>${GOALS.filter((goal) => goal >= low && goal <= high).map((goal) => html`
        <${Button} key=${goal} onclick=${() => want({ false_rejects: goal })}>${percent(goal, goal < 0.01 ? 1 : 0)}<//>`)}</div>`}
  </div>`;
}

/** A round step of about a thousandth of the range. */
const step = ({ low, high }) => 10 ** Math.floor(Math.log10((high - low) / 100));

/** The share of good parts that a limit is meant to reject, as the server reads its table; null outside. */
export function rejectsAt(limits, raw) {
  for (const [place, low] of limits.slice(0, -1).entries()) {
    const high = limits[place + 1];
    if (high.raw <= raw && raw <= low.raw) {
      if (raw === low.raw) return low.false_rejects;
      const along = (raw - low.raw) / (high.raw - low.raw);
      return low.false_rejects * (high.false_rejects / low.false_rejects) ** along;
    }
  }
  return null;
}

const above = (list, raw) => list.filter((score) => score > raw).length;

/** What a limit promises, and what it finds of the defects that training knew. */
function Promises({ scores, now, raw, moved }) {
  const bound = moved ? now.limits.find((row) => row.raw <= raw)?.at_most : now.at_most;
  const found = (list, name) => list.length > 0 && html`<${Tile} name=${t(`model.${name}`)} value=${t('model.of', { part: count(above(list, raw)), of: count(list.length) })}>
    ${moved && above(list, raw) !== above(list, scores.raw_threshold) && t('model.before', { value: count(above(list, scores.raw_threshold)) })}<//>`;
  return html`<div class="tiles">
    <${Tile} name=${t('model.at_most')} value=${bound == null ? '–' : `≤ ${percent(bound)}`}>${t(bound == null ? 'model.not_measured' : 'model.sure')}<//>
    ${found(scores.defects, 'known_found')}${found(scores.drawn, 'drawn_found')}
  </div>`;
}

// ---- which parts would be judged otherwise ---------------------------------------------------------

function Preview({ preview, looking, children }) {
  const [most, setMost] = useState(FIRST);
  const [open, setOpen] = useState(null);
  if (preview === null) return html`${looking && html`<${Waiting}>${t('model.looking')}<//>`}${children}`;
  const flips = preview.flips;
  return html`<section class=${`preview ${looking ? 'looking' : ''}`} aria-label=${t('model.preview')} aria-busy=${looking ? 'true' : undefined}>
    <h3>${t('model.preview')}</h3>
    <p class="soft" role="status">${preview.parts === 0 ? t('model.no_parts') : t('model.flips', { flips: count(flips.length) + (flips.length === 200 ? '+' : ''), parts: count(preview.parts) })}</p>
    ${preview.parts > 0 && html`<div class="tiles">
      <${Change} name="rejected" was=${preview.rejected} becomes=${preview.would_reject} of=${preview.parts} />
      ${preview.good > 0 && html`<${Change} name="good_rejected" was=${preview.good_rejected} becomes=${preview.good_would_reject} of=${preview.good} bound=${preview.good_at_most} />`}
      ${preview.defects > 0 && html`<${Change} name="defects_missed" was=${preview.defects_missed} becomes=${preview.defects_would_miss} of=${preview.defects} bound=${preview.defects_at_most} />`}
    </div>`}
    ${children}
    ${flips.length > 0 && html`<ul class="flips">${flips.slice(0, most).map((one) => html`<li key=${one.number}><${Flip} decision=${one} open=${() => setOpen(one)} /></li>`)}</ul>`}
    ${flips.length > most && html`<${Button} onclick=${() => setMost((now) => now * 3)}>${t('model.more')}<//>`}
    ${open && html`<${Dialog} title=${open.part ?? t('model.part_without_name')} wide onclose=${() => setOpen(null)}>
      <${Layers} decision=${open} alt=${t('model.picture')} /><p class="row"><${Becomes} verdict=${open.verdict} /> ${t('model.scored', { raw: number(open.raw_score, 3) })} <span class="soft">${moment(open.time)}</span></p><//>`}
  </section>`;
}

const Change = ({ name, was, becomes, of, bound }) => html`<${Tile} name=${t(`model.${name}`)}
  look=${name !== 'rejected' && becomes !== was ? (becomes > was ? 'bad' : 'good') : ''} value=${`${count(was)} → ${count(becomes)}`}>
  ${t('model.out_of', { of: count(of) })}${bound != null && `, ${t('model.bound', { share: percent(bound) })}`}<//>`;

const Flip = ({ decision: one, open }) => html`<button type="button" class="flip" onclick=${open}>
  <${Thumbnail} decision=${one} alt="" /><span class="what"><${Becomes} verdict=${one.verdict} /></span>
  <span class="part">${one.part ?? t('model.part_without_name')}</span><small>${number(one.raw_score, 3)} <${Mark} label=${one.label} defect=${one.defect} /></small></button>`;

const Becomes = ({ verdict }) => html`<span class="becomes"><${Verdict} verdict=${verdict} /> → <${Verdict} verdict=${verdict === 'anomaly' ? 'normal' : 'anomaly'} /></span>`;

function Apply({ of, wanted, raw, preview, looking, live, session, leave, changed, undo }) {
  const [apply, busy] = useAction(async () => {
    const body = html`<p>${t('model.apply_why', { raw: number(raw, 4) })}</p>${preview && html`<p><b>${t('model.flips', { flips: count(preview.flips.length), parts: count(preview.parts) })}</b></p>`}`;
    const reason = await confirm({ title: t('model.ask_apply'), body, yes: t('model.apply'), reason: 'must' });
    if (reason === null) return;
    const made = await send('PUT', `${of}/threshold`, { ...wanted, reason });
    toast(t('model.applied', { raw: number(made.raw, 4) }), '', [t('model.undo'), () => undo(made.version, live)]);
    changed();
  });
  return html`<div class="row apply"><${Button} kind="main" busy=${busy || looking} why=${whyNot(session, 'operator')} onclick=${apply}>${t('model.apply')}<//>
    <${Button} icon="undo" onclick=${leave}>${t('model.leave')}<//></div>`;
}
