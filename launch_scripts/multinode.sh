#!/usr/bin/env bash
# Train on the nodes of a hostfile, over ssh. Preflight checks run first, then the deepspeed launcher.
#
#   launch_scripts/multinode.sh HOSTFILE CONFIG.yaml [--section.key VALUE ...]
#   TRAINER=trainer.train | trainer.pretrain_lm | trainer.pretrain_vision
#   LAUNCHER=pdsh | openmpi
#   SSH_ARGS="-p 2222"    arguments of every ssh call
#   INTERFACE=eth1        network interface, the same on all nodes (default: each node's interface to the first node)
#   MASTER_ADDR=10.0.0.1  address of the first node (default: the last node resolves the first node's name)
#   MASTER_PORT=29500     change it when two runs share the first node
#   FORWARD="NAME ..."    environment variables to set on the nodes, besides those of FORWARDED below
#   PREFLIGHT=0           skip the checks
#
# SIGTERM, SIGUSR1, SIGHUP or Ctrl-C asks every rank to save and end. A second Ctrl-C, or SIGUSR2, ends the job at once.
# Exit codes: 0 the run is complete; 75 the run was asked to end and saved, start it again; 2 the hostfile or the
# configuration is wrong; any other: the run failed.
# The clone and its .venv must be at the same path on all nodes, and the run folder on a file system that they share.
# See hostfile.example.
#
# Relative paths on the command line are relative to the caller's folder, those in CONFIG.yaml to the clone.
set -euo pipefail
caller="$PWD"
cd "$(dirname "$0")/.."

FORWARDED='^(DS_ACCELERATOR|LD_LIBRARY_PATH|PATH|TOKENIZERS_PARALLELISM|(CUDA|FI|FLAMINGO|GLOO|HF|MKL|NCCL|OMP|PYTORCH|TORCH|UCX)_.*)$'
# The launcher sets CUDA_VISIBLE_DEVICES itself. HF_TOKEN would show in the output of ps.
NOT_FORWARDED='^(CUDA_VISIBLE_DEVICES|HF_TOKEN)$'

