"""Where the memory is that building a plan takes."""

from __future__ import annotations

from pathlib import Path

from engines.machine.job_memory import BARE, needs
from engines.machine.memory import MIB, Free
from engines.machine.memory_needs import RTX_FIXED
from engines.queue.job_requests import ConvertRequest
from engines.store.versions import Store
from support.double import RTX, doubled
from support.plans import tiny_bundle


def test_a_plan_for_others_takes_none_of_the_gpu_that_is_here(tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bare")
    store = Store(tmp_path / "data" / "models")
    store.activate("bolt", store.take_in("bolt", bundle, {}))
    free = Free(host=8000 * MIB, device=8000 * MIB)
    with doubled(RTX, "rtx") as double:
        own = ConvertRequest(model="bolt", from_onnx=True)
        assert needs(tmp_path / "data", own, free).device > 0
        others = ConvertRequest(model="bolt", from_onnx=True, target="rtx:SM86")
        found = needs(tmp_path / "data", others, free)
        double.assert_clean()
    assert found.device == 0
    assert BARE + RTX_FIXED <= found.host < BARE + RTX_FIXED + MIB
