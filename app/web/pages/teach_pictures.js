// A category: what it has, what is sent into it, and its pictures, a page at a time.

import { path, query, send } from '../api.js';
import { t } from '../words.js';
import {
  Button, Choice, Dialog, Photo, Problem, Progress, Waiting, bytes, confirm, count, html, toast, useAction,
  useData, useEffect, useRef, useState, whyNot,
} from '../parts.js';
import { Advice } from './teach_learn.js';
import { chosen, dropped, forget, upload, useUpload } from './teach_uploads.js';

export const SPLITS = ['train', 'normal', 'anomaly'];
const PAGE = 48;
const MOST_NAMED = 200;

/** The three splits of a category, one of them open. `onchange`: its counts are others now. */
export function Pictures({ category, counts, split, onsplit, session, onchange }) {
  return html`
    <${Choice} label=${t('teach.splits')} value=${split} onchange=${onsplit}
      options=${SPLITS.map((one) => [one, html`${t(`teach.split_${one}`)} <b>${count(counts?.[one] ?? 0)}</b>`])} />
    <p class="soft">${t(`teach.about_${split}`)}</p>
    <${Sending} key=${split} category=${category} split=${split} session=${session} onchange=${onchange} />
    <${Shown} key=${`${category}/${split}`} category=${category} split=${split} total=${counts?.[split] ?? 0} session=${session} onchange=${onchange} />`;
}

// ---- sending ------------------------------------------------------------------------------------

