"""Claims about Teach: pictures in, learned, and judged, by somebody who sees only the screen."""

from __future__ import annotations

import ast
import re
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from app.http.keys import add_key
from app.routes.web import FOLDER
from engines.meta import FIRST as FIRST_META
from support.browser import Shown, shown
from support.damage import picture, saved
from support.jobs import CATEGORY, FIRST
from support.project import ROOT
from support.server import RAW, Server, serving
from support.waiting import until

LEARNED_MS = 240_000
MARKUP = "<img src=x onerror=document.title='run'>"


@dataclass
class Learning:
    """A server with a worker, and what was learned with it."""

    server: Server
    first: str  # job of the first training

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.server.client.get(f"/jobs/{job_id}").json()
        return found

    def newest(self) -> dict[str, Any]:
        found: dict[str, Any] = self.server.client.get("/jobs").json()["jobs"][0]
        return found

    def live(self, model: str) -> str | None:
        found: str | None = self.server.client.get(f"/models/{model}").json()["live"]
        return found

    def be_live(self) -> None:
        """Let the first version judge, where no test before has."""
        if self.live("part") is None:
            version = self.job(self.first)["version"]
            path = f"/models/part/versions/{version}/activate"
            assert self.server.client.post(path).is_success

    def ended(self, job_id: str) -> dict[str, Any]:
        def has() -> bool:
            return self.job(job_id)["state"] in ("succeeded", "failed", "cancelled")

        until(has, self.server.log.read_text, LEARNED_MS / 1000)
        return self.job(job_id)


@contextmanager
def with_worker(folder: Path, **settings: str) -> Iterator[Server]:
    with serving(folder, KENSA_WORKER="on", **settings) as server:
        until(lambda: server.client.get("/jobs").status_code == 200, server.log.read_text, 120)
        yield server


@pytest.fixture(scope="module")
def learning(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Learning]:
    """The sample parts, and a first model that the gate holds, since it never learned to see."""
    folder = tmp_path_factory.mktemp("learning")
    settings = {"KENSA_GATE_FOUND": "0.2", "KENSA_RECORD_SAMPLE": "1"}
    with with_worker(folder, **settings) as server:
        for split, where in (
            ("train", f"train/{CATEGORY}"), ("normal", f"test/{CATEGORY}/normal"),
            ("anomaly", f"test/{CATEGORY}/anomaly"),
        ):  # fmt: skip
            send(server, CATEGORY, split, sorted((sample_data / where).glob("*.png")))
        job = server.client.post("/retrain", json=FIRST).json()["id"]
        found = Learning(server, job)
        assert found.ended(job)["outcome"] == "held"
        yield found


