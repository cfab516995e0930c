# Make a timeline of what /init says (lines with #) and of the audit records between them, and check that each
# attempt had the record that belongs to it. Exits 1 if one had not, if an outcome was unexpected, or if /init never
# came to its end.
function close_idle() {
    if (idle) printf "     (%d audit records of the tools it used)\n", idle
    idle = 0
}
/^#step / { close_idle(); printf "\n%2d  %s\n", ++steps, substr($0, 7); fflush(); next }
/^#note / { close_idle(); print "     " substr($0, 7); fflush(); next }
/^#try / { close_idle(); print "   $ " substr($0, 6); trying = 1; seen = 0; next }
/^#record/ { wanted = substr($0, 9); next }
/^#outcome / {
    trying = 0; attempts++
    good = $2 == "expected"
    text = substr($0, index($0, $2) + length($2) + 1)
    if (good) sub(/ \(wanted: .*/, "", text)
    print "     => " text
    if (!good) { print "     NOT AS EXPECTED"; bad++ }
    if (wanted != "" && !seen) { print "     NO AUDIT RECORD AS EXPECTED: " wanted; bad++ }
    fflush(); next
}
/^#end$/ { close_idle(); print ""; ended = 1; next }
/^ipe-emu: / { print; next }
/^type=/ {
    if (!trying) { idle++; next }
    if (wanted != "" && $0 ~ wanted) seen = 1
    print "     " $0; next
}
{ print "     " $0; fflush() }
END {
    if (!ended) { print "\nThe boot did not come to its end."; exit 1 }
    if (bad) { printf "\n%d of %d attempts NOT as expected.\n", bad, attempts; exit 1 }
    printf "\nAll %d attempts as expected, each with its audit record.\n", attempts
}
