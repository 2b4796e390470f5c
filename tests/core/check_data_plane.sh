#!/bin/sh
# Builds the data plane with check_data_plane.c and runs it.
#
#   check_data_plane.sh          natively, warnings are errors
#   check_data_plane.sh asan     with the address and undefined-behaviour sanitizers
#   check_data_plane.sh tsan     with the thread sanitizer
#   check_data_plane.sh neon     for AArch64, under qemu-aarch64
#
# neon needs gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
source=$here/../../src/kvcore
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

compiler=${CC:-cc}
machine=$(uname -m)
run=
options=-O2
case ${1:-native} in
native) ;;
asan) options="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all" ;;
tsan) options="-O1 -g -fsanitize=thread" ;;
neon)
    compiler=aarch64-linux-gnu-gcc
    machine=aarch64
    run="qemu-aarch64 -L /usr/aarch64-linux-gnu"
    ;;
*)
    echo "usage: $0 [native|asan|tsan|neon]" >&2
    exit 2
    ;;
esac

compile() { # source flags...
    object=$build/$(basename "$1" .c).o
    # shellcheck disable=SC2086
    "$compiler" -std=c11 -ffp-contract=off -Wall -Wextra -Werror $options -pthread \
        -I"$source/include/kvcore" -I"$source/core" -DKVCORE_VERSION='"check"' "$@" -o "$object"
}

avx2="-mavx2 -mfma -mf16c"
avx512="$avx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl"
avx512_vnni="$avx512 -mavx512vnni -mavx512vbmi"
for file in "$source"/core/*.c "$source"/core/kernels/*.c "$here/check_data_plane.c"; do
    case $machine-$(basename "$file") in
    x86_64-isa_avx2.c) compile "$file" -c $avx2 ;;
    x86_64-isa_avx512.c) compile "$file" -c $avx512 ;;
    x86_64-isa_avx512_vnni.c) compile "$file" -c $avx512_vnni ;;
    x86_64-isa_avx512_bf16.c) compile "$file" -c $avx512_vnni -mavx512bf16 ;;
    *) compile "$file" -c ;;
    esac
done
# shellcheck disable=SC2086
"$compiler" $options -pthread "$build"/*.o -o "$build/check" -lm
$run "$build/check"