def send(server: Server, category: str, split: str, paths: list[Path]) -> None:
    files = [("file", (path.name, path.read_bytes())) for path in paths]
    assert server.client.post(f"/datasets/{category}/{split}", files=files).status_code == 201


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that learns nothing, for what is only sent and shown."""
    with serving(tmp_path_factory.mktemp("plain")) as server:
        yield server


def hundred(folder: Path, damaged: int = 42, size: int = 24) -> list[Path]:
    """A hundred small pictures, one of them cut short."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(100):
        data = saved(Image.new("RGB", (size, size), (number, 90, 120)), "PNG")
        (folder / f"part {number:03}.png").write_bytes(
            data[: len(data) // 2] if number == damaged else data
        )
    return sorted(folder.glob("*.png"))


def counts(server: Server, category: str) -> dict[str, Any]:
    found = {one["category"]: one for one in server.client.get("/datasets").json()["datasets"]}
    return found.get(category, {"train": 0, "normal": 0, "anomaly": 0})


def choose(it: Shown, paths: list[Path]) -> None:
    it.page.set_input_files("input.files >> nth=0", paths)


def press(it: Shown, name: str) -> None:
    it.page.get_by_role("button", name=name, exact=True).click()


# ---- the stories --------------------------------------------------------------------------------


def test_a_first_model_is_made_in_five_steps_and_judges(
    browser: Any, sample_data: Path, tmp_path: Path, screenshots: Path
) -> None:
    """From nothing: by who was never told what a model is, with the settings that everybody has."""
    parts = sorted((sample_data / "train" / CATEGORY).glob("*.png"))[:8]
    defects = sorted((sample_data / "test" / CATEGORY / "anomaly").glob("*.png"))[:2]
    with with_worker(tmp_path) as server, shown(browser, server.url) as it:
        it.go("#/teach")
        it.page.get_by_label("Name").fill("bracket 1")
        it.expect("A name has up to 64 letters")
        it.page.get_by_label("Name").fill("bracket")
        press(it, "Next")
        it.expect("At least 4 pictures are needed.")
        assert it.page.get_by_role("button", name="Next").is_disabled()
        choose(it, parts)
        it.expect("12 more would be good")
        it.expect("8 different parts can promise that at most 31.2% of good ones")
        it.must_be_accessible()
        it.keep(screenshots, "teach-step-2")
        press(it, "Next")
        it.page.get_by_role("button", name="I have none").wait_for()
        choose(it, defects)
        press(it, "Next")
        it.page.locator(".fold summary").click()
        it.page.get_by_label("Size that it sees, pixels").fill("96")
        press(it, "Start learning")
        it.page.locator(".going progress").wait_for()
        it.expect("you may leave this page")
        assert it.page.get_by_role("button", name="Next").is_disabled()
        it.keep(screenshots, "teach-learning")
        it.page.reload()  # the address knows where it was
        it.page.locator(".told.good").wait_for(timeout=LEARNED_MS)
        it.expect("bracket judges with the new version now")
        it.expect("Of 8 good parts that it had not learned it rejects")
        it.must_fit()
        it.must_be_accessible()
        it.keep(screenshots, "teach-step-5")
        link = it.page.get_by_role("link", name="Try it")
        assert link.get_attribute("href") == "#/try?model=bracket"
        answer = server.infer(parts[0].read_bytes()).json()
        assert (answer["model_name"], answer["label"]) == ("bracket", "Normal")
        assert counts(server, "bracket") == {
            "category": "bracket", "train": 8, "normal": 0, "anomaly": 2,
        }  # fmt: skip


def test_a_version_that_is_held_says_why_and_goes_live_where_a_person_says_so(
    browser: Any, learning: Learning, screenshots: Path
) -> None:
    with shown(browser, learning.server.url) as it:
        it.go(f"#/teach?job={learning.first}")
        it.expect("The new version is held: you decide")
        it.expect("Its backbone has never learned to see")
        it.keep(screenshots, "teach-held")
        it.must_be_accessible()
        press(it, "Leave it")
        it.expect("Nothing was changed")
        assert learning.live("part") is None
        it.page.reload()
        press(it, "Make it live")
        dialog = it.page.get_by_role("dialog")
        dialog.get_by_text("Its backbone has never learned to see").wait_for()
        dialog.get_by_role("button", name="Make it live").click()
        it.expect("part judges with the new version now")
        until(lambda: learning.live("part") is not None, learning.server.log.read_text)
        assert it.page.get_by_role("button", name="Make it live").count() == 0


def test_rejects_that_were_marked_as_good_are_learned_shown_and_accepted(
    browser: Any, learning: Learning, screenshots: Path
) -> None:
    """As Review sends them here; the gate shows what changes, each part with its picture."""
    server = learning.server
    learning.be_live()
    looks = {f"new-{n}": saved(Image.fromarray(picture(200 + n, 300)), "PNG") for n in range(8)}
    for id_, data in looks.items():
        answer = server.infer(data, **{"X-Request-ID": id_, "X-Part": f"P {id_}"})
        assert answer.json()["is_anomalous"], answer.text
    until(lambda: server.client.get("/decisions/new-7").is_success, server.log.read_text)
    for id_ in looks:
        assert server.client.post(f"/decisions/{id_}/label", json={"label": "good"}).is_success
    before = counts(server, CATEGORY)
    with shown(browser, server.url, language="ja", refused=True) as it:
        it.go("#/teach?from=decisions&model=part")
        it.expect("良品 8 件")
        it.expect("不良 0 件")
        press(it, "学習用の画像に追加")
        it.page.locator(".taught").wait_for()
        after = counts(server, CATEGORY)
        assert after["train"] + after["normal"] == before["train"] + before["normal"] + 8
        said = it.page.locator(".taught").inner_text()
        assert f"{after['train'] - before['train']} 枚を「良品（学習用）」に追加" in said
        it.keep(screenshots, "teach-marked")
        press(it, "学習を始める")
        it.page.locator(".told.held").wait_for(timeout=LEARNED_MS)
        it.expect("判定が変わる部品")
        flips = it.page.locator(".flip")
        assert flips.count() >= 8
        first = flips.filter(has_text="P new-0")
        assert first.locator(".verdict").all_inner_texts() == ["NG", "OK"]
        assert first.locator(".mark.good").inner_text() == "良品"
        it.page.wait_for_function("document.querySelectorAll('.flip img').length >= 8")
        assert not first.locator(".photo .none").count()  # the picture, and what was anomalous
        it.must_fit()
        it.must_be_accessible()
        it.keep(screenshots, "teach-flips")
        press(it, "稼働させる")
        it.page.get_by_role("dialog").get_by_role("button", name="稼働させる").click()
        it.page.locator(".told.good").wait_for()
    assert learning.newest()["outcome"] == "live"
    assert not any(server.infer(data).json()["is_anomalous"] for data in looks.values())


@contextmanager
def busy(server: Server) -> Iterator[None]:
    """A line that sends one part after the other."""
    part, end = saved(Image.fromarray(picture(3, 300)), "PNG"), threading.Event()

    def work() -> None:
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            while not end.is_set():
                client.post("/infer?model=part", content=part, headers=RAW)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def test_a_training_waits_for_the_line_which_is_shown_and_is_cancelled(
    browser: Any, learning: Learning
) -> None:
    learning.be_live()
    with shown(browser, learning.server.url) as it:
        it.go(f"#/teach?category={CATEGORY}")
        it.page.get_by_label("Which model").fill("other")
        it.expect("A new model, other, is made.")
        press(it, "Start learning")
        with busy(learning.server):
            it.expect("% of the time for the line", within_s=60)
        press(it, "Cancel the training")
        it.page.get_by_role("dialog").get_by_role("button", name="Cancel the training").click()
        it.expect("Nothing was changed.", within_s=30)
    job = learning.newest()
    assert (job["model"], job["state"]) == ("other", "cancelled")


def test_a_model_that_learns_already_can_be_waited_for(browser: Any, learning: Learning) -> None:
    running = learning.server.client.post("/retrain", json={**FIRST, "model": "third"}).json()["id"]
    with shown(browser, learning.server.url, refused=True) as it:
        it.go(f"#/teach?category={CATEGORY}")
        it.page.get_by_label("Which model").fill("third")
        press(it, "Start learning")
        it.page.get_by_role("dialog", name="third is learning already").wait_for()
        press(it, "Wait behind it")
        it.expect("Waits for the jobs before it")
    queued = learning.newest()
    assert (queued["model"], queued["state"]) == ("third", "queued")
    for job in (queued["id"], running):
        assert learning.server.client.post(f"/jobs/{job}/cancel").is_success


def test_where_nothing_learns_the_page_says_what_to_type(browser: Any, plain: Server) -> None:
    with shown(browser, plain.url) as it:
        it.go("#/teach?new=bolt&step=4")
        it.expect('pip install ".[train]"')
        it.expect("KENSA_WORKER is off")


# ---- pictures -----------------------------------------------------------------------------------


def test_a_hundred_pictures_are_sent_and_the_damaged_one_is_named(
    browser: Any, plain: Server, tmp_path: Path, screenshots: Path
) -> None:
    paths = hundred(tmp_path)
    with shown(browser, plain.url, refused=True) as it:
        it.go("#/teach?category=hundred")
        choose(it, paths)
        it.page.locator(".upload .counts").get_by_text("99 new").wait_for(timeout=30_000)
        refused = it.page.locator(".refused li")
        assert refused.count() == 1
        assert "part 042.png" in refused.inner_text()
        assert "The picture is damaged." in refused.inner_text()
        it.expect("1 to 48 of 99")
        it.page.wait_for_function("document.querySelectorAll('.pictures img').length > 10")
        it.keep(screenshots, "teach-upload")
        it.must_fit()
        choose(it, paths)  # once more: nothing is there twice
        it.page.locator(".upload .counts").get_by_text("99 were there already").wait_for()
        it.page.get_by_role("button", name="The next ones").click()
        it.expect("49 to 96 of 99")
    assert counts(plain, "hundred")["train"] == 99


def test_folders_and_zips_are_dropped_and_what_is_no_picture_is_left_out(
    browser: Any, plain: Server, tmp_path: Path
) -> None:
    """Also where two folders have pictures of the same name, and one has more than a hundred."""
    hundred(tmp_path / "drop" / "deep" / "er", damaged=-1)
    for number, side in enumerate(("left", "right")):
        (tmp_path / "drop" / side).mkdir(parents=True)
        data = saved(Image.new("RGB", (24, 24), (200, 40 * number, 0)), "PNG")
        (tmp_path / "drop" / side / "1.png").write_bytes(data)
    (tmp_path / "drop" / "notes.txt").write_text("no picture")
    (tmp_path / "drop" / ".DS_Store").write_text("no picture")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as more:
        more.writestr("zipped.png", saved(Image.new("RGB", (24, 24), (1, 2, 3)), "PNG"))
        more.writestr("readme.md", "no picture")
    with shown(browser, plain.url) as it:
        it.go("#/teach?category=dropped")
        drop(it, tmp_path / "drop", tmp_path / "more.zip")
        it.page.locator(".upload .counts").get_by_text("103 new").wait_for(timeout=30_000)
        it.expect("3 left out: no pictures")
    listed = plain.client.get("/datasets/dropped/train?limit=200").json()["images"]
    names = {one["name"] for one in listed}
    assert {"drop_left_1.png", "drop_right_1.png", "zipped.png", "part 000.png"} <= names


def drop(it: Shown, *paths: Path) -> None:
    """As the hand does it: the browser itself reads the folders."""
    box = it.page.locator(".drop").bounding_box()
    session = it.page.context.new_cdp_session(it.page)
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        session.send(
            "Input.dispatchDragEvent",
            {"type": kind, "x": box["x"] + 20, "y": box["y"] + 20, "data": data},
        )


def test_another_picture_of_the_same_name_is_kept_beside_it_or_put_in_its_place(
    browser: Any, plain: Server, tmp_path: Path
) -> None:
    same = tmp_path / "same.png"
    same.write_bytes(saved(Image.new("RGB", (24, 24), (9, 9, 9)), "PNG"))
    send(plain, "names", "train", [same])
    for number, answer in enumerate(("Keep both", "Replace the old ones"), start=1):
        same.write_bytes(saved(Image.new("RGB", (24, 24), (9, 9, 90 * number)), "PNG"))
        with shown(browser, plain.url, refused=True) as it:
            it.go("#/teach?category=names")
            choose(it, [same])
            it.expect("1 have the name of another picture.")
            press(it, answer)
            it.page.locator(".upload .counts").get_by_text("1 new").wait_for()
            assert it.page.locator(".refused li").count() == 0
    names = [one["name"] for one in plain.client.get("/datasets/names/train").json()["images"]]
    assert names == ["same.png", "same_2.png"]
    assert plain.client.get("/datasets/names/train/same.png").content == same.read_bytes()


def test_sending_is_stopped_and_what_was_sent_stays(
    browser: Any, plain: Server, tmp_path: Path
) -> None:
    paths = hundred(tmp_path, damaged=-1)
    with shown(browser, plain.url) as it:
        it.go("#/teach?category=stopped")
        sent = 0

        def slow(route: Any) -> None:
            nonlocal sent
            sent += route.request.method == "POST"
            if sent <= 2:
                route.continue_()  # the third batch is on its way for ever

        it.page.route("**/datasets/stopped/train", slow)
        choose(it, paths)
        it.expect("40 of 100 files are sent")
        press(it, "Stop sending")
        it.page.locator(".upload .counts").get_by_text("40 new").wait_for()
        it.expect("1 to 40 of 40")
    assert counts(plain, "stopped")["train"] == 40


def test_sending_goes_on_by_itself_when_the_server_is_back_and_by_hand_when_the_disk_was_full(
    browser: Any, plain: Server, tmp_path: Path
) -> None:
    paths = hundred(tmp_path, damaged=-1)
    full = '{"error": "The disk of the data folder is full.", "code": "disk_full"}'
    with shown(browser, plain.url, refused=True) as it:
        it.go("#/teach?category=again")
        answers = iter(["go", "abort", "full"])

        def unsteady(route: Any) -> None:
            what = next(answers, "go") if route.request.method == "POST" else "go"
            if what == "abort":
                route.abort()
            elif what == "full":
                route.fulfill(status=507, content_type="application/json", body=full)
            else:
                route.continue_()

        it.page.route("**/datasets/again/train", unsteady)
        choose(it, paths)
        it.expect("The server does not answer.")
        it.expect("The disk is full.")
        it.expect("Delete pictures or versions that nobody needs")
        press(it, "Try again")
        it.page.locator(".upload .counts").get_by_text("100 new").wait_for()
    assert counts(plain, "again")["train"] == 100


def test_pictures_are_looked_at_and_deleted_one_by_one_a_split_or_all(
    browser: Any, plain: Server, tmp_path: Path
) -> None:
    send(plain, "gone", "train", hundred(tmp_path, damaged=-1)[:5])
    send(plain, "gone", "anomaly", hundred(tmp_path, damaged=-1)[:3])
    with shown(browser, plain.url) as it:
        it.go("#/teach?category=gone")
        it.page.get_by_role("button", name="part 001.png").click()
        dialog = it.page.get_by_role("dialog", name="part 001.png")
        dialog.locator("img").wait_for()
        it.must_be_accessible()
        it.page.keyboard.press("ArrowRight")
        dialog = it.page.get_by_role("dialog", name="part 002.png")
        dialog.get_by_role("button", name="Delete").click()
        confirmed(it)
        it.expect("1 to 4 of 4")
        assert not it.page.get_by_role("button", name="part 002.png").count()
        it.page.get_by_role("radio", name="defects").click()
        it.expect("1 to 3 of 3")
        press(it, "Delete all of these")
        confirmed(it)
        it.expect("No pictures here yet.")
        assert counts(plain, "gone") == {"category": "gone", "train": 4, "normal": 0, "anomaly": 0}
        press(it, "Delete this category")
        confirmed(it)
        it.page.get_by_role("heading", name="Pictures to learn from").wait_for()
    assert plain.client.get("/datasets/gone/train").status_code == 404


def confirmed(it: Shown) -> None:
    it.page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()


def test_markup_in_names_is_text(browser: Any, plain: Server, tmp_path: Path) -> None:
    """Of pictures, of which one is shown and one is refused; of categories, which are refused."""
    whole, broken = tmp_path / f"{MARKUP}.png", tmp_path / f"broken {MARKUP}.png"
    whole.write_bytes(saved(Image.new("RGB", (24, 24)), "PNG"))
    broken.write_bytes(b"no picture")
    with shown(browser, plain.url, refused=True) as it:
        it.go("#/teach?category=markup")
        choose(it, [whole, broken])
        it.page.locator(".refused li").get_by_text(broken.name).wait_for()
        it.page.locator(".pictures").get_by_text(whole.name).click()
        it.page.get_by_role("dialog").get_by_text(whole.name).wait_for()
        it.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        it.page.get_by_role("dialog").get_by_text(whole.name).wait_for()
        it.page.keyboard.press("Escape")
        it.go("#/teach?new=")
        it.page.get_by_label("Name").fill("<b>part</b>")
        it.expect("A name has up to 64 letters")
        it.go(f"#/teach?category={MARKUP}")
        it.page.get_by_role("heading", name=MARKUP).wait_for()
        it.go("#/teach?job=<i>retrain")
        it.expect("There is no such job.")
        assert it.page.title() != "run"
        assert not it.page.locator("main i, main b b, main img[src=x]").count()


def test_who_may_only_look_is_told_so(browser: Any, tmp_path: Path) -> None:
    with serving(tmp_path, KENSA_ACCESS="keys") as server:
        key = add_key(tmp_path / "data" / "keys.json", "line-1", "line")
        with shown(browser, server.url, refused=True) as it:
            it.page.add_init_script(f"sessionStorage.setItem('kensa.key', '{key}')")
            it.go("#/teach")
            it.page.get_by_label("Name").fill("part")
            it.expect("This needs a key with the role operator.")
            assert it.page.get_by_role("button", name="Next").is_disabled()


def test_each_reason_of_the_gate_has_words_of_its_own() -> None:
    """The page knows a reason by a few words of its sentence, which somebody may write anew."""
    source = (FOLDER / "pages" / "teach_findings.js").read_text()
    known = re.findall(r"\[/(.+)/, '(\w+)',", source)
    assert len(known) > 10
    sentences = [
        sentence
        for file in ("engines/serving/gate.py", "engines/promise.py", "app/serving/rollout.py",
                     "app/serving/challenges.py", "app/serving/model_manager.py")
        for sentence in texts((ROOT / file).read_text())
    ]  # fmt: skip
    for pattern, name in known:
        assert any(re.search(pattern, one) for one in sentences), name


def texts(source: str) -> list[str]:
    """Every text of a module, with 0 for what is put in."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        if isinstance(node, ast.JoinedStr):
            parts = [one.value if isinstance(one, ast.Constant) else "0" for one in node.values]
            found.append("".join(map(str, parts)))
    return found


# ---- how it looks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "language", "dark"),
    [("desktop", "ja", True), ("tablet", "en", False), ("phone", "ja", False)],
)
def test_each_view_fits_and_can_be_used_by_everybody(
    browser: Any, learning: Learning, size: str, language: str, dark: bool, screenshots: Path
) -> None:
    views = {
        "home": ("#/teach", ".category img"),
        "category": (f"#/teach?category={CATEGORY}", ".pictures img"),
        "job": (f"#/teach?job={learning.first}", ".told"),
        "marked": ("#/teach?from=decisions&model=part", ".of-label"),
        **{f"step-{n}": (f"#/teach?new={CATEGORY}&step={n}", ".guide") for n in range(1, 6)},
    }
    url = learning.server.url
    with shown(browser, url, size=size, language=language, dark=dark, refused=True) as it:
        for name, (where, there) in views.items():
            it.go(where)
            it.page.locator(there).first.wait_for()
            for fold in it.page.locator(".fold summary, .log summary").all():
                fold.click()
            time.sleep(0.3)
            it.must_fit()
            it.must_be_accessible()
            look = "dark" if dark else "light"
            it.page.screenshot(
                path=screenshots / f"teach-{name}-{size}-{language}-{look}.png", full_page=True
            )
        assert not re.search(r"teach\.\w+", it.page.content().replace("pages/teach.css", ""))


def test_a_backbone_of_the_same_family_is_learned_with_the_numbers_of_a_first_model() -> None:
    page = (ROOT / "app" / "web" / "pages" / "teach_learn.js").read_text()
    for key in ("centre_weight", "feature_power"):
        assert re.findall(rf"{key}: ([\d.]+)", page) == [str(FIRST_META[key])]
