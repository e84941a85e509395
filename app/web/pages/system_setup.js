// How the server is set up, and what is wrong with it or its machine.

import { language, t } from '../words.js';
import { Button, Field, Problem, Waiting, count, html, useData, useEffect, useState } from '../parts.js';

export function Doctor() {
  const { data, error, again } = useData('/doctor');
  const [turn, setTurn] = useState(0);
  const lookAgain = () => { setTurn(turn + 1); again(); };
  return html`<div class="row apart head"><h2>${t('system.findings')}</h2>
      <${Button} onclick=${lookAgain}>${t('system.look_again')}<//></div>
    ${error && html`<${Problem} error=${error} />`}
    ${data === null && !error && html`<${Waiting}>${t('system.looking')}<//>`}
    ${data && html`
      ${data.ok && html`<p class="well">${t('system.doctor_well')}</p>`}
      <ul class="findings">${data.findings.map((one) => html`<li key=${one.what} class=${one.level === 'wrong' ? 'problem' : 'warn'}>
        <p><b>${t(`system.level_${one.level}`)}</b> ${one.what}</p>${one.do && html`<pre tabindex="0">${one.do}</pre>`}</li>`)}</ul>
      ${data.models.length > 0 && html`<h2>${t('system.fits_title')}</h2><ul class="jobs">
        ${data.models.map((one) => html`<li key=${one.name} class="card"><div class="row apart">
          <span><b class="name">${one.name}</b> <span class=${`state ${one.fits === false ? 'failed' : 'succeeded'}`}>${t(`system.fits_${one.fits}`)}</span></span>
          <b>${t('system.needs', { mib: count(one.needs_mib) })}</b></div>
          <small class="soft">${one.version} · ${one.kind} · ${t('system.plan', { plan: one.plan })}</small></li>`)}</ul>`}
      ${Object.entries(data.facts).map(([section, facts]) => html`<h2 key=${section}>${t(`system.facts_${section}`)}</h2>
        <table><tbody>${Object.entries(facts).map(([name, value]) => html`<tr key=${name}><th scope="row">${name}</th><td>${String(value)}</td></tr>`)}</tbody></table>`)}`}`;
}

export function Settings() {
  const { data: known, error, again } = useData('/settings');
  const [japanese, setJapanese] = useState(null);
  const isJapanese = language() === 'ja';
  useEffect(() => { if (isJapanese) import('./system_settings_ja.js').then(setJapanese); }, [isJapanese]);
  const data = known && { settings: isJapanese && japanese ? known.settings.map((one) => inJapanese(one, japanese)) : known.settings };
  const [wanted, setWanted] = useState('');
  const [isChangedOnly, setChangedOnly] = useState(false);
  if (data === null) return error ? html`<${Problem} error=${error} again=${again} />` : html`<${Waiting} />`;
  const words = wanted.toLowerCase().split(/\s+/).filter(Boolean);
  const found = data.settings.filter((one) => (one.changed || !isChangedOnly)
    && words.every((word) => `${one.variable} ${one.meaning} ${one.value} ${groupOf(one)}`.toLowerCase().includes(word)));
  const groups = [...new Set(found.map((one) => one.group))];
  return html`<p class="soft">${t('system.settings_why')}</p>
    <div class="row"><div class="grow"><${Field} label=${t('system.search')}><input type="search" value=${wanted} oninput=${(event) => setWanted(event.target.value)} /><//></div>
      <label class="check"><input type="checkbox" checked=${isChangedOnly} onchange=${(event) => setChangedOnly(event.target.checked)} />${t('system.changed_only')}</label></div>
    <p class="soft" role="status">${t('system.found', { count: count(found.length), all: count(data.settings.length) })}</p>
    ${groups.map((group) => html`<section key=${group}><h2>${groupOf({ group })}</h2>
      <ul class="settings">${found.filter((one) => one.group === group).map((one) => html`<li key=${one.variable} class=${one.changed ? 'changed' : ''}>
        <code>${one.variable}</code>
        <span class="value"><b>${value(one)}</b> <span class="soft">${one.unit}</span>
          ${one.changed && html` <span class="mark">${t('system.changed')}</span>`}
          ${one.changed && one.default !== null && html` <small class="soft">${t('system.default', { value: one.default })}</small>`}</span>
        <span class="meaning soft">${one.meaning}</span></li>`)}</ul></section>`)}`;
}

const inJapanese = (one, { MEANINGS, UNITS }) => ({
  ...one,
  meaning: MEANINGS[one.variable.replace('KENSA_', '')] ?? one.meaning,
  unit: UNITS[one.unit] ?? one.unit,
});

/** Its words begin with its first: `Models and their versions` is `group_models`. */
const groupOf = ({ group }) => {
  const words = t(`system.group_${group.toLowerCase().replace(/^the /, '').split(/\W/)[0]}`);
  return words.startsWith('system.') ? group : words;
};

function value(one) {
  if (one.secret) return t(one.changed ? 'system.hidden' : 'system.not_set');
  return one.value === null || one.value === '' ? t('system.not_set') : one.value;
}
