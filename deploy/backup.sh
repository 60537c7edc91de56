#!/usr/bin/env bash
# The registry of the containers, database and artefacts together, into one file. Nothing stops: the
# database is dumped first, in one snapshot, and a version's files are there before the database
# names it, and never change; so the file has all that the dump names.
#   deploy/backup.sh [FILE]        default: backups/DATE.tar
set -euo pipefail
cd "$(dirname "$0")/.."
compose=${COMPOSE:-docker-compose}
file=$(realpath -m "${1:-backups/$(date -u +%Y%m%dT%H%M%SZ).tar}")
mkdir -p "$(dirname "$file")"
work=$(mktemp -d "$file.XXXXXX")
trap 'rm -rf "$work"' EXIT

echo "the database …"
$compose exec -T database pg_dump -U mlflow --format=custom mlflow >"$work/database.dump" \
  2>"$work/said" || { cat "$work/said" >&2; exit 1; }
for part in artifacts:mlflow:/artifacts control:control:/var/lib/convoy tokens:control:/var/lib/convoy/tokens; do
  IFS=: read -r name service folder <<<"$part"
  echo "$name …"
  $compose exec -T "$service" tar -C "$folder" --exclude=./tokens --exclude=./models --exclude=./plans \
    -c . >"$work/$name.tar"
done
(cd "$work" && rm -f said && sha256sum -- * >SHA256SUMS && tar -cf "$file.part" -- *)
mv "$file.part" "$file"
echo "$file: $(du -h "$file" | cut -f1)"
