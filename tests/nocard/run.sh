#!/bin/bash
# Run a command with a card that is not there: NOCARD=H100|A100|T4 run.sh COMMAND ...
here=$(dirname "$(realpath "$0")")
if [ ! -e "$here/build/libnocard.so" ]; then
  echo "nocard is not built yet: tests/nocard/build.sh VENV builds it" >&2
  exit 2
fi
export NOCARD=${NOCARD:-H100}
export TORCH_CUDNN_V8_API_DISABLED=1  # dnn.cpp pretends cuDNN's older interface
export LD_LIBRARY_PATH=$here/build/driver${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
LD_PRELOAD=$here/build/libnocard.so exec "$@"
