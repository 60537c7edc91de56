#!/usr/bin/env bash
# Back up the containers' registry, database and artefacts, into one file that only you can read.
# No service stops. The database is dumped first, in one snapshot. MLflow stores a version's files
# before the database names the version, and they never change: so the backup contains every file
# that the dump names. It does not contain secrets/: keep a copy, because the dump holds those
# passwords.
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
  echo "the artefacts are in a bucket and NOT in this file; turn on versioning in the bucket"
else
  parts="artifacts:mlflow:/artifacts $parts"
fi
for part in $parts; do
  IFS=: read -r name service folder <<<"$part"
  echo "$name …"
  # In a new container, because MLflow may be unable to start. tar returns 1 if a file has changed.
  $compose run --rm -T --no-deps --entrypoint sh "$service" -c \
    "tar -C $folder --exclude=./tokens --exclude=./models --exclude=./plans --exclude=./sessions -c .; [ \$? -le 1 ]" \
    >"$work/$name.tar" 2>"$work/errors" || { cat "$work/errors" >&2; exit 1; }
done
(cd "$work" && rm -f errors && sha256sum -- * >SHA256SUMS && tar -cf "$file.part" -- *)
mv "$file.part" "$file"
echo "$file: $(du -h "$file" | cut -f1)"
