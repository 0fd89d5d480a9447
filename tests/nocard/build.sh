#!/bin/bash
# Build libnocard.so and its libcuda.so.1 for the PyTorch of a virtual environment.
set -euo pipefail
cd "$(dirname "$0")"
[ $# = 1 ] || { echo "usage: build.sh VENV" >&2; exit 2; }
site=$(echo "$1"/lib/python3*/site-packages)
if [ ! -e "$site/torch/lib/libtorch_cuda.so" ]; then
  echo "nocard stands in for a card under PyTorch's CUDA build, and $1 has none" >&2
  exit 2
fi
headers=$site/nvidia/cu13/include
if [ ! -e "$headers/crt" ] || [ ! -e "$headers/nv" ] && [ ! -e "$headers/cccl" ]; then
  echo "CUDA's headers are not whole: $1/bin/pip install nvidia-cuda-{crt,cccl}==13.0.*" >&2
  exit 2
fi
mkdir -p build/driver
"$1/bin/python" generate.py "$site/torch/lib" build
flags="-std=c++17 -O2 -fPIC -fvisibility=hidden -Wall -Wno-builtin-declaration-mismatch"
g++ $flags -I"$headers" -I"$site/nvidia/cudnn/include" -I. -shared \
  -o build/libnocard.so card.cpp memory.cpp runtime.cpp blas.cpp dnn.cpp build/rest.cpp \
  -lpthread
g++ $flags -shared -Wl,-soname,libcuda.so.1 -o build/driver/libcuda.so.1 \
  build/driver_all.cpp
