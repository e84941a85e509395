#!/usr/bin/env bash
# A folder of wheels, to install Kensa on a Jetson that has no internet. Run it on a machine that
# has, of any kind, with pip and uv (pip install uv); docs/jetson.md says what to do with the folder.
#
#   docker/bundle.sh FOLDER            what serving on a Jetson needs
#   docker/bundle.sh FOLDER train      what learning needs as well
set -euo pipefail

if [ $# -lt 1 ] || [[ "$1" == -* ]]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    exit 2
fi
folder=$1
shift
source=$(cd "$(dirname "$0")/.." && pwd)
python=${JETSON_PYTHON:-3.10} # of JetPack 6; 3.12 for JetPack 7
glibc=${JETSON_GLIBC:-35}     # 2.35 of JetPack 6; 39 for JetPack 7
torch=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
extras=(--extra jetson)
for extra in "$@"; do extras+=(--extra "$extra"); done
# What the packages need on the Jetson, whatever machine this is: pip alone would go by this one.
# setuptools and wheel are there for pycuda, which is compiled on the Jetson.
target=(--python-version "$python" --python-platform "aarch64-manylinux_2_$glibc")
resolve=(uv pip compile --quiet --no-header --no-annotate "${target[@]}" "${extras[@]}"
    "$source/pyproject.toml" -)
index=()
if [[ " $* " == *" train "* ]]; then
    index=(--extra-index-url "$torch")
    resolve+=(--index-strategy unsafe-best-match "${index[@]}")
fi
printf 'setuptools>=77\nwheel\n' | "${resolve[@]}" --output-file "$folder/requirements.txt"

platforms=(--platform manylinux2014_aarch64)
for ((minor = 17; minor <= glibc; minor++)); do
    platforms+=(--platform "manylinux_2_${minor}_aarch64")
done
python3 -m pip download --quiet --no-deps --dest "$folder" --requirement "$folder/requirements.txt" \
    --python-version "$python" --implementation cp "${platforms[@]}" "${index[@]}"
python3 -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$source"

# The folder alone must do.
printf 'setuptools>=77\nwheel\n' | UV_FIND_LINKS="$folder" "${resolve[@]}" --no-index > /dev/null
echo "$(find "$folder" -type f | wc -l) files, $(du -sm "$folder" | cut -f1) MB: $folder"