if [ $# -lt 2 ] || [ "${1#-}" != "$1" ] || [ "${2#-}" != "$2" ]; then
    sed -n '2,/^set /s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
bin="$(cd "${VENV:-.venv}/bin" 2>/dev/null && pwd)" || { echo "there is no ${VENV:-.venv}; run launch_scripts/setup.sh first" >&2; exit 1; }
export PATH="$bin:$PATH"
hostfile="$1"
shift
if [ "$caller" != "$PWD" ]; then
    if [ "${hostfile#/}" = "$hostfile" ] && [ -e "$caller/$hostfile" ]; then hostfile="$caller/$hostfile"; fi
    mapfile -d '' -t arguments < <(python -m trainer.config.caller_paths "$caller" "$@")
    if [ ${#arguments[@]} -eq 0 ]; then exit 1; fi # Python has said why
    set -- "${arguments[@]}"
fi
launcher="${LAUNCHER:-pdsh}"
port="${MASTER_PORT:-29500}"
case "$launcher" in pdsh | openmpi) ;; *) echo "LAUNCHER=$launcher: set it to pdsh or openmpi" >&2; exit 2 ;; esac
# With these options ssh notices a lost node within half a minute.
ssh_arguments="${SSH_ARGS:-} -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
read -ra ssh_array <<<"$ssh_arguments"
if [ -n "${INTERFACE:-}" ]; then export NCCL_SOCKET_IFNAME="=$INTERFACE" GLOO_SOCKET_IFNAME="$INTERFACE"; fi
# See local.sh.
if [ -z "${PYTORCH_CUDA_ALLOC_CONF:-}" ]; then
    export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
fi
FLAMINGO_JOB="$(hostname)-$$-$RANDOM" # identifies the job's processes on the nodes
export FLAMINGO_JOB
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
trap 'exit 75' TERM USR1 INT HUP # nothing runs yet that could save

# Writes the hosts' names on one line and the first host's address on the next.
python - "$hostfile" "${MASTER_ADDR:-}" "${ssh_array[@]}" >"$scratch/hosts" <<'PYTHON'
import sys
from pathlib import Path

from trainer.errors import TrainerError
from trainer.resilience.hostfile import read_hostfile
from trainer.resilience.ssh import master_address

try:
    hosts = read_hostfile(Path(sys.argv[1]))
    print(*(host.name for host in hosts))
    print(sys.argv[2] or master_address(hosts, sys.argv[3:]))
except TrainerError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
PYTHON
{ read -ra hosts; read -r master; } <"$scratch/hosts"

# Prints NAME=VALUE lines for DeepSpeed, which pastes them into a shell command. So no value may hold characters that
# a shell expands.
forward() {
    local name value
    for name in $({ compgen -e | grep -E "$FORWARDED" | grep -vE "$NOT_FORWARDED"; tr ' ' '\n' <<<"${FORWARD:-}"; } | sort -u); do
        value="${!name-}"
        if [[ "$value" =~ [^[:alnum:]_@%+=:,./-] ]]; then
            echo "$name cannot be set on the nodes: a shell would expand characters of its value ($value)" >&2
            return 2
        fi
        echo "$name=$value"
    done
}
forward >"$scratch/environment"

if [ "${PREFLIGHT:-1}" != 0 ]; then
    python -m trainer.preflight --hostfile "$hostfile" --ssh-args="$ssh_arguments" \
        --environment "$scratch/environment" --master-address "$master" --master-port "$port" "$@"
fi

# Runs the shell script on standard input on all hosts at once.
on_every_host() {
    local host script waiting=()
    script="$(cat)"
    for host in "${hosts[@]}"; do
        ssh "${ssh_array[@]}" -- "$host" bash -s -- "$@" <<<"$script" >&2 &
        waiting+=($!)
    done
    wait "${waiting[@]}" || true # a lost host has no processes to signal
}

# Signals the job's ranks, but not their loader processes and launchers. KILL ends the launchers too, and first.
signal_ranks() {
    on_every_host "$FLAMINGO_JOB" "$1" <<'RANKS'
is_rank() { tr '\0' '\n' <"/proc/$1/environ" | grep -qE '^(OMPI_COMM_WORLD_)?RANK='; }
is_launcher() { tr '\0' ' ' <"/proc/$1/cmdline" | grep -qF 'deepspeed.launcher.launch'; }
launchers=() ranks=()
for folder in /proc/[0-9]*; do
    process=${folder#/proc/}
    { tr '\0' '\n' <"$folder/environ" | grep -qxF "FLAMINGO_JOB=$1"; } 2>/dev/null || continue
    parent=$(sed -n 's/^PPid:\t//p' "$folder/status" 2>/dev/null)
    if is_launcher "$process"; then
        launchers+=("$process")
    elif is_rank "$process" && ! is_rank "$parent"; then
        ranks+=("$process")
    fi
done 2>/dev/null
if [ "$2" != KILL ]; then launchers=(); fi
for process in "${launchers[@]}" "${ranks[@]}"; do kill "-$2" "$process"; done 2>/dev/null
RANKS
}

say() { echo "multinode: $1" >&2 || true; } # the console may be gone

state=running
interrupted_at=
stop() {
    if [ "$state" = ended ]; then return; fi
    say "asking every rank to save and end"
    state=stopping
    signal_ranks USR1
}

interrupt() {
    if [ -z "$interrupted_at" ]; then
        interrupted_at=$SECONDS
        stop
    elif [ $((SECONDS - interrupted_at)) -ge 1 ]; then # within a second, it is the same Ctrl-C, passed on by a wrapper
        end_now
    fi
}

# Kills the runner: on SIGTERM, DeepSpeed's runner would wait for lost nodes and stop other jobs on the nodes.
end_now() {
    state=ended
    say "ending the job"
    kill -KILL -- "-$running"
    signal_ranks KILL
}

# Quotes an argument for pdsh, which passes the command to a shell on each host. DeepSpeed itself puts double quotes
# around an argument with a space.
quoted() {
    if [[ "$launcher" != pdsh ]]; then
        printf '%s' "$1"
    elif [[ "$1" == *" "* ]]; then
        sed 's/[\\$`]/\\&/g' <<<"$1"
    else
        printf '%q' "$1"
    fi
}
arguments=()
for argument in "$@"; do arguments+=("$(quoted "$argument")"); done

launcher_arguments=""
if [ "$launcher" = openmpi ]; then
    interface="${INTERFACE:-$(ip -o route get "$master" | sed -n 's/.* dev \([^ ]*\).*/\1/p')}"
    launcher_arguments="--mca btl_tcp_if_include $interface --mca oob_tcp_if_include $interface --mca plm_rsh_args '$ssh_arguments'"
fi
export PDSH_SSH_ARGS_APPEND="$ssh_arguments" DS_ENV_FILE="$scratch/environment"
# Passes output on, and reads on when the console is gone: a launcher that could not write would end.
relay() {
    trap '' TERM USR1 INT HUP
    cat || true
    cat >/dev/null
}

# A new session keeps signals for this script's group from the launcher; the traps below pass them to the ranks.
trap : PIPE
setsid deepspeed --hostfile "$hostfile" --launcher "$launcher" --launcher_args="$launcher_arguments" --force_multi \
    --no_ssh_check --master_addr "$master" --master_port "$port" \
    --module "${TRAINER:-trainer.train}" "${arguments[@]}" > >(relay) 2> >(relay >&2) &
running=$!
trap stop TERM USR1 HUP
trap interrupt INT
trap end_now USR2
code=0
while wait "$running" || code=$?; kill -0 "$running" 2>/dev/null; do :; done
code=0
wait "$running" || code=$? # gets the launcher's exit code even if a signal interrupted the wait above

# The launchers miss ranks that died of a signal (negative exit codes), so the run's own marker decides on success.
is_complete() {
    ssh "${ssh_array[@]}" -- "${hosts[0]}" "cd $(printf '%q' "$PWD") && $(printf '%q ' "$bin/python" - "$@")" <<'PYTHON'
import sys
from pathlib import Path

from trainer.config.loader import load_config, schema_of
from trainer.config.yaml_file import read_yaml
from trainer.entry import is_complete

path = Path(sys.argv[1])
sys.exit(not is_complete(load_config(path, sys.argv[2:], schema_of(read_yaml(path).values), check_files=False)))
PYTHON
}
if [ "$code" -eq 0 ] && ! is_complete "$@"; then
    echo "multinode: all processes ended, but the run is not complete" >&2
    code=1
elif [ "$state" = stopping ] && [ "$code" -gt 128 ]; then
    code=75 # the request came before training handled signals, so there was nothing to save
fi
exit "$code"