/** Where pictures are dropped or chosen, and how their upload goes. */
export function Sending({ category, split, session, onchange, large = false }) {
  const [over, setOver] = useState(false);
  const [looking, setLooking] = useState(false);
  const one = useUpload(category, split);
  const files = useRef(null);
  const folder = useRef(null);
  const why = whyNot(session, 'operator');
  useEffect(() => { if (one?.turn) onchange?.(); }, [one, one?.turn]);
  const take = async (found) => {
    setLooking(true);
    const these = await found;
    setLooking(false);
    if (these.length) upload(category, split, these);
  };
  const drop = (event) => {
    event.preventDefault();
    setOver(false);
    if (!why) take(dropped(event.dataTransfer));
  };
  const pick = (event) => { take(Promise.resolve(chosen(event.target.files))); event.target.value = ''; };
  return html`
    <div class=${`drop ${over ? 'over' : ''} ${large ? 'large' : ''}`} ondragover=${(event) => { event.preventDefault(); setOver(true); }}
      ondragleave=${() => setOver(false)} ondrop=${drop}>
      <p><b>${t('teach.drop')}</b><br /><span class="soft">${t('teach.drop_what')}</span></p>
      <div class="row">
        <${Button} kind="main" icon="upload" why=${why} onclick=${() => files.current.click()}>${t('teach.choose_files')}<//>
        <${Button} why=${why} onclick=${() => folder.current.click()}>${t('teach.choose_folder')}<//>
      </div>
      <input ref=${files} class="files" type="file" hidden multiple accept="image/*,.bmp,.dib,.jfif,.tif,.tiff,.zip" aria-label=${t('teach.choose_files')} onchange=${pick} />
      <input ref=${folder} class="folder" type="file" hidden multiple webkitdirectory aria-label=${t('teach.choose_folder')} onchange=${pick} />
    </div>
    ${looking && html`<${Waiting}>${t('teach.looking')}<//>`}
    ${one && html`<${HowItGoes} one=${one} />`}`;
}

function HowItGoes({ one }) {
  const isSending = one.state === 'sending';
  return html`<section class="upload card" aria-label=${t('teach.upload')}>
    ${isSending && html`<${Progress} value=${one.share} label=${t('teach.sending', { done: count(one.done), of: count(one.files) })} />`}
    <p class="row counts" role="status">
      <span><b>${count(one.added)}</b> ${t('teach.added')}</span>
      ${one.there > 0 && html`<span><b>${count(one.there)}</b> ${t('teach.there')}</span>`}
      ${one.refused.length > 0 && html`<span class="mark defect"><b>${count(one.refused.length)}</b> ${t('teach.refused')}</span>`}
      ${one.skipped > 0 && html`<span title=${one.skippedNames.join('\n')}><b>${count(one.skipped)}</b> ${t('teach.skipped')}</span>`}
      <span class="grow"></span>
      ${isSending && html`<${Button} icon="close" onclick=${() => one.stop()}>${t('teach.stop_sending')}<//>`}
      ${one.state === 'ended' && html`<${Button} kind="plain" icon="close" aria-label=${t('shell.close')} onclick=${() => forget(one)} />`}
    </p>
    ${one.problem && html`<${Problem} error=${one.problem} again=${isSending ? null : () => one.go()} /><${Advice} code=${one.problem.code} />
      ${one.state === 'stopped' && html`<p class="row"><span class="soft">${t('teach.left_over', { n: count(one.waiting.length) })}</span>
        <${Button} onclick=${() => one.stop()}>${t('teach.stop_sending')}<//></p>`}`}
    ${one.conflicts.length > 0 && !isSending && html`<p class="row">${t('teach.conflicts', { n: count(one.conflicts.length) })}
      <${Button} onclick=${() => one.resend('beside')}>${t('teach.keep_both')}<//>
      <${Button} onclick=${() => one.resend('replace')}>${t('teach.replace')}<//></p>`}
    ${one.refused.length > 0 && html`<${Refusals} refused=${one.refused} />`}
  </section>`;
}

/** Which pictures were not taken, by name, and why. */
function Refusals({ refused }) {
  return html`<details class="refused" open><summary>${t('teach.refused_title')}</summary><ul>
    ${refused.slice(0, MOST_NAMED).map((one, number) => html`<li key=${number}><b>${one.name}</b> <span>${t(`codes.${one.code}`)}</span> <small class="soft">${one.error}</small></li>`)}
    ${refused.length > MOST_NAMED && html`<li>${t('teach.more', { n: count(refused.length - MOST_NAMED) })}</li>`}
  </ul></details>`;
}

// ---- shown --------------------------------------------------------------------------------------

/** The pictures of a split, small, a page at a time. */
function Shown({ category, split, total, session, onchange }) {
  const [offset, setOffset] = useState(0);
  const [open, setOpen] = useState(null);
  const from = total ? `${path('datasets', category, split)}${query({ offset: offset || null, limit: PAGE })}` : null;
  const { data, error, again } = useData(from);
  const known = useRef(total);
  useEffect(() => { // what came, or went, meanwhile
    if (total && total !== known.current) again();
    known.current = total;
    if (offset && offset >= total) setOffset(Math.max(0, offset - PAGE));
  }, [total, offset]);
  const changed = () => { again(); onchange(); };
  const [empty] = useAction(async () => {
    const words = { split: t(`teach.split_${split}`), n: count(total), category };
    if ((await confirm({ title: t('teach.empty_title', words), body: html`<p>${t('teach.delete_stays')}</p>`, yes: t('teach.delete'), danger: true })) === null) return;
    await send('DELETE', path('datasets', category, split));
    setOffset(0);
    changed();
  });
  if (!total) return html`<p class="soft none-yet">${t('teach.none_yet')}</p>`;
  if (error) return html`<${Problem} error=${error} again=${again} />`;
  if (!data) return html`<${Waiting} />`;
  const names = data.images.map((one) => one.name);
  const at = names.indexOf(open?.name);
  return html`
    <div class="row apart"><${Pager} offset=${offset} total=${data.total} onchange=${setOffset} />
      <${Button} kind="plain" icon="remove" why=${whyNot(session, 'operator')} onclick=${empty}>${t('teach.delete_all')}<//></div>
    <div class="pictures">${data.images.map((one) => html`<button key=${one.name} type="button" title=${one.name} onclick=${() => setOpen(one)}>
      <${Photo} class="thumbnail" src=${`${path('datasets', category, split, one.name)}/thumbnail`} alt=${one.name} /><span>${one.name}</span></button>`)}</div>
    ${open && html`<${Large} key=${open.name} category=${category} split=${split} image=${open} session=${session}
      before=${data.images[at - 1]} after=${data.images[at + 1]} onopen=${setOpen} ongone=${changed} />`}`;
}

function Pager({ offset, total, onchange }) {
  const words = { from: count(Math.min(offset + 1, total)), to: count(Math.min(offset + PAGE, total)), of: count(total) };
  return html`<div class="row pager"><${Button} data-repeats icon="back" aria-label=${t('teach.earlier')} disabled=${offset === 0} onclick=${() => onchange(offset - PAGE)} />
    <span class="nowrap">${t('teach.page', words)}</span>
    <${Button} data-repeats icon="next" aria-label=${t('teach.later')} disabled=${offset + PAGE >= total} onclick=${() => onchange(offset + PAGE)} /></div>`;
}

const UNSHOWN = /\.tiff?$/i; // by browsers

/** One picture, as large as there is room; the next ones are a touch away. */
function Large({ category, split, image, session, before, after, onopen, ongone }) {
  const file = path('datasets', category, split, image.name);
  const [remove, busy] = useAction(async () => {
    onopen(null); // a question is asked alone
    const body = html`<p class="named">${image.name}</p><p>${t('teach.delete_stays')}</p>`;
    if ((await confirm({ title: t('teach.delete_title'), body, yes: t('teach.delete'), danger: true })) === null) return;
    await send('DELETE', file);
    toast(t('teach.deleted', { name: image.name }));
    ongone();
  });
  useEffect(() => {
    const keyed = (event) => {
      if (event.key === 'ArrowLeft' && before) onopen(before);
      if (event.key === 'ArrowRight' && after) onopen(after);
    };
    addEventListener('keydown', keyed);
    return () => removeEventListener('keydown', keyed);
  }, [before, after]);
  return html`<${Dialog} wide title=${image.name} onclose=${() => onopen((now) => (now === image ? null : now))}>
    <div class="large-picture">
      <${Photo} src=${UNSHOWN.test(image.name) ? `${file}/thumbnail` : file} alt=${image.name} />
      <div class="row apart"><span class="row"><${Button} data-repeats icon="back" aria-label=${t('teach.earlier')} disabled=${!before} onclick=${() => onopen(before)} />
        <${Button} data-repeats icon="next" aria-label=${t('teach.later')} disabled=${!after} onclick=${() => onopen(after)} /><span class="soft">${bytes(image.bytes)}</span></span>
        <${Button} icon="remove" kind="bad" busy=${busy} why=${whyNot(session, 'operator')} onclick=${remove}>${t('teach.delete')}<//></div>
    </div><//>`;
}
