// Known pictures, with which a model is challenged: it is released only if it judges all of them rightly.

import { ask, get, path, query as inQuery, send } from '../api.js';
import { t } from '../words.js';
import {
  Button, Dialog, Icon, Photo, Problem, Thumbnail, Waiting, confirm, html, moment, toast, useAction, useData,
  useEffect, useState, whyNot,
} from '../parts.js';

const SIDES = ['good', 'bad'];
const MOST = 64;
const LABEL = { good: 'good', bad: 'defect' }; // what a person says of such a part

export function Known({ model, of, session, changed }) {
  const { data, error, again } = useData(`${of}/challenges`);
  const [draft, setDraft] = useState(null); // null: as the server has it
  const [picking, setPicking] = useState(null); // a side
  const why = whyNot(session, 'operator');
  const settled = () => { setDraft(null); again(); changed(); };
  const [challenge, trying] = useAction(async () => {
    const found = await send('POST', `${of}/challenge`);
    toast(t(found.passed ? 'model.passed' : 'model.failed', { right: found.right, of: found.of }), found.passed ? '' : 'bad');
    settled();
  });
  const [save, saving] = useAction(async () => { if (await stored(of, draft, data)) settled(); });
  if (data === null) return html`<h2>${t('model.known_pictures')}</h2>${error ? html`<${Problem} error=${error} again=${again} />` : html`<${Waiting} />`}`;
  const shown = draft ?? { items: data.pictures.map(asKnown), shifts: data.at_shifts };
  const change = (items, shifts = shown.shifts) => setDraft({ items, shifts });
  const add = (items) => change([...shown.items, ...items].slice(0, MOST));
  return html`<section class="known" aria-label=${t('model.known_pictures')}>
    <div class="row apart"><h2>${t('model.known_pictures')}</h2>
      ${data.pictures.length > 0 && draft === null && html`<${Button} icon="play" busy=${trying} onclick=${challenge}>${t('model.challenge')}<//>`}</div>
    <p class="soft">${t('model.known_why')}</p>
    ${data.last && html`<p>${t(data.last.passed ? 'model.passed' : 'model.failed', { right: data.last.right, of: data.last.of })} <span class="soft">${moment(data.last.time)} · ${data.last.version}</span></p>`}
    ${SIDES.map((side) => html`<div key=${side} class="side" role="group" aria-label=${t(`model.side_${side}`)}><h3>${t(`model.side_${side}`)}</h3><ul class="flips">
      ${shown.items.filter((one) => one.side === side).map((one) => html`<li key=${one.id}><div class=${`flip ${one.last ? (one.last.right ? 'right' : 'wrong') : ''}`}>
        <${Picture} one=${one} of=${of} /><span class="part">${one.name}</span>
        ${one.last && html`<small>${one.last.right ? t('model.right') : one.last.problem ?? t('model.wrong')}</small>`}
        <${Button} kind="plain" icon="remove" why=${why} aria-label=${t('model.take_out', { name: one.name })} onclick=${() => change(shown.items.filter((other) => other.id !== one.id))} /></div></li>`)}
      </ul><div class="row"><${Button} icon="add" why=${why} onclick=${() => setPicking(side)}>${t('model.from_record')}<//>
        <${Files} side=${side} why=${why} add=${add} /></div></div>`)}
    <label class="check"><input type="checkbox" checked=${shown.shifts} disabled=${Boolean(why)} onchange=${(event) => change(shown.items, event.target.checked)} />${t('model.at_shifts')}</label>
    ${draft !== null && html`<div class="row"><${Button} kind="main" busy=${saving} why=${whyNotYet(draft, data)} onclick=${save}>${t('model.save_known')}<//>
      <${Button} icon="undo" onclick=${() => setDraft(null)}>${t('model.leave')}<//>${whyNotYet(draft, data) && html`<span class="soft">${whyNotYet(draft, data)}</span>`}</div>`}
    ${picking && html`<${FromRecord} model=${model.name} side=${picking} has=${shown.items} onclose=${() => setPicking(null)} add=${(items) => { setPicking(null); add(items); }} />`}
  </section>`;
}

const asKnown = (one) => ({ id: one.sha256, side: one.expected, name: one.name, sha256: one.sha256, last: one.last });

/** Both sides are needed, or none of them: then the model is challenged no more. */
function whyNotYet({ items }, data) {
  const sides = SIDES.filter((side) => items.some((one) => one.side === side));
  if (sides.length === 1) return t('model.both_sides');
  return sides.length === 0 && data.pictures.length === 0 ? t('model.both_sides') : '';
}

function Picture({ one, of }) {
  if (one.url) return html`<span class="photo thumbnail"><img src=${one.url} alt="" /></span>`;
  if (one.decision) return html`<${Thumbnail} decision=${one.decision} />`;
  return html`<${Photo} class="thumbnail" src=${`${of}${path('challenges', one.sha256)}`} alt="" />`;
}

function Files({ side, why, add }) {
  const taken = (event) => {
    add([...event.target.files].map((file) => ({ id: crypto.getRandomValues(new Uint32Array(2)).join(), side, name: file.name, file, url: URL.createObjectURL(file) })));
    event.target.value = '';
  };
  return html`<label class=${`button upload ${why ? 'off' : ''}`} title=${why || undefined} data-why=${why || undefined}><input type="file" multiple accept="image/jpeg,image/png,image/bmp,image/tiff" disabled=${Boolean(why)} onchange=${taken} /><${Icon} name="upload" /><span>${t('model.from_files')}</span></label>`;
}

/** Write down which pictures there are; false where somebody thought better of it. */
async function stored(of, draft, data) {
  const isNone = draft.items.length === 0;
  const reason = await confirm({ title: t(isNone ? 'model.ask_no_known' : 'model.ask_known'), body: html`<p>${t(isNone ? 'model.no_known_why' : 'model.known_why')}</p>`,
    yes: t('model.save_known'), reason: 'must', danger: isNone });
  if (reason === null) return false;
  if (isNone) await send('DELETE', `${of}/challenges${inQuery({ reason })}`);
  else if (draft.items.some((one) => one.file)) await ask(`${of}/challenges`, { method: 'PUT', body: asForm(draft, reason) });
  else await send('PUT', `${of}/challenges`, { ...asReferences(draft), reason, at_shifts: draft.shifts });
  toast(t('model.known_saved'));
  return true;
}

const asReferences = ({ items }) => Object.fromEntries(SIDES.map((side) => [side, items.filter((one) => one.side === side)
  .map((one) => (one.decision ? { decision: one.decision.id, number: one.decision.number } : { sha256: one.sha256 }))]));

/** The files themselves, and beside them what the server has already. */
function asForm({ items, shifts }, reason) {
  const form = new FormData();
  form.append('reason', reason);
  form.append('at_shifts', String(shifts));
  form.append('pictures', JSON.stringify(asReferences({ items: items.filter((one) => !one.file) })));
  for (const one of items.filter((other) => other.file)) form.append(one.side, one.file, one.name);
  return form;
}

/** Parts of the record whose pictures are kept, to be chosen: those that a person has marked so come first. */
function FromRecord({ model, side, has, onclose, add }) {
  const [found, setFound] = useState(null);
  const [problem, setProblem] = useState(null);
  const [chosen, setChosen] = useState([]);
  useEffect(() => {
    const verdict = side === 'good' ? 'normal' : 'anomaly';
    const asked = [{ label: LABEL[side] }, { label: 'none', verdict }].map((one) => get(`/decisions${inQuery({ model, limit: 60, ...one })}`));
    Promise.all(asked).then((pages) => setFound(pages.flatMap((page) => page.decisions).filter((one) => one.has_picture && one.views === null)), setProblem);
  }, [model, side]);
  const known = new Set(has.map((one) => one.sha256 ?? one.decision?.sha256));
  const some = found?.filter((one) => !known.has(one.sha256));
  const turn = (one) => setChosen((now) => (now.includes(one) ? now.filter((other) => other !== one) : [...now, one]));
  return html`<${Dialog} title=${t(`model.pick_${side}`)} wide onclose=${onclose}>
    ${problem && html`<${Problem} error=${problem} />`}${!found && !problem && html`<${Waiting} />`}
    ${some?.length === 0 && html`<p class="soft">${t('model.nothing_kept')}</p>`}
    <ul class="flips pick">${some?.map((one) => html`<li key=${one.number}><button type="button" class="flip" aria-pressed=${chosen.includes(one) ? 'true' : 'false'} onclick=${() => turn(one)}>
      <${Thumbnail} decision=${one} /><span class="part">${one.part ?? moment(one.time)}</span><small>${t(one.label ? `label.${one.label}` : 'model.not_marked')}</small></button></li>`)}</ul>
    <div class="row end"><${Button} kind="main" disabled=${chosen.length === 0}
      onclick=${() => add(chosen.map((one) => ({ id: `d${one.number}`, side, name: one.part ?? one.id, decision: one, sha256: one.sha256 })))}>${t('model.take', { count: chosen.length })}<//></div><//>`;
}
