#!/usr/bin/env bash
# Train on the nodes of a hostfile, over ssh: preflight checks, then the deepspeed launcher.
#
#   launch_scripts/multinode.sh HOSTFILE CONFIG.yaml [--section.key VALUE ...]
#   TRAINER=trainer.train | trainer.pretrain_lm | trainer.pretrain_vision
#   LAUNCHER=pdsh | openmpi
#   SSH_ARGS="-p 2222"    for every ssh call
#   INTERFACE=eth1        network interface, the same on all nodes (default: on each node the one to the first node)
#   MASTER_ADDR=10.0.0.1  address of the first node (default: what the last node resolves its name to)
#   MASTER_PORT=29500     change it when two runs share the first node
#   FORWARD="NAME ..."    environment variables to set on the nodes, besides those of FORWARDED below
#   PREFLIGHT=0           skip the checks
#
# SIGTERM, SIGUSR1 or Ctrl-C asks every rank to save and end; a second one, or SIGUSR2, ends the job at once.
# Exit codes: 0 the run is complete; 75 it was asked to end, and did: start it again; 2 the hostfile or the
# configuration is wrong; others: it failed. The clone and its .venv have to be at the same path on all nodes, and the
# run folder on a file system that they share. See hostfile.example.
set -euo pipefail
cd "$(dirname "$0")/.."

FORWARDED='^(DS_ACCELERATOR|LD_LIBRARY_PATH|PATH|TOKENIZERS_PARALLELISM|(CUDA|FI|FLAMINGO|GLOO|HF|MKL|NCCL|OMP|TORCH|UCX)_.*)$'
NOT_FORWARDED='^(CUDA_VISIBLE_DEVICES|HF_TOKEN)$' # the launcher sets the one; anybody would see the other with ps

if [ $# -lt 2 ] || [ "${1#-}" != "$1" ] || [ "${2#-}" != "$2" ]; then
    sed -n '2,18s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
bin="$(cd "${VENV:-.venv}/bin" 2>/dev/null && pwd)" || { echo "no .venv here; run launch_scripts/setup.sh first" >&2; exit 1; }
export PATH="$bin:$PATH"
hostfile="$1"
shift
launcher="${LAUNCHER:-pdsh}"
port="${MASTER_PORT:-29500}"
case "$launcher" in pdsh | openmpi) ;; *) echo "LAUNCHER is $launcher; it can be pdsh or openmpi" >&2; exit 2 ;; esac
# A node that went away is noticed within half a minute.
ssh_arguments="${SSH_ARGS:-} -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=10 -o ServerAliveCountMax=3"
read -ra ssh_array <<<"$ssh_arguments"
if [ -n "${INTERFACE:-}" ]; then export NCCL_SOCKET_IFNAME="=$INTERFACE" GLOO_SOCKET_IFNAME="$INTERFACE"; fi
FLAMINGO_JOB="$(hostname)-$$-$RANDOM" # by this the job's processes are found on the nodes
export FLAMINGO_JOB
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

# The hosts' names on one line, the first one's address on the next.
python - "$hostfile" "${MASTER_ADDR:-}" "${ssh_array[@]}" >"$scratch/hosts" <<'PYTHON'
import sys
from pathlib import Path

from trainer.errors import TrainerError
from trainer.resilience.hosts import master_address, read_hostfile

try:
    hosts = read_hostfile(Path(sys.argv[1]))
    print(*(host.name for host in hosts))
    print(sys.argv[2] or master_address(hosts, sys.argv[3:]))
except TrainerError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
PYTHON
{ read -ra hosts; read -r master; } <"$scratch/hosts"

# DeepSpeed reads NAME=VALUE lines and pastes them into a shell command: nothing that a shell would change may go in.
forward() {
    local name value
    for name in $({ compgen -e | grep -E "$FORWARDED" | grep -vE "$NOT_FORWARDED"; tr ' ' '\n' <<<"${FORWARD:-}"; } | sort -u); do
        value="${!name-}"
        if [[ "$value" =~ [^[:alnum:]_@%+=:,./-] ]]; then
            echo "$name cannot be set on the nodes: its value has characters that a shell would change" >&2
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

# Runs a shell script, given on standard input, on all hosts at once.
on_every_host() {
    local host script waiting=()
    script="$(cat)"
    for host in "${hosts[@]}"; do
        ssh "${ssh_array[@]}" -- "$host" bash -s -- "$@" <<<"$script" >&2 &
        waiting+=($!)
    done
    wait "${waiting[@]}" || true # a host that is gone has no processes either
}

# Signals the job's ranks, and not the loader processes and launchers around them; KILL ends the launchers first.
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

asked=0
stop() {
    asked=$((asked + 1))
    if [ "$asked" -eq 1 ]; then
        echo "multinode: asking every rank to save and end" >&2
        signal_ranks USR1
    else
        end_now
    fi
}

# Asked to end in order, DeepSpeed's runner would first wait for nodes that are gone, and stop other jobs on the nodes.
end_now() {
    asked=2
    echo "multinode: ending the job" >&2
    kill -KILL -- "-$running"
    signal_ranks KILL
}

# pdsh hands the command to a shell on each host; DeepSpeed itself puts double quotes around what has a space in it.
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
# In a session of its own: what a terminal or a scheduler sends to this script's group comes to the ranks in order.
setsid deepspeed --hostfile "$hostfile" --launcher "$launcher" --launcher_args="$launcher_arguments" --force_multi \
    --no_ssh_check --master_addr "$master" --master_port "$port" \
    --module "${TRAINER:-trainer.train}" "${arguments[@]}" &
running=$!
trap stop TERM USR1 INT
trap end_now USR2
code=0
while wait "$running" || code=$?; kill -0 "$running" 2>/dev/null; do :; done
code=0
wait "$running" || code=$? # the launcher's own, also when a signal cut the wait before short

# The launchers count only positive exit codes, so success is what the run's own marker says.
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
elif [ "$asked" -eq 1 ] && [ "$code" -gt 128 ]; then
    code=75 # asked before training listened to signals: there was nothing to save yet
fi
exit "$code"
