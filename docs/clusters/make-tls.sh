#!/bin/sh
# Makes certificates for one cluster: its scheduler, workers and launchers show them to each other.
#
#   docs/clusters/make-tls.sh tls          ca.pem, cert.pem and key.pem in the folder tls
#
# Whoever holds key.pem can run programs on the cluster; whoever does not, cannot reach it. Copy the
# three files to every machine that takes part. They are good for a year: then make new ones.
set -eu

folder=${1:?"name a folder: $0 tls"}
days=${2:-365}
if [ -e "$folder/cert.pem" ]; then
    echo "$folder/cert.pem is there already; remove the folder to make new ones." >&2
    exit 1
fi
umask 077
mkdir -p "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# An authority of this cluster alone. Its key is deleted: no further certificate can be signed.
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days "$days" \
    -subj "/CN=tuner cluster authority" \
    -addext "basicConstraints=critical,CA:TRUE,pathlen:0" \
    -addext "keyUsage=critical,keyCertSign" \
    -keyout "$work/ca.key" -out "$folder/ca.pem" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }

# One certificate for all: Dask asks who signed it, not which host it names.
openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
    -subj "/CN=tuner cluster" \
    -keyout "$folder/key.pem" -out "$work/request.pem" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
cat >"$work/extensions" <<'EXTENSIONS'
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth, clientAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
EXTENSIONS
openssl x509 -req -days "$days" -in "$work/request.pem" -CA "$folder/ca.pem" -CAkey "$work/ca.key" \
    -set_serial "0x$(openssl rand -hex 16)" -extfile "$work/extensions" \
    -out "$folder/cert.pem" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }
openssl verify -x509_strict -CAfile "$folder/ca.pem" "$folder/cert.pem" >&2
echo "Made $folder/ca.pem, $folder/cert.pem and $folder/key.pem, good for $days days." >&2
