#!/usr/bin/env bash
# Replace the containers' registry by a backup. The script unpacks the whole backup first, and only
# then replaces anything. The service keeps serving its versions meanwhile. The passwords become
# those of the backup, so secrets/ must be of the same time.
#   deploy/restore.sh FILE
set -euo pipefail
cd "$(dirname "$0")/.."
compose=${COMPOSE:-docker-compose}
[ $# -eq 1 ] && [ -f "$1" ] || { echo "usage: deploy/restore.sh FILE" >&2; exit 2; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
{ tar -C "$work" -xf "$1" && (cd "$work" && sha256sum --quiet -c SHA256SUMS); } \
  || { echo "$1 is damaged; nothing was changed" >&2; exit 1; }

$compose stop mlflow control puller
trap 'rm -rf "$work"; $compose up -d mlflow accounts control puller' EXIT
$compose up -d database
for _ in $(seq 60); do
  $compose exec -T database pg_isready -q -h 127.0.0.1 -U mlflow && break
  sleep 1
done
psql() { $compose exec -T database psql -q -v ON_ERROR_STOP=1 -U mlflow -d postgres "$@"; }
in_volume() { # SERVICE COMMAND: run COMMAND as the image's user, without starting the service
  $compose run --rm -T --no-deps --entrypoint sh "$1" -ec "$2"
}
parts="control:control:/var/lib/convoy tokens:control:/var/lib/convoy/tokens"
[ ! -f "$work/artifacts.tar" ] || parts="artifacts:mlflow:/artifacts $parts"

echo "the database …"
psql -c "DROP DATABASE IF EXISTS restored" -c "CREATE DATABASE restored"
$compose exec -T database pg_restore -U mlflow -d restored --exit-on-error --no-owner \
  <"$work/database.dump"
for part in $parts; do
  IFS=: read -r name service folder <<<"$part"
  echo "$name …"
  in_volume "$service" "cd $folder; rm -rf .restored; mkdir .restored; tar -C .restored -x" \
    <"$work/$name.tar"
done

for part in $parts; do # everything is unpacked; from here on, files are only moved
  IFS=: read -r name service folder <<<"$part"
  keep=$([ "$name" != control ] || echo "-not -name tokens -not -name models -not -name plans")
  in_volume "$service" "cd $folder
    find . -mindepth 1 -maxdepth 1 -not -name .restored $keep -exec rm -rf {} +
    find .restored -mindepth 1 -maxdepth 1 -exec mv {} . \;
    rmdir .restored" </dev/null
done
psql -c "DROP DATABASE IF EXISTS mlflow WITH (FORCE)" -c "ALTER DATABASE restored RENAME TO mlflow"
echo "restored; the puller reads the registry within seconds"
