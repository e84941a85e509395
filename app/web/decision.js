// A decision with all that is known of it; pages open it with `DecisionDialog`.

import { download, forgetPictures, get, path, query, send } from './api.js';
import { t } from './words.js';
import {
  Button, Dialog, Field, Mark, Problem, ScoreBar, Thumbnail, Verdict, Waiting, confirm, html,
  loadStyle, may, moment, number as digits, toast, useAction, useData, useEffect, useModels,
  useRef, useState, whyNot,
} from './parts.js';
import { Viewer } from './viewer.js';

await loadStyle('/web/decision.css');

const LABELS = ['good', 'defect', 'unusable'];
const SAME_PART = 20;

/** A decision in a window over the page.
 *
 * `known` is the decision as far as the page has it, so that it is seen at once; else `id` and
 * `number` name it. `newer` and `older` open the ones beside it, where there are any; `onopen` opens
 * another decision of the same part, which without it is a link to Find; `onchange` gets the
 * decision whenever somebody marks it or deletes its picture.
 */
export function DecisionDialog({ id, number, known = null, session, onclose, onchange, newer, older, onopen }) {
  const own = `${path('decisions', id)}${query({ number })}`;
  const { data, error, again } = useData(own);
  const [changed, setChanged] = useState(null);
  const isOf = (one) => one?.id === id && (number == null || one.number === Number(number));
  const decision = [changed, data, known].find(isOf) ?? null;
  const change = (next) => { setChanged(next); onchange?.(next); };
  useArrows({ ArrowLeft: newer, ArrowRight: older });
  const title = decision === null ? t('decision.title') : decision.part ?? t('decision.unnamed');
  return html`<${Dialog} wide title=${title} onclose=${onclose}>
    <div class="decision">
      <div class="row apart beside">
        ${decision && html`<div class="row"><${Verdict} verdict=${decision.verdict} code=${decision.code} size="big" /><span class="soft">${moment(decision.time)}</span></div>`}
        ${(newer || older) && html`<div class="row">
          <${Button} data-repeats icon="back" disabled=${!newer} onclick=${newer} aria-label=${t('decision.newer')} title=${t('decision.newer')} />
          <${Button} data-repeats icon="next" disabled=${!older} onclick=${older} aria-label=${t('decision.older')} title=${t('decision.older')} /></div>`}
      </div>
      ${error && html`<${Problem} error=${error} again=${again} />`}
      ${decision === null && !error && html`<${Waiting} />`}
      ${decision && html`<${DecisionView} key=${decision.number} decision=${decision} session=${session} onchange=${change} onopen=${onopen} />`}
    </div><//>`;
}

/** Do at an arrow what `keys` says, while no other window lies over the decision's. */
function useArrows(keys) {
  const latest = useRef(keys);
  latest.current = keys;
  useEffect(() => {
    const pressed = (event) => {
      const isOurs = [...document.querySelectorAll('dialog[open]')].at(-1)?.querySelector('.decision');
      if (!isOurs || event.altKey || event.ctrlKey || event.metaKey || event.target.closest?.('input, select, textarea, [data-keys]')) return;
      const act = latest.current[event.key];
      if (act) { event.preventDefault(); act(); }
    };
    addEventListener('keydown', pressed);
    return () => removeEventListener('keydown', pressed);
  }, []);
}

/** All of a decision, without a window around it: as `GET /decisions/{id}` says it, or less. */
export function DecisionView({ decision, session, onchange, onopen }) {
  const [view, setView] = useState(decision.views?.decided_by);
  const one = decision.views?.views.find((other) => other.view === view) ?? decision;
  return html`<div class="parts">
    <div class="seen">
      <${Viewer} decision=${decision} view=${view} image=${one.image} alt=${t('decision.picture', { part: decision.part ?? decision.id })} />
      ${decision.views && html`<${Views} decision=${decision} view=${view} onview=${setView} />`}
    </div>
    <div class="facts">
      <${Scores} of=${one} />
      <${Marking} decision=${decision} session=${session} onchange=${onchange} />
      <${Facts} decision=${decision} of=${one} />
      <${Replay} key=${view} decision=${decision} of=${one} view=${view} session=${session} />
      <${History} lines=${decision.history} />
      ${decision.part && html`<${SamePart} decision=${decision} onopen=${onopen} />`}
      <${Files} decision=${decision} view=${view} session=${session} onchange=${onchange} />
    </div></div>`;
}

function Views({ decision, view, onview }) {
  const { of, views, line, decided_by: worst } = decision.views;
  return html`<h3>${t('decision.views', { of })}${line && html` <span class="soft">${line}</span>`}</h3>
    <div class="views" role="radiogroup" aria-label=${t('decision.views', { of })}>
      ${views.map((one, place) => html`<button key=${place} type="button" role="radio" aria-checked=${one.view === view ? 'true' : 'false'}
        disabled=${one.image === null} onclick=${() => onview(one.view)}>
        ${one.image && html`<${Thumbnail} decision=${decision} view=${one.view} />`}
        <b>${one.view}</b><${Verdict} verdict=${one.verdict} code=${one.code} />${one.view === worst && html`<small>${t('decision.decided_by')}</small>`}
      </button>`)}
    </div>`;
}

