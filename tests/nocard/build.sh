#!/bin/bash
# Build libnocard.so and its libcuda.so.1 for the PyTorch of a virtual environment.
set -euo pipefail
[ $# = 1 ] || { echo "usage: build.sh VENV" >&2; exit 2; }
venv=$(realpath "$1")
cd "$(dirname "$0")"
site=$(echo "$venv"/lib/python3*/site-packages)
if [ ! -e "$site/torch/lib/libtorch_cuda.so" ]; then
  echo "nocard stands in for a card under PyTorch's CUDA build, and $venv has none" >&2
  exit 2
fi
headers=$site/nvidia/cu13/include
if [ ! -e "$headers/crt" ] || [ ! -e "$headers/nv" ] && [ ! -e "$headers/cccl" ]; then
  echo "CUDA's headers are not whole: $venv/bin/pip install nvidia-cuda-{crt,cccl}==13.0.*" >&2
  exit 2
fi
mkdir -p build/driver
"$venv/bin/python" generate.py "$site/torch/lib" build
flags="-std=c++17 -O2 -fPIC -fvisibility=hidden -Wall -Wno-builtin-declaration-mismatch"
g++ $flags -I"$headers" -I"$site/nvidia/cudnn/include" -I. -shared \
  -o build/libnocard.so card.cpp memory.cpp runtime.cpp blas.cpp dnn.cpp build/rest.cpp \
  -lpthread
g++ $flags -shared -Wl,-soname,libcuda.so.1 -o build/driver/libcuda.so.1 \
  build/driver_all.cpp
