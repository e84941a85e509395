#!/usr/bin/env bash
# Try a GPU with everything that Kensa does with one; docs/gpu-pc.md says what it tries. The machine
# with the GPU needs its driver, Python with venv, and this repository, but no internet.
#
#   docker/check_gpu.sh gather FOLDER        on a PC like it that has internet: wheels and models
#   docker/check_gpu.sh run FOLDER [FILE]    on the machine with the GPU; FILE: all figures, as JSON
set -euo pipefail

if [ $# -lt 2 ] || [[ "$1" != gather && "$1" != run ]]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    exit 2
fi
what=$1 folder=$2
source=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}

if [ "$what" = gather ]; then
    learns='import sys; from importlib.util import find_spec as has; sys.exit(not has("torch"))'
    if ! "$python" -c "$learns"; then
        echo "error: models are learned here: activate an environment with the extra train" >&2
        exit 2
    fi
    mkdir -p "$folder/wheels"
    folder=$(cd "$folder" && pwd)
    "$python" -m pip download --quiet --dest "$folder/wheels" "${source}[rtx-serve]" \
        'pytest>=8.3' 'setuptools>=77' wheel
    "$python" -m pip download --quiet --dest "$folder/wheels" --no-deps --no-binary pycuda pycuda
    "$python" -m pip download --quiet --dest "$folder/wheels" pytools mako platformdirs siphash24
    rm -rf "$folder/models"
    (cd "$source" && "$python" -m benchmarks.gpu prepare "$folder/models")
    echo "$(du -sm "$folder" | cut -f1) MB: $folder"
    exit
fi

if [ ! -d "$folder/wheels" ]; then
    echo "error: $folder holds no wheels: make it with docker/check_gpu.sh gather" >&2
    exit 2
fi
out=${3:-gpu.json}
mkdir -p "$(dirname "$out")"
out=$(cd "$(dirname "$out")" && pwd)/$(basename "$out")
folder=$(cd "$folder" && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"$python" -m venv "$place/venv"
pip=("$place/venv/bin/python" -m pip install --quiet --no-index --find-links "$folder/wheels")
"${pip[@]}" 'setuptools>=77' wheel
"${pip[@]}" --no-build-isolation "${source}[rtx-serve]" pytest
cd "$source"
failed=0
"$place/venv/bin/python" -m benchmarks.gpu run "$folder/models" --out "$out" || failed=1

# The seam to CUDA by itself: with cuda-bindings, and with pycuda, which is built here from source.
"$place/venv/bin/python" -m pytest -q -rs -m 'soak or not soak' -k real \
    tests/engines/runtimes/test_cuda.py || failed=1
if ! command -v nvcc > /dev/null; then
    echo "pycuda was not built: there is no nvcc (CUDA's toolkit) on the PATH"
elif "${pip[@]}" --no-build-isolation pycuda > "$place/pycuda.log" 2>&1; then
    "$place/venv/bin/python" -m pytest -q -rs -m 'soak or not soak' -k real \
        tests/engines/runtimes/test_cuda.py || failed=1
else
    failed=1
    echo "pycuda could not be built: $(grep -m1 -i 'error:' "$place/pycuda.log")"
fi
exit $failed
