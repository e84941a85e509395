#!/usr/bin/env bash
# TensorRT's limit for trying kernels, TACTIC_DRAM, must be a power of two. Another number raises
# nothing and is not taken: the limit before stays, which is as good as none.
#
# Version: tensorrt-rtx-cu13 1.7.1.116, x86-64, no GPU and no driver.
# Behaviour: `set_memory_pool_limit(TACTIC_DRAM, 3000 MiB)` returns None as it does when all is well;
#   only the logger hears of it, in an error. `get_memory_pool_limit` is what it was. 2048 MiB and
#   4096 MiB are taken. WORKSPACE takes either. Without a driver a second error follows, of CUDA's,
#   so the last line of the log is not the reason.
# Where one meets it: a share of the memory that is free, as a limit, so that a build leaves room for
#   what runs beside it; such a share is hardly ever a power of two.
# What helps: round down to a power of two, and read the limit back.
# Seen: the lines that this script prints, and compares.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tensorrt-rtx-cu13==1.7.1.116
cat > "$folder/run.py" <<'PYTHON'
import tensorrt_rtx as trt

MIB = 1024 * 1024


class Heard(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.errors = []

    def log(self, severity, message):
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)


logger = Heard()
builder = trt.Builder(logger)
config = builder.create_builder_config()


def limited(pool, mib):
    """Whether a limit is taken, and the errors that the logger heard of."""
    logger.errors.clear()
    before = config.get_memory_pool_limit(pool)
    assert config.set_memory_pool_limit(pool, mib * MIB) is None
    after = config.get_memory_pool_limit(pool)
    taken = after == mib * MIB
    assert taken or after == before
    print(f"{pool.name} {mib} MiB: {'taken' if taken else 'the limit before stays'},"
          f" {len(logger.errors)} errors")
    return taken, list(logger.errors)


print("tensorrt_rtx", trt.__version__)
tactics, workspace = trt.MemoryPoolType.TACTIC_DRAM, trt.MemoryPoolType.WORKSPACE
for mib in (2048, 4096):
    assert limited(tactics, mib) == (True, [])
taken, errors = limited(tactics, 3000)
assert not taken and errors
print("the first error:", errors[0][:160])
for mib in (2048, 3000):
    assert limited(workspace, mib) == (True, [])
print("as described")
PYTHON
"$folder/venv/bin/python" "$folder/run.py"
