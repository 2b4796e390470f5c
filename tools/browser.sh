#!/bin/sh
# A headless browser for the tests of the planner's page: installs Debian's Chromium where there is
# none and that can be done (root, apt-get), and says so where the tests will be skipped.
set -eu

is_there() { command -v chromium >/dev/null || [ -n "${KVCORE_BROWSER:-}" ]; }

if ! is_there && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get -qq update && apt-get -qq install --no-install-recommends chromium; } \
        >/dev/null 2>&1 || true
fi
is_there || echo "no chromium: the planner's page will not be laid out by a browser"
