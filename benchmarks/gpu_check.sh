#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under nine minutes: the GPU-marked tests, then the GPU benchmarks.
# Builds and installs nothing. Usage: benchmarks/gpu_check.sh [python] [folder for the results]
set -u
python=${1:-python3}
results=${2:-benchmarks/results}
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$results"
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name())' || exit 1
# The laws of the Triton kernels are no test_*.py: they are named here to run natively, one by one.
timeout 240 "$python" -m pytest -q -m gpu -p no:cacheprovider --junitxml="$results/gpu_tests.xml" \
    tests tests/ot/backends/triton_laws.py
tests=$?
timeout 270 "$python" benchmarks/gpu_matching.py --output "$results" || exit 1
exit $tests
