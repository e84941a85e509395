// Many pictures on their way: found in folders, sent a few at a time, whichever page is open.

import { path, query, sendForm } from '../api.js';
import { useEffect, useReducer } from '../parts.js';

const FILES_AT_ONCE = 20;
const BYTES_AT_ONCE = 32 * 1024 ** 2;
const AGAIN_MS = 2000;
const PICTURE = /\.(bmp|dib|jfif|jpe|jpeg|jpg|png|tif|tiff)$/i;
const ASKED = /\.(webp|heic|heif|avif|gif|zip)$/i; // the server says of each what to do
const ZIP = /\.zip$/i;
const OF_A_PICTURE = ['bad_image', 'unsupported_image', 'image_too_large', 'bad_request', 'conflict', 'upload_too_large'];
const PASSES = ['unreachable', 'overloaded', 'too_many_connections', 'not_ready'];

// ---- which files --------------------------------------------------------------------------------

/** Files that were dropped, those in folders too, each with its folder. Ask while the event is there. */
export async function dropped(transfer) {
  const entries = [...transfer.items].map((one) => one.webkitGetAsEntry?.()).filter(Boolean);
  const found = [];
  if (!entries.length) return chosen(transfer.files);
  for (const entry of entries) await walk(entry, '', found);
  return found;
}

/** Files of an input, those of a folder with it. */
export const chosen = (files) => [...files].map((file) => ({ file, name: file.name, folder: (file.webkitRelativePath ?? '').slice(0, -file.name.length) }));

async function walk(entry, folder, found) {
  try {
    if (entry.isFile) {
      found.push({ file: await new Promise((done, failed) => entry.file(done, failed)), name: entry.name, folder });
      return;
    }
    const reader = entry.createReader();
    for (;;) { // it gives a hundred at a time
      const some = await new Promise((done, failed) => reader.readEntries(done, failed));
      if (!some.length) return;
      for (const one of some) await walk(one, `${folder}${entry.name}/`, found);
    }
  } catch (error) {
    found.push({ file: null, name: entry.name, folder, error: String(error.message ?? error) });
  }
}

/** Two of one name, of different folders, get these into their names: left/1.png is left_1.png. */
function named(found) {
  const times = new Map();
  for (const one of found) times.set(one.name, (times.get(one.name) ?? 0) + 1);
  return found.map((one) => {
    const isOne = times.get(one.name) === 1 || !one.folder;
    return { ...one, as: isOne ? one.name : `${one.folder.replaceAll('/', '_')}${one.name}`.slice(-120).replace(/^[._]+/, '') };
  });
}

// ---- on their way -------------------------------------------------------------------------------

const uploads = new Map(); // category/split -> Upload
const watchers = new Set();
const changed = () => { for (const look of watchers) look(); };

addEventListener('beforeunload', (event) => {
  if ([...uploads.values()].some((one) => one.state === 'sending')) event.preventDefault();
});

/** What is, or was, sent into a split since the page was opened; null for nothing. */
export function useUpload(category, split) {
  const [, again] = useReducer((turn) => turn + 1, 0);
  useEffect(() => { watchers.add(again); return () => watchers.delete(again); }, []);
  return uploads.get(`${category}/${split}`) ?? null;
}

/** Send files into a split, behind those that are on their way there. */
export function upload(category, split, found) {
  const key = `${category}/${split}`;
  const before = uploads.get(key);
  const now = before && before.state !== 'ended' ? before : new Upload(category, split);
  uploads.set(key, now);
  now.add(named(found));
  changed();
}

/** Forget what was said of an upload that has ended. */
export function forget(one) {
  uploads.delete(`${one.category}/${one.split}`);
  changed();
}

class Upload {
  constructor(category, split) {
    Object.assign(this, { category, split, state: 'sending', problem: null });
    this.waiting = []; // handles of files, whose bytes stay on the disk until they are sent
    Object.assign(this, { files: 0, done: 0, bytes: 0, bytesDone: 0, bytesNow: 0 });
    Object.assign(this, { added: 0, there: 0, refused: [], skipped: 0, skippedNames: [], turn: 0 });
  }

  add(found) {
    for (const one of found) {
      if (one.error) this.refuse(one, { code: 'unreadable', message: one.error });
      else if (one.name.startsWith('.') || !(PICTURE.test(one.name) || ASKED.test(one.name))) this.skip(one.name);
      else { this.waiting.push(one); this.files += 1; this.bytes += one.file.size; }
    }
    this.state = 'sending';
    this.go();
  }

