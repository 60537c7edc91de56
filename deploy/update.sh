#!/usr/bin/env bash
# Replace every replica of the service by the current image, without losing a request. The script
# starts an equal number of new replicas, and stops the old ones only when all new ones are ready.
# If anything fails before, it removes the new replicas and the old ones stay.
#   deploy/update.sh
set -euo pipefail
cd "$(dirname "$0")/.."
exec 9<docker-compose.yml
flock -n 9 || { echo "another update is running; wait until it has ended" >&2; exit 2; }
compose=${COMPOSE:-docker-compose}
limit_s=${CONVOY_UPDATE_LIMIT_S:-180}
old=$($compose ps -q service)
count=$(wc -w <<<"$old")
[ "$count" -gt 0 ] || { echo "no replica is running; start the service with: make up" >&2; exit 2; }

new() { $compose ps -q service | grep -vxF "$old" || true; }
give_up() {
  echo "the update failed and the old replicas keep serving; the last log lines of a new one:" >&2
  docker logs --tail 5 "$(new | head -1)" >&2 || true
  new | xargs -r docker rm -f >/dev/null
}
trap give_up EXIT
trap 'exit 1' INT TERM
output=$($compose up -d --no-build --no-deps --no-recreate --scale service=$((2 * count)) service 2>&1) \
  || { echo "$output" >&2; exit 1; }
echo "waiting for $count new replicas; $count old ones still serve …"
deadline=$((SECONDS + limit_s))
until [ "$(new | xargs -r docker inspect -f '{{.State.Health.Status}}' | grep -cx healthy)" -ge "$count" ]; do
  [ $SECONDS -lt $deadline ] || { echo "new replicas were not ready after $limit_s s" >&2; exit 1; }
  sleep 0.5
done
sleep 2 # the proxy checks every second which replicas are ready
trap - EXIT INT TERM
docker stop -t 45 $old >/dev/null
docker rm $old >/dev/null
echo "$count replicas replaced"
