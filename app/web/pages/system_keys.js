// Who may do what: keys are made here, shown once, and ended.

import { get, keepInTab, path, send } from '../api.js';
import { t } from '../words.js';
import {
  Button, Choice, Dialog, Field, Problem, Waiting, confirm, html, moment, useAction, useData, useRef,
  useState,
} from '../parts.js';

const ROLES = ['line', 'operator', 'admin'];

export function Keys({ session, onsession }) {
  const { data, error, again } = useData('/keys', 10_000);
  const [isOpen, setOpen] = useState(false);
  if (data === null) return error ? html`<${Problem} error=${error} again=${again} />` : html`<${Waiting} />`;
  const isFirst = data.keys.length === 0;
  return html`
    ${isFirst && html`<div class="warn"><p>${t('system.keys_none')}</p></div>`}
    ${!isFirst && !session.keys && html`<div class="warn"><p>${t('system.keys_unused')}</p></div>`}
    <div class="row apart head"><h2>${t('system.part_keys')}</h2>
      <${Button} kind="main" icon="add" onclick=${() => setOpen(true)}>${t('system.add_key')}<//></div>
    <dl class="roles">${ROLES.map((role) => html`<div key=${role}><dt>${role}</dt><dd>${t(`system.role_${role}`)}</dd></div>`)}</dl>
    <ul class="jobs">${data.keys.map((one) => html`<${Key} key=${one.name} one=${one} known=${data} session=${session} again=${again} />`)}</ul>
    ${isOpen && html`<${NewKey} isFirst=${isFirst} onclose=${async (key) => {
      setOpen(false);
      again();
      if (key && !session.keys) onsession(await get('/session')); // from the first key on one is needed
    }} />`}`;
}

function Key({ one, known, session, again }) {
  const isOwn = session.key === one.name;
  const isLast = known.keys.length === 1 && known.opens_without;
  const [remove, removing] = useAction(async () => {
    const body = html`<p>${t('system.key_refused')}</p>${isOwn && html`<p class="warn"><span>${t('system.key_own')}</span></p>`}
      ${isLast && html`<p class="warn"><span>${t('system.key_last')}</span></p>`}`;
    const title = t('system.remove_key', { name: one.name });
    if (await confirm({ title, body, yes: t('system.remove'), danger: true }) === null) return;
    await send('DELETE', path('keys', one.name));
    if (isOwn) keepInTab('');
    again();
  });
  return html`<li class="card row apart">
    <span><b class="name">${one.name}</b> <span class="state">${one.role}</span>${isOwn && html` <span class="soft">${t('system.this_one')}</span>`}<br />
      <small class="soft"><code>kensa_${one.id}_…</code> · ${t('system.since', { time: moment(one.created, false) })}</small></span>
    <${Button} icon="remove" busy=${removing} onclick=${remove}>${t('system.remove')}<//></li>`;
}

function NewKey({ onclose, ...given }) {
  const [isFirst] = useState(given.isFirst); // as it was asked for: the list behind is asked for again meanwhile
  const [name, setName] = useState('');
  const [role, setRole] = useState(isFirst ? 'admin' : 'line');
  const [made, setMade] = useState(null);
  const [problem, setProblem] = useState(null);
  const [add, adding] = useAction(async () => {
    try {
      const key = await send('POST', '/keys', { name, role });
      if (isFirst) keepInTab(key.key); // else whoever made it would be locked out
      setMade(key);
    } catch (error) {
      setProblem(error);
    }
  });
  const close = () => onclose(made);
  if (made) {
    return html`<${Dialog} title=${t('system.key_made', { name: made.name })} onclose=${close}>
      <p class="warn"><span>${t('system.key_once')}</span></p><${ToCopy} text=${made.key} />
      ${isFirst && html`<p>${t('system.key_first_kept')}</p>`}
      <div class="row end"><${Button} kind="main" onclick=${close}>${t('system.key_noted')}<//></div><//>`;
  }
  return html`<${Dialog} title=${t('system.add_key')} onclose=${close}>
    <form onsubmit=${(event) => { event.preventDefault(); add(); }}>
      <${Field} label=${t('system.key_name')} hint=${t('system.key_name_hint')}><input value=${name} required pattern="[A-Za-z0-9_\\-]{1,64}"
        autocomplete="off" oninput=${(event) => setName(event.target.value)} /><//>
      <${Choice} label=${t('system.role')} value=${role} onchange=${setRole} options=${(isFirst ? ['admin'] : ROLES).map((one) => [one, one])} />
      <p class="soft">${t(`system.role_${role}`)} ${isFirst && t('system.key_first')}</p>
      ${problem && html`<${Problem} error=${problem} />`}
      <div class="row end"><${Button} onclick=${close}>${t('shell.no')}<//>
        <button class="button main" disabled=${adding || !name}>${t('system.make')}</button></div>
    </form><//>`;
}

/** A text to be taken away. Without TLS a browser lets no script near its clipboard but by a touch. */
function ToCopy({ text }) {
  const box = useRef(null);
  const [done, setDone] = useState(false);
  const copy = async () => {
    box.current.select();
    if (navigator.clipboard) await navigator.clipboard.writeText(text).catch(() => document.execCommand('copy'));
    else document.execCommand('copy');
    setDone(true);
  };
  return html`<div class="row copy"><textarea ref=${box} class="grow" rows="3" readonly value=${text} aria-label=${t('system.key')} onfocus=${(event) => event.target.select()} />
    <${Button} icon=${done ? 'good' : undefined} onclick=${copy}>${t(done ? 'system.copied' : 'system.copy')}<//></div>`;
}