  get share() {
    return this.bytes ? Math.min(1, (this.bytesDone + this.bytesNow) / this.bytes) : this.done / Math.max(1, this.files);
  }

  get conflicts() {
    return this.refused.filter((one) => one.code === 'conflict' && one.sent);
  }

  skip(name, count = 1) {
    this.skipped += count;
    if (this.skippedNames.length < 10) this.skippedNames.push(name);
  }

  refuse(one, { code, message }) {
    const prefix = `${one.as ?? one.name}: `;
    this.refused.push({ name: one.as ?? one.name, code, error: message.startsWith(prefix) ? message.slice(prefix.length) : message, sent: one.file ? one : null });
  }

  /** Once more those whose names others have: in their place, or beside them. */
  resend(how) {
    const again = this.conflicts.map((one) => one.sent);
    this.refused = this.refused.filter((one) => !(one.code === 'conflict' && one.sent));
    this.add(again.map((one) => (how === 'replace' ? { ...one, replace: true } : { ...one, as: beside(one.as) })));
    changed();
  }

  stop() {
    this.state = 'ended';
    this.waiting = [];
    this.ending?.abort();
    changed();
  }

  /** Send what waits; one that was stopped by a problem goes on from there. */
  async go() {
    if (this.isGoing) return;
    this.isGoing = true;
    this.state = 'sending';
    while (this.waiting.length && this.state === 'sending') await this.step();
    this.isGoing = false;
    if (this.state === 'sending') this.state = 'ended';
    this.turn += 1;
    changed();
  }

  async step() {
    const batch = this.next();
    this.ending = new AbortController();
    try {
      this.took(await this.send(batch), batch);
      this.problem = null;
    } catch (error) {
      if (error.name !== 'AbortError') await this.failed(error, batch);
    }
    this.bytesNow = 0;
    changed();
  }

  /** The next files that go together; zips, and what was refused in company, go alone. */
  next() {
    const batch = [];
    let bytes = 0;
    while (this.waiting.length && batch.length < FILES_AT_ONCE) {
      const one = this.waiting[0];
      const isAlone = one.alone || ZIP.test(one.name);
      if (batch.length && (isAlone || bytes + one.file.size > BYTES_AT_ONCE || Boolean(one.replace) !== Boolean(batch[0].replace))) break;
      batch.push(this.waiting.shift());
      bytes += one.file.size;
      if (isAlone) break;
    }
    return batch;
  }

  send(batch) {
    const form = new FormData();
    for (const one of batch) form.append('file', one.file, one.as);
    return sendForm(`${path('datasets', this.category, this.split)}${query({ replace: batch[0].replace && 'true' })}`, form, {
      signal: this.ending.signal,
      onprogress: (bytes) => { this.bytesNow = bytes; changed(); },
    });
  }

  took(answer, batch) {
    this.added += answer.added.length;
    this.there += answer.already_there.length;
    const sent = new Map(batch.map((one) => [one.as.normalize('NFC'), one]));
    for (const { name, error, code } of answer.refused) {
      const one = sent.get(name.normalize('NFC'));
      this.refuse(one ?? { name }, { code, message: error });
    }
    for (const { names, count } of answer.skipped) {
      this.skip(names[0], count);
      this.skippedNames.push(...names.slice(1, Math.max(1, 11 - this.skippedNames.length)));
    }
    this.leave(batch);
    this.turn += 1;
  }

  leave(batch) {
    this.done += batch.length;
    this.bytesDone += batch.reduce((sum, one) => sum + one.file.size, 0);
  }

  async failed(error, batch) {
    if (OF_A_PICTURE.includes(error.code)) {
      if (batch.length > 1) this.waiting.unshift(...batch.map((one) => ({ ...one, alone: true })));
      else { this.refuse(batch[0], error); this.leave(batch); }
      return;
    }
    if (this.state !== 'sending') return;
    this.waiting.unshift(...batch);
    this.problem = error;
    if (!PASSES.includes(error.code)) { this.state = 'stopped'; return; }
    changed();
    await new Promise((done) => setTimeout(done, AGAIN_MS));
  }
}

/** Another name: 1.png becomes 1_2.png. */
const beside = (name) => name.replace(/(\.[^.]+)$/, '_2$1');
