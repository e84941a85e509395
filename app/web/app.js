// The frame around the pages: who is here, in which language, and what is shown.

import { ask, get, whenUnknown } from './api.js';
import { LANGUAGES, language, setLanguage, t, useLanguage } from './words.js';
import {
  Dialogs, Icon, Problem, Toasts, Waiting, html, leave, loadStyle, render, useCallback, useEffect,
  useRef, useRoute, useState,
} from './parts.js';

const PAGES = ['line', 'try', 'review', 'find', 'model', 'teach', 'regions', 'system'];

function Screen() {
  useLanguage();
  const { page, query } = useRoute('line');
  const [session, setSession] = useState(null);
  const [problem, setProblem] = useState(null);
  const lookAgain = useCallback(() => {
    get('/session').then(
      (now) => { setSession(now); setProblem(null); },
      setProblem,
    );
  }, []);
  useEffect(lookAgain, []);
  useEffect(() => whenUnknown(() => setSession((now) => now && { ...now, key: null, role: null })), []);
  useEffect(() => {
    if (problem === null) return undefined;
    const again = setTimeout(lookAgain, 2000);
    return () => clearTimeout(again);
  }, [problem]);
  useEffect(() => {
    document.documentElement.lang = language();
    document.title = `${t(`pages.${shown(page)}`)} · Kensa`;
  });
  if (session === null) {
    return html`<main class="alone">${problem ? html`<${Problem} error=${problem} />` : html`<${Waiting} />`}</main>`;
  }
  if (session.role === null) {
    return html`<${Lazy} module="login" session=${session} onsession=${setSession} />`;
  }
  const isWall = query.get('wall') === '1';
  return html`
    ${!isWall && html`<${Frame} page=${shown(page)} session=${session} onsession=${setSession} />`}
    <main id="main" tabindex="-1" class=${`page ${shown(page)} ${isWall ? 'wall' : ''}`}>
      <${Lazy} key=${shown(page)} module=${`pages/${shown(page)}`} query=${query} session=${session} onsession=${setSession} />
    </main>
    <${Toasts} /><${Dialogs} />`;
}

const shown = (page) => (PAGES.includes(page) ? page : 'line');

/** A page, whose code and look are loaded when it is opened for the first time. */
function Lazy({ module, ...given }) {
  const [loaded, setLoaded] = useState(null);
  const [problem, setProblem] = useState(null);
  useEffect(() => {
    let gone = false;
    Promise.all([import(`./${module}.js`), loadStyle(`/web/${module}.css`)]).then(
      ([found]) => gone || setLoaded(() => found.default),
      () => gone || setProblem({ code: 'unreachable', message: '' }),
    );
    return () => { gone = true; };
  }, [module]);
  useEffect(() => {
    if (!problem) return undefined;
    const timer = setInterval(() => ask('/livez').then(() => location.reload(), () => {}), 2000);
    return () => clearInterval(timer);
  }, [problem]);
  if (problem) return html`<${Problem} error=${problem} again=${() => location.reload()} />`;
  return loaded ? html`<${loaded} ...${given} />` : html`<${Waiting} />`;
}

function Frame({ page, session, onsession }) {
  const here = useRef(null);
  // `nearest` alone would scroll the whole page, too, where the bar is at the foot of a phone.
  useEffect(() => here.current?.scrollIntoView?.({ block: 'nearest', inline: 'center' }), [page]);
  return html`
    <a class="skip" href="#main" onclick=${skip}>${t('shell.skip')}</a>
    <header class="frame">
      <a class="brand" href="#/line" aria-label="Kensa"><img src="/web/icon.svg" alt="" width="32" height="32" /><b>Kensa</b></a>
      <nav aria-label=${t('shell.pages')}>
        ${PAGES.map((name) => html`<a key=${name} href=${`#/${name}`} ref=${name === page ? here : null}
          aria-current=${name === page ? 'page' : undefined}><${Icon} name=${name} /><span>${t(`pages.${name}`)}</span></a>`)}
      </nav>
      <div class="who">
        <button class="plain" lang=${other()} onclick=${() => setLanguage(other())}>${LANGUAGES[other()]}</button>
        ${session.key && html`<button class="plain" title=${t('shell.leave', { key: session.key })}
          onclick=${() => leave().then(onsession)}><${Icon} name="leave" /><span>${session.key}</span></button>`}
      </div>
    </header>`;
}

const other = () => (language() === 'ja' ? 'en' : 'ja');

function skip(event) {
  event.preventDefault(); // a plain #main would be another page
  document.getElementById('main').focus();
}

render(html`<${Screen} />`, document.getElementById('screen'));
