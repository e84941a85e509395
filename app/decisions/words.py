"""`Words`: the sentences of the shift report, in English and Japanese, side by side."""

from __future__ import annotations

from html import escape
from typing import Any, Literal

Language = Literal["en", "ja"]
_PLACES: dict[Language, int] = {"en": 0, "ja": 1}

SENTENCES: dict[str, tuple[str, str]] = {
    "title": ("Shift report", "シフト報告書"),
    "days": ("Mon Tue Wed Thu Fri Sat Sun", "月 火 水 木 金 土 日"),
    "of_model": ("Model {model} alone", "モデル {model} のみ"),
    "no_model": ("no model that is known", "不明なモデル"),
    "running": (
        "The shift is still running: these are its figures up to {time}. The days before are"
        " counted up to the same time of the day.",
        "シフトは継続中です。{time} までの数値です。過去の日も同じ時刻までを集計しています。",
    ),
    "coming": ("This shift has not begun.", "このシフトはまだ始まっていません。"),
    "empty": (
        "Nothing was inspected in this shift.",
        "このシフトでは何も検査されませんでした。",
    ),
    "model": ("Model", "モデル"),
    "parts": ("Parts", "検査数"),
    "rejects": ("Rejects", "不良判定"),
    "reject_share": ("Reject share", "不良判定率"),
    "no_verdict": ("No verdict", "判定なし"),
    "day_before": ("day before: {value}", "前日: {value}"),
    "day_before_unknown": ("day before: not known", "前日: 記録なし"),
    "week": ("7-day mean: {value}", "過去 7 日間の平均: {value}"),
    "week_of": ("mean of {days} of 7 days: {value}", "7 日間のうち {days} 日の平均: {value}"),
    "week_unknown": ("7-day mean: not known", "過去 7 日間の平均: 記録なし"),
    "by_time": ("Parts and rejects", "検査数と不良判定の推移"),
    "by_time_of": (
        "each quarter of an hour; the numbers are of changes, below",
        "15 分ごと。番号は下の変更一覧を参照",
    ),
    "scores": ("Scores", "スコアの分布"),
    "scores_of": (
        "parts; above the limit they are rejects",
        "検査数。しきい値を超えると不良判定",
    ),
    "score": ("score", "スコア"),
    "limit": ("limit {limit}", "しきい値 {limit}"),
    "quantiles": ("Scores and times", "スコアと処理時間"),
    "of_parts": ("of the parts", "検査数に対する割合"),
    "score_within": ("Score at most", "スコアの上限"),
    "ms_within": ("Verdict within", "判定までの時間"),
    "reasons": ("Why there was no verdict", "判定なしの理由"),
    "judged": ("Versions and limits that judged", "判定したバージョンとしきい値"),
    "version": ("Version", "バージョン"),
    "first_last": ("From – to", "最初〜最後"),
    "limit_column": ("Limit (raw)", "しきい値(生スコア)"),
    "marked": ("Rejects, as people marked them", "不良判定の人による確認結果"),
    "good": ("False reject: good", "過検出(良品)"),
    "defect": ("Defect", "不良"),
    "defect_of": ("Defect: {kind}", "不良: {kind}"),
    "more_defects": ("Defects of other kinds", "その他の種類の不良"),
    "unusable": ("Picture unusable", "画像が使用不可"),
    "unmarked": ("Not marked yet", "未確認"),
    "missed": ("Passed, but marked as a defect", "見逃し(良品判定だが不良と確認)"),
    "pruned": (
        "Of {parts} parts of {model} only {kept} are still in the record one by one; versions,"
        " marks and pictures are of these.",
        "{model} の検査 {parts} 件のうち、個別の記録が残っているのは {kept} 件です。バージョン、"
        "確認結果、画像はこの分のみです。",
    ),
    "worst": ("The most anomalous rejects", "異常度の高い不良判定"),
    "worst_of": ("{shown} of {rejects}", "{rejects} 件中 {shown} 件"),
    "unnamed": ("part without a name", "部品名なし"),
    "score_limit": ("score {score}, limit {limit}", "スコア {score}、しきい値 {limit}"),
    "changes": ("What was changed", "変更と記録"),
    "no_changes": (
        "No version, threshold, region or key was changed.",
        "バージョン、しきい値、判定しない領域、API キーの変更はありません。",
    ),
    "marks_given": ("Parts were marked by: {who}.", "部品を確認した人: {who}。"),
    "more_changes": (
        "And more, which GET /trail lists.",
        "このほかにもあります。GET /trail で一覧できます。",
    ),
    "number": ("No.", "番号"),
    "time": ("Time", "時刻"),
    "what": ("What", "内容"),
    "subject": ("Of", "対象"),
    "who": ("Who", "担当"),
    "why": ("Why", "理由"),
    "no_key": ("no key", "キーなし"),
    "remarks": ("Remarks", "特記事項"),
    "leader": ("Shift leader, name", "班長 氏名"),
    "signature": ("Date and signature", "日付・署名"),
    "made": ("Made {time} by Kensa {version}.", "作成: {time}、Kensa {version}。"),
    "heads": (
        "The record then ended with decision {decision}, whose hash is {hash}, and with line {line}"
        " of the audit trail, {line_hash}.",
        "作成時の記録の末尾は判定 {decision}(ハッシュ値 {hash})と監査証跡の {line} 行目"
        "({line_hash})です。",
    ),
    "hold": (
        "A number keeps its hash for ever. To hold this paper against the record: {command}",
        "番号とハッシュ値の組は変わりません。この紙を記録と照合するには: {command}",
    ),
}

