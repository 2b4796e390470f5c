#!/bin/sh
# Runs the core's tests on builds with the compiler's sanitizers: sanitize.sh PYTHON. Python itself is
# not instrumented, so the sanitizer's runtime is loaded before it, leaks are not looked for, and
# OpenBLAS keeps to one thread, because its own would be reported.
set -eu
python=$1
cc=${CC:-cc}

sanitize() { # NAME FLAG RUNTIME
    echo "core tests under -fsanitize=$2"
    CFLAGS="-g1 -fsanitize=$2 -fno-omit-frame-pointer -fno-sanitize-recover=all" \
        LDFLAGS="-fsanitize=$2" \
        "$python" setup.py -q build_core -b "build/sanitize/$1" -t "build/sanitize/$1-objects"
    KVCORE_TEST_LIBRARY=build/sanitize/$1/kvcore/lib/libkvcore.so \
        LD_PRELOAD=$($cc -print-file-name="$3") \
        ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=halt_on_error=1:die_after_fork=0 OPENBLAS_NUM_THREADS=1 \
        "$python" -m pytest -q -p no:cacheprovider --capture=sys tests/core
}

sanitize address address,undefined libasan.so
sanitize thread thread libtsan.so
