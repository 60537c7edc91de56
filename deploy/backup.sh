#!/usr/bin/env bash
# The registry of the containers, database and artefacts together, into one file that only you can
# read. Nothing stops: the database is dumped first, in one snapshot, and a version's files are there
# before the database names it, and never change; so the file has all that the dump names. secrets/
# is not in it: keep a copy, as the passwords in the dump are those.
#   deploy/backup.sh [FILE]        default: backups/DATE.tar
set -euo pipefail
umask 077
cd "$(dirname "$0")/.."
compose=${COMPOSE:-docker-compose}
file=$(realpath -m "${1:-backups/$(date -u +%Y%m%dT%H%M%SZ).tar}")
mkdir -p "$(dirname "$file")"
work=$(mktemp -d "$file.XXXXXX")
trap 'rm -rf "$work"' EXIT

echo "the database …"
$compose exec -T database pg_dump -U mlflow --format=custom mlflow >"$work/database.dump"
parts="control:control:/var/lib/convoy tokens:control:/var/lib/convoy/tokens"
if $compose config | grep -q 'MLFLOW_ARTIFACTS_DESTINATION: s3://'; then
  echo "the artefacts lie in a bucket: they are NOT in this file; have the bucket keep versions"
else
  parts="artifacts:mlflow:/artifacts $parts"
fi
for part in $parts; do
  IFS=: read -r name service folder <<<"$part"
  echo "$name …"
  # In a container of its own, as MLflow may be what does not start. 1: something was written meanwhile.
  $compose run --rm -T --no-deps --entrypoint sh "$service" -c \
    "tar -C $folder --exclude=./tokens --exclude=./models --exclude=./plans --exclude=./sessions -c .; [ \$? -le 1 ]" \
    >"$work/$name.tar" 2>"$work/said" || { cat "$work/said" >&2; exit 1; }
done
(cd "$work" && rm -f said && sha256sum -- * >SHA256SUMS && tar -cf "$file.part" -- *)
mv "$file.part" "$file"
echo "$file: $(du -h "$file" | cut -f1)"
