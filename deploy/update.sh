#!/usr/bin/env bash
# Replace every replica of the service by the image as it is now, losing no request: as many new ones
# are started beside the old, and only when all of them are ready the old ones end. When a new one
# does not get ready, the new ones go and the old ones stay.
#   deploy/update.sh
set -euo pipefail
cd "$(dirname "$0")/.."
compose=${COMPOSE:-docker-compose}
limit_s=${CONVOY_UPDATE_LIMIT_S:-180}
old=$($compose ps -q service)
count=$(wc -w <<<"$old")
[ "$count" -gt 0 ] || { echo "no service is up; make up" >&2; exit 2; }

$compose up -d --no-build --no-deps --no-recreate --scale service=$((2 * count)) service >/dev/null 2>&1
new=$($compose ps -q service | grep -vxF "$old")
echo "$count new beside $count old ones …"
healthy() { docker inspect -f '{{.State.Health.Status}}' $new 2>/dev/null | grep -cx healthy; }
deadline=$((SECONDS + limit_s))
until [ "$(healthy || true)" -eq "$count" ]; do
  if [ $SECONDS -ge $deadline ]; then
    echo "the new image does not get ready; the old one serves on:" >&2
    docker logs --tail 5 "$(head -1 <<<"$new")" >&2 || true
    docker rm -f $new >/dev/null
    exit 1
  fi
  sleep 0.5
done
sleep 2 # the proxy looks every second
docker stop -t 45 $old >/dev/null
docker rm $old >/dev/null
echo "$count replicas replaced"
