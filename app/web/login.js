// Who is not known yet enters a key: for this tab alone, or to stay on the device.

import { get, keepInTab, send } from './api.js';
import { LANGUAGES, language, setLanguage, t } from './words.js';
import { Field, html, sentence, useState } from './parts.js';

export default function Login({ onsession }) {
  const [key, setKey] = useState('');
  const [stays, setStays] = useState(false);
  const [shows, setShows] = useState(false);
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState(null);
  const enter = async (event) => {
    event.preventDefault();
    setBusy(true);
    setError(null);
    try {
      const session = await logIn(key.trim(), stays);
      if (session.role === null) setError({ code: 'unauthorized' });
      else onsession(session);
    } catch (refused) {
      setError(refused);
    }
    setBusy(false);
  };
  const problem = error && (error.code === 'unauthorized' ? t('login.unknown') : sentence(error));
  return html`<main class="login">
    <form class="card" onsubmit=${enter}>
      <div class="row apart">
        <h1><img src="/web/icon.svg" alt="" width="40" height="40" /> Kensa</h1>
        <button type="button" class="plain" lang=${other()} onclick=${() => setLanguage(other())}>${LANGUAGES[other()]}</button>
      </div>
      <p>${t('login.why')}</p>
      <${Field} label=${t('login.key')}>
        <input type=${shows ? 'text' : 'password'} name="key" value=${key} autocomplete="current-password" autocapitalize="off"
          spellcheck="false" maxlength="200" required placeholder="kensa_…" aria-describedby="wrong"
          aria-invalid=${problem ? 'true' : undefined} oninput=${(event) => setKey(event.target.value)} />
      <//>
      <div class="checks">
        <label class="check"><input type="checkbox" checked=${shows} onchange=${(event) => setShows(event.target.checked)} />${t('login.show')}</label>
        <label class="check"><input type="checkbox" checked=${stays} onchange=${(event) => setStays(event.target.checked)} />${t('login.stay')}</label>
      </div>
      <p class="soft">${t(stays ? 'login.stays' : 'login.for_tab')}</p>
      <p id="wrong" class=${problem ? 'problem' : ''} role="alert">${problem}</p>
      <button class="button main large" disabled=${busy || !key.trim()} aria-busy=${busy ? 'true' : undefined}>${t('login.enter')}</button>
      <details><summary>${t('login.no_key')}</summary>
        <p>${t('login.made_by')}</p><p>${t('login.made_on')}</p>
        <pre>kensa keys add anna --role admin</pre></details>
    </form>
  </main>`;
}

const other = () => (language() === 'ja' ? 'en' : 'ja');

/** The session with this key, which is kept where it is one; a key for the tab goes to no cookie. */
async function logIn(key, stays) {
  if (!/^[!-~]+$/.test(key)) return { role: null }; // none is like that, and no header can carry it
  if (stays) {
    keepInTab('');
    return send('POST', '/session', { key });
  }
  keepInTab(key);
  try {
    const session = await get('/session');
    if (session.role === null) keepInTab('');
    return session;
  } catch (error) {
    keepInTab('');
    throw error;
  }
}
