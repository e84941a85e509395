"""TensorRT for RTX, the real one, parses and builds one graph, in this process alone.

    rtx_build.py GRAPH PLAN CAPABILITY ROWS WORKSPACE_MIB [CANCEL_AT]

Writes the plan and prints as JSON what happened. CANCEL_AT: the step at which the build is
cancelled. As `workers/converting/plan/build.py` sets a build up, without its CUDA.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import tensorrt_rtx as trt

MIB = 2**20
MAX_BATCH = 4
LEAST_ROWS = 9


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps warnings and errors."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.WARNING:
            self.lines.append(f"{severity.name}: {message}")


class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
    """Notes the phases, and cancels at a step."""

    def __init__(self, cancel_at: int | None) -> None:
        trt.IProgressMonitor.__init__(self)
        self.phases: list[str] = []
        self.steps = 0
        self._cancel_at = cancel_at

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        if phase_name not in self.phases:
            self.phases.append(phase_name)

    def step_complete(self, phase_name: str, step: int) -> bool:
        self.steps += 1
        return self._cancel_at is None or self.steps < self._cancel_at

    def phase_finish(self, phase_name: str) -> None:
        pass


def main(
    graph: Path, plan: Path, capability: str, rows: int, workspace: int, cancel_at: int | None
) -> dict[str, Any]:
    began = time.perf_counter()
    log, monitor = Log(), Monitor(cancel_at)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph.read_bytes()):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        said = [f"{one.node_operator()} {one.node_name()}: {one.desc()}" for one in errors]
        return {"parsed": False, "built": False, "errors": said, "log": log.lines}
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    config.clear_flag(trt.BuilderFlag.TF32)
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace * MIB)
    config.add_optimization_profile(_profile(builder, network, rows))
    config.progress_monitor = monitor
    built = builder.build_serialized_network(network, config)
    if built is not None:
        plan.write_bytes(built)
    return {
        "parsed": True,
        "built": built is not None,
        "bytes": 0 if built is None else built.nbytes,
        "seconds": round(time.perf_counter() - began, 2),
        "phases": monitor.phases,
        "steps": monitor.steps,
        "log": log.lines,
    }


def _profile(builder: Any, network: Any, rows: int) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.name == "keep":
            continue
        least, best, most = 1, 1, MAX_BATCH
        if tensor.name == "memory_bank":
            least, best, most = LEAST_ROWS, rows, rows * 3 // 2
        sides = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, (least, *sides), (best, *sides), (most, *sides))
    return profile


if __name__ == "__main__":
    where, to, capability, *numbers = sys.argv[1:]
    rows, workspace, *cancel = map(int, numbers)
    found = main(Path(where), Path(to), capability, rows, workspace, cancel[0] if cancel else None)
    print(json.dumps(found))
