// The report of a shift, to be printed: asked for with the key, which a plain link could not send.

import { ask } from './api.js';
import { t } from './words.js';

const place = document.getElementById('report');

/** The page that the server drew, as nodes of this one.
 *
 * Its styles are put in by script, as the policy of these pages wants it; of code it has none.
 */
function put(text) {
  const page = new DOMParser().parseFromString(text, 'text/html');
  for (const script of page.querySelectorAll('script')) script.remove();
  const sheet = new CSSStyleSheet();
  sheet.replaceSync([...page.querySelectorAll('style')].map((one) => one.textContent).join('\n'));
  document.adoptedStyleSheets = [sheet];
  document.documentElement.lang = page.documentElement.lang;
  document.title = page.title;
  place.replaceChildren(printer(), ...page.body.childNodes);
  for (const one of place.querySelectorAll('[style]')) one.style.cssText = one.getAttribute('style');
}

function printer() {
  const bar = Object.assign(document.createElement('div'), { className: 'over' });
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
