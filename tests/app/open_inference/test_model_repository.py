"""Claims about load and unload: models that a person takes out of memory, and brings back."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from app.main import create_app
from app.serving.inspection import Inspector
from app.settings import Settings
from engines.meta import Meta
from engines.store.versions import Store
from support import waiting
from support.fake_model import fake_model
from support.in_process import settings_of
from support.line import variant
from support.oip_client import (
    Client,
    connected,
    files_input,
    photo,
    photo_file,
    pixels_input,
    raw_scores,
)
from support.server import Server, agreed, serving

MIB = 1024 * 1024
UNLOADED = "bolt is unloaded: POST /v2/repository/models/bolt/load loads it again."


@contextmanager
def two_models(folder: Path, *bundles: Path, **settings: str) -> Iterator[Server]:
    """A server with the models `bolt` (all versions; the last one is live) and `nut`."""
    store = Store(folder / "data" / "models")
    for name, bundle in [*(("bolt", one) for one in bundles), ("nut", bundles[0])]:
        store.activate(name, store.take_in(name, bundle, {}))
    with serving(folder, **settings) as server:
        yield server


def store_of(server: Server) -> Store:
    return Store(server.log.parent / "data" / "models")


@pytest.fixture(scope="module")
def other(kensa_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same graph with another bank, and so with other scores."""
    return variant(kensa_model, tmp_path_factory.mktemp("other") / "model", bank=0.9)


