#!/bin/sh
# Starts workers on machines that SSH reaches, and ends them. Each has the project's folder at the
# same path (FOLDER), set up by `make setup`, and the three files of make-tls.sh in its folder tls.
#
#   docs/clusters/ssh-workers.sh start tls://coordinator:8786 anna bert carla
#   docs/clusters/ssh-workers.sh stop anna bert carla
set -eu

FOLDER=${FOLDER:-tuner} # on the machines, from the home folder
SSH=${SSH:-ssh -o BatchMode=yes -o ConnectTimeout=10}

verb=${1:?"start ADDRESS MACHINE ... or stop MACHINE ..."}
shift
case $verb in
start)
    address=${1:?"start ADDRESS MACHINE ..."}
    shift
    for machine in "$@"; do
        # shellcheck disable=SC2086  # SSH holds a command with its options
        $SSH "$machine" "cd '$FOLDER' && mkdir -p runs || exit
nohup .venv/bin/tuner worker --cluster '$address' \
    --tls-ca tls/ca.pem --tls-cert tls/cert.pem --tls-key tls/key.pem \
    >runs/worker.log 2>&1 </dev/null &
echo \$! >runs/worker.pid" && echo "$machine: started, log in $FOLDER/runs/worker.log"
    done
    ;;
stop)
    for machine in "$@"; do
        # shellcheck disable=SC2086
        $SSH "$machine" "cd '$FOLDER' && kill -TERM \$(cat runs/worker.pid)" &&
            echo "$machine: asked to give its trials back and end"
    done
    ;;
*)
    echo "start ADDRESS MACHINE ... or stop MACHINE ..." >&2
    exit 2
    ;;
esac
