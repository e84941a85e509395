// What the page asks of the server, always with its key, and what is said where it says no.

const KEY = 'kensa.key'; // of this tab alone; one that is to stay is in a cookie that no script sees

/** The server said no: `status`, the `code` of the agreed form, its sentence as `message`, all of it as `body`. */
export class Refused extends Error {
  constructor(status, code, sentence) {
    super(sentence);
    this.status = status;
    this.code = code;
  }
}

/** The key of this tab; empty where it has none. */
export const keyOfTab = () => sessionStorage.getItem(KEY) ?? '';

/** Keep a key until the tab is closed; an empty one forgets it. */
export function keepInTab(key) {
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
}

const leavers = new Set();

/** Call `left` whenever the server does not know our key any more; returns what ends that. */
export function whenUnknown(left) {
  leavers.add(left);
  return () => leavers.delete(left);
}

/** What each request says of who asks. */
function ours(given) {
  const headers = new Headers(given);
  headers.set('X-Kensa-Page', '1'); // no page of another server can send it unasked
  if (keyOfTab()) headers.set('X-API-Key', keyOfTab());
  return headers;
}

/** The answer to a request, whatever it is; throws `Refused` where it is no success. */
export async function ask(path, options = {}) {
  const headers = ours(options.headers);
  let answer;
  try {
    answer = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    throw new Refused(0, 'unreachable', '');
  }
  if (answer.ok) return answer;
  throw refusal(answer.status, await answer.text());
}

/** What an answer says that is no success. */
function refusal(status, text) {
  let refused;
  try {
    const body = JSON.parse(text);
    refused = Object.assign(new Refused(status, body.code ?? 'http_error', body.error ?? text), { body });
  } catch {
    refused = new Refused(status, 'http_error', text.slice(0, 300));
  }
  if (status === 401) for (const left of leavers) left(refused);
  return refused;
}

/** GET: what the JSON says. */
export const get = async (path, options) => (await ask(path, options)).json();

/** Any other method; `body` goes as JSON where it is given. Null where nothing comes back. */
export async function send(method, path, body) {
  const options = { method };
  if (body !== undefined) {
    options.headers = { 'Content-Type': 'application/json' };
    options.body = JSON.stringify(body);
  }
  const answer = await ask(path, options);
  const text = await answer.text();
  return text ? JSON.parse(text) : null;
}

/** POST a form with files; `onprogress` hears how many bytes have left, which fetch does not say. */
export function sendForm(to, form, { signal, onprogress } = {}) {
  return new Promise((done, failed) => {
    const request = new XMLHttpRequest();
    const stop = () => { request.abort(); failed(new DOMException('', 'AbortError')); };
    if (signal?.aborted) { stop(); return; }
    signal?.addEventListener('abort', stop);
    request.open('POST', to);
    for (const [name, value] of ours()) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => onprogress?.(event.loaded);
    request.onerror = () => failed(new Refused(0, 'unreachable', ''));
    request.onload = () => {
      const { status, responseText } = request;
      if (status >= 200 && status < 300) done(JSON.parse(responseText));
      else failed(refusal(status, responseText));
    };
    request.onloadend = () => signal?.removeEventListener('abort', stop);
    request.send(form);
  });
}

/** `?a=1&b=2` of those that are neither null nor empty. */
export function query(values) {
  const given = Object.entries(values).filter(([, value]) => value != null && value !== '');
  return given.length ? `?${new URLSearchParams(given)}` : '';
}

/** A path of parts that come from outside, such as `path('models', name)`. */
export const path = (...parts) => `/${parts.map(encodeURIComponent).join('/')}`;

/** Save an answer as a file, under the name that the server gives it or this one. */
export async function download(from, name) {
  const answer = await ask(from);
  const given = /filename="([^"]+)"/.exec(answer.headers.get('Content-Disposition') ?? '');
  const link = document.createElement('a');
  link.href = URL.createObjectURL(await answer.blob());
  link.download = given?.[1] ?? name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// Pictures. An <img> sends no key, so they come like everything else; the last ones stay.

const MOST_PICTURES = 240;
const MOST_BYTES = 96 * 1024 ** 2; // a painted picture has one or two MiB
const pictures = new Map(); // path -> promise of a blob: URL, the one used last at the end

/** A blob: URL of a picture; throws `Refused`. */
export function picture(from) {
  let known = pictures.get(from);
  if (known === undefined) {
    const answer = ask(from).then((given) => given.blob());
    known = answer.then((data) => URL.createObjectURL(data));
    Promise.all([known, answer]).then(
      ([url, { size }]) => Object.assign(known, { url, size }),
      () => pictures.delete(from),
    );
  }
  pictures.delete(from);
  pictures.set(from, known);
  let bytes = 0;
  for (const { size = 0 } of pictures.values()) bytes += size;
  for (const [oldest, url] of pictures) {
    if (pictures.size <= MOST_PICTURES && bytes <= MOST_BYTES) break;
    bytes -= url.size ?? 0;
    pictures.delete(oldest);
    url.then(URL.revokeObjectURL, () => {});
  }
  return known;
}

/** The same where it is here already, else null: so that what was asked for before stands at once. */
export const pictureHere = (from) => pictures.get(from)?.url ?? null;

/** Forget a picture that is another one now. */
export function forgetPicture(from) {
  pictures.get(from)?.then(URL.revokeObjectURL, () => {});
  pictures.delete(from);
}

/** Forget all pictures below a path, such as a decision's that were deleted. */
export function forgetPictures(below) {
  for (const from of [...pictures.keys()]) if (from.startsWith(`${below}/`)) forgetPicture(from);
}