function Scores({ of }) {
  if (of.score === null) return null;
  return html`<section class="scores">
    <${ScoreBar} score=${of.score} threshold=${of.threshold} />
    <table><thead><tr><td></td><th scope="col">${t('decision.score')}</th><th scope="col">${t('decision.limit')}</th></tr></thead><tbody>
      <tr><th scope="row">${t('decision.normalised')}</th><td><b>${digits(of.score, 4)}</b></td><td>${digits(of.threshold, 4)}</td></tr>
      <tr><th scope="row">${t('decision.raw')}</th><td>${digits(of.raw_score, 4)}</td><td>${digits(of.raw_threshold, 4)}</td></tr>
    </tbody></table></section>`;
}

/** What a person says of it: with one touch, or with the kind of defect and why. */
function Marking({ decision, session, onchange }) {
  const [kind, setKind] = useState('');
  const [reason, setReason] = useState('');
  const [mark, busy] = useAction(async (label) => {
    const body = { label, reason: reason.trim(), ...(label === 'defect' && { defect: kind.trim() }) };
    onchange(await send('POST', `${path('decisions', decision.id, 'label')}${query({ number: decision.number })}`, body));
    setKind('');
    setReason('');
  });
  const [withdraw, withdrawing] = useAction(async () => onchange(await send('DELETE', `${path('decisions', decision.id, 'label')}${query({ number: decision.number })}`)));
  const why = whyNot(session, 'operator');
  return html`<section class="marking"><h3>${t('decision.marked')} ${decision.label ? html`<${Mark} label=${decision.label} defect=${decision.defect} />` : html`<span class="soft">${t('decision.not_marked')}</span>`}
      ${decision.label && !why && html`<${Button} kind="plain" icon="undo" busy=${withdrawing} onclick=${withdraw}>${t('decision.withdraw')}<//>`}</h3>
    <div class="marks">${LABELS.map((label) => html`<${Button} key=${label} icon=${label} kind=${{ good: 'good', defect: 'bad' }[label] ?? ''} busy=${busy} why=${why}
      aria-pressed=${decision.label === label ? 'true' : 'false'} onclick=${() => mark(label)}>${t(`label.${label}`)}<//>`)}</div>
    ${!why && html`<details><summary>${t('decision.more_to_say')}</summary>
      <${Field} label=${t('decision.kind')}><input value=${kind} maxlength="100" oninput=${(event) => setKind(event.target.value)} /><//>
      <${Field} label=${t('shell.reason_may')}><input value=${reason} maxlength="500" oninput=${(event) => setReason(event.target.value)} /><//></details>`}
  </section>`;
}

function Facts({ decision, of }) {
  const model = of.model && html`<a href=${`#/model${query({ name: of.model })}`}>${of.model}</a>`;
  const version = of.version && html`<a href=${`#/model${query({ name: of.model, version: of.version })}`}>${of.version}</a>`;
  const image = of.image && `${of.image.format}, ${of.image.width} × ${of.image.height}`;
  const { timing } = decision;
  const rows = [
    ['model', model], ['version', version], ['image', image],
    ['timing', timing && html`<b>${digits(timing.total_ms, 1)} ms</b> <small>${t('decision.times', { queue: digits(timing.queue_ms, 1), decode: digits(timing.decode_ms, 1), infer: digits(timing.infer_ms, 1) })}</small>`],
    ['key', decision.key], ['id', html`<code>${of.id ?? decision.id}</code>`], ['number', decision.number],
    ['sha256', of.sha256 && html`<code>${of.sha256}</code>`], ['hash', decision.hash && html`<code>${decision.hash}</code>`],
  ];
  return html`<section><h3>${t('decision.facts')}</h3><table class="facts"><tbody>
    ${rows.map(([name, value]) => value && html`<tr key=${name}><th scope="row">${t(`decision.${name}`)}</th><td>${value}</td></tr>`)}
  </tbody></table></section>`;
}

/** Its picture judged again, by the version that judged it or by another one; it counts nowhere. */
function Replay({ decision, of, view, session }) {
  const { models } = useModels(0);
  const isThere = models?.some((one) => one.name === of.model);
  const { data } = useData(isThere ? `${path('models', of.model)}?limit=200` : null);
  const versions = (data?.versions ?? []).filter((one) => one.state !== 'damaged');
  const [version, setVersion] = useState(of.version ?? '');
  const [found, setFound] = useState(null);
  const [replay, busy] = useAction(async () => {
    setFound(null);
    setFound(await send('POST', `${path('decisions', decision.id, 'replay')}${query({ number: decision.number, version, view })}`));
  });
  if (!decision.has_picture || !isThere) return null;
  const isListed = versions.some((one) => one.version === version);
  return html`<section><h3>${t('decision.replay')}</h3>
    <div class="row"><select class="grow" aria-label=${t('decision.version')} value=${version} onchange=${(event) => { setVersion(event.target.value); setFound(null); }}>
        ${!isListed && html`<option value=${version}>${version || t('decision.choose')}</option>`}
        ${versions.map((one) => html`<option key=${one.version} value=${one.version}>${one.version}${one.version === of.version ? ` · ${t('decision.this_one')}` : ''}${one.state === 'live' ? ` · ${t('decision.live')}` : ''}</option>`)}
      </select>
      <${Button} icon="play" busy=${busy} disabled=${!version} why=${whyNot(session, 'operator')} onclick=${replay}>${t('decision.judge')}<//></div>
    <div role="status">${found && html`<p class="replayed"><${Verdict} verdict=${found.verdict} />
      ${t('shell.score', { score: digits(found.score, 4), limit: digits(found.threshold, 4) })}
      <small class="soft">${found.raw_score === of.raw_score ? t('decision.same_score', { raw: digits(found.raw_score, 4) }) : t('decision.other_score', { raw: digits(found.raw_score, 4), was: digits(of.raw_score, 4) })}</small></p>`}</div>
  </section>`;
}

function History({ lines }) {
  if (!lines?.length) return null;
  return html`<section><h3>${t('decision.history')}</h3><ol class="history">
    ${lines.map((line) => html`<li key=${line.number}><span class="soft">${moment(line.time)} · ${line.key ?? t('decision.nobody')}</span>
      <${Said} line=${line} />
      ${line.reason && html`<q>${line.reason}</q>`}</li>`)}
  </ol></section>`;
}

function Said({ line }) {
  if (line.what === 'label' && line.details.label) return html`<${Mark} label=${line.details.label} defect=${line.details.defect} />`;
  return html`<span>${t({ label: 'decision.withdrawn', deleted: 'decision.deleted' }[line.what] ?? 'decision.changed')}</span>`;
}

function SamePart({ decision, onopen }) {
  const { data } = useData(`/decisions${query({ part: decision.part, limit: SAME_PART })}`);
  const others = (data?.decisions ?? []).filter((one) => one.number !== decision.number);
  if (!others.length) return null;
  const open = (event, one) => {
    if (!onopen || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    onopen(one);
  };
  return html`<section><h3>${t('decision.same_part')}</h3><ul class="same">
    ${others.map((one) => html`<li key=${one.number}><a href=${`#/find${query({ part: one.part, id: one.id, number: one.number })}`} onclick=${(event) => open(event, one)}>
      <span>${moment(one.time)}</span><${Verdict} verdict=${one.verdict} /><span>${digits(one.score, 3)}</span></a></li>`)}
    ${data.next !== null && html`<li><a href=${`#/find${query({ part: decision.part })}`}>${t('decision.all_of_part')}</a></li>`}
  </ul></section>`;
}

function Files({ decision, view, session, onchange }) {
  const own = path('decisions', decision.id, 'image');
  const [evidence, packing] = useAction(() => download(`${path('parts', decision.part)}/evidence`, 'evidence.zip'));
  const [picture, loading] = useAction(() => download(`${own}${query({ number: decision.number, view })}`, pictureName(decision)));
  const [remove, removing] = useAction(async () => {
    const reason = await confirm({ title: t('decision.delete_title'), body: html`<p>${t('decision.delete_body')}</p>`, yes: t('decision.delete'), reason: 'must', danger: true });
    if (reason === null) return;
    await send('DELETE', `${own}${query({ number: decision.number, reason })}`);
    forgetPictures(path('decisions', decision.id));
    toast(t('decision.is_deleted'));
    onchange(await get(`${path('decisions', decision.id)}${query({ number: decision.number })}`));
  });
  return html`<section class="files row">
    ${decision.part && html`<${Button} icon="download" busy=${packing} onclick=${evidence}>${t('decision.evidence')}<//>`}
    ${decision.has_picture && html`<${Button} icon="download" busy=${loading} onclick=${picture}>${t('decision.original')}<//>
      ${may(session, 'admin') && html`<${Button} kind="bad" icon="remove" busy=${removing} onclick=${remove}>${t('decision.delete')}<//>`}`}
  </section>`;
}

const ENDINGS = { JPEG: 'jpg', PNG: 'png', BMP: 'bmp', TIFF: 'tif', BigTIFF: 'tif' };
const pictureName = (one) => `${one.number}.${ENDINGS[one.image?.format] ?? 'bin'}`;
