// The versions of a model: what each promises, what the gate found of it, and what may be done with it.

import { download, path, query as inQuery, send } from '../api.js';
import { t } from '../words.js';
import {
  Button, Mark, Photo, Problem, Tile, Verdict, Waiting, confirm, count, go, html, moment, number, percent,
  toast, useAction, useData, whyNot,
} from '../parts.js';

const BLIND = 0.2; // share of drawn defects below which a model may be blind, as the gate has it

export function Versions({ model, of, chosen, session, changed, more }) {
  const open = (version) => go('model', { name: model.name, version: version === chosen ? null : version }, true);
  return html`<section aria-label=${t('model.versions')}><h2>${t('model.versions')}</h2>
    <ul class="versions">${model.versions.map((one) => html`<li key=${one.version} class=${`card is-${stateOf(one)}`}>
      <${Row} one=${one} model=${model} of=${of} session=${session} changed=${changed} isOpen=${one.version === chosen} open=${() => open(one.version)} />
    </li>`)}</ul>
    ${more && html`<${Button} onclick=${more}>${t('model.older')}<//>`}
  </section>`;
}

const stateOf = (one) => one.state.replaceAll(' ', '_');

function Row({ one, model, of, session, changed, isOpen, open }) {
  const folder = `${of}${path('versions', one.version)}`;
  const [activate, activating] = useAction(async () => {
    const body = html`<p>${t('model.activate_why')}</p>${one.gate?.reasons.length > 0 && html`<${Reasons} of=${one.gate.reasons} />`}`;
    if (await confirm({ title: t('model.ask_activate', { version: one.version }), body, yes: t('model.activate') }) === null) return;
    await send('POST', `${folder}/activate`);
    toast(t('model.activated', { version: one.version }));
    changed();
  });
  const isJudging = one.state === 'live' && (model.live !== null || model.at_rest); // not one that was unloaded
  const label = t(isOpen ? 'model.less' : 'model.details');
  return html`<div class="row apart head">
      <button type="button" class="opener" aria-expanded=${isOpen ? 'true' : 'false'} aria-label=${`${label}: ${one.version}`} onclick=${open}>
        <span class=${`version-state is-${stateOf(one)}`}>${t(`model.state_${stateOf(one)}`)}</span>
        <b class="version">${one.version}</b><span class="soft">${moment(one.created, false)}</span>
        <span class="soft from">${origin(one.origin)}</span></button>
      ${!isJudging && one.state !== 'damaged' && html`<${Button} busy=${activating} why=${whyNot(session, 'operator')} onclick=${activate}>${t('model.activate')}<//>`}
    </div>
    <p class="in-short">${inShort(one).map((words, place) => html`<span key=${place}>${words}</span>`)}</p>
    ${one.problem && html`<div class="problem"><p>${one.problem}</p></div>`}
    ${one.state === 'held' && one.gate && !isOpen && html`<${Reasons} of=${one.gate.reasons} />`}
    ${isOpen && html`<${Details} one=${one} folder=${folder} model=${model} session=${session} changed=${changed} />`}`;
}

const Reasons = ({ of }) => html`<ul class="reasons warn">${of.map((one) => html`<li key=${one}>${one}</li>`)}</ul>`;

/** Where a version comes from. */
function origin(from) {
  if (from.threshold_of) return from.reason ? t('model.from_threshold_why', { reason: from.reason }) : t('model.from_threshold');
  if (from.regions_of) return from.reason ? t('model.from_regions_why', { reason: from.reason }) : t('model.from_regions');
  if (from.job) return t('model.from_job');
  if (from.upload) return t('model.from_upload');
  return from.folder ? t('model.from_folder') : '';
}

/** What it promises, in a few words each. */
function inShort(one) {
  const known = one.calibration;
  if (known === null) return one.threshold === null ? [] : [t('model.nothing_promised')];
  const blind = known.drawn > 0 && known.found / known.drawn < BLIND;
  return [
    known.at_most === null ? null : t('model.promise', { share: percent(known.at_most) }),
    known.drawn > 0 && known.found !== null ? t(blind ? 'model.blind' : 'model.sees', { found: count(known.found), drawn: count(known.drawn) }) : null,
    known.defects > 0 && known.misses !== null ? t('model.known', { found: count(known.defects - known.misses), defects: count(known.defects) }) : null,
    known.untrained ? t('model.untrained') : null,
  ].filter(Boolean);
}

// ---- one of them, in full --------------------------------------------------------------------------

function Details({ one, folder, model, session, changed }) {
  const { data, error } = useData('report.json' in one.files ? `${folder}/report` : null);
  const report = data ?? {};
  const isWaiting = 'report.json' in one.files && !data && !error;
  const [discard, discarding] = useAction(async () => {
    const title = t('model.ask_discard', { version: one.version });
    const reason = await confirm({ title, body: html`<p>${t('model.discard_why')}</p>`, yes: t('model.discard'), reason: 'must', danger: true });
    if (reason === null) return;
    await send('DELETE', `${folder}${inQuery({ reason })}`);
    toast(t('model.discarded', { version: one.version }));
    changed();
  });
  const [save, saving] = useAction(() => download(`${folder}/archive`, `${model.name}-${one.version}.zip`));
  const isNeeded = ['live', 'previous'].includes(one.state);
  return html`<div class="details">
    ${one.calibration && html`<${Promised} known=${one.calibration} measured=${report.calibration} />`}
    ${one.gate && html`<${Gate} gate=${one.gate} folder=${folder} />`}
    ${isWaiting ? html`<${Waiting} />` : html`<${Facts} one=${one} report=${report} folder=${folder} />`}
    ${error && html`<${Problem} error=${error} />`}
    <div class="row end">
      <${Button} icon="download" busy=${saving} why=${whyNot(session, 'admin')} onclick=${save}>${t('model.download')}<//>
      <${Button} icon="remove" busy=${discarding} why=${isNeeded ? t('model.needed') : whyNot(session, 'operator')} onclick=${discard}>${t('model.discard')}<//>
    </div></div>`;
}

function Promised({ known, measured }) {
  const sees = known.drawn > 0 && known.found !== null ? known.found / known.drawn : null;
  return html`<h3>${t('model.promises')}</h3><div class="tiles">
    ${known.at_most !== null && html`<${Tile} name=${t('model.at_most')} value=${`≤ ${percent(known.at_most)}`}>
      ${known.rejected === null ? t('model.sure') : t('model.rejected_of', { rejected: count(known.rejected), parts: count(known.parts) })}
      ${known.false_rejects !== null && known.at_most > known.false_rejects && known.parts_needed !== null && html`<br />${t('model.parts_needed', { share: percent(known.false_rejects), parts: count(known.parts_needed) })}`}<//>`}
    ${sees !== null && html`<${Tile} name=${t('model.drawn_found')} look=${sees < BLIND ? 'bad' : 'good'} value=${t('model.of', { part: count(known.found), of: count(known.drawn) })}>${t(sees < BLIND ? 'model.may_be_blind' : 'model.not_blind')}<//>`}
    ${known.defects > 0 && known.misses !== null && html`<${Tile} name=${t('model.known_found')} look=${known.misses ? 'bad' : 'good'} value=${t('model.of', { part: count(known.defects - known.misses), of: count(known.defects) })}>${known.misses > 0 && t('model.missed', { misses: count(known.misses) })}<//>`}
    ${Number.isFinite(measured?.auroc) && html`<${Tile} name="AUROC" value=${number(measured.auroc, 4)}>${t('model.auroc')}<//>`}
  </div>`;
}

// ---- the gate --------------------------------------------------------------------------------------

function Gate({ gate, folder }) {
  const record = gate.record;
  return html`<h3>${t('model.gate')} <span class=${`version-state ${gate.ok ? 'is-live' : 'is-held'}`}>${t(gate.ok ? 'model.gate_ok' : 'model.gate_held')}</span></h3>
    ${gate.by_hand && html`<p class="soft">${t('model.by_hand')}</p>`}
    ${gate.reasons.length > 0 && html`<${Reasons} of=${gate.reasons} />`}
    ${gate.regions && html`<p>${t('model.other_regions', { was: percent(gate.regions.was), becomes: percent(gate.regions.becomes) })}</p>`}
    ${gate.against && html`<div class="scroll"><table><thead><tr><th>${t('model.shown')}</th><th>${t('model.pictures')}</th><th>${t('model.changed')}</th></tr></thead><tbody>
      ${Object.entries(gate.groups).map(([group, one]) => html`<tr key=${group}><td>${t(`model.group_${group}`)}</td><td>${count(one.images)}</td><td>${count(one.flips)}</td></tr>`)}
      ${record && html`<tr><td>${t('model.group_marked_good')}</td><td>${count(record.good.marked)}</td><td>${t('model.rejected_then', { was: count(record.good.rejected_before), now: count(record.good.rejected_now) })}</td></tr>
        <tr><td>${t('model.group_marked_defect')}</td><td>${count(record.defect.marked)}</td><td>${t('model.missed_then', { was: count(record.defect.missed_before), now: count(record.defect.missed_now) })}</td></tr>
        <tr><td>${t('model.group_unmarked')}</td><td>${count(record.unmarked.rejects)}</td><td>${count(record.unmarked.flips)}</td></tr>`}
    </tbody></table></div>`}
    ${record?.problem && html`<p class="warn">${record.problem}</p>`}
    ${gate.flips.length + (record?.flips.length ?? 0) > 0 && html`<h4>${t('model.gate_flips')}</h4><ul class="flips">
      ${gate.flips.map((one) => html`<li key=${`g${one.number}`}><div class="flip"><${Photo} class="thumbnail" src=${`${folder}/flips/${one.number}`} alt=${t('model.picture')} />
        <${Judged} one=${one} /><span class="part soft">${t(`model.group_${one.group}`)}</span></div></li>`)}
      ${record?.flips.map((one) => html`<li key=${`r${one.number}`}><div class="flip"><${Photo} class="thumbnail" src=${`${path('decisions', one.id)}/thumbnail${inQuery({ number: one.number })}`} alt=${t('model.picture')} />
        <${Judged} one=${one} /><span class="part">${one.part ?? t('model.part_without_name')} <${Mark} label=${one.label} defect=${one.defect} /></span></div></li>`)}
    </ul>`}`;
}

const Judged = ({ one }) => html`<span class="what"><span class="becomes"><${Verdict} verdict=${one.was.toLowerCase()} /> → <${Verdict} verdict=${one.becomes.toLowerCase()} /></span></span>
  <small>${number(one.old_raw_score, 3)} → ${number(one.new_raw_score, 3)}</small>`;

// ---- what it is made of ----------------------------------------------------------------------------

function Facts({ one, report, folder }) {
  const bank = report.memory_bank;
  const parity = Object.entries(report.parity ?? {}).filter(([, found]) => Number.isFinite(found?.max_relative));
  const seconds = Object.entries(report.seconds ?? {}).filter(([, value]) => Number.isFinite(value));
  const facts = [
    ['kind', one.kind],
    ['learned', report.images && t('model.learned_pictures', { learned: count((report.images.learned ?? 0) + (report.images.known ?? 0)), strange: count(report.images.strange?.length ?? 0) })],
    ['limit_is', one.raw_threshold === null ? null : t('model.limit_both', { raw: number(one.raw_threshold, 4), threshold: number(one.threshold, 3) })],
    ['never_counts', one.never_counts === null ? null : percent(one.never_counts)],
    ['bank', bank && t('model.bank_rows', { rows: count(bank.rows), channels: count(bank.channels), mib: number(bank.mib, 1) })],
    ['parity', parity.length > 0 && parity.map(([name, found]) => `${name}: ${found.max_relative.toExponential(1)}${found.flips ? ` (${t('model.parity_flips', { flips: count(found.flips) })})` : ''}`).join(' · ')],
    ['seconds', seconds.length > 0 && seconds.map(([name, value]) => `${name}: ${number(value, 1)} s`).join(' · ')],
    ['camera', one.camera && t('model.camera_like', { pictures: count(one.camera.pictures), width: one.camera.width, height: one.camera.height })],
    ['camera_sees', one.camera?.sees.length > 0 && one.camera.sees.map((code) => t(`codes.${code}`)).join(' ')],
    ['camera_blind', one.camera && Object.keys(one.camera.blind).length > 0 && Object.keys(one.camera.blind).map((code) => t(`codes.${code}`)).join(' ')],
    ['asked', one.origin.asked && Object.entries(one.origin.asked).map(([key, value]) => `${key}: ${value}`).join(' ')],
    ['reason', one.origin.reason],
    ['parent', one.origin.parent],
    ['job', one.origin.job],
  ].filter(([, value]) => value);
  const hasStrange = 'strange.jpg' in one.files;
  return html`<h3>${t('model.made_of')}</h3><table class="facts"><tbody>
    ${facts.map(([name, value]) => html`<tr key=${name}><th>${t(`model.fact_${name}`)}</th><td>${value}</td></tr>`)}</tbody></table>
    ${hasStrange && html`<details><summary>${t('model.strange')}</summary><${Photo} class="sheet" src=${`${folder}/strange`} alt=${t('model.strange')} /></details>`}`;
}
