#!/bin/sh
# Runs the tests of the core on builds with the compiler's sanitizers: sanitize.sh PYTHON. Python
# itself is not instrumented, so the sanitizer's runtime is loaded before it, leaks are not looked
# for, and OpenBLAS keeps to one thread, because its own would be reported.
set -eu
python=$1
# avx512_vnni has the text of avx512. Each set takes minutes to compile.
export KVCORE_WITHOUT_ISAS=avx512,avx512_bf16
cc=${CC:-cc}
tests="tests/core tests/test_control_plane.py tests/test_plan.py tests/test_retention.py"
tests="$tests tests/test_threads.py"

sanitize() { # NAME FLAG RUNTIME
    echo "the core under -fsanitize=$2"
    CFLAGS="-g1 -fsanitize=$2 -fno-omit-frame-pointer -fno-sanitize-recover=all" \
        LDFLAGS="-fsanitize=$2" \
        "$python" setup.py -q build_core -b "build/sanitize/$1" -t "build/sanitize/$1-objects"
    # The extensions find the instrumented library by the path, tests/core by the variable.
    library=$PWD/build/sanitize/$1/kvcore/lib
    # shellcheck disable=SC2086
    LD_LIBRARY_PATH=$library KVCORE_TEST_LIBRARY=$library/libkvcore.so \
        LD_PRELOAD=$($cc -print-file-name="$3") OPENBLAS_NUM_THREADS=1 \
        ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=halt_on_error=1:die_after_fork=0 \
        "$python" -m pytest -q -n auto --dist worksteal -p no:cacheprovider --capture=sys $tests
}

sanitize address address,undefined libasan.so
sanitize thread thread libtsan.so
