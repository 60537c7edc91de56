#!/usr/bin/env bash
# Replace every replica of the service by the image as it is now, losing no request: as many new ones
# are started beside the old, and only when all of them are ready the old ones end. Whatever goes
# wrong before, the new ones go and the old ones stay.
#   deploy/update.sh
set -euo pipefail
cd "$(dirname "$0")/.."
exec 9<docker-compose.yml
flock -n 9 || { echo "another update is under way" >&2; exit 2; }
compose=${COMPOSE:-docker-compose}
limit_s=${CONVOY_UPDATE_LIMIT_S:-180}
old=$($compose ps -q service)
count=$(wc -w <<<"$old")
[ "$count" -gt 0 ] || { echo "no service is up; make up" >&2; exit 2; }

new() { $compose ps -q service | grep -vxF "$old" || true; }
give_up() {
  echo "the old image serves on; of the new one:" >&2
  docker logs --tail 5 "$(new | head -1)" >&2 || true
  new | xargs -r docker rm -f >/dev/null
}
trap give_up EXIT
trap 'exit 1' INT TERM
said=$($compose up -d --no-build --no-deps --no-recreate --scale service=$((2 * count)) service 2>&1) \
  || { echo "$said" >&2; exit 1; }
echo "$count new beside $count old ones …"
deadline=$((SECONDS + limit_s))
until [ "$(new | xargs -r docker inspect -f '{{.State.Health.Status}}' | grep -cx healthy)" -ge "$count" ]; do
  [ $SECONDS -lt $deadline ] || { echo "not ready after $limit_s s" >&2; exit 1; }
  sleep 0.5
done
sleep 2 # the proxy looks every second
trap - EXIT INT TERM
docker stop -t 45 $old >/dev/null
docker rm $old >/dev/null
echo "$count replicas replaced"
