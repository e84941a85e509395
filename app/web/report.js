// The report of a shift, to be printed: asked for with the key, which a plain link could not send.

import { ask } from './api.js';
import { t } from './words.js';

const place = document.getElementById('report');

/** The page that the server drew, as nodes of this one. It has no code.
 *
 * The policy of these pages takes no styles from markup, but from script; so they go this way.
 */
function put(text) {
  const styles = [];
  const markup = text
    .replace(/<style>(.*?)<\/style>/gs, (_, style) => { styles.push(style); return ''; })
    .replaceAll(' style="', ' data-style="'); // in what came from outside " is &quot;
  const page = new DOMParser().parseFromString(markup, 'text/html');
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(styles.join('\n'));
  document.adoptedStyleSheets = [sheet];
  document.documentElement.lang = page.documentElement.lang;
  document.title = page.title;
  place.replaceChildren(printer(), ...page.body.childNodes);
  for (const one of place.querySelectorAll('[data-style]')) one.style.cssText = one.dataset.style;
}

function printer() {
  const bar = Object.assign(document.createElement('div'), { className: 'printing' });
  const button = Object.assign(document.createElement('button'), { type: 'button', textContent: t('system.print') });
  button.onclick = () => print();
  bar.append(button);
  return bar;
}

place.textContent = t('shell.waiting');
ask(`/statistics.html${location.search}`)
  .then((answer) => answer.text())
  .then(put)
  .catch((error) => { place.textContent = `${t(`codes.${error.code}`)} ${error.message}`; });
