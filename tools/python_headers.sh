#!/bin/sh
# Debian keeps Python's headers in a package of their own. Where they are missing, this unpacks that
# package into a folder, which needs no root: python_headers.sh PYTHON FOLDER
set -eu
python=$1
folder=$2

include=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')
if [ -e "$include/Python.h" ]; then
    exit 0
fi
package=libpython$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')-dev
echo "Python.h is missing: unpacking $package into $folder"
mkdir -p "$folder"
if ! (cd "$folder" && apt-get -qq download "$package" && dpkg -x "$package"_*.deb . ); then
    rm -rf "$folder"
    echo "error: cannot get $package; install it: apt-get install python3-dev" >&2
    exit 1
fi
rm -f "$folder/$package"_*.deb
ln -sfn "$(basename "$include")" "$folder/usr/include/python3"
