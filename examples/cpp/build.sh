#!/bin/sh
# Compiles run_package with the headers and libraries of the installed TVM wheels: build.sh OUTPUT [PYTHON]
set -eu
output=$1
python=${2:-python}
source=$(dirname "$0")/run_package.cc
tvm=$("$python" -c 'import importlib.util as u; print(u.find_spec("tvm").submodule_search_locations[0])')
ffi=$("$python" -c 'import importlib.util as u; print(u.find_spec("tvm_ffi").submodule_search_locations[0])')
exec "${CXX:-g++}" -std=c++17 -O2 "$source" -o "$output" \
    -I"$tvm/include" -I"$ffi/include" \
    -L"$tvm/lib" -L"$ffi/lib" -Wl,--no-as-needed -ltvm_runtime -ltvm_ffi \
    -Wl,-rpath,"$tvm/lib" -Wl,-rpath,"$ffi/lib"
