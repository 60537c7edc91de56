#!/usr/bin/env bash
# Build substitutes for the base images with debootstrap, on machines that reach Debian's packages
# but no image registry. They get the tags of the real images, so that the Dockerfile and
# docker-compose.yml need no change. Needs root, debootstrap and a running engine; takes three
# minutes.
#   deploy/stand-in-images.sh [WORK_FOLDER]
set -euo pipefail
work=${1:-$(mktemp -d)}
root=$work/root
mkdir -p "$work"
# debootstrap mounts these, and a folder with mounts in it cannot be removed.
trap 'umount -q "$root/proc" "$root/sys" 2>/dev/null || true' EXIT

if [ ! -x "$root/usr/bin/python3" ]; then
  debootstrap --variant=minbase \
    --include=ca-certificates,python3,python3-venv,python3-pip,python-is-python3 bookworm "$root" \
    >"$work/debootstrap.log" || { tail "$work/debootstrap.log"; exit 1; }
  # The real image has none of these either, so that both have the same size.
  rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/* \
    "$root"/usr/share/{doc,man,locale,info}/* "$root"/usr/lib/python3*/test
  find "$root" -name __pycache__ -prune -exec rm -rf {} +
fi
# Builds must trust the certificates of this machine. Real images contain neither of these files.
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
printf '[global]\ncert = /etc/ssl/certs/ca-certificates.crt\n' >"$root/etc/pip.conf"
tar -C "$root" -c . | docker import - python:3.11-slim-bookworm >/dev/null

mkdir -p "$work/postgres"
cat >"$work/postgres/entrypoint" <<'END'
#!/bin/bash
set -euo pipefail
PATH=$(echo /usr/lib/postgresql/*/bin):$PATH
data=/var/lib/postgresql/data
as_postgres() { setpriv --reuid=postgres --regid=postgres --clear-groups "$@"; }
if [ ! -s "$data/PG_VERSION" ]; then
  chown postgres "$data"
  install -m 600 -o postgres "$POSTGRES_PASSWORD_FILE" /tmp/password
  as_postgres initdb -D "$data" -U "$POSTGRES_USER" --encoding=UTF8 --locale=C.UTF-8 \
    --auth-host=scram-sha-256 --auth-local=trust --pwfile=/tmp/password
  rm /tmp/password
  echo "host all all all scram-sha-256" >>"$data/pg_hba.conf"
  as_postgres postgres --single -D "$data" postgres <<<"CREATE DATABASE $POSTGRES_DB;" >/dev/null
fi
exec setpriv --reuid=postgres --regid=postgres --clear-groups postgres -D "$data" -h '*' -k /tmp
END
chmod +x "$work/postgres/entrypoint"
cat >"$work/postgres/Dockerfile" <<'END'
FROM python:3.11-slim-bookworm
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends postgresql \
    && ln -s /usr/lib/postgresql/*/bin/* /usr/local/bin/ && mkdir -p /var/lib/postgresql/data
COPY entrypoint /usr/local/bin/entrypoint
ENV PGHOST=/tmp
ENTRYPOINT ["/usr/local/bin/entrypoint"]
END

mkdir -p "$work/haproxy"
cat >"$work/haproxy/Dockerfile" <<'END'
FROM python:3.11-slim-bookworm
RUN apt-get update -qq && apt-get install -y -qq --no-install-recommends haproxy
STOPSIGNAL SIGUSR1
USER haproxy
ENTRYPOINT ["haproxy", "-W", "-db", "-f"]
CMD ["/usr/local/etc/haproxy/haproxy.cfg"]
END
for image in postgres:16-bookworm haproxy:2.8-bookworm; do
  name=${image%%:*}
  DOCKER_BUILDKIT=0 docker build --network host -t "$image" "$work/$name" >"$work/$name.log" 2>&1 \
    || { tail "$work/$name.log"; exit 1; }
done
