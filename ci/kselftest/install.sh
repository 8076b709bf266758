#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
#
# Adds the suite to a kselftest folder, as the collection "uffd" for run_kselftest.sh.
#
#   install.sh DIR          DIR was made by the kernel's "make -C tools/testing/selftests install"
#   install.sh DIR LINUX    DIR is made, with the runner of the kernel source LINUX
#
# Exit code 2 and one line that says what to do when that cannot be done.
set -eu

die() {
    echo "install.sh: $1" >&2
    exit 2
}

[ $# -eq 1 ] || [ $# -eq 2 ] || die "call it as: install.sh DIR [LINUX]"
here=$(CDPATH='' cd "${0%/*}/../.." && pwd -P)
folder=$1
if [ $# -eq 2 ]; then
    selftests=$2/tools/testing/selftests
    [ -e "$selftests/run_kselftest.sh" ] || die "$2 is no kernel source: there is no tools/testing/selftests in it"
    {
        mkdir -p "$folder/kselftest" && cp "$selftests/run_kselftest.sh" "$folder/" &&
            cp "$selftests"/kselftest/*.sh "$selftests"/kselftest/*.pl "$folder/kselftest/"
    } 2>/dev/null || die "cannot write into $folder"
fi
[ -e "$folder/run_kselftest.sh" ] ||
    die "no run_kselftest.sh in $folder: name what the kernel's selftests installed, or a kernel source behind it"

collection=$folder/uffd
{ rm -rf "$collection" && mkdir "$collection"; } 2>/dev/null || die "cannot write into $folder"
(cd "$here" && tar -c --exclude=__pycache__ --exclude='*.so' --exclude=_native.c --exclude=.venv \
    run_tests.sh pyproject.toml conftest.py README.md LICENSE uffd_selftests) | tar -x -C "$collection"
# The set-up of the first run, then the suite, on a slow machine; a case that hangs ends by its own deadline.
echo timeout=900 >"$collection/settings"

list=$folder/kselftest-list.txt
{ grep -v '^uffd:' "$list" 2>/dev/null || true; } >"$list.new"
echo uffd:run_tests.sh >>"$list.new"
mv "$list.new" "$list"
