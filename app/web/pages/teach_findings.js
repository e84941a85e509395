// What the gate found of a version: why it is held, which parts get another verdict, and yes or no to it.

import { path, query, send } from '../api.js';
import { t } from '../words.js';
import {
  Button, Mark, Photo, ScoreBar, Thumbnail, Verdict, confirm, count, html, number, percent, toast, useAction, useState, whyNot,
} from '../parts.js';

const FIRST = 12; // parts of which the verdict changes, before more are asked for
const LABELS = { Normal: 'normal', Anomaly: 'anomaly', Unusable: 'unusable' };

// What a sentence of the gate is about, and the numbers beside it that say how much.
const REASONS = [
  [/known normals are rejected/, 'flips_normal', (one) => group(one, 'normal')],
  [/known defects pass/, 'flips_defect', (one) => group(one, 'defect')],
  [/of the last .* another verdict/, 'flips_recent', (one) => group(one, 'recent')],
  [/marked as defects were found/, 'marked_defect', (one) => ({ n: marked(one, 'defect'), of: one.gate.record?.defect.marked })],
  [/marked as good are rejected/, 'marked_good', (one) => ({ n: marked(one, 'good'), of: one.gate.record?.good.marked })],
  [/drawn defects/, 'blind', (one) => ({ n: one.calibration?.found, of: one.calibration?.drawn })],
  [/untrained/, 'untrained', () => ({})],
  [/^It rejects/, 'rejects', (one) => ({ n: one.calibration?.rejected, of: one.calibration?.parts })],
  [/threshold moved/, 'moved', () => ({})],
  [/whose regions are not/, 'regions', () => ({})],
  [/known pictures of its challenge/, 'challenge', () => ({})],
  [/trained model/, 'differs', () => ({})],
  [/newer version went live/, 'newer', () => ({})],
  [/ended the server/, 'ended', () => ({})],
];

const group = (one, name) => ({ n: one.gate.groups[name]?.flips, of: one.gate.groups[name]?.images, limit: percent(one.gate.limit, 0) });
const marked = (one, label) => one.gate.record?.flips.filter((flip) => flip.label === label && flip.becomes === { good: 'Anomaly', defect: 'Normal' }[label]).length;

/** A reason in the words of who decides; the server's own sentence where it is a new one. */
function reasonOf(version, sentence) {
  const known = REASONS.find(([about]) => about.test(sentence));
  return known ? t(`teach.why_${known[1]}`, known[2](version)) : sentence;
}

/** Why a version is held, what it would change, and the two answers to that. */
export function Findings({ model, version, live, session, outcome, onlive }) {
  const { gate } = version;
  const [left, setLeft] = useState(false);
  const [accept, busy] = useAction(async () => {
    const body = html`<p>${t('teach.accept_body', { model, live: live ?? '–' })}</p><ul>${gate.reasons.map((one) => html`<li>${reasonOf(version, one)}</li>`)}</ul>`;
    if ((await confirm({ title: t('teach.accept_title', { version: version.version }), body, yes: t('teach.accept') })) === null) return;
    await send('POST', `${path('models', model, 'versions', version.version)}/activate`);
    toast(t('teach.accepted', { model }));
    onlive();
  });
  if (!gate) return null;
  const isHeld = outcome === 'held';
  return html`<section class="findings" aria-label=${t('teach.findings')}>
    ${isHeld && html`<h2>${t('teach.reasons')}</h2><ul class="reasons">${gate.reasons.map((one) => html`<li key=${one}><b>${reasonOf(version, one)}</b>
      ${reasonOf(version, one) !== one && html`<small class="soft">${one}</small>`}</li>`)}</ul>`}
    ${isHeld && (left ? html`<p class="soft">${t('teach.left_as_is', { live: live ?? '–' })}</p>` : html`<div class="row answers">
      <${Button} kind="main" icon="good" busy=${busy} why=${whyNot(session, 'operator')} onclick=${accept}>${t('teach.accept')}<//>
      <${Button} onclick=${() => setLeft(true)}>${t('teach.leave')}<//></div>`)}
    <${Flips} model=${model} version=${version} />
  </section>`;
}

/** The parts of which the verdict changes: those of the record first, as a person has marked some. */
function Flips({ model, version }) {
  const [all, setAll] = useState(false);
  const { gate } = version;
  const flips = [
    ...(gate.record?.flips ?? []).map((one) => html`<${OfRecord} key=${`r${one.number}`} flip=${one} />`),
    ...gate.flips.map((one) => html`<${OfGate} key=${`g${one.number}`} model=${model} version=${version.version} flip=${one} />`),
  ];
  if (!gate.against) return null;
  if (!flips.length) return html`<p class="soft">${t('teach.no_flips', { against: gate.against })}</p>`;
  return html`<h2>${t('teach.flips', { n: count(flips.length) })}</h2>
    <div class="flips">${all ? flips : flips.slice(0, FIRST)}</div>
    ${!all && flips.length > FIRST && html`<${Button} onclick=${() => setAll(true)}>${t('teach.more', { n: count(flips.length - FIRST) })}<//>`}`;
}

/** A decision of the record: its picture, what was anomalous, what a person said. */
function OfRecord({ flip }) {
  const decision = { ...flip, has_picture: true };
  return html`<${Flip} flip=${flip} limits=${[flip.old_threshold, flip.new_threshold]} title=${flip.part ?? flip.id}
    mark=${flip.label ? html`<${Mark} label=${flip.label} defect=${flip.defect} />` : html`<span class="mark">${t('teach.unmarked')}</span>`}>
    <${Thumbnail} decision=${decision} alt=${t('teach.picture_of', { part: flip.part ?? flip.id })} />
    <${Photo} class="thumbnail" src=${`${path('decisions', flip.id)}/overlay${query({ number: flip.number })}`} alt=${t('teach.overlay_of', { part: flip.part ?? flip.id })} /><//>`;
}

/** A picture that was known from training, or one of the last parts. */
function OfGate({ model, version, flip }) {
  const title = t(`teach.group_${flip.group}`);
  return html`<${Flip} flip=${flip} limits=${[null, null]} title=${title}>
    <${Photo} class="thumbnail" src=${path('models', model, 'versions', version, 'flips', String(flip.number))} alt=${title} /><//>`;
}

function Flip({ flip, limits, title, mark, children }) {
  const side = (label, score, limit, words) => html`<div><small class="soft">${words}</small><${Verdict} verdict=${LABELS[label] ?? 'none'} />
    <${ScoreBar} score=${score} threshold=${limit} /><small class="soft">${number(score, 3)}</small></div>`;
  return html`<article class="flip card"><div class="two">${children}</div>
    <p class="row apart"><b class="named">${title}</b>${mark}</p>
    <div class="sides">${side(flip.was, flip.old_score, limits[0], t('teach.was'))}<span class="arrow" aria-hidden="true">→</span>
      ${side(flip.becomes, flip.new_score, limits[1], t('teach.becomes'))}</div></article>`;
}
