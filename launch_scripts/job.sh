# Run a job that a request to stop reaches. local.sh and quickstart.sh source this file.
#
# run_job COMMAND [ARGUMENT ...] runs a deepspeed command to its end. SIGTERM, SIGUSR1, SIGHUP or Ctrl-C asks the ranks
# to save and end. A second Ctrl-C kills them. Returns the exit code of the command: 75 if it was asked to end.
stop_requested=0
interrupted_at=
job=

request_stop() {
    # The console may be gone.
    if [ "$stop_requested" = 0 ]; then echo "asking every rank to save and end" >&2 || true; fi
    stop_requested=1
}

interrupt() {
    local now=${EPOCHREALTIME/[^0-9]/} # microseconds; the locale chooses the decimal separator
    request_stop
    if [ -z "$interrupted_at" ]; then
        interrupted_at=$now
    elif [ $((now - interrupted_at)) -ge 1000000 ]; then # within a second, it is the same Ctrl-C, passed on by a wrapper
        interrupted_at=killed
        kill -KILL -- "-$job" || true
    fi
}

run_job() {
    local code=0
    # In a session of its own, the job gets no signal of the terminal, only the SIGUSR1 that this script sends.
    # DeepSpeed's runner and launcher would end at any signal, or kill ranks that still save, so they start with this
    # one ignored. The ranks handle it as soon as they can, so it is repeated.
    (trap '' USR1; trap - INT QUIT; exec setsid "$@") <&0 &
    job=$!
    trap request_stop TERM USR1 HUP
    trap interrupt INT
    trap : PIPE
    while kill -0 "$job" 2>/dev/null; do
        if [ "$stop_requested" = 1 ]; then
            kill -USR1 -- "-$job" 2>/dev/null || true
            sleep 1 & # in the foreground, it would hold the next signal back until its end
            wait "$!" || true
        else
            wait "$job" || true # ends early at a signal
        fi
    done
    wait "$job" || code=$?
    trap - TERM USR1 HUP INT PIPE
    if [ "$interrupted_at" = killed ]; then return 130; fi
    if [ "$stop_requested" = 1 ] && [ "$code" -gt 128 ]; then return 75; fi # it ended before it could handle signals
    return "$code"
}
