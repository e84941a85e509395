// Every word on the screen, in both languages, side by side: [English, Japanese].
//
// A section is a page's, or of all pages. `{name}` stands for what is put in; it is text, never markup.

import { useEffect, useReducer } from './lib/preact.js';

export const LANGUAGES = { en: 'English', ja: '日本語' };
const ORDER = ['en', 'ja'];
const CHOSEN = 'kensa.language';

const WORDS = {
  pages: {
    line: ['Line', 'ライン'],
    try: ['Try', 'お試し'],
    review: ['Review', '確認'],
    find: ['Find', '検索'],
    model: ['Model', 'モデル'],
    teach: ['Teach', '学習'],
    regions: ['Regions', '検査範囲'],
    system: ['System', 'システム'],
  },
  shell: {
    skip: ['To the content', '本文へ'],
    pages: ['Pages', 'ページ'],
    leave: ['Forget the key {key} here', 'この端末からキー {key} を消す'],
    waiting: ['One moment …', '読み込み中…'],
    again: ['Try again', 'もう一度'],
    close: ['Close', '閉じる'],
    no: ['Cancel', 'やめる'],
    reason: ['Why? It stands in the record.', '理由（記録に残ります）'],
    reason_may: ['Why? (if you like)', '理由（任意）'],
    model: ['Model', 'モデル'],
    all_models: ['All models', 'すべてのモデル'],
    no_picture: ['no picture kept', '画像の保存なし'],
    score: ['Score {score}, limit {limit}', 'スコア {score}、しきい値 {limit}'],
    needs_operator: ['This needs a key with the role operator.', 'operator 権限のキーが必要です。'],
    needs_admin: ['This needs a key with the role admin.', 'admin 権限のキーが必要です。'],
  },
  verdict: {
    normal: ['OK', 'OK'],
    anomaly: ['NG', 'NG'],
    unusable: ['Unusable', '判定不可'],
    none: ['No verdict', '判定なし'],
  },
  label: {
    good: ['good', '良品'],
    defect: ['defect', '不良'],
    unusable: ['unusable', '使用不可'],
  },
  // What went wrong, by the code of the answer; the server's own sentence follows.
  codes: {
    unreachable: ['The server does not answer.', 'サーバーが応答しません。'],
    http_error: ['The server refused.', 'サーバーが拒否しました。'],
    not_found: ['There is no such thing.', '見つかりません。'],
    method_not_allowed: ['That does not work here.', 'この操作はできません。'],
    internal_error: ['Kensa failed.', '内部エラーが発生しました。'],
    bad_image: ['The picture is damaged.', '画像が壊れています。'],
    unsupported_image: ['Not a picture that Kensa reads.', '対応していない画像形式です。'],
    image_too_large: ['The picture is too large.', '画像が大きすぎます。'],
    unknown_host: ['The server does not go by this name.', 'このサーバー名では接続できません。'],
    bad_http: ['The request is not HTTP as it should be.', 'HTTP リクエストが不正です。'],
    unauthorized: ['A key is needed.', 'キーが必要です。'],
    forbidden: ['This key may not do that.', 'このキーでは許可されていません。'],
    foreign_origin: ['A page of another server may not do that.', '他のサーバーのページからは操作できません。'],
    too_slow: ['It came too slowly.', '受信が遅すぎました。'],
    body_too_large: ['That is too much at once.', '送信データが大きすぎます。'],
    head_too_large: ['That is too much at once.', '送信データが大きすぎます。'],
    bad_request: ['That does not fit.', '入力が正しくありません。'],
    unsupported_body: ['Kensa does not read this.', '対応していないデータです。'],
    bad_settings: ['A setting is wrong.', '設定が正しくありません。'],
    bad_meta: ['meta.json does not fit.', 'meta.json が正しくありません。'],
    bad_bundle: ['The model cannot be used.', 'モデルを使用できません。'],
    unreadable: ['A file cannot be read.', 'ファイルを読めません。'],
    bad_dataset: ['The pictures do not do.', '学習画像が正しくありません。'],
    bad_weights: ['The weights do not do.', '重みファイルが正しくありません。'],
    bad_record: ['The record cannot be used.', '記録を使用できません。'],
    bad_shared: ['What is shared does not do.', '共有フォルダが正しくありません。'],
    unknown_model: ['There is no such model.', 'モデルが見つかりません。'],
    unknown_version: ['There is no such version.', 'バージョンが見つかりません。'],
    unknown_job: ['There is no such job.', 'ジョブが見つかりません。'],
    unknown_dataset: ['There is no such category.', 'カテゴリが見つかりません。'],
    unknown_key: ['There is no such key.', 'キーが見つかりません。'],
    unknown_decision: ['It is not in the record.', '記録にありません。'],
    conflict: ['Not now.', '今は実行できません。'],
    late_view: ['The view came too late.', 'ビューの到着が遅すぎました。'],
    upload_too_large: ['That is too much at once.', 'アップロードが大きすぎます。'],
    not_ready: ['No model is ready.', 'モデルの準備ができていません。'],
    stale_plan: ['The engine has to be built again.', 'エンジンの再作成が必要です。'],
    not_released: ['The line is closed.', 'ラインは停止中です（未リリース）。'],
    overloaded: ['Too many parts wait.', '待ちの部品が多すぎます。'],
    bad_keys: ['The file of keys cannot be read.', 'キーのファイルを読めません。'],
    too_many_connections: ['Too many are connected.', '接続が多すぎます。'],
    no_worker: ['Nothing can be learned here.', 'ここでは学習できません。'],
    deadline_exceeded: ['It took too long.', '時間切れです。'],
    no_shared: ['What is shared cannot be reached.', '共有フォルダに接続できません。'],
    no_tensorrt: ['There is no TensorRT.', 'TensorRT がありません。'],
    disk_full: ['The disk is full.', 'ディスクがいっぱいです。'],
    read_only: ['The disk cannot be written.', 'ディスクに書き込めません。'],
    out_of_memory: ['There is not enough memory.', 'メモリが足りません。'],
    build_failed: ['The engine could not be built.', 'エンジンを作成できませんでした。'],
    runtime_failed: ['The model failed.', 'モデルの実行に失敗しました。'],
    gpu_lost: ['The GPU failed.', 'GPU に障害が発生しました。'],
    client_left: ['Who asked was gone.', '送信側が切断しました。'],
    view_missing: ['A view is missing.', 'ビューが足りません。'],
    camera_dark: ['The picture is too dark.', '画像が暗すぎます。'],
    camera_bright: ['The picture is too bright.', '画像が明るすぎます。'],
    camera_blurred: ['The picture is blurred.', '画像がぼけています。'],
    camera_shifted: ['The part lies elsewhere.', '部品の位置がずれています。'],
    camera_turned: ['The part is turned.', '部品が回転しています。'],
    camera_size: ['The picture has another size.', '画像サイズが違います。'],
    camera_frozen: ['The camera shows the same picture again.', 'カメラの画像が止まっています。'],
  },

  login: {},

  line: {},

  try: {},

  review: {},

  find: {},

  model: {},

  teach: {},

  regions: {},

  system: {},
};

let chosen = localStorage.getItem(CHOSEN) ?? (navigator.language.startsWith('ja') ? 'ja' : 'en');
const watchers = new Set();

export const language = () => chosen;

/** Show everything in another language, from now on also after the next start. */
export function setLanguage(name) {
  chosen = name;
  localStorage.setItem(CHOSEN, name);
  for (const changed of watchers) changed();
}

/** Draw a component again when the language changes. */
export function useLanguage() {
  const [, again] = useReducer((turn) => turn + 1, 0);
  useEffect(() => { watchers.add(again); return () => watchers.delete(again); }, []);
  return chosen;
}

/** The words of `section.name` in the language of now, with `values` put in. */
export function t(key, values = {}) {
  const [section, name] = key.split('.');
  const words = WORDS[section]?.[name]?.[ORDER.indexOf(chosen)] ?? key;
  return words.replace(/\{(\w+)\}/g, (whole, one) => values[one] ?? whole);
}

/** All of it, for a test that looks for what is missing. */
export const everyWord = () => WORDS;
