#!/usr/bin/env bash
# Put a backup in the place of the containers' registry. What serves goes on meanwhile, from the
# versions that it has.
#   deploy/restore.sh FILE
set -euo pipefail
cd "$(dirname "$0")/.."
compose=${COMPOSE:-docker-compose}
[ $# -eq 1 ] && [ -f "$1" ] || { echo "usage: deploy/restore.sh FILE" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tar -C "$work" -xf "$1"
(cd "$work" && sha256sum --quiet -c SHA256SUMS) || { echo "$1 is damaged; nothing was changed" >&2; exit 1; }

$compose stop mlflow control puller >/dev/null 2>&1
$compose up -d database
for _ in $(seq 60); do
  $compose exec -T database pg_isready -q -h 127.0.0.1 -U mlflow && break
  sleep 1
done
echo "the database …"
psql() { $compose exec -T database psql -q -v ON_ERROR_STOP=1 -U mlflow "$@"; }
psql -d postgres -c "DROP DATABASE IF EXISTS mlflow WITH (FORCE)" -c "CREATE DATABASE mlflow"
$compose exec -T database pg_restore -U mlflow -d mlflow --exit-on-error --no-owner <"$work/database.dump"
for part in artifacts:mlflow:/artifacts control:control:/var/lib/convoy tokens:control:/var/lib/convoy/tokens; do
  IFS=: read -r name service folder <<<"$part"
  echo "$name …"
  # As the images' user; without the services, which are stopped.
  $compose run --rm -T --no-deps --entrypoint sh "$service" -c \
    "cd $folder && find . -mindepth 1 -not -path './tokens*' -not -path './models*' -not -path './plans*' -delete 2>/dev/null; tar -x" \
    <"$work/$name.tar"
done
$compose up -d mlflow control puller
echo "restored; the puller looks at it within seconds"
