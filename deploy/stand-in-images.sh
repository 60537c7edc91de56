#!/usr/bin/env bash
# Stand-ins for the two base images, made with debootstrap, for machines that reach Debian's
# packages but no image registry. They get the tags of the real ones, so that the Dockerfile and
# docker-compose.yml stay as they are. Needs root, debootstrap and a running engine; about 4 minutes.
#   deploy/stand-in-images.sh [WORK_FOLDER]
set -euo pipefail
work=${1:-$(mktemp -d)}
root=$work/root

if [ ! -x "$root/usr/bin/python3" ]; then
  debootstrap --variant=minbase \
    --include=ca-certificates,python3,python3-venv,python3-pip,python-is-python3 bookworm "$root"
fi
# Builds must trust and use what this machine does; neither goes into a real image.
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$root/etc/pip.conf"
tar -C "$root" -c . | docker import - python:3.11-slim-bookworm

mkdir -p "$work/postgres"
cat >"$work/postgres/entrypoint" <<'EOF'
#!/bin/bash
set -euo pipefail
PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
data=/var/lib/postgresql/data
as_postgres() { setpriv --reuid=postgres --regid=postgres --clear-groups "$@"; }
if [ ! -s "$data/PG_VERSION" ]; then
  chown postgres "$data"
  install -m 600 -o postgres /dev/stdin /tmp/password <<<"$POSTGRES_PASSWORD"
  as_postgres initdb -D "$data" -U "$POSTGRES_USER" --encoding=UTF8 --locale=C.UTF-8 \
    --auth-host=scram-sha-256 --auth-local=trust --pwfile=/tmp/password
  rm /tmp/password
  echo "host all all all scram-sha-256" >>"$data/pg_hba.conf"
  as_postgres postgres --single -D "$data" postgres <<<"CREATE DATABASE $POSTGRES_DB;" >/dev/null
fi
exec setpriv --reuid=postgres --regid=postgres --clear-groups postgres -D "$data" -h '*' -k /tmp
EOF
chmod +x "$work/postgres/entrypoint"
cat >"$work/postgres/Dockerfile" <<'EOF'
FROM python:3.11-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends postgresql && rm -rf /var/lib/apt/lists/*
RUN ln -s /usr/lib/postgresql/*/bin/pg_isready /usr/local/bin/pg_isready && mkdir -p /var/lib/postgresql/data
COPY entrypoint /usr/local/bin/entrypoint
ENTRYPOINT ["/usr/local/bin/entrypoint"]
EOF
DOCKER_BUILDKIT=0 docker build --network host -t postgres:16-bookworm "$work/postgres"