@pytest.fixture(scope="module")
def server(
    kensa_model: Path, other: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with two_models(tmp_path_factory.mktemp("server"), other, kensa_model) as running:
        yield running


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with connected(server) as connection:
        yield connection
        for name in ("bolt", "nut"):
            connection.load_model(name)


@pytest.fixture(scope="module")
def tight(
    kensa_model: Path, other: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server that may load one model only: the first one, at the start."""
    settings = {"KENSA_MODEL_MEMORY_MIB": "200"}
    with two_models(tmp_path_factory.mktemp("tight"), other, kensa_model, **settings) as running:
        yield running


def index(client: Client) -> dict[str, tuple[str, str]]:
    found = client.get_model_repository_index()
    return {one["name"]: (one["state"], one["reason"]) for one in found}


def score(client: Client, name: str = "bolt") -> tuple[str, float]:
    answer = client.infer(name, [files_input([photo_file()])])
    return answer.get_response()["model_version"], raw_scores(answer)[0]


def refusal(client: Client, name: str = "bolt") -> str:
    with pytest.raises(InferenceServerException) as refused:
        score(client, name)
    assert refused.value.status() == "503"
    sentence: str = refused.value.message()
    return sentence


def test_an_unloaded_model_answers_no_more_until_it_is_loaded_again(
    client: Client, server: Server
) -> None:
    before = score(client)
    assert index(client) == {"bolt": ("READY", ""), "nut": ("READY", "")}
    client.unload_model("bolt")
    assert index(client) == {"bolt": ("UNAVAILABLE", UNLOADED), "nut": ("READY", "")}
    ready = server.client.post("/v2/repository/index", json={"ready": True}).json()
    assert [one["name"] for one in ready] == ["nut"]
    assert refusal(client) == UNLOADED
    assert server.client.post("/infer?model=bolt", content=b"x").json()["error"] == UNLOADED
    assert not client.is_model_ready("bolt")
    assert server.client.get("/models/bolt").json()["problem"] == UNLOADED
    assert [one["name"] for one in client.get_inference_statistics()["model_stats"]] == ["nut"]
    score(client, "nut")
    client.unload_model("bolt")  # a second time changes nothing
    client.load_model("bolt")
    assert score(client) == before
    assert client.get_inference_statistics("bolt")["model_stats"][0]["inference_count"] == 1
    client.load_model("bolt")
    assert client.get_inference_statistics("bolt")["model_stats"][0]["inference_count"] == 1


def test_a_request_without_a_name_is_not_answered_by_the_model_that_is_left(
    client: Client, server: Server
) -> None:
    client.unload_model("bolt")
    answer = server.infer(photo_file())
    assert (answer.status_code, agreed(answer)) == (404, "unknown_model")
    assert "Say which model" in answer.json()["error"]


def test_what_was_put_away_is_no_problem_unless_nothing_is_left(
    client: Client, server: Server
) -> None:
    client.unload_model("bolt")
    assert client.is_server_ready()
    health = server.client.get("/healthz")
    assert (health.status_code, health.json()["unloaded"]) == (200, ["bolt"])
    client.unload_model("nut")
    assert not client.is_server_ready()
    assert client.is_server_live()
    for path in ("/readyz", "/v2/health/ready"):
        answer = server.client.get(path)
        assert (answer.status_code, agreed(answer)) == (503, "not_ready")
        assert UNLOADED in answer.json()["error"]
    assert server.client.get("/healthz").status_code == 503
    answer = server.infer(photo_file())
    assert (answer.status_code, agreed(answer)) == (503, "not_ready")
    client.load_model("nut")
    assert client.is_server_ready()


def test_unloading_gives_the_memory_back_time_and_again(client: Client, server: Server) -> None:
    loaded, unloaded = [], []
    for _ in range(5):
        client.load_model("bolt")
        for number in range(3):
            client.infer("bolt", [files_input([photo_file(number)])])
        loaded.append(server.memory("VmRSS"))
        client.unload_model("bolt")
        unloaded.append(server.memory("VmRSS"))
    assert all(more - less > 20 * MIB for more, less in zip(loaded, unloaded, strict=True))
    assert unloaded[-1] - unloaded[1] < 8 * MIB


def test_unloading_waits_for_the_last_request_and_drops_none(
    client: Client, server: Server
) -> None:
    expected, stop, wrong, seen = score(client)[1], threading.Event(), [], []

    def send() -> None:
        pixels = np.stack([photo()] * 3)
        with connected(server) as own:
            while not stop.is_set():
                try:
                    scores = raw_scores(own.infer("bolt", [pixels_input(pixels)]))
                except InferenceServerException as error:
                    seen.append(error.message())
                    continue
                wrong.extend(one for one in scores if one != expected)
                seen.append("verdicts")

    threads = [threading.Thread(target=send) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(2):
            so_far = len(seen)
            waiting.until(lambda: "verdicts" in seen[so_far:])  # noqa: B023
            client.unload_model("bolt")
            waiting.until(lambda: UNLOADED in seen[so_far:])  # noqa: B023
            client.load_model("bolt")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert set(seen) == {"verdicts", UNLOADED}
    assert "Traceback" not in server.log.read_text()


def test_one_version_judges_all_images_of_a_request_while_others_go_live(
    client: Client, server: Server
) -> None:
    model = server.client.get("/models/bolt").json()
    versions, expected = [model["live"], model["previous"]], {}
    for version in versions:
        server.client.post(f"/models/bolt/versions/{version}/activate")
        assert score(client)[0] == version
        expected[version] = score(client)[1]
    assert len(set(expected.values())) == 2
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            assert server.client.post("/models/bolt/rollback").status_code == 200

    swapping = threading.Thread(target=swap)
    swapping.start()
    seen: list[str] = []
    while len(seen) < 6 or (len(set(seen)) < 2 and len(seen) < 100):
        answer = client.infer("bolt", [pixels_input(np.stack([photo()] * 8))])
        seen.append(answer.get_response()["model_version"])
        assert raw_scores(answer) == [expected[seen[-1]]] * 8
    stop.set()
    swapping.join()
    assert set(seen) == set(versions)


def test_a_person_who_names_a_version_loads_an_unloaded_model(
    client: Client, server: Server
) -> None:
    for how in ("versions/{}/activate", "rollback"):
        wanted = server.client.get("/models/bolt").json()["previous"]
        client.unload_model("bolt")
        answer = server.client.post(f"/models/bolt/{how.format(wanted)}")
        assert answer.status_code == 200, answer.text
        assert answer.json()["live"] == score(client)[0] == wanted
    client.unload_model("bolt")
    answer = server.client.post(f"/models/bolt/versions/{wanted}/activate")
    assert answer.json()["live"] == score(client)[0] == wanted, "it was live all the time"


def test_a_version_published_meanwhile_waits_until_the_model_is_loaded(
    client: Client, server: Server, kensa_model: Path, tmp_path: Path
) -> None:
    before, store = score(client)[0], store_of(server)
    client.unload_model("bolt")
    third = variant(kensa_model, tmp_path / "third", bank=0.95)
    new = store.take_in("bolt", third, {"activate": True, "max_flips": 1.0})
    time.sleep(1.5)  # it is looked for twice a second
    pointer = store.pointer("bolt")
    assert pointer is not None
    assert pointer.live == before
    assert index(client)["bolt"] == ("UNAVAILABLE", UNLOADED)
    states = server.client.get("/models/bolt").json()["versions"]
    assert {one["version"]: one["state"] for one in states}[new] == "at the gate"
    client.load_model("bolt")
    for _ in range(600):
        if (version := score(client)[0]) == new:
            break
        assert version == before
        time.sleep(0.1)
    assert version == new


def test_a_model_that_was_never_live_cannot_be_loaded(
    client: Client, server: Server, kensa_model: Path
) -> None:
    store_of(server).take_in("held", kensa_model, {"activate": False})
    assert index(client)["held"] == ("UNAVAILABLE", "held has no live version.")
    with pytest.raises(InferenceServerException, match="held has no live version") as refused:
        client.load_model("held")
    assert refused.value.status() == "409"


def test_a_model_without_room_stays_unloaded(tight: Server) -> None:
    with connected(tight) as client:
        version = tight.client.get("/models/bolt").json()["live"]
        assert "unload another model" in refusal(client, "nut")
        client.unload_model("bolt")
        client.load_model("nut")
        for path in (
            "/v2/repository/models/bolt/load",
            f"/models/bolt/versions/{version}/activate",
        ):
            answer = tight.client.post(path)
            assert (answer.status_code, agreed(answer)) == (507, "out_of_memory")
            assert "unload another model" in answer.json()["error"]
        assert refusal(client) == UNLOADED
        client.unload_model("nut")
        client.load_model("bolt")
        assert score(client)[0] == version


def test_instead_of_a_damaged_live_version_the_one_before_it_is_loaded(tight: Server) -> None:
    with connected(tight) as client:
        model, store = tight.client.get("/models/bolt").json(), store_of(tight)
        client.unload_model("nut")
        client.unload_model("bolt")
        (store.folder("bolt", model["live"]) / "meta.json").write_bytes(b"garbage")
        client.load_model("bolt")
        assert score(client)[0] == model["previous"]
        client.unload_model("bolt")
        (store.folder("bolt", model["previous"]) / "model.onnx").write_bytes(b"garbage")
        with pytest.raises(InferenceServerException, match=r"model\.onnx") as refused:
            client.load_model("bolt")
        assert refused.value.status() == "503"
        client.load_model("nut")
        assert not client.is_server_ready(), "somebody wants it, and it cannot be had"
        client.unload_model("bolt")
        assert client.is_server_ready()


# The model manager alone, where it must be caught at one moment


def own_store(folder: Path, bundle: Path) -> tuple[Store, Settings]:
    store = Store(folder / "models")
    store.activate("bolt", store.take_in("bolt", bundle, {}))
    limits = {"rollback_parts": 4, "rollback_max_rejects": 0.5}
    return store, settings_of(folder, data_dir=folder, **limits)


@pytest.fixture
def strict(kensa_model: Path, tmp_path: Path) -> Path:
    """A version that rejects every part."""
    low = Meta.read(kensa_model / "meta.json").raw_image_min
    assert low is not None
    return variant(kensa_model, tmp_path / "strict", image_threshold_auto=low / 10)


async def until(holds: Callable[[], bool]) -> None:
    for _ in range(3000):
        if holds():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it does not come")


def test_who_holds_a_version_is_judged_by_it_although_another_one_is_live() -> None:
    old, new = fake_model(0.5), fake_model(1.5)

    async def go_through() -> None:
        inspector = Inspector(Settings())
        inspector.residents.put(old)
        with inspector.residents.use("fake") as held:
            inspector.residents.put(new)
            found = [await inspector.inspect(photo(), which) for which in (held, "fake", held)]
        assert [one.model for one in found] == [old, new, old]
        assert [one.verdict.label for one in found] == ["Normal", "Anomaly", "Normal"]
        assert inspector.statistics.of(old).success.count == 2
        await inspector.close()

    asyncio.run(go_through())


def test_a_restart_loads_what_was_unloaded(kensa_model: Path, tmp_path: Path) -> None:
    _, settings = own_store(tmp_path, kensa_model)

    async def go_through() -> None:
        app = create_app(settings)
        async with app.router.lifespan_context(app):
            await app.state.models.unload("bolt")
            assert app.state.inspector.residents.names() == []
        app = create_app(settings)
        async with app.router.lifespan_context(app):
            assert app.state.inspector.residents.names() == ["bolt"]

    asyncio.run(go_through())


@pytest.mark.parametrize("last_part", ["before it is unloaded", "while it is", "afterwards"])
def test_a_trial_is_not_forgotten_when_the_model_is_unloaded(
    kensa_model: Path, strict: Path, tmp_path: Path, last_part: str
) -> None:
    """The fourth part shows that the new version rejects too much; three come before."""
    store, settings = own_store(tmp_path, kensa_model)
    old = store.versions("bolt")[0]
    new = store.take_in("bolt", strict, {"activate": True, "max_flips": 1.0})
    app = create_app(settings)
    models, inspector = app.state.models, app.state.inspector
    residents, part = inspector.residents, photo_file()

    def live() -> str | None:
        pointer = store.pointer("bolt")
        return pointer.live if pointer else None

    async def go_through() -> None:
        async with app.router.lifespan_context(app):
            await until(lambda: residents.get("bolt").version == new)
            for _ in range(3):
                await inspector.inspect(part, "bolt")
            if last_part == "before it is unloaded":
                await inspector.inspect(part, "bolt")
            with residents.use("bolt") as held:
                unloading = asyncio.create_task(models.unload("bolt"))
                await until(lambda: not residents.names())
                if last_part == "while it is":
                    await inspector.inspect(part, held)
            await unloading
            if last_part == "afterwards":
                assert live() == new
                await models.load("bolt")
                await inspector.inspect(part, "bolt")
                await until(lambda: residents.get("bolt").version == old)
            else:
                await until(lambda: live() == old)
                assert residents.names() == [], "nobody wanted it in memory"
                await models.load("bolt")
                assert residents.get("bolt").version == old

    asyncio.run(go_through())