# Codes of docs/http.md and docs/line.md, client_left, and view_missing.
REASONS: dict[str, tuple[str, str]] = {
    "bad_image": ("the image was damaged", "画像が壊れていた"),
    "unsupported_image": ("a kind of image that is not read", "対応していない画像形式"),
    "image_too_large": ("the image was too large", "画像が大きすぎた"),
    "bad_request": ("the request was wrong", "リクエストの誤り"),
    "body_too_large": ("the request was too large", "リクエストが大きすぎた"),
    "unsupported_body": ("a kind of request that is not read", "対応していないリクエスト形式"),
    "too_slow": ("it did not arrive in time", "受信が間に合わなかった"),
    "unknown_model": ("a model that there is not", "存在しないモデル"),
    "unknown_version": ("a version that is not live", "稼働していないバージョン"),
    "not_ready": ("the model was not in memory", "モデルが読み込まれていなかった"),
    "not_released": ("the model failed its challenge", "確認検査に不合格のため停止中"),
    "stale_plan": ("TensorRT had no plan", "TensorRT のプランがなかった"),
    "overloaded": ("too many requests at once", "リクエストの集中"),
    "deadline_exceeded": ("time was up", "時間切れ"),
    "client_left": ("the client did not wait", "クライアントが切断した"),
    "view_missing": ("a view was missing", "画像が揃わなかった"),
    "camera_size": ("another size", "画像サイズの相違"),
    "camera_frozen": ("the same picture again and again", "同じ画像の繰り返し"),
    "camera_turned": ("turned", "回転ずれ"),
    "camera_shifted": ("shifted", "位置ずれ"),
    "camera_dark": ("too dark", "暗すぎる"),
    "camera_bright": ("too bright", "明るすぎる"),
    "camera_blurred": ("blurred", "ピンぼけ"),
    "runtime_failed": ("inference failed", "推論の失敗"),
    "gpu_lost": ("the GPU failed", "GPU の故障"),
    "out_of_memory": ("memory was full", "メモリ不足"),
    "internal_error": ("Kensa failed", "Kensa の内部エラー"),
}

# What lines of the audit trail are about, labels aside.
CHANGES: dict[str, tuple[str, str]] = {
    "threshold": ("threshold changed", "しきい値の変更"),
    "regions": ("regions changed", "判定しない領域の変更"),
    "live": ("version went live", "バージョンの稼働開始"),
    "rollback": ("rolled back", "以前のバージョンに復帰"),
    "discarded": ("version discarded", "バージョンの破棄"),
    "held": ("version held back by the gate", "ゲートがバージョンを保留"),
    "challenge_passed": ("challenge passed", "既知画像による確認検査に合格"),
    "challenge_failed": ("challenge failed: closed", "既知画像による確認検査に不合格(停止)"),
    "challenges": ("known pictures changed", "確認検査用の既知画像の変更"),
    "release": ("released by a person", "人による稼働許可"),
    "taught": ("marked parts given to training", "確認済み部品を学習データに追加"),
    "key_added": ("API key added", "API キーの追加"),
    "key_removed": ("API key removed", "API キーの削除"),
    "deleted": ("picture deleted", "画像の削除"),
    "prune": ("old decisions deleted", "古い判定の削除"),
    "lost": ("decisions not recorded", "判定の記録漏れ"),
    "repair": ("record repaired", "記録の修復"),
}


class Words:
    """Sentences in one language, as HTML: whatever is put into them is text."""

    def __init__(self, language: Language) -> None:
        self.language = language
        self._place = _PLACES[language]

    def __call__(self, name: str, **values: Any) -> str:
        return self._of(SENTENCES[name]).format_map(
            {key: number(one) if isinstance(one, int) else escape(str(one))
             for key, one in values.items()}
        )  # fmt: skip

    def reason(self, code: str) -> str:
        """Why there was no verdict; the code itself where it has no words."""
        return self._of(REASONS[code]) if code in REASONS else escape(code)

    def change(self, what: str) -> str:
        return self._of(CHANGES[what]) if what in CHANGES else escape(what)

    def _of(self, both: tuple[str, str]) -> str:
        return both[self._place]


def number(count: float) -> str:
    return f"{count:,.0f}"
