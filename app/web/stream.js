// The line as it comes. However many tabs are open, the server sees one stream: a shared worker holds
// it where the browser has such workers; else each tab has its own, while somebody looks at it.

import { get, keyOfTab } from './api.js';

const MOST = 200; // parts that are known; the server tells no more after a gap
const SILENT_MS = 15_000; // the server says something every 2 s, or the connection is dead
const UNANSWERED_MS = 8000; // a connection from before a sleep may be tried first
const LOOK_MS = 4000;
const FIRST_MS = 400;
const LAST_MS = 5000; // between two tries

/** One stream of the server, which heals by itself. It `tell`s what it gets, as messages:
 *
 * `{ parts, anew }`: decisions, oldest first; `live` are those that did not come before the stream.
 *   `anew`: what was known before does not count any more.
 * `{ state }`: how the models stand.
 * `{ link }`: `open`, `away` (it restarts, or cannot be reached) or `refused`, with the status.
 */
export class Stream {
  constructor(key, tell) {
    this.key = key;
    this.tell = tell;
    this.parts = [];
    this.state = null;
    this.link = null;
    this.last = 0; // the number of the last part
    this.newest = null; // the last that there was when the stream began; later ones came before our eyes
    this.ended = false;
    this.heard = 0; // when the server last said something, or was asked
    this.most = 0; // how long it may be silent
    this.abort = null;
    this.wake = () => {};
  }

  /** All that is known, for one who has just come. */
  known() {
    const messages = [{ parts: this.parts, anew: true }];
    if (this.state) messages.push({ state: this.state });
    if (this.link) messages.push(this.link);
    return messages;
  }

  async run() {
    const looking = setInterval(() => this.look(), LOOK_MS);
    let pause = FIRST_MS;
    while (!this.ended) {
      const began = Date.now();
      try {
        await this.read();
        this.becomes('away');
      } catch (error) {
        if (this.ended) break;
        this.becomes(error.status === 401 || error.status === 403 ? 'refused' : 'away', error.status);
      }
      if (Date.now() - began > LAST_MS) pause = FIRST_MS; // it was well until now
      await this.rest(this.link.link === 'refused' ? LAST_MS : pause * (0.75 + Math.random() / 2));
      pause = Math.min(pause * 2, LAST_MS);
    }
    clearInterval(looking);
  }

  end() {
    this.ended = true;
    this.abort?.abort();
    this.wake();
  }

  /** Whether it is alive still: a computer that slept finds a connection that nobody ended. */
  look() {
    if (this.heard && Date.now() - this.heard > this.most) this.abort?.abort();
    this.wake();
  }

  rest(ms) {
    const until = Date.now() + ms;
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      // Timers of a tab that nobody looks at, or of a computer that slept, come late.
      this.wake = () => { if (this.ended || Date.now() >= until) { clearTimeout(timer); resolve(); } };
    });
  }

  becomes(link, status = 0) {
    if (this.link?.link === link) return;
    this.link = { link, status };
    this.tell(this.link);
  }

  async read() {
    this.abort = new AbortController();
    [this.heard, this.most] = [Date.now(), UNANSWERED_MS];
    const headers = { 'X-Kensa-Page': '1', ...(this.key && { 'X-API-Key': this.key }) };
    try {
      const answer = await fetch(`/line/events?after=${this.last}`, { headers, signal: this.abort.signal, cache: 'no-store' });
      if (!answer.ok) throw Object.assign(new Error(), { status: answer.status });
      [this.heard, this.most] = [Date.now(), SILENT_MS];
      this.newest = null;
      this.parts = this.parts.map((one) => ({ ...one, live: false, in_memory: false })); // of the stream before
      this.becomes('open');
      const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
      let rest = '';
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        this.heard = Date.now();
        const events = (rest + value).split('\n\n');
        rest = events.pop();
        this.take(events);
      }
    } finally {
      this.heard = 0;
    }
  }

  take(events) {
    const parts = [];
    for (const event of events) {
      const kind = /^event: (\w+)$/m.exec(event)?.[1];
      const data = /^data: (.*)$/m.exec(event)?.[1];
      if (kind === 'decision') {
        const part = JSON.parse(data);
        parts.push({ ...part, live: part.number > (this.newest ?? part.number) });
      }
      if (kind === 'state') {
        this.state = JSON.parse(data);
        this.newest ??= this.state.newest;
        this.tell({ state: this.state });
      }
    }
    if (parts.length) this.add(parts);
  }

  add(parts) {
    const known = new Set(this.parts.map((one) => one.id + one.number));
    const found = parts.filter((one) => !known.has(one.id + one.number));
    if (!found.length) return;
    const anew = found[0].number <= this.last; // as after a start of a server without a record
    this.parts = (anew ? found : [...this.parts, ...found]).slice(-MOST);
    this.last = found.at(-1).number;
    this.tell({ parts: found, anew });
  }
}

/** Watch the line; `hear` gets the messages of `Stream`. Returns what ends that. */
export function watchLine(hear) {
  const told = (message) => {
    if (message.link === 'refused') get('/models?limit=1').catch(() => {}); // who is here looks again
    hear(message);
  };
  const ending = 'SharedWorker' in globalThis ? shared(told) : own(told);
  return () => ending();
}

function shared(hear) {
  // Of another key another one: what one key may see is not shown to another. The name has its id.
  const name = `kensa line ${keyOfTab().slice(6, 14)}`;
  let port = null;
  let alone = null; // what ends a stream of our own
  const join = () => {
    const worker = new SharedWorker('/web/stream_worker.js', { type: 'module', name });
    port = worker.port;
    port.onmessage = ({ data }) => hear(data);
    port.postMessage({ key: keyOfTab() });
    worker.onerror = () => { // its file did not come, or the browser knows no such workers
      leave();
      alone ??= own(hear);
    };
  };
  const leave = () => {
    port?.postMessage({ leaves: true });
    port?.close();
    port = null;
  };
  const back = (event) => { if (event.persisted && !alone) join(); };
  const look = () => { if (!document.hidden) port?.postMessage({ looks: true }); };
  join();
  addEventListener('pagehide', leave);
  addEventListener('pageshow', back);
  document.addEventListener('visibilitychange', look);
  return () => {
    leave();
    alone?.();
    removeEventListener('pagehide', leave);
    removeEventListener('pageshow', back);
    document.removeEventListener('visibilitychange', look);
  };
}

function own(hear) {
  let stream = null;
  let before = null; // what was known when nobody looked any more
  const follow = () => {
    if (document.hidden === (stream === null)) return;
    if (document.hidden) {
      stream.end();
      before = stream;
      stream = null;
      return;
    }
    stream = new Stream(keyOfTab(), hear);
    if (before) Object.assign(stream, { parts: before.parts, last: before.last });
    stream.run();
  };
  follow();
  document.addEventListener('visibilitychange', follow);
  return () => {
    document.removeEventListener('visibilitychange', follow);
    stream?.end();
  };
}
