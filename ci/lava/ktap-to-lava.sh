#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
#
# Reads the suite's KTAP, hands it on, and reports each result with LAVA's lava-test-case: pass, skip or fail.
# A known defect (XFAIL) is a pass, as it is "ok". Last comes "complete", which fails when results are missing.
exec awk '
    function report(name, result) {
        system("lava-test-case " name " --result " result) # after a flush
    }

    # The name of a result in the characters that LAVA allows: case.variant.memory, as in KCIDB.
    function id(name) {
        gsub(/ on | \(/, ".", name)
        gsub(/[^A-Za-z0-9_.]+/, "-", name)
        gsub(/-+\./, ".", name)
        sub(/-+$/, "", name)
        return name
    }

    { print }
    /^1\.\.[0-9]+/ { planned = substr($1, 4) }
    /^(not )?ok [0-9]+ / {
        seen++
        name = $0
        sub(/^(not )?ok [0-9]+ (- )?/, "", name)
        sub(/ # .*/, "", name)
        report(id(name), $1 == "not" ? "fail" : / # SKIP/ ? "skip" : "pass")
    }
    END { report("complete", planned != "" && seen == planned ? "pass" : "fail") }
'
